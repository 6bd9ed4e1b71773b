// lrua_scan forward (a step is a scan of one): one launch for all steps.
//
// A step: choose the slots from what every warp found least used; write; compare; tell sums and reads | barrier | weights, usage,
// the least used of the warp; the next step's inputs put in their places | barrier |. Two barriers a step; similarities beyond a
// bound cost one more.
#include "kernels.h"
#include "lrua_forward.cuh"

namespace mann_fast {
namespace cuda {
namespace {

template <class T, int C, int HEADS, bool RESIDENT, class P>
struct ForwardScan : LruaForward<T, C, HEADS, RESIDENT, false, P> {
  using Base = LruaForward<T, C, HEADS, RESIDENT, false, P>;
  using Base::a, Base::inputs, Base::plan, Base::rank, Base::sample, Base::small;
  const int first_read, read_place, read_head;

  __device__ __forceinline__ ForwardScan(const LruaScan& a, const P& plan, Places places)
      : Base(a, plan, places, gpu::block() / plan.cluster, static_cast<int>(gpu::block() % plan.cluster)),
        first_read(rank * 32 * plan.warps + gpu::thread()),
        read_place(first_read < plan.R * plan.D ? vector_at(plan, first_read) : 0),
        read_head(first_read < plan.R * plan.D ? first_read / plan.D : 0) {}

  // Where the thread's first number of the reads lies is found once.
  __device__ __forceinline__ void give_reads(int64_t t) {
    const int count = plan.R * plan.D, threads = 32 * plan.warps;
    const int64_t row = (t * a.B + sample) * count;
    if (first_read < count)
      store_input(a.reads, a.input, row + first_read, this->read_at(read_place, read_head, Base::turn_of(t)));
    if constexpr (!P::fixed)
      for (int j = first_read + plan.cluster * threads; j < count; j += plan.cluster * threads)
        store_input(a.reads, a.input, row + j, this->read_at(j));
  }

  // Where the plan is known when compiled. What a step does beside the way from one barrier to the next, it does at its start:
  // there it fills the time until the least used slots are known.
  __device__ __forceinline__ void run_steady() {
    StreamOf<T, LruaScan, P> stream(a, plan);
    const int64_t steps = a.sequences.length(a.T, sample);
    const auto ask = [&](int64_t t) { stream.ask((t < steps ? t : steps - 1) * a.B + sample); };
    if (steps > 0) ask(0);
    this->begin(steps > 0 && a.sequences.begins(0, a.B, sample));
    small.in.clear();
    gpu::sync();
    for (int turn = 0; turn < 2; ++turn) stream.fill(inputs(turn));
    if (steps > 0) {
      stream.put(inputs(0));
      ask(1);
    }
    gpu::sync();
    for (int64_t t = 0; t < steps; ++t) {
      stream.put(inputs(t + 1));
      ask(t + 2);
      if (t > 0) give_reads(t - 1);
      const bool next_anew = t + 1 < steps && a.sequences.begins(t + 1, a.B, sample);
      this->write_and_read(inputs(t), t);
      gpu::sync();
      this->weigh_and_use(next_anew, Base::turn_of(t));
      gpu::sync();
    }
    if (steps > 0) give_reads(steps - 1);
    this->end();
    this->clear_steps(a, sample, steps, a.reads, a.input, plan.R * plan.D);
  }

  __device__ __forceinline__ void run() {
    Stream<T, LruaScan, P> stream(a, plan);
    const int64_t steps = a.sequences.length(a.T, sample);
    if (steps > 0) stream.ask(sample);
    this->begin(steps > 0 && a.sequences.begins(0, a.B, sample));
    small.in.clear();
    gpu::sync();
    if (steps > 0) stream.put(inputs(0));
    this->sync();
    for (int64_t t = 0; t < steps; ++t) {
      const bool more = t + 1 < steps;
      if (more) stream.ask((t + 1) * a.B + sample);
      const bool next_anew = more && a.sequences.begins(t + 1, a.B, sample);
      this->write_and_read(inputs(t), t);
      this->sync();
      this->weigh_and_use(next_anew);
      give_reads(t);
      if (more) stream.put(inputs(t + 1));
      this->sync();
    }
    this->end();
    this->clear_steps(a, sample, steps, a.reads, a.input, plan.R * plan.D);
  }
};

template <class T, int C, int HEADS, bool RESIDENT, class P>
__global__ void __launch_bounds__(most_threads, 1)
    forward_kernel(const __grid_constant__ LruaScan a, const __grid_constant__ Plan plan, unsigned char* scratch) {
  const auto& known = P::of(plan);
  ForwardScan<T, C, HEADS, RESIDENT, P> scan(a, known, Places(plan, scratch));
  if constexpr (P::fixed) scan.run_steady();
  else scan.run();
}

template <class T>
const char* plan_of(const LruaScan& a, Plan& plan) {
  if (const char* why = too_large(a.N, a.D, a.R)) return why;
  plan = plan_scan<Forward<T>, T>(sizes_of(a), a.B, 0, gpu::limits());
  return nullptr;
}

template <class T>
const char* scan(const LruaScan& a, const Queue& queue) {
  Plan plan;
  if (const char* why = plan_of<T>(a, plan)) return why;
  const int64_t blocks = a.B * plan.cluster;
  void* scratch = plan.scratch && blocks ? queue.scratch(queue.owner, plan.scratch * static_cast<size_t>(blocks)) : nullptr;
  return with_kernel<T>(plan, [&](auto c, auto h, auto resident, auto kind) {
    return gpu::launch(
        forward_kernel<T, decltype(c)::value, decltype(h)::value, decltype(resident)::value, typename decltype(kind)::Type>,
        {blocks, 32 * plan.warps, plan.cluster, plan.shared, queue.stream}, a, plan, static_cast<unsigned char*>(scratch));
  });
}

}  // namespace

const char* lrua_scan(const LruaScan& a, const Queue& queue) {
  return a.state == Dtype::float64 ? scan<double>(a, queue) : scan<float>(a, queue);
}
const char* lrua_scan_layout(const LruaScan& a, Layout& layout) {
  Plan plan;
  const char* why = plan_of<float>(a, plan);
  if (!why) layout = layout_of(plan);
  return why;
}

}  // namespace cuda
}  // namespace mann_fast

// lrua_scan forward (a step is a scan of one): one launch for all steps.
//
// A step: choose the slots from what every warp found least used; write; compare; tell sums and reads | barrier | weights, usage,
// the least used of the warp; the next step's inputs put in their places | barrier |. Two barriers a step; similarities beyond a
// bound cost one more. Where the plan is known when compiled, warps without slots bring the inputs and give out the reads.
#include "kernels.h"
#include "lrua_forward.cuh"

namespace mann_fast {
namespace cuda {
namespace {

// Warps without slots.
template <class P>
constexpr int helpers = P::fixed ? 4 : 0;

template <class T, int C, int HEADS, bool RESIDENT, class P>
struct ForwardScan : LruaForward<T, C, HEADS, RESIDENT, false, P> {
  using Base = LruaForward<T, C, HEADS, RESIDENT, false, P>;
  using Base::a, Base::inputs, Base::place, Base::plan, Base::rank, Base::sample, Base::small;
  const int first_read, read_place, read_head;

  __device__ __forceinline__ ForwardScan(const LruaScan& a, const P& plan, Places places)
      : Base(a, plan, places, gpu::block() / plan.cluster, static_cast<int>(gpu::block() % plan.cluster)),
        first_read(rank * 32 * plan.warps + gpu::thread()), read_place(plan.D > 0 ? vector_at(plan, first_read) : 0),
        read_head(plan.D > 0 ? first_read / plan.D : 0) {}

  // Where the thread's first number of the reads lies is found once.
  __device__ __forceinline__ void give_reads(int64_t t) {
    const int count = plan.R * plan.D, threads = 32 * plan.warps;
    const int64_t row = (t * a.B + sample) * count;
    if (first_read < count) store_input(a.reads, a.input, row + first_read, this->read_at(read_place, read_head));
    for (int j = first_read + plan.cluster * threads; j < count; j += plan.cluster * threads)
      store_input(a.reads, a.input, row + j, this->read_at(j));
  }

  // Where the plan is known when compiled: warps that have slots go from one barrier to the next, and others do beside them what
  // a step needs besides. Before a step's first barrier these put the next one's inputs in their places, ask for those of the one
  // after it, and give out the reads of the one before; before its second they prepare the next one's inputs.
  __device__ __forceinline__ void run_steady() {
    const int64_t steps = a.sequences.length(a.T, sample);
    small.in.clear();
    gpu::sync();
    if (place.warp < P::warps) {
      this->begin(steps > 0 && a.sequences.begins(0, a.B, sample));
      gpu::sync();
      gpu::sync();
      const int count = static_cast<int>(steps);
      const bool resets = a.sequences.resets != nullptr;
      int next_anchor = a.anchor_every > 0 && a.anchor_every < steps ? static_cast<int>(a.anchor_every) : count;
      for (int t = 0; t < count; ++t) {
        bool next_anew = false;
        if (resets || t == next_anchor) {  // seldom: so that a step need only ask once
          next_anew = t + 1 < count && a.sequences.begins(t + 1, a.B, sample);
          if (t == next_anchor) {
            this->save_state(t);
            next_anchor += static_cast<int>(a.anchor_every);
          }
        }
        this->take_step(inputs(t), t);
        gpu::sync();
        this->end_step(next_anew, Base::turn_of(t));
        gpu::sync();
      }
      this->end();
    } else {
      serve(steps, gpu::thread() - 32 * P::warps);
    }
    this->clear_steps(a, sample, steps, a.reads, a.input, plan.R * plan.D);
  }
  __device__ __forceinline__ void serve(int64_t steps, int thread) {
    SteadyStream<T, LruaScan, P, helpers<P>> stream(a, plan, thread);
    const auto ask = [&](int64_t t) { stream.ask((t < steps ? t : steps - 1) * a.B + sample); };
    const auto prepare = [&](int64_t t) {
      for (int head = thread / 32; head < plan.R; head += helpers<P>) this->prepare(inputs(t), head);
    };
    for (int turn = 0; turn < 2; ++turn) stream.fill(inputs(turn), thread);
    if (steps > 0) {
      ask(0);
      stream.put(inputs(0));
      ask(1);
    }
    gpu::sync();
    if (steps > 0) prepare(0);
    gpu::sync();
    constexpr int reads = P::fixed ? (P::R * P::columns + 32 * helpers<P> - 1) / (32 * helpers<P>) : 1;
    int at[reads], head[reads];
    const int count = plan.R * plan.D;
    for (int i = 0; i < reads; ++i) {
      const int j = thread + i * 32 * helpers<P>;
      at[i] = j < count ? vector_at(plan, j) : 0;
      head[i] = j < count ? j / plan.D : 0;
    }
    const auto give = [&](int64_t t) {
      const int64_t row = (t * a.B + sample) * count;
#pragma unroll
      for (int i = 0; i < reads; ++i) {
        const int j = thread + i * 32 * helpers<P>;
        if (j < count) store_input(a.reads, a.input, row + j, this->read_at(at[i], head[i], Base::turn_of(t)));
      }
    };
    for (int64_t t = 0; t < steps; ++t) {
      stream.put(inputs(t + 1));
      ask(t + 2);
      if (t > 0) give(t - 1);
      if (!this->bounded(inputs(t).beta)) gpu::sync();  // as those that compare
      gpu::sync();
      prepare(t + 1);
      gpu::sync();
    }
    if (steps > 0) give(steps - 1);
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
      this->begin_step(inputs(t), t);
      this->sync();
      this->end_step(next_anew);
      give_reads(t);
      if (more) stream.put(inputs(t + 1));
      this->sync();
    }
    this->end();
    this->clear_steps(a, sample, steps, a.reads, a.input, plan.R * plan.D);
  }
};

template <class T, int C, int HEADS, bool RESIDENT, class P>
__global__ void __launch_bounds__(most_threads + 32 * helpers<P>, 1)
    forward_kernel(const __grid_constant__ LruaScan a, const __grid_constant__ Plan plan, unsigned char* scratch) {
  const auto& known = P::of(plan);
  ForwardScan<T, C, HEADS, RESIDENT, P> scan(a, known, Places(plan, scratch));
  if constexpr (P::fixed) scan.run_steady();
  else scan.run();
}

template <class T>
const char* plan_of(const LruaScan& a, Plan& plan) {
  if (const char* why = too_large(a.N, a.D, a.R)) return why;
  plan = plan_scan<LruaForwardRoom<T>, T>(sizes_of(a), a.B, 0, gpu::limits());
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
        {blocks, 32 * (plan.warps + helpers<typename decltype(kind)::Type>), plan.cluster, plan.shared, queue.stream}, a, plan,
        static_cast<unsigned char*>(scratch));
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

// ntm_scan forward (a step is a scan of one, an address a step without write heads): one launch for all steps.
//
// Heads that address one memory: compare, tell the sums of exponentials | barrier | shift, tell the maximum of the warp and the
// sum of the powers relative to it | barrier | weights; read; erase and add. Read first, all heads do so at once: two barriers a
// step. Write first, those that write and then those that read: four. Similarities beyond a bound cost one more. With a fixed plan
// powers are relative to a number known beforehand; where that will not do, the maximum is found after all: two more.
#include "kernels.h"
#include "ntm_forward.cuh"

namespace mann_fast {
namespace cuda {
namespace {

template <class T, int C, bool RESIDENT, class P>
struct ForwardScan : NtmForward<T, C, RESIDENT, false, P> {
  using Base = NtmForward<T, C, RESIDENT, false, P>;
  using Base::a, Base::inputs, Base::plan, Base::rank, Base::sample, Base::small;
  NtmStream<T, NtmScan, P> stream;
  const int first_read, read_place;

  __device__ __forceinline__ ForwardScan(const NtmScan& a, const P& plan, Places places)
      : Base(a, plan, places, gpu::block() / plan.cluster, static_cast<int>(gpu::block() % plan.cluster)), stream(a, plan),
        first_read(rank * 32 * plan.warps + gpu::thread()), read_place(plan.D > 0 ? vector_at(plan, first_read) : 0) {}

  // Where the thread's first number lies is found once.
  __device__ __forceinline__ void give_reads(int64_t t) {
    const int count = plan.reads * plan.D, stride = plan.cluster * 32 * plan.warps;
    const int64_t row = (t * a.B + sample) * count;
    if (first_read < count) store_as(a.reads, a.input, row + first_read, this->read_at(read_place));
    if constexpr (!P::fixed)
      for (int j = first_read + stride; j < count; j += stride)
        store_as(a.reads, a.input, row + j, this->read_at(vector_at(plan, j)));
  }

  __device__ __forceinline__ void run() {
    const int64_t steps = a.sequences.length(a.T, sample);
    if (steps > 0) stream.ask(sample);
    this->begin(steps > 0 && a.sequences.begins(0, a.B, sample));
    small.in.clear();  // padded columns are 0 in every step
    gpu::sync();
    if (steps > 0) stream.put(inputs(0));
    this->sync();
    for (int64_t t = 0; t < steps; ++t) {
      const bool more = t + 1 < steps;
      if (more) stream.ask((t + 1) * a.B + sample);
      const bool next_anew = more && a.sequences.begins(t + 1, a.B, sample);
      this->take_step(inputs(t), t, [&] {
        if (t > 0) give_reads(t - 1);
        if (more) stream.put(inputs(t + 1));
      });
      if (next_anew) {
        gpu::sync_warp();  // its lanes have read the weights
        this->begin(true);
      }
    }
    this->sync();
    if (steps > 0) give_reads(steps - 1);
    this->end();
    this->clear_steps(a, sample, steps, a.reads, a.input, plan.reads * plan.D);
    if (plan.cluster > 1) gpu::sync_cluster();  // no block ends while another reads from it
  }
};

template <class T, int C, bool RESIDENT, class P>
__global__ void __launch_bounds__(most_threads, 1)
    ntm_forward_kernel(const __grid_constant__ NtmScan a, const __grid_constant__ Plan plan, unsigned char* scratch) {
  const auto& known = P::of(plan);
  ForwardScan<T, C, RESIDENT, P>(a, known, Places(plan, scratch)).run();
}

template <class T>
const char* plan_of(const NtmScan& a, Plan& plan) {
  if (const char* why = ntm_too_large(a)) return why;
  plan = plan_scan<NtmForwardRoom<T>, T>(ntm_sizes_of(a), a.B, 0, gpu::limits());
  return nullptr;
}

template <class T>
const char* scan(const NtmScan& a, const Queue& queue) {
  Plan plan;
  if (const char* why = plan_of<T>(a, plan)) return why;
  const int64_t blocks = a.B * plan.cluster;
  void* scratch = plan.scratch && blocks ? queue.scratch(queue.owner, plan.scratch * static_cast<size_t>(blocks)) : nullptr;
  return with_ntm_kernel<T>(plan, [&](auto c, auto resident, auto kind) {
    return gpu::launch(ntm_forward_kernel<T, decltype(c)::value, decltype(resident)::value, typename decltype(kind)::Type>,
                       {blocks, 32 * plan.warps, plan.cluster, plan.shared, queue.stream}, a, plan,
                       static_cast<unsigned char*>(scratch));
  });
}

}  // namespace

const char* ntm_scan(const NtmScan& a, const Queue& queue) {
  return a.state == Dtype::float64 ? scan<double>(a, queue) : scan<float>(a, queue);
}
const char* ntm_scan_layout(const NtmScan& a, Layout& layout) {
  Plan plan;
  const char* why = plan_of<float>(a, plan);
  if (!why) layout = layout_of(plan);
  return why;
}

}  // namespace cuda
}  // namespace mann_fast

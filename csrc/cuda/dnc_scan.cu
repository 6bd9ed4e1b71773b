// dnc_scan forward (a step is a scan of one): one launch for all steps.
//
// Usage; the memory compared with the write key | barrier | the slots' order; the reads of the step before | barrier | one warp:
// allocation and write weights | barrier | write, and compare with the read keys; the links and both directions | barrier | a
// warp for each head: read weights | barrier | the warps' parts of the reads.
#include "dnc_forward.cuh"
#include "dnc_held_forward.cuh"

namespace mann_fast {
namespace cuda {
namespace {

template <class T, bool NEAR>
struct DncForwardScan : DncForwardStep<T, NEAR> {
  using Base = DncForwardStep<T, NEAR>;
  using Base::a, Base::inputs, Base::plan, Base::sample;
  DncStream<T> stream;

  __device__ __forceinline__ DncForwardScan(const DncScan& a, const DncPlan& plan, unsigned char* scratch)
      : Base(a, plan, DncPlaces(plan, scratch), gpu::block()), stream(plan, a.input) {}

  __device__ __forceinline__ void give_reads(int64_t step) {
    const int64_t count = static_cast<int64_t>(plan.R) * plan.D;
    this->with_each(count, [&](int64_t i) { store_as(a.reads, a.input, (step * a.B + sample) * count + i, this->read_of(i)); });
  }

  __device__ __forceinline__ void run() {
    const int64_t steps = a.sequences.length(a.T, sample);
    if (steps > 0) {
      stream.ask(sample);
      stream.put(inputs(0));
    }
    this->begin(steps > 0 && a.sequences.begins(0, a.B, sample));
    gpu::sync();
    for (int64_t t = 0; t < steps; ++t) {
      const bool more = t + 1 < steps;
      if (more) stream.ask((t + 1) * a.B + sample);
      this->take_step(
          inputs(t), t,
          [&] {
            if (t > 0) give_reads(t - 1);
          },
          [&] {
            if (more) stream.put(inputs(t + 1));
          });
      if (more && a.sequences.begins(t + 1, a.B, sample)) {
        gpu::sync();
        this->begin(true);
        gpu::sync();
      }
    }
    gpu::sync();
    if (steps > 0) give_reads(steps - 1);
    this->end();
    this->clear_steps(a, sample, steps, a.reads, a.input, static_cast<int64_t>(plan.R) * plan.D);
  }
};

template <class T, bool NEAR>
__global__ void __launch_bounds__(most_threads, 1)
    dnc_forward_kernel(const __grid_constant__ DncScan a, const __grid_constant__ DncPlan plan, unsigned char* scratch) {
  DncForwardScan<T, NEAR>(a, plan, scratch).run();
}

template <int C>
__global__ void __launch_bounds__(held_threads, 1)
    dnc_forward_held_kernel(const __grid_constant__ DncScan a, const __grid_constant__ DncPlan plan) {
  HeldForwardScan<C>(a, plan).run();
}

size_t held_bytes(const DncPlan& plan) {
  return with_held(plan, [](auto c) {
    Carver carver(nullptr);
    HeldForward<decltype(c)::value>{carver};
    return carver.used;
  });
}

template <class T>
const char* plan_of(const DncScan& a, DncPlan& plan) {
  if (const char* why = dnc_too_large(a)) return why;
  plan = dnc_sizes_of(a, a.told.write_mask != nullptr, a.told.link_sharpening != nullptr, false);
  dnc_tell(plan, a.told, nullptr);
  const gpu::Limits limits = gpu::limits();
  if (sizeof(T) == 4 && dnc_hold(plan, limits, held_bytes(plan))) return nullptr;
  dnc_place<DncForward<T>>(plan, limits);
  return nullptr;
}

template <class T>
const char* scan(const DncScan& a, const Queue& queue) {
  DncPlan plan;
  if (const char* why = plan_of<T>(a, plan)) return why;
  if constexpr (sizeof(T) == 4) {
    const gpu::Launch how{a.B, held_threads, 1, plan.shared, queue.stream};
    if (plan.held)
      return with_held(plan, [&](auto c) { return gpu::launch(dnc_forward_held_kernel<decltype(c)::value>, how, a, plan); });
  }
  const size_t bytes = plan.scratch * static_cast<size_t>(a.B);
  unsigned char* scratch = bytes ? static_cast<unsigned char*>(queue.scratch(queue.owner, bytes)) : nullptr;
  const gpu::Launch how{a.B, 32 * plan.warps, 1, plan.shared, queue.stream};
  if (sizeof(T) == 4 && plan.near) return gpu::launch(dnc_forward_kernel<T, sizeof(T) == 4>, how, a, plan, scratch);
  return gpu::launch(dnc_forward_kernel<T, false>, how, a, plan, scratch);
}

}  // namespace

const char* dnc_scan(const DncScan& a, const Queue& queue) {
  return a.state == Dtype::float64 ? scan<double>(a, queue) : scan<float>(a, queue);
}
const char* dnc_scan_layout(const DncScan& a, Layout& layout) {
  DncPlan plan;
  const char* why = plan_of<float>(a, plan);
  if (!why) layout = dnc_layout_of(plan);
  return why;
}

}  // namespace cuda
}  // namespace mann_fast

// dnc_scan backward: one launch for all steps.
//
// No memory and no links were kept. A first replay, which needs the weights alone, keeps the state of every segment of about
// sqrt(T) steps; from there each segment is replayed again, all its states side by side in device memory, and gone back through.
// A step of a replay has two barriers, a step back has seven; where a sample is in registers, one and five.
#include "dnc_backward.cuh"
#include "dnc_held_backward.cuh"

namespace mann_fast {
namespace cuda {
namespace {

template <class T, bool NEAR>
struct DncBackwardScan : DncBackwardStep<T, NEAR> {
  using Base = DncBackwardStep<T, NEAR>;
  using Base::a, Base::inputs, Base::plan, Base::sample, Base::visits;
  const DncGiven& given;
  DncStream<T> stream;

  __device__ __forceinline__ DncBackwardScan(const DncScanBackward& a, const DncGiven& given, const DncPlan& plan,
                                             unsigned char* scratch)
      : Base(a, plan, DncPlaces(plan, scratch), gpu::block()), given(given), stream(plan, a.input) {}

  // The gradients of what the step was told.
  __device__ __forceinline__ void give(int64_t t) const {
    this->with_each(plan.first[Told::grad_reads], [&](int64_t number) {
      const int i = static_cast<int>(number);
      int kind = 0;
      while (i >= plan.first[kind + 1]) ++kind;
      store_as(given.told[kind], a.input, (t * a.B + sample) * plan.count(kind) + i - plan.first[kind],
               this->told_gradient(kind, i));
    });
  }

  __device__ __forceinline__ void run() {
    const int64_t steps = a.sequences.length(a.T, sample), segments = (steps + plan.segment - 1) / plan.segment;
    this->begin();
    for (int64_t segment = segments - 1; segment >= 0; --segment) {
      const int64_t first = segment * plan.segment, count = first + plan.segment < steps ? plan.segment : steps - first;
      this->replay_all(stream, first, count);
      for (int64_t t = first + count - 1; t >= first; --t) {
        const bool more = t > first;
        if (more) stream.ask((t - 1) * a.B + sample);
        this->back(t, this->state(segment, t - first), [&] {
          if (more) stream.put(inputs(visits + 1));
        });
        gpu::sync();
        give(t);
        this->through_usage();
        if (this->begins(t)) this->through_start();
        if (more) ++visits;
      }
    }
    this->end();
    for (int kind = 0; kind < Told::grad_reads; ++kind)
      if (given.told[kind]) this->clear_steps(a, sample, steps, given.told[kind], a.input, plan.count(kind));
  }
};

template <class T, bool NEAR>
__global__ void __launch_bounds__(most_threads, 1)
    dnc_backward_kernel(const __grid_constant__ DncScanBackward a, const __grid_constant__ DncGiven given,
                        const __grid_constant__ DncPlan plan, unsigned char* scratch) {
  DncBackwardScan<T, NEAR>(a, given, plan, scratch).run();
}

template <int C>
__global__ void __launch_bounds__(held_threads, 1)
    dnc_backward_held_kernel(const __grid_constant__ DncScanBackward a, const __grid_constant__ DncGiven given,
                             const __grid_constant__ DncPlan plan, unsigned char* scratch) {
  HeldBackwardScan<C>(a, given, plan, scratch).run();
}

// Bytes of shared memory, and numbers of a state.
inline size_t held_bytes(const DncPlan& plan, int64_t& state_numbers) {
  return with_held(plan, [&](auto c) {
    using My = HeldBackward<decltype(c)::value>;
    state_numbers = My::state_numbers;
    Carver carver(nullptr);
    My{carver};
    return carver.used;
  });
}

template <class T>
const char* plan_of(const DncScanBackward& a, DncPlan& plan) {
  if (const char* why = dnc_too_large(a)) return why;
  plan = dnc_sizes_of(a, a.told.write_mask != nullptr, a.told.link_sharpening != nullptr, true);
  dnc_tell(plan, a.told, a.grad_reads);
  const gpu::Limits limits = gpu::limits();
  int64_t state_numbers = 0;
  if (sizeof(T) == 4 && dnc_hold(plan, limits, held_bytes(plan, state_numbers))) {
    plan.scratch = static_cast<size_t>((plan.segments + plan.segment - 1) * state_numbers) * sizeof(float);
    return nullptr;
  }
  dnc_place<DncBackward<T>>(plan, limits);
  return nullptr;
}

template <class T>
const char* scan_backward(const DncScanBackward& a, const Queue& queue) {
  DncPlan plan;
  if (const char* why = plan_of<T>(a, plan)) return why;
  const size_t bytes = plan.scratch * static_cast<size_t>(a.B);
  unsigned char* scratch = bytes ? static_cast<unsigned char*>(queue.scratch(queue.owner, bytes)) : nullptr;
  const auto& g = a.grad_told;
  const DncGiven given = {{g.read_keys, g.read_sharpness, g.write_key, g.write_sharpness, g.erase, g.write_vector, g.free_gates,
                           g.allocation_gate, g.write_gate, g.read_modes, g.read_masks, g.write_mask, g.link_sharpening}};
  const gpu::Launch how{a.B, 32 * plan.warps, 1, plan.shared, queue.stream};
  if constexpr (sizeof(T) == 4) {
    if (plan.held)
      return with_held(plan, [&](auto c) {
        return gpu::launch(dnc_backward_held_kernel<decltype(c)::value>, how, a, given, plan, scratch);
      });
  }
  if (sizeof(T) == 4 && plan.near) return gpu::launch(dnc_backward_kernel<T, sizeof(T) == 4>, how, a, given, plan, scratch);
  return gpu::launch(dnc_backward_kernel<T, false>, how, a, given, plan, scratch);
}

}  // namespace

const char* dnc_scan_backward(const DncScanBackward& a, const Queue& queue) {
  return a.state == Dtype::float64 ? scan_backward<double>(a, queue) : scan_backward<float>(a, queue);
}
const char* dnc_scan_backward_layout(const DncScanBackward& a, Layout& layout) {
  DncPlan plan;
  const char* why = plan_of<float>(a, plan);
  if (!why) layout = dnc_layout_of(plan);
  return why;
}

}  // namespace cuda
}  // namespace mann_fast

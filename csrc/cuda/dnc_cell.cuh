// A Differentiable Neural Computer's memory as the kernels of a cell drive it; lrua_cell.cuh says what that must provide.
#pragma once
#include "cell.cuh"
#include "dnc_backward.cuh"
#include "dnc_forward.cuh"

namespace mann_fast {
namespace cuda {

// The logits of a step's read modes to shares: a thread takes those of a head. Nobody looks at them before two barriers more.
template <class T>
__device__ __forceinline__ void share_modes(const DncPlan& plan, const DncInputs<T>& in) {
  for (int r = gpu::thread(); plan.links && r < plan.R; r += gpu::threads()) {
    T *modes = in.told + plan.first[Told::read_modes] + 3 * r, most = modes[0], total = 0;
    for (int j = 1; j < 3; ++j) most = modes[j] > most ? modes[j] : most;
    for (int j = 0; j < 3; ++j) total += modes[j] = exp(modes[j] - most);
    for (int j = 0; j < 3; ++j) modes[j] /= total;
  }
}

// The reads lie as they are given out.
__device__ __forceinline__ int vector_at(const DncPlan&, int j) { return j; }

template <class T, bool NEAR>
struct DncCellForwardStep : DncForwardStep<T, NEAR> {
  using Base = DncForwardStep<T, NEAR>;
  __device__ __forceinline__ DncCellForwardStep(const DncScan& a, const DncPlan& plan, DncPlaces places, int64_t sample, int)
      : Base(a, plan, places, sample) {}
  __device__ __forceinline__ void begin_step(const DncInputs<T>& in, int64_t t) {
    share_modes(this->plan, in);
    this->take_step(in, t, [] {}, [] {});
  }
  __device__ __forceinline__ void end_step(bool anew) {
    if (anew) this->begin(true);
  }
  __device__ __forceinline__ T read_at(int at, int) const { return this->read_of(at); }
};

template <class T, bool NEAR>
struct DncCellBackwardStep : DncBackwardStep<T, NEAR> {
  using Base = DncBackwardStep<T, NEAR>;
  __device__ __forceinline__ DncCellBackwardStep(const DncScanBackward& a, const DncPlan& plan, int, DncPlaces places,
                                                 int64_t sample, int, bool)
      : Base(a, plan, places, sample) {}
  __device__ __forceinline__ void step_back(const DncInputs<T>& in, int64_t t, int step) {
    share_modes(this->plan, in);
    this->back(t, this->state(t / this->plan.segment, step), [] {});
  }
};

struct DncMemory {
  using Forward = DncCell;
  using Backward = DncCellBackward;
  using ForwardScan = DncScan;
  using BackwardScan = DncScanBackward;
  using Plan = DncPlan;
  using Places = DncPlaces;
  template <class T>
  using Inputs = DncInputs<T>;

  static DncScan scan_of(const DncCell& a) {
    return {a, a.T, a.B, a.N, a.D, a.R, a.state, a.state, a.deallocate, a.eps, a.before, {}, a.sequences, nullptr, a.after};
  }
  static DncScanBackward scan_of(const DncCellBackward& a) {
    return {a,     a.T,     a.B,          a.N,      a.D, a.R,         a.state,       a.state, a.deallocate,
            a.eps, nullptr, a.grad_after, a.before, {},  a.sequences, a.grad_before, {},      a.grad_start};
  }

  template <class Arguments>
  static const char* too_large(const Arguments& a) {
    return dnc_too_large(a);
  }
  static DncPlan sizes_of(const DncCell& a) { return dnc_sizes_of(a, a.masks, a.sharpened, false); }
  static DncPlan sizes_of(const DncCellBackward& a) { return dnc_sizes_of(a, a.masks, a.sharpened, true); }
  template <class Arguments>
  static int64_t head_values(const Arguments& a) {
    return sizes_of(a).first[Told::grad_reads];
  }

  template <class T>
  using ForwardRoom = DncForward<T>;
  template <class T>
  using BackwardRoom = DncBackward<T>;
  template <class Side, class T>
  static DncPlan lay_out(DncPlan plan, int64_t, int64_t, const gpu::Limits& left) {
    plan.warps = cell_threads / 32;
    dnc_place<typename Side::Room>(plan, left);
    return plan;
  }
  // Each sample has scratch memory, which is large.
  static int64_t scratches(int64_t samples, int64_t) { return samples; }
  __device__ __forceinline__ static int64_t scratch_of(int64_t sample) { return sample; }
  // Everything in shared memory, or the links or also the memory in device memory.
  static constexpr int choices = 3;
  template <class Side>
  static bool fits(const DncPlan& plan, int choice) {
    return choice == 0 ? plan.near : plan.near_rest && (plan.near_memory || choice == 2);
  }
  static bool counts(const DncPlan&, int64_t) { return true; }

  // No tiles. NEAR, in the place of what stays in registers: the compiler knows that everything is in shared memory.
  template <class T, int, bool NEAR, class>
  using ForwardStep = DncCellForwardStep<T, NEAR>;
  template <class T, int, bool NEAR, class>
  using BackwardStep = DncCellBackwardStep<T, NEAR>;
  template <class T, bool, class F>
  static const char* with_plan(const DncPlan& plan, F f) {
    const std::integral_constant<int, 0> none;
    if constexpr (sizeof(T) == 4)
      if (plan.near) return f(none, std::true_type(), PlanKind<DncPlan>());
    return f(none, std::false_type(), PlanKind<DncPlan>());
  }

  // One row of values has, in the order of Told, what is there. They are kept as they are, and lie among the inputs as in
  // their row.
  struct Place {
    int kind, at;
  };
  template <class Arguments>
  __device__ __forceinline__ static Place place_of(const Arguments&, const DncPlan& plan, int j) {
    int kind = 0;
    while (kind < Told::grad_reads && j >= plan.first[kind + 1]) ++kind;
    return {kind, j};
  }
  template <class T>
  __device__ __forceinline__ static T kept(const Place&, T value) {
    return value;
  }
  // How a value becomes what the step is told, when it is within its bounds.
  enum class Squash { none, oneplus, sigmoid, modes, mask };
  __device__ __forceinline__ static Squash squash_of(int kind) {
    switch (kind) {
      case Told::read_keys:
      case Told::write_key:
      case Told::write_vector: return Squash::none;
      case Told::read_sharpness:
      case Told::write_sharpness:
      case Told::link_sharpening: return Squash::oneplus;
      case Told::read_modes: return Squash::modes;
      case Told::read_masks:
      case Told::write_mask: return Squash::mask;
      default: return Squash::sigmoid;
    }
  }
  // A value between -clip and clip, NaN as it is.
  template <class T>
  __device__ __forceinline__ static T clipped(const DncHeadOptions& a, T x) {
    const T clip = static_cast<T>(a.clip);
    return clip > 0 ? (x > clip ? clip : x < -clip ? -clip : x) : x;
  }
  template <class T>
  __device__ __forceinline__ static void put(const DncHeadOptions& a, const DncInputs<T>& in, const Place& place, T value) {
    value = clipped(a, value);
    switch (squash_of(place.kind)) {
      case Squash::oneplus: value = T(1) + softplus(value); break;
      case Squash::sigmoid: value = sigmoid(value); break;
      case Squash::mask: value = sigmoid(value) * static_cast<T>(1 - a.mask_min) + static_cast<T>(a.mask_min); break;
      default: break;  // modes are logits, until the step begins
    }
    in.told[place.at] = value;
  }
  template <class T, class Arguments>
  __device__ __forceinline__ static void put_constants(const Arguments&, const DncPlan&, const DncInputs<T>&) {}
  template <class T>
  __device__ __forceinline__ static void put_kept(const DncCellBackward&, const DncPlan&, const DncInputs<T>&, int64_t) {}
  template <class Step>
  __device__ __forceinline__ static void clear_inputs(const Step&) {}  // nothing pads them
  template <class Step>
  __device__ __forceinline__ static void leave_step(Step& step, bool anew) {
    step.through_usage();
    if (anew) step.through_start();
  }

  template <class T, class Memory>
  __device__ __forceinline__ static T head_gradient(const DncCellBackward& a, const Memory& memory, const DncInputs<T>& in,
                                                    const Place& from, const T* kept) {
    const T clip = static_cast<T>(a.clip);
    if (clip > 0 && (*kept > clip || *kept < -clip)) return 0;
    const T told = in.told[from.at], grad = memory.told_gradient(from.kind, from.at);
    switch (squash_of(from.kind)) {
      case Squash::oneplus: return grad * sigmoid(*kept);
      case Squash::sigmoid: return grad * told * (T(1) - told);
      case Squash::mask: {
        const T share = sigmoid(*kept);
        return grad * share * (T(1) - share) * static_cast<T>(1 - a.mask_min);
      }
      case Squash::modes: {
        const int first = memory.plan.first[Told::read_modes], head = from.at - (from.at - first) % 3;
        T mean = 0;
        for (int j = head; j < head + 3; ++j) mean += in.told[j] * memory.told_gradient(from.kind, j);
        return told * (grad - mean);
      }
      default: return grad;
    }
  }
};

}  // namespace cuda
}  // namespace mann_fast

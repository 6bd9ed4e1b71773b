// A Neural Turing Machine's memory as the kernels of a cell drive it; lrua_cell.cuh says what that must provide.
#pragma once
#include "cell.cuh"
#include "ntm_backward.cuh"
#include "ntm_forward.cuh"

namespace mann_fast {
namespace cuda {

// The logits of a step's shifts, [heads, shifts], to shares: a thread takes those of a head. All are there by the first barrier
// of an addressing, before which nobody looks at them.
template <class T, class P>
__device__ __forceinline__ void share_shifts(const P& plan, const NtmInputs<T>& in) {
  for (int h = gpu::thread(); h < plan.R; h += gpu::threads()) {
    T *shift = in.shift + h * plan.shifts, most = shift[0], total = 0;
    for (int j = 1; j < plan.shifts; ++j) most = shift[j] > most ? shift[j] : most;
    for (int j = 0; j < plan.shifts; ++j) total += shift[j] = exp(shift[j] - most);
    for (int j = 0; j < plan.shifts; ++j) shift[j] /= total;
  }
}

template <class T, int C, bool RESIDENT, class P>
struct NtmForwardStep : NtmForward<T, C, RESIDENT, true, P> {
  using NtmForward<T, C, RESIDENT, true, P>::NtmForward;
  __device__ __forceinline__ void begin_step(const NtmInputs<T>& in, int64_t t) {
    share_shifts(this->plan, in);
    this->take_step(in, t, [] {});
  }
  __device__ __forceinline__ void end_step(bool anew) {
    if (anew) this->begin(true);
  }
};

template <class T, int C, bool RESIDENT, class P>
struct NtmBackwardStep : NtmBackward<T, C, RESIDENT, true, P> {
  using NtmBackward<T, C, RESIDENT, true, P>::NtmBackward;
  __device__ __forceinline__ void step_back(const NtmInputs<T>& in, int64_t t, int step) {
    share_shifts(this->plan, in);
    this->back(in, t, step, [] {}, [] {});
  }
};

struct NtmMemory : TiledMemory {
  using Forward = NtmCell;
  using Backward = NtmCellBackward;
  using ForwardScan = NtmScan;
  using BackwardScan = NtmScanBackward;

  // As many heads write as read. Where heads go by content alone, they have one shift, of 1 to where they are.
  template <class Arguments>
  static int64_t moves(const Arguments& a) {
    return a.shifts > 0 ? a.shifts : 1;
  }
  static NtmScan scan_of(const NtmCell& a) {
    return {a.T, a.B, a.N, a.D, a.R, a.R, moves(a), a.state, a.state, a.read_first, a.eps, a.anchor_every, a.memory, a.weights,
            nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, a.sequences,
            // results
            nullptr, a.out_memory, a.out_weights, a.history, a.anchors};
  }
  static NtmScanBackward scan_of(const NtmCellBackward& a) {
    return {a.T, a.B, a.N, a.D, a.R, a.R, moves(a), a.state, a.state, a.read_first, a.eps, a.anchor_every, nullptr,
            a.grad_memory, a.grad_weights, a.memory, a.weights, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr,
            a.sequences, a.history, a.anchors,
            // results
            a.grad_in_memory, a.grad_in_weights, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, a.grad_start};
  }

  template <class Arguments>
  static const char* too_large(const Arguments& a) {
    return ntm_too_large(scan_of(a));
  }
  template <class Arguments>
  static Plan sizes_of(const Arguments& a) {
    return ntm_sizes_of(scan_of(a));
  }
  template <class Arguments>
  static int64_t head_values(const Arguments& a) {
    return 2 * a.R * (a.D + (a.shifts > 0 ? 3 + a.shifts : 1)) + 2 * a.R * a.D;
  }

  template <class T>
  using ForwardRoom = NtmForwardRoom<T>;
  template <class T>
  using BackwardRoom = NtmBackwardRoom<T>;
  template <class T, int C, bool RESIDENT, class P>
  using ForwardStep = NtmForwardStep<T, C, RESIDENT, P>;
  template <class T, int C, bool RESIDENT, class P>
  using BackwardStep = NtmBackwardStep<T, C, RESIDENT, P>;

  template <class T, bool, class F>
  static const char* with_plan(const Plan& plan, F f) {
    return with_tile<T>(plan, [&](auto c, auto resident) { return f(c, resident, PlanKind<Plan>()); });
  }

  template <class T>
  using Inputs = NtmInputs<T>;

  // One row of values has, of the heads that read and then of those that write, keys, sharpness, and where they have a location
  // gates, shifts and sharpening; then erase and add. They are kept as they are.
  enum class Kind { key, sharpness, gate, shift, sharpening, erase, add };
  struct Place {
    Kind kind;
    int at;
  };
  template <class P, class Arguments>
  __device__ __forceinline__ static Place place_of(const Arguments& a, const P& plan, int j) {
    const int R = plan.reads, size = R * plan.D, moves = R * plan.shifts;
    const int of_kind = size + (a.shifts > 0 ? 3 * R + moves : R);
    if (j >= 2 * of_kind + size) return {Kind::add, vector_at(plan, j - 2 * of_kind - size)};
    if (j >= 2 * of_kind) return {Kind::erase, vector_at(plan, j - 2 * of_kind)};
    const int writes = j < of_kind ? 0 : 1, first = writes * R, key = j - writes * of_kind, i = key - size;
    if (i < 0) return {Kind::key, vector_at(plan, writes * size + key)};
    if (i < R) return {Kind::sharpness, first + i};
    if (i < 2 * R) return {Kind::gate, first + i - R};
    if (i < 2 * R + moves) return {Kind::shift, writes * moves + i - 2 * R};
    return {Kind::sharpening, first + i - 2 * R - moves};
  }
  template <class T>
  __device__ __forceinline__ static T kept(const Place&, T value) {
    return value;
  }
  template <class T, class Arguments>
  __device__ __forceinline__ static void put(const Arguments&, const Inputs<T>& in, const Place& place, T value) {
    switch (place.kind) {
      case Kind::key: in.keys[place.at] = tanh(value); break;
      case Kind::sharpness: in.beta[place.at] = T(1) + softplus(value); break;
      case Kind::gate: in.gate[place.at] = sigmoid(value); break;
      case Kind::shift: in.shift[place.at] = value; break;  // a logit, until the step begins
      case Kind::sharpening: in.gamma[place.at] = T(1) + softplus(value); break;
      case Kind::erase: in.erase[place.at] = sigmoid(value); break;
      case Kind::add: in.add[place.at] = tanh(value); break;
    }
  }
  template <class T, class P, class Arguments>
  __device__ __forceinline__ static void put_constants(const Arguments& a, const P& plan, const Inputs<T>& in) {
    if (a.shifts > 0) return;
    for (int h = gpu::thread(); h < plan.R; h += gpu::threads()) in.gate[h] = in.gamma[h] = in.shift[h] = 1;
  }
  template <class T, class P>
  __device__ __forceinline__ static void put_kept(const NtmCellBackward&, const P&, const Inputs<T>&, int64_t) {}

  template <class T, class Memory>
  __device__ __forceinline__ static T head_gradient(const NtmCellBackward&, const Memory& memory, const Inputs<T>& in,
                                                    const Place& from, const T* kept) {
    const int at = from.at;
    switch (from.kind) {
      case Kind::key: return memory.key_gradient(at) * (T(1) - in.keys[at] * in.keys[at]);
      case Kind::sharpness: return memory.total_scalar(at, of_beta) * sigmoid(*kept);
      case Kind::gate: return memory.total_scalar(at, of_gate) * sigmoid(*kept) * sigmoid(-*kept);
      case Kind::shift: {
        const int shifts = memory.plan.shifts, h = at / shifts;
        T mean = 0;
        for (int j = 0; j < shifts; ++j) mean += in.shift[h * shifts + j] * memory.total_scalar(h, of_shift + j);
        return in.shift[at] * (memory.total_scalar(h, of_shift + at - h * shifts) - mean);
      }
      case Kind::sharpening: return memory.total_scalar(at, of_gamma) * sigmoid(*kept);
      case Kind::erase: return memory.erase_gradient(at) * in.erase[at] * (T(1) - in.erase[at]);
      default: return memory.add_gradient(at) * (T(1) - in.add[at] * in.add[at]);
    }
  }
};

}  // namespace cuda
}  // namespace mann_fast

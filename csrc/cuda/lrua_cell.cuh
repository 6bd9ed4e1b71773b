// The LRUA memory as the kernels of a cell drive it.
//
// What a memory must provide to have its whole sequence. One row of head values is what its heads take of a step and a sample.
//
//   Forward, Backward          arguments of the two directions
//   ForwardScan, BackwardScan  and of the memory's own scan; scan_of(a): these, without its inputs and their gradients
//   too_large(a)               null, or why the kernels cannot take it
//   head_values(a)             numbers in a row
//   Plan, sizes_of(a)          how a block has a sample; one that has the sizes
//   lay_out(sizes, ...)        where everything lies in what the weights leave of a block
//   choices, fits(plan, i)     whether that will do by the choice i, of which the first is the best
//   counts(plan, every)        whether the kernel can count so much
//   Places                     the block's memory, as the steps take it
//   scratches, scratch_of      how many parts scratch memory has, and which is a sample's
//   ForwardRoom, BackwardRoom  what a block has of a sample, as lay_out takes it
//   with_plan(plan, f)         calls f with the columns of a tile, whether it stays in registers, and the kind of plan
//   clear_inputs(step)         sets to 0 what pads the inputs
//   Inputs                     what a step takes
//   place_of(a, plan, j)       a Place: where value j of the heads goes among these
//   kept(place, value)         what is kept of a value for backward, before its nonlinearity or after it
//   put(a, in, place, kept)    puts it in its place
//   put_constants(a, plan, in)                 the same for what no step brings
//   put_kept(a, plan, in, row)                 and for what backward takes beside the values of the heads
//   head_gradient(a, memory, in, place, kept)  of a value before its nonlinearity, when all have told their parts
// A ForwardStep is a sample's memory forward:
//   begin(anew), end()         takes in the state, or anew that at the start of a sequence; hands it out
//   begin_step(in, t)          a step up to the reads' parts that all must know, before a barrier
//   end_step(anew)             and what comes after it; where the next step begins anew, so does it
//   read_at(at, head)          of the reads, when all have told their parts: what lies `at` a place of [heads, columns]
// A BackwardStep is the same back:
//   begin(), end()             takes in the gradients of the last state; hands out those of the first
//   replay_before(end)         where the replay of the step before `end` begins
//   replay_all(stream, first, count)           the replay
//   step_back(in, t, step)     back through step t, number `step` of its replay; then a barrier
// Then comes leave_step(step, anew): having gone back through a step, where the sample may have begun anew.
#pragma once
#include "cell.cuh"
#include "lrua_backward.cuh"
#include "lrua_forward.cuh"

namespace mann_fast {
namespace cuda {

struct LruaMemory : TiledMemory {
  using Forward = Cell;
  using Backward = CellBackward;
  using ForwardScan = LruaScan;
  using BackwardScan = LruaScanBackward;

  static LruaScan scan_of(const Cell& a) {
    return {a.T, a.B, a.N, a.D, a.R, a.state, a.state, a.read_first, a.shared_target, a.usage_decay, a.eps, a.anchor_every,
            a.memory, a.read_weights, a.usage, nullptr, nullptr, nullptr, nullptr, a.sequences,
            // results
            nullptr, a.out_memory, a.out_read_weights, a.out_usage, a.slots, a.anchors};
  }
  static LruaScanBackward scan_of(const CellBackward& a) {
    return {a.T, a.B, a.N, a.D, a.R, a.state, a.state, a.read_first, a.shared_target, a.eps, a.anchor_every, nullptr,
            a.grad_memory, a.grad_read_weights, a.memory, a.read_weights, nullptr, nullptr, nullptr, nullptr, a.sequences,
            a.slots, a.anchors,
            // results
            a.grad_in_memory, a.grad_in_read_weights, nullptr, nullptr, nullptr, nullptr, a.grad_start};
  }

  template <class Arguments>
  static const char* too_large(const Arguments& a) {
    return cuda::too_large(a.N, a.D, a.R);
  }
  template <class Arguments>
  static Plan sizes_of(const Arguments& a) {
    return cuda::sizes_of(scan_of(a));
  }
  template <class Arguments>
  static int64_t head_values(const Arguments& a) {
    return (a.separate_vector ? 2 : 1) * a.R * a.D + (a.learned_sharpness ? 2 : 1) * a.R;
  }

  // One kernel for any number of heads.
  template <class Room>
  struct FourHeads : Room {
    static int heads_at_once(const Plan&) { return 4; }
  };
  template <class T>
  using ForwardRoom = FourHeads<LruaForwardRoom<T>>;
  template <class T>
  using BackwardRoom = FourHeads<LruaBackwardRoom<T>>;

  template <class T, int C, bool RESIDENT, class P>
  using ForwardStep = LruaForward<T, C, 4, RESIDENT, true, P>;
  template <class T, int C, bool RESIDENT, class P>
  using BackwardStep = LruaBackward<T, C, 4, RESIDENT, true, P>;

  // NEAR: see FixedPlan.
  template <class T, bool NEAR, class F>
  static const char* with_plan(const Plan& plan, F f) {
    return with_tile<T>(plan, [&](auto c, auto resident) {
      constexpr int columns = decltype(c)::value;
      if constexpr (decltype(resident)::value && (columns == 4 || columns == 5)) {
        using Common = FixedPlan<4, cell_threads / 32, columns, NEAR>;
        if (Common::is(plan)) return f(c, resident, PlanKind<Common>());
      }
      return f(c, resident, PlanKind<Plan>());
    });
  }

  template <class T>
  using Inputs = cuda::Inputs<T>;

  // One row of values has keys, write vectors where separate, gate logits, and sharpness where learned. Of the kept ones keys
  // and write vectors are after their nonlinearity.
  enum class Kind { key, vector, both, gate, sharpness };
  struct Place {
    Kind kind;
    int at;
  };
  template <class P, class Arguments>
  __device__ __forceinline__ static Place place_of(const Arguments& a, const P& plan, int j) {
    const int size = plan.R * plan.D, vectors = a.separate_vector ? 2 * size : size;
    if (j >= vectors + plan.R) return {Kind::sharpness, j - vectors - plan.R};
    if (j >= vectors) return {Kind::gate, j - vectors};
    const Kind kind = !a.separate_vector ? Kind::both : j < size ? Kind::key : Kind::vector;
    return {kind, vector_at(plan, j < size ? j : j - size)};
  }
  template <class T>
  __device__ __forceinline__ static T kept(const Place& place, T value) {
    return place.kind < Kind::gate ? tanh(value) : value;
  }
  template <class T, class Arguments>
  __device__ __forceinline__ static void put(const Arguments& a, const Inputs<T>& in, const Place& place, T value) {
    if (place.kind == Kind::key || place.kind == Kind::both) in.keys[place.at] = value;
    if (place.kind == Kind::vector || place.kind == Kind::both) in.vectors[place.at] = value;
    if (place.kind == Kind::gate) gate_shares(value, in.gate[place.at], in.rest[place.at]);
    if (place.kind == Kind::sharpness)
      in.beta[place.at] = static_cast<T>(a.sharpness) + static_cast<T>(a.sharpness_scale) * softplus(value);
  }
  // Sharpness that is not learned.
  template <class T, class P, class Arguments>
  __device__ __forceinline__ static void put_constants(const Arguments& a, const P& plan, const Inputs<T>& in) {
    if (a.learned_sharpness) return;
    for (int r = gpu::thread(); r < plan.R; r += gpu::threads()) in.beta[r] = static_cast<T>(a.sharpness);
  }
  // The slots. The warp before the middle one begins: the first have most values of the heads, and the last have units.
  template <class T, class P>
  __device__ __forceinline__ static void put_kept(const CellBackward& a, const P& plan, const Inputs<T>& in, int64_t row) {
    const int first = gpu::thread() + gpu::threads() / 2 + gpu::warp_size;
    for (int r = first % gpu::threads(); r < plan.R; r += gpu::threads())
      in.slots[r] = static_cast<int>(a.slots[row * plan.R + r]);
  }

  template <class T, class Memory>
  __device__ __forceinline__ static T head_gradient(const CellBackward& a, const Memory& memory, const Inputs<T>& in,
                                                    const Place& from, const T* kept) {
    T grad = 0;
    if (from.kind == Kind::gate) {
      grad = memory.gate_gradient(from.at);
    } else if (from.kind == Kind::sharpness) {
      const T slope = sigmoid(*kept);
      grad = memory.sharpness_gradient(from.at) * static_cast<T>(a.sharpness_scale) * slope;
    } else {
      const T value = from.kind == Kind::vector ? in.vectors[from.at] : in.keys[from.at];
      if (from.kind != Kind::vector) grad = memory.key_gradient(from.at);
      if (from.kind != Kind::key) grad += memory.vector_gradient(from.at);
      grad *= T(1) - value * value;
    }
    return grad;
  }
};

}  // namespace cuda
}  // namespace mann_fast

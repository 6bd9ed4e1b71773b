// What the two directions of dnc_scan share where a sample is in registers.
//
// Of common sizes (up to 128 slots, 4 heads, 64 numbers a slot) a block of 16 warps has the memory and the links in registers,
// and all sizes are known when compiled, padded. A warp has 8 slots side by side: their rows of the memory, of which 8 lanes
// share a slot and a lane has two slots, their columns 8 apart; and their rows of the links, of which a lane has 4 columns
// side by side. What is padding is 0 and stays so.
#pragma once
#include "dnc_scan.cuh"

namespace mann_fast {
namespace cuda {

constexpr int held_slots = 128, held_heads = 4, held_warps = 16, held_threads = 32 * held_warps;
constexpr int warp_rows = held_slots / held_warps, lane_links = held_slots / 32;
constexpr int held_row = held_slots + 8;  // from a head's numbers per slot to the next one's: 8 slots of 4 heads in 32 banks
constexpr int held_least = 33;            // with fewer slots most lanes would have padding only

// Whether a block takes a sample so, with so many bytes of shared memory for what is small.
inline bool dnc_hold(DncPlan& plan, const gpu::Limits& limits, size_t shared) {
  plan.held = plan.N >= held_least && plan.N <= held_slots && plan.R > 0 && plan.R <= held_heads && plan.D > 0 &&
              plan.D <= 8 * column_lanes && shared <= limits.shared;
  if (plan.held) plan.warps = held_warps, plan.shared = shared, plan.scratch = 0;
  return plan.held;
}

// Calls f with the columns of a lane that a plan asks for.
template <class F>
auto with_held(const DncPlan& plan, F f) {
  return plan.D <= 5 * column_lanes ? f(std::integral_constant<int, 5>()) : f(std::integral_constant<int, 8>());
}

// Where a step's inputs lie in shared memory. Rows of `columns` numbers: the keys, of which the one that writes is the last;
// the masks likewise; what is erased and written; gradients of reads. Then the single numbers.
template <int C>
struct HeldInputs {
  enum { keys, masks = keys + held_heads + 1, erase = masks + held_heads + 1, vector, grads, rows = grads + held_heads };
  static constexpr int columns = C * column_lanes;
  enum {
    sharpness = rows * columns,
    free_gates = sharpness + 8,
    gates = free_gates + held_heads,  // of allocation, of the write
    modes = gates + 4,
    exponents = modes + 3 * held_heads,
    numbers = exponents + 2 * held_heads
  };
  // Of number j of a kind.
  __device__ __forceinline__ static int place(int kind, int j, int D) {
    const int row = j / D * columns + j % D;
    switch (kind) {
      case Told::read_keys: return keys * columns + row;
      case Told::write_key: return (keys + held_heads) * columns + row;
      case Told::read_masks: return masks * columns + row;
      case Told::write_mask: return (masks + held_heads) * columns + row;
      case Told::erase: return erase * columns + row;
      case Told::write_vector: return vector * columns + row;
      case Told::grad_reads: return grads * columns + row;
      case Told::read_sharpness: return sharpness + j;
      case Told::write_sharpness: return sharpness + held_heads;
      case Told::free_gates: return free_gates + j;
      case Told::allocation_gate: return gates;
      case Told::write_gate: return gates + 1;
      case Told::read_modes: return modes + j;
      default: return exponents + j;
    }
  }
  // How many numbers a thread asks for.
  static constexpr int ahead(bool backward) {
    const int forward = columns * (2 * held_heads + 4) + 7 * held_heads + 3;
    return (forward + (backward ? columns * held_heads : 0) + held_threads - 1) / held_threads;
  }
};

// As DncStream, for these: where a number comes from and goes to is found once, and kept in one register.
template <int C, bool BACKWARD>
class HeldStream {
 public:
  __device__ __forceinline__ HeldStream(const DncPlan& plan, Dtype input) : plan_(plan), input_(input) {
#pragma unroll
    for (int j = 0; j < ahead; ++j) {
      const int i = gpu::thread() + j * held_threads;
      ways_[j] = none;
      if (i >= plan.inputs()) continue;
      int kind = 0;
      while (i >= plan.first[kind + 1]) ++kind;
      const int number = i - plan.first[kind];
      ways_[j] = static_cast<unsigned>(kind) << 28 | static_cast<unsigned>(HeldInputs<C>::place(kind, number, plan.D)) << 16 |
                 static_cast<unsigned>(number);
    }
  }
  __device__ __forceinline__ void ask(int64_t row) {
#pragma unroll
    for (int j = 0; j < ahead; ++j) {
      asked_[j] = 0;
      if (ways_[j] == none) continue;
      const int kind = static_cast<int>(ways_[j] >> 28), number = static_cast<int>(ways_[j] & 0xffff);
      const void* data = plan_.told[kind];
      if (data) asked_[j] = load_as<float>(data, input_, row * plan_.count(kind) + number);
    }
  }
  __device__ __forceinline__ void put(float* in) const {
#pragma unroll
    for (int j = 0; j < ahead; ++j)
      if (ways_[j] != none) in[ways_[j] >> 16 & 0xfff] = asked_[j];
  }

 private:
  static constexpr int ahead = HeldInputs<C>::ahead(BACKWARD);
  static constexpr unsigned none = ~0u;
  static_assert(HeldInputs<C>::numbers <= 0xfff && Told::kinds < 15, "a way fits a register");
  const DncPlan& plan_;
  Dtype input_;
  unsigned ways_[ahead];
  float asked_[ahead];
};

// The sum over lanes that differ in the bits FIRST, FIRST / 2, ... LAST.
template <int FIRST, int LAST>
__device__ __forceinline__ float add_between(float value) {
#pragma unroll
  for (int mask = FIRST; mask >= LAST; mask /= 2) value += gpu::shuffle_xor(value, mask);
  return value;
}

// A scan of such a sample as one thread sees it.
template <int C>
struct HeldThread {
  using In = HeldInputs<C>;
  static constexpr int columns = C * column_lanes, H = held_heads;
  const DncPlan& plan;
  const int lane, warp, column;
  const int first_slot;           // of the two whose columns the lane has
  const int own_slot, own_share;  // what is one number per slot, four lanes share: a head each, or a quarter of a sum
  const float eps;

  __device__ __forceinline__ HeldThread(const DncPlan& plan, double eps)
      : plan(plan), lane(gpu::thread() % 32), warp(gpu::thread() / 32), column(lane % column_lanes),
        first_slot(warp * warp_rows + lane / column_lanes * 2), own_slot(warp * warp_rows + lane / 4), own_share(lane % 4),
        eps(static_cast<float>(eps)) {}

  // The lane's columns of a row of the inputs.
  __device__ __forceinline__ void load_columns(const float* row, float (&out)[C]) const {
#pragma unroll
    for (int c = 0; c < C; ++c) out[c] = row[c * column_lanes + column];
  }
  // The squares of head h's mask, which is on both sides of a product.
  __device__ __forceinline__ void load_masks(const float* in, int h, float (&out)[C]) const {
    if (!plan.masks) {
#pragma unroll
      for (int c = 0; c < C; ++c) out[c] = 1;
      return;
    }
    load_columns(in + (In::masks + h) * columns, out);
#pragma unroll
    for (int c = 0; c < C; ++c) out[c] *= out[c];
  }
  // Adds a lane's part of the products of its two slots with the key of head h, and of their squares, both under the mask: to
  // numbers that lie so far from one slot to the next.
  template <int STEP>
  __device__ __forceinline__ void add_compared(const float* in, int h, const float (&m)[2][C], float* dots,
                                               float* squares) const {
    float key[C], mask[C];
    load_columns(in + (In::keys + h) * columns, key);
    load_masks(in, h, mask);
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const float share = m[s][c] * mask[c];
        dots[s * STEP] += share * key[c];
        squares[s * STEP] += share * m[s][c];
      }
  }
  // All of that for the key that writes, to rows of the heads.
  __device__ __forceinline__ void compare_write(const float* in, const float (&m)[2][C], float* dots, float* squares) const {
    float sums[4] = {};
    add_compared<1>(in, H, m, sums, sums + 2);
    add_lanes<4, 1, 4>(sums, lane);
    const int which = first_sum<4, 1, 4>(lane);
    if (has_sums<4, 1, 4>(lane)) (which < 2 ? dots : squares)[H * held_row + first_slot + which % 2] = sums[0];
  }

  // |key|^2 of head h under its mask, by a warp.
  __device__ __forceinline__ float key_square(const float* in, int h) const {
    float sum = 0;
#pragma unroll
    for (int c = lane; c < columns; c += 32) {
      const float k = in[(In::keys + h) * columns + c], q = plan.masks ? in[(In::masks + h) * columns + c] : 1;
      sum += k * k * (q * q);
    }
    return add_warp(sum);
  }

  // The content weights of a head from its dot products and squares, by a warp: a lane has those of every 32nd slot.
  __device__ __forceinline__ void soften(const float* dots, const float* squares, float beta, float key_square,
                                         float (&weights)[lane_links]) const {
    float most = -INFINITY, sum = 0;
#pragma unroll
    for (int k = 0; k < lane_links; ++k) {
      const int i = lane + 32 * k;
      const float score = beta * (dots[i] * gpu::inverse_root(key_square * squares[i] + eps));
      weights[k] = i < plan.N ? score : -INFINITY;
      most = larger(most, weights[k]);
    }
    most = warp_maximum(most);
#pragma unroll
    for (int k = 0; k < lane_links; ++k) {
      weights[k] = lane + 32 * k < plan.N ? exp(weights[k] - most) : 0;
      sum += weights[k];
    }
    const float scale = 1 / add_warp(sum);
#pragma unroll
    for (int k = 0; k < lane_links; ++k) weights[k] = lane + 32 * k < plan.N ? weights[k] * scale : 0;
  }
  // A direction to a power, in shares; returns the logarithm of its maximum.
  __device__ __forceinline__ float sharpen(const float (&direction)[lane_links], float exponent,
                                           float (&out)[lane_links]) const {
    constexpr float floor = DncThread<float>::link_floor;
    float most = -INFINITY, sum = 0;
#pragma unroll
    for (int k = 0; k < lane_links; ++k) {
      const int i = lane + 32 * k;
      out[k] = direction[k] + floor;
      if (i < plan.N) most = larger(most, out[k]);
    }
    most = log(warp_maximum(most));
#pragma unroll
    for (int k = 0; k < lane_links; ++k) {
      out[k] = lane + 32 * k < plan.N ? exp(exponent * (log(out[k]) - most)) : 0;
      sum += out[k];
    }
    const float scale = 1 / add_warp(sum);
#pragma unroll
    for (int k = 0; k < lane_links; ++k) out[k] = lane + 32 * k < plan.N ? out[k] * scale : 0;
    return most;
  }
  __device__ __forceinline__ void load_every(const float* from, float (&values)[lane_links]) const {
#pragma unroll
    for (int k = 0; k < lane_links; ++k) values[k] = from[lane + 32 * k];
  }
  // Of what a lane has of every 32nd slot, that of the slot which is the thread's among the head's four warps.
  __device__ __forceinline__ float own_of(const float (&values)[lane_links]) const {
    float own = values[0];
#pragma unroll
    for (int k = 1; k < lane_links; ++k)
      if (warp % 4 == k) own = values[k];
    return own;
  }

  // The share of a head in what its slot retains; their product over the four lanes is what is retained.
  __device__ __forceinline__ float retained(float gate, float read_weight) const {
    float product = 1 - gate * read_weight;
    product *= gpu::shuffle_xor(product, 1);
    return product * gpu::shuffle_xor(product, 2);
  }

  // The links after a write.
  __device__ __forceinline__ void next_links(const float* rows_written, const Four<float>& written,
                                             const Four<float>& precedence, float (&links)[warp_rows][lane_links]) const {
#pragma unroll
    for (int r = 0; r < warp_rows; ++r) {
      const float own = rows_written[r];
#pragma unroll
      for (int k = 0; k < lane_links; ++k)
        links[r][k] = next_link(links[r][k], own, written.at[k], precedence.at[k], diagonal(r, k));
    }
  }
  __device__ __forceinline__ bool diagonal(int r, int k) const {
    return r % lane_links == k && lane == warp * (warp_rows / lane_links) + r / lane_links;
  }

  // The memory [N, D] and the links [N, N] of a sample, from and to where they are outside.
  __device__ __forceinline__ void take_memory(const float* memory, float (&m)[2][C]) const {
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const int slot = first_slot + s, of_slot = c * column_lanes + column;
        m[s][c] = memory && slot < plan.N && of_slot < plan.D ? memory[slot * plan.D + of_slot] : 0;
      }
  }
  __device__ __forceinline__ void give_memory(const float (&m)[2][C], float* memory) const {
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const int slot = first_slot + s, of_slot = c * column_lanes + column;
        if (slot < plan.N && of_slot < plan.D) memory[slot * plan.D + of_slot] = m[s][c];
      }
  }
  __device__ __forceinline__ void take_links(const float* from, float (&links)[warp_rows][lane_links]) const {
#pragma unroll
    for (int r = 0; r < warp_rows; ++r)
#pragma unroll
      for (int k = 0; k < lane_links; ++k) {
        const int i = warp * warp_rows + r, j = lane * lane_links + k;
        links[r][k] = from && i < plan.N && j < plan.N ? from[i * plan.N + j] : 0;
      }
  }
  __device__ __forceinline__ void give_links(const float (&links)[warp_rows][lane_links], float* to) const {
#pragma unroll
    for (int r = 0; r < warp_rows; ++r)
#pragma unroll
      for (int k = 0; k < lane_links; ++k) {
        const int i = warp * warp_rows + r, j = lane * lane_links + k;
        if (i < plan.N && j < plan.N) to[i * plan.N + j] = links[r][k];
      }
  }
  // f(which of held_slots, whether there is one), by the first threads.
  template <class F>
  __device__ __forceinline__ void with_slots(F f) const {
    if (gpu::thread() < held_slots) f(gpu::thread(), gpu::thread() < plan.N);
  }
  // f(head, slot, whether there are such), each thread one.
  template <class F>
  __device__ __forceinline__ void with_weights(F f) const {
    const int h = gpu::thread() / held_slots, i = gpu::thread() % held_slots;
    f(h, i, h < plan.R && i < plan.N);
  }
};

}  // namespace cuda
}  // namespace mann_fast

// How a block holds slots, and what warps do with them.
//
// A warp takes 16 slots at a time: a lane has 4 slots and C columns of each, the columns 8 apart, so that 8 lanes share a slot
// and 4 groups of lanes share a column. A sum over the columns of a slot takes log2(8) rounds and a sum over slots log2(4)
// rounds within the warp; both halve what a lane holds in every round, so that 16 dot products cost 14 shuffles. Equal slots
// get equal bits: every slot's columns are added in one order, whichever lanes hold it.
#pragma once
#include <math.h>
#include <cstdint>
#include <cstring>

#include "../include/arguments.h"
#include "../include/half.h"
#include "gpu.h"

namespace mann_fast {
namespace cuda {

constexpr int column_lanes = 8, lane_slots = 4, warp_slots = 16;
constexpr int most_threads = 256;

template <class T>
struct Order;  // an unsigned integer of a usage's size
template <>
struct Order<float> {
  using Bits = uint32_t;
};
template <>
struct Order<double> {
  using Bits = uint64_t;
};

// A slot that is not there, or that has been chosen.
template <class T>
constexpr typename Order<T>::Bits taken = ~typename Order<T>::Bits(0);

// An integer of the same order as usage: -0.0 equals 0.0, NaN comes last.
template <class T>
__device__ inline typename Order<T>::Bits order_of(T usage) {
  using Bits = typename Order<T>::Bits;
  const T u = usage + T(0);
  Bits bits;
  memcpy(&bits, &u, sizeof bits);
  const Bits sign = Bits(1) << (8 * sizeof(T) - 1);
  return u == u ? (bits & sign ? ~bits : bits | sign) : taken<T> - 1;
}

// A slot and its usage as one number. No two are equal, so their order is the stable one however they are moved about.
template <class T>
struct Ranked;
template <>
struct Ranked<float> {
  uint64_t bits;
  __device__ static Ranked of(uint32_t order, uint32_t slot) { return {static_cast<uint64_t>(order) << 32 | slot}; }
  __device__ uint32_t order() const { return static_cast<uint32_t>(bits >> 32); }
  __device__ uint32_t slot() const { return static_cast<uint32_t>(bits); }
  __device__ bool operator<(const Ranked& other) const { return bits < other.bits; }
};
template <>
struct alignas(16) Ranked<double> {
  uint64_t high, number;
  __device__ static Ranked of(uint64_t order, uint32_t slot) { return {order, slot}; }
  __device__ uint64_t order() const { return high; }
  __device__ uint32_t slot() const { return static_cast<uint32_t>(number); }
  __device__ bool operator<(const Ranked& other) const {
    return high < other.high || (high == other.high && number < other.number);
  }
};

__device__ inline uint32_t warp_least(uint32_t value) { return gpu::warp_min(value); }
__device__ inline uint64_t warp_least(uint64_t value) {
  const uint32_t high = gpu::warp_min(static_cast<uint32_t>(value >> 32));
  const uint32_t low = gpu::warp_min(value >> 32 == high ? static_cast<uint32_t>(value) : ~0u);
  return static_cast<uint64_t>(high) << 32 | low;
}

// A number as it lies in memory, and its value: whoever asks for it ahead waits only for the value. Inputs of a float64 state
// are float64, of a float32 state no wider than that.
template <class T>
__device__ inline typename Order<T>::Bits load_bits(const void* data, Dtype dtype, int64_t i) {
  using Bits = typename Order<T>::Bits;
  if constexpr (sizeof(T) == 8) return static_cast<const Bits*>(data)[i];
  else return dtype == Dtype::float32 ? static_cast<const Bits*>(data)[i] : static_cast<const uint16_t*>(data)[i];
}
template <class T>
__device__ inline T value_of(typename Order<T>::Bits bits, Dtype dtype) {
  if (dtype == Dtype::bfloat16) return static_cast<T>(from_bfloat16(static_cast<uint16_t>(bits)));
  if (dtype == Dtype::float16) return static_cast<T>(from_float16(static_cast<uint16_t>(bits)));
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T>
__device__ inline T load_as(const void* data, Dtype dtype, int64_t i) {
  return value_of<T>(load_bits<T>(data, dtype, i), dtype);
}

// Where number i of such data lies.
__device__ inline const void* number_of(const void* data, Dtype dtype, int64_t i) {
  return static_cast<const unsigned char*>(data) + i * (dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2);
}

template <class T>
__device__ inline void store_as(void* data, Dtype dtype, int64_t i, T value) {
  if (dtype == Dtype::float32) {
    static_cast<float*>(data)[i] = static_cast<float>(value);
    return;
  }
  switch (dtype) {
    case Dtype::float32: break;
    case Dtype::float64: static_cast<double*>(data)[i] = static_cast<double>(value); break;
    case Dtype::bfloat16: static_cast<uint16_t*>(data)[i] = to_bfloat16(static_cast<float>(value)); break;
    case Dtype::float16: static_cast<uint16_t*>(data)[i] = to_float16(static_cast<float>(value)); break;
  }
}

// The same of an input, which is float64 where the state is, and else no wider than float32; so it seldom branches.
template <class T>
__device__ __forceinline__ void store_input(void* data, Dtype dtype, int64_t i, T value) {
  if constexpr (sizeof(T) == 8) {
    static_cast<T*>(data)[i] = value;
  } else if (dtype == Dtype::float32) {
    static_cast<T*>(data)[i] = value;
  } else {
    static_cast<uint16_t*>(data)[i] = dtype == Dtype::bfloat16 ? gpu::to_bfloat16(value) : gpu::to_half(value);
  }
}

// The two shares of a gate; neither loses its last bits where the other is near 1.
template <class T>
__device__ inline void gate_shares(T logit, T& gate, T& rest) {
  const T e = exp(-fabs(logit)), larger = T(1) / (T(1) + e), smaller = e * larger;
  gate = logit >= 0 ? larger : smaller;
  rest = logit >= 0 ? smaller : larger;
  if (logit != logit) gate = rest = logit;
}

// Carves arrays out of a piece of memory; with a null base it only counts bytes.
struct Carver {
  unsigned char* base;
  size_t used = 0;
  __device__ __host__ explicit Carver(unsigned char* base) : base(base) {}
  template <class U>
  __device__ __host__ U* take(int64_t count) {
    U* array = reinterpret_cast<U*>(base + used);
    used += (static_cast<size_t>(count) * sizeof(U) + 15) / 16 * 16;
    return array;
  }
};

// ---- sums over lanes ------------------------------------------------------------------------------------------------

// Adds up v over the lanes that differ in the bits MASK, MASK / 2, ... LAST. While the number of values is even every round
// halves it: a lane keeps one half and gives the other away. With an odd number all lanes keep everything.
template <int MASK, int LAST, int V, class T>
__device__ __forceinline__ void add_lanes(T* v, int lane) {
  if constexpr (MASK >= LAST) {
    if constexpr (V % 2 == 0) {
      const bool upper = lane & MASK;
#pragma unroll
      for (int i = 0; i < V / 2; ++i) {
        const T given = upper ? v[i] : v[i + V / 2];
        v[i] = (upper ? v[i + V / 2] : v[i]) + gpu::shuffle_xor(given, MASK);
      }
      add_lanes<MASK / 2, LAST, V / 2>(v, lane);
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) v[i] += gpu::shuffle_xor(v[i], MASK);
      add_lanes<MASK / 2, LAST, V>(v, lane);
    }
  }
}

// How many of V sums a lane has then,
template <int MASK, int LAST, int V>
constexpr int sums_kept() {
  if constexpr (MASK < LAST) return V;
  else return V % 2 == 0 ? sums_kept<MASK / 2, LAST, V / 2>() : sums_kept<MASK / 2, LAST, V>();
}

// which is the first of them,
template <int MASK, int LAST, int V>
__device__ __forceinline__ int first_sum(int lane) {
  if constexpr (MASK < LAST) return 0;
  else if constexpr (V % 2 == 0) return (lane & MASK ? V / 2 : 0) + first_sum<MASK / 2, LAST, V / 2>(lane);
  else return first_sum<MASK / 2, LAST, V>(lane);
}

// and whether it is the one of those with the same sums that shall use them.
template <int MASK, int LAST, int V>
__device__ __forceinline__ bool has_sums(int lane) {
  if constexpr (MASK < LAST) return true;
  else if constexpr (V % 2 == 0) return has_sums<MASK / 2, LAST, V / 2>(lane);
  else return !(lane & MASK) && has_sums<MASK / 2, LAST, V>(lane);
}

// The same where every lane has its values in an order of its own, those that it keeps before those that it gives away: so none
// is chosen. Two lanes that differ in the bit MASK have each other's halves the other way round, and so on.
template <int MASK, int LAST, int V, class T>
__device__ __forceinline__ void add_turned(T* v) {
  if constexpr (MASK >= LAST) {
    static_assert(V % 2 == 0, "every round halves the values");
#pragma unroll
    for (int i = 0; i < V / 2; ++i) v[i] += gpu::shuffle_xor(v[i + V / 2], MASK);
    add_turned<MASK / 2, LAST, V / 2>(v);
  }
}

// The sum over the lanes that differ in the bits 16, 8, ... LAST.
template <int LAST, class T>
__device__ __forceinline__ T add_warp(T value) {
#pragma unroll
  for (int mask = 16; mask >= LAST; mask /= 2) value += gpu::shuffle_xor(value, mask);
  return value;
}

// ---- a thread's place -----------------------------------------------------------------------------------------------

// With HEADS heads at a time, a lane comes out of a sum over columns with OWN heads of one slot: its own.
template <int HEADS>
struct Place {
  static constexpr int OWN = sums_kept<4, 1, lane_slots * HEADS>();
  int lane, warp, warps, column, group, own_slot, own_head;
  bool owner;
  __device__ Place()
      : lane(gpu::thread() % 32), warp(gpu::thread() / 32), warps(gpu::threads() / 32), column(lane % column_lanes),
        group(lane / column_lanes), own_slot(group * lane_slots + first_sum<4, 1, lane_slots * HEADS>(lane) / HEADS),
        own_head(first_sum<4, 1, lane_slots * HEADS>(lane) % HEADS), owner(has_sums<4, 1, lane_slots * HEADS>(lane)) {}
};

// |key|^2 of a lane's own heads, from the squares of its columns of HEADS keys.
template <int HEADS, class T>
__device__ __forceinline__ void own_key_squares(const Place<HEADS>& p, T* squares, T* own) {
  add_lanes<4, 1, HEADS>(squares, p.lane);
#pragma unroll
  for (int j = 0; j < Place<HEADS>::OWN; ++j) {
    const int head = p.own_head + j;
    const int holder = HEADS == 4 ? 2 * head : HEADS == 2 ? 4 * head : 0;
    own[j] = gpu::shuffle(squares[0], p.group * column_lanes + holder);
  }
}

// Sums over the lanes that own the same heads of other slots: over every bit of the lane but the last, which tells heads
// apart, or holds the same twice where HEADS is 1.
template <int HEADS, class T>
__device__ __forceinline__ void add_owners(T* own) {
#pragma unroll
  for (int j = 0; j < Place<HEADS>::OWN; ++j) own[j] = add_warp<2>(own[j]);
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

template <class T, int C>
struct Tile {
  T at[lane_slots][C];
};

// Four numbers beside each other, which one instruction loads.
template <class T>
struct alignas(16) Four {
  T at[4];
};
template <class T>
__device__ __forceinline__ Four<T> load_four(const T* from) {
  return *reinterpret_cast<const Four<T>*>(from);
}

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T at[2];
};
template <class T>
__device__ __forceinline__ Pair<T> load_pair(const T* from) {
  return *reinterpret_cast<const Pair<T>*>(from);
}
template <class T>
__device__ __forceinline__ void store_pair(T* to, const Pair<T>& two) {
  *reinterpret_cast<Pair<T>*>(to) = two;
}

// Tiles of one block of so many threads, laid out so that threads side by side touch numbers side by side; a thread sees its own only.
template <class T, int C>
__device__ __forceinline__ void load_tile(const T* tiles, int64_t piece, int threads, Tile<T, C>& m) {
  const T* from = tiles + piece * lane_slots * C * threads + gpu::thread();
#pragma unroll
  for (int i = 0; i < lane_slots * C; ++i) m.at[i / C][i % C] = from[static_cast<int64_t>(i) * threads];
}
template <class T, int C>
__device__ __forceinline__ void store_tile(T* tiles, int64_t piece, int threads, const Tile<T, C>& m) {
  T* to = tiles + piece * lane_slots * C * threads + gpu::thread();
#pragma unroll
  for (int i = 0; i < lane_slots * C; ++i) to[static_cast<int64_t>(i) * threads] = m.at[i / C][i % C];
}

// dots[s HEADS + h] += columns of slot s times columns of row h, for rows [HEADS][ld] from this lane's first column on.
template <int HEADS, int C, class T>
__device__ __forceinline__ void add_dots(const Tile<T, C>& m, const T (&rows)[HEADS][C], T* dots) {
#pragma unroll
  for (int s = 0; s < lane_slots; ++s)
#pragma unroll
    for (int h = 0; h < HEADS; ++h)
#pragma unroll
      for (int c = 0; c < C; ++c) dots[s * HEADS + h] += m.at[s][c] * rows[h][c];
}

template <int C, class T>
__device__ __forceinline__ void add_squares(const Tile<T, C>& m, T* squares) {
#pragma unroll
  for (int s = 0; s < lane_slots; ++s)
#pragma unroll
    for (int c = 0; c < C; ++c) squares[s] += m.at[s][c] * m.at[s][c];
}

// squares[h] += squares of this lane's columns of row h.
template <int HEADS, int C, class T>
__device__ __forceinline__ void add_row_squares(const T (&rows)[HEADS][C], T* squares) {
#pragma unroll
  for (int h = 0; h < HEADS; ++h)
#pragma unroll
    for (int c = 0; c < C; ++c) squares[h] += rows[h][c] * rows[h][c];
}

template <int HEADS, int C, class T>
__device__ __forceinline__ void load_rows(const T* rows, int64_t ld, T (&out)[HEADS][C]) {
#pragma unroll
  for (int h = 0; h < HEADS; ++h)
#pragma unroll
    for (int c = 0; c < C; ++c) out[h][c] = rows[h * ld + c * column_lanes];
}

// m.at[s] += sum over heads of weights[h][s] rows[h].
template <int HEADS, int C, class T>
__device__ __forceinline__ void add_products(const Four<T> (&weights)[HEADS], const T (&rows)[HEADS][C], Tile<T, C>& m) {
#pragma unroll
  for (int h = 0; h < HEADS; ++h)
#pragma unroll
    for (int s = 0; s < lane_slots; ++s)
#pragma unroll
      for (int c = 0; c < C; ++c) m.at[s][c] += weights[h].at[s] * rows[h][c];
}

// sums[h C + c] += sum over slots of weights[h][s] m.at[s][c].
template <int HEADS, int C, class T>
__device__ __forceinline__ void add_weighted(const Tile<T, C>& m, const Four<T> (&weights)[HEADS], T* sums) {
#pragma unroll
  for (int h = 0; h < HEADS; ++h)
#pragma unroll
    for (int s = 0; s < lane_slots; ++s)
#pragma unroll
      for (int c = 0; c < C; ++c) sums[h * C + c] += weights[h].at[s] * m.at[s][c];
}

// grad.at[s] += 2 m.at[s] times the sum over heads of of_squares[h][s]: what reaches a slot by its norm.
template <int HEADS, int C, class T>
__device__ __forceinline__ void add_by_norm(const Tile<T, C>& m, const Four<T> (&of_squares)[HEADS], Tile<T, C>& grad) {
#pragma unroll
  for (int s = 0; s < lane_slots; ++s) {
    T factor = 0;
#pragma unroll
    for (int h = 0; h < HEADS; ++h) factor += of_squares[h].at[s];
#pragma unroll
    for (int c = 0; c < C; ++c) grad.at[s][c] += 2 * factor * m.at[s][c];
  }
}

// The gradient of one similarity, beta dot / root(key square * slot square + eps), from that of its softmax.
template <class T>
struct ScoreGradient {
  T dot, slot_square, key_square, beta;
};
template <class T>
__device__ __forceinline__ ScoreGradient<T> score_gradient(T of_score, T dot, T beta, T key_square, T slot_square, T eps) {
  const T q = gpu::inverse_root(key_square * slot_square + eps);
  const T of_cosine = of_score * (dot * q);  // times the cosine itself: that of beta
  const T of_product = T(-0.5) * beta * of_cosine * (q * q);
  return {of_score * beta * q, of_product * key_square, of_product * slot_square, of_cosine};
}

// Weighted sums over the slots of a warp, from what its lanes have, to [HEADS][ld], this lane's first column on.
template <int HEADS, int C, class T>
__device__ __forceinline__ void store_warp_sums(T* sums, int lane, T* to, int64_t ld) {
  add_lanes<16, 8, HEADS * C>(sums, lane);
  if (!has_sums<16, 8, HEADS * C>(lane)) return;
  const int first = first_sum<16, 8, HEADS * C>(lane);
#pragma unroll
  for (int i = 0; i < sums_kept<16, 8, HEADS * C>(); ++i) to[(first + i) / C * ld + (first + i) % C * column_lanes] = sums[i];
}

}  // namespace cuda
}  // namespace mann_fast

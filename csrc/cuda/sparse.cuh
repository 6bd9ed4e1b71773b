// What both directions of sparse access share. A block takes a sample, or a part of one.
#pragma once
#include "kernels.h"
#include "tile.cuh"

namespace mann_fast {
namespace cuda {

constexpr int block_warps = most_threads / 32;

// A block's arrays: in shared memory, or in device memory where they are too many for that.
struct Room {
  size_t bytes;
  unsigned char* far;  // of all blocks; null: they are near
  size_t shared() const { return far ? 0 : bytes; }
  __device__ unsigned char* own() const { return far ? far + gpu::block() * bytes : gpu::shared_memory(); }
};
inline Room make_room(const Carver& arrays, int64_t blocks, const Queue& queue) {
  const bool near = arrays.used <= gpu::limits().shared;
  return {arrays.used, near ? nullptr : static_cast<unsigned char*>(queue.scratch(queue.owner, blocks * arrays.used))};
}

// Threads count what a step has with 32 bits.
inline const char* too_many_rows(int64_t D, int64_t R, int64_t K) {
  const bool fits = R * (D + 31) < 1 << 27 && R * (2 * K + 1) < 1 << 27;
  return fits ? nullptr : "the kernel takes fewer than 2^27 numbers in the keys of a step, and 2^26 slots read in it";
}

// Slots of which the one of oldest access is kept beside them: a power of two.
constexpr int chunk_bits = 8;

__device__ inline bool warp_any(bool one) { return gpu::warp_min(one ? 0 : 1) == 0; }

// Whether number j of a list, or all of it but the last bits, is there for the first time; asked by a whole warp.
__device__ inline bool is_first(const int* list, int j, int bits, int lane) {
  bool before = false;
  for (int i = lane; i < j; i += 32) before |= list[i] >> bits == list[j] >> bits;
  return !warp_any(before);
}

__device__ inline int within(int64_t slot, int64_t N) { return static_cast<int>(slot < 0 ? 0 : slot < N ? slot : N - 1); }

// What a head wrote: open * gate of its vector to the slots that it read last, open * rest to the oldest.
template <class T>
struct WriteGates {
  T gate, rest, open = 1, closed = 0;
  template <class Pointer>
  __device__ WriteGates(const SparseInputs<Pointer>& told, Dtype dtype, int64_t head) {
    gate_shares(load_as<T>(told.gate_logits, dtype, head), gate, rest);
    if (told.write_gate_logits) gate_shares(load_as<T>(told.write_gate_logits, dtype, head), open, closed);
  }
};

// Numbers [0, count) of a row of what a step of a sample gives out, 0.
__device__ inline void clear_row(void* rows, Dtype dtype, int64_t row, int64_t count) {
  for (int64_t i = gpu::thread(); rows && i < count; i += gpu::threads()) store_as(rows, dtype, row * count + i, 0.0f);
}

}  // namespace cuda
}  // namespace mann_fast

// The second half of csrc/cuda/gpu.h for the model: the host's code as it is, and a launch that hands its kernel and the bytes
// of its parameters to whoever asked for them (capture.py). Kernels only have to compile here: what runs is machine code.
#pragma once
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "../../csrc/include/half.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace mann_fast {
namespace gpu {
namespace recording {

struct Recorded {
  const void* kernel;
  int64_t blocks, threads, cluster, shared;
  const unsigned char* parameters;  // as they lie in constant memory
  int64_t bytes;
};

// Null, or why the launch failed.
using Callback = const char* (*)(const Recorded*);
inline Callback callback = nullptr;
constexpr size_t most_bytes = 4096;  // that a kernel's parameters may have

struct Parameters {
  alignas(16) unsigned char bytes[most_bytes];
  size_t size = 0;
  template <class P>
  void add(const P& value) {
    size = (size + alignof(P) - 1) / alignof(P) * alignof(P);
    if (size + sizeof(P) > most_bytes) std::abort();
    std::memcpy(bytes + size, &value, sizeof(P));
    size += sizeof(P);
  }
};

[[noreturn]] inline void never() { std::abort(); }

}  // namespace recording

inline int thread() { recording::never(); }
inline int threads() { recording::never(); }
inline int64_t block() { recording::never(); }
inline unsigned char* shared_memory() { recording::never(); }
inline void sync() { recording::never(); }
inline void sync_warp() { recording::never(); }
inline void sync_cluster() { recording::never(); }
template <class T>
T shuffle_xor(T, int) {
  recording::never();
}
template <class T>
T shuffle(T, int) {
  recording::never();
}
inline unsigned warp_min(unsigned) { recording::never(); }
inline unsigned warp_sum(unsigned) { recording::never(); }
template <class T>
T* of_block(T*, int) {
  recording::never();
}
inline float float_of_half(uint16_t bits) { return from_float16(bits); }
inline uint16_t to_half(float x) { return to_float16(x); }
inline uint16_t to_bfloat16(float x) { return mann_fast::to_bfloat16(x); }
template <class T>
T inverse_root(T) {
  recording::never();
}
template <class T>
T reciprocal(T) {
  recording::never();
}

inline Limits limits() { return {227 * 1024, portable_cluster, 2 * portable_cluster, 132}; }  // an H200's

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), const Launch& how, Arguments... arguments) {
  if (how.blocks == 0) return nullptr;
  recording::Parameters parameters;
  (parameters.add(static_cast<Parameters>(arguments)), ...);
  const recording::Recorded recorded{reinterpret_cast<const void*>(kernel),
                                     how.blocks,
                                     how.threads,
                                     how.cluster,
                                     static_cast<int64_t>(how.shared),
                                     parameters.bytes,
                                     static_cast<int64_t>(parameters.size)};
  return recording::callback ? recording::callback(&recorded) : "nobody interprets kernels here";
}

template <class Kernel>
int clusters_at_once(Kernel, const Launch& how) {
  return limits().processors / how.cluster;
}

template <class Kernel>
const char* usable(Kernel) {
  return nullptr;
}

}  // namespace gpu
}  // namespace mann_fast

extern "C" __attribute__((visibility("default"), used)) inline void mann_fast_on_launch(
    mann_fast::gpu::recording::Callback callback) {
  mann_fast::gpu::recording::callback = callback;
}

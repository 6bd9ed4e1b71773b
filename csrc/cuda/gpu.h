// What the kernels need of CUDA, and all that they use of it. nvcc takes the first half; with MANN_FAST_EMULATION the same
// kernels compile as C++ and run on a processor, a fiber for every thread (tests/cpp/emulation.h), so that a barrier that is
// missing, divergent or too late shows in a test. Kernels know pointers and sizes; no inline PTX, no implicit warp lock-step.
#pragma once
#include <cstddef>
#include <cstdint>

namespace mann_fast {
namespace gpu {

constexpr int warp_size = 32;
constexpr size_t portable_shared = 48 * 1024;  // bytes of shared memory that a kernel gets without asking
constexpr int portable_cluster = 8;            // and blocks of a cluster

struct Launch {
  int64_t blocks;
  int threads;
  int cluster;  // blocks that see each other's shared memory
  size_t shared;
  void* stream;
};

struct Limits {
  size_t shared;        // bytes that a block may have
  int cluster;          // blocks of a cluster that there is always room for; 1 where there are no clusters
  int largest_cluster;  // that a kernel may ask for: clusters_at_once says whether there is room
  int processors;
};

}  // namespace gpu
}  // namespace mann_fast

#ifdef MANN_FAST_EMULATION
#include "emulation.h"
#else
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace mann_fast {
namespace gpu {

__device__ inline int thread() { return static_cast<int>(threadIdx.x); }
__device__ inline int threads() { return static_cast<int>(blockDim.x); }
__device__ inline int64_t block() { return blockIdx.x; }

__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

// A barrier of the block; what each thread had written, all see.
__device__ inline void sync() { __syncthreads(); }
__device__ inline void sync_warp() { __syncwarp(); }

// Of all 32 lanes at once.
template <class T>
__device__ inline T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(~0u, value, mask);
}
template <class T>
__device__ inline T shuffle(T value, int lane) {
  return __shfl_sync(~0u, value, lane);
}
__device__ inline unsigned warp_min(unsigned value) { return __reduce_min_sync(~0u, value); }
__device__ inline unsigned warp_sum(unsigned value) { return __reduce_add_sync(~0u, value); }

// The blocks of a cluster: a barrier, and they reach the same place of each other's shared memory.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ inline void sync_cluster() { cooperative_groups::this_cluster().sync(); }
template <class T>
__device__ inline T* of_block(T* shared, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
}
#else  // never launched with clusters
__device__ inline void sync_cluster() { __trap(); }
template <class T>
__device__ inline T* of_block(T* shared, int) {
  return shared;
}
#endif

__device__ inline float inverse_root(float x) { return rsqrtf(x); }
__device__ inline double inverse_root(double x) { return rsqrt(x); }
// Of what is far from the ends of its range.
__device__ inline float reciprocal(float x) { return __fdividef(1.0f, x); }
__device__ inline double reciprocal(double x) { return 1.0 / x; }

// To and from numbers of 16 bits, as half.h has them.
__device__ inline float float_of_half(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ inline uint16_t to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }
__device__ inline uint16_t to_bfloat16(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }

// Of the current device.
inline Limits limits() {
  int device = 0, shared = 0, major = 0, processors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  return {static_cast<size_t>(shared), major >= 9 ? portable_cluster : 1, major >= 9 ? 2 * portable_cluster : 1, processors};
}

// A launch as the runtime takes it; status tells whether the kernel may have what it asks for.
struct Configured {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute cluster;
  cudaError_t status = cudaSuccess;
  template <class Kernel>
  Configured(Kernel kernel, const Launch& how) {
    // What a kernel may ask for is state that all threads share: each sets the same, so that none takes it from another's launch.
    if (how.shared > portable_shared)
      status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(limits().shared));
    if (status == cudaSuccess && how.cluster > portable_cluster)
      status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(how.cluster);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.gridDim = dim3(static_cast<unsigned>(how.blocks));
    config.blockDim = dim3(static_cast<unsigned>(how.threads));
    config.dynamicSmemBytes = how.shared;
    config.stream = static_cast<cudaStream_t>(how.stream);
    config.attrs = &cluster;
    config.numAttrs = how.cluster > 1 ? 1 : 0;
  }
  Configured(const Configured&) = delete;  // config points into it
};

// Null where the runtime accepted a call, else why not; then nothing stays behind, or the next launch would report it.
inline const char* refusal(cudaError_t status) {
  if (status == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(status);
}

// Null where the launch was accepted, else why not.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), const Launch& how, Arguments... arguments) {
  if (how.blocks == 0) return nullptr;
  Configured as(kernel, how);
  if (as.status == cudaSuccess) as.status = cudaLaunchKernelEx(&as.config, kernel, static_cast<Parameters>(arguments)...);
  return refusal(as.status);
}

// How many of such clusters the current device has room for at once.
template <class... Parameters>
int clusters_at_once(void (*kernel)(Parameters...), const Launch& how) {
  Configured as(kernel, how);
  int count = 0;
  if (as.status == cudaSuccess) as.status = cudaOccupancyMaxActiveClusters(&count, kernel, &as.config);
  return refusal(as.status) ? 0 : count;
}

// Null where the driver and the current device can run a kernel of this library, else why not.
template <class Kernel>
const char* usable(Kernel kernel) {
  cudaFuncAttributes attributes;
  return refusal(cudaFuncGetAttributes(&attributes, kernel));
}

}  // namespace gpu
}  // namespace mann_fast
#endif

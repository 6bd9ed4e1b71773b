// A sample's slots divided among blocks: what each block has summed, added up by a second kernel in one order.
#pragma once
#include "tile.cuh"

namespace mann_fast {
namespace cuda {

// sums [parts, count] to out [count].
template <class T>
__global__ void __launch_bounds__(most_threads, 1)
    add_parts_kernel(const T* sums, int64_t parts, int64_t count, void* out, Dtype dtype) {
  const int64_t i = gpu::block() * gpu::threads() + gpu::thread();
  if (i >= count) return;
  T sum = 0;
  for (int64_t part = 0; part < parts; ++part) sum += sums[part * count + i];
  store_as(out, dtype, i, sum);
}

template <class T>
const char* add_parts(const T* sums, int64_t parts, int64_t count, void* out, Dtype dtype, void* stream) {
  return gpu::launch(add_parts_kernel<T>, {(count + most_threads - 1) / most_threads, most_threads, 1, 0, stream}, sums, parts,
                     count, out, dtype);
}

}  // namespace cuda
}  // namespace mann_fast

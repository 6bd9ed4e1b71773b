// The CUDA kernels as the bindings call them. Each returns null, or why it could not be launched. Pointers in their
// arguments are to device memory.
#pragma once
#include "../include/arguments.h"

namespace mann_fast {
namespace cuda {

// Where a kernel is launched, and who gives it scratch memory: freed, or reused, in the order of the stream.
struct Queue {
  void* stream;
  void* (*scratch)(void* owner, size_t bytes);
  void* owner;
};

// Null where the kernels can run on the current device, else why not: too old a device or driver.
const char* usable();

const char* content_read(const ContentRead&, const Queue&);
const char* content_read_backward(const ContentReadBackward&, const Queue&);
const char* least_used(const LeastUsed&, const Queue&);
const char* lrua_write(const LruaWrite&, const Queue&);
const char* lrua_write_backward(const LruaWriteBackward&, const Queue&);
const char* lrua_scan(const LruaScan&, const Queue&);
const char* lrua_scan_backward(const LruaScanBackward&, const Queue&);
const char* cell(const Cell&, const Queue&);
const char* cell_backward(const CellBackward&, const Queue&);
// Null where the current device has room for them, whatever T and B are, else why not; look at the sizes only.
const char* cell_unable(const Cell&);
const char* cell_backward_unable(const CellBackward&);
const char* ntm_scan(const NtmScan&, const Queue&);
const char* ntm_scan_backward(const NtmScanBackward&, const Queue&);

}  // namespace cuda
}  // namespace mann_fast

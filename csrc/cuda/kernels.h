// The CUDA kernels as the bindings call them. Each returns null, or why it could not be launched. Pointers in their
// arguments are to device memory.
#pragma once
#include "../include/ops.h"

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

#define MANN_FAST_DECLARE(op, Arguments) const char* op(const Arguments&, const Queue&);
MANN_FAST_OPS(MANN_FAST_DECLARE)
#undef MANN_FAST_DECLARE

// Null where the current device has room for a cell, whatever T and B are, else why not; look at the sizes only.
const char* cell_unable(const Cell&);
const char* cell_backward_unable(const CellBackward&);
const char* ntm_cell_unable(const NtmCell&);
const char* ntm_cell_backward_unable(const NtmCellBackward&);
const char* dnc_cell_unable(const DncCell&);  // of its pointers, looks at whether there are links
const char* dnc_cell_backward_unable(const DncCellBackward&);

// How a scan takes one sample.
struct Layout {
  int blocks, warps;   // of the sample's cluster; of a block
  const char* memory;  // where the memory lies
  size_t shared;       // bytes of a block's shared memory
};

// Null, and how a float32 scan would be launched on the current device, else why it cannot be; look at the sizes only.
const char* lrua_scan_layout(const LruaScan&, Layout&);
const char* lrua_scan_backward_layout(const LruaScanBackward&, Layout&);
const char* ntm_scan_layout(const NtmScan&, Layout&);
const char* ntm_scan_backward_layout(const NtmScanBackward&, Layout&);
const char* dnc_scan_layout(const DncScan&, Layout&);  // of its pointers, looks at which there are
const char* dnc_scan_backward_layout(const DncScanBackward&, Layout&);

// Blocks of the current device that share the search in each of B sparse memories.
int64_t sparse_blocks(int64_t B, int64_t N, int64_t D);

}  // namespace cuda
}  // namespace mann_fast

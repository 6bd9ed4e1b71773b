// The CPU kernels: one table of functions per instruction set, which take ../include/arguments.h.
#pragma once
#include "../include/arguments.h"

namespace mann_fast {

// How a kernel runs its tasks; the caller owns the threads.
struct Parallel {
  int64_t threads;
  void (*run)(int64_t tasks, void (*task)(void* context, int64_t index), void* context);
};

// One table per instruction set. Each function returns false where scratch memory could not be had.
struct ContentKernels {
  bool (*read)(const ContentRead&, const Parallel&);
  bool (*read_backward)(const ContentReadBackward&, const Parallel&);
};

struct LruaKernels {
  bool (*least_used)(const LeastUsed&, const Parallel&);
  bool (*write)(const LruaWrite&, const Parallel&);
  bool (*write_backward)(const LruaWriteBackward&, const Parallel&);
  bool (*scan)(const LruaScan&, const Parallel&);
  bool (*scan_backward)(const LruaScanBackward&, const Parallel&);
};

struct CellKernels {
  bool (*forward)(const Cell&, const Parallel&);
  bool (*backward)(const CellBackward&, const Parallel&);
};

struct NtmKernels {
  bool (*scan)(const NtmScan&, const Parallel&);
  bool (*scan_backward)(const NtmScanBackward&, const Parallel&);
};

struct Kernels {
  const char* isa;
  ContentKernels content;
  LruaKernels lrua;
  CellKernels cell;
  NtmKernels ntm;
};

// The kernels for this processor, or those named by MANN_FAST_CPU_ISA; null where that names an instruction set which
// this build or processor does not have.
const Kernels* kernels();

// 64-byte aligned; filled with NaN where MANN_FAST_POISON is set, so that tests see a read of what was never written.
void* scratch_allocate(size_t bytes);
void scratch_free(void* scratch);

}  // namespace mann_fast

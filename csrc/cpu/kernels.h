// The CPU kernels: one table of functions per instruction set, which take ../include/arguments.h.
#pragma once
#include "../include/ops.h"

namespace mann_fast {

// How a kernel runs its tasks; the caller owns the threads.
struct Parallel {
  int64_t threads;
  void (*run)(int64_t tasks, void (*task)(void* context, int64_t index), void* context);
};

// A function for each op, which returns false where scratch memory could not be had.
struct Kernels {
  const char* isa;
#define MANN_FAST_MEMBER(op, Arguments) bool (*op)(const Arguments&, const Parallel&);
  MANN_FAST_CPU_OPS(MANN_FAST_MEMBER)
#undef MANN_FAST_MEMBER
};

// The kernels for this processor, or those named by MANN_FAST_CPU_ISA; null where this build or processor does not have them.
const Kernels* kernels();

// Whether products of bfloat16 take less time than float's, these kernels' or the library's.
bool fast_bfloat16();

// 64-byte aligned; filled with NaN where MANN_FAST_POISON is set, so that tests see a read of what was never written.
void* scratch_allocate(size_t bytes);
void scratch_free(void* scratch);

}  // namespace mann_fast

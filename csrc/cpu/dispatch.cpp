// Choice of the instruction set at run time, and scratch memory: what all kernels share, compiled for the oldest processor.
#ifdef __x86_64__
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace mann_fast {

// What csrc/cpu/*.cpp define, compiled once for each instruction set.
#define MANN_FAST_DECLARE(op, Arguments) bool op(const Arguments&, const Parallel&);
#define MANN_FAST_FUNCTION(op, Arguments) op,
#define MANN_FAST_TABLE(isa)                                           \
  namespace isa {                                                      \
  MANN_FAST_CPU_OPS(MANN_FAST_DECLARE)                                 \
  const Kernels table = {#isa, MANN_FAST_CPU_OPS(MANN_FAST_FUNCTION)}; \
  }
#ifdef MANN_FAST_HAVE_baseline
MANN_FAST_TABLE(baseline)
#endif
#ifdef MANN_FAST_HAVE_avx2
MANN_FAST_TABLE(avx2)
#endif
#ifdef MANN_FAST_HAVE_avx512
MANN_FAST_TABLE(avx512)
#endif

namespace {

bool supported(const char* isa) {
  if (std::strcmp(isa, "baseline") == 0) return true;
#ifdef __x86_64__
  // Feature names that every compiler knows, for x86-64-v3 and v4 as far as the kernels use them.
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (std::strcmp(isa, "avx2") == 0) return v3;
  if (std::strcmp(isa, "avx512") == 0)
    return v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
#endif
  return false;
}

// What this build has, the best first.
const Kernels* const built[] = {
#ifdef MANN_FAST_HAVE_avx512
    &avx512::table,
#endif
#ifdef MANN_FAST_HAVE_avx2
    &avx2::table,
#endif
#ifdef MANN_FAST_HAVE_baseline
    &baseline::table,
#endif
};

}  // namespace

const Kernels* kernels() {
  static const Kernels* const chosen = [] {
    const char* forced = std::getenv("MANN_FAST_CPU_ISA");
    for (const Kernels* table : built)
      if (supported(table->isa) && (forced == nullptr || *forced == '\0' || std::strcmp(forced, table->isa) == 0)) return table;
    return static_cast<const Kernels*>(nullptr);
  }();
  return chosen;
}

bool fast_bfloat16() {
#ifdef __x86_64__
  // AVX512-BF16 has twice the rate of float on AMD's Zen 4, and half of it on Intel's Emerald Rapids, which has AMX instead,
  // where the system lets it be used.
  unsigned a, b, c, d;
  const bool amx = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);  // AMX-BF16
  return amx || (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_is("amd"));
#else
  return false;
#endif
}

void* scratch_allocate(size_t bytes) {
  bytes = (bytes + 63) / 64 * 64;
  void* scratch = std::aligned_alloc(64, bytes > 0 ? bytes : 64);
  static const bool poison = std::getenv("MANN_FAST_POISON") != nullptr;
  if (poison && scratch != nullptr) std::memset(scratch, 0xff, bytes);  // all bits set is a NaN in float and double
  return scratch;
}

void scratch_free(void* scratch) { std::free(scratch); }

}  // namespace mann_fast

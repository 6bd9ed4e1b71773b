// Choice of the instruction set at run time, and scratch memory: what all kernels share, compiled for the oldest processor.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace mann_fast {

namespace baseline {
extern const ContentKernels content_kernels;
extern const LruaKernels lrua_kernels;
extern const CellKernels cell_kernels;
extern const NtmKernels ntm_kernels;
}  // namespace baseline
#ifdef __x86_64__
namespace avx2 {
extern const ContentKernels content_kernels;
extern const LruaKernels lrua_kernels;
extern const CellKernels cell_kernels;
extern const NtmKernels ntm_kernels;
}  // namespace avx2
namespace avx512 {
extern const ContentKernels content_kernels;
extern const LruaKernels lrua_kernels;
extern const CellKernels cell_kernels;
extern const NtmKernels ntm_kernels;
}  // namespace avx512
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

Kernels table([[maybe_unused]] const char* isa) {
#ifdef __x86_64__
  if (std::strcmp(isa, "avx512") == 0)
    return {"avx512", avx512::content_kernels, avx512::lrua_kernels, avx512::cell_kernels, avx512::ntm_kernels};
  if (std::strcmp(isa, "avx2") == 0)
    return {"avx2", avx2::content_kernels, avx2::lrua_kernels, avx2::cell_kernels, avx2::ntm_kernels};
#endif
  return {"baseline", baseline::content_kernels, baseline::lrua_kernels, baseline::cell_kernels, baseline::ntm_kernels};
}

}  // namespace

const Kernels* kernels() {
  static const char* const isa = [] {
    const char* forced = std::getenv("MANN_FAST_CPU_ISA");
    if (forced != nullptr && *forced != '\0') return supported(forced) ? forced : static_cast<const char*>(nullptr);
    return supported("avx512") ? "avx512" : supported("avx2") ? "avx2" : "baseline";
  }();
  if (isa == nullptr) return nullptr;
  static const Kernels chosen = table(isa);
  return &chosen;
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

// The CPU implementation of the raw ops.
#include "bindings.h"
#include "cpu/kernels.h"

namespace mann_fast {
namespace {

const Kernels& available_kernels() {
  const Kernels* chosen = kernels();
  STD_TORCH_CHECK(chosen != nullptr,
                  "MANN_FAST_CPU_ISA names an instruction set that this processor or build does not have; known are "
                  "baseline, avx2 and avx512");
  return *chosen;
}

Parallel torch_threads() {
  return {static_cast<int64_t>(torch::stable::get_num_threads()),
          [](int64_t tasks, void (*task)(void*, int64_t), void* context) {
            torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) task(context, i);
            });
          }};
}

void ran(bool success) { STD_TORCH_CHECK(success, "mann_fast: not enough memory for scratch"); }

struct Cpu {
  explicit Cpu(const Tensor&) {}
#define MANN_FAST_RUN(op, Arguments) \
  void run(const Arguments& a) const { ran(available_kernels().op(a, torch_threads())); }
  MANN_FAST_CPU_OPS(MANN_FAST_RUN)
#undef MANN_FAST_RUN
};

}  // namespace
}  // namespace mann_fast

STABLE_TORCH_LIBRARY_IMPL(mann_fast, CompositeImplicitAutograd, m) {
  m.impl("fast_bfloat16", TORCH_BOX(&mann_fast::fast_bfloat16));
}

STABLE_TORCH_LIBRARY_IMPL(mann_fast, CPU, m) {
#define MANN_FAST_REGISTER(op, Arguments) m.impl(#op, TORCH_BOX(&mann_fast::op<mann_fast::Cpu>));
  MANN_FAST_CPU_OPS(MANN_FAST_REGISTER)
#undef MANN_FAST_REGISTER
  m.impl("sparse_lists", TORCH_BOX(&mann_fast::sparse_lists<mann_fast::Cpu>));
  m.impl("sparse_step_", TORCH_BOX(&mann_fast::sparse_step_<mann_fast::Cpu>));
  m.impl("sparse_step_backward_", TORCH_BOX(&mann_fast::sparse_step_backward_<mann_fast::Cpu>));
}

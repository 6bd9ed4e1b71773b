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
  void run(const ContentRead& a) const { ran(available_kernels().content.read(a, torch_threads())); }
  void run(const ContentReadBackward& a) const { ran(available_kernels().content.read_backward(a, torch_threads())); }
  void run(const LeastUsed& a) const { ran(available_kernels().lrua.least_used(a, torch_threads())); }
  void run(const LruaWrite& a) const { ran(available_kernels().lrua.write(a, torch_threads())); }
  void run(const LruaWriteBackward& a) const { ran(available_kernels().lrua.write_backward(a, torch_threads())); }
  void run(const LruaScan& a) const { ran(available_kernels().lrua.scan(a, torch_threads())); }
  void run(const LruaScanBackward& a) const { ran(available_kernels().lrua.scan_backward(a, torch_threads())); }
  void run(const Cell& a) const { ran(available_kernels().cell.forward(a, torch_threads())); }
  void run(const CellBackward& a) const { ran(available_kernels().cell.backward(a, torch_threads())); }
  void run(const NtmScan& a) const { ran(available_kernels().ntm.scan(a, torch_threads())); }
  void run(const NtmScanBackward& a) const { ran(available_kernels().ntm.scan_backward(a, torch_threads())); }
};

}  // namespace
}  // namespace mann_fast

STABLE_TORCH_LIBRARY_IMPL(mann_fast, CPU, m) {
  m.impl("content_read", TORCH_BOX(&mann_fast::content_read<mann_fast::Cpu>));
  m.impl("content_read_backward", TORCH_BOX(&mann_fast::content_read_backward<mann_fast::Cpu>));
  m.impl("least_used", TORCH_BOX(&mann_fast::least_used<mann_fast::Cpu>));
  m.impl("lrua_write", TORCH_BOX(&mann_fast::lrua_write<mann_fast::Cpu>));
  m.impl("lrua_write_backward", TORCH_BOX(&mann_fast::lrua_write_backward<mann_fast::Cpu>));
  m.impl("lrua_scan", TORCH_BOX(&mann_fast::lrua_scan<mann_fast::Cpu>));
  m.impl("lrua_scan_backward", TORCH_BOX(&mann_fast::lrua_scan_backward<mann_fast::Cpu>));
  m.impl("cell", TORCH_BOX(&mann_fast::cell<mann_fast::Cpu>));
  m.impl("cell_backward", TORCH_BOX(&mann_fast::cell_backward<mann_fast::Cpu>));
  m.impl("ntm_scan", TORCH_BOX(&mann_fast::ntm_scan<mann_fast::Cpu>));
  m.impl("ntm_scan_backward", TORCH_BOX(&mann_fast::ntm_scan_backward<mann_fast::Cpu>));
}

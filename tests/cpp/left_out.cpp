// Stands in for the kernels of an instruction set that a driver does not run, in place of minutes of compiling them.
#include <cstdlib>

#include "../../csrc/cpu/kernels.h"

namespace mann_fast {
namespace MANN_FAST_ISA {

#define MANN_FAST_LEFT_OUT(op, Arguments) \
  bool op(const Arguments&, const Parallel&) { std::abort(); }
MANN_FAST_CPU_OPS(MANN_FAST_LEFT_OUT)

}  // namespace MANN_FAST_ISA
}  // namespace mann_fast

// dnc_cell forward: a whole sequence with a Differentiable Neural Computer's memory.
#include "cell_forward.cuh"
#include "dnc_cell.cuh"

namespace mann_fast {
namespace cuda {

const char* dnc_cell(const DncCell& a, const Queue& queue) { return cell_forward<DncMemory>(a, &queue); }
const char* dnc_cell_unable(const DncCell& a) { return cell_forward<DncMemory>(a, nullptr); }

}  // namespace cuda
}  // namespace mann_fast

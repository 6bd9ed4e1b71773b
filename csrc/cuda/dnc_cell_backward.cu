// dnc_cell backward: a whole sequence with a Differentiable Neural Computer's memory.
#include "cell_backward.cuh"
#include "dnc_cell.cuh"

namespace mann_fast {
namespace cuda {

const char* dnc_cell_backward(const DncCellBackward& a, const Queue& queue) { return cell_back<DncMemory>(a, &queue); }
const char* dnc_cell_backward_unable(const DncCellBackward& a) { return cell_back<DncMemory>(a, nullptr); }

}  // namespace cuda
}  // namespace mann_fast

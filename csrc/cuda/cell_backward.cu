// cell backward: a whole sequence with an LRUA memory.
#include "cell_backward.cuh"
#include "lrua_cell.cuh"

namespace mann_fast {
namespace cuda {

const char* cell_backward(const CellBackward& a, const Queue& queue) { return cell_back<LruaMemory>(a, &queue); }
const char* cell_backward_unable(const CellBackward& a) { return cell_back<LruaMemory>(a, nullptr); }

}  // namespace cuda
}  // namespace mann_fast

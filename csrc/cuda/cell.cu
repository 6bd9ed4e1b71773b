// cell forward: a whole sequence with an LRUA memory.
#include "cell_forward.cuh"
#include "lrua_cell.cuh"

namespace mann_fast {
namespace cuda {

const char* cell(const Cell& a, const Queue& queue) { return cell_forward<LruaMemory>(a, &queue); }
const char* cell_unable(const Cell& a) { return cell_forward<LruaMemory>(a, nullptr); }

}  // namespace cuda
}  // namespace mann_fast

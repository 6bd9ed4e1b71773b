// ntm_cell backward: a whole sequence with a Neural Turing Machine's memory.
#include "cell_backward.cuh"
#include "ntm_cell.cuh"

namespace mann_fast {
namespace cuda {

const char* ntm_cell_backward(const NtmCellBackward& a, const Queue& queue) { return cell_back<NtmMemory>(a, &queue); }
const char* ntm_cell_backward_unable(const NtmCellBackward& a) { return cell_back<NtmMemory>(a, nullptr); }

}  // namespace cuda
}  // namespace mann_fast

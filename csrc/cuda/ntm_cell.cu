// ntm_cell forward: a whole sequence with a Neural Turing Machine's memory.
#include "cell_forward.cuh"
#include "ntm_cell.cuh"

namespace mann_fast {
namespace cuda {

const char* ntm_cell(const NtmCell& a, const Queue& queue) { return cell_forward<NtmMemory>(a, &queue); }
const char* ntm_cell_unable(const NtmCell& a) { return cell_forward<NtmMemory>(a, nullptr); }

}  // namespace cuda
}  // namespace mann_fast

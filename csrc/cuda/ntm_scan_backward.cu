// ntm_scan backward: one launch for all steps.
//
// Takes at most `anchor_every` steps at a time: replays their writes from an anchor or where the sample began anew, with the
// weights that were kept, so that no warp needs another; then goes back through them. Heads that address one memory: back
// through what was read and written; compare; tell the sums of exponentials | barrier | shift; tell the maximum | barrier |
// back through sharpening; tell gradients of the shift | barrier | back through shift, gate, softmax and similarity. Read
// first, all heads do so at once: three barriers a step. Write first, those that read and then those that write: six. An erase
// is never undone by a division. With a fixed plan nobody needs the maximum: a barrier less, two or four.
#include "kernels.h"
#include "ntm_backward.cuh"

namespace mann_fast {
namespace cuda {
namespace {

template <class T, int C, bool RESIDENT, class P>
struct BackwardScan : NtmBackward<T, C, RESIDENT, false, P> {
  using Base = NtmBackward<T, C, RESIDENT, false, P>;
  using Base::a, Base::addressed_row, Base::first_told, Base::inputs, Base::last_told, Base::plan, Base::rank, Base::sample,
      Base::small, Base::visits, Base::written_row;
  NtmStream<T, NtmScanBackward, P> stream;
  // With a fixed plan: where what all have told is added up and goes to.
  struct Giving {
    const T* from;
    void* to;  // null: nowhere
    int ld, width, head;
    bool scalar;
  };
  Giving of_write{}, of_head{};

  __device__ __forceinline__ BackwardScan(const NtmScanBackward& a, const P& plan, int every, Places places)
      : Base(a, plan, every, places, gpu::block() / plan.cluster, static_cast<int>(gpu::block() % plan.cluster),
             a.grad_reads != nullptr),
        stream(a, plan) {
    if constexpr (P::fixed) find_givings();
  }

  // Where a thread of a fixed plan finds what it gives, and where it goes: one number of what is written and one of the heads.
  __device__ __forceinline__ void find_givings() {
    static_assert(P::warps * (of_shift + P::shifts) <= P::span, "room for the scalars of two turns");
    const int writes = plan.R - plan.reads, written = writes * plan.D, j = gpu::thread(), i = j < written ? j : j - written;
    if (j < 2 * written) {
      void* to = j < written ? a.grad_erase : a.grad_add;
      of_write = {(j < written ? small.of_erase : small.of_add) + vector_at(plan, i),
                  place_of(to, i),
                  writes * plan.columns,
                  written,
                  0,
                  false};
    }
    // The last threads, for the first may have had one already.
    const int each = plan.D + 3 + plan.shifts, k = this->threads() - 1 - gpu::thread(), h = k / each, which = k % each - plan.D;
    if (h >= plan.R) return;
    const int of_head_scalars = h * (of_shift + plan.shifts), scalars_ld = plan.heads * (of_shift + plan.shifts);
    if (which < 0)
      of_head = {small.of_keys + h * plan.columns + k % each,
                 place_of(a.grad_keys, h * plan.D + k % each),
                 plan.heads * plan.columns,
                 plan.R * plan.D,
                 h,
                 false};
    else if (which < 3)
      of_head = {small.scalars + of_head_scalars +
                     (which == 0   ? of_beta
                      : which == 1 ? of_gate
                                   : of_gamma),
                 place_of(which == 0   ? a.grad_sharpness
                          : which == 1 ? a.grad_gates
                                       : a.grad_sharpening,
                          h),
                 scalars_ld,
                 plan.R,
                 h,
                 true};
    else
      of_head = {small.scalars + of_head_scalars + of_shift + which - 3,
                 place_of(a.grad_shift, h * plan.shifts + which - 3),
                 scalars_ld,
                 plan.R * plan.shifts,
                 h,
                 true};
  }
  __device__ __forceinline__ void* place_of(void* data, int i) const { return const_cast<void*>(number_of(data, a.input, i)); }

  __device__ __forceinline__ void give_sum(const Giving& giving, int64_t row) const {
    const T* from = giving.from + (giving.scalar ? this->scalars_of_all() - small.scalars : 0);
    T sum = 0;
#pragma unroll
    for (int w = 0; w < plan.warps; ++w) sum += from[w * giving.ld];
    store_as(giving.to, a.input, row * giving.width, sum);
  }

  // Adds up what all warps had told before they met.
  __device__ __forceinline__ void give_told() {
    if constexpr (P::fixed) {
      if (written_row >= 0 && of_write.to) give_sum(of_write, written_row);
      if (addressed_row >= 0 && of_head.to && of_head.head >= first_told && of_head.head < last_told)
        give_sum(of_head, addressed_row);
      written_row = addressed_row = -1;
      return;
    }
    const int writes = plan.R - plan.reads, start = rank * gpu::threads() + gpu::thread(),
              stride = plan.cluster * gpu::threads();
    if (written_row >= 0)
      for (int j = start; j < 2 * writes * plan.D; j += stride) {
        const int i = j % (writes * plan.D), at = i / plan.D * plan.columns + i % plan.D;
        if (i == j) store_as(a.grad_erase, a.input, written_row * writes * plan.D + i, this->erase_gradient(at));
        else store_as(a.grad_add, a.input, written_row * writes * plan.D + i, this->add_gradient(at));
      }
    if (addressed_row >= 0) {
      const int each = plan.D + 3 + plan.shifts;
      for (int j = start; j < (last_told - first_told) * each; j += stride) {
        const int h = first_told + j / each, i = j % each;
        const int64_t head = addressed_row * plan.R + h;
        if (i < plan.D) store_as(a.grad_keys, a.input, head * plan.D + i, this->key_gradient(h * plan.columns + i));
        else if (i == plan.D) store_as(a.grad_sharpness, a.input, head, this->total_scalar(h, of_beta));
        else if (i == plan.D + 1) store_as(a.grad_gates, a.input, head, this->total_scalar(h, of_gate));
        else if (i == plan.D + 2) store_as(a.grad_sharpening, a.input, head, this->total_scalar(h, of_gamma));
        else
          store_as(a.grad_shift, a.input, head * plan.shifts + i - plan.D - 3,
                   this->total_scalar(h, of_shift + i - plan.D - 3));
      }
    }
    written_row = addressed_row = -1;
  }

  // What came in beyond a sample's end has no gradient.
  __device__ __forceinline__ void clear_padding(int64_t steps) const {
    const int64_t heads = plan.R, size = heads * plan.D, written = (heads - plan.reads) * plan.D;
    this->clear_steps(a, sample, steps, a.grad_keys, a.input, size);
    for (void* rows : {a.grad_sharpness, a.grad_gates, a.grad_sharpening})
      this->clear_steps(a, sample, steps, rows, a.input, heads);
    this->clear_steps(a, sample, steps, a.grad_shift, a.input, heads * plan.shifts);
    for (void* rows : {a.grad_erase, a.grad_add}) this->clear_steps(a, sample, steps, rows, a.input, written);
  }

  __device__ __forceinline__ void run() {
    const int64_t steps = a.sequences.length(a.T, sample);
    int64_t first = this->replay_before(steps);
    if (steps > 0) stream.ask(first * a.B + sample);
    this->begin();
    small.in.clear();
    gpu::sync();
    if (steps > 0) stream.put(inputs(0));
    if constexpr (P::fixed) {
      this->ask_weights(steps - 1, this->before);
      this->ask_weights(steps - 2, this->next);
    }
    for (int64_t left = steps; left > 0;) {
      const int count = static_cast<int>(left - first);
      const int64_t earlier = this->replay_before(first);
      gpu::sync();  // the inputs of the step before are not needed any more, and those of the first are there
      this->replay_all(stream, first, count);
      for (int step = count - 1; step >= 0; --step) {
        // Going on with the steps before it begins with a replay.
        stream.ask((step > 0 ? first + step - 1 : earlier) * a.B + sample);
        this->back(inputs(visits), first + step, step, [&] { give_told(); }, [&] { stream.put(inputs(visits + 1)); });
        ++visits;
      }
      if (this->begins(first)) this->through_start();
      left = first;
      first = earlier;
    }
    this->sync();
    give_told();
    this->end();
    clear_padding(steps);
    if (plan.cluster > 1) gpu::sync_cluster();  // no block ends while another reads from it
  }
};

template <class T, int C, bool RESIDENT, class P>
__global__ void __launch_bounds__(most_threads, 1)
    ntm_backward_kernel(const __grid_constant__ NtmScanBackward a, const __grid_constant__ Plan plan, int every,
                        unsigned char* scratch) {
  const auto& known = P::of(plan);
  BackwardScan<T, C, RESIDENT, P>(a, known, every, Places(plan, scratch)).run();
}

template <class T>
const char* plan_of(const NtmScanBackward& a, Plan& plan) {
  if (const char* why = ntm_too_large(a)) return why;
  plan = plan_scan<NtmBackwardRoom<T>, T>(ntm_sizes_of(a), a.B, every_of(a), gpu::limits());
  return nullptr;
}

template <class T>
const char* scan_backward(const NtmScanBackward& a, const Queue& queue) {
  Plan plan;
  if (const char* why = plan_of<T>(a, plan)) return why;
  const int64_t blocks = a.B * plan.cluster;
  void* scratch = plan.scratch && blocks ? queue.scratch(queue.owner, plan.scratch * static_cast<size_t>(blocks)) : nullptr;
  return with_ntm_kernel<T>(plan, [&](auto c, auto resident, auto kind) {
    return gpu::launch(ntm_backward_kernel<T, decltype(c)::value, decltype(resident)::value, typename decltype(kind)::Type>,
                       {blocks, 32 * plan.warps, plan.cluster, plan.shared, queue.stream}, a, plan, every_of(a),
                       static_cast<unsigned char*>(scratch));
  });
}

}  // namespace

const char* ntm_scan_backward(const NtmScanBackward& a, const Queue& queue) {
  return a.state == Dtype::float64 ? scan_backward<double>(a, queue) : scan_backward<float>(a, queue);
}
const char* ntm_scan_backward_layout(const NtmScanBackward& a, Layout& layout) {
  Plan plan;
  const char* why = plan_of<float>(a, plan);
  if (!why) layout = layout_of(plan);
  return why;
}

}  // namespace cuda
}  // namespace mann_fast

// lrua_scan backward: one launch for all steps.
//
// Takes at most `anchor_every` steps at a time: replays them from an anchor or where the sample began anew, a memory for each
// kept, one barrier a step; then goes back through them with two. Similarities beyond a bound cost the replay one more.
#include "kernels.h"
#include "lrua_backward.cuh"

namespace mann_fast {
namespace cuda {
namespace {

template <class T, int C, int HEADS, bool RESIDENT, class P>
struct BackwardScan : LruaBackward<T, C, HEADS, RESIDENT, false, P> {
  using Base = LruaBackward<T, C, HEADS, RESIDENT, false, P>;
  using Base::a, Base::every, Base::inputs, Base::plan, Base::rank, Base::sample, Base::small, Base::visits;

  __device__ __forceinline__ BackwardScan(const LruaScanBackward& a, const P& plan, int every, Places places)
      : Base(a, plan, every, places, gpu::block() / plan.cluster, static_cast<int>(gpu::block() % plan.cluster),
             a.grad_reads != nullptr) {
    if constexpr (P::fixed)
      for (int j = 0; j < giving; ++j) givings[j] = giving_of(gpu::thread() + j * 32 * plan.warps);
  }

  // Where the plan is known when compiled: what a thread gives out lies in one place of each warp, and goes to one of each step.
  struct Giving {
    const T* from;
    unsigned char* to;
    int between, step;  // warps; bytes between steps
  };
  static constexpr int giving = 2;
  Giving givings[giving];
  __device__ __forceinline__ Giving giving_of(int j) const {
    const int size = plan.R * plan.D, of_heads = plan.heads * plan.columns, bytes = a.input == Dtype::float32 ? 4 : 2;
    const auto to = [&](const T* from, int between, void* data, int number, int count) {
      return Giving{from, data ? static_cast<unsigned char*>(data) + number * bytes : nullptr, between, count * bytes};
    };
    if (j < size) return to(small.exchange.reads + vector_at(plan, j), of_heads, a.grad_keys, j, size);
    if (j < 2 * size) {
      const int i = j - size;
      return to(small.exchange.of_vectors + vector_at(plan, i), of_heads, a.grad_write_vectors, i, size);
    }
    const int kind = (j - 2 * size) / plan.R, r = (j - 2 * size) % plan.R;
    if (kind > 1) return {nullptr, nullptr, 0, 0};
    return to(this->own_scalars(kind == 0 ? 2 : 0) + r * plan.warps, 1, kind == 0 ? a.grad_gate_logits : a.grad_sharpness, r,
              plan.R);
  }
  __device__ __forceinline__ void give_steady(int64_t t) {
    static_assert(!P::fixed || 2 * P::R * (P::columns + 1) <= giving * 32 * P::warps, "all that a step gives out");
    const int64_t row = t * a.B + sample;
#pragma unroll
    for (int j = 0; j < giving; ++j) {
      const Giving& of = givings[j];
      if (!of.to) continue;
      T sum = 0;
#pragma unroll
      for (int w = 0; w < plan.warps; ++w) sum += of.from[w * of.between];
      store_input(of.to + row * of.step, a.input, 0, sum);
    }
  }

  // Sums over all warps to where they belong; keys for their own squares are added by whoever holds them.
  __device__ __forceinline__ void give_gradients(int64_t t) {
    const int size = plan.R * plan.D, count = 2 * size + 2 * plan.R;
    const int64_t row = t * a.B + sample;
    for (int j = rank * gpu::threads() + gpu::thread(); j < count; j += plan.cluster * gpu::threads()) {
      if (j < size) {
        store_as(a.grad_keys, a.input, row * size + j, this->key_gradient(vector_at(plan, j)));
      } else if (j < 2 * size) {
        store_as(a.grad_write_vectors, a.input, row * size + j - size, this->vector_gradient(vector_at(plan, j - size)));
      } else {
        const int i = j - 2 * size, r = i % plan.R;
        if (i < plan.R) store_as(a.grad_gate_logits, a.input, row * plan.R + r, this->gate_gradient(r));
        else if (a.grad_sharpness) store_as(a.grad_sharpness, a.input, row * plan.R + r, this->sharpness_gradient(r));
      }
    }
  }

  __device__ __forceinline__ void run() {
    if constexpr (P::fixed) {
      SteadyStream<T, LruaScanBackward, P, P::warps> stream(a, plan, gpu::thread());
      run_with(stream, [&] {
        for (int turn = 0; turn < 2; ++turn) stream.fill(inputs(turn), gpu::thread());
      });
    } else {
      Stream<T, LruaScanBackward, P> stream(a, plan);
      run_with(stream, [] {});
    }
  }
  // fill: what no step brings.
  template <class Stream, class Fill>
  __device__ __forceinline__ void run_with(Stream& stream, Fill fill) {
    const int64_t steps = a.sequences.length(a.T, sample);
    int64_t first = this->replay_before(steps);
    if (steps > 0) stream.ask(first * a.B + sample);
    this->begin();
    small.in.clear();
    gpu::sync();
    fill();
    if (steps > 0) stream.put(inputs(0));
    this->sync();
    for (int64_t left = steps; left > 0;) {
      const int count = static_cast<int>(left - first);
      const int64_t earlier = this->replay_before(first);
      this->replay_all(stream, first, count);
      for (int step = count - 1; step >= 0; --step) {
        const Inputs<T> in = inputs(visits);
        const int64_t next = step > 0 ? first + step - 1 : earlier;
        if (first + step > 0) stream.ask(next * a.B + sample);
        this->gather(in, step);
        this->sync();
        this->back(in, step);
        if (first + step > 0) stream.put(inputs(visits + 1));
        this->sync();
        if constexpr (P::fixed) give_steady(first + step);
        else give_gradients(first + step);
        ++visits;
      }
      if (a.sequences.begins(first, a.B, sample)) this->through_start();
      left = first;
      first = earlier;
    }
    this->end();
    const int64_t heads = plan.R, size = heads * plan.D;
    this->clear_steps(a, sample, steps, a.grad_keys, a.input, size);
    this->clear_steps(a, sample, steps, a.grad_write_vectors, a.input, size);
    this->clear_steps(a, sample, steps, a.grad_gate_logits, a.input, heads);
    if (a.grad_sharpness) this->clear_steps(a, sample, steps, a.grad_sharpness, a.input, heads);
    if (plan.cluster > 1) gpu::sync_cluster();  // no block ends while another reads from it
  }
};

template <class T, int C, int HEADS, bool RESIDENT, class P>
__global__ void __launch_bounds__(most_threads, 1)
    backward_kernel(const __grid_constant__ LruaScanBackward a, const __grid_constant__ Plan plan, int every,
                    unsigned char* scratch) {
  const auto& known = P::of(plan);
  BackwardScan<T, C, HEADS, RESIDENT, P>(a, known, every, Places(plan, scratch)).run();
}

template <class T>
const char* plan_of(const LruaScanBackward& a, Plan& plan) {
  if (const char* why = too_large(a.N, a.D, a.R)) return why;
  plan = plan_scan<LruaBackwardRoom<T>, T>(sizes_of(a), a.B, every_of(a), gpu::limits());
  return nullptr;
}

template <class T>
const char* scan_backward(const LruaScanBackward& a, const Queue& queue) {
  Plan plan;
  if (const char* why = plan_of<T>(a, plan)) return why;
  const int64_t blocks = a.B * plan.cluster;
  void* scratch = plan.scratch && blocks ? queue.scratch(queue.owner, plan.scratch * static_cast<size_t>(blocks)) : nullptr;
  return with_kernel<T>(plan, [&](auto c, auto h, auto resident, auto kind) {
    return gpu::launch(
        backward_kernel<T, decltype(c)::value, decltype(h)::value, decltype(resident)::value, typename decltype(kind)::Type>,
        {blocks, 32 * plan.warps, plan.cluster, plan.shared, queue.stream}, a, plan, every_of(a),
        static_cast<unsigned char*>(scratch));
  });
}

}  // namespace

const char* lrua_scan_backward(const LruaScanBackward& a, const Queue& queue) {
  return a.state == Dtype::float64 ? scan_backward<double>(a, queue) : scan_backward<float>(a, queue);
}
const char* lrua_scan_backward_layout(const LruaScanBackward& a, Layout& layout) {
  Plan plan;
  const char* why = plan_of<float>(a, plan);
  if (!why) layout = layout_of(plan);
  return why;
}

}  // namespace cuda
}  // namespace mann_fast

// content_read: similarity, softmax and weighted read in one pass over the memory, and its backward in one more.
//
// A block takes 128 slots of a sample and holds them in registers (a slot wider than 64 numbers: it goes over them twice, the
// second time through the cache). Where a sample has more, the parts of its blocks come together in a second, small kernel. Weights are
// exponentials relative to the maximum similarity of all, so that equal slots have equal bits whichever block took them.
#include "kernels.h"
#include "parts.cuh"
#include "scan.cuh"

namespace mann_fast {
namespace cuda {
namespace {

template <class T>
struct Shared {
  T *keys, *grads, *beta, *mean;  // [heads, columns] twice, [heads] twice; grads and mean in backward
  T *weights, *of_squares;        // [heads, span]: scores and weights, or gradients
  T *most, *sums, *read;          // of warps: [heads] twice, [heads, columns]
  __device__ __host__ Shared(Carver& carver, const Plan& plan, bool backward)
      : keys(carver.take<T>(plan.heads * plan.columns)), grads(carver.take<T>(backward ? plan.heads * plan.columns : 0)),
        beta(carver.take<T>(plan.heads)), mean(carver.take<T>(plan.heads)), weights(carver.take<T>(plan.heads * plan.span)),
        of_squares(carver.take<T>(backward ? plan.heads * plan.span : 0)), most(carver.take<T>(plan.warps * plan.heads)),
        sums(carver.take<T>(plan.warps * plan.heads)), read(carver.take<T>(plan.warps * plan.heads * plan.columns)) {}
};

template <class T>
__device__ void load_keys(const void* data, Dtype dtype, int64_t sample, const Plan& plan, T* rows) {
  for (int i = gpu::thread(); i < plan.heads * plan.columns; i += gpu::threads()) {
    const int r = i / plan.columns, d = i % plan.columns;
    rows[i] = data && r < plan.R && d < plan.D ? load_as<T>(data, dtype, (sample * plan.R + r) * plan.D + d) : T(0);
  }
}
template <class T>
__device__ void load_sharpness(const void* data, Dtype dtype, int64_t sample, const Plan& plan, T* beta) {
  for (int r = gpu::thread(); r < plan.heads; r += gpu::threads())
    beta[r] = r >= plan.R ? T(0) : data ? load_as<T>(data, dtype, sample * plan.R + r) : T(1);
}

// What a block leaves for the second kernel: [B, parts, R] twice and [B, parts, R, D].
template <class T>
struct Parts {
  T *most, *sums, *reads;
};

// The memory's pieces: held in registers, or fetched again each time.
template <class T, int C, int HEADS, bool RESIDENT>
struct Slots : Thread<T, C, HEADS, RESIDENT> {
  const T* memory;
  Tile<T, C> held;
  __device__ __forceinline__ Slots(const Plan& plan, int part, double eps, const T* memory)
      : Thread<T, C, HEADS, RESIDENT>(plan, part, eps), memory(memory) {
    if (RESIDENT) this->take(memory, this->plan.D, 1, 0, 0, held);
  }
  template <class F>
  __device__ __forceinline__ void with_piece(int k, F f) {
    if constexpr (RESIDENT) {
      f(held);
    } else {
      Tile<T, C> m;
      this->take(memory, this->plan.D, 1, 0, k, m);
      f(m);
    }
  }
};

template <class T, int C, int HEADS, bool RESIDENT>
__global__ void __launch_bounds__(most_threads, 1)
    read_kernel(const __grid_constant__ ContentRead a, const __grid_constant__ Plan plan, int64_t parts, Parts<T> out) {
  const int64_t sample = gpu::block() / parts;
  const int part = static_cast<int>(gpu::block() % parts);
  Carver carver(gpu::shared_memory());
  const Shared<T> shared(carver, plan, false);
  load_keys(a.key, a.input, sample, plan, shared.keys);
  load_sharpness(a.sharpness, a.input, sample, plan, shared.beta);
  Slots<T, C, HEADS, RESIDENT> slots(plan, part, a.eps, static_cast<const T*>(a.memory) + sample * a.N * a.D);
  const auto& place = slots.place;
  T* most = shared.most + place.warp * plan.heads;
  T* sums = shared.sums + place.warp * plan.heads;
  T* weights = static_cast<T*>(a.weights) + sample * a.R * a.N;
  gpu::sync();
  slots.compare(
      shared, 0, plan.heads, 0, false, [&](int k, auto f) { slots.with_piece(k, f); }, shared.weights, sums, most,
      static_cast<T*>(nullptr), static_cast<T*>(nullptr));
  gpu::sync_warp();
  if (parts > 1) slots.give_rows(shared.weights, a.N, weights);
  slots.soften(0, plan.heads, shared.most, shared.weights, sums);
  gpu::sync_warp();
  for (int k = 0; k < slots.pieces(); ++k)
    for (int first = 0; first < plan.heads; first += HEADS) {
      T sum[HEADS * C] = {};
      Four<T> own[HEADS];
      slots.load_weights(shared.weights, first, slots.slots(0), own);
      slots.with_piece(k, [&](const Tile<T, C>& m) { add_weighted<HEADS, C>(m, own, sum); });
      store_warp_sums<HEADS, C>(sum, place.lane,
                                shared.read + (place.warp * plan.heads + first) * plan.columns + slots.first_column(k),
                                plan.columns);
    }
  gpu::sync();
  for (int i = gpu::thread(); i < plan.R * plan.D; i += gpu::threads()) {
    const int r = i / plan.D;
    const T read = slots.total(shared.read, r * plan.columns + i % plan.D, plan.heads * plan.columns);
    if (parts > 1) out.reads[gpu::block() * a.R * a.D + i] = read;
    else store_as(a.read, a.input, sample * a.R * a.D + i, read / slots.total(shared.sums, r, plan.heads));
  }
  if (parts > 1) {
    for (int r = gpu::thread(); r < plan.R; r += gpu::threads()) {
      out.most[gpu::block() * a.R + r] = slots.maximum(shared.most, r);
      out.sums[gpu::block() * a.R + r] = slots.total(shared.sums, r, plan.heads);
    }
  } else {
    slots.normalise(shared.sums, shared.weights);
    gpu::sync_warp();
    slots.give_rows(shared.weights, a.N, weights);
  }
}

// A block for each part again: turns its scores into weights, and takes its share of the reads.
template <class T>
__global__ void __launch_bounds__(most_threads, 1) combine_kernel(ContentRead a, int64_t span, int64_t parts, Parts<T> in) {
  const int64_t sample = gpu::block() / parts, part = gpu::block() % parts, first = part * span;
  const int64_t count = a.N - first < span ? a.N - first : span;
  const T* most = in.most + sample * parts * a.R;
  const auto maximum = [&](int64_t r) {
    T all = -INFINITY;
    for (int64_t p = 0; p < parts; ++p) {
      const T value = most[p * a.R + r];
      all = value > all || value != value ? value : all;
    }
    return all;
  };
  const auto total = [&](int64_t r, T all) {
    T sum = 0;
    for (int64_t p = 0; p < parts; ++p) sum += in.sums[(sample * parts + p) * a.R + r] * exp(most[p * a.R + r] - all);
    return sum;
  };
  T* weights = static_cast<T*>(a.weights) + sample * a.R * a.N + first;
  for (int64_t r = 0; r < a.R; ++r) {
    const T all = maximum(r), scale = T(1) / total(r, all);
    for (int64_t n = gpu::thread(); n < count; n += gpu::threads())
      weights[r * a.N + n] = exp(weights[r * a.N + n] - all) * scale;
  }
  for (int64_t i = part * gpu::threads() + gpu::thread(); i < a.R * a.D; i += parts * gpu::threads()) {
    const int64_t r = i / a.D;
    const T all = maximum(r);
    T read = 0;
    for (int64_t p = 0; p < parts; ++p) read += in.reads[(sample * parts + p) * a.R * a.D + i] * exp(most[p * a.R + r] - all);
    store_as(a.read, a.input, sample * a.R * a.D + i, read / total(r, all));
  }
}

// Launched twice. First with `finds_means`, the block's share of the mean, under the weights, of the gradient that reaches them:
// means [parts, B, R]. Then for the gradients, which need the mean of all parts, from the very same bits: a product of the
// read's gradient and the read would do but for its rounding, which a great sharpness would magnify. Gradients of keys and
// sharpness are this block's part, [parts, B, R, D] and [parts, B, R].
template <class T, int C, int HEADS, bool RESIDENT>
__global__ void __launch_bounds__(most_threads, 1)
    read_backward_kernel(const __grid_constant__ ContentReadBackward a, const __grid_constant__ Plan plan, int64_t parts,
                         bool finds_means, T* means, T* of_keys, T* of_sharpness) {
  constexpr int OWN = Place<HEADS>::OWN;
  const int64_t sample = gpu::block() / parts, part = gpu::block() % parts;
  Carver carver(gpu::shared_memory());
  const Shared<T> shared(carver, plan, true);
  load_keys(a.key, a.input, sample, plan, shared.keys);
  load_keys(a.grad_read, a.input, sample, plan, shared.grads);
  load_sharpness(a.sharpness, a.input, sample, plan, shared.beta);
  Slots<T, C, HEADS, RESIDENT> slots(plan, static_cast<int>(part), a.eps, static_cast<const T*>(a.memory) + sample * a.N * a.D);
  const auto& place = slots.place;
  const T* weights = static_cast<const T*>(a.weights) + sample * a.R * a.N;
  const T* grad_weights = a.grad_weights ? static_cast<const T*>(a.grad_weights) + sample * a.R * a.N : nullptr;
  for (int r = gpu::thread(); !finds_means && r < plan.R; r += gpu::threads()) {
    T mean = 0;
    for (int64_t p = 0; p < parts; ++p) mean += means[(p * a.B + sample) * a.R + r];
    shared.mean[r] = mean;
  }
  gpu::sync();

  const int own_slot = slots.own(0), slot = slots.first_slot + own_slot;
  // Of a number of heads from `first` on: products of the slots and the rows, of which this thread's are the first ones.
  const auto dots_of = [&](const T* vectors, int first, T(&sums)[lane_slots* HEADS], auto also) {
    for (int k = 0; k < slots.pieces(); ++k) {
      T rows[HEADS][C];
      load_rows<HEADS, C>(vectors + first * plan.columns + slots.first_column(k), plan.columns, rows);
      also(rows);
      slots.with_piece(k, [&](const Tile<T, C>& m) { add_dots<HEADS, C>(m, rows, sums); });
    }
    add_lanes<4, 1, lane_slots * HEADS>(sums, place.lane);
  };
  const auto gradient_of_weight = [&](T by_read, int r, bool valid) {
    return by_read + (valid && grad_weights ? grad_weights[r * a.N + slot] : T(0));
  };
  if (finds_means) {
    for (int first = 0; first < plan.heads; first += HEADS) {
      T grads[lane_slots * HEADS] = {}, of_mean[OWN];
      dots_of(shared.grads, first, grads, [](const auto&) {});
#pragma unroll
      for (int j = 0; j < OWN; ++j) {
        const int r = first + place.own_head + j;
        const bool valid = r < a.R && slot < a.N;
        of_mean[j] = valid ? weights[r * a.N + slot] * gradient_of_weight(grads[j], r, valid) : T(0);
      }
      slots.tell_sums(of_mean, first, false, shared.sums + place.warp * plan.heads);
    }
    gpu::sync();
    for (int r = gpu::thread(); r < plan.R; r += gpu::threads())
      means[(part * a.B + sample) * a.R + r] = slots.total(shared.sums, r, plan.heads);
    return;
  }
  T* of_squares_of_keys = shared.most + place.warp * plan.heads;
  T squares[lane_slots] = {};
  for (int k = 0; k < slots.pieces(); ++k) slots.with_piece(k, [&](const Tile<T, C>& m) { add_squares<C>(m, squares); });
  add_lanes<4, 1, lane_slots>(squares, place.lane);
  for (int first = 0; first < plan.heads; first += HEADS) {
    T dots[lane_slots * HEADS] = {}, grads[lane_slots * HEADS] = {}, key_squares[HEADS] = {}, own_key[OWN];
    dots_of(shared.keys, first, dots, [&](const T(&rows)[HEADS][C]) { add_row_squares<HEADS, C>(rows, key_squares); });
    dots_of(shared.grads, first, grads, [](const auto&) {});
    own_key_squares<HEADS>(place, key_squares, own_key);
    T of_beta[OWN], of_key[OWN];
#pragma unroll
    for (int j = 0; j < OWN; ++j) {
      const int r = first + place.own_head + j, at = r * plan.span + own_slot;
      const bool valid = r < a.R && slot < a.N;
      const T grad = gradient_of_weight(grads[j], r, valid);
      const T of_score = valid ? weights[r * a.N + slot] * (grad - shared.mean[r]) : T(0);
      const ScoreGradient<T> of = score_gradient(of_score, dots[j], shared.beta[r], own_key[j], squares[0], slots.eps);
      of_beta[j] = of.beta;
      of_key[j] = of.key_square;
      if (place.owner) {
        shared.weights[at] = of.dot;
        shared.of_squares[at] = of.slot_square;
      }
    }
    slots.tell_sums(of_beta, first, false, shared.sums + place.warp * plan.heads);
    slots.tell_sums(of_key, first, false, of_squares_of_keys);
  }
  gpu::sync_warp();

  T* grad_memory = static_cast<T*>(a.grad_memory) + sample * a.N * a.D;
  for (int k = 0; k < slots.pieces(); ++k) {
    Tile<T, C> grad = {};
    for (int first = 0; first < plan.heads; first += HEADS) {
      const int corner = first * plan.columns + slots.first_column(k);
      Four<T> own[HEADS];
      T rows[HEADS][C], sum[HEADS * C] = {};
#pragma unroll
      for (int h = 0; h < HEADS; ++h)
#pragma unroll
        for (int s = 0; s < lane_slots; ++s) {
          const int n = slots.first_slot + slots.slots(0) + s;
          own[h].at[s] = a.grad_read && first + h < a.R && n < a.N ? weights[(first + h) * a.N + n] : T(0);
        }
      load_rows<HEADS, C>(shared.grads + corner, plan.columns, rows);
      add_products<HEADS, C>(own, rows, grad);
      slots.load_weights(shared.weights, first, slots.slots(0), own);
      load_rows<HEADS, C>(shared.keys + corner, plan.columns, rows);
      add_products<HEADS, C>(own, rows, grad);
      slots.with_piece(k, [&](const Tile<T, C>& m) {
        add_weighted<HEADS, C>(m, own, sum);
        slots.load_weights(shared.of_squares, first, slots.slots(0), own);
        add_by_norm<HEADS, C>(m, own, grad);
      });
      store_warp_sums<HEADS, C>(sum, place.lane, shared.read + place.warp * plan.heads * plan.columns + corner, plan.columns);
    }
    slots.give(grad, a.N, a.D, 1, 0, k, grad_memory);
  }
  gpu::sync();
  for (int i = gpu::thread(); i < plan.R * plan.D; i += gpu::threads()) {
    const int r = i / plan.D, at = r * plan.columns + i % plan.D;
    const T of_key =
        slots.total(shared.read, at, plan.heads * plan.columns) + 2 * slots.total(shared.most, r, plan.heads) * shared.keys[at];
    of_keys[(part * a.B + sample) * a.R * a.D + i] = of_key;
  }
  for (int r = gpu::thread(); a.grad_sharpness && r < plan.R; r += gpu::threads())
    of_sharpness[(part * a.B + sample) * a.R + r] = slots.total(shared.sums, r, plan.heads);
}

// ---- which kernel -----------------------------------------------------------------------------------------------------

template <class T>
Plan plan_read(int64_t N, int64_t D, int64_t R, bool backward) {
  Plan plan{};
  plan.N = static_cast<int>(N), plan.D = static_cast<int>(D), plan.R = static_cast<int>(R);
  plan.heads_at_once = R == 1 ? 1 : 4;
  plan.heads = (plan.R + plan.heads_at_once - 1) / plan.heads_at_once * plan.heads_at_once;
  const int lane_columns = (plan.D + column_lanes - 1) / column_lanes;
  plan.resident = sizeof(T) == 4 && lane_columns <= 8;
  plan.piece_columns = sizeof(T) == 8 ? 4 : lane_columns <= 5 ? 5 : 8;
  plan.warps = (plan.N < most_threads / 32 * warp_slots ? (plan.N + warp_slots - 1) / warp_slots : most_threads / 32);
  plan.cluster = plan.groups = 1;
  plan.pieces = (lane_columns + plan.piece_columns - 1) / plan.piece_columns;
  plan.columns = plan.pieces * plan.piece_columns * column_lanes;
  for (;; plan.warps = (plan.warps + 1) / 2) {  // many wide keys leave room for fewer warps
    plan.span = plan.warps * warp_slots;
    Carver carver(nullptr);
    Shared<T>(carver, plan, backward);
    plan.shared = carver.used;
    if (plan.shared <= gpu::limits().shared || plan.warps == 1) return plan;
  }
}

template <class T, class F>
const char* with_kernel(const Plan& plan, F f) {
  if (plan.shared > gpu::limits().shared) return "the keys of one step do not fit into a block's shared memory";
  const auto with_heads = [&](auto c, auto resident) {
    if (plan.heads_at_once == 1) return f(c, std::integral_constant<int, 1>(), resident);
    return f(c, std::integral_constant<int, 4>(), resident);
  };
  if constexpr (sizeof(T) == 8) {
    return with_heads(std::integral_constant<int, 4>(), std::false_type());
  } else {
    if (!plan.resident) return with_heads(std::integral_constant<int, 8>(), std::false_type());
    if (plan.piece_columns == 5) return with_heads(std::integral_constant<int, 5>(), std::true_type());
    return with_heads(std::integral_constant<int, 8>(), std::true_type());
  }
}

template <class T>
const char* read(const ContentRead& a, const Queue& queue) {
  const Plan plan = plan_read<T>(a.N, a.D, a.R, false);
  const int64_t parts = (a.N + plan.span - 1) / plan.span, rows = a.B * parts * a.R;
  Parts<T> between{};
  if (parts > 1) {
    between.most = static_cast<T*>(queue.scratch(queue.owner, rows * (a.D + 2) * sizeof(T)));
    between.sums = between.most + rows;
    between.reads = between.sums + rows;
  }
  const char* why = with_kernel<T>(plan, [&](auto c, auto h, auto resident) {
    return gpu::launch(read_kernel<T, decltype(c)::value, decltype(h)::value, decltype(resident)::value>,
                       {a.B * parts, 32 * plan.warps, 1, plan.shared, queue.stream}, a, plan, parts, between);
  });
  if (why || parts == 1) return why;
  return gpu::launch(combine_kernel<T>, {a.B * parts, most_threads / 2, 1, 0, queue.stream}, a, plan.span, parts, between);
}

template <class T>
const char* read_backward(const ContentReadBackward& a, const Queue& queue) {
  const Plan plan = plan_read<T>(a.N, a.D, a.R, true);
  const int64_t parts = (a.N + plan.span - 1) / plan.span, rows = a.B * a.R;
  T* of_keys = static_cast<T*>(queue.scratch(queue.owner, parts * rows * (a.D + 2) * sizeof(T)));
  T *of_sharpness = of_keys + parts * rows * a.D, *means = of_sharpness + parts * rows;
  const char* why = with_kernel<T>(plan, [&](auto c, auto h, auto resident) {
    const auto kernel = read_backward_kernel<T, decltype(c)::value, decltype(h)::value, decltype(resident)::value>;
    const char* why = nullptr;
    for (const bool finds_means : {true, false})
      if (why == nullptr)
        why = gpu::launch(kernel, {a.B * parts, 32 * plan.warps, 1, plan.shared, queue.stream}, a, plan, parts, finds_means,
                          means, of_keys, of_sharpness);
    return why;
  });
  if (why) return why;
  if ((why = add_parts(of_keys, parts, rows * a.D, a.grad_key, a.input, queue.stream))) return why;
  return a.grad_sharpness ? add_parts(of_sharpness, parts, rows, a.grad_sharpness, a.input, queue.stream) : nullptr;
}

}  // namespace

const char* content_read(const ContentRead& a, const Queue& queue) {
  return a.state == Dtype::float64 ? read<double>(a, queue) : read<float>(a, queue);
}
const char* content_read_backward(const ContentReadBackward& a, const Queue& queue) {
  return a.state == Dtype::float64 ? read_backward<double>(a, queue) : read_backward<float>(a, queue);
}

}  // namespace cuda
}  // namespace mann_fast

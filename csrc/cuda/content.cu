// content_read: similarity, softmax and weighted read in one pass over the memory. Its backward takes one more where a block has
// all slots of a sample, else two.
//
// A block takes 128 slots of a sample at a time and holds them in registers (a slot wider than 64 numbers: it goes over them twice,
// the second time through the cache). Where a sample has more, it is shared out among no more blocks than run at once, so that what
// has to be added up over them in the end does not grow with the sample, and a warp goes through its slots without waiting for
// another. Weights are exponentials relative to the maximum similarity of all, so that equal slots have equal bits whichever block
// took them.
#include "kernels.h"
#include "scan.cuh"

namespace mann_fast {
namespace cuda {
namespace {

template <class T>
struct Shared {
  T *keys, *grads, *beta, *mean;    // [heads, columns] twice, [heads] twice; grads and mean in backward
  T *weights, *of_squares, *given;  // [heads, span]: scores and weights, or gradients; in backward the weights are given
  T *most, *sums, *read, *known;    // of warps: [heads] twice, [heads, columns], [heads] in forward
  __device__ __host__ Shared(Carver& carver, const Plan& plan, bool backward)
      : keys(carver.take<T>(plan.heads * plan.columns)), grads(carver.take<T>(backward ? plan.heads * plan.columns : 0)),
        beta(carver.take<T>(plan.heads)), mean(carver.take<T>(backward ? plan.heads : 0)),
        weights(carver.take<T>(plan.heads * plan.span)), of_squares(carver.take<T>(backward ? plan.heads * plan.span : 0)),
        given(carver.take<T>(backward ? plan.heads * plan.span : 0)), most(carver.take<T>(plan.warps * plan.heads)),
        sums(carver.take<T>(plan.warps * plan.heads)), read(carver.take<T>(plan.warps * plan.heads * plan.columns)),
        known(carver.take<T>(backward ? 0 : plan.warps * plan.heads)) {}
};

// Blocks that shall have room on a multiprocessor at once, so that one loads while another computes: as many as spill nothing
// at the paper's size. For older machines the compiler needs a few registers more.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool older = true;
#else
constexpr bool older = false;
#endif
template <class T, int C, int HEADS, bool RESIDENT>
constexpr int read_blocks = sizeof(T) == 8                               ? 1
                            : RESIDENT && C == 5 && HEADS == 4 && !older ? 3
                                                                         : 2;
template <class T, int C, int HEADS, bool RESIDENT>
constexpr int backward_blocks = sizeof(T) == 8 || older ? 1 : 2;

// How a sample is shared out: among `parts` blocks, of which each takes the plan's slots so many times. Alone, a block has all
// slots at once.
struct Share {
  int parts, turns;
  bool alone;
  bool wide;  // four columns beside each other can be loaded by one instruction
};

// What the blocks of a sample leave for the second kernel: [B, R, parts] twice and [B, parts, R, D].
template <class T>
struct Parts {
  T *most, *sums, *reads;
};

// The slots of a turn: held in registers, or fetched again each time. Where that can be done, a lane has four columns beside each
// other, eight lanes 32; in shared memory, a lane's columns are eight apart all the same, and `place_of` tells where a column went.
template <class T, int C, int HEADS, bool RESIDENT>
struct Slots : Thread<T, C, HEADS, RESIDENT> {
  static constexpr int wide_columns = C / 4 * 4;
  const T* memory;
  bool wide;
  Tile<T, C> held;

  __device__ __forceinline__ Slots(const Plan& plan, const Share& share, int part, double eps, const T* memory)
      : Thread<T, C, HEADS, RESIDENT>(plan, 0, eps), memory(memory), wide(share.wide) {
    go_to(part * share.turns);
  }
  __device__ __forceinline__ void go_to(int turn) {
    this->first_slot = turn * this->plan.span;
    if (RESIDENT) fetch(0, held);
  }
  // Whether the warp has a slot in such a turn.
  __device__ __forceinline__ bool any(int turn) const { return turn * this->plan.span + this->group(0) < this->plan.N; }

  __device__ __forceinline__ int place_of(int d) const {
    const int in_piece = d % (C * column_lanes);
    if (!wide || in_piece >= wide_columns * column_lanes) return d;
    return d - in_piece % 32 + in_piece % 4 * column_lanes + in_piece % 32 / 4;
  }

  // Calls f(s, c, column) for all four columns from the lane's cth on, then g for each of the rest.
  template <class F, class G>
  __device__ __forceinline__ void each(int k, F f, G g) const {
#pragma unroll
    for (int s = 0; s < lane_slots; ++s) {
#pragma unroll
      for (int c = 0; c < wide_columns; c += 4) f(s, c, k * C * column_lanes + c * column_lanes + 4 * this->place.column);
#pragma unroll
      for (int c = wide_columns; c < C; ++c) g(s, c, this->first_column(k) + c * column_lanes);
    }
  }
  __device__ __forceinline__ void fetch(int k, Tile<T, C>& m) const {
    const int D = this->plan.D, first = this->first_slot + this->slots(0);
    if (!wide) return this->take(memory, 0, k, m);
    const T* from = memory + static_cast<int64_t>(first) * D;
    each(
        k,
        [&](int s, int c, int column) {
          const Four<T> four = first + s < this->plan.N && column < D ? load_four(from + s * D + column) : Four<T>{};
#pragma unroll
          for (int i = 0; i < 4; ++i) m.at[s][c + i] = four.at[i];
        },
        [&](int s, int c, int column) { m.at[s][c] = first + s < this->plan.N && column < D ? from[s * D + column] : T(0); });
  }
  // So many columns of the lane, from its cth on.
  template <int COUNT>
  __device__ __forceinline__ void give_back(const Tile<T, COUNT>& m, int k, int c, T* to) const {
    const int D = this->plan.D, first = this->first_slot + this->slots(0);
    to += static_cast<int64_t>(first) * D;
#pragma unroll
    for (int s = 0; s < lane_slots; ++s) {
      if (COUNT == 4 && wide) {
        const int column = (k * C + c) * column_lanes + 4 * this->place.column;
        Four<T> four;
#pragma unroll
        for (int i = 0; i < 4; ++i) four.at[i] = m.at[s][i % COUNT];
        if (first + s < this->plan.N && column < D) *reinterpret_cast<Four<T>*>(to + s * D + column) = four;
      } else {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
          const int column = this->first_column(k) + (c + i) * column_lanes;
          if (first + s < this->plan.N && column < D) to[s * D + column] = m.at[s][i];
        }
      }
    }
  }
  // Calls f(from, count) for at most four of the lane's columns at a time, both known when compiled: so fewer sums need registers
  // at once.
  template <int FROM = 0, class F>
  __device__ __forceinline__ void by_four(F f) const {
    if constexpr (FROM < C) {
      f(std::integral_constant<int, FROM>(), std::integral_constant<int, (C - FROM < 4 ? C - FROM : 4)>());
      by_four<FROM + 4>(f);
    }
  }
  template <class F>
  __device__ __forceinline__ void with_piece(int k, F f) {
    if constexpr (RESIDENT) {
      f(held);
    } else {
      Tile<T, C> m;
      fetch(k, m);
      f(m);
    }
  }

  // Keys, in backward gradients of reads, and sharpness, each requested before any is waited for.
  template <bool BACKWARD>
  __device__ __forceinline__ void load_inputs(const void* key, const void* grad, const void* sharpness, Dtype dtype,
                                              int64_t sample, const Shared<T>& shared) const {
    const Plan& plan = this->plan;
    const auto beta_of = [&](int r) {
      return r >= plan.R ? T(0) : sharpness ? load_as<T>(sharpness, dtype, sample * plan.R + r) : T(1);
    };
    const T beta = beta_of(gpu::thread());
    for (int i = gpu::thread(); i < plan.heads * plan.columns; i += gpu::threads()) {
      const int r = i / plan.columns, d = i % plan.columns, at = r * plan.columns + place_of(d);
      const bool there = r < plan.R && d < plan.D;
      const int64_t from = (sample * plan.R + r) * plan.D + d;
      const T of_key = there ? load_as<T>(key, dtype, from) : T(0);
      const T of_grad = BACKWARD && there && grad ? load_as<T>(grad, dtype, from) : T(0);
      shared.keys[at] = of_key;
      if (BACKWARD) shared.grads[at] = of_grad;
    }
    if (gpu::thread() < plan.heads) shared.beta[gpu::thread()] = beta;
    for (int r = gpu::thread() + gpu::threads(); r < plan.heads; r += gpu::threads()) shared.beta[r] = beta_of(r);
  }

  // Weights of the warp's slots and of HEADS heads, [R, N] in `rows`, on their way to [heads, span].
  static constexpr int lane_weights = (HEADS * warp_slots + 31) / 32;
  struct Weights {
    T at[lane_weights];
  };
  __device__ __forceinline__ Weights request(const T* rows, int first) const {
    Weights weights;
#pragma unroll
    for (int i = 0; i < lane_weights; ++i) {
      const int j = i * 32 + this->place.lane, r = first + j / warp_slots;
      const int slot = this->first_slot + this->group(0) + j % warp_slots;
      const bool there = j < HEADS * warp_slots && r < this->plan.R && slot < this->plan.N;
      weights.at[i] = there ? rows[static_cast<int64_t>(r) * this->plan.N + slot] : T(0);
    }
    return weights;
  }
  __device__ __forceinline__ void keep(const Weights& weights, int first, T* to) const {
#pragma unroll
    for (int i = 0; i < lane_weights; ++i) {
      const int j = i * 32 + this->place.lane;
      if (j < HEADS * warp_slots)
        to[(first + j / warp_slots) * this->plan.span + this->group(0) + j % warp_slots] = weights.at[i];
    }
  }

  // Adds weighted sums over the slots of the warp, from what its lanes have, to `factor` (or null: one) times those of the turns
  // before, if any.
  template <int COUNT>
  __device__ __forceinline__ void add_sums(T* sums, int first, int column, bool add, const T* factor, T* of_warp) const {
    add_lanes<16, 8, HEADS * COUNT>(sums, this->place.lane);
    if (!has_sums<16, 8, HEADS * COUNT>(this->place.lane)) return;
    const int from = first_sum<16, 8, HEADS * COUNT>(this->place.lane);
#pragma unroll
    for (int i = 0; i < sums_kept<16, 8, HEADS * COUNT>(); ++i) {
      const int r = first + (from + i) / COUNT;
      T& sum = of_warp[r * this->plan.columns + column + (from + i) % COUNT * column_lanes];
      sum = add ? sum * (factor ? factor[r] : T(1)) + sums[i] : sums[i];
    }
  }
};

// So many columns of a tile.
template <int FROM, int COUNT, int C, class T>
__device__ __forceinline__ Tile<T, COUNT> columns_of(const Tile<T, C>& m) {
  Tile<T, COUNT> part;
#pragma unroll
  for (int s = 0; s < lane_slots; ++s)
#pragma unroll
    for (int c = 0; c < COUNT; ++c) part.at[s][c] = m.at[s][FROM + c];
  return part;
}

// The greater; NaN if one is.
template <class T>
__device__ __forceinline__ T greater(T x, T y) {
  return x > y || x != x ? x : y;
}
// By how much the exponentials of numbers change that were relative to one maximum, and shall be to a greater one. Where all
// were -inf, and relative to 0, they are 0.
template <class T>
__device__ __forceinline__ T rescale(T from, T to) {
  return from == -INFINITY ? T(0) : exp(from - to);
}

template <class T, int C, int HEADS, bool RESIDENT>
__global__ void __launch_bounds__(most_threads, read_blocks<T, C, HEADS, RESIDENT>)
    read_kernel(const __grid_constant__ ContentRead a, const __grid_constant__ Plan plan, const __grid_constant__ Share share,
                Parts<T> out) {
  const int block = static_cast<int>(gpu::block()), part = block % share.parts;
  const int sample = block / share.parts;
  Carver carver(gpu::shared_memory());
  const Shared<T> shared(carver, plan, false);
  Slots<T, C, HEADS, RESIDENT> slots(plan, share, part, a.eps, static_cast<const T*>(a.memory) + int64_t(sample) * a.N * a.D);
  slots.template load_inputs<false>(a.key, nullptr, a.sharpness, a.input, sample, shared);
  const auto& place = slots.place;
  T* most = shared.most + place.warp * plan.heads;
  T* sums = shared.sums + place.warp * plan.heads;
  T* known = shared.known + place.warp * plan.heads;
  T* of_warp = shared.read + place.warp * plan.heads * plan.columns;
  const auto weights = [&] { return static_cast<T*>(a.weights) + int64_t(sample) * a.R * a.N; };
  const int own_slot = slots.own(0), first_turn = part * share.turns;
  for (int r = place.lane; r < plan.heads; r += 32) known[r] = -INFINITY, sums[r] = 0;
  if (!slots.any(first_turn)) {
#pragma unroll 1
    for (int i = place.lane; i < plan.heads * plan.columns; i += 32) of_warp[i] = 0;
  }
  gpu::sync();

  for (int turn = 0; turn < share.turns; ++turn) {
    if (!share.alone && !slots.any(first_turn + turn)) break;
    if (turn > 0) slots.go_to(first_turn + turn);
    slots.compare(
        shared, 0, plan.heads, 0, false, [&](int k, auto f) { slots.with_piece(k, f); }, shared.weights, most, most,
        static_cast<T*>(nullptr), static_cast<T*>(nullptr));  // its sums mean nothing yet: the maximum takes their place
    // Exponentials are relative to the maximum of the block, if it has all slots, else of what the warp has seen: where that
    // changes, `most` becomes the factor by which they do.
    if (share.alone) {
      gpu::sync();
      for (int r = place.lane; r < plan.heads; r += 32) known[r] = slots.maximum(shared.most, r);
    } else {
      gpu::sync_warp();
#pragma unroll 1
      for (int r = place.lane; r < plan.heads; r += 32) {
        const T before = known[r], now = greater(before, most[r]);
        known[r] = now;
        most[r] = rescale(before, now);
        sums[r] *= most[r];
      }
      slots.give_rows(shared.weights, a.N, weights());
    }
    gpu::sync_warp();
    const bool there = slots.first_slot + own_slot < plan.N;
    for (int first = 0; first < plan.heads; first += HEADS) {
      T result[Place<HEADS>::OWN];
#pragma unroll
      for (int j = 0; j < Place<HEADS>::OWN; ++j) {
        const int r = first + place.own_head + j;
        const T relative_to = known[r] == -INFINITY ? T(0) : known[r];
        result[j] = there && r < plan.R ? exp(shared.weights[r * plan.span + own_slot] - relative_to) : T(0);
      }
      if (HEADS == 1) gpu::sync_warp();  // two lanes read what one of them writes
#pragma unroll
      for (int j = 0; j < Place<HEADS>::OWN; ++j)
        if (place.owner) shared.weights[(first + place.own_head + j) * plan.span + own_slot] = result[j];
      slots.tell_sums(result, first, true, sums);
    }
    gpu::sync_warp();
    for (int k = 0; k < slots.pieces(); ++k)
      for (int first = 0; first < plan.heads; first += HEADS) {
        Four<T> own[HEADS];
        slots.load_weights(shared.weights, first, slots.slots(0), own);
        slots.by_four([&](auto from, auto count) {
          constexpr int FROM = decltype(from)::value, COUNT = decltype(count)::value;
          T sum[HEADS * COUNT] = {};
          slots.with_piece(k, [&](const Tile<T, C>& m) { add_weighted<HEADS, COUNT>(columns_of<FROM, COUNT>(m), own, sum); });
          slots.template add_sums<COUNT>(sum, first, slots.first_column(k) + FROM * column_lanes, turn > 0, most, of_warp);
        });
      }
    gpu::sync_warp();
  }

  if (!share.alone) {  // of every warp's sums, how much they are relative to the block's maximum
    gpu::sync();
    for (int r = place.lane; r < plan.heads; r += 32) {
      most[r] = rescale(known[r], slots.maximum(shared.known, r));
      sums[r] *= most[r];
    }
  }
  gpu::sync();
  for (int i = gpu::thread(); i < plan.R * plan.D; i += gpu::threads()) {
    const int r = i / plan.D, at = r * plan.columns + slots.place_of(i % plan.D);
    T read = 0;
    for (int w = 0; w < plan.warps; ++w)
      read += shared.read[w * plan.heads * plan.columns + at] * (share.alone ? T(1) : shared.most[w * plan.heads + r]);
    if (share.alone) store_as(a.read, a.input, int64_t(sample) * a.R * a.D + i, read / slots.total(shared.sums, r, plan.heads));
    else out.reads[gpu::block() * a.R * a.D + i] = read;
  }
  if (share.alone) {
    slots.normalise(shared.sums, shared.weights);
    gpu::sync_warp();
    slots.give_rows(shared.weights, a.N, weights());
  } else {
    for (int r = gpu::thread(); r < plan.R; r += gpu::threads()) {
      out.most[(int64_t(sample) * a.R + r) * share.parts + part] = slots.maximum(shared.known, r);
      out.sums[(int64_t(sample) * a.R + r) * share.parts + part] = slots.total(shared.sums, r, plan.heads);
    }
  }
}

// Of `parts` rows of numbers the sums of 32 columns, a lane's own one: a warp adds up every eighth row, then warp 0 their sums.
template <class T, class F>
__device__ __forceinline__ T add_rows(int64_t parts, T* of_warps, F number) {
  const int lane = gpu::thread() % 32, warp = gpu::thread() / 32, warps = gpu::threads() / 32;
  T sum = 0;
#pragma unroll 4
  for (int64_t part = warp; part < parts; part += warps) sum += number(part);
  gpu::sync();
  of_warps[gpu::thread()] = sum;
  gpu::sync();
  if (warp > 0) return T(0);
  for (int w = 1; w < warps; ++w) sum += of_warps[w * 32 + lane];
  return sum;
}

// Turns scores into weights, and takes the reads of the parts together. A block has a share of the slots and of the reads' numbers;
// what both are relative to, each finds itself.
template <class T>
__global__ void __launch_bounds__(most_threads, 3) combine_kernel(ContentRead a, int64_t parts, int64_t shares, Parts<T> in) {
  Carver carver(gpu::shared_memory());
  T *of_warps = carver.take<T>(most_threads), *most = carver.take<T>(a.R), *scale = carver.take<T>(a.R);
  const int64_t sample = gpu::block() / shares, share = gpu::block() % shares;
  const int lane = gpu::thread() % 32, warp = gpu::thread() / 32, warps = gpu::threads() / 32;
  const T *mosts = in.most + sample * a.R * parts, *sums = in.sums + sample * a.R * parts;
  for (int64_t r = warp; r < a.R; r += warps) {
    T all = -INFINITY, sum = 0;
    for (int64_t p = lane; p < parts; p += 32) all = greater(mosts[r * parts + p], all);
    for (int mask = 16; mask > 0; mask /= 2) all = greater(gpu::shuffle_xor(all, mask), all);
    for (int64_t p = lane; p < parts; p += 32) sum += sums[r * parts + p] * rescale(mosts[r * parts + p], all);
    sum = add_warp<1>(sum);
    if (lane == 0) most[r] = all, scale[r] = T(1) / sum;
  }
  gpu::sync();
  const int64_t width = (a.N + shares - 1) / shares, first = share * width, last = first + width < a.N ? first + width : a.N;
  T* weights = static_cast<T*>(a.weights) + sample * a.R * a.N;
  for (int64_t r = 0; r < a.R; ++r)
    for (int64_t n = first + gpu::thread(); n < last; n += gpu::threads())
      weights[r * a.N + n] = exp(weights[r * a.N + n] - most[r]) * scale[r];
  const int64_t numbers = a.R * a.D;
  const T* reads = in.reads + sample * parts * numbers;
  for (int64_t column = share * 32; column < numbers; column += shares * 32) {
    const int64_t i = column + lane, r = i < numbers ? i / a.D : 0;
    const T read = add_rows(parts, of_warps, [&](int64_t p) {
      return i < numbers ? reads[p * numbers + i] * rescale(mosts[r * parts + p], most[r]) : T(0);
    });
    if (warp == 0 && i < numbers) store_as(a.read, a.input, sample * numbers + i, read * scale[r]);
  }
}

// Gradients need the mean, under the weights, of the gradient that reaches them. Alone, a block finds it on its way. Else it takes
// two launches: first each block's share of the mean, [B, R, parts], then the gradients, which add these up and take everything
// from the very same bits: a product of the read's gradient and the read would do but for its rounding, which a great sharpness
// would magnify. Gradients of keys and sharpness are this block's part then, [parts, B R D + B R].
enum class Stage { alone, means, gradients };

template <class T, int C, int HEADS, bool RESIDENT>
__global__ void __launch_bounds__(most_threads, backward_blocks<T, C, HEADS, RESIDENT>)
    read_backward_kernel(const __grid_constant__ ContentReadBackward a, const __grid_constant__ Plan plan,
                         const __grid_constant__ Share share, Stage stage, T* means, T* of_parts) {
  constexpr int OWN = Place<HEADS>::OWN;
  const int block = static_cast<int>(gpu::block()), part = block % share.parts;
  const int64_t sample = block / share.parts;
  Carver carver(gpu::shared_memory());
  const Shared<T> shared(carver, plan, true);
  Slots<T, C, HEADS, RESIDENT> slots(plan, share, part, a.eps, static_cast<const T*>(a.memory) + sample * a.N * a.D);
  const auto& place = slots.place;
  const T* weights = static_cast<const T*>(a.weights) + sample * a.R * a.N;
  const T* grad_weights = a.grad_weights ? static_cast<const T*>(a.grad_weights) + sample * a.R * a.N : nullptr;
  T* grad_memory = static_cast<T*>(a.grad_memory) + sample * a.N * a.D;
  T* sums = shared.sums + place.warp * plan.heads;
  T* of_squares_of_keys = shared.most + place.warp * plan.heads;
  T* of_warp = shared.read + place.warp * plan.heads * plan.columns;
  const int own_slot = slots.own(0), first_turn = part * share.turns;
  const auto first_weights = slots.request(weights, 0);
  slots.template load_inputs<true>(a.key, a.grad_read, a.sharpness, a.input, sample, shared);
  slots.keep(first_weights, 0, shared.given);
  for (int first = HEADS; first < plan.heads; first += HEADS) slots.keep(slots.request(weights, first), first, shared.given);
  for (int r = place.lane; r < plan.heads; r += 32) sums[r] = of_squares_of_keys[r] = 0;
  if (!slots.any(first_turn)) {
#pragma unroll 1
    for (int i = place.lane; i < plan.heads * plan.columns; i += 32) of_warp[i] = 0;
  }
  if (stage == Stage::gradients)
    for (int r = place.warp; r < plan.R; r += plan.warps) {
      T mean = 0;
      for (int64_t p = place.lane; p < share.parts; p += 32) mean += means[(sample * a.R + r) * share.parts + p];
      mean = add_warp<1>(mean);
      if (place.lane == 0) shared.mean[r] = mean;
    }
  for (int r = plan.R + gpu::thread(); r < plan.heads; r += gpu::threads()) shared.mean[r] = 0;
  gpu::sync();

  // Of a number of heads from `first` on: products of the slots and the rows, of which this thread's are the first ones.
  const auto dots_of = [&](const T* vectors, int first, T(&dots)[lane_slots* HEADS], auto also) {
    for (int k = 0; k < slots.pieces(); ++k) {
      T rows[HEADS][C];
      load_rows<HEADS, C>(vectors + first * plan.columns + slots.first_column(k), plan.columns, rows);
      also(rows);
      slots.with_piece(k, [&](const Tile<T, C>& m) { add_dots<HEADS, C>(m, rows, dots); });
    }
    add_lanes<4, 1, lane_slots * HEADS>(dots, place.lane);
  };
  for (int turn = 0; turn < share.turns; ++turn) {
    if (stage != Stage::alone && !slots.any(first_turn + turn)) break;
    if (turn > 0) {
      slots.go_to(first_turn + turn);
      for (int first = 0; first < plan.heads; first += HEADS) slots.keep(slots.request(weights, first), first, shared.given);
      gpu::sync_warp();
    }
    const int slot = slots.first_slot + own_slot;
    for (int first = 0; first < plan.heads; first += HEADS) {  // the gradients that reach the weights
      T grads[lane_slots * HEADS] = {}, of_mean[OWN];
#pragma unroll
      for (int j = 0; j < OWN; ++j) {
        const int r = first + place.own_head + j;
        of_mean[j] = grad_weights && r < a.R && slot < a.N ? grad_weights[r * a.N + slot] : T(0);
      }
      dots_of(shared.grads, first, grads, [](const auto&) {});
#pragma unroll
      for (int j = 0; j < OWN; ++j) {
        const int at = (first + place.own_head + j) * plan.span + own_slot;
        const T grad = grads[j] + of_mean[j];
        if (place.owner) shared.of_squares[at] = grad;
        of_mean[j] = first + place.own_head + j < a.R && slot < a.N ? shared.given[at] * grad : T(0);
      }
      if (stage != Stage::gradients) slots.tell_sums(of_mean, first, true, sums);
    }
    gpu::sync_warp();
    if (stage == Stage::means) continue;
    if (stage == Stage::alone) {
      gpu::sync();
      for (int r = gpu::thread(); r < plan.R; r += gpu::threads()) shared.mean[r] = slots.total(shared.sums, r, plan.heads);
      gpu::sync();
    }

    T squares[lane_slots] = {};
    for (int k = 0; k < slots.pieces(); ++k) slots.with_piece(k, [&](const Tile<T, C>& m) { add_squares<C>(m, squares); });
    add_lanes<4, 1, lane_slots>(squares, place.lane);
    for (int first = 0; first < plan.heads; first += HEADS) {
      T dots[lane_slots * HEADS] = {}, key_squares[HEADS] = {}, own_key[OWN], of_beta[OWN], of_key[OWN], of_score[OWN];
      dots_of(shared.keys, first, dots, [&](const T(&rows)[HEADS][C]) { add_row_squares<HEADS, C>(rows, key_squares); });
      own_key_squares<HEADS>(place, key_squares, own_key);
#pragma unroll
      for (int j = 0; j < OWN; ++j) {
        const int r = first + place.own_head + j, at = r * plan.span + own_slot;
        const bool valid = r < a.R && slot < a.N;
        of_score[j] = valid ? shared.given[at] * (shared.of_squares[at] - shared.mean[r]) : T(0);
      }
      if (HEADS == 1) gpu::sync_warp();  // two lanes read what one of them writes
#pragma unroll
      for (int j = 0; j < OWN; ++j) {
        const int r = first + place.own_head + j, at = r * plan.span + own_slot;
        const ScoreGradient<T> of = score_gradient(of_score[j], dots[j], shared.beta[r], own_key[j], squares[0], slots.eps);
        of_beta[j] = of.beta;
        of_key[j] = of.key_square;
        if (place.owner) {
          shared.weights[at] = of.dot;
          shared.of_squares[at] = of.slot_square;
        }
      }
      slots.tell_sums(of_beta, first, turn > 0, sums);
      slots.tell_sums(of_key, first, turn > 0, of_squares_of_keys);
    }
    gpu::sync_warp();

    for (int k = 0; k < slots.pieces(); ++k)
      slots.by_four([&](auto from, auto count) {
        constexpr int FROM = decltype(from)::value, COUNT = decltype(count)::value;
        const int column = slots.first_column(k) + FROM * column_lanes;
        Tile<T, COUNT> grad = {};
        for (int first = 0; first < plan.heads; first += HEADS) {
          const int corner = first * plan.columns + column;
          Four<T> own[HEADS];
          T rows[HEADS][COUNT], sum[HEADS * COUNT] = {};
          if (a.grad_read) {
            slots.load_weights(shared.given, first, slots.slots(0), own);
            load_rows<HEADS, COUNT>(shared.grads + corner, plan.columns, rows);
            add_products<HEADS, COUNT>(own, rows, grad);
          }
          slots.load_weights(shared.weights, first, slots.slots(0), own);
          load_rows<HEADS, COUNT>(shared.keys + corner, plan.columns, rows);
          add_products<HEADS, COUNT>(own, rows, grad);
          slots.with_piece(k, [&](const Tile<T, C>& all) {
            const Tile<T, COUNT> m = columns_of<FROM, COUNT>(all);
            add_weighted<HEADS, COUNT>(m, own, sum);
            slots.load_weights(shared.of_squares, first, slots.slots(0), own);
            add_by_norm<HEADS, COUNT>(m, own, grad);
          });
          slots.template add_sums<COUNT>(sum, first, column, turn > 0, nullptr, of_warp);
        }
        slots.give_back(grad, k, FROM, grad_memory);
      });
    gpu::sync_warp();
  }
  gpu::sync();
  if (stage == Stage::means) {
    for (int r = gpu::thread(); r < plan.R; r += gpu::threads())
      means[(sample * a.R + r) * share.parts + part] = slots.total(shared.sums, r, plan.heads);
    return;
  }
  const int64_t rows = a.B * a.R;
  T* of_part = of_parts + part * rows * (a.D + 1);
  for (int i = gpu::thread(); i < plan.R * plan.D; i += gpu::threads()) {
    const int r = i / plan.D, at = r * plan.columns + slots.place_of(i % plan.D);
    const int64_t to = sample * a.R * a.D + i;
    const T of_key =
        slots.total(shared.read, at, plan.heads * plan.columns) + 2 * slots.total(shared.most, r, plan.heads) * shared.keys[at];
    if (share.parts == 1) store_as(a.grad_key, a.input, to, of_key);
    else of_part[to] = of_key;
  }
  for (int r = gpu::thread(); a.grad_sharpness && r < plan.R; r += gpu::threads()) {
    const T of_sharpness = slots.total(shared.sums, r, plan.heads);
    if (share.parts == 1) store_as(a.grad_sharpness, a.input, sample * a.R + r, of_sharpness);
    else of_part[rows * a.D + sample * a.R + r] = of_sharpness;
  }
}

// Adds up what the blocks of each sample have of the gradients of keys and sharpness.
template <class T>
__global__ void __launch_bounds__(most_threads, 4)
    add_gradients_kernel(ContentReadBackward a, int64_t parts, const T* of_parts) {
  T* of_warps = reinterpret_cast<T*>(gpu::shared_memory());
  const int64_t i = gpu::block() * 32 + gpu::thread() % 32, of_keys = a.B * a.R * a.D, count = of_keys + a.B * a.R;
  const T sum = add_rows(parts, of_warps, [&](int64_t part) { return i < count ? of_parts[part * count + i] : T(0); });
  if (gpu::thread() >= 32) return;
  if (i < of_keys) store_as(a.grad_key, a.input, i, sum);
  else if (i < count && a.grad_sharpness) store_as(a.grad_sharpness, a.input, i - of_keys, sum);
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
Share share_out(const Plan& plan, int64_t B, int64_t blocks_at_once, const void* memory, const void* grad_memory) {
  const auto aligned = [](const void* numbers) { return reinterpret_cast<uintptr_t>(numbers) % alignof(Four<T>) == 0; };
  const int64_t turns = (plan.N + plan.span - 1) / plan.span;  // of a block that has the whole sample
  const int64_t wanted = B < blocks_at_once ? blocks_at_once / B : 1;
  Share share{};
  share.turns = static_cast<int>((turns + wanted - 1) / wanted);
  share.parts = static_cast<int>((turns + share.turns - 1) / share.turns);
  share.alone = turns == 1;
  share.wide = plan.D % 4 == 0 && aligned(memory) && aligned(grad_memory);
  return share;
}

template <class T>
const char* read(const ContentRead& a, const Queue& queue) {
  if (a.B == 0) return nullptr;
  const Plan plan = plan_read<T>(a.N, a.D, a.R, false);
  const int64_t processors = gpu::limits().processors;
  const Share share = share_out<T>(plan, a.B, 2 * processors, a.memory, nullptr);
  const int64_t rows = a.B * share.parts * a.R;
  Parts<T> between{};
  if (!share.alone) {
    between.most = static_cast<T*>(queue.scratch(queue.owner, rows * (a.D + 2) * sizeof(T)));
    between.sums = between.most + rows;
    between.reads = between.sums + rows;
  }
  const char* why = with_kernel<T>(plan, [&](auto c, auto h, auto resident) {
    return gpu::launch(read_kernel<T, decltype(c)::value, decltype(h)::value, decltype(resident)::value>,
                       {a.B * share.parts, 32 * plan.warps, 1, plan.shared, queue.stream}, a, plan, share, between);
  });
  if (why || share.alone) return why;
  const int64_t most_shares = a.B < 2 * processors ? 2 * processors / a.B : 1, useful = (a.N + 511) / 512;
  const int64_t shares = useful < most_shares ? useful : most_shares;
  const size_t shared = (most_threads + 2 * (a.R + 4)) * sizeof(T);
  return gpu::launch(combine_kernel<T>, {a.B * shares, most_threads, 1, shared, queue.stream}, a, share.parts, shares, between);
}

template <class T>
const char* read_backward(const ContentReadBackward& a, const Queue& queue) {
  if (a.B == 0) return nullptr;
  const Plan plan = plan_read<T>(a.N, a.D, a.R, true);
  const Share share = share_out<T>(plan, a.B, 2 * gpu::limits().processors, a.memory, a.grad_memory);
  const int64_t rows = a.B * a.R, count = rows * (a.D + 1);
  T *of_parts = nullptr, *means = nullptr;
  if (!share.alone) {
    of_parts = static_cast<T*>(queue.scratch(queue.owner, share.parts * (count + rows) * sizeof(T)));
    means = of_parts + share.parts * count;
  }
  const char* why = with_kernel<T>(plan, [&](auto c, auto h, auto resident) {
    const auto stage = [&](Stage stage) {
      return gpu::launch(read_backward_kernel<T, decltype(c)::value, decltype(h)::value, decltype(resident)::value>,
                         {a.B * share.parts, 32 * plan.warps, 1, plan.shared, queue.stream}, a, plan, share, stage, means,
                         of_parts);
    };
    if (share.alone) return stage(Stage::alone);
    const char* why = stage(Stage::means);
    return why ? why : stage(Stage::gradients);
  });
  if (why || share.parts == 1) return why;
  return gpu::launch(add_gradients_kernel<T>, {(count + 31) / 32, most_threads, 1, most_threads * sizeof(T), queue.stream}, a,
                     share.parts, of_parts);
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

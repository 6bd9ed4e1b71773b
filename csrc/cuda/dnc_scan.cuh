// What the two directions of dnc_scan share: how a block holds a sample, and parts of a step.
//
// One block takes a sample through all steps. float32 of common sizes has kernels of its own (dnc_held.cuh).
// Else sizes are known at run time only, and every array is in shared memory where there is room, in the order in which they
// are asked for, else in device memory: the code is the same. A row of the memory is
// compared by 8 lanes; what belongs to one head is computed by one warp, a lane taking every 32nd slot; a warp takes every so
// many rows of the links. All sums are taken in an order that only the sizes decide.
#pragma once
#include <type_traits>

#include "kernels.h"
#include "tile.cuh"

namespace mann_fast {
namespace cuda {

// What a step is told, piece by piece, and the gradient of its reads. A step's inputs lie one after the other in this order, and
// so do their gradients.
struct Told {
  enum {
    read_keys,
    read_sharpness,
    write_key,
    write_sharpness,
    erase,
    write_vector,
    free_gates,
    allocation_gate,
    write_gate,
    read_modes,
    read_masks,
    write_mask,
    link_sharpening,
    grad_reads,
    kinds
  };
};

// Where backward gives the gradients of what was told.
struct DncGiven {
  void* told[Told::grad_reads];
};

struct DncPlan {
  int N, D, R;
  int heads;  // R, padded: heads are taken four at a time through the links
  bool links, masks, sharpened, deallocate;
  int warps, row;                 // numbers from a slot to the next in shared memory
  const void* told[Told::kinds];  // null where there is none
  int first[Told::kinds + 1];     // where each piece begins among a step's inputs
  int segment, segments;          // of backward: steps of a replay, and how many there are
  size_t limit;                   // bytes of shared memory that a block may have
  size_t shared, scratch;         // bytes of a block
  // In shared memory: the memory, the links, what is beside them (but backward's states), everything.
  bool near_memory, near_links, near_rest, near;
  bool held;  // the memory and the links are in registers

  // Known at run time only; see FixedPlan.
  static constexpr bool fixed = false;
  __device__ __forceinline__ static const DncPlan& of(const DncPlan& plan) { return plan; }
  __device__ __host__ int count(int kind) const { return first[kind + 1] - first[kind]; }
  __device__ __host__ int inputs() const { return first[Told::kinds]; }
};

constexpr int heads_at_once = 4;

// Of a scan or of a cell.
template <class Arguments>
DncPlan dnc_sizes_of(const Arguments& a, bool masks, bool sharpened, bool backward) {
  DncPlan plan{};
  plan.N = static_cast<int>(a.N), plan.D = static_cast<int>(a.D), plan.R = static_cast<int>(a.R);
  plan.heads = (plan.R + heads_at_once - 1) / heads_at_once * heads_at_once;
  plan.links = a.before.links != nullptr, plan.masks = masks;
  plan.sharpened = sharpened, plan.deallocate = a.deallocate;
  const int most_warps = most_threads / 32, groups = (plan.N + warp_slots - 1) / warp_slots;
  plan.warps = groups < 2 ? 2 : groups < most_warps ? groups : most_warps;
  // 4 slots side by side lie in different banks
  plan.row = ((plan.D + column_lanes - 1) / column_lanes | 1) * column_lanes;
  const int D = plan.D, R = plan.R, modes = plan.links ? R * 3 : 0, exponents = plan.sharpened ? R * 2 : 0;
  const int counts[Told::kinds] = {
      R * D, R, D, 1, D, D, R, 1, 1, modes, plan.masks ? R * D : 0, plan.masks ? D : 0, exponents, backward ? R * D : 0};
  for (int kind = 0; kind < Told::kinds; ++kind) plan.first[kind + 1] = plan.first[kind] + counts[kind];
  if (!backward) return plan;
  while (static_cast<int64_t>(plan.segment) * plan.segment < a.T) ++plan.segment;
  if (plan.segment == 0) plan.segment = 1;
  plan.segments = static_cast<int>((a.T + plan.segment - 1) / plan.segment);
  return plan;
}

// Where a scan finds what it is told.
inline void dnc_tell(DncPlan& plan, const DncInterface<const void*>& t, const void* grad_reads) {
  const void* told[Told::kinds] = {t.read_keys,    t.read_sharpness, t.write_key,       t.write_sharpness, t.erase,
                                   t.write_vector, t.free_gates,     t.allocation_gate, t.write_gate,      t.read_modes,
                                   t.read_masks,   t.write_mask,     t.link_sharpening, grad_reads};
  for (int kind = 0; kind < Told::kinds; ++kind) plan.told[kind] = told[kind];
}

template <class Arguments>
const char* dnc_too_large(const Arguments& a) {
  if (a.N >= 1 << 24) return "the kernel takes fewer than 2^24 slots";
  if (a.R * a.D >= 1 << 26) return "the kernel takes fewer than 2^26 numbers in the keys of a step";
  if (a.R * a.N >= 1 << 24) return "the kernel takes fewer than 2^24 weights in a step";
  return nullptr;
}

// The pieces of a block's memory: near is shared memory, from byte `start` on, far its part of scratch.
struct DncPlaces {
  unsigned char *near, *far;
  __device__ __forceinline__ DncPlaces(const DncPlan& plan, unsigned char* scratch, size_t start = 0,
                                       int64_t part = gpu::block())
      : near(gpu::shared_memory() + start), far(scratch + part * plan.scratch) {}
};

// Gives arrays out of shared memory while there is room, then out of a block's scratch memory. With null bases it only counts.
// NEAR: there is room for all, so that the compiler knows its pointers to be to shared memory.
template <bool NEAR>
class Room {
 public:
  Carver near, far;
  __device__ __host__ Room(unsigned char* near, unsigned char* far, size_t limit) : near(near), far(far), limit_(limit) {}
  __device__ __forceinline__ Room(const DncPlaces& places, size_t limit) : Room(places.near, places.far, limit) {}
  template <class U>
  __device__ __host__ U* take(int64_t count) {
    return fits<U>(count) ? near.take<U>(count) : far.take<U>(count);
  }
  // Where there is no room, what is already there.
  template <class U>
  __device__ __host__ U* take_or(int64_t count, U* other) {
    return fits<U>(count) ? near.take<U>(count) : other;
  }

 private:
  template <class U>
  __device__ __host__ bool fits(int64_t count) const {
    return NEAR || near.used + static_cast<size_t>(count) * sizeof(U) + 15 <= limit_;
  }
  size_t limit_;
};

// Decides where a direction's arrays lie.
template <class Arrays>
void dnc_place(DncPlan& plan, const gpu::Limits& limits) {
  plan.limit = limits.shared;
  Room<false> room(nullptr, nullptr, plan.limit);
  const Arrays arrays(room, plan);
  plan.shared = room.near.used, plan.scratch = room.far.used;
  plan.near_memory = arrays.near_memory, plan.near_links = arrays.near_links;
  plan.near_rest = arrays.near_rest, plan.near = plan.near_rest && plan.near_memory && (plan.near_links || !plan.links);
}

inline Layout dnc_layout_of(const DncPlan& plan) {
  const char* memory = plan.held                        ? "registers"
                       : !plan.near_memory              ? "device memory"
                       : plan.links && !plan.near_links ? "shared memory, its links in device memory"
                                                        : "shared memory";
  return {1, plan.warps, memory, plan.shared};
}

// The inputs of one step on their way: requested a step ahead, in registers as far as they go.
template <class T>
class DncStream {
 public:
  __device__ __forceinline__ DncStream(const DncPlan& plan, Dtype input) : plan_(plan), input_(input) {}

  __device__ __forceinline__ void ask(int64_t row) {
    row_ = row;
#pragma unroll
    for (int j = 0; j < ahead; ++j) {
      const int i = gpu::thread() + j * gpu::threads();
      asked_[j] = i < plan_.inputs() ? get(i) : T(0);
    }
  }
  __device__ __forceinline__ void put(T* in) const {
#pragma unroll
    for (int j = 0; j < ahead; ++j) {
      const int i = gpu::thread() + j * gpu::threads();
      if (i < plan_.inputs()) in[i] = asked_[j];
    }
    for (int i = gpu::thread() + ahead * gpu::threads(); i < plan_.inputs(); i += gpu::threads()) in[i] = get(i);
  }

 private:
  static constexpr int ahead = 3;
  __device__ __forceinline__ T get(int i) const {
    int kind = 0;
    while (i >= plan_.first[kind + 1]) ++kind;
    const void* data = plan_.told[kind];
    return data ? load_as<T>(data, input_, row_ * plan_.count(kind) + i - plan_.first[kind]) : T(0);
  }

  const DncPlan& plan_;
  Dtype input_;
  int64_t row_ = 0;
  T asked_[ahead];
};

// What link [i, j] becomes; the diagonal is 0 whatever was there.
template <class T>
__device__ __forceinline__ T next_link(T link, T row_weight, T column_weight, T precedence, bool diagonal) {
  return diagonal ? T(0) : (T(1) - row_weight - column_weight) * link + row_weight * precedence;
}
template <class T>
__device__ __forceinline__ T next_usage(T usage, T written, T retained) {
  return (usage + (T(1) - usage) * written) * retained;
}

template <class T>
__device__ __forceinline__ T larger(T a, T b) {  // a NaN where there is one
  return b > a || b != b ? b : a;
}
template <class T>
__device__ __forceinline__ T warp_maximum(T value) {
#pragma unroll
  for (int mask = 16; mask >= 1; mask /= 2) value = larger(value, gpu::shuffle_xor(value, mask));
  return value;
}
template <class T>
__device__ __forceinline__ T add_warp(T value) {
  return add_warp<1>(value);
}
// Over the 8 lanes that share a slot.
template <class T>
__device__ __forceinline__ T add_columns(T value) {
#pragma unroll
  for (int mask = column_lanes / 2; mask >= 1; mask /= 2) value += gpu::shuffle_xor(value, mask);
  return value;
}

// What a step is told, in the order of Told, and within it the gradients of the reads.
template <class T>
struct DncInputs {
  T *told, *grads;
  __device__ __forceinline__ operator T*() const { return told; }
};

// A scan as one thread sees it.
template <class T>
struct DncThread {
  static constexpr T link_floor = T(1e-6);  // added to a direction before it is sharpened
  const DncPlan& plan;
  const int lane, warp, warps;
  const T eps;
  __device__ __forceinline__ DncThread(const DncPlan& plan, double eps)
      : plan(plan), lane(gpu::thread() % 32), warp(gpu::thread() / 32), warps(gpu::threads() / 32), eps(static_cast<T>(eps)) {}

  // Of two that take turns.
  __device__ __forceinline__ DncInputs<T> inputs_of(T* in, int64_t step) const {
    T* told = in + step % 2 * plan.inputs();
    return {told, told + plan.first[Told::grad_reads]};
  }
  template <class U>
  __device__ __forceinline__ U* of(U* in, int kind) const {
    return in + plan.first[kind];
  }
  // Of head h, where R is the one that writes.
  __device__ __forceinline__ const T* key(const T* in, int h) const {
    return h < plan.R ? of(in, Told::read_keys) + h * plan.D : of(in, Told::write_key);
  }
  __device__ __forceinline__ const T* mask(const T* in, int h) const {
    return !plan.masks ? nullptr : h < plan.R ? of(in, Told::read_masks) + h * plan.D : of(in, Told::write_mask);
  }
  __device__ __forceinline__ T sharpness(const T* in, int h) const {
    return h < plan.R ? of(in, Told::read_sharpness)[h] : of(in, Told::write_sharpness)[0];
  }
  __device__ __forceinline__ T masked(const T* mask, int column) const {  // the mask's square: it is on both sides of a product
    return mask ? mask[column] * mask[column] : T(1);
  }

  // f(slot, whether there is one), by the 8 lanes that share it; all lanes of the warp come along.
  template <class F>
  __device__ __forceinline__ void with_slots(F f) const {
    for (int slot = warp * 4; slot < plan.N; slot += warps * 4)
      f(slot + lane / column_lanes, slot + lane / column_lanes < plan.N);
  }
  // f(number), by all threads.
  template <class F>
  __device__ __forceinline__ void with_each(int64_t count, F f) const {
    for (int64_t i = gpu::thread(); i < count; i += gpu::threads()) f(i);
  }
  template <class F>
  __device__ __forceinline__ void with_columns(F f) const {
    for (int c = lane % column_lanes; c < plan.D; c += column_lanes) f(c);
  }
  // f(slot), by one warp.
  template <class F>
  __device__ __forceinline__ void with_row(F f) const {
    for (int i = lane; i < plan.N; i += 32) f(i);
  }
  // f(head), each by one warp.
  template <class F>
  __device__ __forceinline__ void with_heads(int count, F f) const {
    for (int h = warp; h < count; h += warps) f(h);
  }

  __device__ __forceinline__ T retained(const T* in, const T* read_weights, int slot) const {
    const T* gates = of(in, Told::free_gates);
    T product = 1;
    for (int r = 0; r < plan.R; ++r) product *= T(1) - gates[r] * read_weights[r * plan.N + slot];
    return product;
  }

  // The dot product of a slot's row, whose numbers number(column) gives, with the key of head h and its square, each under the mask.
  template <class F>
  __device__ __forceinline__ void compare(const T* in, int h, int slot, bool there, T* dots, T* squares, F number) const {
    const T *k = key(in, h), *q = mask(in, h);
    T dot = 0, square = 0;
    if (there)
      with_columns([&](int c) {
        const T m = number(c), share = m * masked(q, c);
        dot += share * k[c];
        square += share * m;
      });
    dot = add_columns(dot);
    square = add_columns(square);
    if (there && lane % column_lanes == 0) {
      dots[h * plan.N + slot] = dot;
      squares[h * plan.N + slot] = square;
    }
  }

  // By a warp, |key|^2 of head h under its mask.
  __device__ __forceinline__ T key_square(const T* in, int h) const {
    const T *k = key(in, h), *q = mask(in, h);
    T sum = 0;
    for (int c = lane; c < plan.D; c += 32) sum += k[c] * k[c] * masked(q, c);
    return add_warp(sum);
  }

  // By a warp: the content weights of head h, from its dot products and squares.
  __device__ __forceinline__ void soften(const T* in, int h, const T* dots, const T* squares, T* weights) const {
    const T beta = sharpness(in, h), square = key_square(in, h);
    T most = -INFINITY, sum = 0;
    with_row([&](int i) {
      const T score = beta * (dots[h * plan.N + i] * gpu::inverse_root(square * squares[h * plan.N + i] + eps));
      weights[i] = score;
      most = larger(most, score);
    });
    most = warp_maximum(most);
    with_row([&](int i) {
      const T raised = exp(weights[i] - most);
      weights[i] = raised;
      sum += raised;
    });
    const T scale = T(1) / add_warp(sum);
    with_row([&](int i) { weights[i] *= scale; });
  }

  // By a warp: a direction to a power, in shares.
  __device__ __forceinline__ void sharpen(const T* direction, T exponent, T* out) const {
    T most = -INFINITY, sum = 0;
    with_row([&](int i) { most = larger(most, direction[i] + link_floor); });
    most = log(warp_maximum(most));
    with_row([&](int i) {
      const T raised = exp(exponent * (log(direction[i] + link_floor) - most));
      out[i] = raised;
      sum += raised;
    });
    const T scale = T(1) / add_warp(sum);
    with_row([&](int i) { out[i] *= scale; });
  }

  // By a warp: for each slot the product of the usages before it in the order of allocation. A lane takes slots side by side.
  __device__ __forceinline__ void products(const T* usage, const int* order, T* before) const {
    const int each = (plan.N + 31) / 32, first = lane * each, last = first + each < plan.N ? first + each : plan.N;
    T product = 1;
    for (int n = first; n < last; ++n) product *= usage[order[n]];
    for (int by = 1; by < 32; by *= 2) {
      const T other = gpu::shuffle(product, lane >= by ? lane - by : lane);
      if (lane >= by) product *= other;
    }
    product = gpu::shuffle(product, lane > 0 ? lane - 1 : 0);
    if (lane == 0) product = 1;
    for (int n = first; n < last; ++n) {
      before[order[n]] = product;
      product *= usage[order[n]];
    }
  }

  // Rows [T, B, count] of a sample from a step on, of those that it takes no part in.
  template <class Arguments>
  __device__ __forceinline__ void clear_steps(const Arguments& a, int64_t sample, int64_t from, void* rows, Dtype dtype,
                                              int64_t count) const {
    for (int64_t t = from; t < a.T; ++t)
      with_each(count, [&](int64_t i) { store_as(rows, dtype, (t * a.B + sample) * count + i, T(0)); });
  }
};

}  // namespace cuda
}  // namespace mann_fast

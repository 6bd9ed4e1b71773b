// What the two directions of dnc_scan share: how a block holds a sample, and parts of a step.
//
// One block takes a sample through all steps. float32 of common sizes has kernels of its own ("a sample in registers", below).
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

struct DncPlan {
  int N, D, R;
  int heads;  // R, padded: heads are taken four at a time through the links
  bool links, masks, sharpened, deallocate;
  int warps, row;                      // numbers from a slot to the next in shared memory
  const void* told[Told::kinds];       // null where there is none
  int first[Told::kinds + 1];          // where each piece begins among a step's inputs
  int segment, segments;               // of backward: steps of a replay, and how many there are
  size_t limit;                        // bytes of shared memory that a block may have
  size_t shared, scratch;              // bytes of a block
  bool near_memory, near_links, near;  // in shared memory: the memory, the links, everything
  bool held;                           // the memory and the links are in registers

  __device__ __host__ int count(int kind) const { return first[kind + 1] - first[kind]; }
  __device__ __host__ int inputs() const { return first[Told::kinds]; }
};

constexpr int heads_at_once = 4;

template <class Arguments>
DncPlan dnc_sizes_of(const Arguments& a, const void* grad_reads, bool backward) {
  DncPlan plan{};
  plan.N = static_cast<int>(a.N), plan.D = static_cast<int>(a.D), plan.R = static_cast<int>(a.R);
  plan.heads = (plan.R + heads_at_once - 1) / heads_at_once * heads_at_once;
  plan.links = a.before.links != nullptr, plan.masks = a.told.write_mask != nullptr;
  plan.sharpened = a.told.link_sharpening != nullptr, plan.deallocate = a.deallocate;
  const int most_warps = most_threads / 32, groups = (plan.N + warp_slots - 1) / warp_slots;
  plan.warps = groups < 2 ? 2 : groups < most_warps ? groups : most_warps;
  // 4 slots side by side lie in different banks
  plan.row = ((plan.D + column_lanes - 1) / column_lanes | 1) * column_lanes;
  const auto& t = a.told;
  const struct {
    const void* data;
    int count;
  } pieces[Told::kinds] = {{t.read_keys, plan.R * plan.D},
                           {t.read_sharpness, plan.R},
                           {t.write_key, plan.D},
                           {t.write_sharpness, 1},
                           {t.erase, plan.D},
                           {t.write_vector, plan.D},
                           {t.free_gates, plan.R},
                           {t.allocation_gate, 1},
                           {t.write_gate, 1},
                           {t.read_modes, plan.links ? plan.R * 3 : 0},
                           {t.read_masks, plan.masks ? plan.R * plan.D : 0},
                           {t.write_mask, plan.masks ? plan.D : 0},
                           {t.link_sharpening, plan.sharpened ? plan.R * 2 : 0},
                           {grad_reads, backward ? plan.R * plan.D : 0}};
  for (int kind = 0; kind < Told::kinds; ++kind) {
    plan.told[kind] = pieces[kind].data;
    plan.first[kind + 1] = plan.first[kind] + pieces[kind].count;
  }
  return plan;
}

template <class Arguments>
const char* dnc_too_large(const Arguments& a) {
  if (a.N >= 1 << 24) return "the kernel takes fewer than 2^24 slots";
  if (a.R * a.D >= 1 << 26) return "the kernel takes fewer than 2^26 numbers in the keys of a step";
  if (a.R * a.N >= 1 << 24) return "the kernel takes fewer than 2^24 weights in a step";
  return nullptr;
}

// Gives arrays out of shared memory while there is room, then out of a block's scratch memory. With null bases it only counts.
// NEAR: there is room for all, so that the compiler knows its pointers to be to shared memory.
template <bool NEAR>
class Room {
 public:
  Carver near, far;
  __device__ __host__ Room(unsigned char* near, unsigned char* far, size_t limit) : near(near), far(far), limit_(limit) {}
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
  plan.near_memory = arrays.near_memory, plan.near_links = arrays.near_links, plan.near = arrays.near;
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

// A scan as one thread sees it.
template <class T>
struct DncThread {
  static constexpr T link_floor = T(1e-6);  // added to a direction before it is sharpened
  const DncPlan& plan;
  const int lane, warp, warps;
  const T eps;
  __device__ __forceinline__ DncThread(const DncPlan& plan, double eps)
      : plan(plan), lane(gpu::thread() % 32), warp(gpu::thread() / 32), warps(gpu::threads() / 32), eps(static_cast<T>(eps)) {}

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
  __device__ __forceinline__ void clear_steps(const Arguments& a, int64_t sample, int64_t from, void* rows,
                                              int64_t count) const {
    for (int64_t t = from; t < a.T; ++t)
      with_each(count, [&](int64_t i) { store_as(rows, a.input, (t * a.B + sample) * count + i, T(0)); });
  }
};

// ---- a sample in registers -------------------------------------------------------------------------------------------------
//
// Of common sizes (up to 128 slots, 4 heads, 64 numbers a slot) a block of 16 warps has the memory and the links in registers,
// and all sizes are known when compiled, padded. A warp has 8 slots side by side: their rows of the memory, of which 8 lanes
// share a slot and a lane has two slots, their columns 8 apart; and their rows of the links, of which a lane has 4 columns
// side by side. What is padding is 0 and stays so.

constexpr int held_slots = 128, held_heads = 4, held_warps = 16, held_threads = 32 * held_warps;
constexpr int warp_rows = held_slots / held_warps, lane_links = held_slots / 32;
constexpr int held_row = held_slots + 8;  // from a head's numbers per slot to the next one's: 8 slots of 4 heads in 32 banks
constexpr int held_least = 33;            // with fewer slots most lanes would have padding only

// Whether a block takes a sample so, with so many bytes of shared memory for what is small.
inline bool dnc_hold(DncPlan& plan, const gpu::Limits& limits, size_t shared) {
  plan.held = plan.N >= held_least && plan.N <= held_slots && plan.R > 0 && plan.R <= held_heads && plan.D > 0 &&
              plan.D <= 8 * column_lanes && shared <= limits.shared;
  if (plan.held) plan.warps = held_warps, plan.shared = shared, plan.scratch = 0;
  return plan.held;
}

// Calls f with the columns of a lane that a plan asks for.
template <class F>
auto with_held(const DncPlan& plan, F f) {
  return plan.D <= 5 * column_lanes ? f(std::integral_constant<int, 5>()) : f(std::integral_constant<int, 8>());
}

// Where a step's inputs lie in shared memory. Rows of `columns` numbers: the keys, of which the one that writes is the last;
// the masks likewise; what is erased and written; gradients of reads. Then the single numbers.
template <int C>
struct HeldInputs {
  enum { keys, masks = keys + held_heads + 1, erase = masks + held_heads + 1, vector, grads, rows = grads + held_heads };
  static constexpr int columns = C * column_lanes;
  enum {
    sharpness = rows * columns,
    free_gates = sharpness + 8,
    gates = free_gates + held_heads,  // of allocation, of the write
    modes = gates + 4,
    exponents = modes + 3 * held_heads,
    numbers = exponents + 2 * held_heads
  };
  // Of number j of a kind.
  __device__ __forceinline__ static int place(int kind, int j, int D) {
    const int row = j / D * columns + j % D;
    switch (kind) {
      case Told::read_keys: return keys * columns + row;
      case Told::write_key: return (keys + held_heads) * columns + row;
      case Told::read_masks: return masks * columns + row;
      case Told::write_mask: return (masks + held_heads) * columns + row;
      case Told::erase: return erase * columns + row;
      case Told::write_vector: return vector * columns + row;
      case Told::grad_reads: return grads * columns + row;
      case Told::read_sharpness: return sharpness + j;
      case Told::write_sharpness: return sharpness + held_heads;
      case Told::free_gates: return free_gates + j;
      case Told::allocation_gate: return gates;
      case Told::write_gate: return gates + 1;
      case Told::read_modes: return modes + j;
      default: return exponents + j;
    }
  }
  // How many numbers a thread asks for.
  static constexpr int ahead(bool backward) {
    const int forward = columns * (2 * held_heads + 4) + 7 * held_heads + 3;
    return (forward + (backward ? columns * held_heads : 0) + held_threads - 1) / held_threads;
  }
};

// As DncStream, for these: where a number comes from and goes to is found once, and kept in one register.
template <int C, bool BACKWARD>
class HeldStream {
 public:
  __device__ __forceinline__ HeldStream(const DncPlan& plan, Dtype input) : plan_(plan), input_(input) {
#pragma unroll
    for (int j = 0; j < ahead; ++j) {
      const int i = gpu::thread() + j * held_threads;
      ways_[j] = none;
      if (i >= plan.inputs()) continue;
      int kind = 0;
      while (i >= plan.first[kind + 1]) ++kind;
      const int number = i - plan.first[kind];
      ways_[j] = static_cast<unsigned>(kind) << 28 | static_cast<unsigned>(HeldInputs<C>::place(kind, number, plan.D)) << 16 |
                 static_cast<unsigned>(number);
    }
  }
  __device__ __forceinline__ void ask(int64_t row) {
#pragma unroll
    for (int j = 0; j < ahead; ++j) {
      asked_[j] = 0;
      if (ways_[j] == none) continue;
      const int kind = static_cast<int>(ways_[j] >> 28), number = static_cast<int>(ways_[j] & 0xffff);
      const void* data = plan_.told[kind];
      if (data) asked_[j] = load_as<float>(data, input_, row * plan_.count(kind) + number);
    }
  }
  __device__ __forceinline__ void put(float* in) const {
#pragma unroll
    for (int j = 0; j < ahead; ++j)
      if (ways_[j] != none) in[ways_[j] >> 16 & 0xfff] = asked_[j];
  }

 private:
  static constexpr int ahead = HeldInputs<C>::ahead(BACKWARD);
  static constexpr unsigned none = ~0u;
  static_assert(HeldInputs<C>::numbers <= 0xfff && Told::kinds < 15, "a way fits a register");
  const DncPlan& plan_;
  Dtype input_;
  unsigned ways_[ahead];
  float asked_[ahead];
};

// The sum over lanes that differ in the bits FIRST, FIRST / 2, ... LAST.
template <int FIRST, int LAST>
__device__ __forceinline__ float add_between(float value) {
#pragma unroll
  for (int mask = FIRST; mask >= LAST; mask /= 2) value += gpu::shuffle_xor(value, mask);
  return value;
}

// A scan of such a sample as one thread sees it.
template <int C>
struct HeldThread {
  using In = HeldInputs<C>;
  static constexpr int columns = C * column_lanes, H = held_heads;
  const DncPlan& plan;
  const int lane, warp, column;
  const int first_slot;           // of the two whose columns the lane has
  const int own_slot, own_share;  // what is one number per slot, four lanes share: a head each, or a quarter of a sum
  const float eps;

  __device__ __forceinline__ HeldThread(const DncPlan& plan, double eps)
      : plan(plan), lane(gpu::thread() % 32), warp(gpu::thread() / 32), column(lane % column_lanes),
        first_slot(warp * warp_rows + lane / column_lanes * 2), own_slot(warp * warp_rows + lane / 4), own_share(lane % 4),
        eps(static_cast<float>(eps)) {}

  // The lane's columns of a row of the inputs.
  __device__ __forceinline__ void load_columns(const float* row, float (&out)[C]) const {
#pragma unroll
    for (int c = 0; c < C; ++c) out[c] = row[c * column_lanes + column];
  }
  // The squares of head h's mask, which is on both sides of a product.
  __device__ __forceinline__ void load_masks(const float* in, int h, float (&out)[C]) const {
    if (!plan.masks) {
#pragma unroll
      for (int c = 0; c < C; ++c) out[c] = 1;
      return;
    }
    load_columns(in + (In::masks + h) * columns, out);
#pragma unroll
    for (int c = 0; c < C; ++c) out[c] *= out[c];
  }
  // |key|^2 of head h under its mask, by a warp.
  __device__ __forceinline__ float key_square(const float* in, int h) const {
    float sum = 0;
#pragma unroll
    for (int c = lane; c < columns; c += 32) {
      const float k = in[(In::keys + h) * columns + c], q = plan.masks ? in[(In::masks + h) * columns + c] : 1;
      sum += k * k * (q * q);
    }
    return add_warp(sum);
  }

  // The content weights of a head from its dot products and squares, by a warp: a lane has those of every 32nd slot.
  __device__ __forceinline__ void soften(const float* dots, const float* squares, float beta, float key_square,
                                         float (&weights)[lane_links]) const {
    float most = -INFINITY, sum = 0;
#pragma unroll
    for (int k = 0; k < lane_links; ++k) {
      const int i = lane + 32 * k;
      const float score = beta * (dots[i] * gpu::inverse_root(key_square * squares[i] + eps));
      weights[k] = i < plan.N ? score : -INFINITY;
      most = larger(most, weights[k]);
    }
    most = warp_maximum(most);
#pragma unroll
    for (int k = 0; k < lane_links; ++k) {
      weights[k] = lane + 32 * k < plan.N ? exp(weights[k] - most) : 0;
      sum += weights[k];
    }
    const float scale = 1 / add_warp(sum);
#pragma unroll
    for (int k = 0; k < lane_links; ++k) weights[k] = lane + 32 * k < plan.N ? weights[k] * scale : 0;
  }
  // A direction to a power, in shares; returns the logarithm of its maximum.
  __device__ __forceinline__ float sharpen(const float (&direction)[lane_links], float exponent,
                                           float (&out)[lane_links]) const {
    constexpr float floor = DncThread<float>::link_floor;
    float most = -INFINITY, sum = 0;
#pragma unroll
    for (int k = 0; k < lane_links; ++k) {
      const int i = lane + 32 * k;
      out[k] = direction[k] + floor;
      if (i < plan.N) most = larger(most, out[k]);
    }
    most = log(warp_maximum(most));
#pragma unroll
    for (int k = 0; k < lane_links; ++k) {
      out[k] = lane + 32 * k < plan.N ? exp(exponent * (log(out[k]) - most)) : 0;
      sum += out[k];
    }
    const float scale = 1 / add_warp(sum);
#pragma unroll
    for (int k = 0; k < lane_links; ++k) out[k] = lane + 32 * k < plan.N ? out[k] * scale : 0;
    return most;
  }
  __device__ __forceinline__ void load_every(const float* from, float (&values)[lane_links]) const {
#pragma unroll
    for (int k = 0; k < lane_links; ++k) values[k] = from[lane + 32 * k];
  }
  // Of what a lane has of every 32nd slot, that of the slot which is the thread's among the head's four warps.
  __device__ __forceinline__ float own_of(const float (&values)[lane_links]) const {
    float own = values[0];
#pragma unroll
    for (int k = 1; k < lane_links; ++k)
      if (warp % 4 == k) own = values[k];
    return own;
  }

  // The share of a head in what its slot retains; their product over the four lanes is what is retained.
  __device__ __forceinline__ float retained(float gate, float read_weight) const {
    float product = 1 - gate * read_weight;
    product *= gpu::shuffle_xor(product, 1);
    return product * gpu::shuffle_xor(product, 2);
  }

  // The links after a write.
  __device__ __forceinline__ void next_links(const float* rows_written, const Four<float>& written,
                                             const Four<float>& precedence, float (&links)[warp_rows][lane_links]) const {
#pragma unroll
    for (int r = 0; r < warp_rows; ++r) {
      const float own = rows_written[r];
#pragma unroll
      for (int k = 0; k < lane_links; ++k)
        links[r][k] = next_link(links[r][k], own, written.at[k], precedence.at[k], diagonal(r, k));
    }
  }
  __device__ __forceinline__ bool diagonal(int r, int k) const {
    return r % lane_links == k && lane == warp * (warp_rows / lane_links) + r / lane_links;
  }

  // The memory [N, D] and the links [N, N] of a sample, from and to where they are outside.
  __device__ __forceinline__ void take_memory(const float* memory, float (&m)[2][C]) const {
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const int slot = first_slot + s, of_slot = c * column_lanes + column;
        m[s][c] = memory && slot < plan.N && of_slot < plan.D ? memory[slot * plan.D + of_slot] : 0;
      }
  }
  __device__ __forceinline__ void give_memory(const float (&m)[2][C], float* memory) const {
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const int slot = first_slot + s, of_slot = c * column_lanes + column;
        if (slot < plan.N && of_slot < plan.D) memory[slot * plan.D + of_slot] = m[s][c];
      }
  }
  __device__ __forceinline__ void take_links(const float* from, float (&links)[warp_rows][lane_links]) const {
#pragma unroll
    for (int r = 0; r < warp_rows; ++r)
#pragma unroll
      for (int k = 0; k < lane_links; ++k) {
        const int i = warp * warp_rows + r, j = lane * lane_links + k;
        links[r][k] = from && i < plan.N && j < plan.N ? from[i * plan.N + j] : 0;
      }
  }
  __device__ __forceinline__ void give_links(const float (&links)[warp_rows][lane_links], float* to) const {
#pragma unroll
    for (int r = 0; r < warp_rows; ++r)
#pragma unroll
      for (int k = 0; k < lane_links; ++k) {
        const int i = warp * warp_rows + r, j = lane * lane_links + k;
        if (i < plan.N && j < plan.N) to[i * plan.N + j] = links[r][k];
      }
  }
  // f(which of held_slots, whether there is one), by the first threads.
  template <class F>
  __device__ __forceinline__ void with_slots(F f) const {
    if (gpu::thread() < held_slots) f(gpu::thread(), gpu::thread() < plan.N);
  }
  // f(head, slot, whether there are such), each thread one.
  template <class F>
  __device__ __forceinline__ void with_weights(F f) const {
    const int h = gpu::thread() / held_slots, i = gpu::thread() % held_slots;
    f(h, i, h < plan.R && i < plan.N);
  }
};

}  // namespace cuda
}  // namespace mann_fast

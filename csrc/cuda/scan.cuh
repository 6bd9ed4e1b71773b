// A scan's parts that both kinds of memory share: where everything lies, and the step up to the softmax.
//
// A block, or a cluster of blocks, takes one sample through all steps. Slots are divided among the warps of all its blocks.
// What is kept per slot (weights, usage) and the memory itself lie as near as there is room: a small memory in registers,
// else in shared memory, else in device memory; the code is the same, since a thread only ever touches its own tiles.
#pragma once
#include <type_traits>

#include "tile.cuh"

namespace mann_fast {
namespace cuda {

// How a scan is laid out over a block.
struct Plan {
  int N, D, R;                     // R: all heads
  int reads, shifts;               // of ntm_scan only: heads that read, which come first; moves
  bool read_first, shared_target;  // the latter of lrua_scan only
  bool resident;                   // the memory is in registers: one group of 16 slots a warp, one piece of columns
  int piece_columns;               // C: columns of a lane in a piece
  int heads_at_once;               // HEADS
  int least_warps;                 // that there shall be, whether they have slots or not
  bool slots_anywhere;             // what is kept per slot may be in device memory beside a memory in registers
  int warps, cluster;
  int groups, pieces;                       // of 16 slots, a warp; of 8 C columns, a slot
  int heads, columns;                       // R and D, padded
  int span;                                 // slots of a block, padded
  bool near_small, near_slots, near_tiles;  // in shared memory
  size_t shared, scratch;                   // bytes of a block

  static constexpr bool fixed = false;
  __device__ __forceinline__ static const Plan& of(const Plan& plan) { return plan; }
};

// A plan of a common size, which the compiler knows but for how many slots and columns are padding: one block with a memory in
// registers, and what a replay keeps in shared memory (NEAR) or not. The kernels are the same; loops over heads and warps are
// unrolled, and nothing is divided.
template <int HEADS, int WARPS, int C, bool NEAR = true>
struct FixedPlan {
  int N, D;
  static constexpr int R = HEADS, heads = HEADS, warps = WARPS, cluster = 1, groups = 1, pieces = 1;
  static constexpr int piece_columns = C, columns = C * column_lanes, span = WARPS * warp_slots;
  static_assert(R * columns <= 32 * warps, "a thread gives out one number of the reads");
  static constexpr bool read_first = false, shared_target = false;
  static constexpr bool resident = true, near_small = true, near_slots = NEAR, near_tiles = NEAR;

  static constexpr bool fixed = true;
  __device__ __forceinline__ static FixedPlan of(const Plan& plan) { return {plan.N, plan.D}; }
  static bool is(const Plan& plan) {
    return plan.R == R && plan.heads == heads && plan.warps == warps && plan.cluster == 1 && plan.groups == 1 &&
           !plan.read_first && !plan.shared_target && plan.piece_columns == C && plan.resident && plan.near_small &&
           plan.near_slots == NEAR && plan.near_tiles == NEAR;
  }
};
template <class P>
constexpr int fixed_heads = 1;
template <int HEADS, int WARPS, int C, bool NEAR>
constexpr int fixed_heads<FixedPlan<HEADS, WARPS, C, NEAR>> = HEADS;

// Of such a plan a lane's columns lie beside each other, so that one instruction loads four; a fifth comes from the last 8.
template <class P>
constexpr bool beside = fixed_heads<P> == 4;

template <class P>
struct PlanKind {
  using Type = P;
};

// Where number j of [R, D] lies in [heads, columns]. Where lanes' columns lie beside each other, those beyond 32 come after all
// heads' others, so that lanes that load of different heads at once find them in different banks.
template <class P>
__device__ __forceinline__ int vector_at(const P& plan, int j) {
  const int head = j / plan.D, column = j % plan.D;
  if constexpr (beside<P>) {
    constexpr int most = 4 * column_lanes, more = P::columns - most;
    return column < most ? head * most + column : P::heads * most + head * more + column - most;
  } else {
    return head * plan.columns + column;
  }
}
template <class P>
__device__ __host__ int64_t tile_numbers(const P& plan) {
  return static_cast<int64_t>(plan.span) * plan.columns;
}

// The inputs of a step. Two take turns: one is read while the next comes.
template <class Inputs>
struct InputTurns {
  using Number = typename Inputs::Number;
  unsigned char* first;
  size_t bytes;
  template <class P>
  __device__ __host__ InputTurns(Carver& carver, const P& plan, bool backward) : bytes(size(plan, backward)) {
    first = carver.take<unsigned char>(2 * static_cast<int64_t>(bytes));
  }
  // Padded heads and columns are 0 in every step; what a step brings takes its place after this.
  __device__ __forceinline__ void clear() const {
    for (size_t i = gpu::thread(); i < 2 * bytes / sizeof(Number); i += gpu::threads()) reinterpret_cast<Number*>(first)[i] = 0;
  }
  template <class P>
  __device__ __forceinline__ Inputs of(int visit, const P& plan, bool backward) const {
    Carver carver(first + visit % 2 * bytes);
    return Inputs(carver, plan, backward);
  }

 private:
  template <class P>
  __device__ __host__ static size_t size(const P& plan, bool backward) {
    Carver carver(nullptr);
    Inputs(carver, plan, backward);
    return carver.used;
  }
};

// Which steps of a scan have an anchor (`has_anchor`), asked of all in turn from 0 on, so that no step divides.
class AnchorTurns {
 public:
  __device__ __forceinline__ explicit AnchorTurns(int64_t every) : every_(every), next_(every) {}
  __device__ __forceinline__ bool due(int64_t t) {
    if (every_ == 0 || t != next_) return false;
    next_ += every_;
    return true;
  }

 private:
  const int64_t every_;
  int64_t next_;
};

// A scan as one thread sees it. ALONE: no sample has more than one block.
template <class T, int C, int HEADS, bool RESIDENT, bool ALONE = false, class P = Plan>
struct Thread {
  static constexpr int OWN = Place<HEADS>::OWN;
  const P& plan;
  const Place<HEADS> place;
  int rank;        // of the block in its sample
  int first_slot;  // of the block
  T eps;

  __device__ __forceinline__ Thread(const P& plan, int rank, double eps)
      : plan(plan), rank(rank), first_slot(rank * plan.span), eps(static_cast<T>(eps)) {}

  // Known when compiled where the memory is in registers.
  __device__ __forceinline__ int blocks() const { return ALONE ? 1 : plan.cluster; }
  __device__ __forceinline__ int groups() const { return RESIDENT ? 1 : plan.groups; }
  __device__ __forceinline__ int pieces() const { return RESIDENT ? 1 : plan.pieces; }

  // Of a plan that is not known when compiled the machine tells: that takes no register.
  __device__ __forceinline__ int threads() const { return P::fixed ? 32 * plan.warps : gpu::threads(); }

  // The first slot of the warp's group g, counted in the block.
  __device__ __forceinline__ int group(int g) const { return (g * plan.warps + place.warp) * warp_slots; }
  // The lane's first of four slots, and the one whose sums it owns.
  __device__ __forceinline__ int slots(int g) const { return group(g) + place.group * lane_slots; }
  __device__ __forceinline__ int own(int g) const { return group(g) + place.own_slot; }
  __device__ __forceinline__ int piece(int g, int k) const { return g * pieces() + k; }
  __device__ __forceinline__ int first_column(int k) const { return k * C * column_lanes + place.column; }

  __device__ __forceinline__ int column_at(int k, int c) const {
    if constexpr (beside<P>) return c < 4 ? 4 * place.column + c : 4 * column_lanes + place.column;
    else return first_column(k) + c * column_lanes;
  }

  __device__ __forceinline__ void sync() const {
    if (blocks() > 1) gpu::sync_cluster();
    else gpu::sync();
  }

  // The same number of every warp of every block, added up in one order by all.
  __device__ __forceinline__ T total(T* of_warps, int r, int ld) const {
    T sum = 0;
    for (int block = 0; block < blocks(); ++block) {
      const T* from = blocks() > 1 ? gpu::of_block(of_warps, block) : of_warps;
      for (int w = 0; w < plan.warps; ++w) sum += from[w * ld + r];
    }
    return sum;
  }
  __device__ __forceinline__ T maximum(T* of_warps, int r) const {
    T most = -INFINITY;
    for (int block = 0; block < blocks(); ++block) {
      const T* from = blocks() > 1 ? gpu::of_block(of_warps, block) : of_warps;
      for (int w = 0; w < plan.warps; ++w) {
        const T value = from[w * plan.heads + r];
        most = value > most || value != value ? value : most;
      }
    }
    return most;
  }

  // A piece of a memory [N, D]; 0 beyond it.
  __device__ __forceinline__ void take(const T* memory, int g, int k, Tile<T, C>& m) const {
#pragma unroll
    for (int s = 0; s < lane_slots; ++s) {
      const int slot = first_slot + slots(g) + s;
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const int column = column_at(k, c);
        m.at[s][c] = slot < plan.N && column < plan.D ? memory[static_cast<int64_t>(slot) * plan.D + column] : T(0);
      }
    }
  }
  __device__ __forceinline__ void give(const Tile<T, C>& m, int g, int k, T* memory) const {
#pragma unroll
    for (int s = 0; s < lane_slots; ++s) {
      const int slot = first_slot + slots(g) + s;
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const int column = column_at(k, c);
        if (slot < plan.N && column < plan.D) memory[static_cast<int64_t>(slot) * plan.D + column] = m.at[s][c];
      }
    }
  }

  // The same from and to an anchor [columns, ld]: a lane's four slots lie beside each other, padding too.
  __device__ __forceinline__ void take_anchor(const T* anchor, int64_t ld, int g, int k, Tile<T, C>& m) const {
    const int slot = first_slot + slots(g);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int column = column_at(k, c);
      Four<T> four{};
      if (slot < ld && column < plan.D) four = load_four(anchor + column * ld + slot);
#pragma unroll
      for (int s = 0; s < lane_slots; ++s) m.at[s][c] = slot + s < plan.N ? four.at[s] : T(0);
    }
  }
  __device__ __forceinline__ void give_anchor(const Tile<T, C>& m, int64_t ld, int g, int k, T* anchor) const {
    const int slot = first_slot + slots(g);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int column = column_at(k, c);
      if (slot < ld && column < plan.D)
        *reinterpret_cast<Four<T>*>(anchor + column * ld + slot) = {m.at[0][c], m.at[1][c], m.at[2][c], m.at[3][c]};
    }
  }

  // Calls f with a piece of what the block holds: `held` where that is in registers, else a tile of `tiles`, kept if f may change it.
  template <bool KEEP, class F>
  __device__ __forceinline__ void with_tile_of(Tile<T, C>& held, T* tiles, int g, int k, F f) const {
    if constexpr (RESIDENT) {
      f(held);
    } else {
      Tile<T, C> m;
      load_tile(tiles, piece(g, k), threads(), m);
      f(m);
      if (KEEP) store_tile(tiles, piece(g, k), threads(), m);
    }
  }

  // Rows [R, ld] of numbers per slot from and to [heads, span], by the lanes of the warp that has the slots. Null: as a sequence
  // starts, 1 at slot 0.
  __device__ __forceinline__ void take_rows(const T* rows, int64_t ld, T* to) const {
    for (int g = 0; g < groups(); ++g)
      for (int i = place.lane; i < plan.heads * warp_slots; i += 32) {
        const int r = i / warp_slots, slot = group(g) + i % warp_slots, of_sample = first_slot + slot;
        const bool there = r < plan.R && of_sample < plan.N;
        to[r * plan.span + slot] = !there ? T(0) : rows ? rows[r * ld + of_sample] : T(of_sample == 0);
      }
  }
  __device__ __forceinline__ void give_rows(const T* from, int64_t ld, T* rows) const {
    for (int g = 0; g < groups(); ++g)
      for (int i = place.lane; i < plan.R * warp_slots; i += 32) {
        const int r = i / warp_slots, slot = group(g) + i % warp_slots;
        if (first_slot + slot < ld) rows[r * ld + first_slot + slot] = from[r * plan.span + slot];
      }
  }

  // Backward begins with the gradients of the last memory [N, D] and of the last weights [R, N], each nought where it is null.
  __device__ __forceinline__ void begin_gradients(const T* of_memory, const T* of_weights, Tile<T, C>& held, T* tiles,
                                                  T* weights) const {
    for (int g = 0; g < groups(); ++g)
      for (int k = 0; k < pieces(); ++k)
        with_tile_of<true>(held, tiles, g, k, [&](Tile<T, C>& m) {
          if (of_memory) take(of_memory, g, k, m);
          else m = Tile<T, C>{};
        });
    if (of_weights) take_rows(of_weights, plan.N, weights);
    else clear_rows(weights);
  }
  __device__ __forceinline__ void clear_rows(T* rows) const {
    for (int g = 0; g < groups(); ++g)
      for (int i = place.lane; i < plan.heads * warp_slots; i += 32)
        rows[i / warp_slots * plan.span + group(g) + i % warp_slots] = 0;
  }

  // The sum over the resets of a sample, [N, D], of what comes to the start; a thread only touches its own numbers.
  __device__ __forceinline__ void begin_start(T* of_start) const {
    for (int g = 0; g < groups(); ++g)
      for (int k = 0; k < pieces(); ++k) give(Tile<T, C>{}, g, k, of_start);
  }
  // Having gone back through a step at which the sample began anew: the gradient of the memory before it is one of the start,
  // and nothing goes on to the steps before, whatever it is.
  __device__ __forceinline__ void through_start(Tile<T, C>& held, T* tiles, T* weights, T* of_start) const {
    for (int g = 0; g < groups(); ++g)
      for (int k = 0; k < pieces(); ++k)
        with_tile_of<true>(held, tiles, g, k, [&](Tile<T, C>& m) {
          Tile<T, C> sum;
          take(of_start, g, k, sum);
#pragma unroll
          for (int s = 0; s < lane_slots; ++s)
#pragma unroll
            for (int c = 0; c < C; ++c) sum.at[s][c] += m.at[s][c];
          give(sum, g, k, of_start);
          m = Tile<T, C>{};
        });
    clear_rows(weights);
  }

  // Rows [T, B, count] of a sample from a step on, of those that it takes no part in.
  template <class Arguments>
  __device__ __forceinline__ void clear_steps(const Arguments& a, int64_t sample, int64_t from, void* rows, Dtype dtype,
                                              int64_t count) const {
    for (int64_t t = from; t < a.T; ++t)
      for (int64_t j = rank * gpu::threads() + gpu::thread(); j < count; j += blocks() * gpu::threads())
        store_as(rows, dtype, (t * a.B + sample) * count + j, T(0));
  }

  // The memory [N, D] before a sample's first step, or before one at which it begins anew.
  template <class Arguments>
  __device__ __forceinline__ const T* first_memory(const Arguments& a, int64_t sample, bool anew) const {
    return anew ? static_cast<const T*>(a.sequences.start) : static_cast<const T*>(a.memory) + sample * a.N * a.D;
  }

  // Puts the memory where a replay begins: from an anchor [columns, ld], or where that is null from a memory [N, D].
  __device__ __forceinline__ void begin_memory(const T* anchor, const T* start, T* tiles) const {
    const int64_t ld = mann_fast::padded_slots(plan.N);
    for (int g = 0; g < groups(); ++g)
      for (int k = 0; k < pieces(); ++k) {
        Tile<T, C> m;
        if (anchor) take_anchor(anchor, ld, g, k, m);
        else take(start, g, k, m);
        store_tile(tiles, piece(g, k), threads(), m);
      }
  }

  // Whether every similarity is so small that exp needs no maximum taken off: a cosine is at most 1, so exp(beta (cosine - 1))
  // neither overflows nor underflows.
  __device__ __forceinline__ bool bounded(const T* beta) const {
    bool all = true;
    for (int r = 0; r < plan.R; ++r) all &= fabs(beta[r]) <= T(32);
    return all;
  }

  __device__ __forceinline__ void load_weights(const T* rows, int first, int slot, Four<T> (&out)[HEADS]) const {
#pragma unroll
    for (int h = 0; h < HEADS; ++h) out[h] = load_four(rows + (first + h) * plan.span + slot);
  }

  // Similarities of the group's slots to the keys of heads [first_head, last_head), in `out` [heads, span]: their exponentials
  // where they are bounded, and the warp's sums in `sums` [heads]; else as they are, and their maximum in `most`. dots and
  // squares are kept where these are not null.
  template <class Inputs, class Open>
  __device__ __forceinline__ void compare(const Inputs& in, int first_head, int last_head, int g, bool bounded,
                                          const Open& open, T* out, T* sums, T* most, T* dots, T* squares) const {
    const int own_slot = own(g);
    const bool there = first_slot + own_slot < plan.N;
    T own_squares[lane_slots] = {};
    for (int k = 0; k < pieces(); ++k) open(k, [&](const Tile<T, C>& m) { add_squares<C>(m, own_squares); });
    add_lanes<4, 1, lane_slots>(own_squares, place.lane);
    if (squares && place.owner && place.own_head == 0) squares[own_slot] = own_squares[0];
    for (int first = first_head; first < last_head; first += HEADS) {
      T sum[lane_slots * HEADS] = {}, key_squares[HEADS] = {}, own_key[OWN];
      for (int k = 0; k < pieces(); ++k) {
        T keys[HEADS][C];
        load_rows<HEADS, C>(in.keys + first * plan.columns + first_column(k), plan.columns, keys);
        open(k, [&](const Tile<T, C>& m) { add_dots<HEADS, C>(m, keys, sum); });
        add_row_squares<HEADS, C>(keys, key_squares);
      }
      add_lanes<4, 1, lane_slots * HEADS>(sum, place.lane);
      own_key_squares<HEADS>(place, key_squares, own_key);
      T result[OWN];
#pragma unroll
      for (int j = 0; j < OWN; ++j) {
        const int r = first + place.own_head + j;
        const bool valid = there && r < plan.R;
        const T beta = in.beta[r];
        const T score = beta * (sum[j] * gpu::inverse_root(own_key[j] * own_squares[0] + eps));
        const T exponential = exp(score - fabs(beta));
        result[j] = bounded ? (valid ? exponential : T(0)) : valid ? score : T(-INFINITY);
        if (place.owner) {
          out[r * plan.span + own_slot] = result[j];
          if (dots) dots[r * plan.span + own_slot] = sum[j];
        }
      }
      tell_sums(result, first, g > 0, sums);  // which means nothing yet where they are not bounded
      if (!bounded) tell_maximum(result, first, g > 0, most);
    }
  }

  // Turns similarities beyond the bound into exponentials, when all blocks have told their maximum, and tells the warp's
  // sums.
  __device__ __forceinline__ void soften(int first_head, int last_head, T* most, T* out, T* sums) const {
    sync();
    for (int g = 0; g < groups(); ++g) {
      const int own_slot = own(g);
      for (int first = first_head; first < last_head; first += HEADS) {
        T result[OWN];
#pragma unroll
        for (int j = 0; j < OWN; ++j) {
          const int r = first + place.own_head + j;
          const bool valid = first_slot + own_slot < plan.N && r < plan.R;
          result[j] = valid ? exp(out[r * plan.span + own_slot] - maximum(most, r)) : T(0);
        }
        if (HEADS == 1) gpu::sync_warp();  // two lanes read what one of them writes
#pragma unroll
        for (int j = 0; j < OWN; ++j)
          if (place.owner) out[(first + place.own_head + j) * plan.span + own_slot] = result[j];
        tell_sums(result, first, g > 0, sums);
      }
    }
  }

  __device__ __forceinline__ void tell_sums(T* own_values, int first, bool add, T* sums) const {
    T value[OWN];
#pragma unroll
    for (int j = 0; j < OWN; ++j) value[j] = own_values[j];
    add_owners<HEADS>(value);
    if (place.lane < 2 && place.owner) {
#pragma unroll
      for (int j = 0; j < OWN; ++j) {
        T& sum = sums[first + place.own_head + j];
        sum = add ? sum + value[j] : value[j];
      }
    }
  }
  __device__ __forceinline__ void tell_maximum(const T* own_values, int first, bool add, T* most) const {
#pragma unroll
    for (int j = 0; j < OWN; ++j) {
      T value = own_values[j];
      for (int mask = 16; mask >= 2; mask /= 2) {
        const T other = gpu::shuffle_xor(value, mask);
        value = other > value || other != other ? other : value;
      }
      if (place.lane < 2 && place.owner) {
        T& known = most[first + place.own_head + j];
        known = add && (known > value || known != known) ? known : value;
      }
    }
  }

  // Of the lane's own heads among HEADS from `first` on: the same numbers of every warp, which lie beside each other.
  struct Own {
    T at[OWN];
  };
  __device__ __forceinline__ Own own_totals(T* of_warps, int first) const {
    struct alignas(OWN * sizeof(T)) Beside : Own {};
    Own sum{};
    for (int block = 0; block < blocks(); ++block) {
      const T* from = (blocks() > 1 ? gpu::of_block(of_warps, block) : of_warps) + first + place.own_head;
      for (int w = 0; w < plan.warps; ++w) {
        const Beside told = *reinterpret_cast<const Beside*>(from + w * plan.heads);
#pragma unroll
        for (int j = 0; j < OWN; ++j) sum.at[j] += told.at[j];
      }
    }
    return sum;
  }

  // Multiplies own weights [heads, span] by one over the sums of their heads.
  __device__ __forceinline__ void normalise(T* sums, T* weights) const {
    for (int first = 0; first < plan.heads; first += HEADS) {
      const Own total = own_totals(sums, first);
#pragma unroll
      for (int j = 0; j < OWN; ++j) {
        const int r = first + place.own_head + j;
        if (r >= plan.R || !place.owner) continue;
        const T scale = gpu::reciprocal(total.at[j]);
        for (int g = 0; g < groups(); ++g) weights[r * plan.span + own(g)] *= scale;
      }
    }
  }
};

}  // namespace cuda
}  // namespace mann_fast

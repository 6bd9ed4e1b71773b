// A step of the memory forward, as a block takes it: lrua_scan.cu and cell.cu go through the steps.
#pragma once
#include "lrua_scan.cuh"

namespace mann_fast {
namespace cuda {

template <class T>
struct LruaForwardRoom {
  static int heads_at_once(const Plan& plan) { return lrua_heads_at_once(plan); }
  struct Small {
    InputTurns<Inputs<T>> in;
    Exchange<T> exchange;
    template <class P>
    __device__ __host__ Small(Carver& carver, const P& plan) : in(carver, plan, false), exchange(carver, plan, false) {}
  };
  struct Slots {
    T *read_weights, *write_weights, *usage;
    typename Order<T>::Bits* orders;
    template <class P>
    __device__ __host__ Slots(Carver& carver, const P& plan, int64_t)
        : read_weights(carver.take<T>(plan.heads * plan.span)), write_weights(carver.take<T>(plan.heads * plan.span)),
          usage(carver.take<T>(plan.span)), orders(carver.take<typename Order<T>::Bits>(plan.span)) {}
  };
  struct Tiles {
    T* memory;
    template <class P>
    __device__ __host__ Tiles(Carver& carver, const P& plan, int64_t)
        : memory(carver.take<T>(plan.resident ? 0 : tile_numbers(plan))) {}
  };
};

template <class T, int C, int HEADS, bool RESIDENT, bool ALONE = false, class P = Plan>
struct LruaForward : LruaThread<T, C, HEADS, RESIDENT, ALONE, P> {
  using Base = LruaThread<T, C, HEADS, RESIDENT, ALONE, P>;
  using Bits = typename Order<T>::Bits;
  using Base::OWN, Base::place, Base::plan, Base::first_slot, Base::rank;
  const LruaScan& a;
  const int64_t sample;
  typename LruaForwardRoom<T>::Small small;
  typename LruaForwardRoom<T>::Slots per_slot;
  typename LruaForwardRoom<T>::Tiles tiles;
  Tile<T, C> held;
  AnchorTurns anchors;
  // Where the plan is known when compiled, of the lane's own head and slots: read weights before a step, what a step writes; and
  // the usage of one slot, which another lane has too.
  Pair<T> own_weights{}, own_written{};
  T own_usage = 0;

  __device__ __forceinline__ LruaForward(const LruaScan& a, const P& plan, Places places, int64_t sample, int rank)
      : Base(plan, rank, a.eps), a(a), sample(sample), small(places.of(ALONE || RESIDENT || plan.near_small), plan),
        per_slot(places.of(RESIDENT || plan.near_slots), plan, 0), tiles(places.of(plan.near_tiles), plan, 0),
        anchors(a.anchor_every) {}

  __device__ __forceinline__ Inputs<T> inputs(int64_t step) const {
    return small.in.of(static_cast<int>(step % 2), plan, false);
  }

  template <bool KEEP, class F>
  __device__ __forceinline__ void with_piece(int g, int k, F f) {
    this->template with_tile_of<KEEP>(held, tiles.memory, g, k, f);
  }

  // The state that came in, or anew that at the start of a sequence.
  __device__ __forceinline__ void begin(bool anew) {
    const T* memory = this->first_memory(a, sample, anew);
    const T* read_weights = anew ? nullptr : static_cast<const T*>(a.read_weights) + sample * a.R * a.N;
    const T* usage = static_cast<const T*>(a.usage) + sample * a.N;
    for (int g = 0; g < this->groups(); ++g) {
      for (int k = 0; k < this->pieces(); ++k) with_piece<true>(g, k, [&](Tile<T, C>& m) { this->take(memory, g, k, m); });
      const int slot = this->group(g) + place.lane, of_sample = first_slot + slot;
      if (!P::fixed && place.lane < warp_slots)
        set_usage(slot, of_sample >= plan.N ? T(0) : anew ? T(of_sample == 0) : usage[of_sample]);
    }
    if constexpr (P::fixed) {
      own_weights = this->take_own(read_weights, plan.N);
      own_usage = used_slot() >= plan.N ? T(0) : anew ? T(used_slot() == 0) : usage[used_slot()];
      rank_slots();
    } else {
      this->take_rows(read_weights, plan.N, per_slot.read_weights);
      find_candidates();
    }
  }

  __device__ __forceinline__ void set_usage(int slot, T usage) {
    per_slot.usage[slot] = usage;
    per_slot.orders[slot] = first_slot + slot < plan.N ? order_of(usage) : taken<T>;
  }

  // The R least used slots of the warp, in order, for all to see.
  __device__ __forceinline__ void find_candidates() {
    for (int r = 0; r < plan.R; ++r) {
      Bits least = taken<T>;
      int where = this->group(0) + place.lane;
      for (int g = 0; g < this->groups() && place.lane < warp_slots; ++g) {
        const int slot = this->group(g) + place.lane;
        if (per_slot.orders[slot] < least) least = per_slot.orders[slot], where = slot;
      }
      const Bits order = warp_least(least);
      const unsigned slot = gpu::warp_min(least == order ? static_cast<unsigned>(where) : ~0u);
      if (place.lane < warp_slots && slot == static_cast<unsigned>(where)) per_slot.orders[slot] = taken<T>;
      if (place.lane == 0) {
        small.exchange.orders[place.warp * plan.heads + r] = order;
        small.exchange.candidates[place.warp * plan.heads + r] = static_cast<int>(first_slot + slot);
      }
    }
  }

  // Where the plan is known when compiled: the slot whose usage the lane has, and the least used slots of the warp, for all to
  // see. A slot's place among them is how many come before it; two lanes count half of them each. All is counted without
  // comparisons: a predicate takes three times as long as a sum. A slot that is not there comes after all that are, since it is
  // the last of what nothing comes before.
  __device__ __forceinline__ int used_slot() const { return this->own_pair() + place.lane / 4 % 2; }
  // -1 where `order` is below the other, else 0.
  __device__ __forceinline__ static Bits below(Bits order, Bits other) {
    return static_cast<Bits>((static_cast<uint64_t>(order) - other) >> 32);
  }
  struct alignas(4 * sizeof(Bits)) FourOrders {
    Bits at[4];
  };
  __device__ __forceinline__ static FourOrders load_orders(const Bits* from) {
    return *reinterpret_cast<const FourOrders*>(from);
  }
  __device__ __forceinline__ void rank_slots() {
    // Slots come in fours; a lane counts its own and the next, or the other two. Those before it come first where they are the same.
    const int own = used_slot() % warp_slots, four = own / 4, second = place.lane / 2 % 2;
    const Bits order = used_slot() < plan.N ? order_of(own_usage) : taken<T> - 1;
    Bits* orders = per_slot.orders + this->group(0);
    if (!second) orders[own] = order;  // two lanes have it
    gpu::sync_warp();
    const int near = second ? four ^ 2 : four, far = near ^ 1;
    const FourOrders first = load_orders(orders + 4 * near), then = load_orders(orders + 4 * far);
    const Bits after_far = order + (far < four ? 1 : 0);
    Bits sums[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      sums[i] = below(first.at[i], order + (4 * near + i < own ? 1 : 0)) + below(then.at[i], after_far);
    unsigned before = static_cast<unsigned>(-((sums[0] + sums[1]) + (sums[2] + sums[3])));
    before += gpu::shuffle_xor(before, 2);
    if (before < plan.R && !second) {
      small.exchange.orders[place.warp * plan.heads + before] = order;
      small.exchange.candidates[place.warp * plan.heads + before] = used_slot();
    }
  }

  // The R least used slots of all, for the warp itself, from the warps' candidates: every warp finds the same. Where a plan is
  // known when compiled, a warp finds which of its own candidates are among them.
  struct Chosen {
    int slots[fixed_heads<P>];  // of the warp's candidates
    unsigned ranks;             // of each a byte; R and more where others are chosen
    __device__ __forceinline__ int rank(int k) const { return static_cast<int>(ranks >> (8 * k) & 255); }
    // The slot that head r chooses, or -1 where it is none of the warp's.
    __device__ __forceinline__ int operator[](int r) const {
      int slot = -1;
#pragma unroll
      for (int k = 0; k < fixed_heads<P>; ++k) slot = rank(k) == r ? slots[k] : slot;
      return slot;
    }
  };
  __device__ __forceinline__ Chosen choose_of_own() const {
    static_assert(!P::fixed || fixed_heads<P> * P::warps == 32, "a candidate a lane");
    Chosen chosen;
    const int first = place.warp * plan.heads;
    const Bits order = small.exchange.orders[place.lane];
    const FourOrders own = load_orders(small.exchange.orders + first);
    unsigned before = 0;
#pragma unroll
    for (int k = 0; k < plan.R; ++k) {
      chosen.slots[k] = small.exchange.candidates[first + k];
      // Candidates lie in the order of their slots where their usage is the same.
      before -= static_cast<unsigned>(below(order, own.at[k] + (place.lane < first + k ? 1 : 0))) << (8 * k);
    }
    chosen.ranks = gpu::warp_sum(before);
    return chosen;
  }
  __device__ __forceinline__ const int* choose_of_candidates() const {
    const int warps = plan.warps * this->blocks(), count = warps * plan.R;
    int* chosen = small.exchange.chosen + place.warp * plan.heads;
    Bits past_order = 0;
    int past_slot = -1;
    for (int r = 0; r < plan.R; ++r) {
      Bits least = taken<T>;
      unsigned slot = ~0u;
      for (int i = place.lane; i < count; i += 32) {
        const int w = i / plan.R, j = i % plan.R;
        const int at = w % plan.warps * plan.heads + j;
        const int block = w / plan.warps;
        const Bits order = this->blocks() > 1 ? *gpu::of_block(small.exchange.orders + at, block) : small.exchange.orders[at];
        const int candidate =
            this->blocks() > 1 ? *gpu::of_block(small.exchange.candidates + at, block) : small.exchange.candidates[at];
        const bool left = order > past_order || (order == past_order && candidate > past_slot);
        if (left && (order < least || (order == least && static_cast<unsigned>(candidate) < slot))) {
          least = order;
          slot = static_cast<unsigned>(candidate);
        }
      }
      past_order = warp_least(least);
      past_slot = static_cast<int>(gpu::warp_min(least == past_order ? slot : ~0u));
      if (place.lane == 0) chosen[r] = past_slot;
    }
    gpu::sync_warp();
    return chosen;
  }

  template <class ChosenSlots>
  __device__ __forceinline__ void save_slots(int64_t t, const ChosenSlots& chosen) {
    int64_t* to = a.slots + (t * a.B + sample) * plan.R;
    if constexpr (P::fixed) {
      int slot = 0;
#pragma unroll
      for (int k = 0; k < plan.R; ++k) slot = place.lane == k ? chosen.slots[k] : slot;
      if (place.lane < plan.R && chosen.rank(place.lane) < plan.R) to[chosen.rank(place.lane)] = slot;
    } else if (rank == 0 && place.warp == 0) {
      for (int r = 0; r < plan.R; ++r)
        if (place.lane == r % 32) to[r] = chosen[r];
    }
  }
  // The state before step t.
  __device__ __forceinline__ void save_state(int64_t t) {
    const int64_t ld = mann_fast::padded_slots(plan.N);
    T* anchor = static_cast<T*>(a.anchors) + anchor_offset(t, a.anchor_every, a.B, sample, a.D + a.R, a.N);
    for (int g = 0; g < this->groups(); ++g)
      for (int k = 0; k < this->pieces(); ++k)
        with_piece<false>(g, k, [&](Tile<T, C>& m) { this->give_anchor(m, ld, g, k, anchor); });
    if constexpr (P::fixed) this->give_own(own_weights, ld, anchor + a.D * ld);
    else this->give_rows(per_slot.read_weights, ld, anchor + a.D * ld);
  }

  // Up to the sums that all must know.
  template <class ChosenSlots>
  __device__ __forceinline__ void write_and_compare(const Inputs<T>& in, const ChosenSlots& chosen, T* sums) {
    this->weigh_writes(in, chosen, per_slot.read_weights, per_slot.write_weights);
    gpu::sync_warp();
    const bool bounded = this->bounded(in.beta);
    for (int g = 0; g < this->groups(); ++g) {
      const auto compare = [&] {
        this->compare(
            in, 0, plan.heads, g, bounded, [&](int k, auto f) { with_piece<false>(g, k, f); }, per_slot.read_weights,
            sums + place.warp * plan.heads, small.exchange.maximum + place.warp * plan.heads, static_cast<T*>(nullptr),
            static_cast<T*>(nullptr));
      };
#pragma unroll 1
      for (int pass = 0; pass < 2; ++pass) {
        if ((pass == 0) == plan.read_first) {
          compare();
        } else {
          for (int k = 0; k < this->pieces(); ++k)
            with_piece<true>(g, k, [&](Tile<T, C>& m) { this->write(in, chosen[0], per_slot.write_weights, g, k, m); });
        }
      }
    }
    if (!bounded) this->soften(0, plan.heads, small.exchange.maximum, per_slot.read_weights, sums + place.warp * plan.heads);
    gpu::sync_warp();
  }

  // What only the inputs decide, of the lane's own head: ALONE found here, else it has been prepared.
  struct Prepared {
    typename Base::Shares shares;
    T key_square;
  };
  __device__ __forceinline__ Prepared prepared_of(const Inputs<T>& in, const T (&keys)[HEADS][C]) const {
    const int head = this->own_head();
    if constexpr (ALONE) return {this->own_shares(in), this->own_key_square(keys)};
    else return {{in.gate[head], in.rest[head]}, in.squares[head]};
  }
  // By one warp for a head, from keys and the gate's logit.
  __device__ __forceinline__ void prepare(const Inputs<T>& in, int head) const {
    constexpr int most = 4 * column_lanes, more = C * column_lanes - most;
    T key = in.keys[head * most + place.lane], square = key * key;
    if (place.lane < more) {
      key = in.keys[HEADS * most + head * more + place.lane];
      square += key * key;
    }
    square = add_warp<1>(square);
    if (place.lane > 0) return;
    gate_shares(in.gate[head], in.gate[head], in.rest[head]);
    in.squares[head] = square;
  }

  // What the step takes is loaded before the slots are chosen: by then it is there.
  __device__ __forceinline__ void take_own_step(const Inputs<T>& in, int64_t t) {
    T vectors[HEADS][C], keys[HEADS][C];
    this->load_beside(in.vectors, 0, vectors);
    this->load_beside(in.keys, this->own_head(), keys);
    const Prepared prepared = prepared_of(in, keys);
    const bool bounded = this->bounded(in.beta);
    const T beta = in.beta[this->own_head()];
    const Chosen chosen = choose_of_own();
    const int turn = turn_of(t);
    own_written = this->own_writes(prepared.shares, chosen[this->own_head()], own_weights);
    store_pair(per_slot.write_weights + this->own_at(), own_written);
    gpu::sync_warp();
    this->write_beside(vectors, chosen[0], per_slot.write_weights, held);
    Pair<T> dots, squares;
    own_weights = this->own_exponentials(keys, prepared.key_square, beta, held, bounded, small.exchange.maximum, dots, squares);
    store_pair(per_slot.read_weights + this->own_at(), own_weights);
    gpu::sync_warp();
    const T sum = this->over_slots(own_weights.at[0] + own_weights.at[1]);
    Four<T> weights[HEADS];
    this->load_slots(per_slot.read_weights, place.group, weights);
    this->store_row(reads(turn) + place.warp * plan.heads * plan.columns, this->own_weighted(held, weights));
    this->tell_own(sum, sums(turn));
    if (a.anchor_every > 0) save_slots(t, chosen);
  }

  // The warp's part of the reads.
  __device__ __forceinline__ void read() {
    T* to = small.exchange.reads + place.warp * plan.heads * plan.columns;
    for (int k = 0; k < this->pieces(); ++k)
      for (int first = 0; first < plan.heads; first += HEADS) {
        T sum[HEADS * C] = {};
        for (int g = 0; g < this->groups(); ++g) {
          Four<T> weights[HEADS];
          this->load_weights(per_slot.read_weights, first, this->slots(g), weights);
          with_piece<false>(g, k, [&](Tile<T, C>& m) { add_weighted<HEADS, C>(m, weights, sum); });
        }
        store_warp_sums<HEADS, C>(sum, place.lane, to + first * plan.columns + this->first_column(k), plan.columns);
      }
  }

  // Where the plan is known when compiled and a scan gives out a step's reads in the next, two take turns.
  __device__ __forceinline__ static int turn_of(int64_t t) { return P::fixed && !ALONE ? static_cast<int>(t % 2) : 0; }
  __device__ __forceinline__ T* reads(int turn) const {
    return small.exchange.reads + turn * plan.warps * plan.heads * plan.columns;
  }
  __device__ __forceinline__ T* sums(int turn) const { return small.exchange.sums + turn * plan.warps * plan.heads; }

  // A number of the reads [R, D], when all have told their parts.
  __device__ __forceinline__ T read_at(int j) const { return read_at(vector_at(plan, j), j / plan.D); }
  __device__ __forceinline__ T read_at(int at, int head, int turn = 0) const {
    T sum;
    if constexpr (P::fixed) sum = this->total_of(sums(turn), head);
    else sum = this->total(sums(turn), head, plan.heads);
    return this->total(reads(turn), at, plan.heads * plan.columns) * gpu::reciprocal(sum);
  }

  __device__ __forceinline__ void use() {
    const T decay = static_cast<T>(a.usage_decay);
    for (int g = 0; g < this->groups(); ++g) {
      const int slot = this->group(g) + place.lane;
      if (place.lane >= warp_slots) continue;
      T total = per_slot.read_weights[slot] + per_slot.write_weights[slot];
      for (int r = 1; r < plan.R; ++r)
        total += per_slot.read_weights[r * plan.span + slot] + per_slot.write_weights[r * plan.span + slot];
      set_usage(slot, decay * per_slot.usage[slot] + total);
    }
  }
  __device__ __forceinline__ void use_own() {
    const T first = own_weights.at[0] + own_written.at[0], second = own_weights.at[1] + own_written.at[1];
    const bool upper = place.lane & 4;
    T total = (upper ? second : first) + gpu::shuffle_xor(upper ? first : second, 4);
    total += gpu::shuffle_xor(total, 2);
    own_usage = static_cast<T>(a.usage_decay) * own_usage + total;
  }

  // Step t up to the sums that all must know, before a barrier,
  __device__ __forceinline__ void begin_step(const Inputs<T>& in, int64_t t) {
    if (anchors.due(t)) save_state(t);
    take_step(in, t);
  }
  __device__ __forceinline__ void take_step(const Inputs<T>& in, int64_t t) {
    if constexpr (P::fixed) {
      take_own_step(in, t);
    } else {
      const int* chosen = choose_of_candidates();
      write_and_compare(in, chosen, small.exchange.sums);
      read();
      if (a.anchor_every > 0) save_slots(t, chosen);
    }
  }
  // and what comes after it: the state before the next step. Where that begins anew, so does it.
  __device__ __forceinline__ void end_step(bool anew, int turn = 0) {
    if (anew) return begin(true);
    if constexpr (P::fixed) {
      const T scale = gpu::reciprocal(this->total_of(sums(turn), this->own_head()));
#pragma unroll
      for (int i = 0; i < 2; ++i) own_weights.at[i] *= scale;
      use_own();
      rank_slots();
    } else {
      this->normalise(small.exchange.sums, per_slot.read_weights);
      gpu::sync_warp();
      use();
      find_candidates();  // a lane's own slots again
    }
  }

  __device__ __forceinline__ void end() {
    T* memory = static_cast<T*>(a.out_memory) + sample * a.N * a.D;
    T* usage = static_cast<T*>(a.out_usage) + sample * a.N;
    for (int g = 0; g < this->groups(); ++g) {
      for (int k = 0; k < this->pieces(); ++k) with_piece<false>(g, k, [&](Tile<T, C>& m) { this->give(m, g, k, memory); });
      const int slot = this->group(g) + place.lane;
      if (!P::fixed && place.lane < warp_slots && first_slot + slot < plan.N) usage[first_slot + slot] = per_slot.usage[slot];
    }
    T* read_weights = static_cast<T*>(a.out_read_weights) + sample * a.R * a.N;
    if constexpr (P::fixed) {
      if (place.lane / 2 % 2 == 0 && used_slot() < plan.N) usage[used_slot()] = own_usage;
      this->give_own(own_weights, plan.N, read_weights);
    } else {
      this->give_rows(per_slot.read_weights, plan.N, read_weights);
    }
  }
};

}  // namespace cuda
}  // namespace mann_fast

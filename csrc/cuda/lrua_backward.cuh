// A step of the memory back, as a block takes it: lrua_scan_backward.cu and cell_backward.cu go through the steps.
#pragma once
#include "lrua_scan.cuh"

namespace mann_fast {
namespace cuda {

template <class T>
struct LruaBackwardRoom {
  static int heads_at_once(const Plan& plan) { return lrua_heads_at_once(plan); }
  struct Small {
    InputTurns<Inputs<T>> in;
    Exchange<T> exchange;
    template <class P>
    __device__ __host__ Small(Carver& carver, const P& plan) : in(carver, plan, true), exchange(carver, plan, true) {}
  };
  struct Slots {
    // Of the steps of a replay: read weights before each and after the last, dot products and squares of each.
    T *read_weights, *dots, *squares;
    T* prepared;                                    // of each step, of every head: square of the key, shares of the gate
    T *write_weights, *later, *grads, *of_squares;  // later: gradients of the read weights that come out of a step
    template <class P>
    __device__ __host__ Slots(Carver& carver, const P& plan, int64_t every)
        : read_weights(carver.take<T>((every + 1) * plan.heads * plan.span)),
          dots(carver.take<T>(every * plan.heads * plan.span)), squares(carver.take<T>(every * plan.span)),
          prepared(carver.take<T>(every * 3 * plan.heads)), write_weights(carver.take<T>(plan.heads * plan.span)),
          later(carver.take<T>(plan.heads * plan.span)), grads(carver.take<T>(plan.heads * plan.span)),
          of_squares(carver.take<T>(plan.heads * plan.span)) {}
  };
  struct Tiles {
    T *memories, *grad;  // before each step and after the last
    template <class P>
    __device__ __host__ Tiles(Carver& carver, const P& plan, int64_t every)
        : memories(carver.take<T>((every + 1) * tile_numbers(plan))),
          grad(carver.take<T>(plan.resident ? 0 : tile_numbers(plan))) {}
  };
};

template <class T, int C, int HEADS, bool RESIDENT, bool ALONE = false, class P = Plan>
struct LruaBackward : LruaThread<T, C, HEADS, RESIDENT, ALONE, P> {
  using Base = LruaThread<T, C, HEADS, RESIDENT, ALONE, P>;
  using Base::OWN, Base::place, Base::plan, Base::first_slot, Base::rank;
  const LruaScanBackward& a;
  const int64_t sample;
  const int every;
  const bool of_reads;  // whether the reads have a gradient
  typename LruaBackwardRoom<T>::Small small;
  typename LruaBackwardRoom<T>::Slots per_slot;
  typename LruaBackwardRoom<T>::Tiles tiles;
  Tile<T, C> held;  // the gradient of the memory
  int visits = 0;   // steps gone through, in either direction
  // Where the plan is known when compiled, of the lane's own head and slots: exponentials of a step of the replay; gradients of
  // the read weights that come out of a step, from the steps after it and in all.
  Pair<T> own_weights{}, own_later{}, own_grads{};
  Tile<T, C> current;  // the memory before a step of the replay, or after one that is gone back through

  __device__ __forceinline__ LruaBackward(const LruaScanBackward& a, const P& plan, int every, Places places, int64_t sample,
                                          int rank, bool of_reads)
      : Base(plan, rank, a.eps), a(a), sample(sample), every(every), of_reads(of_reads),
        small(places.of(ALONE || RESIDENT || plan.near_small), plan),
        per_slot(places.of((RESIDENT && !ALONE) || plan.near_slots), plan, every),
        tiles(places.of(plan.near_tiles), plan, every) {}

  __device__ __forceinline__ Inputs<T> inputs(int visit) const { return small.in.of(visit, plan, true); }

  template <bool KEEP, class F>
  __device__ __forceinline__ void with_grad(int g, int k, F f) {
    this->template with_tile_of<KEEP>(held, tiles.grad, g, k, f);
  }
  __device__ __forceinline__ T* memory(int step) const { return tiles.memories + step * tile_numbers(plan); }
  // The steps of a replay together may have more than 32 bits count, but not where the memory is in registers: then they are in
  // shared memory, or were counted (plan_cell).
  using Offset = std::conditional_t<RESIDENT, int, int64_t>;
  __device__ __forceinline__ Offset weights_of_step() const { return static_cast<Offset>(plan.heads) * plan.span; }
  __device__ __forceinline__ T* read_weights(int step) const { return per_slot.read_weights + step * weights_of_step(); }
  __device__ __forceinline__ T* dots(int step) const { return per_slot.dots + step * weights_of_step(); }
  __device__ __forceinline__ T* squares(int step) const { return per_slot.squares + static_cast<Offset>(step) * plan.span; }
  __device__ __forceinline__ T* sums() const { return small.exchange.sums + visits % 2 * plan.warps * plan.heads; }

  __device__ __forceinline__ void begin() {
    const T *of_memory = static_cast<const T*>(a.grad_memory), *of_weights = static_cast<const T*>(a.grad_read_weights);
    this->begin_gradients(of_memory ? of_memory + sample * a.N * a.D : nullptr,
                          of_weights ? of_weights + sample * a.R * a.N : nullptr, held, tiles.grad, per_slot.later);
    if (P::fixed && of_weights) own_later = this->take_own(of_weights + sample * a.R * a.N, plan.N);
    if (a.grad_start) this->begin_start(static_cast<T*>(a.grad_start) + sample * a.N * a.D);
  }

  // Where the replay of the step before `end` begins; 0 where there is none.
  __device__ __forceinline__ int64_t replay_before(int64_t end) const {
    return end > 0 ? a.sequences.replay_from(end - 1, every, a.B, sample) : 0;
  }

  __device__ __forceinline__ void begin_replay(int64_t first) {
    const int64_t ld = mann_fast::padded_slots(plan.N);
    const bool anew = a.sequences.begins(first, a.B, sample);
    const T *anchor = nullptr, *weights = nullptr;
    if (first > 0 && !anew) {
      anchor = static_cast<const T*>(a.anchors) + anchor_offset(first, a.anchor_every, a.B, sample, a.D + a.R, a.N);
      weights = anchor + a.D * ld;
    } else if (!anew) {
      weights = static_cast<const T*>(a.read_weights) + sample * a.R * a.N;
    }
    if constexpr (P::fixed) {
      // Before the first step it is only needed here.
      if (anchor) this->take_anchor(anchor, ld, 0, 0, current);
      else this->take(this->first_memory(a, sample, anew), 0, 0, current);
    } else {
      this->begin_memory(anchor, this->first_memory(a, sample, anew), memory(0));
    }
    if constexpr (P::fixed) store_pair(read_weights(0) + this->own_at(), this->take_own(weights, anchor ? ld : plan.N));
    else this->take_rows(weights, anchor ? ld : plan.N, read_weights(0));
    gpu::sync_warp();
  }

  // A step forward again, from the memory before it to the one after it.
  __device__ __forceinline__ void replay(const Inputs<T>& in, int step) {
    this->weigh_writes(in, in.slots, read_weights(step), per_slot.write_weights);
    gpu::sync_warp();
    const bool bounded = this->bounded(in.beta);
    for (int g = 0; g < this->groups(); ++g) {
#pragma unroll 1
      for (int pass = 0; pass < 2; ++pass) {
        if ((pass == 0) == plan.read_first) {
          const T* addressed = memory(plan.read_first ? step : step + 1);
          const auto open = [&](int k, auto f) {
            Tile<T, C> m;
            load_tile(addressed, this->piece(g, k), this->threads(), m);
            f(m);
          };
          this->compare(in, 0, plan.heads, g, bounded, open, read_weights(step + 1), sums() + place.warp * plan.heads,
                        small.exchange.maximum + place.warp * plan.heads, dots(step), squares(step));
        } else {
          for (int k = 0; k < this->pieces(); ++k) {
            Tile<T, C> m;
            load_tile(memory(step), this->piece(g, k), this->threads(), m);
            this->write(in, in.slots[0], per_slot.write_weights, g, k, m);
            store_tile(memory(step + 1), this->piece(g, k), this->threads(), m);
          }
        }
      }
    }
    if (!bounded) this->soften(0, plan.heads, small.exchange.maximum, read_weights(step + 1), sums() + place.warp * plan.heads);
  }

  // A thread's own tile where the plan is known when compiled, four numbers at once.
  __device__ __forceinline__ void load_own(const T* tiles, Tile<T, C>& m) const {
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const Four<T> four = load_four(tiles + 4 * (c * this->threads() + gpu::thread()));
#pragma unroll
      for (int s = 0; s < lane_slots; ++s) m.at[s][c] = four.at[s];
    }
  }
  __device__ __forceinline__ void store_own(T* tiles, const Tile<T, C>& m) const {
#pragma unroll
    for (int c = 0; c < C; ++c)
      *reinterpret_cast<Four<T>*>(tiles + 4 * (c * this->threads() + gpu::thread())) = {m.at[0][c], m.at[1][c], m.at[2][c],
                                                                                        m.at[3][c]};
  }

  // The same as `replay`.
  __device__ __forceinline__ void replay_own(const Inputs<T>& in, int step) {
    T vectors[HEADS][C], keys[HEADS][C];
    Tile<T, C>& m = current;
    this->load_beside(in.vectors, 0, vectors);
    this->load_beside(in.keys, this->own_head(), keys);
    const T key_square = this->own_key_square(keys);
    const bool bounded = this->bounded(in.beta);
    const auto shares = this->own_shares(in);
    T* kept = prepared(step);
    if (place.warp == 0 && (place.lane & ~6) == 0) kept[0] = key_square, kept[1] = shares.gate, kept[2] = shares.rest;
    const Pair<T> writes = this->own_writes(shares, in.slots[this->own_head()], own_read_weights(step));
    store_pair(per_slot.write_weights + this->own_at(), writes);
    gpu::sync_warp();
    this->write_beside(vectors, in.slots[0], per_slot.write_weights, m);
    store_own(memory(step + 1), m);
    Pair<T> own_dots, own_squares;
    own_weights = this->own_exponentials(keys, key_square, in.beta[this->own_head()], m, bounded, small.exchange.maximum,
                                         own_dots, own_squares);
    store_pair(dots(step) + this->own_at(), own_dots);
    if (this->own_head() == 0) store_pair(squares(step) + this->own_pair(), own_squares);
    this->tell_own(this->over_slots(own_weights.at[0] + own_weights.at[1]), sums());
  }
  __device__ __forceinline__ Pair<T> own_read_weights(int step) const { return load_pair(read_weights(step) + this->own_at()); }
  __device__ __forceinline__ T* prepared(int step) const {
    return per_slot.prepared + (step * plan.heads + this->own_head()) * 3;
  }
  // One number of every head and warp, of sharpness, key squares and gates.
  __device__ __forceinline__ T* own_scalars(int kind) const { return small.exchange.scalars + kind * plan.heads * plan.warps; }

  __device__ __forceinline__ void gather_own(const Inputs<T>& in, int step) {
    load_own(memory(step + 1), current);
    own_grads = own_later;
    const Pair<T> weights = own_read_weights(step + 1);
    const auto tell_mean = [&] {
      this->tell_own(this->over_slots(weights.at[0] * own_grads.at[0] + weights.at[1] * own_grads.at[1]), sums());
    };
    if (!of_reads) return tell_mean();
    T rows[HEADS][C];
    this->load_beside(in.grads, this->own_head(), rows);
    const Pair<T> sum = this->own_dots(current, rows);
    own_grads.at[0] += sum.at[0], own_grads.at[1] += sum.at[1];
    // What reaches the memory by the reads is added while the mean comes together.
    Four<T> of[HEADS];
    this->load_slots(read_weights(step + 1), 0, of);
    this->load_beside(in.grads, 0, rows);
    tell_mean();
    add_products<HEADS, C>(of, rows, held);
  }

  __device__ __forceinline__ void back_own(const Inputs<T>& in, int step) {
    const int head = this->own_head(), at = this->own_at();
    const T mean = this->total_of(sums(), head), beta = in.beta[head];
    const Pair<T> weights = own_read_weights(step + 1), before = own_read_weights(step), dot = load_pair(dots(step) + at),
                  square = load_pair(squares(step) + this->own_pair());
    const T* kept = prepared(step);
    const T key_square = kept[0];
    const typename Base::Shares shares{kept[1], kept[2]};
    store_pair(per_slot.write_weights + at, this->own_writes(shares, in.slots[head], before));
    T of_beta = 0, of_key = 0;
    Pair<T> of_dot, of_square;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const T of_score = weights.at[i] * (own_grads.at[i] - mean);
      const ScoreGradient<T> of = score_gradient(of_score, dot.at[i], beta, key_square, square.at[i], this->eps);
      of_dot.at[i] = of.dot;
      of_square.at[i] = of.slot_square;
      of_beta += of.beta;
      of_key += of.key_square;
    }
    store_pair(per_slot.grads + at, of_dot);
#pragma unroll
    for (int i = 0; i < 2; ++i) of_square.at[i] = this->over_heads(of_square.at[i]);
    if (head == 0) store_pair(per_slot.of_squares + this->own_pair(), of_square);
    gpu::sync_warp();
    of_beta = this->over_slots(of_beta);
    of_key = this->over_slots(of_key);
    this->tell_own(of_beta, own_scalars(0));
    through_read_own(in, gpu::shuffle(of_key, 2 * place.group));
    through_write_own(in, before, shares);
  }

  // of_key: of the square of the key of head place.group.
  __device__ __forceinline__ void through_read_own(const Inputs<T>& in, T of_key) {
    Four<T> of[HEADS];
    T rows[HEADS][C];
    const Tile<T, C>& m = current;
    this->load_slots(per_slot.grads, 0, of);
    this->load_beside(in.keys, 0, rows);
    add_products<HEADS, C>(of, rows, held);
    const Four<T> of_squares = load_four(per_slot.of_squares + this->slots(0));
#pragma unroll
    for (int s = 0; s < lane_slots; ++s)
#pragma unroll
      for (int c = 0; c < C; ++c) held.at[s][c] += 2 * of_squares.at[s] * m.at[s][c];
    this->load_slots(per_slot.grads, place.group, of);
    auto row = this->own_weighted(m, of);
    const auto key = this->load_row(in.keys);
#pragma unroll
    for (int c = 0; c < C; ++c) row.at[c] += 2 * of_key * key.at[c];
    this->store_row(small.exchange.reads + place.warp * plan.heads * plan.columns, row);
  }

  template <class Shares>
  __device__ __forceinline__ void through_write_own(const Inputs<T>& in, const Pair<T>& before, const Shares& shares) {
    T rows[HEADS][C], of_gate = 0;
    this->load_beside(in.vectors, this->own_head(), rows);
    const Pair<T> sum = this->own_dots(held, rows);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const T target = in.slots[this->own_head()] == this->own_pair() + i ? T(1) : T(0);
      of_gate += sum.at[i] * (before.at[i] - target) * (shares.gate * shares.rest);
      own_later.at[i] = sum.at[i] * shares.gate;
    }
    this->tell_own(this->over_slots(of_gate), own_scalars(2));
    Four<T> weights[HEADS];
    this->load_slots(per_slot.write_weights, place.group, weights);
    this->store_row(small.exchange.of_vectors + place.warp * plan.heads * plan.columns, this->own_weighted(held, weights));
    this->erase(in.slots[0], held);
  }

  // The gradient that reaches this step's read weights, and its mean under them.
  __device__ __forceinline__ void gather(const Inputs<T>& in, int step) {
    if constexpr (P::fixed) gather_own(in, step);
    else gather_any(in, step);
  }
  __device__ __forceinline__ void gather_any(const Inputs<T>& in, int step) {
    for (int g = 0; g < this->groups(); ++g) {
      const int own_slot = this->own(g);
      for (int first = 0; first < plan.heads; first += HEADS) {
        T sum[lane_slots * HEADS] = {}, mean[OWN];
        for (int k = 0; of_reads && k < this->pieces(); ++k) {
          T rows[HEADS][C];
          load_rows<HEADS, C>(in.grads + first * plan.columns + this->first_column(k), plan.columns, rows);
          Tile<T, C> m;
          load_tile(memory(step + 1), this->piece(g, k), this->threads(), m);
          add_dots<HEADS, C>(m, rows, sum);
        }
        if (of_reads) add_lanes<4, 1, lane_slots * HEADS>(sum, place.lane);
#pragma unroll
        for (int j = 0; j < OWN; ++j) {
          const int at = (first + place.own_head + j) * plan.span + own_slot;
          const T grad = sum[j] + per_slot.later[at];
          mean[j] = read_weights(step + 1)[at] * grad;
          if (place.owner) per_slot.grads[at] = grad;
        }
        this->tell_sums(mean, first, g > 0, sums() + place.warp * plan.heads);
      }
    }
  }

  // From the gradient of the weights to that of the dot products and squares; own lanes only.
  __device__ __forceinline__ void through_softmax(const Inputs<T>& in, int step) {
    T* scalars = small.exchange.scalars + place.warp * 3 * plan.heads;
    for (int first = 0; first < plan.heads; first += HEADS) {
      const typename Base::Own mean = this->own_totals(sums(), first);
      T key_squares[HEADS] = {}, own_key[OWN];
      for (int k = 0; k < this->pieces(); ++k) {
        T keys[HEADS][C];
        load_rows<HEADS, C>(in.keys + first * plan.columns + this->first_column(k), plan.columns, keys);
        add_row_squares<HEADS, C>(keys, key_squares);
      }
      own_key_squares<HEADS>(place, key_squares, own_key);
      T of_beta[OWN] = {}, of_key[OWN] = {};
      for (int g = 0; g < this->groups(); ++g) {
        const int own_slot = this->own(g);
        const T square = squares(step)[own_slot];
#pragma unroll
        for (int j = 0; j < OWN; ++j) {
          const int r = first + place.own_head + j, at = r * plan.span + own_slot;
          const T of_score = read_weights(step + 1)[at] * (per_slot.grads[at] - mean.at[j]);
          const ScoreGradient<T> of = score_gradient(of_score, dots(step)[at], in.beta[r], own_key[j], square, this->eps);
          if (HEADS == 1) gpu::sync_warp();  // two lanes read what one of them writes
          if (place.owner) {
            per_slot.grads[at] = of.dot;
            per_slot.of_squares[at] = of.slot_square;
          }
          of_beta[j] += of.beta;
          of_key[j] += of.key_square;
        }
      }
      this->tell_sums(of_beta, first, false, scalars);
      this->tell_sums(of_key, first, false, scalars + plan.heads);
    }
  }

  // The gradient of the memory from reads and similarities, and those of the keys.
  __device__ __forceinline__ void through_read(const Inputs<T>& in, int step, bool through_weights, bool of_similarity) {
    T* of_keys = small.exchange.reads + place.warp * plan.heads * plan.columns;
    const T* addressed = memory(plan.read_first ? step : step + 1);
    for (int k = 0; k < this->pieces(); ++k) {
      for (int first = 0; first < plan.heads; first += HEADS) {
        const int corner = first * plan.columns + this->first_column(k);
        T sum[HEADS * C] = {};
        for (int g = 0; g < this->groups(); ++g) {
          with_grad<true>(g, k, [&](Tile<T, C>& grad) {
            Four<T> weights[HEADS];
            T rows[HEADS][C];
            if (through_weights && of_reads) {
              this->load_weights(read_weights(step + 1), first, this->slots(g), weights);
              load_rows<HEADS, C>(in.grads + corner, plan.columns, rows);
              add_products<HEADS, C>(weights, rows, grad);
            }
            if (!of_similarity) return;
            this->load_weights(per_slot.grads, first, this->slots(g), weights);
            load_rows<HEADS, C>(in.keys + corner, plan.columns, rows);
            add_products<HEADS, C>(weights, rows, grad);
            Tile<T, C> m;
            load_tile(addressed, this->piece(g, k), this->threads(), m);
            add_weighted<HEADS, C>(m, weights, sum);
            this->load_weights(per_slot.of_squares, first, this->slots(g), weights);
            add_by_norm<HEADS, C>(m, weights, grad);
          });
        }
        if (!of_similarity) continue;
        store_warp_sums<HEADS, C>(sum, place.lane, of_keys + corner, plan.columns);
      }
    }
  }

  // Back through the write: gradients of write vectors, gates and the read weights of the step before; then the erased slot's
  // is nought.
  __device__ __forceinline__ void through_write(const Inputs<T>& in, int step) {
    T* of_vectors = small.exchange.of_vectors + place.warp * plan.heads * plan.columns;
    T* of_gates = small.exchange.scalars + (place.warp * 3 + 2) * plan.heads;
    for (int first = 0; first < plan.heads; first += HEADS) {
      T of_gate[OWN] = {};
      for (int g = 0; g < this->groups(); ++g) {
        T sum[lane_slots * HEADS] = {};
        for (int k = 0; k < this->pieces(); ++k) {
          T rows[HEADS][C];
          load_rows<HEADS, C>(in.vectors + first * plan.columns + this->first_column(k), plan.columns, rows);
          with_grad<false>(g, k, [&](Tile<T, C>& grad) { add_dots<HEADS, C>(grad, rows, sum); });
        }
        add_lanes<4, 1, lane_slots * HEADS>(sum, place.lane);
        const int own_slot = this->own(g);
#pragma unroll
        for (int j = 0; j < OWN; ++j) {
          const int r = first + place.own_head + j, at = r * plan.span + own_slot;
          if (r >= plan.R) continue;
          const T target = this->is_target(in.slots, r, first_slot + own_slot) ? T(1) : T(0);
          of_gate[j] += sum[j] * (read_weights(step)[at] - target) * (in.gate[r] * in.rest[r]);
          if (place.owner) per_slot.later[at] = sum[j] * in.gate[r];
        }
      }
      this->tell_sums(of_gate, first, false, of_gates);
      for (int k = 0; k < this->pieces(); ++k) {
        T sum[HEADS * C] = {};
        for (int g = 0; g < this->groups(); ++g) {
          Four<T> weights[HEADS];
          this->load_weights(per_slot.write_weights, first, this->slots(g), weights);
          with_grad<false>(g, k, [&](Tile<T, C>& grad) { add_weighted<HEADS, C>(grad, weights, sum); });
        }
        store_warp_sums<HEADS, C>(sum, place.lane, of_vectors + first * plan.columns + this->first_column(k), plan.columns);
      }
    }
    for (int g = 0; g < this->groups(); ++g)
      for (int s = 0; s < lane_slots; ++s) {
        if (first_slot + this->slots(g) + s != in.slots[0]) continue;
        for (int k = 0; k < this->pieces(); ++k)
          with_grad<true>(g, k, [&](Tile<T, C>& grad) {
#pragma unroll
            for (int each = 0; each < lane_slots; ++each)
#pragma unroll
              for (int c = 0; c < C; ++c) grad.at[each][c] = each == s ? T(0) : grad.at[each][c];
          });
      }
  }

  // Adds to the warp's gradient of each key what comes from the key's own square.
  __device__ __forceinline__ void add_key_squares(const Inputs<T>& in) {
    T* of_keys = small.exchange.reads + place.warp * plan.heads * plan.columns;
    const T* of_squares = small.exchange.scalars + (place.warp * 3 + 1) * plan.heads;
    gpu::sync_warp();
    for (int i = place.lane; i < plan.R * plan.columns; i += 32) of_keys[i] += 2 * of_squares[i / plan.columns] * in.keys[i];
  }

  __device__ __forceinline__ void back(const Inputs<T>& in, int step) {
    if constexpr (P::fixed) back_own(in, step);
    else back_any(in, step);
  }
  __device__ __forceinline__ void back_any(const Inputs<T>& in, int step) {
    through_softmax(in, step);
    this->weigh_writes(in, in.slots, read_weights(step), per_slot.write_weights);
    gpu::sync_warp();
    through_read(in, step, true, !plan.read_first);
    through_write(in, step);
    if (plan.read_first) through_read(in, step, false, true);
    add_key_squares(in);
  }

  // Back through step t, number `step` of its replay, where a sample has one block; then a barrier.
  __device__ __forceinline__ void step_back(const Inputs<T>& in, int64_t, int step) {
    gather(in, step);
    gpu::sync();
    back(in, step);
  }

  // The gradients of what a step took, when all have told their parts: of numbers that lie `at` a place of [heads, columns],
  // and [R].
  __device__ __forceinline__ T key_gradient(int at) const {
    return this->total(small.exchange.reads, at, plan.heads * plan.columns);
  }
  __device__ __forceinline__ T vector_gradient(int at) const {
    return this->total(small.exchange.of_vectors, at, plan.heads * plan.columns);
  }
  __device__ __forceinline__ T gate_gradient(int r) const {
    if constexpr (P::fixed) return this->total_of(own_scalars(2), r);
    else return this->total(small.exchange.scalars, 2 * plan.heads + r, 3 * plan.heads);
  }
  __device__ __forceinline__ T sharpness_gradient(int r) const {
    if constexpr (P::fixed) return this->total_of(own_scalars(0), r);
    else return this->total(small.exchange.scalars, r, 3 * plan.heads);
  }

  // So many steps from `first` forward again; the inputs of the first are there, and so are those of the last once more after it.
  template <class Stream>
  __device__ __forceinline__ void replay_all(Stream& stream, int64_t first, int count) {
    begin_replay(first);
    for (int step = 0; step < count; ++step) {
      stream.ask((first + (step + 1 < count ? step + 1 : count - 1)) * a.B + sample);
      if constexpr (P::fixed) replay_own(inputs(visits), step);
      else replay(inputs(visits), step);
      stream.put(inputs(visits + 1));
      this->sync();
      if constexpr (P::fixed) {
        const T scale = gpu::reciprocal(this->total_of(sums(), this->own_head()));
        store_pair(read_weights(step + 1) + this->own_at(), Pair<T>{own_weights.at[0] * scale, own_weights.at[1] * scale});
      } else {
        this->normalise(sums(), read_weights(step + 1));
      }
      gpu::sync_warp();
      ++visits;
    }
  }

  // Having gone back through a step at which the sample began anew.
  __device__ __forceinline__ void through_start() {
    own_later = {};
    Base::through_start(held, tiles.grad, per_slot.later, static_cast<T*>(a.grad_start) + sample * a.N * a.D);
  }

  __device__ __forceinline__ void end() {
    T* memory = static_cast<T*>(a.grad_in_memory) + sample * a.N * a.D;
    for (int g = 0; g < this->groups(); ++g)
      for (int k = 0; k < this->pieces(); ++k) with_grad<false>(g, k, [&](Tile<T, C>& m) { this->give(m, g, k, memory); });
    T* of_weights = static_cast<T*>(a.grad_in_read_weights) + sample * a.R * a.N;
    if constexpr (P::fixed) this->give_own(own_later, plan.N, of_weights);
    else this->give_rows(per_slot.later, plan.N, of_weights);
  }
};

}  // namespace cuda
}  // namespace mann_fast

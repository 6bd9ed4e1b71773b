// lrua_scan (a step is a scan of one), forward and backward: one launch for all steps.
//
// Forward, a step: choose the slots from what every warp found least used; write; compare; tell sums and reads | meet |
// weights, usage, the least used of the warp; the next step's inputs put in their places | meet |. Two meetings a step.
// Backward takes `anchor_every` steps at a time: replays them from the anchor, a memory for each kept, one meeting a step; then
// goes back through them with two. Similarities beyond a bound cost one meeting more.
#include "kernels.h"
#include "scan.cuh"

namespace mann_fast {
namespace cuda {
namespace {

// ---- where everything lies ----------------------------------------------------------------------------------------

template <class T>
struct Forward {
  struct Small {
    InputTurns<T> in;
    Exchange<T> exchange;
    __device__ __host__ Small(Carver& carver, const Plan& plan) : in(carver, plan, false), exchange(carver, plan, false) {}
  };
  struct Slots {
    T *read_weights, *write_weights, *usage;
    typename Order<T>::Bits* orders;
    __device__ __host__ Slots(Carver& carver, const Plan& plan, int64_t)
        : read_weights(carver.take<T>(plan.heads * plan.span)), write_weights(carver.take<T>(plan.heads * plan.span)),
          usage(carver.take<T>(plan.span)), orders(carver.take<typename Order<T>::Bits>(plan.span)) {}
  };
  struct Tiles {
    T* memory;
    __device__ __host__ Tiles(Carver& carver, const Plan& plan, int64_t)
        : memory(carver.take<T>(plan.resident ? 0 : plan.tile_numbers())) {}
  };
};

template <class T>
struct Backward {
  struct Small {
    InputTurns<T> in;
    Exchange<T> exchange;
    __device__ __host__ Small(Carver& carver, const Plan& plan) : in(carver, plan, true), exchange(carver, plan, true) {}
  };
  struct Slots {
    // Of the steps of a replay: read weights before each and after the last, dot products and squares of each.
    T *read_weights, *dots, *squares;
    T *write_weights, *later, *grads, *of_squares;  // later: gradients of the read weights that come out of a step
    __device__ __host__ Slots(Carver& carver, const Plan& plan, int64_t every)
        : read_weights(carver.take<T>((every + 1) * plan.heads * plan.span)),
          dots(carver.take<T>(every * plan.heads * plan.span)), squares(carver.take<T>(every * plan.span)),
          write_weights(carver.take<T>(plan.heads * plan.span)), later(carver.take<T>(plan.heads * plan.span)),
          grads(carver.take<T>(plan.heads * plan.span)), of_squares(carver.take<T>(plan.heads * plan.span)) {}
  };
  struct Tiles {
    T *memories, *grad;  // before each step and after the last
    __device__ __host__ Tiles(Carver& carver, const Plan& plan, int64_t every)
        : memories(carver.take<T>((every + 1) * plan.tile_numbers())),
          grad(carver.take<T>(plan.resident ? 0 : plan.tile_numbers())) {}
  };
};

// The pieces of a block's memory: near is shared memory, far this block's part of scratch.
struct Places {
  Carver near, far;
  __device__ __forceinline__ Places(const Plan& plan, unsigned char* scratch)
      : near(gpu::shared_memory()), far(scratch + gpu::block() * plan.scratch) {}
  __device__ __forceinline__ Carver& of(bool is_near) { return is_near ? near : far; }
};

template <class Side>
void place(Plan& plan, int64_t every, const gpu::Limits& limits) {
  Carver small(nullptr), slots(nullptr), tiles(nullptr);
  typename Side::Small(small, plan);
  typename Side::Slots(slots, plan, every);
  typename Side::Tiles(tiles, plan, every);
  plan.shared = plan.scratch = 0;
  const auto fit = [&](const Carver& part) {
    const bool near = plan.shared + part.used <= limits.shared;
    (near ? plan.shared : plan.scratch) += part.used;
    return near;
  };
  plan.near_small = fit(small);
  plan.near_slots = fit(slots);
  plan.near_tiles = fit(tiles);
}

// ---- forward ------------------------------------------------------------------------------------------------------

template <class T, int C, int H, bool RESIDENT>
struct ForwardScan : Thread<T, C, H, RESIDENT> {
  using Base = Thread<T, C, H, RESIDENT>;
  using Bits = typename Order<T>::Bits;
  using Base::OWN, Base::place, Base::plan, Base::first_slot, Base::rank;
  const LruaScan& a;
  const int64_t sample;
  typename Forward<T>::Small small;
  typename Forward<T>::Slots per_slot;
  typename Forward<T>::Tiles tiles;
  Tile<T, C> held;

  __device__ __forceinline__ ForwardScan(const LruaScan& a, const Plan& plan, Places places)
      : Base(plan, static_cast<int>(gpu::block() % plan.cluster), a.eps, a.shared_target), a(a), sample(gpu::block() / plan.cluster), small(places.of(plan.near_small), plan),
        per_slot(places.of(plan.near_slots), plan, 0), tiles(places.of(plan.near_tiles), plan, 0) {}

  __device__ __forceinline__ Inputs<T> inputs(int64_t step) const { return small.in.of(step, plan, false); }

  // Calls f with a piece of the memory, and keeps what f made of it where it is to be kept.
  template <bool KEEP, class F>
  __device__ __forceinline__ void with_piece(int g, int k, F f) {
    if constexpr (RESIDENT) {
      f(held);
    } else {
      Tile<T, C> m;
      load_tile(tiles.memory, this->piece(g, k), m);
      f(m);
      if (KEEP) store_tile(tiles.memory, this->piece(g, k), m);
    }
  }

  __device__ __forceinline__ void begin() {
    const T* memory = static_cast<const T*>(a.memory) + sample * a.N * a.D;
    const T* usage = static_cast<const T*>(a.usage) + sample * a.N;
    for (int g = 0; g < this->groups(); ++g) {
      for (int k = 0; k < this->pieces(); ++k) with_piece<true>(g, k, [&](Tile<T, C>& m) { this->take(memory, g, k, m); });
      const int slot = this->group(g) + place.lane;
      if (place.lane < warp_slots) per_slot.usage[slot] = first_slot + slot < plan.N ? usage[first_slot + slot] : T(0);
    }
    this->take_rows(static_cast<const T*>(a.read_weights) + sample * a.R * a.N, plan.N, per_slot.read_weights);
    find_candidates();
  }

  // The R least used slots of the warp, in order, for all to see.
  __device__ __forceinline__ void find_candidates() {
    for (int g = 0; g < this->groups(); ++g) {
      const int slot = this->group(g) + place.lane;
      if (place.lane < warp_slots)
        per_slot.orders[slot] = first_slot + slot < plan.N ? order_of(per_slot.usage[slot]) : taken<T>;
    }
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

  // The R least used slots of all, for the warp itself: every warp finds the same.
  __device__ __forceinline__ int* choose() {
    const int warps = plan.warps * plan.cluster, count = warps * plan.R;
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
        const Bits order = plan.cluster > 1 ? *gpu::of_block(small.exchange.orders + at, block) : small.exchange.orders[at];
        const int candidate =
            plan.cluster > 1 ? *gpu::of_block(small.exchange.candidates + at, block) : small.exchange.candidates[at];
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

  __device__ __forceinline__ void keep(int64_t t, const int* chosen) {
    if (rank == 0 && place.warp == 0)
      for (int r = place.lane; r < plan.R; r += 32) a.slots[(t * a.B + sample) * plan.R + r] = chosen[r];
    if (t == 0 || t % a.anchor_every != 0) return;
    const int64_t ld = mann_fast::padded_slots(plan.N);
    T* anchor = static_cast<T*>(a.anchors) + ((t / a.anchor_every - 1) * a.B + sample) * (a.D + a.R) * ld;
    for (int g = 0; g < this->groups(); ++g)
      for (int k = 0; k < this->pieces(); ++k)
        with_piece<false>(g, k, [&](Tile<T, C>& m) { this->give_anchor(m, ld, g, k, anchor); });
    this->give_rows(per_slot.read_weights, ld, anchor + a.D * ld);
  }

  // Up to the sums that all must know.
  __device__ __forceinline__ void write_and_compare(const Inputs<T>& in, const int* chosen, T* sums) {
    this->weigh_writes(in, chosen, per_slot.read_weights, per_slot.write_weights);
    gpu::sync_warp();
    const bool bounded = this->bounded(in.beta);
    for (int g = 0; g < this->groups(); ++g) {
      const auto compare = [&] {
        this->compare(in, g, bounded, [&](int k, auto f) { with_piece<false>(g, k, f); }, per_slot.read_weights,
                      sums + place.warp * plan.heads, small.exchange.greatest + place.warp * plan.heads,
                      static_cast<T*>(nullptr), static_cast<T*>(nullptr));
      };
#pragma unroll 1
      for (int pass = 0; pass < 2; ++pass) {
        if ((pass == 0) == a.read_first) {
          compare();
        } else {
          for (int k = 0; k < this->pieces(); ++k)
            with_piece<true>(g, k, [&](Tile<T, C>& m) { this->write(in, chosen[0], per_slot.write_weights, g, k, m); });
        }
      }
    }
    if (!bounded) this->soften(small.exchange.greatest, per_slot.read_weights, sums + place.warp * plan.heads);
    gpu::sync_warp();
  }

  // The warp's part of the reads.
  __device__ __forceinline__ void read() {
    T* to = small.exchange.reads + place.warp * plan.heads * plan.columns;
    for (int k = 0; k < this->pieces(); ++k)
      for (int first = 0; first < plan.heads; first += H) {
        T sum[H * C] = {};
        for (int g = 0; g < this->groups(); ++g) {
          Four<T> weights[H];
          this->load_weights(per_slot.read_weights, first, this->slots(g), weights);
          with_piece<false>(g, k, [&](Tile<T, C>& m) { add_weighted<H, C>(m, weights, sum); });
        }
        store_warp_sums<H, C>(sum, place.lane, to + first * plan.columns + this->first_column(k), plan.columns, false);
      }
  }

  __device__ __forceinline__ void give_reads(int64_t t, T* sums) {
    const int count = plan.R * plan.D;
    for (int j = rank * gpu::threads() + gpu::thread(); j < count; j += plan.cluster * gpu::threads()) {
      const int r = j / plan.D, d = j % plan.D;
      const T read = this->total(small.exchange.reads, r * plan.columns + d, plan.heads * plan.columns);
      store_as(a.reads, a.input, (t * a.B + sample) * count + j, read / this->total(sums, r, plan.heads));
    }
  }

  __device__ __forceinline__ void use() {
    const T decay = static_cast<T>(a.usage_decay);
    for (int g = 0; g < this->groups(); ++g) {
      const int slot = this->group(g) + place.lane;
      if (place.lane >= warp_slots) continue;
      T total = per_slot.read_weights[slot] + per_slot.write_weights[slot];
      for (int r = 1; r < plan.R; ++r)
        total += per_slot.read_weights[r * plan.span + slot] + per_slot.write_weights[r * plan.span + slot];
      per_slot.usage[slot] = decay * per_slot.usage[slot] + total;
    }
  }

  __device__ __forceinline__ void end() {
    T* memory = static_cast<T*>(a.out_memory) + sample * a.N * a.D;
    T* usage = static_cast<T*>(a.out_usage) + sample * a.N;
    for (int g = 0; g < this->groups(); ++g) {
      for (int k = 0; k < this->pieces(); ++k) with_piece<false>(g, k, [&](Tile<T, C>& m) { this->give(m, g, k, memory); });
      const int slot = this->group(g) + place.lane;
      if (place.lane < warp_slots && first_slot + slot < plan.N) usage[first_slot + slot] = per_slot.usage[slot];
    }
    this->give_rows(per_slot.read_weights, plan.N, static_cast<T*>(a.out_read_weights) + sample * a.R * a.N);
  }

  __device__ __forceinline__ void run() {
    Stream<T> stream({a.keys, a.write_vectors, nullptr, a.gate_logits, a.sharpness, nullptr, a.input,
                      plan.R, plan.D});
    if (a.T > 0) stream.ask(sample);
    begin();
    // Padded heads and columns are 0 in every step.
    small.in.clear();
    gpu::sync();
    if (a.T > 0) stream.put(inputs(0), plan.columns);
    this->sync();
    for (int64_t t = 0; t < a.T; ++t) {
      const Inputs<T> in = inputs(t);
      T* sums = small.exchange.sums;
      if (t + 1 < a.T) stream.ask((t + 1) * a.B + sample);
      const int* chosen = choose();
      if (a.anchor_every > 0) keep(t, chosen);
      write_and_compare(in, chosen, sums);
      read();
      this->sync();
      this->normalise(sums, per_slot.read_weights);
      gpu::sync_warp();
      use();
      gpu::sync_warp();
      find_candidates();
      give_reads(t, sums);
      if (t + 1 < a.T) stream.put(inputs(t + 1), plan.columns);
      this->sync();
    }
    end();
  }
};

template <class T, int C, int H, bool RESIDENT>
__global__ void __launch_bounds__(most_threads, 1) forward_kernel(const __grid_constant__ LruaScan a,
                                                                  const __grid_constant__ Plan plan, unsigned char* scratch) {
  ForwardScan<T, C, H, RESIDENT>(a, plan, Places(plan, scratch)).run();
}

// ---- backward -----------------------------------------------------------------------------------------------------

template <class T, int C, int H, bool RESIDENT>
struct BackwardScan : Thread<T, C, H, RESIDENT> {
  using Base = Thread<T, C, H, RESIDENT>;
  using Base::OWN, Base::place, Base::plan, Base::first_slot, Base::rank;
  const LruaScanBackward& a;
  const int64_t sample, every;
  typename Backward<T>::Small small;
  typename Backward<T>::Slots per_slot;
  typename Backward<T>::Tiles tiles;
  Tile<T, C> held;  // the gradient of the memory
  int visits = 0;   // steps gone through, in either direction

  __device__ __forceinline__ BackwardScan(const LruaScanBackward& a, const Plan& plan, int64_t every, Places places)
      : Base(plan, static_cast<int>(gpu::block() % plan.cluster), a.eps, a.shared_target), a(a), sample(gpu::block() / plan.cluster), every(every),
        small(places.of(plan.near_small), plan), per_slot(places.of(plan.near_slots), plan, every),
        tiles(places.of(plan.near_tiles), plan, every) {}

  __device__ __forceinline__ Inputs<T> inputs(int64_t visit) const { return small.in.of(visit, plan, true); }

  template <bool KEEP, class F>
  __device__ __forceinline__ void with_grad(int g, int k, F f) {
    if constexpr (RESIDENT) {
      f(held);
    } else {
      Tile<T, C> m;
      load_tile(tiles.grad, this->piece(g, k), m);
      f(m);
      if (KEEP) store_tile(tiles.grad, this->piece(g, k), m);
    }
  }
  __device__ __forceinline__ T* memory(int64_t step) const { return tiles.memories + step * plan.tile_numbers(); }
  __device__ __forceinline__ T* read_weights(int64_t step) const { return per_slot.read_weights + step * (plan.heads * plan.span); }
  __device__ __forceinline__ T* dots(int64_t step) const { return per_slot.dots + step * (plan.heads * plan.span); }
  __device__ __forceinline__ T* squares(int64_t step) const { return per_slot.squares + step * plan.span; }
  __device__ __forceinline__ T* sums() const { return small.exchange.sums + visits % 2 * plan.warps * plan.heads; }

  __device__ __forceinline__ void begin() {
    const T* grad = a.grad_memory ? static_cast<const T*>(a.grad_memory) + sample * a.N * a.D : nullptr;
    for (int g = 0; g < this->groups(); ++g)
      for (int k = 0; k < this->pieces(); ++k)
        with_grad<true>(g, k, [&](Tile<T, C>& m) {
          if (grad) this->take(grad, g, k, m);
          else m = Tile<T, C>{};
        });
    if (a.grad_read_weights) {
      this->take_rows(static_cast<const T*>(a.grad_read_weights) + sample * a.R * a.N, plan.N, per_slot.later);
    } else {
      for (int g = 0; g < this->groups(); ++g)
        for (int i = place.lane; i < plan.heads * warp_slots; i += 32)
          per_slot.later[i / warp_slots * plan.span + this->group(g) + i % warp_slots] = 0;
    }
  }

  __device__ __forceinline__ void begin_replay(int64_t first) {
    const int64_t ld = mann_fast::padded_slots(plan.N);
    const T* anchor = static_cast<const T*>(a.anchors) + ((first / a.anchor_every - 1) * a.B + sample) * (a.D + a.R) * ld;
    const T* start = static_cast<const T*>(a.memory) + sample * a.N * a.D;
    for (int g = 0; g < this->groups(); ++g)
      for (int k = 0; k < this->pieces(); ++k) {
        Tile<T, C> m;
        if (first > 0) this->take_anchor(anchor, ld, g, k, m);
        else this->take(start, g, k, m);
        store_tile(memory(0), this->piece(g, k), m);
      }
    if (first > 0) this->take_rows(anchor + a.D * ld, ld, read_weights(0));
    else this->take_rows(static_cast<const T*>(a.read_weights) + sample * a.R * a.N, plan.N, read_weights(0));
    gpu::sync_warp();
  }

  // A step forward again, from the memory before it to the one after it.
  __device__ __forceinline__ void replay(const Inputs<T>& in, int64_t step) {
    this->weigh_writes(in, in.slots, read_weights(step), per_slot.write_weights);
    gpu::sync_warp();
    const bool bounded = this->bounded(in.beta);
    for (int g = 0; g < this->groups(); ++g) {
#pragma unroll 1
      for (int pass = 0; pass < 2; ++pass) {
        if ((pass == 0) == a.read_first) {
          const T* addressed = memory(a.read_first ? step : step + 1);
          const auto open = [&](int k, auto f) {
            Tile<T, C> m;
            load_tile(addressed, this->piece(g, k), m);
            f(m);
          };
          this->compare(in, g, bounded, open, read_weights(step + 1), sums() + place.warp * plan.heads,
                        small.exchange.greatest + place.warp * plan.heads, dots(step), squares(step));
        } else {
          for (int k = 0; k < this->pieces(); ++k) {
            Tile<T, C> m;
            load_tile(memory(step), this->piece(g, k), m);
            this->write(in, in.slots[0], per_slot.write_weights, g, k, m);
            store_tile(memory(step + 1), this->piece(g, k), m);
          }
        }
      }
    }
    if (!bounded) this->soften(small.exchange.greatest, read_weights(step + 1), sums() + place.warp * plan.heads);
  }

  // The gradient that reaches this step's read weights, and its mean under them.
  __device__ __forceinline__ void gather(const Inputs<T>& in, int64_t step) {
    for (int g = 0; g < this->groups(); ++g) {
      const int own_slot = this->own(g);
      for (int first = 0; first < plan.heads; first += H) {
        T sum[lane_slots * H] = {}, mean[OWN];
        for (int k = 0; a.grad_reads && k < this->pieces(); ++k) {
          T rows[H][C];
          load_rows<H, C>(in.grads + first * plan.columns + this->first_column(k), plan.columns, rows);
          Tile<T, C> m;
          load_tile(memory(step + 1), this->piece(g, k), m);
          add_dots<H, C>(m, rows, sum);
        }
        if (a.grad_reads) add_lanes<4, 1, lane_slots * H>(sum, place.lane);
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
  __device__ __forceinline__ void through_softmax(const Inputs<T>& in, int64_t step) {
    T* scalars = small.exchange.scalars + place.warp * 3 * plan.heads;
    for (int first = 0; first < plan.heads; first += H) {
      T mean[OWN], key_squares[H] = {}, own_key[OWN];
#pragma unroll
      for (int j = 0; j < OWN; ++j) {
        const int r = first + place.own_head + j;
        mean[j] = r < plan.R ? this->total(sums(), r, plan.heads) : T(0);
      }
      for (int k = 0; k < this->pieces(); ++k) {
        T keys[H][C];
        load_rows<H, C>(in.keys + first * plan.columns + this->first_column(k), plan.columns, keys);
#pragma unroll
        for (int h = 0; h < H; ++h)
#pragma unroll
          for (int c = 0; c < C; ++c) key_squares[h] += keys[h][c] * keys[h][c];
      }
      own_key_squares<H>(place, key_squares, own_key);
      T of_beta[OWN] = {}, of_key[OWN] = {};
      for (int g = 0; g < this->groups(); ++g) {
        const int own_slot = this->own(g);
        const T square = squares(step)[own_slot];
#pragma unroll
        for (int j = 0; j < OWN; ++j) {
          const int r = first + place.own_head + j, at = r * plan.span + own_slot;
          const T beta = in.beta[r], q = gpu::inverse_root(own_key[j] * square + this->eps);
          const T of_score = read_weights(step + 1)[at] * (per_slot.grads[at] - mean[j]);
          const T of_cosine = of_score * (dots(step)[at] * q);  // times the cosine itself
          const T of_product = T(-0.5) * beta * of_cosine * (q * q);
          if (H == 1) gpu::sync_warp();  // two lanes read what one of them writes
          if (place.owner) {
            per_slot.grads[at] = of_score * beta * q;
            per_slot.of_squares[at] = of_product * own_key[j];
          }
          of_beta[j] += of_cosine;
          of_key[j] += of_product * square;
        }
      }
      this->tell_sums(of_beta, first, false, scalars);
      this->tell_sums(of_key, first, false, scalars + plan.heads);
    }
  }

  // The gradient of the memory from reads and similarities, and those of the keys.
  __device__ __forceinline__ void through_read(const Inputs<T>& in, int64_t step, bool of_reads, bool of_similarity) {
    T* of_keys = small.exchange.reads + place.warp * plan.heads * plan.columns;
    const T* addressed = memory(a.read_first ? step : step + 1);
    for (int k = 0; k < this->pieces(); ++k) {
      for (int first = 0; first < plan.heads; first += H) {
        const int corner = first * plan.columns + this->first_column(k);
        T sum[H * C] = {};
        for (int g = 0; g < this->groups(); ++g) {
          with_grad<true>(g, k, [&](Tile<T, C>& grad) {
            Four<T> weights[H];
            T rows[H][C];
            if (of_reads && a.grad_reads) {
              this->load_weights(read_weights(step + 1), first, this->slots(g), weights);
              load_rows<H, C>(in.grads + corner, plan.columns, rows);
              add_products<H, C>(weights, rows, grad);
            }
            if (!of_similarity) return;
            this->load_weights(per_slot.grads, first, this->slots(g), weights);
            load_rows<H, C>(in.keys + corner, plan.columns, rows);
            add_products<H, C>(weights, rows, grad);
            Tile<T, C> m;
            load_tile(addressed, this->piece(g, k), m);
            add_weighted<H, C>(m, weights, sum);
            this->load_weights(per_slot.of_squares, first, this->slots(g), weights);
#pragma unroll
            for (int s = 0; s < lane_slots; ++s) {
              T factor = 0;
#pragma unroll
              for (int h = 0; h < H; ++h) factor += weights[h].at[s];
#pragma unroll
              for (int c = 0; c < C; ++c) grad.at[s][c] += 2 * factor * m.at[s][c];
            }
          });
        }
        if (!of_similarity) continue;
        store_warp_sums<H, C>(sum, place.lane, of_keys + corner, plan.columns, false);
      }
    }
  }

  // Back through the write: gradients of write vectors, gates and the read weights of the step before; then the erased slot's
  // is nought.
  __device__ __forceinline__ void through_write(const Inputs<T>& in, int64_t step) {
    T* of_vectors = small.exchange.of_vectors + place.warp * plan.heads * plan.columns;
    T* of_gates = small.exchange.scalars + (place.warp * 3 + 2) * plan.heads;
    for (int first = 0; first < plan.heads; first += H) {
      T of_gate[OWN] = {};
      for (int g = 0; g < this->groups(); ++g) {
        T sum[lane_slots * H] = {};
        for (int k = 0; k < this->pieces(); ++k) {
          T rows[H][C];
          load_rows<H, C>(in.vectors + first * plan.columns + this->first_column(k), plan.columns, rows);
          with_grad<false>(g, k, [&](Tile<T, C>& grad) { add_dots<H, C>(grad, rows, sum); });
        }
        add_lanes<4, 1, lane_slots * H>(sum, place.lane);
        const int own_slot = this->own(g);
#pragma unroll
        for (int j = 0; j < OWN; ++j) {
          const int r = first + place.own_head + j, at = r * plan.span + own_slot;
          if (r >= plan.R) continue;
          const T target = this->is_target(in.slots, r, first_slot + own_slot) ? T(1) : T(0);
          of_gate[j] += sum[j] * (read_weights(step)[at] - target) * (in.gate[r] * in.keep[r]);
          if (place.owner) per_slot.later[at] = sum[j] * in.gate[r];
        }
      }
      this->tell_sums(of_gate, first, false, of_gates);
      for (int k = 0; k < this->pieces(); ++k) {
        T sum[H * C] = {};
        for (int g = 0; g < this->groups(); ++g) {
          Four<T> weights[H];
          this->load_weights(per_slot.write_weights, first, this->slots(g), weights);
          with_grad<false>(g, k, [&](Tile<T, C>& grad) { add_weighted<H, C>(grad, weights, sum); });
        }
        store_warp_sums<H, C>(sum, place.lane, of_vectors + first * plan.columns + this->first_column(k), plan.columns, false);
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

  // Sums over all warps to where they belong; keys for their own squares are added by whoever holds them.
  __device__ __forceinline__ void give_gradients(int64_t t) {
    const int size = plan.R * plan.D, count = 2 * size + 2 * plan.R;
    const int64_t row = t * a.B + sample;
    for (int j = rank * gpu::threads() + gpu::thread(); j < count; j += plan.cluster * gpu::threads()) {
      if (j < 2 * size) {
        const int i = j % size, at = i / plan.D * plan.columns + i % plan.D, ld = plan.heads * plan.columns;
        if (j < size) store_as(a.grad_keys, a.input, row * size + i, this->total(small.exchange.reads, at, ld));
        else store_as(a.grad_write_vectors, a.input, row * size + i, this->total(small.exchange.of_vectors, at, ld));
      } else {
        const int i = j - 2 * size, r = i % plan.R;
        if (i < plan.R)
          store_as(a.grad_gate_logits, a.input, row * plan.R + r,
                   this->total(small.exchange.scalars, 2 * plan.heads + r, 3 * plan.heads));
        else if (a.grad_sharpness)
          store_as(a.grad_sharpness, a.input, row * plan.R + r, this->total(small.exchange.scalars, r, 3 * plan.heads));
      }
    }
  }

  // Adds to the warp's gradient of each key what comes from the key's own square.
  __device__ __forceinline__ void add_key_squares(const Inputs<T>& in) {
    T* of_keys = small.exchange.reads + place.warp * plan.heads * plan.columns;
    const T* of_squares = small.exchange.scalars + (place.warp * 3 + 1) * plan.heads;
    gpu::sync_warp();
    for (int i = place.lane; i < plan.R * plan.columns; i += 32)
      of_keys[i] += 2 * of_squares[i / plan.columns] * in.keys[i];
  }

  __device__ __forceinline__ void back(const Inputs<T>& in, int64_t step) {
    through_softmax(in, step);
    this->weigh_writes(in, in.slots, read_weights(step), per_slot.write_weights);
    gpu::sync_warp();
    through_read(in, step, true, !a.read_first);
    through_write(in, step);
    if (a.read_first) through_read(in, step, false, true);
    add_key_squares(in);
  }

  __device__ __forceinline__ void end() {
    T* memory = static_cast<T*>(a.grad_in_memory) + sample * a.N * a.D;
    for (int g = 0; g < this->groups(); ++g)
      for (int k = 0; k < this->pieces(); ++k) with_grad<false>(g, k, [&](Tile<T, C>& m) { this->give(m, g, k, memory); });
    this->give_rows(per_slot.later, plan.N, static_cast<T*>(a.grad_in_read_weights) + sample * a.R * a.N);
  }

  __device__ __forceinline__ void run() {
    Stream<T> stream({a.keys, a.write_vectors, a.grad_reads, a.gate_logits, a.sharpness, a.slots, a.input,
                      plan.R, plan.D});
    const int64_t last_first = a.T > 0 ? (a.T - 1) / every * every : -1;
    if (a.T > 0) stream.ask(last_first * a.B + sample);
    begin();
    small.in.clear();
    gpu::sync();
    if (a.T > 0) stream.put(inputs(0), plan.columns);
    this->sync();
    for (int64_t first = last_first; first >= 0; first -= every) {
      const int64_t count = a.T - first < every ? a.T - first : every;
      begin_replay(first);
      for (int64_t step = 0; step < count; ++step) {
        stream.ask((first + (step + 1 < count ? step + 1 : count - 1)) * a.B + sample);
        replay(inputs(visits), step);
        stream.put(inputs(visits + 1), plan.columns);
        this->sync();
        this->normalise(sums(), read_weights(step + 1));
        gpu::sync_warp();
        ++visits;
      }
      for (int64_t step = count - 1; step >= 0; --step) {
        const Inputs<T> in = inputs(visits);
        const int64_t next = step > 0 ? first + step - 1 : first - every;
        if (next >= 0) stream.ask(next * a.B + sample);
        gather(in, step);
        this->sync();
        back(in, step);
        if (next >= 0) stream.put(inputs(visits + 1), plan.columns);
        this->sync();
        give_gradients(first + step);
        ++visits;
      }
    }
    end();
    if (plan.cluster > 1) gpu::sync_cluster();  // no block ends while another reads from it
  }
};

template <class T, int C, int H, bool RESIDENT>
__global__ void __launch_bounds__(most_threads, 1) backward_kernel(const __grid_constant__ LruaScanBackward a,
                                                                   const __grid_constant__ Plan plan, int64_t every,
                                                                   unsigned char* scratch) {
  BackwardScan<T, C, H, RESIDENT>(a, plan, every, Places(plan, scratch)).run();
}

// ---- which kernel ---------------------------------------------------------------------------------------------------

// Calls f with types and sizes of the kernel that a plan asks for.
template <class F>
const char* with_kernel(const Plan& plan, Dtype state, F f) {
  const std::integral_constant<int, 4> four;
  if (state == Dtype::float64) return f(double(), four, four, std::false_type());
  if (!plan.resident) return f(float(), std::integral_constant<int, 8>(), four, std::false_type());
  const auto in_registers = [&](auto c) {
    if (plan.heads_at_once == 1) return f(float(), c, std::integral_constant<int, 1>(), std::true_type());
    return f(float(), c, four, std::true_type());
  };
  switch (plan.piece_columns) {
    case 2: return in_registers(std::integral_constant<int, 2>());
    case 4: return in_registers(four);
    case 5: return in_registers(std::integral_constant<int, 5>());
    default: return in_registers(std::integral_constant<int, 8>());
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Side, class T>
Plan plan_scan(int64_t B, int64_t N, int64_t D, int64_t R, int64_t every, const gpu::Limits& limits) {
  Plan plan{};
  plan.N = static_cast<int>(N);
  plan.D = static_cast<int>(D);
  plan.R = static_cast<int>(R);
  const int64_t groups = ceil_div(N, warp_slots), lane_columns = ceil_div(D, column_lanes);
  const int most_warps = most_threads / 32;
  const auto lay_out = [&](int cluster) {
    plan.cluster = cluster;
    plan.heads_at_once = plan.resident && R == 1 ? 1 : 4;
    plan.heads = static_cast<int>(ceil_div(R, plan.heads_at_once)) * plan.heads_at_once;
    plan.warps = static_cast<int>(groups < most_warps ? groups : most_warps);
    plan.groups = static_cast<int>(ceil_div(groups, static_cast<int64_t>(plan.warps) * cluster));
    plan.span = plan.groups * plan.warps * warp_slots;
    plan.pieces = static_cast<int>(ceil_div(lane_columns, plan.piece_columns));
    plan.columns = plan.pieces * plan.piece_columns * column_lanes;
    place<Side>(plan, every, limits);
  };
  if (sizeof(T) == 4 && lane_columns <= 8) {
    plan.resident = true;
    plan.piece_columns = lane_columns <= 2 ? 2 : lane_columns <= 4 ? 4 : lane_columns <= 5 ? 5 : 8;
    for (int cluster = 1; cluster <= limits.cluster; cluster *= 2) {
      lay_out(cluster);
      if (plan.groups == 1 && plan.near_small) return plan;
    }
  }
  plan.resident = false;
  plan.piece_columns = sizeof(T) == 4 ? 8 : 4;
  for (int cluster = 1; cluster <= limits.cluster; cluster *= 2) {
    lay_out(cluster);
    if (plan.near_small && plan.near_slots && plan.near_tiles) return plan;
  }
  // Nothing is near enough: device memory serves it all the faster the more blocks share it.
  lay_out(B >= limits.processors ? 1 : limits.cluster);
  if (!plan.near_small) lay_out(1);  // what is exchanged must be in shared memory for a cluster
  return plan;
}

// Where a block counts what it has, it counts with 32 bits.
const char* too_large(int64_t N, int64_t D, int64_t R) {
  if (N >= 1 << 24) return "the kernel takes fewer than 2^24 slots";
  if (R * D >= 1 << 26) return "the kernel takes fewer than 2^26 numbers in the keys of a step";
  if (R * N >= 1 << 28) return "the kernel takes fewer than 2^28 weights in a step";
  return nullptr;
}

template <class T>
const char* scan(const LruaScan& a, const Queue& queue) {
  if (const char* why = too_large(a.N, a.D, a.R)) return why;
  const Plan plan = plan_scan<Forward<T>, T>(a.B, a.N, a.D, a.R, 0, gpu::limits());
  const int64_t blocks = a.B * plan.cluster;
  void* scratch = plan.scratch && blocks ? queue.scratch(queue.owner, plan.scratch * static_cast<size_t>(blocks)) : nullptr;
  return with_kernel(plan, a.state, [&](auto t, auto c, auto h, auto resident) -> const char* {
    if constexpr (std::is_same_v<decltype(t), T>)
      return gpu::launch(forward_kernel<T, decltype(c)::value, decltype(h)::value, decltype(resident)::value>,
                         {blocks, 32 * plan.warps, plan.cluster, plan.shared, queue.stream}, a, plan,
                         static_cast<unsigned char*>(scratch));
    return "no kernel for this dtype";
  });
}

template <class T>
const char* scan_backward(const LruaScanBackward& a, const Queue& queue) {
  const int64_t every = a.T < a.anchor_every ? (a.T > 0 ? a.T : 1) : a.anchor_every;
  if (const char* why = too_large(a.N, a.D, a.R)) return why;
  const Plan plan = plan_scan<Backward<T>, T>(a.B, a.N, a.D, a.R, every, gpu::limits());
  const int64_t blocks = a.B * plan.cluster;
  void* scratch = plan.scratch && blocks ? queue.scratch(queue.owner, plan.scratch * static_cast<size_t>(blocks)) : nullptr;
  return with_kernel(plan, a.state, [&](auto t, auto c, auto h, auto resident) -> const char* {
    if constexpr (std::is_same_v<decltype(t), T>)
      return gpu::launch(backward_kernel<T, decltype(c)::value, decltype(h)::value, decltype(resident)::value>,
                         {blocks, 32 * plan.warps, plan.cluster, plan.shared, queue.stream}, a, plan, every,
                         static_cast<unsigned char*>(scratch));
    return "no kernel for this dtype";
  });
}

}  // namespace

const char* lrua_scan(const LruaScan& a, const Queue& queue) {
  return a.state == Dtype::float64 ? scan<double>(a, queue) : scan<float>(a, queue);
}

const char* lrua_scan_backward(const LruaScanBackward& a, const Queue& queue) {
  return a.state == Dtype::float64 ? scan_backward<double>(a, queue) : scan_backward<float>(a, queue);
}

}  // namespace cuda
}  // namespace mann_fast

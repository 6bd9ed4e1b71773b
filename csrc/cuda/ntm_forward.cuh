// A step of a Neural Turing Machine's memory forward, as a block takes it: ntm_scan.cu and ntm_cell.cu go through the steps.
#pragma once
#include "ntm_scan.cuh"

namespace mann_fast {
namespace cuda {

template <class T>
struct NtmForwardRoom {
  static int heads_at_once(const Plan&) { return 1; }
  struct Small {
    InputTurns<NtmInputs<T>> in;
    T *content, *weights;  // [heads, span], which all warps see: exponentials of similarities; weights, old then new
    T *sums, *maximum, *most, *powers;  // [warps, heads]: of exponentials and similarities, of shifted weights and powers
    T* reads;                           // [warps, reading heads, columns]
    template <class P>
    __device__ __host__ Small(Carver& carver, const P& plan)
        : in(carver, plan, false), content(carver.take<T>(plan.heads * plan.span)),
          weights(carver.take<T>(plan.heads * plan.span)), sums(carver.take<T>(plan.warps * plan.heads)),
          maximum(carver.take<T>(plan.warps * plan.heads)), most(carver.take<T>(plan.warps * plan.heads)),
          powers(carver.take<T>(plan.warps * plan.heads)), reads(carver.take<T>(plan.warps * plan.reads * plan.columns)) {}
  };
  struct Slots {
    T* shifted;  // [heads, span]: shifted weights, then their powers
    template <class P>
    __device__ __host__ Slots(Carver& carver, const P& plan, int64_t) : shifted(carver.take<T>(plan.heads * plan.span)) {}
  };
  struct Tiles {
    T* memory;
    template <class P>
    __device__ __host__ Tiles(Carver& carver, const P& plan, int64_t)
        : memory(carver.take<T>(plan.resident ? 0 : tile_numbers(plan))) {}
  };
};

template <class T, int C, bool RESIDENT, bool ALONE, class P>
struct NtmForward : NtmThread<T, C, RESIDENT, ALONE, P> {
  using Base = NtmThread<T, C, RESIDENT, ALONE, P>;
  using Base::place, Base::plan, Base::first_slot, Base::rank;
  const NtmScan& a;
  const int64_t sample;
  typename NtmForwardRoom<T>::Small small;
  typename NtmForwardRoom<T>::Slots per_slot;
  typename NtmForwardRoom<T>::Tiles tiles;
  Tile<T, C> held;
  AnchorTurns anchors;

  __device__ __forceinline__ NtmForward(const NtmScan& a, const P& plan, Places places, int64_t sample, int rank)
      : Base(plan, rank, a.eps), a(a), sample(sample), small(places.of(ALONE || RESIDENT || plan.near_small), plan),
        per_slot(places.of(RESIDENT || plan.near_slots), plan, 0), tiles(places.of(plan.near_tiles), plan, 0),
        anchors(a.anchor_every) {}

  __device__ __forceinline__ NtmInputs<T> inputs(int64_t step) const {
    return small.in.of(static_cast<int>(step % 2), plan, false);
  }

  template <bool KEEP, class F>
  __device__ __forceinline__ void with_piece(int g, int k, F f) {
    this->template with_tile_of<KEEP>(held, tiles.memory, g, k, f);
  }

  // The state that came in, or anew that at the start of a sequence.
  __device__ __forceinline__ void begin(bool anew) {
    const T* memory = this->first_memory(a, sample, anew);
    for (int g = 0; g < this->groups(); ++g)
      for (int k = 0; k < this->pieces(); ++k) with_piece<true>(g, k, [&](Tile<T, C>& m) { this->take(memory, g, k, m); });
    this->take_rows(anew ? nullptr : static_cast<const T*>(a.weights) + sample * plan.R * a.N, plan.N, small.weights);
  }

  __device__ __forceinline__ void save_memory(int64_t t) {
    const int64_t ld = mann_fast::padded_slots(plan.N);
    T* anchor = static_cast<T*>(a.anchors) + anchor_offset(t, a.anchor_every, a.B, sample, a.D, a.N);
    for (int g = 0; g < this->groups(); ++g)
      for (int k = 0; k < this->pieces(); ++k)
        with_piece<false>(g, k, [&](Tile<T, C>& m) { this->give_anchor(m, ld, g, k, anchor); });
  }

  // New weights of heads [first, last), from the memory as it is; calls meanwhile() between the two barriers, if it is to.
  template <class F>
  __device__ __forceinline__ void address(const NtmInputs<T>& in, int first, int last, bool calls, F meanwhile) {
    const bool bounded = this->bounded(in.beta);
    for (int g = 0; g < this->groups(); ++g)
      this->compare(
          in, first, last, g, bounded, [&](int k, auto f) { with_piece<false>(g, k, f); }, small.content,
          small.sums + place.warp * plan.heads, small.maximum + place.warp * plan.heads, static_cast<T*>(nullptr),
          static_cast<T*>(nullptr));
    if (!bounded) this->soften(first, last, small.maximum, small.content, small.sums + place.warp * plan.heads);
    this->sync();
    const auto between = [&] {
      if (calls) meanwhile();
      this->sync();
    };
    if constexpr (P::fixed) {
      sharpen(in, first, last, between);
    } else {
      this->shift(in, first, last, small.content, small.weights, small.sums, per_slot.shifted,
                  [&](int h, bool there, bool speaks, T most) { raise(in, h, there, speaks, most); });
      between();
      weigh(in, first, last);
    }
    gpu::sync_warp();
  }

  // With a fixed plan, whose lanes have one slot each: powers are relative to one number that all know, so that no maximum must
  // be found. If their sum tells that it was too far from the greatest, all warps see so, and it is done the long way.
  template <class F>
  __device__ __forceinline__ void sharpen(const NtmInputs<T>& in, int first, int last, F between) {
    constexpr T low = T(1) / (int64_t(1) << 60), high = T(int64_t(1) << 62), middle = T(middle_of(P::span));
    T shifted[Base::pairs], raised[Base::pairs];
    const int slot = this->half_slot(0);
    const bool has_slot = slot < plan.N;
    this->with_heads(first, last, [&](int i, int h, bool, bool speaks) {
      const T gate = in.gate[h], by_content = gate * this->content_scale(small.sums, h), rest = T(1) - gate;
      T sum = 0;
      this->with_origins(slot, [&](int j, int from) {
        sum += in.shift[h * plan.shifts + j] *
               (by_content * this->at(small.content, h, from) + rest * this->at(small.weights, h, from));
      });
      shifted[i] = has_slot ? sum : T(0);
      raised[i] = has_slot ? far_power(sum * middle, in.gamma[h]) : T(0);
      const T of_warp = add_half(raised[i]);
      if (speaks) this->tell(small.powers, h, of_warp);
    });
    between();
    bool fine = true;
    this->with_heads(first, last, [&](int i, int h, bool there, bool) {
      const T total = this->total(small.powers, h, plan.heads);
      fine &= total >= low && total <= high;
      if (there) small.weights[h * plan.span + slot] = raised[i] * gpu::reciprocal(total);
    });
    if (gpu::warp_min(fine) != 0) return;
    this->sync();  // all have seen the sums
    this->with_heads(first, last, [&](int i, int h, bool there, bool speaks) {
      if (there) per_slot.shifted[h * plan.span + slot] = shifted[i];
      const T most = shifted[i] > T(0) || shifted[i] != shifted[i] ? shifted[i] : T(0);
      raise(in, h, there, speaks, maximum_half(most));
    });
    this->sync();
    weigh(in, first, last);
  }

  // Powers of a head's shifted weights, relative to the maximum of the warp, so that none underflows that counts.
  __device__ __forceinline__ void raise(const NtmInputs<T>& in, int h, bool there, bool speaks, T most) {
    T sum = 0;
    for (int g = 0; g < this->groups(); ++g) {
      const int slot = this->half_slot(g);
      T raised = 0;
      if (there && first_slot + slot < plan.N) {
        const T shifted = per_slot.shifted[h * plan.span + slot];
        raised = power(most > T(0) ? shifted / most : shifted, in.gamma[h]);
      }
      if (there) per_slot.shifted[h * plan.span + slot] = raised;
      sum += raised;
    }
    sum = add_half(sum);
    if (speaks) {
      this->tell(small.most, h, most);
      this->tell(small.powers, h, sum);
    }
  }

  // Weights from the powers, now that the maximum of all warps is known.
  __device__ __forceinline__ void weigh(const NtmInputs<T>& in, int first, int last) {
    this->with_heads(first, last, [&](int, int h, bool there, bool) {
      const T maximum = this->maximum_told(small.most, h), gamma = in.gamma[h];
      T total = 0;
      for (int w = place.lane % warp_slots; w < plan.warps * plan.cluster; w += warp_slots)
        total += this->told(small.powers, w, h) * power(this->told(small.most, w, h) / maximum, gamma);
      total = add_half(total);
      const T scale = power(small.most[place.warp * plan.heads + h] / maximum, gamma) / total;
      for (int g = 0; g < this->groups(); ++g) {
        const int at = h * plan.span + this->half_slot(g);
        if (there) small.weights[at] = per_slot.shifted[at] * scale;
      }
    });
  }

  // The warp's part of the reads.
  __device__ __forceinline__ void read() {
    T* to = small.reads + place.warp * plan.reads * plan.columns;
    for (int k = 0; k < this->pieces(); ++k)
      for (int r = 0; r < plan.reads; ++r) {
        T sum[C] = {};
        for (int g = 0; g < this->groups(); ++g) {
          Four<T> weights[1];
          this->load_weights(small.weights, r, this->slots(g), weights);
          with_piece<false>(g, k, [&](Tile<T, C>& m) { add_weighted<1, C>(m, weights, sum); });
        }
        store_warp_sums<1, C>(sum, place.lane, to + r * plan.columns + this->first_column(k), plan.columns);
      }
  }

  __device__ __forceinline__ void write(const NtmInputs<T>& in) {
    for (int g = 0; g < this->groups(); ++g)
      for (int k = 0; k < this->pieces(); ++k)
        with_piece<true>(g, k, [&](Tile<T, C>& m) { Base::write(in, small.weights, g, k, m); });
  }

  // Step t up to the reads' parts that all must know, before a barrier. Calls meanwhile() between two barriers, when all have
  // taken what they need of the step before.
  template <class F>
  __device__ __forceinline__ void take_step(const NtmInputs<T>& in, int64_t t, F meanwhile) {
    const int reads = plan.reads, heads = plan.R;
    if (anchors.due(t)) save_memory(t);
    if (plan.read_first) {
      address(in, 0, heads, true, meanwhile);
      read();
      write(in);
    } else {
      if (reads < heads) address(in, reads, heads, reads == 0, meanwhile);
      write(in);
      if (reads > 0) address(in, 0, reads, true, meanwhile);
      read();
    }
    if (a.anchor_every > 0)
      this->give_rows(small.weights, plan.N, static_cast<T*>(a.history) + (t * a.B + sample) * plan.R * a.N);
  }

  // A number of the reads, which lies `at` a place of [reading heads, columns], when all have told their parts.
  __device__ __forceinline__ T read_at(int at, int = 0) const {
    return this->total(small.reads, at, plan.reads * plan.columns);
  }

  __device__ __forceinline__ void end() {
    T* memory = static_cast<T*>(a.out_memory) + sample * a.N * a.D;
    for (int g = 0; g < this->groups(); ++g)
      for (int k = 0; k < this->pieces(); ++k) with_piece<false>(g, k, [&](Tile<T, C>& m) { this->give(m, g, k, memory); });
    this->give_rows(small.weights, plan.N, static_cast<T*>(a.out_weights) + sample * plan.R * a.N);
  }
};

}  // namespace cuda
}  // namespace mann_fast

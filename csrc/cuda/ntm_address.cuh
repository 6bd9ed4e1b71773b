// Back through the addressing of a Neural Turing Machine's heads, as a block takes it: the part of a step back that compares,
// shifts and sharpens. And what a block has of a sample.
#pragma once
#include "ntm_scan.cuh"

namespace mann_fast {
namespace cuda {

// A head's sums over slots: gradients of sharpness, gate, sharpening; the softmax's mean gradient; gradient of the key's
// square, which is the warp's own; then those of the shift.
enum NtmScalar { of_beta, of_gate, of_gamma, mean_of_content, of_key_square, of_shift };

template <class T>
struct NtmBackwardRoom {
  static int heads_at_once(const Plan&) { return 1; }
  struct Small {
    InputTurns<NtmInputs<T>> in;
    // [heads, span], which all warps see: as forward; weights of the step before; gradient of the shifted weights.
    T *content, *previous, *of_shifted;
    T *sums, *maximum, *most, *means, *peaks;  // [warps, heads]: as forward; of weight times its gradient; the maximum weight
    T *of_keys, *of_erase, *of_add;            // [warps, heads or writing heads, columns]
    T* scalars;                                // [warps, heads, of_shift + shifts]
    template <class P>
    __device__ __host__ Small(Carver& carver, const P& plan)
        : in(carver, plan, true), content(carver.take<T>(plan.heads * plan.span)),
          previous(carver.take<T>(plan.heads * plan.span)), of_shifted(carver.take<T>(plan.heads * plan.span)),
          sums(carver.take<T>(plan.warps * plan.heads)), maximum(carver.take<T>(plan.warps * plan.heads)),
          most(carver.take<T>(plan.warps * plan.heads)), means(carver.take<T>(plan.warps * plan.heads)),
          peaks(carver.take<T>(plan.warps * plan.heads)), of_keys(carver.take<T>(plan.warps * plan.heads * plan.columns)),
          of_erase(carver.take<T>(plan.warps * (plan.heads - plan.reads) * plan.columns)),
          of_add(carver.take<T>(plan.warps * (plan.heads - plan.reads) * plan.columns)),
          scalars(carver.take<T>(plan.warps * plan.heads * (of_shift + plan.shifts))) {}
  };
  struct Slots {
    T *now, *later;  // [heads, span]: weights of the step, and their gradients
    // [heads, span], the last [span]. of_dots: content weights, for the sums of their exponentials may be the next step's by
    // the time that they are needed; then gradients of the dot products.
    T *dots, *shifted, *of_dots, *of_squares, *squares;
    template <class P>
    __device__ __host__ Slots(Carver& carver, const P& plan, int64_t)
        : now(carver.take<T>(plan.heads * plan.span)), later(carver.take<T>(plan.heads * plan.span)),
          dots(carver.take<T>(plan.heads * plan.span)), shifted(carver.take<T>(plan.heads * plan.span)),
          of_dots(carver.take<T>(plan.heads * plan.span)), of_squares(carver.take<T>(plan.heads * plan.span)),
          squares(carver.take<T>(plan.span)) {}
  };
  struct Tiles {
    T *memories, *grad;  // before each step and after the last
    template <class P>
    __device__ __host__ Tiles(Carver& carver, const P& plan, int64_t every)
        : memories(carver.take<T>((every + 1) * tile_numbers(plan))),
          grad(carver.take<T>(plan.resident ? 0 : tile_numbers(plan))) {}
  };
};

template <class T, int C, bool RESIDENT, bool ALONE, class P>
struct NtmAddressBack : NtmThread<T, C, RESIDENT, ALONE, P> {
  using Base = NtmThread<T, C, RESIDENT, ALONE, P>;
  using Base::place, Base::plan, Base::first_slot, Base::pairs;
  typename NtmBackwardRoom<T>::Small small;
  typename NtmBackwardRoom<T>::Slots per_slot;
  typename NtmBackwardRoom<T>::Tiles tiles;
  Tile<T, C> held;  // the gradient of the memory
  // What the warps have told of some heads, and nobody has given yet; -1: nothing.
  int64_t addressed_row = -1;
  int first_told = 0, last_told = 0;

  // What only a thread of a fixed plan keeps, which has one slot of each pair of heads: its tile of the memory that is gone
  // back through; the content weights of its slot; and squares of keys.
  Tile<T, C> known;
  T content[pairs], squares[pairs];
  int turn = 0;

  __device__ __forceinline__ NtmAddressBack(const P& plan, int rank, double eps, int every, Places places)
      : Base(plan, rank, eps), small(places.of(ALONE || RESIDENT || plan.near_small), plan),
        per_slot(places.of((RESIDENT && !ALONE) || plan.near_slots), plan, every),
        tiles(places.of(plan.near_tiles), plan, every) {}

  // With a fixed plan two of them take turns, for one is given while the next is told; the second lies where other plans have
  // shifted weights.
  __device__ __forceinline__ T* scalars_of_all() const { return P::fixed && turn ? per_slot.shifted : small.scalars; }
  __device__ __forceinline__ T* scalars(int h) const {
    return scalars_of_all() + (place.warp * plan.heads + h) * (of_shift + plan.shifts);
  }
  __device__ __forceinline__ T total_scalar(int h, int which) const {
    return this->total(scalars_of_all(), h * (of_shift + plan.shifts) + which, plan.heads * (of_shift + plan.shifts));
  }

  template <bool KEEP, class F>
  __device__ __forceinline__ void with_grad(int g, int k, F f) {
    this->template with_tile_of<KEEP>(held, tiles.grad, g, k, f);
  }

  // Calls f with a piece of a memory; with a fixed plan the one that is known.
  template <class F>
  __device__ __forceinline__ void with_memory(const T* tiles, int g, int k, F f) const {
    if constexpr (P::fixed) {
      f(known);
    } else {
      Tile<T, C> m;
      load_tile(tiles, this->piece(g, k), this->threads(), m);
      f(m);
    }
  }
  __device__ __forceinline__ void know(const T* tiles) {
    if constexpr (P::fixed) load_tile(tiles, 0, this->threads(), known);
  }

  // The warp's part of each head's mean gradient under its weights, and its maximum weight.
  __device__ __forceinline__ void tell_means(int first, int last) {
    gpu::sync_warp();
    this->with_heads(first, last, [&](int, int h, bool, bool speaks) {
      T mean = 0, peak = 0;
      for (int g = 0; g < this->groups(); ++g) {
        const int at = h * plan.span + this->half_slot(g);
        mean += per_slot.now[at] * per_slot.later[at];
        peak = per_slot.now[at] > peak ? per_slot.now[at] : peak;
      }
      mean = add_half(mean);
      if (speaks) this->tell(small.means, h, mean);
      if constexpr (P::fixed) return;
      peak = maximum_half(peak);
      if (speaks) this->tell(small.peaks, h, peak);
    });
  }

  // With a fixed plan, whose lanes have one slot of a head each. The slope of a weight in its shifted weight is sharpening
  // times one over the other, but for the mean: that needs no maximum, hence no barrier before it.
  __device__ __forceinline__ void through_sharpening_alone(const NtmInputs<T>& in, int first, int last) {
    constexpr T faint = T(1) / (int64_t(1) << 62) / (int64_t(1) << 38);
    const int slot = this->half_slot(0);
    const bool has_slot = slot < plan.N;
    this->with_heads(first, last, [&](int i, int h, bool there, bool) {
      squares[i] = key_square_of_pair(in, h, i, first, last);
      const T gate = in.gate[h], rest = T(1) - gate, gamma = in.gamma[h], scale = this->content_scale(small.sums, h);
      T contents[Base::moves], previous[Base::moves], gated[Base::moves], shares[Base::moves], x = 0;
      this->with_origins(slot, [&](int j, int from) {
        shares[j] = in.shift[h * plan.shifts + j];
        contents[j] = scale * small.content[h * plan.span + from];
        previous[j] = small.previous[h * plan.span + from];
        gated[j] = gate * contents[j] + rest * previous[j];
        x += shares[j] * gated[j];
      });
      const int at = h * plan.span + slot;
      content[i] = scale * small.content[at];
      const T weight = per_slot.now[at], centred = per_slot.later[at] - this->total(small.means, h, plan.heads);
      T slope = x == T(0) ? T(0) : gamma * (weight * gpu::reciprocal(x));
      if (has_slot && x < faint && (x != T(0) || gamma == T(1))) slope = slope_of_faint(in, h, x, gamma, gate, scale);
      const T of = has_slot ? slope * centred : T(0);
      if (there) small.of_shifted[at] = of;
      // In the order of the scalars from that of the gate on, but for the square of the key, which is the warp's own.
      static_assert(3 + Base::moves <= 8, "one round of sums");
      T sums[8] = {};
      // Without the N, the most equal weights, whose sum is 0, would leave the rounding of so many times log(1 / N).
      sums[1] = has_slot ? weight * centred * log(x > T(0) ? x * T(plan.N) : T(1)) : T(0);
#pragma unroll
      for (int j = 0; j < Base::moves; ++j) {
        sums[0] += shares[j] * of * (contents[j] - previous[j]);
        sums[2] += gate * (shares[j] * of * contents[j]);
        sums[3 + j] = of * gated[j];
      }
      add_lanes<8, 1, 8>(sums, place.lane);
      const int which = first_sum<8, 1, 8>(place.lane);
      if (there && has_sums<8, 1, 8>(place.lane) && which < 3 + Base::moves)
        scalars(h)[which < 3 ? of_gate + which : of_shift - 3 + which] = sums[0];
    });
  }
  // What a weight changes by with a shifted weight too small for one to be divided by the other: from the greatest of all, of
  // which the same power tells their ratio.
  __device__ __forceinline__ T slope_of_faint(const NtmInputs<T>& in, int h, T x, T gamma, T gate, T scale) const {
    const T *weights = per_slot.now + h * plan.span, *contents = small.content + h * plan.span,
            *previous = small.previous + h * plan.span;
    int peak = 0;
#pragma unroll 1
    for (int slot = 1; slot < plan.N; ++slot)
      if (weights[slot] > weights[peak]) peak = slot;
    T greatest = 0;
    int by = this->first_origin();
#pragma unroll 1
    for (int j = 0; j < plan.shifts; ++j, by = this->next_origin(by)) {
      const int from = this->round(peak, by);
      greatest += in.shift[h * plan.shifts + j] * (gate * (scale * contents[from]) + (T(1) - gate) * previous[from]);
    }
    return gamma * weights[peak] / greatest * power(x / greatest, gamma - T(1));
  }

  // weight = u^gamma over its sum, with u the shifted weights in their maximum. A weight over its u^gamma is the same for all
  // slots, the maximum weight, for there u is 1.
  __device__ __forceinline__ void through_sharpening(const NtmInputs<T>& in, int first, int last) {
    this->with_heads(first, last, [&](int, int h, bool there, bool speaks) {
      const T maximum = this->maximum_told(small.most, h), peak = this->maximum_told(small.peaks, h);
      const T mean = this->total(small.means, h, plan.heads), gamma = in.gamma[h], scale = gamma * peak / maximum;
      const T gate = in.gate[h], rest = T(1) - gate, content_scale = this->content_scale(small.sums, h);
      T gradient_of_gamma = 0;
      for (int g = 0; g < this->groups(); ++g) {
        const int slot = this->half_slot(g), at = h * plan.span + slot;
        T of = 0;
        if (there && first_slot + slot < plan.N) {
          const T u = per_slot.shifted[at] / maximum, centred = per_slot.later[at] - mean;
          gradient_of_gamma += per_slot.now[at] * centred * log(u > T(0) ? u : T(1));
          of = power(u, gamma - T(1)) * centred * scale;
        }
        if (there) {
          small.of_shifted[at] = of;
          per_slot.of_dots[at] = content_scale * small.content[at];
        }
      }
      gradient_of_gamma = add_half(gradient_of_gamma);
      T gradient_of_gate = 0, mean_content = 0;
      int by = this->first_origin();
      for (int j = 0; j < plan.shifts; ++j, by = this->next_origin(by)) {
        const T share = in.shift[h * plan.shifts + j];
        T of_share = 0;
        for (int g = 0; g < this->groups(); ++g) {
          const int slot = this->half_slot(g);
          if (!there || first_slot + slot >= plan.N) continue;
          const int from = this->round(first_slot + slot, by);
          const T of = small.of_shifted[h * plan.span + slot];
          const T content = content_scale * this->at(small.content, h, from), previous = this->at(small.previous, h, from);
          of_share += of * (gate * content + rest * previous);
          gradient_of_gate += share * of * (content - previous);
          mean_content += share * of * content;
        }
        of_share = add_half(of_share);
        if (speaks) scalars(h)[of_shift + j] = of_share;
      }
      gradient_of_gate = add_half(gradient_of_gate);
      mean_content = add_half(mean_content);
      if (!speaks) return;
      scalars(h)[of_gamma] = gradient_of_gamma;
      scalars(h)[of_gate] = gradient_of_gate;
      scalars(h)[mean_of_content] = gate * mean_content;
    });
  }

  // |key|^2, in all lanes.
  __device__ __forceinline__ T key_square(const NtmInputs<T>& in, int h) const {
    T square[1] = {};
    for (int k = 0; k < this->pieces(); ++k) {
      T keys[1][C];
      load_rows<1, C>(in.keys + h * plan.columns + this->first_column(k), plan.columns, keys);
      add_row_squares<1, C>(keys, square);
    }
    add_lanes<4, 1, 1>(square, place.lane);
    return square[0];
  }

  // Of the head that each half of the warp has.
  __device__ __forceinline__ T key_square_of_pair(const NtmInputs<T>& in, int h, int i, int first, int last) const {
    const int one = first + 2 * i, other = one + 1 < last ? one + 1 : one;
    const T of_one = key_square(in, one), of_other = other == one ? of_one : key_square(in, other);
    return h == one ? of_one : of_other;
  }

  // As through_shift, with a fixed plan.
  __device__ __forceinline__ void through_shift_alone(const NtmInputs<T>& in, int first, int last) {
    const int slot = this->half_slot(0);
    const bool has_slot = slot < plan.N;
    this->with_heads(first, last, [&](int i, int h, bool there, bool) {
      const int at = h * plan.span + slot;
      const T gate = in.gate[h], mean = total_scalar(h, mean_of_content);
      T of_gated = 0;
      this->with_targets(
          slot, [&](int j, int to) { of_gated += in.shift[h * plan.shifts + j] * small.of_shifted[h * plan.span + to]; });
      if (!has_slot) of_gated = 0;
      const T of_score = content[i] * (of_gated * gate - mean);
      ScoreGradient<T> of =
          score_gradient(of_score, per_slot.dots[at], in.beta[h], squares[i], per_slot.squares[slot], this->eps);
      if (!has_slot) of = {};
      if (there) {
        per_slot.later[at] = of_gated * (T(1) - gate);
        per_slot.of_dots[at] = of.dot;
        per_slot.of_squares[at] = of.slot_square;
      }
      T sums[2] = {of.beta, of.key_square};
      add_lanes<8, 1, 2>(sums, place.lane);
      if (there && has_sums<8, 1, 2>(place.lane))
        scalars(h)[first_sum<8, 1, 2>(place.lane) ? of_key_square : of_beta] = sums[0];
    });
    gpu::sync_warp();
  }

  // To the weights of the step before, and through softmax and score to the dot products and squares.
  __device__ __forceinline__ void through_shift(const NtmInputs<T>& in, int first, int last) {
    this->with_heads(first, last, [&](int, int h, bool there, bool speaks) {
      const T gate = in.gate[h], mean = total_scalar(h, mean_of_content);
      const T other = key_square(in, gpu::shuffle(h, 16)), mine = key_square(in, gpu::shuffle(h, 0));
      const T square = place.lane < warp_slots ? mine : other;
      T gradient_of_beta = 0, gradient_of_key = 0;
      for (int g = 0; g < this->groups(); ++g) {
        const int slot = this->half_slot(g), at = h * plan.span + slot;
        if (!there) continue;
        T of_gated = 0;
        ScoreGradient<T> of{};
        if (first_slot + slot < plan.N) {
          int by = this->first_target();
          for (int j = 0; j < plan.shifts; ++j, by = this->next_target(by))
            of_gated += in.shift[h * plan.shifts + j] * this->at(small.of_shifted, h, this->round(first_slot + slot, by));
          const T of_score = per_slot.of_dots[at] * (of_gated * gate - mean);
          of = score_gradient(of_score, per_slot.dots[at], in.beta[h], square, per_slot.squares[slot], this->eps);
        }
        per_slot.later[at] = of_gated * (T(1) - gate);
        per_slot.of_dots[at] = of.dot;
        per_slot.of_squares[at] = of.slot_square;
        gradient_of_beta += of.beta;
        gradient_of_key += of.key_square;
      }
      gradient_of_beta = add_half(gradient_of_beta);
      gradient_of_key = add_half(gradient_of_key);
      if (!speaks) return;
      scalars(h)[of_beta] = gradient_of_beta;
      scalars(h)[of_key_square] = gradient_of_key;
    });
    gpu::sync_warp();
  }

  // The memory's gradient from similarities, and the warp's part of those of the keys.
  __device__ __forceinline__ void through_similarity(const NtmInputs<T>& in, int first, int last, const T* addressed) {
    Four<T> weights[1];
#pragma unroll(P::fixed ? 8 : 1)
    for (int h = first; h < last; ++h)
      for (int k = 0; k < this->pieces(); ++k) {
        const int corner = h * plan.columns + this->first_column(k);
        T keys[1][C], sum[C] = {};
        load_rows<1, C>(in.keys + corner, plan.columns, keys);
        for (int g = 0; g < this->groups(); ++g) {
          with_memory(addressed, g, k, [&](const Tile<T, C>& m) {
            this->load_weights(per_slot.of_dots, h, this->slots(g), weights);
            add_weighted<1, C>(m, weights, sum);
            with_grad<true>(g, k, [&](Tile<T, C>& grad) {
              add_products<1, C>(weights, keys, grad);
              this->load_weights(per_slot.of_squares, h, this->slots(g), weights);
              add_by_norm<1, C>(m, weights, grad);
            });
          });
        }
#pragma unroll  // what comes by the key's own square, to one of the lanes that are added up
        for (int c = 0; c < C; ++c) sum[c] += place.group == 0 ? 2 * scalars(h)[of_key_square] * keys[0][c] : T(0);
        store_warp_sums<1, C>(sum, place.lane, small.of_keys + place.warp * plan.heads * plan.columns + corner, plan.columns);
      }
  }

  // Back through the addressing of heads [first, last) on a memory; later becomes the gradient of the weights of the step
  // before. Calls told() after the first barrier, when all have told what they had, and meanwhile() before the last, if it is
  // to.
  template <class F, class G>
  __device__ __forceinline__ void through_address(const NtmInputs<T>& in, int first, int last, const T* addressed, int64_t row,
                                                  F told, bool calls, G meanwhile) {
    const auto open = [&](int g) { return [this, addressed, g](int k, auto f) { with_memory(addressed, g, k, f); }; };
    const bool bounded = this->bounded(in.beta);
    for (int g = 0; g < this->groups(); ++g)
      this->compare(in, first, last, g, bounded, open(g), small.content, small.sums + place.warp * plan.heads,
                    small.maximum + place.warp * plan.heads, per_slot.dots, per_slot.squares);
    tell_means(first, last);
    if (!bounded) this->soften(first, last, small.maximum, small.content, small.sums + place.warp * plan.heads);
    this->sync();
    told();
    if constexpr (P::fixed) {
      turn ^= 1;
      through_sharpening_alone(in, first, last);
    } else {
      this->shift(in, first, last, small.content, small.previous, small.sums, per_slot.shifted,
                  [&](int h, bool, bool speaks, T most) {
                    if (speaks) this->tell(small.most, h, most);
                  });
      this->sync();
      through_sharpening(in, first, last);
    }
    if (calls) meanwhile();
    this->sync();
    if constexpr (P::fixed) through_shift_alone(in, first, last);
    else through_shift(in, first, last);
    through_similarity(in, first, last, addressed);
    addressed_row = row;
    first_told = first;
    last_told = last;
  }
};

}  // namespace cuda
}  // namespace mann_fast

// A step of a Neural Turing Machine's memory back, as a block takes it: ntm_scan_backward.cu and ntm_cell_backward.cu go
// through the steps.
#pragma once
#include "ntm_address.cuh"

namespace mann_fast {
namespace cuda {

template <class T, int C, bool RESIDENT, bool ALONE, class P>
struct NtmBackward : NtmAddressBack<T, C, RESIDENT, ALONE, P> {
  using Base = NtmAddressBack<T, C, RESIDENT, ALONE, P>;
  using Base::held, Base::known, Base::pairs, Base::per_slot, Base::place, Base::plan, Base::small, Base::tiles,
      Base::first_slot;
  const NtmScanBackward& a;
  const int64_t sample;
  const int every;
  const bool of_reads;       // whether the reads have a gradient
  int visits = 0;            // steps gone through, in either direction
  int64_t written_row = -1;  // whose writes the warps have told of, and nobody has given yet; -1: none

  // With a fixed plan: weights of the lane's slot, of the step that comes, of the one before that and in a replay of the next,
  // each asked for a step before it is needed.
  T before[pairs], next[pairs], replayed[pairs];

  __device__ __forceinline__ NtmBackward(const NtmScanBackward& a, const P& plan, int every, Places places, int64_t sample,
                                         int rank, bool of_reads)
      : Base(plan, rank, a.eps, every, places), a(a), sample(sample), every(every), of_reads(of_reads) {}

  __device__ __forceinline__ NtmInputs<T> inputs(int visit) const { return small.in.of(visit, plan, true); }
  __device__ __forceinline__ T* memory(int step) const { return tiles.memories + step * tile_numbers(plan); }
  __device__ __forceinline__ const T* history(int64_t row) const {
    return static_cast<const T*>(a.history) + row * plan.R * a.N;
  }
  // The lane's weights of a step, or where t is -1 those that came in, of the first heads to the last.
  __device__ __forceinline__ void ask_weights(int64_t t, T (&weights)[pairs]) const {
    const T* rows = t < 0 ? static_cast<const T*>(a.weights) + sample * plan.R * a.N : history(t * a.B + sample);
    const int slot = this->half_slot(0);
    this->with_heads(0, plan.R, [&](int i, int h, bool there, bool) {
      weights[i] = there && slot < plan.N && t >= -1 ? rows[h * plan.N + slot] : T(0);
    });
  }

  __device__ __forceinline__ void begin() {
    const T *of_memory = static_cast<const T*>(a.grad_memory), *of_weights = static_cast<const T*>(a.grad_weights);
    this->begin_gradients(of_memory ? of_memory + sample * a.N * a.D : nullptr,
                          of_weights ? of_weights + sample * plan.R * a.N : nullptr, held, tiles.grad, per_slot.later);
    if (a.grad_start) this->begin_start(static_cast<T*>(a.grad_start) + sample * a.N * a.D);
  }

  __device__ __forceinline__ bool begins(int64_t t) const { return a.sequences.begins(t, a.B, sample); }
  // Where the replay of the step before `end` begins; 0 where there is none.
  __device__ __forceinline__ int64_t replay_before(int64_t end) const {
    return end > 0 ? a.sequences.replay_from(end - 1, every, a.B, sample) : 0;
  }

  __device__ __forceinline__ void begin_replay(int64_t first) {
    const bool anew = begins(first);
    const T* anchor = static_cast<const T*>(a.anchors) + anchor_offset(first, a.anchor_every, a.B, sample, a.D, a.N);
    this->begin_memory(first > 0 && !anew ? anchor : nullptr, this->first_memory(a, sample, anew), memory(0));
    this->know(memory(0));
    if constexpr (P::fixed) ask_weights(first, replayed);
  }

  // A step's write again, from the memory before it to the one after it.
  __device__ __forceinline__ void replay(const NtmInputs<T>& in, int64_t t, int64_t last, int step) {
    if constexpr (P::fixed) {
      const int slot = this->half_slot(0);
      this->with_heads(0, plan.R, [&](int i, int h, bool there, bool) {
        if (there) per_slot.now[h * plan.span + slot] = replayed[i];
      });
      ask_weights(t < last ? t + 1 : t, replayed);
      gpu::sync_warp();
      this->write(in, per_slot.now, 0, 0, known);
      store_tile(memory(step + 1), 0, this->threads(), known);
      return;
    }
    this->take_rows(history(t * a.B + sample), plan.N, per_slot.now);
    gpu::sync_warp();
    for (int g = 0; g < this->groups(); ++g)
      for (int k = 0; k < this->pieces(); ++k) {
        Tile<T, C> m;
        load_tile(memory(step), this->piece(g, k), this->threads(), m);
        this->write(in, per_slot.now, g, k, m);
        store_tile(memory(step + 1), this->piece(g, k), this->threads(), m);
      }
  }

  // Weights of the step and of the one before; both are asked for before either is waited for.
  __device__ __forceinline__ void take_weights(int64_t t) {
    if constexpr (P::fixed) {
      const int slot = this->half_slot(0);
      const bool anew = begins(t);
      this->with_heads(0, plan.R, [&](int i, int h, bool there, bool) {
        if (there) {
          per_slot.now[h * plan.span + slot] = before[i];
          small.previous[h * plan.span + slot] = anew ? T(slot == 0) : next[i];
        }
        before[i] = next[i];
      });
      ask_weights(t - 2, next);
      gpu::sync_warp();
      return;
    }
    const int64_t row = t * a.B + sample;
    const T* now = history(row);
    const bool anew = begins(t);
    const T* before = t > 0 ? history(row - a.B) : static_cast<const T*>(a.weights) + sample * plan.R * a.N;
    for (int g = 0; g < this->groups(); ++g)
      for (int i = place.lane; i < plan.heads * warp_slots; i += 32) {
        const int h = i / warp_slots, slot = this->group(g) + i % warp_slots;
        const bool there = first_slot + slot < plan.N;
        const int64_t from = static_cast<int64_t>(h) * plan.N + first_slot + slot;
        const T weight = there ? now[from] : T(0), previous = !there ? T(0) : anew ? T(first_slot + slot == 0) : before[from];
        per_slot.now[h * plan.span + slot] = weight;
        small.previous[h * plan.span + slot] = previous;
      }
    gpu::sync_warp();
  }

  // What reaches a memory, and the weights it was read by, from the reads.
  __device__ __forceinline__ void through_read(const NtmInputs<T>& in, const T* addressed) {
    if (!of_reads) return;
#pragma unroll(P::fixed ? 8 : 1)
    for (int r = 0; r < plan.reads; ++r)
      for (int g = 0; g < this->groups(); ++g) {
        T sum[lane_slots] = {};
        Four<T> weights[1];
        this->load_weights(per_slot.now, r, this->slots(g), weights);
        for (int k = 0; k < this->pieces(); ++k) {
          T rows[1][C];
          load_rows<1, C>(in.grads + r * plan.columns + this->first_column(k), plan.columns, rows);
          this->with_memory(addressed, g, k, [&](const Tile<T, C>& m) { add_dots<1, C>(m, rows, sum); });
          this->template with_grad<true>(g, k, [&](Tile<T, C>& grad) { add_products<1, C>(weights, rows, grad); });
        }
        add_lanes<4, 1, lane_slots>(sum, place.lane);
        if (place.owner) per_slot.later[r * plan.span + this->own(g)] += sum[0];
      }
  }

  // Back through the write: from the gradient of the memory after it to that of the memory before it.
  __device__ __forceinline__ void through_write(const NtmInputs<T>& in, const T* memory_before, int64_t row) {
    const int writes = plan.R - plan.reads;
#pragma unroll(P::fixed ? 8 : 1)
    for (int w = 0; w < writes; ++w)
      for (int k = 0; k < this->pieces(); ++k) {
        const int corner = w * plan.columns + this->first_column(k);
        T of_erase[C] = {}, of_add[C] = {}, erase[1][C], add[1][C];
        load_rows<1, C>(in.erase + corner, plan.columns, erase);
        load_rows<1, C>(in.add + corner, plan.columns, add);
        for (int g = 0; g < this->groups(); ++g) {
          // The gradient times what was there when this head's erase is taken out.
          Tile<T, C> erased;
          this->with_memory(memory_before, g, k, [&](const Tile<T, C>& m) { erased = m; });
          for (int v = 0; v < writes; ++v) {
            if (v == w) continue;
            Four<T> weight[1];
            T other[1][C];
            this->load_weights(per_slot.now, plan.reads + v, this->slots(g), weight);
            load_rows<1, C>(in.erase + v * plan.columns + this->first_column(k), plan.columns, other);
            this->keep_of(weight[0], other[0], erased);
          }
          Four<T> weight[1];
          this->load_weights(per_slot.now, plan.reads + w, this->slots(g), weight);
          T sum[lane_slots] = {};
          this->template with_grad<false>(g, k, [&](Tile<T, C>& grad) {
#pragma unroll
            for (int s = 0; s < lane_slots; ++s)
#pragma unroll
              for (int c = 0; c < C; ++c) erased.at[s][c] *= -grad.at[s][c];
            add_weighted<1, C>(erased, weight, of_erase);
            add_weighted<1, C>(grad, weight, of_add);
            add_dots<1, C>(erased, erase, sum);
            add_dots<1, C>(grad, add, sum);
          });
          add_lanes<4, 1, lane_slots>(sum, place.lane);
          if (place.owner) per_slot.later[(plan.reads + w) * plan.span + this->own(g)] += sum[0];
        }
        const int of_warp = place.warp * writes * plan.columns + corner;
        store_warp_sums<1, C>(of_erase, place.lane, small.of_erase + of_warp, plan.columns);
        store_warp_sums<1, C>(of_add, place.lane, small.of_add + of_warp, plan.columns);
      }
#pragma unroll(P::fixed ? 8 : 1)
    for (int w = 0; w < writes; ++w)
      for (int g = 0; g < this->groups(); ++g)
        for (int k = 0; k < this->pieces(); ++k) {
          Four<T> weight[1];
          T erase[1][C];
          this->load_weights(per_slot.now, plan.reads + w, this->slots(g), weight);
          load_rows<1, C>(in.erase + w * plan.columns + this->first_column(k), plan.columns, erase);
          this->template with_grad<true>(g, k, [&](Tile<T, C>& grad) { this->keep_of(weight[0], erase[0], grad); });
        }
    written_row = row;
  }

  // Back through step t, number `step` of its replay, but for a barrier after which all have told the gradients of what it
  // took. Calls told() and meanwhile() as through_address, the latter once.
  template <class F, class G>
  __device__ __forceinline__ void back(const NtmInputs<T>& in, int64_t t, int step, F told, G meanwhile) {
    const int64_t row = t * a.B + sample;
    const int reads = plan.reads, heads = plan.R;
    take_weights(t);
    if (plan.read_first) {
      this->know(memory(step));
      through_write(in, memory(step), row);
      through_read(in, memory(step));
      this->through_address(in, 0, heads, memory(step), row, told, true, meanwhile);
    } else {
      if (reads > 0) {
        this->know(memory(step + 1));
        through_read(in, memory(step + 1));
        this->through_address(in, 0, reads, memory(step + 1), row, told, reads == heads, meanwhile);
      }
      this->know(memory(step));
      through_write(in, memory(step), row);
      if (reads < heads) this->through_address(in, reads, heads, memory(step), row, told, true, meanwhile);
    }
  }

  // The gradients of keys and of what is written, of numbers that lie `at` a place of [heads, columns] or [writing heads,
  // columns], when all have told their parts.
  __device__ __forceinline__ T key_gradient(int at) const { return this->total(small.of_keys, at, plan.heads * plan.columns); }
  __device__ __forceinline__ T erase_gradient(int at) const { return total_written(small.of_erase, at); }
  __device__ __forceinline__ T add_gradient(int at) const { return total_written(small.of_add, at); }
  __device__ __forceinline__ T total_written(T* of_warps, int at) const {
    return this->total(of_warps, at, (plan.heads - plan.reads) * plan.columns);
  }

  // So many steps from `first` forward again, but for the last where that only changes the memory after it. The inputs of the
  // first are there, and so are those of the last once more after it.
  template <class Stream>
  __device__ __forceinline__ void replay_all(Stream& stream, int64_t first, int count) {
    begin_replay(first);
    for (int step = 0; step < (plan.read_first ? count - 1 : count); ++step) {
      stream.ask((first + (step + 1 < count ? step + 1 : step)) * a.B + sample);
      replay(inputs(visits), first + step, first + count - 1, step);
      stream.put(inputs(visits + 1));
      gpu::sync();
      ++visits;
    }
  }

  // Having gone back through a step at which the sample began anew.
  __device__ __forceinline__ void through_start() {
    Base::through_start(held, tiles.grad, per_slot.later, static_cast<T*>(a.grad_start) + sample * a.N * a.D);
  }

  __device__ __forceinline__ void end() {
    T* memory = static_cast<T*>(a.grad_in_memory) + sample * a.N * a.D;
    for (int g = 0; g < this->groups(); ++g)
      for (int k = 0; k < this->pieces(); ++k)
        this->template with_grad<false>(g, k, [&](Tile<T, C>& m) { this->give(m, g, k, memory); });
    this->give_rows(per_slot.later, plan.N, static_cast<T*>(a.grad_in_weights) + sample * plan.R * a.N);
  }
};

}  // namespace cuda
}  // namespace mann_fast

// What the two directions of ntm_scan share: inputs on their way, and the addressing up to the shift.
//
// A head's weights meet in rows that all warps see, since a shift brings a slot's from another warp, or another block. Heads are
// taken one at a time where a lane has columns, and two at a time, one in each half of a warp, where it has a slot.
#pragma once
#include "plan.cuh"

namespace mann_fast {
namespace cuda {

template <class T>
struct NtmInputs {
  using Number = T;
  T *keys, *erase, *add, *grads;   // [heads, columns], [writing heads, columns] twice, [reading heads, columns]
  T *beta, *gate, *gamma, *shift;  // [heads] three times, [heads, shifts]
  __device__ __host__ NtmInputs(Carver& carver, const Plan& plan, bool backward)
      : keys(carver.take<T>(plan.heads * plan.columns)), erase(carver.take<T>((plan.heads - plan.reads) * plan.columns)),
        add(carver.take<T>((plan.heads - plan.reads) * plan.columns)),
        grads(carver.take<T>(backward ? plan.reads * plan.columns : 0)), beta(carver.take<T>(plan.heads)),
        gate(carver.take<T>(plan.heads)), gamma(carver.take<T>(plan.heads)), shift(carver.take<T>(plan.heads * plan.shifts)) {}
};

__device__ __forceinline__ const void* grad_reads_of(const NtmScan&) { return nullptr; }
__device__ __forceinline__ const void* grad_reads_of(const NtmScanBackward& a) { return a.grad_reads; }

// The inputs of one step on their way, as in lrua_scan.cuh.
template <class T, class Arguments>
class NtmStream {
 public:
  __device__ __forceinline__ NtmStream(const Arguments& a, const Plan& plan) : a_(a), plan_(plan) {}

  __device__ __forceinline__ void ask(int64_t row) {
    row_ = row;
#pragma unroll
    for (int j = 0; j < ahead; ++j) {
      const int i = gpu::thread() + j * gpu::threads();
      asked_[j] = i < count() ? get(at(i)) : T(0);
    }
  }

  __device__ __forceinline__ void put(const NtmInputs<T>& in) {
#pragma unroll
    for (int j = 0; j < ahead; ++j) {
      const int i = gpu::thread() + j * gpu::threads();
      if (i < count()) put(in, at(i), asked_[j]);
    }
    for (int i = gpu::thread() + ahead * gpu::threads(); i < count(); i += gpu::threads()) put(in, at(i), get(at(i)));
  }

 private:
  static constexpr int ahead = 3, kinds = 8;
  struct Place {
    int kind, i;
  };

  // Of one step: keys, erase, add, gradients of reads, sharpness, gates, sharpening, shift.
  __device__ __forceinline__ int count(int kind) const {
    const int writes = plan_.R - plan_.reads;
    switch (kind) {
      case 0: return plan_.R * plan_.D;
      case 1:
      case 2: return writes * plan_.D;
      case 3: return grad_reads_of(a_) ? plan_.reads * plan_.D : 0;
      case 7: return plan_.R * plan_.shifts;
      default: return plan_.R;
    }
  }
  __device__ __forceinline__ int count() const {
    int sum = 0;
#pragma unroll
    for (int kind = 0; kind < kinds; ++kind) sum += count(kind);
    return sum;
  }
  __device__ __forceinline__ Place at(int i) const {
    int kind = 0;
    while (i >= count(kind)) i -= count(kind++);
    return {kind, i};
  }

  __device__ __forceinline__ T get(Place p) const {
    const void* data = p.kind == 0   ? a_.keys
                       : p.kind == 1 ? a_.erase
                       : p.kind == 2 ? a_.add
                       : p.kind == 3 ? grad_reads_of(a_)
                       : p.kind == 4 ? a_.sharpness
                       : p.kind == 5 ? a_.gates
                       : p.kind == 6 ? a_.sharpening
                                     : a_.shift;
    return load_as<T>(data, a_.input, row_ * count(p.kind) + p.i);
  }

  __device__ __forceinline__ void put(const NtmInputs<T>& in, Place p, T value) const {
    T* to = p.kind == 0   ? in.keys
            : p.kind == 1 ? in.erase
            : p.kind == 2 ? in.add
            : p.kind == 3 ? in.grads
            : p.kind == 4 ? in.beta
            : p.kind == 5 ? in.gate
            : p.kind == 6 ? in.gamma
                          : in.shift;
    to[p.kind < 4 ? p.i / plan_.D * plan_.columns + p.i % plan_.D : p.i] = value;
  }

  const Arguments& a_;
  const Plan& plan_;
  int64_t row_ = 0;
  T asked_[ahead];
};

// x to a power of at least 0, infinite too, for x from 0 to 1; 0 to the power 0 and 1 to any are 1. A negative or NaN x gives
// NaN.
template <class T>
__device__ __forceinline__ T power(T x, T exponent) {
  if (x == T(0)) return exponent == T(0) ? T(1) : T(0);
  if (x == T(1)) return T(1);
  return exp(exponent * log(x));
}

// Of the half of a warp that a lane is in.
template <class T>
__device__ __forceinline__ T add_half(T value) {
#pragma unroll
  for (int mask = 8; mask >= 1; mask /= 2) value += gpu::shuffle_xor(value, mask);
  return value;
}
template <class T>
__device__ __forceinline__ T maximum_half(T value) {
#pragma unroll
  for (int mask = 8; mask >= 1; mask /= 2) {
    const T other = gpu::shuffle_xor(value, mask);
    value = other > value || other != other ? other : value;
  }
  return value;
}

// A scan of a Neural Turing Machine's memory as one thread sees it.
template <class T, int C, bool RESIDENT>
struct NtmThread : Thread<T, C, 1, RESIDENT> {
  using Base = Thread<T, C, 1, RESIDENT>;
  using Base::place, Base::plan, Base::first_slot;

  __device__ __forceinline__ NtmThread(const Plan& plan, int rank, double eps) : Base(plan, rank, eps) {}

  // Rows [heads, span] of the block that has the slot, which is counted in the sample.
  __device__ __forceinline__ T at(T* rows, int h, int slot) const {
    const int block = plan.cluster > 1 ? slot / plan.span : 0;
    T* from = rows + h * plan.span + slot - block * plan.span;
    return plan.cluster > 1 ? *gpu::of_block(from, block) : *from;
  }
  // What warp w of all blocks has told in [warps, heads].
  __device__ __forceinline__ T told(T* of_warps, int w, int h) const {
    T* from = of_warps + w % plan.warps * plan.heads + h;
    return plan.cluster > 1 ? *gpu::of_block(from, w / plan.warps) : *from;
  }
  __device__ __forceinline__ void tell(T* of_warps, int h, T value) const { of_warps[place.warp * plan.heads + h] = value; }

  // Calls f(h, there, speaks) with a head for each half of the warp; all lanes come along, also where there is none.
  template <class F>
  __device__ __forceinline__ void with_heads(int first, int last, F f) const {
    for (int pair = first; pair < last; pair += 2) {
      const int h = pair + place.lane / warp_slots;
      f(h < last ? h : last - 1, h < last, h < last && place.lane % warp_slots == 0);
    }
  }
  // The lane's slot of a group in its half of the warp.
  __device__ __forceinline__ int half_slot(int g) const { return this->group(g) + place.lane % warp_slots; }

  // Slots that are `by` further, from 0 to N.
  __device__ __forceinline__ int round(int slot, int by) const { return slot + by < plan.N ? slot + by : slot + by - plan.N; }
  // How much further move j takes what comes from there (j - S slots before, going round), or what goes there.
  __device__ __forceinline__ int first_origin() const { return plan.shifts / 2 % plan.N; }
  __device__ __forceinline__ int next_origin(int by) const { return by == 0 ? plan.N - 1 : by - 1; }
  __device__ __forceinline__ int first_target() const { return first_origin() == 0 ? 0 : plan.N - first_origin(); }
  __device__ __forceinline__ int next_target(int by) const { return by + 1 == plan.N ? 0 : by + 1; }

  // Over the warps' sums of exponentials: what makes a head's exponentials its content weights.
  __device__ __forceinline__ T content_scale(T* sums, int h) const { return T(1) / this->total(sums, h, plan.heads); }

  // Shifted weights of the warp's slots, in `out` [heads, span]; then, a head for each half of the warp, f(h, there, speaks,
  // the maximum of them).
  template <class F>
  __device__ __forceinline__ void shift(const NtmInputs<T>& in, int first, int last, T* content, T* previous, T* sums, T* out,
                                        F f) const {
    with_heads(first, last, [&](int h, bool there, bool speaks) {
      const T gate = in.gate[h], by_content = gate * content_scale(sums, h), rest = T(1) - gate;
      T most = 0;
      for (int g = 0; g < this->groups(); ++g) {
        const int own = half_slot(g), slot = first_slot + own;
        T sum = 0;
        if (slot < plan.N) {
          int by = first_origin();
          for (int j = 0; j < plan.shifts; ++j, by = next_origin(by)) {
            const int from = round(slot, by);
            sum += in.shift[h * plan.shifts + j] * (by_content * at(content, h, from) + rest * at(previous, h, from));
          }
        }
        most = sum > most || sum != sum ? sum : most;
        if (there) out[h * plan.span + own] = sum;
      }
      f(h, there, speaks, maximum_half(most));
    });
  }

  // The maximum of what all warps have told of a head.
  __device__ __forceinline__ T maximum_told(T* of_warps, int h) const {
    T most = 0;
    for (int w = place.lane % warp_slots; w < plan.warps * plan.cluster; w += warp_slots) {
      const T value = told(of_warps, w, h);
      most = value > most || value != value ? value : most;
    }
    return maximum_half(most);
  }

  // Erases and adds what the heads that write have weights [heads, span] for.
  __device__ __forceinline__ void write(const NtmInputs<T>& in, const T* weights, int g, int k, Tile<T, C>& m) const {
    Four<T> weight[1];
    T rows[1][C];
    for (int w = 0; w < plan.R - plan.reads; ++w) {
      this->load_weights(weights, plan.reads + w, this->slots(g), weight);
      load_rows<1, C>(in.erase + w * plan.columns + this->first_column(k), plan.columns, rows);
      keep_of(weight[0], rows[0], m);
    }
    for (int w = 0; w < plan.R - plan.reads; ++w) {
      this->load_weights(weights, plan.reads + w, this->slots(g), weight);
      load_rows<1, C>(in.add + w * plan.columns + this->first_column(k), plan.columns, rows);
      add_products<1, C>(weight, rows, m);
    }
  }
  // m times what an erase leaves.
  __device__ __forceinline__ void keep_of(const Four<T>& weight, const T (&erase)[C], Tile<T, C>& m) const {
#pragma unroll
    for (int s = 0; s < lane_slots; ++s)
#pragma unroll
      for (int c = 0; c < C; ++c) m.at[s][c] *= T(1) - weight.at[s] * erase[c];
  }
};

template <class Arguments>
Plan ntm_sizes_of(const Arguments& a) {
  Plan plan{};
  plan.N = static_cast<int>(a.N);
  plan.D = static_cast<int>(a.D);
  plan.R = static_cast<int>(a.R + a.W);
  plan.reads = static_cast<int>(a.R);
  plan.shifts = static_cast<int>(a.shifts);
  return plan;
}

template <class Arguments>
const char* ntm_too_large(const Arguments& a) {
  if ((a.R + a.W) * a.shifts >= 1 << 26) return "the kernel takes fewer than 2^26 moves in the shifts of a step";
  return too_large(a.N, a.D, a.R + a.W);
}

}  // namespace cuda
}  // namespace mann_fast

// What the two directions share: a scan's inputs on their way, and the addressing up to the shift.
//
// A head's weights meet in rows that all warps see, since a shift brings a slot's from another warp, or another block. Heads are
// taken one at a time where a lane has columns, and two at a time, one in each half of a warp, where it has a slot.
//
// Common sizes have kernels that know them when they are compiled (NtmFixedPlan). With 8 warps a lane has one slot of a head,
// which it keeps at hand from one barrier to the next.
#pragma once
#include "plan.cuh"

namespace mann_fast {
namespace cuda {

// A plan of a common size, as FixedPlan in scan.cuh: heads, moves and their order are known as well. What is not: how many slots
// and columns are padding, and whether the memories of a replay have room in shared memory.
template <int READS, int WRITES, int WARPS, int C, bool READ_FIRST>
struct NtmFixedPlan {
  int N, D;
  bool near_tiles;
  static constexpr int R = READS + WRITES, heads = R, reads = READS, shifts = 3;
  static constexpr int warps = WARPS, cluster = 1, groups = 1, pieces = 1;
  static constexpr int piece_columns = C, columns = C * column_lanes, span = WARPS * warp_slots;
  static_assert(READS * columns <= 32 * warps && 2 * WRITES * columns <= 32 * warps && R * (columns + 3 + shifts) <= 32 * warps,
                "a thread gives out one number of the reads, of what is written and of the heads");
  static constexpr bool resident = true, near_small = true, near_slots = true, read_first = READ_FIRST;

  static constexpr bool fixed = true;
  __device__ __forceinline__ static NtmFixedPlan of(const Plan& plan) { return {plan.N, plan.D, plan.near_tiles}; }
  static bool is(const Plan& plan) {
    return plan.R == R && plan.heads == heads && plan.reads == reads && plan.shifts == shifts && plan.warps == warps &&
           plan.cluster == 1 && plan.groups == 1 && plan.read_first == read_first && plan.piece_columns == C &&
           plan.pieces == 1 && plan.resident && plan.near_small && plan.near_slots && plan.N > shifts;
  }
};

// Of a fixed plan, the moves and the pairs of heads; else 1, for arrays that are not used.
template <class P>
constexpr int fixed_shifts = 1;
template <class P>
constexpr int fixed_pairs = 1;
template <int READS, int WRITES, int WARPS, int C, bool READ_FIRST>
constexpr int fixed_shifts<NtmFixedPlan<READS, WRITES, WARPS, C, READ_FIRST>> = 3;
template <int READS, int WRITES, int WARPS, int C, bool READ_FIRST>
constexpr int fixed_pairs<NtmFixedPlan<READS, WRITES, WARPS, C, READ_FIRST>> = (READS + WRITES + 1) / 2;

template <class T>
struct NtmInputs {
  using Number = T;
  T *keys, *erase, *add, *grads;   // [heads, columns], [writing heads, columns] twice, [reading heads, columns]
  T *beta, *gate, *gamma, *shift;  // [heads] three times, [heads, shifts]
  template <class P>
  __device__ __host__ NtmInputs(Carver& carver, const P& plan, bool backward)
      : keys(carver.take<T>(plan.heads * plan.columns)), erase(carver.take<T>((plan.heads - plan.reads) * plan.columns)),
        add(carver.take<T>((plan.heads - plan.reads) * plan.columns)),
        grads(carver.take<T>(backward ? plan.reads * plan.columns : 0)), beta(carver.take<T>(plan.heads)),
        gate(carver.take<T>(plan.heads)), gamma(carver.take<T>(plan.heads)), shift(carver.take<T>(plan.heads * plan.shifts)) {}
};

__device__ __forceinline__ const void* grad_reads_of(const NtmScan&) { return nullptr; }
__device__ __forceinline__ const void* grad_reads_of(const NtmScanBackward& a) { return a.grad_reads; }

// The inputs of one step on their way, as in lrua_scan.cuh.
template <class T, class Arguments, class P>
class NtmStream {
 public:
  __device__ __forceinline__ NtmStream(const Arguments& a, const P& plan) : a_(a), plan_(plan) {
    if constexpr (keeps) {
#pragma unroll
      for (int j = 0; j < ahead; ++j) ways_[j] = way(gpu::thread() + j * threads());
    }
  }

  __device__ __forceinline__ void ask(int64_t row) {
    row_ = row;
#pragma unroll
    for (int j = 0; j < ahead; ++j) asked_[j] = get(way_ahead(j));
  }

  __device__ __forceinline__ void put(const NtmInputs<T>& in) {
#pragma unroll
    for (int j = 0; j < ahead; ++j) put(in, way_ahead(j), asked_[j]);
    if constexpr (!P::fixed)
      for (int i = gpu::thread() + ahead * threads(); i < count(); i += threads()) put(in, way(i), get(way(i)));
  }

 private:
  static constexpr bool backward = std::is_same<Arguments, NtmScanBackward>::value, keeps = P::fixed || !backward;
  static constexpr int kinds = 8;

  // From where to where a number goes each step: it comes from rows of `width`, and is put at `to`, counted from the keys on.
  // From nowhere: there is none.
  struct Way {
    const void* from;
    int width, to;
  };

  // How many of them a thread asks for ahead; with a fixed plan that is all.
  static constexpr int needed() {
    if constexpr (P::fixed) {
      const int vectors = P::R + 2 * (P::R - P::reads) + (backward ? P::reads : 0);
      return (vectors * P::columns + P::R * (3 + P::shifts) + 32 * P::warps - 1) / (32 * P::warps);
    } else {
      return 3;
    }
  }
  static constexpr int ahead = needed();

  __device__ __forceinline__ int threads() const { return P::fixed ? 32 * plan_.warps : gpu::threads(); }

  // Of one step: keys, erase, add, gradients of reads, sharpness, gates, sharpening, shift.
  __device__ __forceinline__ int count(int kind) const {
    const int writes = plan_.R - plan_.reads;
    return kind == 0   ? plan_.R * plan_.D
           : kind < 3  ? writes * plan_.D
           : kind == 3 ? (grad_reads_of(a_) ? plan_.reads * plan_.D : 0)
           : kind < 7  ? plan_.R
                       : plan_.R * plan_.shifts;
  }
  __device__ __forceinline__ int count() const {
    int sum = 0;
#pragma unroll
    for (int kind = 0; kind < kinds; ++kind) sum += count(kind);
    return sum;
  }

  __device__ __forceinline__ Way way(int i) const {
    Carver carver(nullptr);
    const NtmInputs<T> in(carver, plan_, backward);
    const void* const from[] = {a_.keys, a_.erase, a_.add, grad_reads_of(a_), a_.sharpness, a_.gates, a_.sharpening, a_.shift};
    const T* const to[] = {in.keys, in.erase, in.add, in.grads, in.beta, in.gate, in.gamma, in.shift};
    Way found{nullptr, 0, 0};
#pragma unroll
    for (int kind = 0; kind < kinds; ++kind) {
      const int of_kind = count(kind);
      if (i >= 0 && i < of_kind)
        found = {number_of(from[kind], a_.input, i), of_kind,
                 static_cast<int>(to[kind] - in.keys) + (kind < 4 ? vector_at(plan_, i) : i)};
      i -= of_kind;
    }
    return found;
  }
  __device__ __forceinline__ Way way_ahead(int j) const {
    if constexpr (keeps) return ways_[j];
    else return way(gpu::thread() + j * threads());
  }

  __device__ __forceinline__ T get(const Way& way) const {
    return way.from ? load_as<T>(way.from, a_.input, row_ * way.width) : T(0);
  }
  __device__ __forceinline__ void put(const NtmInputs<T>& in, const Way& way, T value) const {
    if (way.from) in.keys[way.to] = value;
  }

  const Arguments& a_;
  const P& plan_;
  int64_t row_ = 0;
  Way ways_[keeps ? ahead : 1];
  T asked_[ahead] = {};
};

// x to a power of at least 0, infinite too, for x from 0 to 1; 0 to the power 0 and 1 to any are 1. A negative or NaN x gives
// NaN. Without a jump, so that no lanes part.
__device__ __forceinline__ float power(float x, float exponent) {
  const float raised = exp2(exponent * log2(x));
  return x == 1.0f ? 1.0f : x != 0.0f ? raised : exponent == 0.0f ? 1.0f : 0.0f;
}
__device__ __forceinline__ double power(double x, double exponent) {
  if (x == 0) return exponent == 0 ? 1 : 0;
  if (x == 1) return 1;
  return exp(exponent * log(x));
}

// The same of any x, as exact where the power is far from 1: of x = m 2^k, exponent k is rounded only when the whole powers of 2
// are off. NaN where x is infinite, and perhaps where the exponent is.
__device__ __forceinline__ float far_power(float x, float exponent) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const int32_t whole = static_cast<int32_t>(bits - 0x3f400000u) >> 23;  // m is from 3/4 to 3/2
  bits -= static_cast<uint32_t>(whole) << 23;
  float m;
  memcpy(&m, &bits, sizeof m);
  const float k = static_cast<float>(whole), of_m = exponent * log2(m), power = rint(fma(exponent, k, of_m));
  const float raised = exp2(fma(exponent, k, -power) + of_m) * exp2(power);
  return x > 0.0f && x < INFINITY ? raised : x != 0.0f ? NAN : exponent == 0.0f ? 1.0f : 0.0f;
}

// A power of 2 about as far from 1 as from the number of slots.
constexpr int middle_of(int slots) { return slots >= 4 ? 2 * middle_of(slots / 4) : 1; }

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
template <class T, int C, bool RESIDENT, bool ALONE, class P>
struct NtmThread : Thread<T, C, 1, RESIDENT, ALONE || P::fixed, P> {
  using Base = Thread<T, C, 1, RESIDENT, ALONE || P::fixed, P>;
  using Base::place, Base::plan, Base::first_slot;
  static constexpr int moves = fixed_shifts<P>, pairs = fixed_pairs<P>;
  int origins[moves];  // of a fixed plan: the slots that the moves take the lane's slot from

  __device__ __forceinline__ NtmThread(const P& plan, int rank, double eps) : Base(plan, rank, eps) {
    if constexpr (P::fixed) {
      int by = first_origin();
#pragma unroll
      for (int j = 0; j < moves; ++j, by = next_origin(by)) origins[j] = round(half_slot(0), by);
    }
  }

  // Whether a sample has more than one block.
  __device__ __forceinline__ bool several() const { return this->blocks() > 1; }

  // Rows [heads, span] of the block that has the slot, which is counted in the sample.
  __device__ __forceinline__ T at(T* rows, int h, int slot) const {
    const int block = several() ? slot / plan.span : 0;
    T* from = rows + h * plan.span + slot - block * plan.span;
    return several() ? *gpu::of_block(from, block) : *from;
  }
  // What warp w of all blocks has told in [warps, heads].
  __device__ __forceinline__ T told(T* of_warps, int w, int h) const {
    T* from = of_warps + w % plan.warps * plan.heads + h;
    return several() ? *gpu::of_block(from, w / plan.warps) : *from;
  }
  __device__ __forceinline__ void tell(T* of_warps, int h, T value) const { of_warps[place.warp * plan.heads + h] = value; }

  // Calls f(pair, h, there, speaks) with a head for each half of the warp; all lanes come along, also where there is none.
  template <class F>
  __device__ __forceinline__ void with_heads(int first, int last, F f) const {
#pragma unroll(P::fixed ? 8 : 1)
    for (int pair = first; pair < last; pair += 2) {
      const bool both = pair + 1 < last, there = both || place.lane < warp_slots;
      f((pair - first) / 2, both ? pair + place.lane / warp_slots : pair, there, there && place.lane % warp_slots == 0);
    }
  }
  // The lane's slot of a group in its half of the warp.
  __device__ __forceinline__ int half_slot(int g) const { return this->group(g) + place.lane % warp_slots; }

  // Slots that are `by` further, from 0 to N.
  __device__ __forceinline__ int round(int slot, int by) const { return slot + by < plan.N ? slot + by : slot + by - plan.N; }
  // How much further move j takes what comes from there (j - S slots before, going round), or what goes there.
  __device__ __forceinline__ int first_origin() const { return P::fixed ? plan.shifts / 2 : plan.shifts / 2 % plan.N; }
  __device__ __forceinline__ int next_origin(int by) const { return by == 0 ? plan.N - 1 : by - 1; }
  __device__ __forceinline__ int first_target() const { return first_origin() == 0 ? 0 : plan.N - first_origin(); }
  __device__ __forceinline__ int next_target(int by) const { return by + 1 == plan.N ? 0 : by + 1; }

  // Calls f(j, slot) for all moves, with where they take a slot from, or to. The lane's own group where a plan is fixed, which
  // has them at hand: one move's origin is the target of the opposite one.
  template <class F>
  __device__ __forceinline__ void with_origins(int slot, F f) const {
    if constexpr (P::fixed) {
#pragma unroll
      for (int j = 0; j < moves; ++j) f(j, origins[j]);
    } else {
      int by = first_origin();
      for (int j = 0; j < plan.shifts; ++j, by = next_origin(by)) f(j, round(slot, by));
    }
  }
  template <class F>
  __device__ __forceinline__ void with_targets(int slot, F f) const {
    if constexpr (P::fixed) {
#pragma unroll
      for (int j = 0; j < moves; ++j) f(j, origins[moves - 1 - j]);
    } else {
      int by = first_target();
      for (int j = 0; j < plan.shifts; ++j, by = next_target(by)) f(j, round(slot, by));
    }
  }

  // Over the warps' sums of exponentials: what makes a head's exponentials its content weights.
  __device__ __forceinline__ T content_scale(T* sums, int h) const { return gpu::reciprocal(this->total(sums, h, plan.heads)); }

  // Shifted weights of the warp's slots, in `out` [heads, span]; then, a head for each half of the warp, f(h, there, speaks,
  // the maximum of them).
  template <class F>
  __device__ __forceinline__ void shift(const NtmInputs<T>& in, int first, int last, T* content, T* previous, T* sums, T* out,
                                        F f) const {
    with_heads(first, last, [&](int, int h, bool there, bool speaks) {
      const T gate = in.gate[h], by_content = gate * content_scale(sums, h), rest = T(1) - gate;
      T most = 0;
      for (int g = 0; g < this->groups(); ++g) {
        const int own = half_slot(g), slot = first_slot + own;
        T sum = 0;
        if (slot < plan.N)
          with_origins(slot, [&](int j, int from) {
            sum += in.shift[h * plan.shifts + j] * (by_content * at(content, h, from) + rest * at(previous, h, from));
          });
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
#pragma unroll(P::fixed ? 8 : 1)
    for (int w = 0; w < plan.R - plan.reads; ++w) {
      this->load_weights(weights, plan.reads + w, this->slots(g), weight);
      load_rows<1, C>(in.erase + w * plan.columns + this->first_column(k), plan.columns, rows);
      keep_of(weight[0], rows[0], m);
    }
#pragma unroll(P::fixed ? 8 : 1)
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
  plan.read_first = a.read_first;
  return plan;
}

template <class Arguments>
const char* ntm_too_large(const Arguments& a) {
  if ((a.R + a.W) * a.shifts >= 1 << 26) return "the kernel takes fewer than 2^26 moves in the shifts of a step";
  return too_large(a.N, a.D, a.R + a.W);
}

// Calls f with sizes of the kernel that a plan asks for, and the kind of plan it takes. Known when compiled are 113 to 128 slots:
// of 17 to 40 numbers with a head of each kind, in both orders, and of 33 to 40 with four that read. Each is a kernel more, in
// either direction.
template <class T, class F>
const char* with_ntm_kernel(const Plan& plan, F f) {
  return with_tile<T>(plan, [&](auto c, auto resident) {
    const auto with = [&](auto kind) { return f(c, resident, kind); };
    if constexpr (decltype(resident)::value) {
      constexpr int columns = decltype(c)::value;
      if constexpr (columns == 4 || columns == 5) {
        using ReadFirst = NtmFixedPlan<1, 1, 8, columns, true>;
        using WriteFirst = NtmFixedPlan<1, 1, 8, columns, false>;
        if (ReadFirst::is(plan)) return with(PlanKind<ReadFirst>());
        if (WriteFirst::is(plan)) return with(PlanKind<WriteFirst>());
      }
      if constexpr (columns == 5) {
        using FourReads = NtmFixedPlan<4, 1, 8, columns, true>;
        if (FourReads::is(plan)) return with(PlanKind<FourReads>());
      }
    }
    return with(PlanKind<Plan>());
  });
}

}  // namespace cuda
}  // namespace mann_fast

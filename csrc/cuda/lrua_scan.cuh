// What the two directions of lrua_scan share: inputs on their way, what warps tell each other, and the write.
#pragma once
#include "plan.cuh"

namespace mann_fast {
namespace cuda {

// Keys, write vectors and gradients of reads, [heads, columns] each, lie one after the other.
template <class T>
struct Inputs {
  using Number = T;
  T *keys, *vectors, *grads, *gate, *rest, *beta;
  int* slots;
  __device__ __host__ Inputs(Carver& carver, const Plan& plan, bool backward)
      : keys(carver.take<T>((backward ? 3 : 2) * plan.heads * plan.columns)), vectors(keys + plan.heads * plan.columns),
        grads(vectors + plan.heads * plan.columns), gate(carver.take<T>(plan.heads)), rest(carver.take<T>(plan.heads)),
        beta(carver.take<T>(plan.heads)), slots(carver.take<int>(plan.heads)) {}
};

// What the warps tell each other.
template <class T>
struct Exchange {
  using Bits = typename Order<T>::Bits;
  T *sums, *maximum;      // [2, warps, heads] and [warps, heads]
  T *reads, *of_vectors;  // [warps, heads, columns]: reads, or gradients of keys; gradients of write vectors
  T* scalars;             // [warps, 3, heads]: gradients of sharpness and gate
  Bits* orders;           // [warps, heads]: the least used of each warp
  int *candidates, *chosen;
  __device__ __host__ Exchange(Carver& carver, const Plan& plan, bool backward)
      : sums(carver.take<T>(2 * plan.warps * plan.heads)), maximum(carver.take<T>(plan.warps * plan.heads)),
        reads(carver.take<T>(plan.warps * plan.heads * plan.columns)),
        of_vectors(carver.take<T>(backward ? plan.warps * plan.heads * plan.columns : 0)),
        scalars(carver.take<T>(backward ? 3 * plan.warps * plan.heads : 0)),
        orders(carver.take<Bits>(backward ? 0 : plan.warps * plan.heads)),
        candidates(carver.take<int>(backward ? 0 : plan.warps * plan.heads)),
        chosen(carver.take<int>(plan.warps * plan.heads)) {}
};

// What only one direction has among its inputs.
__device__ __forceinline__ const void* grad_reads_of(const LruaScan&) { return nullptr; }
__device__ __forceinline__ const void* grad_reads_of(const LruaScanBackward& a) { return a.grad_reads; }
__device__ __forceinline__ const int64_t* slots_of(const LruaScan&) { return nullptr; }
__device__ __forceinline__ const int64_t* slots_of(const LruaScanBackward& a) { return a.slots; }

// The inputs of one step on their way: each thread has asked for a few numbers, and waits for them only when it puts them
// in their places, a step later.
template <class T, class Arguments>
class Stream {
 public:
  __device__ __forceinline__ Stream(const Arguments& a, const Plan& plan) : a_(a), plan_(plan) {}

  __device__ __forceinline__ void ask(int64_t row) {
    row_ = row;
#pragma unroll
    for (int j = 0; j < ahead; ++j) {
      const int i = gpu::thread() + j * gpu::threads();
      asked_[j] = i < count() ? get(i) : T(0);
    }
  }

  __device__ __forceinline__ void put(const Inputs<T>& in) {
#pragma unroll
    for (int j = 0; j < ahead; ++j) {
      const int i = gpu::thread() + j * gpu::threads();
      if (i < count()) put(in, i, asked_[j]);
    }
    for (int i = gpu::thread() + ahead * gpu::threads(); i < count(); i += gpu::threads()) put(in, i, get(i));
  }

 private:
  static constexpr int ahead = 3;

  // Keys, write vectors and where there are any gradients of reads; then gates, sharpness and slots.
  __device__ __forceinline__ int vectors() const { return grad_reads_of(a_) ? 3 : 2; }
  __device__ __forceinline__ int count() const { return plan_.R * (plan_.D * vectors() + 3); }

  __device__ __forceinline__ T get(int i) const {
    const int size = plan_.R * plan_.D, kind = i / size;
    if (kind < vectors()) {
      const void* data = kind == 0 ? a_.keys : kind == 1 ? a_.write_vectors : grad_reads_of(a_);
      return load_as<T>(data, a_.input, row_ * size + i - kind * size);
    }
    const int rest = i - vectors() * size, r = rest % plan_.R;
    const int64_t place = row_ * plan_.R + r;
    if (rest < plan_.R) return load_as<T>(a_.gate_logits, a_.input, place);
    if (rest < 2 * plan_.R) return a_.sharpness ? load_as<T>(a_.sharpness, a_.input, place) : T(1);
    return slots_of(a_) ? static_cast<T>(slots_of(a_)[place]) : T(0);  // exact: a plan has fewer than 2^24 slots
  }

  __device__ __forceinline__ void put(const Inputs<T>& in, int i, T value) const {
    const int size = plan_.R * plan_.D, kind = i / size;
    if (kind < vectors()) {
      const int j = i - kind * size;
      in.keys[kind * plan_.heads * plan_.columns + plan_.vector_at(j)] = value;
      return;
    }
    const int rest = i - vectors() * size, r = rest % plan_.R;
    if (rest < plan_.R) gate_shares(value, in.gate[r], in.rest[r]);
    else if (rest < 2 * plan_.R) in.beta[r] = value;
    else in.slots[r] = static_cast<int>(value);
  }

  const Arguments& a_;
  const Plan& plan_;
  int64_t row_ = 0;
  T asked_[ahead];
};

// A scan of a least-recently-used-access memory as one thread sees it.
template <class T, int C, int HEADS, bool RESIDENT, bool ALONE>
struct LruaThread : Thread<T, C, HEADS, RESIDENT, ALONE> {
  using Base = Thread<T, C, HEADS, RESIDENT, ALONE>;
  using Base::OWN, Base::place, Base::plan, Base::first_slot;
  bool shared_target;

  __device__ __forceinline__ LruaThread(const Plan& plan, int rank, double eps, bool shared_target)
      : Base(plan, rank, eps), shared_target(shared_target) {}

  // Write weights [heads, span] of the warp's slots; own lanes only.
  __device__ __forceinline__ void weigh_writes(const Inputs<T>& in, const int* chosen, const T* read_weights,
                                               T* write_weights) const {
    for (int g = 0; g < this->groups(); ++g) {
      const int own_slot = this->own(g);
      for (int first = 0; first < plan.heads; first += HEADS) {
#pragma unroll
        for (int j = 0; j < OWN; ++j) {
          const int r = first + place.own_head + j;
          T weight = 0;
          if (r < plan.R) weight = in.gate[r] * read_weights[r * plan.span + own_slot];
          if (r < plan.R && is_target(chosen, r, first_slot + own_slot)) weight += in.rest[r];
          if (place.owner) write_weights[r * plan.span + own_slot] = weight;
        }
      }
    }
  }
  __device__ __forceinline__ bool is_target(const int* chosen, int r, int slot) const {
    if (!shared_target) return chosen[r] == slot;
    bool any = false;
    for (int i = 0; i < plan.R; ++i) any |= chosen[i] == slot;
    return any;
  }

  // Erases the least used slot and adds what the heads write.
  __device__ __forceinline__ void write(const Inputs<T>& in, int erased, const T* write_weights, int g, int k,
                                        Tile<T, C>& m) const {
#pragma unroll
    for (int s = 0; s < lane_slots; ++s)
      if (first_slot + this->slots(g) + s == erased) {
#pragma unroll
        for (int c = 0; c < C; ++c) m.at[s][c] = 0;
      }
    for (int first = 0; first < plan.heads; first += HEADS) {
      Four<T> weights[HEADS];
      T rows[HEADS][C];
      this->load_weights(write_weights, first, this->slots(g), weights);
      load_rows<HEADS, C>(in.vectors + first * plan.columns + this->first_column(k), plan.columns, rows);
      add_products<HEADS, C>(weights, rows, m);
    }
  }
};

// One head at a time costs fewer sums over lanes where there is but one; more than that would ask for twice the kernels.
inline int lrua_heads_at_once(const Plan& plan) { return plan.resident && plan.R == 1 ? 1 : 4; }

template <class Arguments>
Plan sizes_of(const Arguments& a) {
  Plan plan{};
  plan.N = static_cast<int>(a.N);
  plan.D = static_cast<int>(a.D);
  plan.R = static_cast<int>(a.R);
  return plan;
}

// Calls f with types and sizes of the kernel that a plan asks for.
template <class T, class F>
const char* with_kernel(const Plan& plan, F f) {
  return with_tile<T>(plan, [&](auto c, auto resident) {
    if constexpr (decltype(resident)::value)
      if (plan.heads_at_once == 1) return f(c, std::integral_constant<int, 1>(), resident);
    return f(c, std::integral_constant<int, 4>(), resident);
  });
}

}  // namespace cuda
}  // namespace mann_fast

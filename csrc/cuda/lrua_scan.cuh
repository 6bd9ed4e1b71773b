// What the two directions of lrua_scan share: inputs on their way, what warps tell each other, and the write.
#pragma once
#include "plan.cuh"

namespace mann_fast {
namespace cuda {

// Keys, write vectors and gradients of reads, [heads, columns] each, lie one after the other.
template <class T>
struct Inputs {
  using Number = T;
  T *keys, *vectors, *grads, *gate, *rest, *beta, *squares;  // squares: of keys, where they are prepared
  int* slots;
  template <class P>
  __device__ __host__ Inputs(Carver& carver, const P& plan, bool backward)
      : keys(carver.take<T>((backward ? 3 : 2) * plan.heads * plan.columns)), vectors(keys + plan.heads * plan.columns),
        grads(vectors + plan.heads * plan.columns), gate(carver.take<T>(plan.heads)), rest(carver.take<T>(plan.heads)),
        beta(carver.take<T>(plan.heads)), squares(carver.take<T>(plan.heads)), slots(carver.take<int>(plan.heads)) {}
};

// What the warps tell each other.
template <class T>
struct Exchange {
  using Bits = typename Order<T>::Bits;
  T *sums, *maximum;  // [2, warps, heads] and [warps, heads]
  // [warps, heads, columns]: reads, in two turns where the plan is resident, or gradients of keys; gradients of write vectors
  T *reads, *of_vectors;
  T* scalars;    // [warps, 3, heads]: gradients of sharpness and gate
  Bits* orders;  // [warps, heads]: the least used of each warp
  int *candidates, *chosen;
  template <class P>
  __device__ __host__ Exchange(Carver& carver, const P& plan, bool backward)
      : sums(carver.take<T>(2 * plan.warps * plan.heads)), maximum(carver.take<T>(plan.warps * plan.heads)),
        reads(carver.take<T>((!backward && plan.resident ? 2 : 1) * plan.warps * plan.heads * plan.columns)),
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

template <class Arguments>
constexpr int most_vectors = std::is_same<Arguments, LruaScan>::value ? 2 : 3;

// The inputs of one step on their way: each thread has asked for a few numbers, and waits for them only when it puts them
// in their places, a step later. Where they come from and go to takes divisions: forward finds it once, backward has no
// registers to keep it in.
template <class T, class Arguments, class P>
class Stream {
  using Bits = typename Order<T>::Bits;

 public:
  __device__ __forceinline__ Stream(const Arguments& a, const P& plan) : a_(a), plan_(plan) {
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

  __device__ __forceinline__ void put(const Inputs<T>& in) {
#pragma unroll
    for (int j = 0; j < ahead; ++j) put(in, way_ahead(j), asked_[j]);
    for (int i = gpu::thread() + ahead * threads(); i < count(); i += threads()) put(in, way(i), get(way(i)));
  }

 private:
  static constexpr bool keeps = std::is_same<Arguments, LruaScan>::value;

  enum class Kind : int { none, number, gate, slot };
  // From where to where a number goes each step: it comes from rows of `width`, and is put at `to`, counted from the keys on
  // but for gates and slots. A number that comes from nowhere is 1.
  struct Way {
    Kind kind;
    int to, width;
    const void* from;
  };

  __device__ __forceinline__ int threads() const { return gpu::threads(); }
  // Keys, write vectors and where there are any gradients of reads; then gates, sharpness and slots.
  __device__ __forceinline__ int vectors() const { return grad_reads_of(a_) ? 3 : 2; }
  __device__ __forceinline__ int count() const { return plan_.R * (plan_.D * vectors() + 3); }

  static constexpr int ahead = 3;  // that a thread asks for ahead

  __device__ __forceinline__ int beta_at() const {
    Carver carver(nullptr);
    const Inputs<T> in(carver, plan_, most_vectors<Arguments> > 2);
    return static_cast<int>(in.beta - in.keys);
  }

  __device__ __forceinline__ const void* from(const void* data, int i) const {
    return data ? number_of(data, a_.input, i) : nullptr;
  }

  __device__ __forceinline__ Way way(int i) const {
    if (i >= count()) return {Kind::none, 0, 0, nullptr};
    const int size = plan_.R * plan_.D, kind = size > 0 ? i / size : vectors();
    if (kind < vectors()) {
      const void* data = kind == 0 ? a_.keys : kind == 1 ? a_.write_vectors : grad_reads_of(a_);
      const int j = i - kind * size;
      return {Kind::number, kind * plan_.heads * plan_.columns + vector_at(plan_, j), size, from(data, j)};
    }
    const int rest = i - vectors() * size, r = rest % plan_.R;
    if (rest < plan_.R) return {Kind::gate, r, plan_.R, from(a_.gate_logits, r)};
    if (rest < 2 * plan_.R) return {Kind::number, beta_at() + r, plan_.R, from(a_.sharpness, r)};
    return slots_of(a_) ? Way{Kind::slot, r, plan_.R, slots_of(a_) + r} : Way{Kind::none, 0, 0, nullptr};
  }

  __device__ __forceinline__ Way way_ahead(int j) const {
    if constexpr (keeps) return ways_[j];
    else return way(gpu::thread() + j * threads());
  }

  __device__ __forceinline__ Bits get(const Way& way) const {
    if (way.kind == Kind::none || !way.from) return 0;
    const int64_t place = row_ * way.width;
    if (slots_of(a_) && way.kind == Kind::slot) return static_cast<Bits>(static_cast<const int64_t*>(way.from)[place]);
    return load_bits<T>(way.from, a_.input, place);
  }

  __device__ __forceinline__ void put(const Inputs<T>& in, const Way& way, Bits bits) const {
    const T value = way.from ? value_of<T>(bits, a_.input) : T(1);
    switch (way.kind) {
      case Kind::none: break;
      case Kind::number: in.keys[way.to] = value; break;
      case Kind::gate: gate_shares(value, in.gate[way.to], in.rest[way.to]); break;
      case Kind::slot: in.slots[way.to] = static_cast<int>(bits); break;
    }
  }

  const Arguments& a_;
  const P& plan_;
  int64_t row_ = 0;
  Way ways_[keeps ? ahead : 1];
  Bits asked_[ahead] = {};
};

// The same where the plan is known when compiled: all that a step needs is asked for ahead, and nothing branches. Gates' logits
// are put as they come.
template <class T, class Arguments, class P, int WARPS>
class SteadyStream {
  using Bits = typename Order<T>::Bits;

 public:
  __device__ __forceinline__ SteadyStream(const Arguments& a, const P& plan, int thread)
      : a_(a), wide_(a.input == Dtype::float32) {
#pragma unroll
    for (int j = 0; j < ahead; ++j) ways_[j] = way(plan, thread + j * threads);
  }

  __device__ __forceinline__ void ask(int64_t row) {
#pragma unroll
    for (int j = 0; j < ahead; ++j) {
      const unsigned char* from = ways_[j].from + row * ways_[j].step;
      asked_[j] = ways_[j].wide != 0 ? *reinterpret_cast<const Bits*>(from) : *reinterpret_cast<const uint16_t*>(from);
    }
  }

  __device__ __forceinline__ void put(const Inputs<T>& in) const {
    Bits* to = reinterpret_cast<Bits*>(in.keys);
#pragma unroll
    for (int j = 0; j < ahead; ++j) {
      // Of both readings the one that is right, by a mask.
      const uint16_t half = static_cast<uint16_t>(asked_[j]);
      const T value = a_.input == Dtype::float16 ? gpu::float_of_half(half) : from_bfloat16(half);
      Bits bits;
      memcpy(&bits, &value, sizeof value);
      bits = (asked_[j] & ways_[j].wide) | (bits & ~ways_[j].wide);
      if (ways_[j].there) to[ways_[j].to] = bits;
    }
  }

  // What no step brings.
  __device__ __forceinline__ void fill(const Inputs<T>& in, int thread) const {
    if (!a_.sharpness && thread < P::R) in.beta[thread] = 1;
  }

 private:
  static constexpr int threads = 32 * WARPS, scalars = 3;  // of a head: gate, sharpness, slot
  static constexpr int ahead = (P::R * (P::columns * most_vectors<Arguments> + scalars) + threads - 1) / threads;

  // Where a number comes from at row 0, and how many bytes further at the next; where it goes, counted from the keys on.
  struct Way {
    const unsigned char* from;
    int step, to;
    Bits wide;  // all bits or none
    bool there;
  };

  __device__ __forceinline__ static Bits mask(bool is) { return is ? ~Bits(0) : Bits(0); }
  __device__ __forceinline__ Way way(const P& plan, int i) const {
    const int size = plan.R * plan.D, vectors = most_vectors<Arguments>, all = vectors * size;
    const int bytes = wide_ ? 4 : 2;
    Carver carver(nullptr);
    const Inputs<T> in(carver, plan, vectors > 2);
    // Who has none asks for the first key again and again.
    const auto from = [&](const void* data, int number, int count, int of_number, int to) {
      if (!data) return Way{static_cast<const unsigned char*>(a_.keys), 0, 0, mask(wide_), false};
      return Way{static_cast<const unsigned char*>(data) + number * of_number, count * of_number, to, mask(of_number > 2),
                 true};
    };
    if (i < all) {
      const int kind = i / size, number = i % size;
      return from(kind == 0   ? a_.keys
                  : kind == 1 ? a_.write_vectors
                              : grad_reads_of(a_),
                  number, size, bytes, kind * plan.heads * plan.columns + vector_at(plan, number));
    }
    const int kind = (i - all) / plan.R, r = (i - all) % plan.R;
    if (kind == 0) return from(a_.gate_logits, r, plan.R, bytes, static_cast<int>(in.gate - in.keys) + r);
    if (kind == 1) return from(a_.sharpness, r, plan.R, bytes, static_cast<int>(in.beta - in.keys) + r);
    // The low half of an integer of 64 bits.
    return from(kind == 2 ? slots_of(a_) : nullptr, r, plan.R, 8,
                static_cast<int>(in.slots - reinterpret_cast<int*>(in.keys)) + r);
  }

  const Arguments& a_;
  const bool wide_;
  Way ways_[ahead];
  Bits asked_[ahead] = {};
};
// A scan of a least-recently-used-access memory as one thread sees it.
template <class T, int C, int HEADS, bool RESIDENT, bool ALONE, class P>
struct LruaThread : Thread<T, C, HEADS, RESIDENT, ALONE, P> {
  using Base = Thread<T, C, HEADS, RESIDENT, ALONE, P>;
  using Base::OWN, Base::place, Base::plan, Base::first_slot;

  __device__ __forceinline__ LruaThread(const P& plan, int rank, double eps) : Base(plan, rank, eps) {}

  // Write weights [heads, span] of the warp's slots; own lanes only.
  template <class Chosen>
  __device__ __forceinline__ void weigh_writes(const Inputs<T>& in, const Chosen& chosen, const T* read_weights,
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
  template <class Chosen>
  __device__ __forceinline__ bool is_target(const Chosen& chosen, int r, int slot) const {
    if (!plan.shared_target) return chosen[r] == slot;
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

  // ---- where the plan is known when compiled ------------------------------------------------------------------------

  // There a lane owns one of the four heads and two slots beside each other: what it has of them stays in its registers from
  // step to step. Rows of heads are taken in an order that begins with a lane's own, so that sums over lanes choose nothing.
  __device__ __forceinline__ int own_head() const { return place.lane / 2 % 4; }
  __device__ __forceinline__ int own_pair() const { return this->slots(0) + place.lane % 2 * 2; }
  __device__ __forceinline__ int own_at() const { return own_head() * plan.span + own_pair(); }

  // Of four rows [heads, columns] the lane's columns, of row h ^ first at h.
  __device__ __forceinline__ void load_beside(const T* rows, int first, T (&out)[HEADS][C]) const {
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
      const Four<T> four = load_four(rows + (h ^ first) * 4 * column_lanes + 4 * place.column);
#pragma unroll
      for (int c = 0; c < C; ++c) out[h][c] = c < 4 ? four.at[c % 4] : rows[fifth_of(h ^ first)];
    }
  }
  __device__ __forceinline__ int fifth_of(int head) const {
    return HEADS * 4 * column_lanes + head * column_lanes + place.column;
  }
  // And the lane's four slots of rows [heads, span].
  __device__ __forceinline__ void load_slots(const T* rows, int first, Four<T> (&out)[HEADS]) const {
#pragma unroll
    for (int h = 0; h < HEADS; ++h) out[h] = load_four(rows + (h ^ first) * plan.span + this->slots(0));
  }

  // Dot products of the lane's two slots and its head, from rows in the order of its head.
  __device__ __forceinline__ Pair<T> own_dots(const Tile<T, C>& m, const T (&rows)[HEADS][C]) const {
    T sum[HEADS * lane_slots] = {};
#pragma unroll
    for (int h = 0; h < HEADS; ++h)
#pragma unroll
      for (int s = 0; s < lane_slots; ++s)
#pragma unroll
        for (int c = 0; c < C; ++c) sum[h * lane_slots + s] += m.at[s][c] * rows[h][c];
    add_turned<4, 2, HEADS * lane_slots>(sum);
    add_lanes<1, 1, lane_slots>(sum, place.lane);
    return {sum[0], sum[1]};
  }
  __device__ __forceinline__ Pair<T> own_squares(const Tile<T, C>& m) const {
    T sum[lane_slots] = {};
    add_squares<C>(m, sum);
    add_lanes<1, 1, lane_slots>(sum, place.lane);
#pragma unroll
    for (int mask = 4; mask >= 2; mask /= 2) {
      const T other[2] = {gpu::shuffle_xor(sum[0], mask), gpu::shuffle_xor(sum[1], mask)};
      sum[0] += other[0], sum[1] += other[1];
    }
    return {sum[0], sum[1]};
  }
  __device__ __forceinline__ T own_key_square(const T (&keys)[HEADS][C]) const {
    T sum[HEADS] = {};
    add_row_squares<HEADS, C>(keys, sum);
    add_turned<4, 2, HEADS>(sum);
    return sum[0] + gpu::shuffle_xor(sum[0], 1);
  }
  // Sums over the lanes of one pair of slots, and over those of one head.
  __device__ __forceinline__ T over_heads(T value) const {
    value += gpu::shuffle_xor(value, 4);
    return value + gpu::shuffle_xor(value, 2);
  }
  __device__ __forceinline__ T over_slots(T value) const {
    value += gpu::shuffle_xor(value, 1);
    value += gpu::shuffle_xor(value, 8);
    return value + gpu::shuffle_xor(value, 16);
  }

  // The same number of every head, to [heads, warps]; and the sum over warps of the lane's own head's.
  __device__ __forceinline__ void tell_own(T value, T* to) const {
    if ((place.lane & ~6) == 0) to[own_head() * plan.warps + place.warp] = value;
  }
  __device__ __forceinline__ T total_of(const T* from, int head) const {
    T sum = 0;
#pragma unroll
    for (int w = 0; w < plan.warps; w += 4) {
      const Four<T> four = load_four(from + head * plan.warps + w);
      sum += (four.at[0] + four.at[1]) + (four.at[2] + four.at[3]);
    }
    return sum;
  }

  // The two shares of the gate of the lane's head. ALONE they are there; else its logit is where the gate would be, and every
  // lane finds them itself.
  struct Shares {
    T gate, rest;
  };
  __device__ __forceinline__ Shares own_shares(const Inputs<T>& in) const {
    const T logit = in.gate[own_head()];
    if constexpr (ALONE) return {logit, in.rest[own_head()]};
    const T e = exp(-fabs(logit)), larger = gpu::reciprocal(T(1) + e), smaller = e * larger;
    const bool is = logit == logit;
    return {!is ? logit : logit >= 0 ? larger : smaller, !is ? logit : logit >= 0 ? smaller : larger};
  }

  // What the head writes to the lane's two slots; chosen is the slot that it has chosen.
  __device__ __forceinline__ Pair<T> own_writes(const Shares& of, int chosen, const Pair<T>& reads) const {
    Pair<T> writes;
#pragma unroll
    for (int i = 0; i < 2; ++i) writes.at[i] = of.gate * reads.at[i] + (chosen == own_pair() + i ? of.rest : T(0));
    return writes;
  }

  __device__ __forceinline__ void erase(int erased, Tile<T, C>& m) const {
    if (static_cast<unsigned>(erased - this->slots(0)) < static_cast<unsigned>(lane_slots)) {
#pragma unroll
      for (int s = 0; s < lane_slots; ++s)
#pragma unroll
        for (int c = 0; c < C; ++c) m.at[s][c] = erased == this->slots(0) + s ? T(0) : m.at[s][c];
    }
  }
  __device__ __forceinline__ void write_beside(const T (&rows)[HEADS][C], int erased, const T* write_weights,
                                               Tile<T, C>& m) const {
    Four<T> weights[HEADS];
    load_slots(write_weights, 0, weights);
    erase(erased, m);
    add_products<HEADS, C>(weights, rows, m);
  }

  // The exponentials of the lane's two similarities.
  __device__ __forceinline__ Pair<T> own_exponentials(const T (&keys)[HEADS][C], T key, T beta, const Tile<T, C>& m,
                                                      bool bounded, T* most, Pair<T>& dots, Pair<T>& squares) const {
    squares = own_squares(m);
    dots = own_dots(m, keys);
    Pair<T> scores, result;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      scores.at[i] = beta * (dots.at[i] * gpu::inverse_root(key * squares.at[i] + this->eps));
      const T exponential = exp(scores.at[i] - fabs(beta));
      result.at[i] = own_pair() + i < plan.N ? exponential : T(0);
    }
    if (!bounded) {
      const T greatest = own_maximum(scores, most);
#pragma unroll
      for (int i = 0; i < 2; ++i) result.at[i] = own_pair() + i < plan.N ? exp(scores.at[i] - greatest) : T(0);
    }
    return result;
  }
  // Of the lane's head among all slots.
  __device__ __forceinline__ T own_maximum(const Pair<T>& scores, T* of_warps) const {
    const auto greater = [](T a, T b) { return b > a || b != b ? b : a; };
    T most = -INFINITY;
    for (int i = 0; i < 2; ++i)
      if (own_pair() + i < plan.N) most = greater(most, scores.at[i]);
    for (const int mask : {1, 8, 16}) most = greater(most, gpu::shuffle_xor(most, mask));
    tell_own(most, of_warps);
    this->sync();
    most = -INFINITY;
    for (int w = 0; w < plan.warps; ++w) most = greater(most, of_warps[own_head() * plan.warps + w]);
    return most;
  }

  // A warp's weighted sums over its slots: head `place.group`, the lane's columns of it; weights in the order of that head.
  struct Row {
    T at[C];
  };
  __device__ __forceinline__ Row own_weighted(const Tile<T, C>& m, const Four<T> (&weights)[HEADS]) const {
    T sum[HEADS * C] = {};
    add_weighted<HEADS, C>(m, weights, sum);
    add_turned<16, 8, HEADS * C>(sum);
    Row row;
#pragma unroll
    for (int c = 0; c < C; ++c) row.at[c] = sum[c];
    return row;
  }
  // From and to [heads, columns].
  __device__ __forceinline__ Row load_row(const T* rows) const {
    const Four<T> four = load_four(rows + (place.group * column_lanes + place.column) * 4);
    Row row;
#pragma unroll
    for (int c = 0; c < C; ++c) row.at[c] = c < 4 ? four.at[c % 4] : rows[fifth_of(place.group)];
    return row;
  }
  __device__ __forceinline__ void store_row(T* rows, const Row& row) const {
    *reinterpret_cast<Four<T>*>(rows + (place.group * column_lanes + place.column) * 4) = {row.at[0], row.at[1], row.at[2],
                                                                                           row.at[3]};
    if constexpr (C > 4) rows[fifth_of(place.group)] = row.at[4];
  }

  // The lane's two numbers of rows [R, ld], beside each other or not, from and to device memory.
  __device__ __forceinline__ Pair<T> take_own(const T* rows, int64_t ld) const {
    Pair<T> two;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int slot = own_pair() + i;
      two.at[i] = slot >= plan.N ? T(0) : rows ? rows[own_head() * ld + slot] : T(slot == 0);
    }
    return two;
  }
  __device__ __forceinline__ void give_own(const Pair<T>& two, int64_t ld, T* rows) const {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (own_pair() + i < ld) rows[own_head() * ld + own_pair() + i] = two.at[i];
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
  plan.read_first = a.read_first;
  plan.shared_target = a.shared_target;
  return plan;
}

// Calls f with types and sizes of the kernel that a plan asks for, and the kind of plan it takes.
template <class T, class F>
const char* with_kernel(const Plan& plan, F f) {
  return with_tile<T>(plan, [&](auto c, auto resident) {
    const PlanKind<Plan> any;
    const std::integral_constant<int, 4> four;
    if constexpr (decltype(resident)::value) {
      if (plan.heads_at_once == 1) return f(c, std::integral_constant<int, 1>(), resident, any);
      // Of 25 to 40 numbers a slot: each size more is a kernel more, in either direction, that takes a minute to compile.
      constexpr int columns = decltype(c)::value;
      if constexpr (columns == 4 || columns == 5) {
        using Common = FixedPlan<4, 8, columns>;
        if (Common::is(plan)) return f(c, four, resident, PlanKind<Common>());
      }
    }
    return f(c, four, resident, any);
  });
}

}  // namespace cuda
}  // namespace mann_fast

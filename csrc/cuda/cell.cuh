// What the two directions of a cell share, whatever its memory: which block holds which weights, and products with weights in
// shared memory. lrua_cell.cuh says what a memory must provide.
//
// A cluster of blocks takes a few samples through all steps. A block holds the weights of its share of the hidden units for
// all steps, and at most one sample's memory. It has all that its own units need, so that two barriers a step are
// enough: forward, when the units' part of every head is known, and when the reads are; back the same the other way round.
#pragma once
#include "kernels.h"
#include "plan.cuh"

namespace mann_fast {
namespace cuda {

// How a cell is laid out over a cluster.
struct CellPlan {
  int H;
  Controller controller;
  bool recurrent;        // the hidden state goes round
  int cluster, samples;  // blocks; samples of theirs, a block each
  int lanes;             // samples, padded to what a product takes at once
  int units, columns;    // hidden units of a block; what the product gives for them, `per_unit` each
  int round, heads;      // numbers that go round: hidden state and reads; head values of a sample
  int reads;             // numbers of a sample's reads
  int every;             // backward only: steps of a replay
  size_t shared;         // bytes of a block, the memory's included
  size_t weights;        // bytes before the memory's

  __device__ __host__ int per_unit() const { return static_cast<int>(kept_per_unit(controller)); }
  __device__ __host__ int items() const { return units * lanes; }
  // Where the reads begin among what goes round; numbers of a row of the output.
  __device__ __forceinline__ int reads_at() const { return recurrent ? H : 0; }
  __device__ __forceinline__ int width() const { return H + reads; }
  // A GRU has two columns for its candidate, of the reads (2) and of the hidden state (3), since a gate comes between: the gate
  // in the hidden state's weights that a column belongs to, or -1.
  __device__ __forceinline__ int hidden_gate(int column) const {
    return controller != Controller::gru ? column : column == 2 ? -1 : column == 3 ? 2 : column;
  }
};

// And its memory, a sample's in one block.
template <class Memory>
struct CellPlanOf : CellPlan {
  typename Memory::Plan memory;
};

constexpr int cell_threads = most_threads;

// What a thread makes of a product: two columns beside each other for all samples.
constexpr int columns_at_once = 2, most_lanes = 8;
__device__ __host__ inline int padded_columns(int columns) {
  return (columns + columns_at_once - 1) / columns_at_once * columns_at_once;
}
// A product of few columns is cut along the sum so that all threads have a part.
__device__ __host__ inline int slices_of(int columns) {
  const int slices = cell_threads * columns_at_once / padded_columns(columns);
  return slices > 1 ? slices : 1;
}

template <class T>
struct alignas(2 * sizeof(T)) Two {
  T at[2];
};

// out[slice][m][column] = the slice's part of the sum over k of x[k][m] weights[k][column], rows of `ld` columns. ld is even,
// and what pads weights is 0. A thread's first part, most often its only one, is the same in every step: its place takes
// divisions and is found once, where there are registers to keep it in.
template <class T, bool KEEPS>
class Product {
 public:
  __device__ __forceinline__ Product(const T* weights, int ld, const T* x, int inner, int slices, T* out)
      : weights_(weights), x_(x), out_(out), ld_(ld), inner_(inner), slices_(slices) {
    if constexpr (KEEPS) own_ = part(gpu::thread());
  }

  __device__ __forceinline__ void multiply(int lanes) const {
    switch (lanes) {
      case 1: return multiply<1>();
      case 2: return multiply<2>();
      case 4: return multiply<4>();
      default: return multiply<most_lanes>();
    }
  }

 private:
  struct Part {
    int slice, column, first, last;  // of the sum
  };
  __device__ __forceinline__ Part part(int i) const {
    const int pairs = ld_ / columns_at_once, slice = i / pairs;
    return {slice, (i - slice * pairs) * columns_at_once, inner_ * slice / slices_, inner_ * (slice + 1) / slices_};
  }

  template <int M>
  __device__ __forceinline__ void multiply() const {
    const int count = ld_ / columns_at_once * slices_;
    int i = gpu::thread();
    if constexpr (KEEPS) {
      if (i < count) multiply<M>(own_);
      i += gpu::threads();
    }
    for (; i < count; i += gpu::threads()) multiply<M>(part(i));
  }

  template <int M>
  __device__ __forceinline__ void multiply(const Part& part) const {
    constexpr int together = M < 4 ? M : 4;
    struct alignas(together * sizeof(T) < 16 ? together * sizeof(T) : 16) Samples {
      T at[together];
    };
    T sum[columns_at_once][M] = {};
#pragma unroll(M <= 2 ? 8 : 4)
    for (int k = part.first; k < part.last; ++k) {
      const Two<T> w = *reinterpret_cast<const Two<T>*>(weights_ + k * ld_ + part.column);
#pragma unroll
      for (int m = 0; m < M; m += together) {
        const Samples s = *reinterpret_cast<const Samples*>(x_ + k * M + m);
#pragma unroll
        for (int j = 0; j < together; ++j) {
          sum[0][m + j] += w.at[0] * s.at[j];
          sum[1][m + j] += w.at[1] * s.at[j];
        }
      }
    }
#pragma unroll
    for (int m = 0; m < M; ++m)
      *reinterpret_cast<Two<T>*>(out_ + (part.slice * M + m) * ld_ + part.column) = {{sum[0][m], sum[1][m]}};
  }

  const T *weights_, *x_;
  T* out_;
  const int ld_, inner_, slices_;
  Part own_;
};

// The weight by which number k of those that go round enters a column of a hidden unit; 0 where they do not meet.
template <class T, class Arguments>
__device__ __forceinline__ T gate_weight(const Arguments& a, const CellPlan& plan, int column, int unit, int k) {
  const bool of_hidden = k < plan.reads_at();
  const int gate = of_hidden ? plan.hidden_gate(column) : column < gates_per_unit(plan.controller) ? column : -1;
  if (gate < 0) return 0;
  const int64_t row = static_cast<int64_t>(gate) * plan.H + unit;
  if (of_hidden) return static_cast<const T*>(a.hidden_weight)[row * plan.H + k];
  return static_cast<const T*>(a.reads_weight)[row * a.reads_weight_ld + k - plan.reads_at()];
}

template <class T>
__device__ __forceinline__ T sigmoid(T x) {
  return T(1) / (T(1) + exp(-x));
}
template <class T>
__device__ __forceinline__ T softplus(T x) {
  return (x > 0 ? x : T(0)) + log1p(exp(-fabs(x)));
}

// An own unit of a sample: among own units and those of all blocks, and where it lies in [units, lanes].
struct Item {
  int m, own, unit, at;
  bool there;  // neither padding of the units nor of the samples, nor beyond the sample's end
};

// A block's place among those of its cluster.
struct CellPlace {
  const CellPlan& plan;
  const int64_t &T, &B;  // in the kernel's parameters: no registers
  const Sequences& sequences;
  const int rank, first, count;  // samples of the cluster: the first, and how many there are
  const Item own;                // the thread's first
  template <class Arguments>
  __device__ __forceinline__ CellPlace(const CellPlan& plan, const Arguments& a)
      : plan(plan), T(a.T), B(a.B), sequences(a.sequences), rank(static_cast<int>(gpu::block() % plan.cluster)),
        first(static_cast<int>(gpu::block() / plan.cluster * plan.samples)),
        count(static_cast<int>(B - first < plan.samples ? B - first : plan.samples)), own(item(gpu::thread())) {}

  __device__ __forceinline__ bool there(int m) const { return m < count; }
  __device__ __forceinline__ int64_t sample(int m) const { return first + m; }
  __device__ __forceinline__ int64_t row(int64_t t, int m) const { return t * B + sample(m); }
  __device__ __forceinline__ int unit(int own) const { return rank * plan.units + own; }
  // Units side by side, as they lie in device memory; of any step, or of step t.
  __device__ __forceinline__ Item item(int i) const {
    const int m = i / plan.units, own = i % plan.units;
    return {m, own, unit(own), own * plan.lanes + m, i < plan.items() && unit(own) < plan.H && there(m)};
  }
  __device__ __forceinline__ Item item(int64_t t, int i) const {
    Item item = i == gpu::thread() ? own : this->item(i);
    item.there = item.there && goes_on(t, item.m);
    return item;
  }

  // The samples go through the steps side by side, so many as the longest of them has; what they do at a step may differ.
  __device__ __forceinline__ int64_t length(int m) const { return sequences.length(T, sample(m)); }
  __device__ __forceinline__ int64_t steps() const {
    int64_t most = 0;
    for (int m = 0; m < count; ++m) most = length(m) > most ? length(m) : most;
    return most;
  }
  __device__ __forceinline__ bool goes_on(int64_t t, int m) const { return t < length(m); }
  __device__ __forceinline__ bool begins(int64_t t, int m) const { return goes_on(t, m) && sequences.begins(t, B, sample(m)); }

  __device__ __forceinline__ void barrier() const {
    if (plan.cluster > 1) gpu::sync_cluster();
    else gpu::sync();
  }
  template <class T>
  __device__ __forceinline__ T* of_block(T* shared, int block) const {
    return plan.cluster > 1 ? gpu::of_block(shared, block) : shared;
  }
  // The same number of every block, added up in one order by all.
  static constexpr int at_once = 8;
  template <class T>
  __device__ __forceinline__ T total(T* shared) const {
    if (plan.cluster == 1) return *shared;
    T sum = 0;
    for (int first = 0; first < plan.cluster; first += at_once) {
      T of[at_once];  // asked for together: each takes some hundred cycles to come
#pragma unroll
      for (int i = 0; i < at_once; ++i) of[i] = first + i < plan.cluster ? *gpu::of_block(shared, first + i) : T(0);
#pragma unroll
      for (int i = 0; i < at_once; ++i) sum += of[i];
    }
    return sum;
  }
  template <class T>
  __device__ __forceinline__ void tell(T* shared, T value) const {
    for (int block = 0; block < plan.cluster; ++block) *of_block(shared, block) = value;
  }
};

// Where a thread's values of the heads go is the same in every step: of the first few it is found once, since that takes
// divisions.
template <class Memory, class P, class Arguments>
class HeadPlaces {
  using Place = typename Memory::Place;

 public:
  __device__ __forceinline__ HeadPlaces(const Arguments& a, const P& memory, int count)
      : a_(a), memory_(memory), count_(count) {
#pragma unroll
    for (int i = 0; i < known; ++i) places_[i] = Memory::place_of(a, memory, gpu::thread() + i * gpu::threads());
  }
  // Calls f(j, place) for the thread's values, from its number `first` on.
  template <class F>
  __device__ __forceinline__ void each(F f, int first = 0) const {
#pragma unroll
    for (int i = 0; i < known; ++i) {
      const int j = gpu::thread() + i * gpu::threads();
      if (i >= first && j < count_) f(j, places_[i]);
    }
    for (int j = gpu::thread() + known * gpu::threads(); j < count_; j += gpu::threads())
      f(j, Memory::place_of(a_, memory_, j));
  }
  __device__ __forceinline__ const Place& first() const { return places_[0]; }

 private:
  static constexpr int known = P::fixed ? 2 : 1;  // else there are no registers left backward
  const Arguments& a_;
  const P& memory_;
  const int count_;
  Place places_[known];
};

// What memories have in common that lie in tiles: how a block has a sample.
struct TiledMemory {
  using Plan = cuda::Plan;
  using Places = cuda::Places;
  static constexpr int choices = 1;

  template <class Side, class T>
  static Plan lay_out(Plan sizes, int64_t B, int64_t every, gpu::Limits left) {
    left.cluster = 1;
    sizes.least_warps = cell_threads / 32;
    sizes.slots_anywhere = Side::slots_anywhere;
    return plan_scan<typename Side::Room, T>(sizes, B, every, left);
  }
  // Each block has scratch memory of its own, whether or not it has a sample: by its number, which takes fewer registers.
  static int64_t scratches(int64_t, int64_t blocks) { return blocks; }
  __device__ __forceinline__ static int64_t scratch_of(int64_t) { return gpu::block(); }
  template <class Side>
  static bool fits(const Plan& plan, int) {
    return plan.near_small && (plan.near_slots || Side::slots_anywhere);
  }
  // Where the memory is in registers, what is kept per slot in a replay is counted with 32 bits.
  static bool counts(const Plan& plan, int64_t every) {
    return !plan.resident || (every + 1) * plan.heads * plan.span < int64_t(1) << 31;
  }
  template <class Step>
  __device__ __forceinline__ static void clear_inputs(const Step& step) {
    step.small.in.clear();
  }
  template <class Step>
  __device__ __forceinline__ static void leave_step(Step& step, bool anew) {
    if (anew) step.through_start();
  }
};

// So many samples that a cluster has as many as it has blocks.
constexpr int64_t any_batch = int64_t(1) << 30;

// Completes a plan with the fewest blocks in which everything fits, or says why there is none. Side tells where what lies.
// room: clusters of so many blocks as the plan has, that the device runs at once; 0 where that was not asked yet.
template <class Side, class T, class Arguments>
const char* plan_cell(const Arguments& a, int64_t B, int64_t every, const gpu::Limits& limits,
                      CellPlanOf<typename Side::Memory>& plan, int room = 0) {
  using Memory = typename Side::Memory;
  if (const char* why = Memory::too_large(a)) return why;
  if (a.N < 1 || a.D < 1 || a.R < 1 || a.H < 1) return "the kernel takes no sizes of 0";
  if (a.H >= int64_t(1) << 24) return "the kernel takes fewer than 2^24 hidden units";
  if (a.T >= int64_t(1) << 31 || a.B >= int64_t(1) << 31) return "the kernel takes fewer than 2^31 steps and samples";
  const int64_t heads = Memory::head_values(a);
  const int asked = room > 0 ? plan.cluster : 0;
  plan = {};
  plan.controller = a.controller;
  plan.recurrent = a.controller != Controller::feedforward;
  plan.H = static_cast<int>(a.H);
  plan.reads = static_cast<int>(a.R * a.D);
  plan.round = (plan.recurrent ? plan.H : 0) + plan.reads;
  plan.heads = static_cast<int>(heads);
  plan.every = static_cast<int>(every);
  for (int choice = 0; choice < Memory::choices; ++choice)
    for (int cluster = 1; cluster <= limits.largest_cluster; cluster *= 2) {
      plan.cluster = cluster;
      // As few samples to a cluster as leave none waiting for another's end.
      const int64_t reckoned = limits.processors / cluster, at_once = cluster == asked ? room : reckoned > 1 ? reckoned : 1;
      const int64_t samples = ceil_div(B, at_once);
      const int most = cluster < most_lanes ? cluster : most_lanes;
      plan.samples = static_cast<int>(samples < 1 ? 1 : samples < most ? samples : most);
      plan.lanes = plan.samples <= 2 ? plan.samples : plan.samples <= 4 ? 4 : most_lanes;
      plan.units = static_cast<int>(ceil_div(a.H, cluster));
      plan.columns = plan.units * plan.per_unit();
      // Weights alone, in numbers that cannot overflow, before anything is counted with 32 bits.
      const int64_t weights = static_cast<int64_t>(plan.columns) * plan.round + heads * plan.units;
      if (weights * static_cast<int64_t>(sizeof(T)) > static_cast<int64_t>(limits.shared)) continue;
      Carver carver(nullptr);
      typename Side::Shared(carver, plan);
      plan.weights = carver.used;
      if (plan.weights > limits.shared) continue;
      gpu::Limits left = limits;
      left.shared -= plan.weights;
      plan.memory = Memory::template lay_out<Side, T>(Memory::sizes_of(a), B, every, left);
      if (!Memory::counts(plan.memory, every)) return "the kernel takes fewer than 2^31 weights between two anchors";
      plan.shared = plan.weights + plan.memory.shared;
      if (Memory::template fits<Side>(plan.memory, choice)) return nullptr;
    }
  return "the weights do not fit into the shared memory of a cluster of blocks";
}

inline gpu::Launch launch_of(const CellPlan& plan, int64_t B, void* stream) {
  return {ceil_div(B, plan.samples) * plan.cluster, cell_threads, plan.cluster, plan.shared, stream};
}

// Clusters of a plan that the device runs at once. kernel(columns of a tile, whether it stays in registers, kind of plan) is
// the one that a plan asks for.
template <class Side, class T, class Kernel>
int room_for(const CellPlanOf<typename Side::Memory>& plan, int64_t B, Kernel kernel) {
  int room = 0;
  Side::Memory::template with_plan<T, Side::near>(plan.memory, [&](auto c, auto resident, auto kind) -> const char* {
    room = gpu::clusters_at_once(kernel(c, resident, kind), launch_of(plan, B, nullptr));
    return nullptr;
  });
  return room;
}

// Plans and launches.
template <class Side, class T, class Arguments, class Kernel>
const char* launch_cell(const Arguments& a, int64_t every, const Queue& queue, Kernel kernel) {
  using Memory = typename Side::Memory;
  CellPlanOf<Memory> plan;
  gpu::Limits limits = gpu::limits();
  if (const char* why = plan_cell<Side, T>(a, a.B, every, limits, plan)) return why;
  if (plan.cluster > 1 && (a.B > plan.samples || Memory::choices > 1)) {
    // A device may have room for fewer clusters than its processors would make: a cluster's have to be neighbors. Those over
    // would wait for the others' end, and more samples to a cluster cost less. And where a memory has choices, there may be no
    // room for the best one's, which are larger.
    const int room = room_for<Side, T>(plan, a.B > plan.samples ? a.B : plan.samples, kernel);
    if (room == 0) limits.largest_cluster = limits.cluster;
    if (const char* why = plan_cell<Side, T>(a, a.B, every, limits, plan, room)) return why;
  }
  const gpu::Launch how = launch_of(plan, a.B, queue.stream);
  const size_t bytes = plan.memory.scratch * static_cast<size_t>(Memory::scratches(a.B, how.blocks));
  unsigned char* scratch = bytes ? static_cast<unsigned char*>(queue.scratch(queue.owner, bytes)) : nullptr;
  return Memory::template with_plan<T, Side::near>(plan.memory, [&](auto c, auto resident, auto kind) {
    return gpu::launch(kernel(c, resident, kind), how, a, Memory::scan_of(a), plan, scratch);
  });
}

// Null where the device has room for any T and B, else why not.
template <class Side, class T, class Arguments, class Kernel>
const char* no_room(const Arguments& a, Kernel kernel) {
  CellPlanOf<typename Side::Memory> plan;
  gpu::Limits limits = gpu::limits();
  for (;;) {
    if (const char* why = plan_cell<Side, T>(a, any_batch, 1, limits, plan)) return why;
    if (plan.cluster == 1 || room_for<Side, T>(plan, plan.samples, kernel) > 0) return nullptr;
    if (plan.cluster <= limits.cluster) return "the device has no room for a cluster of blocks with so much shared memory";
    limits.largest_cluster = limits.cluster;
  }
}

}  // namespace cuda
}  // namespace mann_fast

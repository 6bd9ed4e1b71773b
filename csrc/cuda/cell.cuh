// What the two directions of a cell share, whatever its memory: which block holds which weights, and products with weights in
// shared memory. lrua_cell.cuh says what a memory must provide.
//
// A cluster of blocks takes a few samples through all steps. A block holds the weights of its share of the hidden units for
// all steps, and at most one sample's memory. It has all that its own units need, so that two barriers a step are
// enough: forward, when the units' part of every head is known, and when the reads are; back the same the other way round.
#pragma once
#include <type_traits>
#include <utility>

#include "kernels.h"
#include "plan.cuh"

namespace mann_fast {
namespace cuda {

constexpr int cell_threads = most_threads;

// What lies beside each other of a product's weights, so that a thread loads it at once: four terms of a column's sum, or four
// columns. It takes four columns in either case, so that what is multiplied is not read too often. Whatever is counted by fours
// is padded.
enum class Fours { terms, columns };
constexpr int columns_at_once = 4, most_lanes = 8;
__device__ __host__ inline int padded(int count) { return (count + 3) / 4 * 4; }
// A product of few columns, padded, is cut along the sum so that half of the threads have a part: shared memory binds it, and not
// they, and what the slices make has to be added up.
__device__ __host__ inline int slices_of(int columns) {
  const int slices = cell_threads / 2 * columns_at_once / columns;
  return slices > 1 ? slices : 1;
}

// How a cell is laid out over a cluster.
struct CellPlan {
  int H;
  Controller controller;
  bool recurrent;              // the hidden state goes round
  int cluster, samples;        // blocks; samples of theirs, a block each
  int lanes;                   // samples, padded to what a product takes at once
  int units, columns;          // hidden units of a block; what the product gives for them, `per_unit` each
  int round, heads;            // numbers that go round: hidden state and reads, each padded; head values of a sample
  int reads;                   // numbers of a sample's reads
  int item_bits;               // 2^so many lanes of a warp take an own unit of a sample
  int next_sample, next_unit;  // from a thread's item to its next
  int every;                   // backward only: steps of a replay
  size_t shared;               // bytes of a block, the memory's included
  size_t weights;              // bytes before the memory's

  __device__ __host__ int per_unit() const { return static_cast<int>(kept_per_unit(controller)); }
  __device__ __host__ int items() const { return units * lanes; }
  // Where the reads begin among what goes round; numbers of a row of the output.
  __device__ __host__ int reads_at() const { return recurrent ? padded(H) : 0; }
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

// Where the weight of term k lies for a column, of ld columns.
template <Fours FOURS>
__device__ __forceinline__ int weight_at(int k, int column, int ld) {
  return FOURS == Fours::columns ? k * ld + column : (k / 4 * ld + column) * 4 + k % 4;
}

// A row of a matrix in device memory; 0 beyond so many numbers.
template <class T>
struct Row {
  const T* first;
  int count;
};
// Brings rows of `width` numbers to their places: a warp takes a row, a lane a number of it, and a thread asks for those of several
// rows at once, since each takes some hundred cycles to come. *to(row, k) is the place of number k.
template <class T, class RowOf, class To>
__device__ __forceinline__ void bring(int rows, int width, RowOf row_of, To to) {
  constexpr int at_once = 8;
  const int warps = gpu::threads() / gpu::warp_size, lane = gpu::thread() % gpu::warp_size;
  for (int first = gpu::thread() / gpu::warp_size; first < rows; first += at_once * warps) {
    Row<T> from[at_once];
#pragma unroll
    for (int i = 0; i < at_once; ++i) from[i] = row_of(first + i * warps);
#pragma unroll 1
    for (int k = lane; k < width; k += gpu::warp_size) {
      T values[at_once];
#pragma unroll
      for (int i = 0; i < at_once; ++i) values[i] = k < from[i].count ? from[i].first[k] : T(0);
#pragma unroll
      for (int i = 0; i < at_once; ++i)
        if (first + i * warps < rows) *to(first + i * warps, k) = values[i];
    }
  }
}

// put(slice, m, column, the slice's part of the sum over k of x[m][k] weights[k][column]). Weights lie as weight_at says, and rows of
// x of `inner` terms; what pads weights is 0. A thread's first part, most often its only one, is the same in every step: its place
// takes divisions and is found once, where there are registers to keep it in.
template <class T, Fours FOURS, bool KEEPS>
class Product {
 public:
  __device__ __forceinline__ Product(const T* weights, int ld, const T* x, int inner, int slices)
      : weights_(weights), x_(x), ld_(ld), inner_(inner), slices_(slices) {
    if constexpr (KEEPS) own_ = part(gpu::thread());
  }

  template <class Put>
  __device__ __forceinline__ void multiply(int lanes, Put put) const {
    switch (lanes) {
      case 1: return multiply<1>(put);
      case 2: return multiply<2>(put);
      case 4: return multiply<4>(put);
      default: return multiply<most_lanes>(put);
    }
  }

 private:
  static constexpr int columns = columns_at_once, terms = FOURS == Fours::terms ? 4 : 1;
  // How many of these are under way together: as many as there are registers for.
  template <int M>
  static constexpr int unrolled = M > 2 ? (KEEPS ? 2 : 1) : (FOURS == Fours::columns ? 8 : 4) / (sizeof(T) == 8 ? 2 : 1);
  struct Part {
    int slice, column, first, last;  // its first column; terms, so many at once
  };
  // Columns that do not lie beside each other are as far apart as there are parts: then those of a warp do.
  __device__ __forceinline__ Part part(int i) const {
    const int parts = ld_ / columns, slice = i / parts, count = inner_ / terms;
    return {slice, (i - slice * parts) * (FOURS == Fours::columns ? columns : 1), count * slice / slices_,
            count * (slice + 1) / slices_};
  }

  template <int M, class Put>
  __device__ __forceinline__ void multiply(Put put) const {
    const int count = ld_ / columns * slices_;
    int i = gpu::thread();
    if constexpr (KEEPS) {
      if (i < count) multiply<M>(own_, put);
      i += gpu::threads();
    }
    for (; i < count; i += gpu::threads()) multiply<M>(part(i), put);
  }

  template <int M, class Put>
  __device__ __forceinline__ void multiply(const Part& part, Put put) const {
    constexpr int chains = FOURS == Fours::columns ? 1 : M == 1 ? 4 : M == 2 ? 2 : 1;  // sums that do not wait for each other
    const int apart = FOURS == Fours::columns ? 1 : ld_ / columns;
    T sum[columns][M][chains] = {};
#pragma unroll(unrolled<M>)
    for (int k = part.first; k < part.last; ++k) {
      if constexpr (FOURS == Fours::columns) {
        const Four<T> w = load_four(weights_ + k * ld_ + part.column);
#pragma unroll
        for (int m = 0; m < M; ++m) {
          const T x = x_[m * inner_ + k];
#pragma unroll
          for (int c = 0; c < columns; ++c) sum[c][m][0] += w.at[c] * x;
        }
      } else {
        Four<T> w[columns];
#pragma unroll
        for (int c = 0; c < columns; ++c) w[c] = load_four(weights_ + (k * ld_ + part.column + c * apart) * terms);
#pragma unroll
        for (int m = 0; m < M; ++m) {
          const Four<T> x = load_four(x_ + m * inner_ + k * terms);
#pragma unroll
          for (int i = 0; i < terms; ++i)
#pragma unroll
            for (int c = 0; c < columns; ++c) sum[c][m][i % chains] += w[c].at[i] * x.at[i];
        }
      }
    }
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int c = 0; c < columns; ++c) {
#pragma unroll
        for (int i = 1; i < chains; ++i) sum[c][m][0] += sum[c][m][i];
        put(part.slice, m, part.column + c * apart, sum[c][m][0]);
      }
  }

  const T *weights_, *x_;
  const int ld_, inner_, slices_;
  Part own_;
};

// Brings a block's weights of the gates, from what goes round to own columns. *to(column, k) is a weight's place.
template <class T, class Arguments, class To>
__device__ __forceinline__ void bring_gates(const Arguments& a, const CellPlan& plan, int rank, int columns, To to) {
  // Of a column the gate in a matrix of so many gates, whose rows are `ld` apart.
  const auto row_of = [&](const void* weights, int64_t ld, int gate, int own, int count) {
    const int unit = rank * plan.units + own;
    const bool is = gate >= 0 && own < plan.units && unit < plan.H;
    return Row<T>{static_cast<const T*>(weights) + (static_cast<int64_t>(is ? gate : 0) * plan.H + unit) * ld, is ? count : 0};
  };
  const int per_unit = plan.per_unit(), gates = static_cast<int>(gates_per_unit(plan.controller)), reads_at = plan.reads_at();
  bring<T>(
      columns, reads_at,
      [&](int column) {
        const int own = column / per_unit;
        return row_of(a.hidden_weight, plan.H, plan.hidden_gate(column - own * per_unit), own, plan.H);
      },
      to);
  bring<T>(
      columns, plan.round - reads_at,
      [&](int column) {
        const int own = column / per_unit, gate = column - own * per_unit;
        return row_of(a.reads_weight, a.reads_weight_ld, gate < gates ? gate : -1, own, plan.reads);
      },
      [&](int column, int k) { return to(column, k + reads_at); });
}
// And of the heads, from own units. *to(head, unit)
template <class T, class Arguments, class To>
__device__ __forceinline__ void bring_heads(const Arguments& a, const CellPlan& plan, int rank, int heads, int units, To to) {
  const int first = rank * plan.units, left = plan.H - first, count = left < plan.units ? left : plan.units;
  bring<T>(
      heads, units,
      [&](int head) {
        return Row<T>{static_cast<const T*>(a.head_weight) + static_cast<int64_t>(head) * plan.H + first,
                      head < plan.heads ? count : 0};
      },
      to);
}

template <class T>
__device__ __forceinline__ T sigmoid(T x) {
  return gpu::reciprocal(T(1) + exp(-x));  // 0 of what is beyond its range, and so it should be
}
template <class T>
__device__ __forceinline__ T softplus(T x) {
  return (x > 0 ? x : T(0)) + log1p(exp(-fabs(x)));
}

// An own unit of a sample: among own units and those of all blocks, and where it lies in [lanes, units].
struct Item {
  int m, own, unit, at;
  bool is;     // one of so many as there are,
  bool has;    // neither padding of the units nor of the samples,
  bool there;  // and not beyond the sample's end
  int steps;   // of the sample
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
        count(static_cast<int>(B - first < plan.samples ? B - first : plan.samples)), own(first_item()) {}

  __device__ __forceinline__ bool there(int m) const { return m < count; }
  __device__ __forceinline__ int64_t sample(int m) const { return first + m; }
  __device__ __forceinline__ int64_t row(int64_t t, int m) const { return t * B + sample(m); }

  // Where few items are, four lanes take one, a gate each; else one lane takes all of an item. The last warps take the first
  // items, since the first ones have more to do with the heads and the reads. Units lie side by side, as in device memory.
  template <class F>
  __device__ __forceinline__ void with_lanes(F f) const {
    if (plan.item_bits == 2) f(std::integral_constant<int, 4>());
    else f(std::integral_constant<int, 1>());
  }
  __device__ __forceinline__ static int lane() { return gpu::thread() % gpu::warp_size; }
  // Of those that take the item.
  __device__ __forceinline__ int item_lane() const { return lane() & ((1 << plan.item_bits) - 1); }
  __device__ __forceinline__ Item item(int m, int own) const {
    const int unit = rank * plan.units + own;
    const bool is = m < plan.lanes, has = is && unit < plan.H && there(m);
    return {m, own, unit, m * plan.units + own, is, has, has, has ? static_cast<int>(length(m)) : 0};
  }
  __device__ __forceinline__ Item first_item() const {
    const int i = (cell_threads - gpu::warp_size - gpu::thread() + 2 * lane()) >> plan.item_bits, m = i / plan.units;
    return item(m, i - m * plan.units);
  }
  __device__ __forceinline__ Item own_at(int64_t t) const {
    Item item = own;
    item.there = t < item.steps;
    return item;
  }
  // The thread's items at step t, all lanes of a warp as often: calls f(item, ask(item)), of which `asked` was asked for the first
  // before, and what is asked for the next is under way meanwhile.
  template <class Asked, class Ask, class F>
  __device__ __forceinline__ void each_item(int64_t t, Asked asked, Ask ask, F f) const {
    Item item = own_at(t);
    int left = plan.items() - ((cell_threads - gpu::warp_size - gpu::thread() + lane()) >> plan.item_bits);
    while (left > 0) {
      Item next = item;
      Asked then{};
      left -= cell_threads >> plan.item_bits;
      if (left > 0) {
        const bool beyond = item.own + plan.next_unit >= plan.units;
        next = this->item(item.m + plan.next_sample + (beyond ? 1 : 0), item.own + plan.next_unit - (beyond ? plan.units : 0));
        next.there = t < next.steps;
        then = ask(next);
      }
      f(item, asked);
      item = next;
      asked = then;
    }
  }
  template <class F>
  __device__ __forceinline__ void each_item(int64_t t, F f) const {
    each_item(t, 0, [](const Item&) { return 0; }, [&](const Item& item, int) { f(item); });
  }
  // Which gate is a lane's number i, and what the item's lanes have of a gate.
  template <int LANES>
  __device__ __forceinline__ static int gate(int i) {
    return LANES == 1 ? i : lane() % LANES;
  }
  template <int LANES, class Number>
  __device__ __forceinline__ static Number of_gate(const Number* own, int gate) {
    if constexpr (LANES == 1) return own[gate];
    else return gpu::shuffle(*own, lane() / LANES * LANES + gate);
  }
  // Added up over the item's lanes, which all have it.
  template <class Number>
  __device__ __forceinline__ Number over_lanes(Number value) const {
    if (plan.item_bits == 0) return value;
    value += gpu::shuffle_xor(value, 1);
    return value + gpu::shuffle_xor(value, 2);
  }

  // The samples go through the steps side by side, so many as the longest of them has; what they do at a step may differ.
  __device__ __forceinline__ int64_t length(int m) const { return sequences.length(T, sample(m)); }
  __device__ __forceinline__ int64_t steps() const {
    int64_t most = 0;
    for (int m = 0; m < count; ++m) most = length(m) > most ? length(m) : most;
    return most;
  }
  // steps: of sample m
  __device__ __forceinline__ bool begins(int64_t t, int m, int64_t steps) const {
    return t < steps && sequences.begins(t, B, sample(m));
  }

  __device__ __forceinline__ void barrier() const {
    if (plan.cluster > 1) gpu::sync_cluster();
    else gpu::sync();
  }
  template <class Number>
  __device__ __forceinline__ Number* of_block(Number* shared, int block) const {
    return plan.cluster > 1 ? gpu::of_block(shared, block) : shared;
  }
  // The same number of every block, added up in one order by all; LANES lanes of an item share the work, and all have it.
  template <int LANES = 1, class Number>
  __device__ __forceinline__ Number total(Number* shared) const {
    if (plan.cluster == 1) return *shared;
    constexpr int at_once = 8 / LANES;
    const int own = LANES == 1 ? 0 : lane() % LANES;
    Number sum = 0;
    for (int first = own; first < plan.cluster; first += 8) {
      Number of[at_once];  // asked for together: each takes some hundred cycles to come
#pragma unroll
      for (int i = 0; i < at_once; ++i)
        of[i] = first + i * LANES < plan.cluster ? *gpu::of_block(shared, first + i * LANES) : Number(0);
#pragma unroll
      for (int i = 0; i < at_once; ++i) sum += of[i];
    }
    if constexpr (LANES > 1) {
      sum += gpu::shuffle_xor(sum, 1);
      sum += gpu::shuffle_xor(sum, 2);
    }
    return sum;
  }
  // A row of which the lanes of the warps have put numbers in the block's own shared memory, thread j number j: now all blocks
  // have it. Its place takes fours.
  template <class Number>
  __device__ __forceinline__ void tell_row(Number* row, int count) const {
    constexpr int fours = gpu::warp_size / 4;
    gpu::sync_warp();
    for (int start = gpu::thread() - lane(); start < count; start += gpu::threads())
      for (int i = lane(); i < fours * plan.cluster; i += gpu::warp_size) {
        const int block = i / fours, at = start + 4 * (i % fours);
        if (block != rank && at < count) *reinterpret_cast<Four<Number>*>(of_block(row + at, block)) = load_four(row + at);
      }
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
  // Calls f(j, place, get(j)) for the thread's values. What is got of the first few is all under way before any is used, or was
  // got before: get_known.
  static constexpr int known = P::fixed ? 2 : 1;  // else there are no registers left backward
  template <class Get>
  using Got = decltype(std::declval<Get>()(0))[known];
  template <class Get>
  __device__ __forceinline__ void get_known(Get get, Got<Get>& got) const {
#pragma unroll
    for (int i = 0; i < known; ++i) {
      const int j = gpu::thread() + i * gpu::threads();
      if (j < count_) got[i] = get(j);
    }
  }
  template <class Get, class F>
  __device__ __forceinline__ void each(Get get, const Got<Get>& got, F f) const {
#pragma unroll
    for (int i = 0; i < known; ++i) {
      const int j = gpu::thread() + i * gpu::threads();
      if (j < count_) f(j, places_[i], got[i]);
    }
    for (int j = gpu::thread() + known * gpu::threads(); j < count_; j += gpu::threads())
      f(j, Memory::place_of(a_, memory_, j), get(j));
  }
  template <class Get, class F>
  __device__ __forceinline__ void each(Get get, F f) const {
    Got<Get> got;
    get_known(get, got);
    each(get, got, f);
  }

 private:
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
  plan.round = plan.reads_at() + padded(plan.reads);
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
      plan.item_bits = 4 * plan.items() <= cell_threads ? 2 : 0;
      plan.next_sample = (cell_threads >> plan.item_bits) / plan.units;
      plan.next_unit = (cell_threads >> plan.item_bits) % plan.units;
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

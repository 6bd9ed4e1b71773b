// sparse_read and sparse_scan forward. sparse_backward.cu has the way back.
//
// The search reads the memory once for all heads. A warp takes 16 slots at a time and keeps the K best that it has met, of
// which a block leaves K. A sample of few numbers has one block, which goes through all steps in one launch. A larger one has
// several for the search, and a step is two launches: the search, and one block that joins what they found, reads, and makes
// the next step's write. What is compared is a similarity and a slot as one number: so it makes no difference who meets which
// slot when.
#include "sparse.cuh"

namespace mann_fast {
namespace cuda {
namespace {

// The time of a slot's last access, and the slot.
using Age = Ranked<double>;
__device__ inline Age age_of(int64_t time, int64_t slot) {
  return Age::of(static_cast<uint64_t>(time) ^ uint64_t(1) << 63, static_cast<uint32_t>(slot));
}

// That of the greatest similarity comes first, and a NaN before all.
template <class T>
__device__ inline Ranked<T> rank_of(T similarity, int64_t slot) {
  return Ranked<T>::of(~order_of(similarity), static_cast<uint32_t>(slot));
}
template <class T>
__device__ inline T similarity_of(const Ranked<T>& rank) {
  using Bits = typename Order<T>::Bits;
  const Bits order = ~rank.order(), sign = Bits(1) << (8 * sizeof(T) - 1), bits = order & sign ? order ^ sign : ~order;
  T similarity;
  memcpy(&similarity, &bits, sizeof similarity);
  return similarity;
}

template <class T>
__device__ inline Ranked<T> nobody() {  // comes after all
  return Ranked<T>::of(taken<T>, ~0u);
}

__device__ inline Ranked<float> of_lane(const Ranked<float>& own, int lane) { return {gpu::shuffle(own.bits, lane)}; }
__device__ inline Ranked<double> of_lane(const Ranked<double>& own, int lane) {
  return {gpu::shuffle(own.high, lane), gpu::shuffle(own.number, lane)};
}

// Puts those of the lanes that are among the K best in their places, by a whole warp: 32 places at a time are in registers, and
// what falls out of these is offered to the next.
template <class T>
__device__ void offer(Ranked<T> own, Ranked<T>* best, int K, int lane) {
  for (int begin = 0; begin < K; begin += 32) {
    const int count = K - begin < 32 ? K - begin : 32;
    Ranked<T> mine = lane < count ? best[begin + lane] : nobody<T>();
    bool changed = false;
    for (;; changed = true) {
      const Ranked<T> last = of_lane(mine, count - 1);
      const int first = static_cast<int>(gpu::warp_min(own < last ? lane : 32));
      if (first == 32) break;
      const Ranked<T> given = of_lane(own, first), before = of_lane(mine, lane > 0 ? lane - 1 : 0);
      if (lane == first) own = last;
      if (given < mine) mine = lane > 0 && given < before ? before : given;
    }
    if (!changed) continue;
    gpu::sync_warp();
    if (lane < count) best[begin + lane] = mine;
    gpu::sync_warp();
  }
}

// ---- the search -------------------------------------------------------------------------------------------------------

struct Search {
  int64_t N;
  int D, R, K;
  int heads, columns;  // R and D, padded
  int parts;           // blocks of a sample
  bool wide;           // four numbers of a row can be loaded by one instruction
  Dtype input;
  double eps;
};

constexpr int piece = 4 * column_lanes;  // columns that the lanes of a slot load at once

// Blocks that shall have room on a multiprocessor at once, as many as spill nothing.
template <class T>
constexpr int search_blocks = sizeof(T) == 8 ? 1 : 2;

template <class T>
struct Arrays {
  T *keys, *key_squares;  // [heads, columns], [heads]
  Ranked<T>* lists;       // [warps, R, K], best first; in the end the first warp's are those of all
  // What a step touches and with what weights, [R (2 K + 1)]: the oldest slots, those read before, those read now.
  int* touched;
  T* weights;
  Age* oldest;  // [warps]
  __device__ __host__ Arrays(Carver& carver, const Search& plan)
      : keys(carver.take<T>(plan.heads * plan.columns)), key_squares(carver.take<T>(plan.heads)),
        lists(carver.take<Ranked<T>>(static_cast<int64_t>(block_warps) * plan.R * plan.K)),
        touched(carver.take<int>(plan.R * (2 * plan.K + 1))), weights(carver.take<T>(plan.R * (2 * plan.K + 1))),
        oldest(carver.take<Age>(block_warps)) {}
};

template <class T>
struct Block : Arrays<T> {
  const Search& plan;
  const int lane, warp;
  const int before, now;  // where in `touched` the slots begin that were read before, and now

  __device__ Block(Carver& carver, const Search& plan)
      : Arrays<T>(carver, plan), plan(plan), lane(gpu::thread() % 32), warp(gpu::thread() / 32), before(plan.R),
        now(plan.R + plan.R * plan.K) {}

  // [R, D] of a step of a sample.
  __device__ void load_keys(const void* from, int64_t row) const {
    for (int i = gpu::thread(); i < plan.heads * plan.columns; i += gpu::threads()) {
      const int r = i / plan.columns, d = i % plan.columns;
      const bool there = r < plan.R && d < plan.D;
      this->keys[i] = there ? load_as<T>(from, plan.input, (row * plan.R + r) * plan.D + d) : T(0);
    }
    gpu::sync();
    for (int r = warp; r < plan.heads; r += block_warps) {
      T sum = 0;
      for (int d = lane; d < plan.columns; d += 32) sum += this->keys[r * plan.columns + d] * this->keys[r * plan.columns + d];
      sum = add_warp<1>(sum);
      if (lane == 0) this->key_squares[r] = sum;
    }
    gpu::sync();
  }

  __device__ Ranked<T>* own_lists() const { return this->lists + static_cast<int64_t>(warp) * plan.R * plan.K; }
  __device__ void clear_lists() const {
    for (int i = lane; i < plan.R * plan.K; i += 32) own_lists()[i] = nobody<T>();
    gpu::sync_warp();
  }

  __device__ __forceinline__ Tile<T, 4> fetch(const T* memory, int64_t slot, int column) const {
    Tile<T, 4> m;
#pragma unroll
    for (int s = 0; s < lane_slots; ++s) {
      const T* from = memory + (slot + s) * plan.D + column;
      Four<T> four{};
      if (plan.wide) {
        if (slot + s < plan.N && column < plan.D) four = load_four(from);
      } else {
#pragma unroll
        for (int c = 0; c < 4; ++c) four.at[c] = slot + s < plan.N && column + c < plan.D ? from[c] : T(0);
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) m.at[s][c] = four.at[c];
    }
    return m;
  }

  // The best of this part of a sample's slots, in each warp's lists. Every slot is summed over its columns in one order.
  template <int HEADS>
  __device__ void search(const T* memory, int part) const {
    constexpr int OWN = Place<HEADS>::OWN;
    const Place<HEADS> place;
    const T eps = static_cast<T>(plan.eps);
    clear_lists();
    const int64_t step = static_cast<int64_t>(plan.parts) * block_warps * warp_slots;
    int64_t slot = (static_cast<int64_t>(part) * block_warps + warp) * warp_slots;  // the first of 16
    const int lane_slot = place.group * lane_slots, lane_column = 4 * place.column;
    Tile<T, 4> next = fetch(memory, slot + lane_slot, lane_column);
    for (; slot < plan.N; slot += step) {
      T squares[lane_slots] = {};
      for (int first = 0; first < plan.heads; first += HEADS) {
        T dots[lane_slots * HEADS] = {};
        for (int column = lane_column; column < plan.columns; column += piece) {
          const Tile<T, 4> m = next;  // what comes after it is on its way meanwhile
          const bool more = column + piece < plan.columns, same = more || first + HEADS < plan.heads;
          next = fetch(memory, slot + (same ? 0 : step) + lane_slot, more ? column + piece : lane_column);
          T rows[HEADS][4];
#pragma unroll
          for (int h = 0; h < HEADS; ++h) {
            const Four<T> four = load_four(this->keys + (first + h) * plan.columns + column);
#pragma unroll
            for (int c = 0; c < 4; ++c) rows[h][c] = four.at[c];
          }
          add_dots<HEADS, 4>(m, rows, dots);
          if (first == 0) add_squares<4>(m, squares);
        }
        add_lanes<4, 1, lane_slots * HEADS>(dots, lane);
        if (first == 0) add_lanes<4, 1, lane_slots>(squares, lane);
        Ranked<T> found[OWN];
        bool any = false;
#pragma unroll
        for (int j = 0; j < OWN; ++j) {
          const int r = first + place.own_head + j;
          const bool there = place.owner && r < plan.R && slot + place.own_slot < plan.N;
          const T similarity = dots[j] * gpu::inverse_root(squares[0] * this->key_squares[r] + eps);
          found[j] = there ? rank_of(similarity, slot + place.own_slot) : nobody<T>();
          if (there) any |= found[j] < own_lists()[r * plan.K + plan.K - 1];
        }
        if (!warp_any(any)) continue;
#pragma unroll
        for (int h = 0; h < HEADS; ++h)
          if (first + h < plan.R)
            offer(place.own_head == h / OWN * OWN ? found[h % OWN] : nobody<T>(), own_lists() + (first + h) * plan.K, plan.K,
                  lane);
      }
    }
  }

  // The best of what all parts of a sample have left, [R, parts, K], in each warp's lists.
  __device__ void gather(const Ranked<T>* of_parts) const {
    const int64_t count = static_cast<int64_t>(plan.parts) * plan.K;
    clear_lists();
    for (int r = 0; r < plan.R; ++r)
      for (int64_t i = warp * 32; i < count; i += most_threads)
        offer(i + lane < count ? of_parts[r * count + i + lane] : nobody<T>(), own_lists() + r * plan.K, plan.K, lane);
  }

  // Those of all warps in the first one's lists.
  __device__ void join() const {
    const int K = plan.K;
    gpu::sync();
    for (int r = warp; r < plan.R; r += block_warps)
      for (int w = 1; w < block_warps; ++w)
        for (int k = 0; k < K; k += 32) {
          const Ranked<T>* from = this->lists + (static_cast<int64_t>(w) * plan.R + r) * K + k;
          offer(k + lane < K ? from[lane] : nobody<T>(), this->lists + r * K, K, lane);
        }
    gpu::sync();
  }

  // ---- what is read -----------------------------------------------------------------------------------------------------

  // The slots that were found and their weights, where a step has those of now.
  __device__ void weigh_reads(const void* sharpness, int64_t row) const {
    for (int r = warp; r < plan.R; r += block_warps) {
      const Ranked<T>* best = this->lists + r * plan.K;
      const T beta = sharpness ? load_as<T>(sharpness, plan.input, row * plan.R + r) : T(1);
      T* weights = this->weights + now + r * plan.K;
      T most = -INFINITY, sum = 0;
      const auto raise = [&](T x) { most = x > most || x != x ? x : most; };
      for (int k = lane; k < plan.K; k += 32) raise(beta * similarity_of(best[k]));
      for (int mask = 16; mask > 0; mask /= 2) raise(gpu::shuffle_xor(most, mask));
      for (int k = lane; k < plan.K; k += 32) sum += weights[k] = exp(beta * similarity_of(best[k]) - most);
      sum = add_warp<1>(sum);
      for (int k = lane; k < plan.K; k += 32) {
        weights[k] /= sum;
        this->touched[now + r * plan.K + k] = static_cast<int>(best[k].slot());
      }
    }
    gpu::sync();
  }

  // The rows read, [R, K, D], where they are kept, and what the heads read of them, [R, D].
  __device__ void read(const T* memory, T* rows, void* reads, int64_t row) const {
    const int D = plan.D, K = plan.K;
    for (int i = gpu::thread(); i < plan.R * D; i += gpu::threads()) {
      const int r = i / D, d = i % D;
      T sum = 0;
#pragma unroll 4
      for (int k = 0; k < K; ++k) {
        const T m = memory[static_cast<int64_t>(this->touched[now + r * K + k]) * D + d];
        if (rows) rows[(static_cast<int64_t>(r) * K + k) * D + d] = m;
        sum += this->weights[now + r * K + k] * m;
      }
      store_input(reads, plan.input, row * plan.R * D + i, sum);
    }
  }

  __device__ void store_reads(int64_t* slots, T* weights) const {
    for (int j = gpu::thread(); j < plan.R * plan.K; j += gpu::threads()) {
      slots[j] = this->touched[now + j];
      weights[j] = this->weights[now + j];
    }
  }
};

// What one block leaves of its part for the block that joins them, [B, R, parts, K].
template <class T>
__device__ void leave(const Block<T>& block, int64_t b, int part, Ranked<T>* of_parts) {
  const int K = block.plan.K;
  for (int j = gpu::thread(); j < block.plan.R * K; j += gpu::threads())
    of_parts[((b * block.plan.R + j / K) * block.plan.parts + part) * K + j % K] = block.lists[j];
}

template <class T, int HEADS>
__global__ void __launch_bounds__(most_threads, search_blocks<T>)
    sparse_search_kernel(const T* memory, const void* keys, const int64_t* lengths, int64_t t, int64_t B,
                         const __grid_constant__ Search plan, Room room, Ranked<T>* of_parts) {
  const int64_t b = gpu::block() / plan.parts;
  const int part = static_cast<int>(gpu::block() % plan.parts);
  if (lengths && t >= lengths[b]) return;
  Carver carver(room.own());
  const Block<T> block(carver, plan);
  block.load_keys(keys, t * B + b);
  block.template search<HEADS>(memory + b * plan.N * plan.D, part);
  block.join();
  leave(block, b, part, of_parts);
}

// ---- sparse_read --------------------------------------------------------------------------------------------------------

// Searches where nobody has.
template <class T, int HEADS>
__global__ void __launch_bounds__(most_threads, search_blocks<T>)
    sparse_read_kernel(const __grid_constant__ SparseRead a, const __grid_constant__ Search plan, Room room,
                       const Ranked<T>* of_parts) {
  const int64_t b = gpu::block(), RK = a.R * a.K;
  const T* memory = static_cast<const T*>(a.memory) + b * a.N * a.D;
  Carver carver(room.own());
  const Block<T> block(carver, plan);
  if (of_parts) {
    block.gather(of_parts + b * RK * plan.parts);
  } else {
    block.load_keys(a.key, b);
    block.template search<HEADS>(memory, 0);
  }
  block.join();
  block.weigh_reads(a.sharpness, b);
  block.read(memory, static_cast<T*>(a.rows) + b * RK * a.D, a.read, b);
  block.store_reads(a.slots + b * RK, static_cast<T*>(a.weights) + b * RK);
}

// ---- sparse_scan --------------------------------------------------------------------------------------------------------

// What launches hand on.
template <class T>
struct Between {
  Age* oldest_of_chunks;  // [B, chunks]
  int* oldest;            // [B, R], that were erased in this step
  Ranked<T>* of_parts;    // [B, R, parts, K]
};

// One sample, whose state lies where it comes out.
template <class T>
struct Sample : Block<T> {
  using Block<T>::plan;
  using Block<T>::lane;
  using Block<T>::warp;
  using Block<T>::before;
  using Block<T>::now;
  const SparseScan& a;
  const int64_t b, length, chunks;
  T *memory, *read_weights;
  int64_t *times, *read_slots;
  Age* oldest_of_chunks;
  int* erased;

  __device__ Sample(Carver& carver, const SparseScan& a, const Search& plan, const Between<T>& between, int64_t b)
      : Block<T>(carver, plan), a(a), b(b), length(a.sequences.length(a.T, b)), chunks(((a.N - 1) >> chunk_bits) + 1),
        memory(static_cast<T*>(a.out_memory) + b * a.N * a.D),
        read_weights(static_cast<T*>(a.out_read_weights) + b * a.R * a.K), times(a.out_last_access + b * a.N),
        read_slots(a.out_read_slots + b * a.R * a.K), oldest_of_chunks(between.oldest_of_chunks + b * chunks),
        erased(between.oldest + b * a.R) {}

  // Of a chunk's slots that come after `last`, the one of oldest access; by a warp.
  __device__ Age first_of_chunk(int64_t chunk, const Age* last) const {
    const int64_t begin = chunk << chunk_bits, end = begin + (1 << chunk_bits) < a.N ? begin + (1 << chunk_bits) : a.N;
    Age first = nobody<double>();
#pragma unroll 8
    for (int64_t i = begin + lane; i < end; i += 32) {
      const Age age = age_of(times[i], i);
      if (age < first && (last == nullptr || *last < age)) first = age;
    }
    return first_of_warp(first);
  }
  __device__ static Age first_of_warp(const Age& own) {
    const uint64_t order = warp_least(own.order());
    return Age::of(order, gpu::warp_min(own.order() == order ? own.slot() : ~0u));
  }

  // The state before step t, where it is not that which the step before has left; this part of it.
  __device__ void begin(int64_t t, int part, int parts) const {
    const bool anew = t < length && a.sequences.begins(t, a.B, b);
    if (t > 0 && !anew) return;
    const int64_t D = a.D, RK = a.R * a.K;
    const T* from = anew ? static_cast<const T*>(a.sequences.start) : static_cast<const T*>(a.memory) + b * a.N * D;
    for (int64_t chunk = part * block_warps + warp; chunk < chunks; chunk += parts * block_warps) {
      const int64_t first = chunk << chunk_bits, end = first + (1 << chunk_bits) < a.N ? first + (1 << chunk_bits) : a.N;
      if (from != memory) copy(from + first * D, (end - first) * D, memory + first * D);
      if (anew || a.last_access != a.out_last_access)
        for (int64_t i = first + lane; i < end; i += 32) times[i] = !anew ? a.last_access[b * a.N + i] : i == 0 ? 0 : -1;
      const Age oldest = first_of_chunk(chunk, nullptr);  // of times that each lane has written for itself
      if (lane == 0) oldest_of_chunks[chunk] = oldest;
    }
    if (part > 0) return;
    for (int j = gpu::thread(); j < RK; j += gpu::threads()) {
      read_slots[j] = anew ? j % plan.K : within(a.read_slots[b * RK + j], a.N);
      read_weights[j] = !anew ? static_cast<const T*>(a.read_weights)[b * RK + j] : T(j % plan.K == 0);
    }
    if (gpu::thread() == 0) a.out_clock[b] = anew ? 0 : a.clock[b];
  }
  __device__ void copy(const T* __restrict__ from, int64_t count, T* __restrict__ to) const {
    if (plan.wide) {
#pragma unroll 4
      for (int64_t i = 4 * lane; i < count; i += 128) *reinterpret_cast<Four<T>*>(to + i) = load_four(from + i);
    } else {
#pragma unroll 4
      for (int64_t i = lane; i < count; i += 32) to[i] = from[i];
    }
  }

  // The R slots of oldest access, to `erased`; what is kept of their chunks is then without them, until `renew_chunks`.
  __device__ void find_oldest() const {
    for (int r = 0; r < plan.R; ++r) {
      Age first = nobody<double>();
#pragma unroll 4
      for (int64_t chunk = gpu::thread(); chunk < chunks; chunk += gpu::threads())
        if (oldest_of_chunks[chunk] < first) first = oldest_of_chunks[chunk];
      first = first_of_warp(first);
      if (lane == 0) this->oldest[warp] = first;
      gpu::sync();
      if (warp == 0) {
        first = first_of_warp(lane < block_warps ? this->oldest[lane] : nobody<double>());
        const int64_t chunk = first.slot() >> chunk_bits;
        const Age next = first_of_chunk(chunk, &first);
        if (lane == 0) {
          oldest_of_chunks[chunk] = next;
          erased[r] = static_cast<int>(first.slot());
        }
      }
      gpu::sync();
    }
  }

  // What step t writes where, in the first parts of `touched` and `weights`.
  __device__ void weigh_writes(int64_t t) const {
    const int R = plan.R, K = plan.K;
    const int64_t heads = (t * a.B + b) * R;
    for (int j = gpu::thread(); j < R + R * K; j += gpu::threads()) {
      const bool old = j < R;
      const WriteGates<T> gates(a.told, plan.input, heads + (old ? j : (j - R) / K));
      this->touched[j] = old ? erased[j] : static_cast<int>(read_slots[j - R]);
      this->weights[j] = gates.open * (old ? gates.rest : gates.gate * read_weights[j - R]);
    }
    gpu::sync();
  }

  __device__ void write(int64_t t) const {
    const int64_t row = t * a.B + b;
    find_oldest();
    weigh_writes(t);
    for (int j = warp; j < plan.R + plan.R * plan.K; j += block_warps) {  // a warp makes all of a row
      const int slot = this->touched[j];
      if (!is_first(this->touched, j, 0, lane)) continue;
      T* m = memory + static_cast<int64_t>(slot) * plan.D;
      for (int d = lane; d < plan.D; d += 32) {
        T sum = j < plan.R ? T(0) : m[d];
        for (int i = j; i < plan.R + plan.R * plan.K; ++i) {
          if (this->touched[i] != slot) continue;
          const int64_t head = row * plan.R + (i < plan.R ? i : (i - plan.R) / plan.K);
          sum += this->weights[i] * load_as<T>(a.told.write_vectors, plan.input, head * plan.D + d);
        }
        m[d] = sum;
      }
    }
    for (int r = gpu::thread(); a.oldest && r < plan.R; r += gpu::threads()) a.oldest[row * plan.R + r] = erased[r];
    gpu::sync();
  }

  // Having found what to read.
  __device__ void finish(int64_t t) const {
    const int64_t row = t * a.B + b, RK = a.R * a.K, clock = a.out_clock[b] + 1;
    this->weigh_reads(a.told.sharpness, row);
    this->read(memory, a.rows ? static_cast<T*>(a.rows) + row * RK * a.D : nullptr, a.reads, row);
    this->store_reads(read_slots, read_weights);
    if (a.slot_history) this->store_reads(a.slot_history + row * RK, static_cast<T*>(a.weight_history) + row * RK);
    note_access(clock);
    if (gpu::thread() == 0) a.out_clock[b] = clock;
    if (t + 1 == length) return;
    gpu::sync();
    renew_chunks();
  }

  // last_access of the slots whose weights, summed over the heads in the reference's order, exceed the threshold.
  __device__ void note_access(int64_t clock) const {
    const int R = plan.R, K = plan.K;
    for (int j = gpu::thread(); j < R * (2 * K + 1); j += gpu::threads()) {
      const int slot = this->touched[j];
      bool first = true;
      for (int i = 0; i < j; ++i) first &= this->touched[i] != slot;
      if (!first) continue;
      T total = 0;
      const auto weight = [&](int i) { return this->touched[i] == slot ? this->weights[i] : T(0); };
      for (int r = 0; r < R; ++r) {
        T of_head = 0;
        for (int k = 0; k < K; ++k) of_head += weight(before + r * K + k);
        of_head += weight(r);
        for (int k = 0; k < K; ++k) of_head += weight(now + r * K + k);
        total += of_head;
      }
      if (total > static_cast<T>(a.threshold)) times[slot] = clock;
    }
  }

  // What is kept of the chunks whose first slot was erased, or has been accessed.
  __device__ void renew_chunks() const {
    for (int j = warp; j < plan.R * (2 * plan.K + 1); j += block_warps) {
      if (!is_first(this->touched, j, chunk_bits, lane)) continue;
      const int64_t chunk = this->touched[j] >> chunk_bits;
      const Age known = oldest_of_chunks[chunk];
      if (j >= plan.R && age_of(times[known.slot()], 0).order() == known.order()) continue;
      const Age first = first_of_chunk(chunk, nullptr);
      gpu::sync_warp();  // all lanes know what was kept
      if (lane == 0) oldest_of_chunks[chunk] = first;
    }
    gpu::sync();
  }
};

// All steps of a sample that has one block.
template <class T, int HEADS>
__global__ void __launch_bounds__(most_threads, search_blocks<T>)
    sparse_scan_kernel(const __grid_constant__ SparseScan a, const __grid_constant__ Search plan, Room room,
                       Between<T> between) {
  Carver carver(room.own());
  const Sample<T> sample(carver, a, plan, between, gpu::block());
  sample.begin(0, 0, 1);
  gpu::sync();
  for (int64_t t = 0; t < sample.length; ++t) {
    const int64_t row = t * a.B + sample.b;
    if (t > 0 && a.sequences.begins(t, a.B, sample.b)) {
      sample.begin(t, 0, 1);
      gpu::sync();
    }
    sample.write(t);
    sample.load_keys(a.told.keys, row);
    sample.template search<HEADS>(sample.memory, 0);
    sample.join();
    sample.finish(t);
  }
  for (int64_t t = sample.length; t < a.T; ++t) clear_row(a.reads, a.input, t * a.B + sample.b, a.R * a.D);
}

// Of a sample that has several: `begin`,
template <class T>
__global__ void __launch_bounds__(most_threads, 2)
    sparse_begin_kernel(const __grid_constant__ SparseScan a, const __grid_constant__ Search plan, Between<T> between,
                        int64_t t) {
  Carver carver(nullptr);
  const Sample<T> sample(carver, a, plan, between, gpu::block() / plan.parts);
  sample.begin(t, static_cast<int>(gpu::block() % plan.parts), plan.parts);
}

// and, around the search, the end of one step and the write of another; none: -1.
template <class T>
__global__ void __launch_bounds__(most_threads, 2)
    sparse_step_kernel(const __grid_constant__ SparseScan a, const __grid_constant__ Search plan, Room room, Between<T> between,
                       int64_t finished, int64_t written) {
  Carver carver(room.own());
  const Sample<T> sample(carver, a, plan, between, gpu::block());
  if (finished >= 0 && finished >= sample.length) {
    clear_row(a.reads, a.input, finished * a.B + sample.b, a.R * a.D);
  } else if (finished >= 0) {
    sample.weigh_writes(finished);
    sample.gather(between.of_parts + sample.b * a.R * plan.parts * a.K);
    sample.join();
    sample.finish(finished);
  }
  if (written >= 0 && written < sample.length) sample.write(written);
}

// ---- launches -----------------------------------------------------------------------------------------------------------

template <class T, class Arguments>
Search plan_search(const Arguments& a, const void* memory) {
  Search plan{};
  plan.N = a.N, plan.D = static_cast<int>(a.D), plan.R = static_cast<int>(a.R), plan.K = static_cast<int>(a.K);
  plan.heads = a.R == 1 ? 1 : static_cast<int>((a.R + 3) / 4 * 4);
  plan.columns = static_cast<int>((a.D + piece - 1) / piece * piece);
  plan.parts = static_cast<int>(sparse_blocks(a.B, a.N, a.D));
  plan.wide = a.D % 4 == 0 && reinterpret_cast<uintptr_t>(memory) % alignof(Four<T>) == 0;
  plan.input = a.input, plan.eps = a.eps;
  return plan;
}

// Calls f with as many heads as a warp takes at once.
template <class F>
const char* with_heads(const Search& plan, F f) {
  if (plan.R == 1) return f(std::integral_constant<int, 1>());
  return f(std::integral_constant<int, 4>());
}

template <class T>
Ranked<T>* take_of_parts(const Search& plan, int64_t B, const Queue& queue) {
  if (plan.parts == 1) return nullptr;
  return static_cast<Ranked<T>*>(queue.scratch(queue.owner, B * plan.R * plan.parts * plan.K * sizeof(Ranked<T>)));
}

template <class T>
Room make_room(const Search& plan, int64_t B, const Queue& queue) {
  Carver carver(nullptr);
  Arrays<T>(carver, plan);
  return make_room(carver, B * plan.parts, queue);
}

template <class T>
const char* read(const SparseRead& a, const Queue& queue) {
  if (a.B == 0) return nullptr;
  if (const char* why = too_many_rows(a.D, a.R, a.K)) return why;
  const Search plan = plan_search<T>(a, a.memory);
  const Room room = make_room<T>(plan, a.B, queue);
  Ranked<T>* of_parts = take_of_parts<T>(plan, a.B, queue);
  return with_heads(plan, [&](auto heads) {
    constexpr int HEADS = decltype(heads)::value;
    if (of_parts)
      if (const char* why =
              gpu::launch(sparse_search_kernel<T, HEADS>, {a.B * plan.parts, most_threads, 1, room.shared(), queue.stream},
                          static_cast<const T*>(a.memory), a.key, nullptr, 0, a.B, plan, room, of_parts))
        return why;
    return gpu::launch(sparse_read_kernel<T, HEADS>, {a.B, most_threads, 1, room.shared(), queue.stream}, a, plan, room,
                       of_parts);
  });
}

template <class T>
const char* scan(const SparseScan& a, const Queue& queue) {
  if (a.B == 0) return nullptr;
  if (const char* why = too_many_rows(a.D, a.R, a.K)) return why;
  Search plan = plan_search<T>(a, a.out_memory);
  for (const void* from : {a.memory, a.sequences.start})
    plan.wide = plan.wide && reinterpret_cast<uintptr_t>(from) % alignof(Four<T>) == 0;
  const Room room = make_room<T>(plan, a.B, queue);
  const int64_t chunks = ((a.N - 1) >> chunk_bits) + 1;
  const Between<T> between = {static_cast<Age*>(queue.scratch(queue.owner, a.B * chunks * sizeof(Age))),
                              static_cast<int*>(queue.scratch(queue.owner, a.B * a.R * sizeof(int))),
                              take_of_parts<T>(plan, a.B, queue)};
  const gpu::Launch one = {a.B, most_threads, 1, room.shared(), queue.stream};
  const gpu::Launch all = {a.B * plan.parts, most_threads, 1, room.shared(), queue.stream};
  return with_heads(plan, [&](auto heads) -> const char* {
    constexpr int HEADS = decltype(heads)::value;
    if (plan.parts == 1) return gpu::launch(sparse_scan_kernel<T, HEADS>, one, a, plan, room, between);
    const char* why = nullptr;
    const auto begin = [&](int64_t t) {
      if (!why) why = gpu::launch(sparse_begin_kernel<T>, {all.blocks, most_threads, 1, 0, queue.stream}, a, plan, between, t);
    };
    const auto step = [&](int64_t finished, int64_t written) {
      if (!why) why = gpu::launch(sparse_step_kernel<T>, one, a, plan, room, between, finished, written);
    };
    begin(0);
    if (a.T > 0) step(-1, 0);
    for (int64_t t = 0; t < a.T && !why; ++t) {
      why = gpu::launch(sparse_search_kernel<T, HEADS>, all, static_cast<const T*>(a.out_memory), a.told.keys,
                        a.sequences.lengths, t, a.B, plan, room, between.of_parts);
      const bool last = t + 1 == a.T;
      if (last || a.sequences.resets == nullptr) {
        step(t, last ? -1 : t + 1);
      } else {  // a sample may begin anew, which takes all its blocks
        step(t, -1);
        begin(t + 1);
        step(-1, t + 1);
      }
    }
    return why;
  });
}

}  // namespace

// A block has 2^16 numbers at least, which take it about as long as a launch; and there are no more than run at once.
int64_t sparse_blocks(int64_t B, int64_t N, int64_t D) {
  const int64_t useful = (N * D + (1 << 16) - 1) >> 16, at_once = 2 * gpu::limits().processors;
  const int64_t wanted = B < at_once ? at_once / (B > 0 ? B : 1) : 1;
  return useful < wanted ? useful : wanted;
}

const char* sparse_read(const SparseRead& a, const Queue& queue) {
  return a.state == Dtype::float64 ? read<double>(a, queue) : read<float>(a, queue);
}
const char* sparse_scan(const SparseScan& a, const Queue& queue) {
  return a.state == Dtype::float64 ? scan<double>(a, queue) : scan<float>(a, queue);
}

}  // namespace cuda
}  // namespace mann_fast

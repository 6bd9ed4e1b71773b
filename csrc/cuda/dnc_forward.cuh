// A step of a Differentiable Neural Computer's memory forward, of any size, as a block takes it: dnc_scan.cu and dnc_cell.cu go
// through the steps.
#pragma once
#include "dnc_scan.cuh"

namespace mann_fast {
namespace cuda {

constexpr int sorted_at_once = 256;

template <class T>
struct DncForward {
  using Bits = typename Order<T>::Bits;
  int64_t N, heads;
  T *in, *partial_reads, *total;  // [2, inputs]; [warps, R, D]; the sum of the write weights
  Bits *ranks, *sorted;  // [N] each: usages as integers of the same order; part by part in order, where there are parts
  int *order, *places;   // slots in order; a slot's place in its part
  T *usage, *retained, *precedence, *written, *before;
  T *read_weights, *dots, *squares;  // [heads, N], [R + 1, N] twice: of the heads that read, and of the one that writes
  T *forward, *backward;             // [heads, N], [warps, heads, N]: directions, the latter as far as each warp's rows go
  T *memory, *links;                 // [N, row], [N, N]
  int row;
  bool near_memory, near_links, near_rest;

  template <bool NEAR>
  __device__ __host__ DncForward(Room<NEAR>& room, const DncPlan& plan, T* out_memory = nullptr, T* out_links = nullptr)
      : N(plan.N), heads(plan.heads), in(room.template take<T>(2 * plan.inputs())),
        partial_reads(room.template take<T>(static_cast<int64_t>(plan.warps) * plan.R * plan.D)),
        total(room.template take<T>(1)), ranks(room.template take<Bits>(N)),
        sorted(room.template take<Bits>(N > sorted_at_once ? N : 0)), order(room.template take<int>(N)),
        places(room.template take<int>(N > sorted_at_once ? N : 0)), usage(room.template take<T>(N)),
        retained(room.template take<T>(N)), precedence(room.template take<T>(N)), written(room.template take<T>(N)),
        before(room.template take<T>(N)), read_weights(room.template take<T>(heads * N)),
        dots(room.template take<T>((plan.R + 1) * N)), squares(room.template take<T>((plan.R + 1) * N)),
        forward(room.template take<T>(plan.links ? heads * N : 0)),
        backward(room.template take<T>(plan.links ? plan.warps * heads * N : 0)) {
    const size_t used = room.near.used;
    memory = room.template take_or<T>(N * plan.row, out_memory);
    near_memory = room.near.used > used;
    row = near_memory ? plan.row : plan.D;
    const size_t with_memory = room.near.used;
    links = plan.links ? room.template take_or<T>(N * N, out_links) : nullptr;
    near_links = room.near.used > with_memory;
    near_rest = room.far.used == 0;
  }
};

template <class T, bool NEAR>
struct DncForwardStep : DncThread<T> {
  using Base = DncThread<T>;
  using Base::plan, Base::lane, Base::warp, Base::warps, Base::of;
  const DncScan& a;
  const int64_t sample;
  Room<NEAR> room;
  const DncForward<T> my;

  __device__ __forceinline__ DncForwardStep(const DncScan& a, const DncPlan& plan, DncPlaces places, int64_t sample)
      : Base(plan, a.eps), a(a), sample(sample), room(places, plan.limit),
        my(room, plan, out<T>(a.after.memory, a.N * a.D), out<T>(a.after.links, a.N * a.N)) {}

  template <class U>
  __device__ __forceinline__ U* out(void* data, int64_t each) const {
    return static_cast<U*>(data) + sample * each;
  }
  __device__ __forceinline__ const T* came(const void* data, int64_t each) const {
    return static_cast<const T*>(data) + sample * each;
  }
  __device__ __forceinline__ DncInputs<T> inputs(int64_t step) const { return this->inputs_of(my.in, step); }

  // The state that came in, or that of the start of a sequence.
  __device__ __forceinline__ void begin(bool anew) {
    const int64_t N = plan.N, D = plan.D;
    const T* memory = anew ? static_cast<const T*>(a.sequences.start) : came(a.before.memory, N * D);
    this->with_each(N * D, [&](int64_t i) { my.memory[i / D * my.row + i % D] = memory[i]; });
    const auto take = [&](T* to, const void* from, int64_t count) {
      this->with_each(count, [&](int64_t i) { to[i] = anew ? T(0) : came(from, count)[i]; });
    };
    take(my.usage, a.before.usage, N);
    take(my.written, a.before.write_weights, N);
    take(my.read_weights, a.before.read_weights, plan.R * N);
    this->with_each((plan.heads - plan.R) * N, [&](int64_t i) { my.read_weights[plan.R * N + i] = 0; });
    if (!plan.links) return;
    take(my.precedence, a.before.precedence, N);
    take(my.links, a.before.links, N * N);
  }

  __device__ __forceinline__ void use(const T* in) {
    this->with_each(plan.N, [&](int64_t i) {
      const T retained = this->retained(in, my.read_weights, static_cast<int>(i));
      const T usage = next_usage(my.usage[i], my.written[i], retained);
      my.retained[i] = retained;
      my.usage[i] = usage;
      my.ranks[i] = order_of(usage);
    });
  }

  // A slot's place is the number of those before it, which its 8 lanes count: all of them where they are few, else those of its
  // own part, and after a barrier, when every part is in order, those of the other parts by halving.
  __device__ __forceinline__ void sort_parts() {
    this->with_slots([&](int slot, bool there) {
      const int first = slot / sorted_at_once * sorted_at_once;
      int before = 0;
      if (there) {
        const int last = first + sorted_at_once < plan.N ? first + sorted_at_once : plan.N;
        const auto own = my.ranks[slot];
        for (int j = first + lane % column_lanes; j < last; j += column_lanes) {
          const auto other = my.ranks[j];
          before += other < own || (other == own && j < slot);
        }
      }
      before = add_columns(before);
      if (!there || lane % column_lanes != 0) return;
      if (plan.N <= sorted_at_once) {
        my.order[before] = slot;
      } else {
        my.places[slot] = before;
        my.sorted[first + before] = my.ranks[slot];
      }
    });
  }
  __device__ __forceinline__ void sort_all() {
    this->with_slots([&](int slot, bool there) {
      const int own_part = slot / sorted_at_once, parts = (plan.N + sorted_at_once - 1) / sorted_at_once;
      int before = 0;
      for (int part = lane % column_lanes; there && part < parts; part += column_lanes) {
        if (part == own_part) continue;
        const auto own = my.ranks[slot];
        const int first = part * sorted_at_once;
        int low = first, high = first + sorted_at_once < plan.N ? first + sorted_at_once : plan.N;
        while (low < high) {  // equal usage goes to the lower slot
          const int middle = (low + high) / 2;
          const auto other = my.sorted[middle];
          if (other < own || (other == own && part < own_part)) low = middle + 1;
          else high = middle;
        }
        before += low - first;
      }
      before = add_columns(before);
      if (there && lane % column_lanes == 0) my.order[before + my.places[slot]] = slot;
    });
  }

  // By a warp.
  __device__ __forceinline__ void weigh_write(const T* in) {
    T* content = my.dots + plan.R * plan.N;
    this->soften(in, plan.R, my.dots, my.squares, content);
    this->products(my.usage, my.order, my.before);
    gpu::sync_warp();
    const T allocated = of(in, Told::allocation_gate)[0], gate = of(in, Told::write_gate)[0];
    T sum = 0;
    this->with_row([&](int i) {
      const T allocation = (T(1) - my.usage[i]) * my.before[i];
      const T weight = gate * (allocated * allocation + (T(1) - allocated) * content[i]);
      my.written[i] = weight;
      sum += weight;
    });
    sum = add_warp(sum);
    if (lane == 0) *my.total = sum;
  }

  // Writes, and compares what is there then; a lane touches its own columns only.
  __device__ __forceinline__ void write(const T* in) {
    const T *erase = of(in, Told::erase), *vector = of(in, Told::write_vector);
    this->with_slots([&](int slot, bool there) {
      T* row = my.memory + static_cast<int64_t>(there ? slot : 0) * my.row;
      if (there) {
        const T weight = my.written[slot], kept = plan.deallocate ? my.retained[slot] : T(1);
        this->with_columns([&](int c) { row[c] = row[c] * (T(1) - weight * erase[c]) * kept + weight * vector[c]; });
      }
      for (int h = 0; h < plan.R; ++h) this->compare(in, h, slot, there, my.dots, my.squares, [&](int c) { return row[c]; });
    });
  }

  // The new links and both directions, four heads at a time: a lane holds what it needs of some columns through all rows of the
  // warp.
  __device__ __forceinline__ void link() {
    constexpr int chunks = sizeof(T) == 4 ? 4 : 2, H = heads_at_once;
    const int N = plan.N;
    for (int first = 0; first < plan.heads; first += H)
      for (int left = 0; left < N; left += 32 * chunks) {
        T weight[chunks], before[chunks], read[chunks][H], back[chunks][H];
#pragma unroll
        for (int k = 0; k < chunks; ++k) {
          const int j = left + k * 32 + lane;
          weight[k] = j < N ? my.written[j] : T(0);
          before[k] = j < N ? my.precedence[j] : T(0);
#pragma unroll
          for (int h = 0; h < H; ++h) read[k][h] = j < N ? my.read_weights[(first + h) * N + j] : T(0), back[k][h] = 0;
        }
        for (int i = warp; i < N; i += warps) {
          T* row = my.links + static_cast<int64_t>(i) * N;
          const T own = my.written[i];
          T ahead[H] = {}, own_read[H];
#pragma unroll
          for (int h = 0; h < H; ++h) own_read[h] = my.read_weights[(first + h) * N + i];
#pragma unroll
          for (int k = 0; k < chunks; ++k) {
            const int j = left + k * 32 + lane;
            if (j >= N) continue;
            T link = row[j];
            if (first == 0) row[j] = link = next_link(link, own, weight[k], before[k], i == j);
#pragma unroll
            for (int h = 0; h < H; ++h) ahead[h] += link * read[k][h], back[k][h] += link * own_read[h];
          }
          add_lanes<16, 1, H>(ahead, lane);
          if (has_sums<16, 1, H>(lane)) {
            T& sum = my.forward[(first + first_sum<16, 1, H>(lane)) * N + i];
            sum = left == 0 ? ahead[0] : sum + ahead[0];
          }
        }
#pragma unroll
        for (int k = 0; k < chunks; ++k) {
          const int j = left + k * 32 + lane;
#pragma unroll
          for (int h = 0; h < H; ++h)
            if (j < N) my.backward[(static_cast<int64_t>(warp) * plan.heads + first + h) * N + j] = back[k][h];
        }
      }
  }

  // By a warp: the read weights of head h.
  __device__ __forceinline__ void weigh_read(const T* in, int h, int64_t step) {
    const int64_t N = plan.N, row = (step * a.B + sample) * plan.R + h;
    T *weights = my.read_weights + h * N, *content = my.dots + h * N;
    this->soften(in, h, my.dots, my.squares, content);
    if (plan.links) {
      T *ahead = my.forward + h * N, *back = my.backward + h * N;  // the first warp's part becomes the sum
      this->with_row([&](int i) {
        for (int w = 1; w < warps; ++w) back[i] += back[static_cast<int64_t>(w) * plan.heads * N + i];
      });
      if (plan.sharpened) {
        if (a.directions) {
          T* kept = static_cast<T*>(a.directions) + row * 2 * N;
          this->with_row([&](int i) { kept[i] = back[i], kept[N + i] = ahead[i]; });
        }
        const T* exponents = of(in, Told::link_sharpening) + 2 * h;
        this->sharpen(back, exponents[0], back);
        this->sharpen(ahead, exponents[1], ahead);
      }
      const T* modes = of(in, Told::read_modes) + 3 * h;
      this->with_row([&](int i) { weights[i] = modes[0] * back[i] + modes[1] * content[i] + modes[2] * ahead[i]; });
    } else {
      this->with_row([&](int i) { weights[i] = content[i]; });
    }
    if (a.read_history) this->with_row([&](int i) { static_cast<T*>(a.read_history)[row * N + i] = weights[i]; });
  }

  __device__ __forceinline__ void keep(int64_t step) {
    const int64_t row = (step * a.B + sample) * plan.N;
    this->with_each(plan.N, [&](int64_t i) {
      if (plan.links) my.precedence[i] = (T(1) - *my.total) * my.precedence[i] + my.written[i];
      if (a.write_history) static_cast<T*>(a.write_history)[row + i] = my.written[i];
      if (a.orders) a.orders[row + i] = my.order[i];
    });
  }

  // The warp's part of the reads, a lane for a column.
  __device__ __forceinline__ void read() {
    T* part = my.partial_reads + static_cast<int64_t>(warp) * plan.R * plan.D;
    for (int first = 0; first < plan.R; first += heads_at_once)
      for (int c = lane; c < plan.D; c += 32) {
        T sums[heads_at_once] = {};
        for (int i = warp; i < plan.N; i += warps) {
          const T m = my.memory[static_cast<int64_t>(i) * my.row + c];
#pragma unroll
          for (int h = 0; h < heads_at_once; ++h) sums[h] += my.read_weights[(first + h) * plan.N + i] * m;
        }
        for (int h = 0; h < heads_at_once && first + h < plan.R; ++h) part[(first + h) * plan.D + c] = sums[h];
      }
  }
  // Number j of the reads, when all warps have told their parts.
  __device__ __forceinline__ T read_of(int64_t j) const {
    const int64_t count = static_cast<int64_t>(plan.R) * plan.D;
    T sum = 0;
    for (int w = 0; w < warps; ++w) sum += my.partial_reads[w * count + j];
    return sum;
  }

  __device__ __forceinline__ void end() {
    const int64_t N = plan.N, D = plan.D;
    const auto give = [&](const T* from, void* to, int64_t count) {
      T* rows = out<T>(to, count);
      if (rows != from) this->with_each(count, [&](int64_t i) { rows[i] = from[i]; });
    };
    T* memory = out<T>(a.after.memory, N * D);
    if (memory != my.memory) this->with_each(N * D, [&](int64_t i) { memory[i] = my.memory[i / D * my.row + i % D]; });
    give(my.usage, a.after.usage, N);
    give(my.written, a.after.write_weights, N);
    give(my.read_weights, a.after.read_weights, plan.R * N);
    if (!plan.links) return;
    give(my.precedence, a.after.precedence, N);
    give(my.links, a.after.links, N * N);
  }

  // A step, up to the warps' parts of the reads, which all must know before a barrier. sorted, weighed: what else is to be done
  // after the order of the slots and the write weights.
  template <class Sorted, class Weighed>
  __device__ __forceinline__ void take_step(const T* in, int64_t t, Sorted sorted, Weighed weighed) {
    use(in);
    this->with_slots([&](int slot, bool there) {
      const T* row = my.memory + static_cast<int64_t>(there ? slot : 0) * my.row;
      this->compare(in, plan.R, slot, there, my.dots, my.squares, [&](int c) { return row[c]; });
    });
    gpu::sync();
    sort_parts();
    if (plan.N > sorted_at_once) {
      gpu::sync();
      sort_all();
    }
    sorted();
    gpu::sync();
    if (warp == 0) weigh_write(in);
    weighed();
    gpu::sync();
    write(in);
    if (plan.links) link();
    gpu::sync();
    this->with_heads(plan.R, [&](int h) { weigh_read(in, h, t); });
    keep(t);
    gpu::sync();
    read();
  }
};

}  // namespace cuda
}  // namespace mann_fast

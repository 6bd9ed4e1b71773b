// dnc_scan forward of common sizes: a sample is in registers. dnc_scan.cu launches it.
#pragma once
#include "dnc_held.cuh"

namespace mann_fast {
namespace cuda {
namespace {

template <int C>
struct HeldForward {
  static constexpr int H = held_heads, columns = C * column_lanes;
  float *in, *total, *key_squares;  // [2, numbers]; the sum of the write weights; [H + 1]
  uint32_t* ranks;
  int* order;
  float *sorted, *usage, *precedence, *written, *content;     // [held_slots] each; of these the first are usages in order
  float *read_weights, *dots, *squares, *forward, *backward;  // [H or H + 1, held_row]; squares without masks [1]
  float *partial_reads, *partial_backward;                    // [warps, H, columns], [warps, H, held_slots]

  __device__ __host__ explicit HeldForward(Carver& carver)
      : in(carver.take<float>(2 * HeldInputs<C>::numbers)), total(carver.take<float>(1)),
        key_squares(carver.take<float>(H + 1)), ranks(carver.take<uint32_t>(held_slots)), order(carver.take<int>(held_slots)) {
    for (float** one : {&sorted, &usage, &precedence, &written, &content}) *one = carver.take<float>(held_slots);
    for (float** one : {&read_weights, &dots, &squares, &forward, &backward}) *one = carver.take<float>((H + 1) * held_row);
    partial_reads = carver.take<float>(held_warps * H * columns);
    partial_backward = carver.take<float>(held_warps * H * held_slots);
  }
};

template <int C>
struct HeldForwardScan : HeldThread<C> {
  using Base = HeldThread<C>;
  using In = HeldInputs<C>;
  using Base::plan, Base::lane, Base::warp, Base::column, Base::columns, Base::H, Base::first_slot, Base::own_slot,
      Base::own_share;
  const DncScan& a;
  const int64_t sample;
  Carver carver;
  const HeldForward<C> my;
  HeldStream<C, false> stream;
  int read_at;  // of the number of the reads that the thread gives out, -1 where it has none
  float m[2][C];
  float kept_[2];  // what is retained of the lane's two slots
  float links[warp_rows][lane_links];

  __device__ __forceinline__ HeldForwardScan(const DncScan& a, const DncPlan& plan)
      : Base(plan, a.eps), a(a), sample(gpu::block()), carver(gpu::shared_memory()), my(carver), stream(plan, a.input) {
    const int i = gpu::thread() - 32;
    read_at = i >= 0 && i < plan.R * plan.D ? i / plan.D * columns + i % plan.D : -1;
  }

  __device__ __forceinline__ float* out(void* data, int64_t each) const { return static_cast<float*>(data) + sample * each; }
  __device__ __forceinline__ const float* came(const void* data, int64_t each) const {
    return static_cast<const float*>(data) + sample * each;
  }
  __device__ __forceinline__ float* inputs(int64_t step) const { return my.in + step % 2 * In::numbers; }

  // The state that came in, or that of the start of a sequence.
  __device__ __forceinline__ void begin(bool anew) {
    const int64_t N = plan.N;
    this->take_memory(anew ? static_cast<const float*>(a.sequences.start) : came(a.before.memory, N * plan.D), m);
    this->with_slots([&](int i, bool there) {
      my.usage[i] = there && !anew ? came(a.before.usage, N)[i] : 0;
      my.written[i] = there && !anew ? came(a.before.write_weights, N)[i] : 0;
      my.precedence[i] = there && !anew && plan.links ? came(a.before.precedence, N)[i] : 0;
    });
    this->with_weights([&](int h, int i, bool there) {
      my.read_weights[h * held_row + i] = there && !anew ? came(a.before.read_weights, plan.R * N)[h * N + i] : 0;
    });
    this->take_links(!anew && plan.links ? came(a.before.links, N * N) : nullptr, links);
  }

  __device__ __forceinline__ void use(const float* in) {
    const float retained = this->retained(in[In::free_gates + own_share], my.read_weights[own_share * held_row + own_slot]);
#pragma unroll
    for (int s = 0; s < 2; ++s) kept_[s] = gpu::shuffle(retained, (lane / column_lanes * 2 + s) * 4);
    const float usage = next_usage(my.usage[own_slot], my.written[own_slot], retained);
    gpu::sync_warp();  // all four lanes have read it
    if (own_share != 0) return;
    my.usage[own_slot] = usage;
    my.ranks[own_slot] = own_slot < plan.N ? order_of(usage) : taken<float>;
  }

  // A slot's place is the number of those before it: four lanes count them.
  __device__ __forceinline__ void sort() {
    const uint32_t own = my.ranks[own_slot];
    const int own_part =
        warp / 2;  // of 16 slots: among those of the parts before it the equals count, which makes own + 1 of own
    int before = 0;
#pragma unroll
    for (int k = 0; k < held_slots / 16; ++k) {
      const Four<uint32_t> others = load_four(my.ranks + 16 * k + 4 * own_share);
      const uint32_t least = k < own_part ? own + 1 : own;  // no rank that counts is the largest
#pragma unroll
      for (int j = 0; j < 4; ++j) before += others.at[j] < least;
    }
    const Four<uint32_t> others = load_four(my.ranks + 16 * own_part + 4 * own_share);
#pragma unroll
    for (int j = 0; j < 4; ++j) before += others.at[j] == own && 16 * own_part + 4 * own_share + j < own_slot;
    before += gpu::shuffle_xor(before, 1);
    before += gpu::shuffle_xor(before, 2);
    if (own_share != 0 || own_slot >= plan.N) return;
    my.order[before] = own_slot;
    my.sorted[before] = my.usage[own_slot];
  }

  // By a warp: the content weights of the head that writes.
  __device__ __forceinline__ void soften_write(const float* in) {
    float weights[lane_links];
    this->soften(my.dots + H * held_row, my.squares + H * held_row, in[In::sharpness + H], this->key_square(in, H), weights);
#pragma unroll
    for (int k = 0; k < lane_links; ++k) my.content[lane + 32 * k] = weights[k];
  }

  // By a warp: the write weights. A lane takes four slots side by side in the order of allocation.
  __device__ __forceinline__ void weigh_write(const float* in) {
    const Four<float> usage = load_four(my.sorted + 4 * lane);
    const Four<int> order = load_four(my.order + 4 * lane);
    float own = 1;
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (4 * lane + k < plan.N) own *= usage.at[k];
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
      const float other = gpu::shuffle(own, lane >= by ? lane - by : lane);
      if (lane >= by) own *= other;
    }
    float before = gpu::shuffle(own, lane > 0 ? lane - 1 : 0), sum = 0;
    if (lane == 0) before = 1;
    const float allocated = in[In::gates], gate = in[In::gates + 1];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (4 * lane + k >= plan.N) continue;
      const float allocation = (1 - usage.at[k]) * before;
      const float weight = gate * (allocated * allocation + (1 - allocated) * my.content[order.at[k]]);
      my.written[order.at[k]] = weight;
      sum += weight;
      before *= usage.at[k];
    }
    sum = add_warp(sum);
    if (lane == 0) *my.total = sum;
  }

  // Writes, and compares what is there then.
  __device__ __forceinline__ void write(const float* in) {
    float erase[C], vector[C];
    this->load_columns(in + In::erase * columns, erase);
    this->load_columns(in + In::vector * columns, vector);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const float weight = my.written[first_slot + s], kept = plan.deallocate ? kept_[s] : 1;
#pragma unroll
      for (int c = 0; c < C; ++c) m[s][c] = m[s][c] * (1 - weight * erase[c]) * kept + weight * vector[c];
    }
    float dots[2 * H] = {}, squares[2 * H] = {};
#pragma unroll
    for (int h = 0; h < H; ++h) {
      if (plan.masks) {
        this->template add_compared<H>(in, h, m, dots + h, squares + h);
      } else {
        float key[C];
        this->load_columns(in + (In::keys + h) * columns, key);
#pragma unroll
        for (int s = 0; s < 2; ++s)
#pragma unroll
          for (int c = 0; c < C; ++c) dots[s * H + h] += m[s][c] * key[c];
      }
    }
    static_assert(2 * H == column_lanes, "a lane has one of the sums");
    const int place = column % H * held_row + first_slot + column / H;
    add_lanes<4, 1, 2 * H>(dots, lane);
    my.dots[place] = dots[0];
    if (plan.masks) {
      add_lanes<4, 1, 2 * H>(squares, lane);
      my.squares[place] = squares[0];
    } else {
#pragma unroll
      for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int c = 0; c < C; ++c) squares[s] += m[s][c] * m[s][c];
      add_lanes<4, 1, 2>(squares, lane);
      if (has_sums<4, 1, 2>(lane)) my.squares[first_slot + first_sum<4, 1, 2>(lane)] = squares[0];
    }
  }

  // The new links, and both directions, two heads at a time so that all is in registers.
  __device__ __forceinline__ void link() {
    const int first_row = warp * warp_rows;
    {
      const Four<float> written = load_four(my.written + 4 * lane), precedence = load_four(my.precedence + 4 * lane);
      this->next_links(my.written + first_row, written, precedence, links);
    }
#pragma unroll
    for (int first = 0; first < H; first += 2) {
      Four<float> read[2], back[2] = {};
      float ahead[warp_rows * 2] = {};
#pragma unroll
      for (int h = 0; h < 2; ++h) read[h] = load_four(my.read_weights + (first + h) * held_row + 4 * lane);
#pragma unroll
      for (int part = 0; part < warp_rows; part += 4)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const Four<float> own_read = load_four(my.read_weights + (first + h) * held_row + first_row + part);
#pragma unroll
          for (int r = 0; r < 4; ++r)
#pragma unroll
            for (int k = 0; k < lane_links; ++k) {
              ahead[(part + r) * 2 + h] += links[part + r][k] * read[h].at[k];
              back[h].at[k] += links[part + r][k] * own_read.at[r];
            }
        }
#pragma unroll
      for (int h = 0; h < 2; ++h)
        *reinterpret_cast<Four<float>*>(my.partial_backward + (warp * H + first + h) * held_slots + 4 * lane) = back[h];
      constexpr int sums = 2 * warp_rows;
      add_lanes<16, 1, sums>(ahead, lane);
      const int which = first_sum<16, 1, sums>(lane);
      if (has_sums<16, 1, sums>(lane)) my.forward[(first + which % 2) * held_row + first_row + which / 2] = ahead[0];
    }
  }

  // The read weights: a thread has one, and the four warps of a head each find what they need of all its slots.
  __device__ __forceinline__ void weigh_read(const float* in, int64_t step) {
    const int h = warp / 4, i = gpu::thread() % held_slots, at = h * held_row + i;
    const int64_t N = plan.N, row = (step * a.B + sample) * plan.R + h;
    const bool there = h < plan.R && i < plan.N;
    float back = 0, ahead = 0;
    if (plan.links) {
      ahead = my.forward[at];
#pragma unroll
      for (int w = 0; w < held_warps; ++w) back += my.partial_backward[(w * H + h) * held_slots + i];
    }
    float weights[lane_links];
    this->soften(my.dots + h * held_row, my.squares + (plan.masks ? h * held_row : 0), in[In::sharpness + h], my.key_squares[h],
                 weights);
    float weight = this->own_of(weights);
    if (plan.links) {
      if (plan.sharpened) {
        my.backward[at] = back;
        gpu::sync();
        if (a.directions && there) {
          float* kept = static_cast<float*>(a.directions) + row * 2 * N;
          kept[i] = back, kept[N + i] = ahead;
        }
        float direction[lane_links];
        this->load_every(my.backward + h * held_row, direction);
        this->sharpen(direction, in[In::exponents + 2 * h], weights);
        back = this->own_of(weights);
        this->load_every(my.forward + h * held_row, direction);
        this->sharpen(direction, in[In::exponents + 2 * h + 1], weights);
        ahead = this->own_of(weights);
      }
      const float* modes = in + In::modes + 3 * h;
      weight = modes[0] * back + modes[1] * weight + modes[2] * ahead;
    }
    my.read_weights[at] = there ? weight : 0;
    if (there && a.read_history) static_cast<float*>(a.read_history)[row * N + i] = weight;
  }

  __device__ __forceinline__ void keep(int64_t step) {
    const int64_t row = (step * a.B + sample) * plan.N;
    this->with_weights([&](int h, int i, bool) {
      if (i >= plan.N) return;
      if (h == 0 && plan.links) my.precedence[i] = (1 - *my.total) * my.precedence[i] + my.written[i];
      if (h == 1 && a.write_history) static_cast<float*>(a.write_history)[row + i] = my.written[i];
      if (h == 2 && a.orders) a.orders[row + i] = my.order[i];
    });
  }

  // The warp's part of the reads.
  __device__ __forceinline__ void read() {
    float sums[H * C];
#pragma unroll
    for (int h = 0; h < H; ++h) {
      const float* weights = my.read_weights + h * held_row + first_slot;
      const float first = weights[0], second = weights[1];
#pragma unroll
      for (int c = 0; c < C; ++c) sums[h * C + c] = first * m[0][c] + second * m[1][c];
    }
    store_warp_sums<H, C>(sums, lane, my.partial_reads + warp * H * columns + column, columns);
  }
  __device__ __forceinline__ void give_reads(int64_t step) {
    if (read_at < 0) return;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < held_warps; ++w) sum += my.partial_reads[w * H * columns + read_at];
    store_as(a.reads, a.input, (step * a.B + sample) * plan.R * plan.D + gpu::thread() - 32, sum);
  }

  __device__ __forceinline__ void end() {
    const int64_t N = plan.N;
    this->give_memory(m, out(a.after.memory, N * plan.D));
    this->with_slots([&](int i, bool there) {
      if (!there) return;
      out(a.after.usage, N)[i] = my.usage[i];
      out(a.after.write_weights, N)[i] = my.written[i];
      if (plan.links) out(a.after.precedence, N)[i] = my.precedence[i];
    });
    this->with_weights([&](int h, int i, bool there) {
      if (there) out(a.after.read_weights, plan.R * N)[h * N + i] = my.read_weights[h * held_row + i];
    });
    if (plan.links) this->give_links(links, out(a.after.links, N * N));
  }

  __device__ __forceinline__ void run() {
    const int64_t steps = a.sequences.length(a.T, sample);
    for (int i = gpu::thread(); i < 2 * In::numbers; i += held_threads) my.in[i] = 0;
    gpu::sync();
    if (steps > 0) {
      stream.ask(sample);
      stream.put(inputs(0));
    }
    begin(steps > 0 && a.sequences.begins(0, a.B, sample));
    gpu::sync();
    for (int64_t t = 0; t < steps; ++t) {
      const float* in = inputs(t);
      if (t + 1 < steps) stream.ask((t + 1) * a.B + sample);
      use(in);
      this->compare_write(in, m, my.dots, my.squares);
      gpu::sync();
      if (warp == 0) soften_write(in);
      sort();
      gpu::sync();
      if (warp == 0) weigh_write(in);
      else if (t > 0) give_reads(t - 1);
      if (warp > held_warps - 1 - H) {
        const int h = held_warps - 1 - warp;
        const float square = this->key_square(in, h);
        if (lane == 0) my.key_squares[h] = square;
      }
      if (t + 1 < steps) stream.put(inputs(t + 1));
      gpu::sync();
      write(in);
      if (plan.links) link();
      gpu::sync();
      weigh_read(in, t);
      keep(t);
      gpu::sync();
      read();
      if (t + 1 < steps && a.sequences.begins(t + 1, a.B, sample)) {
        gpu::sync();
        begin(true);
        gpu::sync();
      }
    }
    gpu::sync();
    if (steps > 0) give_reads(steps - 1);
    end();
    DncThread<float>(plan, a.eps).clear_steps(a, sample, steps, a.reads, a.input, static_cast<int64_t>(plan.R) * plan.D);
  }
};

}  // namespace
}  // namespace cuda
}  // namespace mann_fast

// A step of a Differentiable Neural Computer's memory back, of any size, as a block takes it: dnc_scan_backward.cu and
// dnc_cell_backward.cu go through the steps.
#pragma once
#include "dnc_scan.cuh"

namespace mann_fast {
namespace cuda {

template <class T>
struct DncBackward {
  int64_t N, heads;
  T *in, *of_in, *of_columns, *of_key_squares;  // [2, inputs], [inputs], [warps, sums, D], [R + 1]
  T* totals;                                    // of the write weights; of the gradient that their total has
  int* order;
  T *usage, *retained, *written, *written_before, *products;         // [N] each
  T *of_usage, *of_precedence, *of_retained, *of_written, *of_rows;  // [N] each
  T *read_before, *of_read, *of_backward, *of_forward, *by_rows;     // [heads, N] each
  T *content, *dots, *squares;                                       // [R + 1, N] each; then the gradients of the latter
  T *by_columns, *of_columns_written, *of_columns_before;            // [warps, heads, N], [warps, N] twice
  T *memory, *links;                                                 // their gradients [N, row], [N, N]
  int row;
  bool near_memory, near_links, near_rest;
  T* states;  // [segments + segment - 1, state_numbers], in device memory

  static __device__ __host__ int64_t state_numbers(const DncPlan& plan) {
    const int64_t N = plan.N;
    return N * plan.D + 2 * N + (plan.links ? N * N : 0);
  }
  // Sums over slots for each column: of the erase vector, the write vector, and one or two of each head.
  static __device__ __host__ int sums(const DncPlan& plan) { return 2 + (plan.R + 1) * (plan.masks ? 2 : 1); }

  template <bool NEAR>
  __device__ __host__ DncBackward(Room<NEAR>& room, const DncPlan& plan, T* out_memory = nullptr, T* out_links = nullptr)
      : N(plan.N), heads(plan.heads), in(room.template take<T>(2 * plan.inputs())), of_in(room.template take<T>(plan.inputs())),
        of_columns(room.template take<T>(static_cast<int64_t>(plan.warps) * sums(plan) * plan.D)),
        of_key_squares(room.template take<T>(plan.R + 1)), totals(room.template take<T>(2)), order(room.template take<int>(N)) {
    for (T** one : {&usage, &retained, &written, &written_before, &products, &of_usage, &of_precedence, &of_retained,
                    &of_written, &of_rows})
      *one = room.template take<T>(N);
    for (T** one : {&read_before, &of_read, &of_backward, &of_forward, &by_rows}) *one = room.template take<T>(heads * N);
    for (T** one : {&content, &dots, &squares}) *one = room.template take<T>((plan.R + 1) * N);
    by_columns = room.template take<T>(plan.links ? plan.warps * heads * N : 0);
    for (T** one : {&of_columns_written, &of_columns_before}) *one = room.template take<T>(plan.links ? plan.warps * N : 0);
    const size_t used = room.near.used;
    memory = room.template take_or<T>(N * plan.row, out_memory);
    near_memory = room.near.used > used;
    row = near_memory ? plan.row : plan.D;
    const size_t with_memory = room.near.used;
    links = plan.links ? room.template take_or<T>(N * N, out_links) : nullptr;
    near_links = room.near.used > with_memory;
    near_rest = room.far.used == 0;
    states = room.far.template take<T>((plan.segments + plan.segment - 1) * state_numbers(plan));
  }
};

template <class T, bool NEAR>
struct DncBackwardStep : DncThread<T> {
  using Base = DncThread<T>;
  using Base::plan, Base::lane, Base::warp, Base::warps, Base::of;
  const DncScanBackward& a;
  const int64_t sample;
  Room<NEAR> room;
  const DncBackward<T> my;
  int visits = 0;

  // What a step finds, made again.
  struct State {
    T *memory, *usage, *precedence, *links;
  };

  __device__ __forceinline__ DncBackwardStep(const DncScanBackward& a, const DncPlan& plan, DncPlaces places, int64_t sample)
      : Base(plan, a.eps), a(a), sample(sample), room(places, plan.limit),
        my(room, plan, out(a.grad_before.memory, a.N * a.D), out(a.grad_before.links, a.N * a.N)) {}

  __device__ __forceinline__ T* out(void* data, int64_t each) const { return static_cast<T*>(data) + sample * each; }
  __device__ __forceinline__ const T* came(const void* data, int64_t each) const {
    return static_cast<const T*>(data) + sample * each;
  }
  __device__ __forceinline__ bool begins(int64_t t) const { return a.sequences.begins(t, a.B, sample); }

  // The state before step `step` of a segment: the first of each is kept, the others are those of the segment gone through.
  __device__ __forceinline__ State state(int64_t segment, int64_t step) const {
    T* memory = my.states + (step == 0 ? segment : plan.segments + step - 1) * my.state_numbers(plan);
    const int64_t N = plan.N;
    T* usage = memory + N * plan.D;
    return {memory, usage, usage + N, usage + 2 * N};
  }
  // The weights that were kept of a step, and those of the step before it: null where these are 0.
  __device__ __forceinline__ const T* written(int64_t t) const {
    return static_cast<const T*>(a.write_history) + (t * a.B + sample) * plan.N;
  }
  __device__ __forceinline__ const T* read(int64_t t) const {
    return static_cast<const T*>(a.read_history) + (t * a.B + sample) * plan.R * plan.N;
  }
  __device__ __forceinline__ const T* written_before(int64_t t) const {
    return begins(t) ? nullptr : t > 0 ? written(t - 1) : came(a.before.write_weights, plan.N);
  }
  __device__ __forceinline__ const T* read_before(int64_t t) const {
    return begins(t) ? nullptr : t > 0 ? read(t - 1) : came(a.before.read_weights, static_cast<int64_t>(plan.R) * plan.N);
  }

  __device__ __forceinline__ DncInputs<T> inputs(int visit) const { return this->inputs_of(my.in, visit); }
  __device__ __forceinline__ const T* inputs() const { return inputs(visits); }
  template <class Stream>
  __device__ __forceinline__ void open(Stream& stream, int64_t t) {
    ++visits;
    stream.ask(t * a.B + sample);
    stream.put(inputs(visits));
    gpu::sync();
  }

  // ---- the replay ------------------------------------------------------------------------------------------------------

  // Puts in place the state that came in, or that of the start of a sequence.
  __device__ __forceinline__ void begin(const State& to, bool anew) const {
    const int64_t N = plan.N;
    const auto take = [&](T* rows, const T* from, int64_t count) {
      this->with_each(count, [&](int64_t i) { rows[i] = from ? from[i] : T(0); });
    };
    take(to.memory, anew ? static_cast<const T*>(a.sequences.start) : came(a.before.memory, N * plan.D), N * plan.D);
    take(to.usage, anew ? nullptr : came(a.before.usage, N), N);
    if (!plan.links) return;
    take(to.precedence, anew ? nullptr : came(a.before.precedence, N), N);
    take(to.links, anew ? nullptr : came(a.before.links, N * N), N * N);
  }

  // A number of the memory after a step's write.
  __device__ __forceinline__ T after(T m, T weight, T kept, T erase, T vector) const {
    return m * (T(1) - weight * erase) * kept + weight * vector;
  }

  __device__ __forceinline__ T total_written(const T* weights) const {
    T sum = 0;
    this->with_row([&](int i) { sum += weights[i]; });
    return add_warp(sum);
  }

  template <class Stream>
  __device__ __forceinline__ void replay(Stream& stream, int64_t t, const State& from, const State& to) {
    open(stream, t);
    const T *in = inputs(), *weights = written(t), *last = written_before(t), *reads = read_before(t);
    const T *erase = of(in, Told::erase), *vector = of(in, Told::write_vector);
    const int N = plan.N;
    this->with_slots([&](int slot, bool there) {
      if (!there) return;
      const T retained = reads ? this->retained(in, reads, slot) : T(1), kept = plan.deallocate ? retained : T(1);
      const int64_t row = static_cast<int64_t>(slot) * plan.D;
      this->with_columns(
          [&](int c) { to.memory[row + c] = after(from.memory[row + c], weights[slot], kept, erase[c], vector[c]); });
      if (lane % column_lanes == 0) to.usage[slot] = next_usage(from.usage[slot], last ? last[slot] : T(0), retained);
    });
    if (plan.links) {
      const T total = total_written(weights);
      this->with_each(N, [&](int64_t i) { to.precedence[i] = (T(1) - total) * from.precedence[i] + weights[i]; });
      for (int64_t i = warp; i < N; i += warps)
        for (int j = lane; j < N; j += 32)
          to.links[i * N + j] = next_link(from.links[i * N + j], weights[i], weights[j], from.precedence[j], i == j);
    }
    gpu::sync();
  }

  // All states of a segment of `count` steps, from its first on; where `next`, also the first of the next segment.
  template <class Stream>
  __device__ __forceinline__ void replay_segment(Stream& stream, int64_t segment, int64_t count, bool next) {
    for (int64_t step = 0; step < count; ++step) {
      const int64_t t = segment * plan.segment + step;
      if (begins(t)) begin(state(segment, step), true);
      if (step + 1 < count) replay(stream, t, state(segment, step), state(segment, step + 1));
      else if (next) replay(stream, t, state(segment, step), state(segment + 1, 0));
    }
  }

  // Where the replay of the step before `end` begins.
  __device__ __forceinline__ int64_t replay_before(int64_t end) const {
    return end > 0 ? (end - 1) / plan.segment * plan.segment : 0;
  }
  // All states of the segment of `count` steps that begins at `first`, then what its last step is told. The first segment that
  // is asked for is the sample's last: then the steps before it are gone through, too.
  template <class Stream>
  __device__ __forceinline__ void replay_all(Stream& stream, int64_t first, int64_t count) {
    const int64_t segment = first / plan.segment;
    if (visits == 0) {
      begin(state(0, 0), false);
      for (int64_t before = 0; before < segment; ++before) replay_segment(stream, before, plan.segment, true);
    }
    replay_segment(stream, segment, count, false);
    open(stream, first + count - 1);
  }

  // ---- a step back -----------------------------------------------------------------------------------------------------

  // The weights, the usage and what was retained: by one thread for each slot.
  __device__ __forceinline__ void open_rows(int64_t t, const State& before) {
    const T *in = inputs(), *last = written_before(t), *reads = read_before(t);
    const int N = plan.N;
    const int64_t* order = a.orders + (t * a.B + sample) * N;
    this->with_each(N, [&](int64_t i) {
      my.written[i] = written(t)[i];
      my.written_before[i] = last ? last[i] : T(0);
      my.order[i] = static_cast<int>(order[i]);
      for (int r = 0; r < plan.R; ++r) my.read_before[r * N + i] = reads ? reads[r * N + i] : T(0);
      my.retained[i] = this->retained(in, my.read_before, static_cast<int>(i));
      my.usage[i] = next_usage(before.usage[i], my.written_before[i], my.retained[i]);
    });
  }

  // f(column, the number before the write, the number after it), of a slot's own columns.
  template <class F>
  __device__ __forceinline__ void with_numbers(const State& before, int slot, F f) const {
    const T *in = inputs(), *erase = of(in, Told::erase), *vector = of(in, Told::write_vector);
    const T* row = before.memory + static_cast<int64_t>(slot) * plan.D;
    const T weight = my.written[slot], kept = plan.deallocate ? my.retained[slot] : T(1);
    this->with_columns([&](int c) { f(c, row[c], after(row[c], weight, kept, erase[c], vector[c])); });
  }

  // Dot products of slots with keys and with the gradients of the reads.
  __device__ __forceinline__ void compare_all(const State& before) {
    const T *in = inputs(), *grads = of(in, Told::grad_reads);
    const T *erase = of(in, Told::erase), *vector = of(in, Told::write_vector);
    this->with_slots([&](int slot, bool there) {
      const T* row = before.memory + static_cast<int64_t>(there ? slot : 0) * plan.D;
      const T weight = there ? my.written[slot] : T(0), kept = there && plan.deallocate ? my.retained[slot] : T(1);
      this->compare(in, plan.R, slot, there, my.dots, my.squares, [&](int c) { return row[c]; });
      for (int h = 0; h < plan.R; ++h) {
        const auto written = [&](int c) { return after(row[c], weight, kept, erase[c], vector[c]); };
        this->compare(in, h, slot, there, my.dots, my.squares, written);
        T sum = 0;
        if (there) this->with_columns([&](int c) { sum += grads[h * plan.D + c] * written(c); });
        sum = add_columns(sum);
        if (there && lane % column_lanes == 0) my.of_read[h * plan.N + slot] += sum;
      }
    });
  }

  // By a warp: from the gradient of the content weights of head h, `share` times `of_weights`, to those of its dot products and
  // squares. mean: of of_weights under the weights.
  __device__ __forceinline__ void through_content(int h, T share, const T* of_weights, T mean) {
    const T* in = inputs();
    const T beta = this->sharpness(in, h), square = this->key_square(in, h);
    T of_beta = 0, of_square = 0;
    this->with_row([&](int i) {
      const int at = h * plan.N + i;
      const T of_score = share * my.content[at] * (of_weights[i] - mean);
      const ScoreGradient<T> g = score_gradient(of_score, my.dots[at], beta, square, my.squares[at], this->eps);
      my.dots[at] = g.dot;
      my.squares[at] = g.slot_square;
      of_beta += g.beta;
      of_square += g.key_square;
    });
    of_beta = add_warp(of_beta);
    of_square = add_warp(of_square);
    if (lane != 0) return;
    *(h < plan.R ? of(my.of_in, Told::read_sharpness) + h : of(my.of_in, Told::write_sharpness)) = of_beta;
    my.of_key_squares[h] = of_square;
  }

  __device__ __forceinline__ T mean_of(const T* weights, const T* values) const {
    T sum = 0;
    this->with_row([&](int i) { sum += weights[i] * values[i]; });
    return add_warp(sum);
  }

  // By a warp: from the read weights of head h to a direction that was sharpened, `out`.
  __device__ __forceinline__ void through_sharpening(const T* direction, T exponent, T mode, const T* of_weights, T* out,
                                                     T* of_mode, T* of_exponent) {
    this->sharpen(direction, exponent, out);
    const T mean = mean_of(out, of_weights);
    T most = -INFINITY, sum = 0;
    this->with_row([&](int i) { most = larger(most, direction[i] + this->link_floor); });
    most = log(warp_maximum(most));
    this->with_row([&](int i) {
      const T raised = direction[i] + this->link_floor, of_log = mode * out[i] * (of_weights[i] - mean);
      sum += of_log * (log(raised) - most);
      out[i] = exponent * of_log / raised;
    });
    sum = add_warp(sum);
    if (lane != 0) return;
    *of_mode = mean;
    *of_exponent = sum;
  }

  // By a warp: back through the read weights of head h.
  __device__ __forceinline__ void through_read(int64_t t, int h) {
    const T* in = inputs();
    const int64_t N = plan.N;
    T *content = my.content + h * N, *of_weights = my.of_read + h * N;
    this->soften(in, h, my.dots, my.squares, content);
    const T mean = mean_of(content, of_weights);
    const T* modes = of(in, Told::read_modes) + 3 * h;
    through_content(h, plan.links ? modes[1] : T(1), of_weights, mean);
    if (!plan.links) return;
    T* of_modes = of(my.of_in, Told::read_modes) + 3 * h;
    if (lane == 0) of_modes[1] = mean;
    T *back = my.of_backward + h * N, *ahead = my.of_forward + h * N;
    if (plan.sharpened) {
      const T* kept = static_cast<const T*>(a.directions) + ((t * a.B + sample) * plan.R + h) * 2 * N;
      const T* exponents = of(in, Told::link_sharpening) + 2 * h;
      T* of_exponents = of(my.of_in, Told::link_sharpening) + 2 * h;
      through_sharpening(kept, exponents[0], modes[0], of_weights, back, of_modes, of_exponents);
      through_sharpening(kept + N, exponents[1], modes[2], of_weights, ahead, of_modes + 2, of_exponents + 1);
    } else {
      this->with_row([&](int i) { back[i] = ahead[i] = of_weights[i]; });
    }
  }

  // What the gradients of the directions, of_backward and of_forward, are still to be multiplied by.
  __device__ __forceinline__ T mode(int h, int of_direction) const {
    return plan.sharpened ? T(1) : of(inputs(), Told::read_modes)[3 * h + of_direction];
  }

  // Back through directions and links, in one traversal for four heads: a lane holds what it needs of some columns through all
  // rows of the warp.
  __device__ __forceinline__ void through_links(const State& before) {
    constexpr int chunks = 2, H = heads_at_once;
    const int N = plan.N;
    for (int first = 0; first < plan.heads; first += H) {
      const bool last = first + H == plan.heads;
      for (int left = 0; left < N; left += 32 * chunks) {
        T weight[chunks], precedence[chunks], read[chunks][H], back[chunks][H];
        T sums[chunks][H], of_weight[chunks] = {}, of_precedence[chunks] = {};
#pragma unroll
        for (int k = 0; k < chunks; ++k) {
          const int j = left + k * 32 + lane;
          weight[k] = j < N ? my.written[j] : T(0);
          precedence[k] = j < N ? before.precedence[j] : T(0);
#pragma unroll
          for (int h = 0; h < H; ++h) {
            read[k][h] = j < N ? my.read_before[(first + h) * N + j] : T(0);
            back[k][h] = j < N ? my.of_backward[(first + h) * N + j] : T(0);
            sums[k][h] = 0;
          }
        }
        T modes[2][H];
#pragma unroll
        for (int h = 0; h < H; ++h) {
          modes[0][h] = first + h < plan.R ? mode(first + h, 0) : T(0);
          modes[1][h] = first + h < plan.R ? mode(first + h, 2) : T(0);
        }
        for (int i = warp; i < N; i += warps) {
          const int64_t row = static_cast<int64_t>(i) * N;
          const T own = my.written[i];
          T ahead[H], by_row[H] = {}, of_own = 0, own_ahead[H], own_read[H];
#pragma unroll
          for (int h = 0; h < H; ++h) {
            ahead[h] = my.of_forward[(first + h) * N + i];
            own_ahead[h] = modes[1][h] * ahead[h];
            own_read[h] = modes[0][h] * my.read_before[(first + h) * N + i];
          }
#pragma unroll
          for (int k = 0; k < chunks; ++k) {
            const int j = left + k * 32 + lane;
            if (j >= N) continue;
            const T link = before.links[row + j], next = next_link(link, own, weight[k], precedence[k], i == j);
            T gradient = my.links[row + j];
#pragma unroll
            for (int h = 0; h < H; ++h) {
              gradient += own_ahead[h] * read[k][h] + own_read[h] * back[k][h];
              by_row[h] += next * back[k][h];
              sums[k][h] += next * ahead[h];
            }
            if (last && i != j) {
              of_own += gradient * (precedence[k] - link);
              of_weight[k] -= gradient * link;
              of_precedence[k] += gradient * own;
              gradient *= T(1) - own - weight[k];
            }
            my.links[row + j] = i == j ? T(0) : gradient;
          }
          add_lanes<16, 1, H>(by_row, lane);
          if (has_sums<16, 1, H>(lane)) {
            T& sum = my.by_rows[(first + first_sum<16, 1, H>(lane)) * N + i];
            sum = left == 0 ? by_row[0] : sum + by_row[0];
          }
          of_own = add_warp(of_own);
          if (last && lane == 0) my.of_rows[i] = left == 0 ? of_own : my.of_rows[i] + of_own;
        }
#pragma unroll
        for (int k = 0; k < chunks; ++k) {
          const int j = left + k * 32 + lane;
          if (j >= N) continue;
#pragma unroll
          for (int h = 0; h < H; ++h) my.by_columns[(static_cast<int64_t>(warp) * plan.heads + first + h) * N + j] = sums[k][h];
          if (!last) continue;
          my.of_columns_written[static_cast<int64_t>(warp) * N + j] = of_weight[k];
          my.of_columns_before[static_cast<int64_t>(warp) * N + j] = of_precedence[k];
        }
      }
    }
    if (warp != warps - 1) return;
    const T total = total_written(my.written), of_total = -mean_of(before.precedence, my.of_precedence);
    if (lane == 0) my.totals[0] = total, my.totals[1] = of_total;
  }

  // The gradient of the memory after the write, and what of it comes to the slot's write weight and to what was retained.
  __device__ __forceinline__ void through_memory(int64_t t, const State& before) {
    const T *in = inputs(), *grads = of(in, Told::grad_reads), *weights = read(t);
    const T *erase = of(in, Told::erase), *vector = of(in, Told::write_vector);
    const int N = plan.N, D = plan.D;
    this->with_slots([&](int slot, bool there) {
      T of_weight = 0, of_retained = 0;
      if (there)
        with_numbers(before, slot, [&](int c, T m, T now) {
          T& held = my.memory[static_cast<int64_t>(slot) * my.row + c];
          T gradient = held;
          for (int h = 0; h < plan.R; ++h) {
            const int at = h * N + slot;
            const T masked = this->masked(this->mask(in, h), c);
            gradient +=
                weights[at] * grads[h * D + c] + masked * (my.dots[at] * this->key(in, h)[c] + 2 * my.squares[at] * now);
          }
          held = gradient;
          const T kept = plan.deallocate ? my.retained[slot] : T(1);
          of_weight += gradient * (vector[c] - m * erase[c] * kept);
          of_retained += gradient * m * (T(1) - my.written[slot] * erase[c]);
        });
      of_weight = add_columns(of_weight);
      of_retained = add_columns(of_retained);
      if (there && lane % column_lanes == 0) {
        my.of_written[slot] = of_weight;
        my.of_retained[slot] = plan.deallocate ? of_retained : T(0);
      }
    });
  }

  // Adds up what comes to the write weights, to the precedence and to the read weights of the step before by the links.
  __device__ __forceinline__ void gather(bool ends) {
    const int64_t N = plan.N;
    const T* of_after = ends && a.grad_after.write_weights ? came(a.grad_after.write_weights, N) : nullptr;
    this->with_each(N, [&](int64_t i) {
      T sum = my.of_written[i] + (of_after ? of_after[i] : T(0));
      if (plan.links) {
        sum += my.of_rows[i] + my.of_precedence[i] + my.totals[1];
        T of_precedence = (T(1) - my.totals[0]) * my.of_precedence[i];
        for (int w = 0; w < warps; ++w) {
          sum += my.of_columns_written[w * N + i];
          of_precedence += my.of_columns_before[w * N + i];
        }
        my.of_precedence[i] = of_precedence;
      }
      my.of_written[i] = sum;
    });
    this->with_heads(plan.R, [&](int h) {
      const int64_t first = h * N;
      T of_back = 0, of_ahead = 0;
      this->with_row([&](int i) {
        T by_links = 0;
        if (plan.links) {
          T by_column = 0;
          for (int w = 0; w < warps; ++w) by_column += my.by_columns[(static_cast<int64_t>(w) * plan.heads + h) * N + i];
          const T by_row = my.by_rows[first + i], read = my.read_before[first + i];
          of_back += read * by_row;
          of_ahead += read * by_column;
          by_links = mode(h, 0) * by_row + mode(h, 2) * by_column;
        }
        my.of_read[first + i] = by_links;
      });
      of_back = add_warp(of_back);
      of_ahead = add_warp(of_ahead);
      if (!plan.links || plan.sharpened || lane != 0) return;
      T* of_modes = of(my.of_in, Told::read_modes) + 3 * h;
      of_modes[0] = of_back;
      of_modes[2] = of_ahead;
    });
  }

  // By a warp: back through the write weights, to gates and content.
  __device__ __forceinline__ void through_write() {
    const T* in = inputs();
    const T allocated = of(in, Told::allocation_gate)[0], gate = of(in, Told::write_gate)[0];
    const T* content = my.content + plan.R * plan.N;
    T of_allocated = 0, of_content = 0;
    this->with_row([&](int i) {
      of_allocated += my.of_written[i] * (T(1) - my.usage[i]) * my.products[i];
      of_content += my.of_written[i] * content[i];
    });
    of_allocated = add_warp(of_allocated);
    of_content = add_warp(of_content);
    if (lane == 0) {
      of(my.of_in, Told::write_gate)[0] = allocated * of_allocated + (T(1) - allocated) * of_content;
      of(my.of_in, Told::allocation_gate)[0] = gate * (of_allocated - of_content);
    }
    through_content(plan.R, gate * (T(1) - allocated), my.of_written, of_content);
  }

  // By a warp: back through the allocation, to the usages: q = (1 - u) g + u q', from the last slot to the first, a lane slots
  // side by side.
  __device__ __forceinline__ void through_allocation() {
    const T* in = inputs();
    const T share = of(in, Told::allocation_gate)[0] * of(in, Told::write_gate)[0];
    const int N = plan.N, each = (N + 31) / 32, first = lane * each, last = first + each < N ? first + each : N;
    T offset = 0, factor = 1;  // of what the lane's slots make of a q that comes from the right
    for (int n = last - 1; n >= first; --n) {
      const T u = my.usage[my.order[n]];
      offset = (T(1) - u) * share * my.of_written[my.order[n]] + u * offset;
      factor *= u;
    }
    for (int by = 1; by < 32; by *= 2) {
      const int from = lane + by < 32 ? lane + by : lane;
      const T right_offset = gpu::shuffle(offset, from), right_factor = gpu::shuffle(factor, from);
      if (lane + by < 32) {
        offset += factor * right_offset;
        factor *= right_factor;
      }
    }
    T q = gpu::shuffle(offset, lane < 31 ? lane + 1 : lane);
    if (lane == 31) q = 0;
    for (int n = last - 1; n >= first; --n) {
      const int slot = my.order[n];
      const T u = my.usage[slot], g = share * my.of_written[slot];
      my.of_usage[slot] += my.products[slot] * (q - g);
      q = (T(1) - u) * g + u * q;
    }
  }

  // By a warp: back through what was retained, to the free gate of head h and to its weights.
  __device__ __forceinline__ void through_retained(const State& before, int h) {
    const T* gates = of(inputs(), Told::free_gates);
    const int N = plan.N;
    T of_gate = 0;
    this->with_row([&](int i) {
      T of_factor = my.of_retained[i] + my.of_usage[i] * (before.usage[i] + (T(1) - before.usage[i]) * my.written_before[i]);
      for (int r = 0; r < plan.R; ++r) of_factor *= r == h ? T(1) : T(1) - gates[r] * my.read_before[r * N + i];
      my.of_read[h * N + i] -= of_factor * gates[h];
      of_gate -= of_factor * my.read_before[h * N + i];
    });
    of_gate = add_warp(of_gate);
    if (lane == 0) of(my.of_in, Told::free_gates)[h] = of_gate;
  }

  // The gradient of the memory before the write, and the warp's part of all sums over slots, a lane for a column.
  __device__ __forceinline__ void through_columns(const State& before) {
    const T *in = inputs(), *erase = of(in, Told::erase), *vector = of(in, Told::write_vector);
    const int N = plan.N, D = plan.D;
    T* sums = my.of_columns + static_cast<int64_t>(warp) * my.sums(plan) * D;
    for (int c = lane; c < D; c += 32) {
      for (int h = 0; h <= plan.R; ++h) {
        T sum = 0, of_squares = 0;
        for (int i = warp; i < N; i += warps) {
          T m = before.memory[static_cast<int64_t>(i) * D + c];
          if (h < plan.R) m = after(m, my.written[i], plan.deallocate ? my.retained[i] : T(1), erase[c], vector[c]);
          sum += my.dots[h * N + i] * m;
          of_squares += my.squares[h * N + i] * m * m;
        }
        sums[(2 + h) * D + c] = sum;
        if (plan.masks) sums[(3 + plan.R + h) * D + c] = of_squares;
      }
      const T masked = this->masked(this->mask(in, plan.R), c), by_key = masked * this->key(in, plan.R)[c];
      T of_erase = 0, of_vector = 0;
      for (int i = warp; i < N; i += warps) {
        T& held = my.memory[static_cast<int64_t>(i) * my.row + c];
        const T m = before.memory[static_cast<int64_t>(i) * D + c], weight = my.written[i];
        const T gradient = held, kept = plan.deallocate ? my.retained[i] : T(1);
        of_erase -= gradient * m * weight * kept;
        of_vector += gradient * weight;
        held = gradient * (T(1) - weight * erase[c]) * kept + my.dots[plan.R * N + i] * by_key +
               2 * my.squares[plan.R * N + i] * masked * m;
      }
      sums[c] = of_erase;
      sums[D + c] = of_vector;
    }
  }

  __device__ __forceinline__ T column_sum(int which, int c) const {
    T sum = 0;
    for (int w = 0; w < warps; ++w) sum += my.of_columns[(static_cast<int64_t>(w) * my.sums(plan) + which) * plan.D + c];
    return sum;
  }
  // The gradient of number i of the inputs, which is of such a kind, when all warps have told their sums.
  __device__ __forceinline__ T told_gradient(int kind, int i) const {
    const T* in = inputs();
    const int j = i - plan.first[kind], D = plan.D, c = j % D;
    const bool of_write = kind == Told::write_key || kind == Told::write_mask;
    const int h = of_write ? plan.R : j / D;
    switch (kind) {
      case Told::erase: return column_sum(0, c);
      case Told::write_vector: return column_sum(1, c);
      case Told::read_keys:
      case Told::write_key:
        return this->masked(this->mask(in, h), c) * (column_sum(2 + h, c) + 2 * my.of_key_squares[h] * in[i]);
      case Told::read_masks:
      case Told::write_mask: {
        const T key = this->key(in, h)[c];
        return 2 * in[i] * (key * (column_sum(2 + h, c) + key * my.of_key_squares[h]) + column_sum(3 + plan.R + h, c));
      }
      default: return my.of_in[i];
    }
  }

  // Before a step at which the sample began anew nothing has a gradient, but the start.
  __device__ __forceinline__ void through_start() {
    const int64_t N = plan.N, D = plan.D;
    T* of_start = out(a.grad_start, N * D);
    this->with_each(N * D, [&](int64_t i) {
      T& held = my.memory[i / D * my.row + i % D];
      of_start[i] += held;
      held = 0;
    });
    this->with_each(N, [&](int64_t i) { my.of_usage[i] = my.of_precedence[i] = 0; });
    this->with_each(plan.R * N, [&](int64_t i) { my.of_read[i] = 0; });
    if (plan.links) this->with_each(N * N, [&](int64_t i) { my.links[i] = 0; });
  }

  // Back through step t, up to the warps' parts of sums over slots, which all must know before a barrier. meanwhile: what else
  // is to be done while the heads are.
  template <class F>
  __device__ __forceinline__ void back(int64_t t, const State& before, F meanwhile) {
    open_rows(t, before);
    gpu::sync();
    compare_all(before);
    if (warp == 0) this->products(my.usage, my.order, my.products);
    gpu::sync();
    this->with_heads(plan.R, [&](int h) { through_read(t, h); });
    if (warp == warps - 1) this->soften(inputs(), plan.R, my.dots, my.squares, my.content + plan.R * plan.N);
    meanwhile();
    gpu::sync();
    through_memory(t, before);
    if (plan.links) through_links(before);
    gpu::sync();
    gather(t + 1 == a.sequences.length(a.T, sample));
    gpu::sync();
    if (warp == 0) through_write();
    if (warp == 1) through_allocation();
    gpu::sync();
    this->with_heads(plan.R, [&](int h) { through_retained(before, h); });
    through_columns(before);
  }
  // And after that barrier, from the usages of the step to those before it.
  __device__ __forceinline__ void through_usage() const {
    this->with_each(plan.N, [&](int64_t i) { my.of_usage[i] *= my.retained[i] * (T(1) - my.written_before[i]); });
  }

  __device__ __forceinline__ void begin() {
    const int64_t N = plan.N, D = plan.D;
    const auto take = [&](T* to, const void* from, int64_t count) {
      this->with_each(count, [&](int64_t i) { to[i] = from ? came(from, count)[i] : T(0); });
    };
    this->with_each(N * D, [&](int64_t i) {
      my.memory[i / D * my.row + i % D] = a.grad_after.memory ? came(a.grad_after.memory, N * D)[i] : T(0);
    });
    take(my.of_usage, a.grad_after.usage, N);
    take(my.of_precedence, a.grad_after.precedence, N);
    take(my.of_read, a.grad_after.read_weights, plan.R * N);
    if (plan.links) take(my.links, a.grad_after.links, N * N);
    for (T* padded : {my.read_before, my.of_backward, my.of_forward})
      this->with_each((plan.heads - plan.R) * N, [&](int64_t i) { padded[plan.R * N + i] = 0; });
    if (a.grad_start) this->with_each(N * D, [&](int64_t i) { out(a.grad_start, N * D)[i] = 0; });
  }

  __device__ __forceinline__ void end() {
    const int64_t N = plan.N, D = plan.D;
    const auto put = [&](const T* from, void* to, int64_t count) {
      T* rows = out(to, count);
      if (rows != from) this->with_each(count, [&](int64_t i) { rows[i] = from[i]; });
    };
    T* memory = out(a.grad_before.memory, N * D);
    if (memory != my.memory) this->with_each(N * D, [&](int64_t i) { memory[i] = my.memory[i / D * my.row + i % D]; });
    put(my.of_usage, a.grad_before.usage, N);
    put(my.of_read, a.grad_before.read_weights, plan.R * N);
    if (!plan.links) return;
    put(my.of_precedence, a.grad_before.precedence, N);
    put(my.links, a.grad_before.links, N * N);
  }
};

}  // namespace cuda
}  // namespace mann_fast

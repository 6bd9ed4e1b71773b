// dnc_scan backward: one launch for all steps.
//
// No memory and no links were kept. A first replay, which needs the weights alone, keeps the state of every segment of about
// sqrt(T) steps; from there each segment is replayed again, all its states side by side in device memory, and gone back through.
// A step of a replay has two barriers, a step back has seven; where a sample is in registers, one and five.
#include "dnc_scan.cuh"

namespace mann_fast {
namespace cuda {
namespace {

struct DncGiven {
  void* told[Told::grad_reads];  // the gradients of what was told
};

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
  bool near_memory, near_links, near;
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
    near = near_memory && (near_links || !plan.links) && room.far.used == 0;
    states = room.far.template take<T>((plan.segments + plan.segment - 1) * state_numbers(plan));
  }
};

template <class T, bool NEAR>
struct DncBackwardScan : DncThread<T> {
  using Base = DncThread<T>;
  using Base::plan, Base::lane, Base::warp, Base::warps, Base::of;
  const DncScanBackward& a;
  const DncGiven& given;
  const int64_t sample;
  Room<NEAR> room;
  const DncBackward<T> my;
  DncStream<T> stream;
  int visits = 0;

  // What a step finds, made again.
  struct State {
    T *memory, *usage, *precedence, *links;
  };

  __device__ __forceinline__ DncBackwardScan(const DncScanBackward& a, const DncGiven& given, const DncPlan& plan,
                                             unsigned char* scratch)
      : Base(plan, a.eps), a(a), given(given), sample(gpu::block()),
        room(gpu::shared_memory(), scratch + gpu::block() * plan.scratch, plan.limit),
        my(room, plan, out(a.grad_before.memory, a.N * a.D), out(a.grad_before.links, a.N * a.N)), stream(plan, a.input) {}

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

  __device__ __forceinline__ T* inputs() const { return my.in + visits % 2 * plan.inputs(); }
  __device__ __forceinline__ void open(int64_t t) {
    ++visits;
    stream.ask(t * a.B + sample);
    stream.put(inputs());
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

  __device__ __forceinline__ void replay(int64_t t, const State& from, const State& to) {
    open(t);
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
  __device__ __forceinline__ void replay_segment(int64_t segment, int64_t count, bool next) {
    for (int64_t step = 0; step < count; ++step) {
      const int64_t t = segment * plan.segment + step;
      if (begins(t)) begin(state(segment, step), true);
      if (step + 1 < count) replay(t, state(segment, step), state(segment, step + 1));
      else if (next) replay(t, state(segment, step), state(segment + 1, 0));
    }
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
  // The gradients of what the step was told.
  __device__ __forceinline__ void give(int64_t t) const {
    const T* in = inputs();
    const int D = plan.D;
    this->with_each(plan.first[Told::grad_reads], [&](int64_t number) {
      const int i = static_cast<int>(number);
      int kind = 0;
      while (i >= plan.first[kind + 1]) ++kind;
      const int j = i - plan.first[kind], c = j % D;
      const bool of_write = kind == Told::write_key || kind == Told::write_mask;
      const int h = of_write ? plan.R : j / D;
      T value = my.of_in[i];
      if (kind == Told::erase) value = column_sum(0, c);
      if (kind == Told::write_vector) value = column_sum(1, c);
      if (kind == Told::read_keys || kind == Told::write_key)
        value = this->masked(this->mask(in, h), c) * (column_sum(2 + h, c) + 2 * my.of_key_squares[h] * in[i]);
      if (kind == Told::read_masks || kind == Told::write_mask) {
        const T key = this->key(in, h)[c];
        value = 2 * in[i] * (key * (column_sum(2 + h, c) + key * my.of_key_squares[h]) + column_sum(3 + plan.R + h, c));
      }
      store_as(given.told[kind], a.input, (t * a.B + sample) * plan.count(kind) + j, value);
    });
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

  __device__ __forceinline__ void back(int64_t t, const State& before, bool more, bool ends) {
    if (more) stream.ask((t - 1) * a.B + sample);
    open_rows(t, before);
    gpu::sync();
    compare_all(before);
    if (warp == 0) this->products(my.usage, my.order, my.products);
    gpu::sync();
    this->with_heads(plan.R, [&](int h) { through_read(t, h); });
    if (warp == warps - 1) this->soften(inputs(), plan.R, my.dots, my.squares, my.content + plan.R * plan.N);
    if (more) stream.put(my.in + (visits + 1) % 2 * plan.inputs());
    gpu::sync();
    through_memory(t, before);
    if (plan.links) through_links(before);
    gpu::sync();
    gather(ends);
    gpu::sync();
    if (warp == 0) through_write();
    if (warp == 1) through_allocation();
    gpu::sync();
    this->with_heads(plan.R, [&](int h) { through_retained(before, h); });
    through_columns(before);
    gpu::sync();
    give(t);
    this->with_each(plan.N, [&](int64_t i) { my.of_usage[i] *= my.retained[i] * (T(1) - my.written_before[i]); });
    if (begins(t)) through_start();
    if (more) ++visits;
  }

  __device__ __forceinline__ void begin_gradients() {
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

  __device__ __forceinline__ void run() {
    const int64_t steps = a.sequences.length(a.T, sample), segments = (steps + plan.segment - 1) / plan.segment;
    begin_gradients();
    if (steps > 0) begin(state(0, 0), false);
    for (int64_t segment = 0; segment + 1 < segments; ++segment) replay_segment(segment, plan.segment, true);
    for (int64_t segment = segments - 1; segment >= 0; --segment) {
      const int64_t first = segment * plan.segment, count = first + plan.segment < steps ? plan.segment : steps - first;
      replay_segment(segment, count, false);
      open(first + count - 1);
      for (int64_t step = count - 1; step >= 0; --step)
        back(first + step, state(segment, step), step > 0, first + step == steps - 1);
    }
    end();
    for (int kind = 0; kind < Told::grad_reads; ++kind)
      if (given.told[kind]) this->clear_steps(a, sample, steps, given.told[kind], plan.count(kind));
  }
};

template <class T, bool NEAR>
__global__ void __launch_bounds__(most_threads, 1)
    dnc_backward_kernel(const __grid_constant__ DncScanBackward a, const __grid_constant__ DncGiven given,
                        const __grid_constant__ DncPlan plan, unsigned char* scratch) {
  DncBackwardScan<T, NEAR>(a, given, plan, scratch).run();
}

// ---- the same in registers -------------------------------------------------------------------------------------------------

// What a step has of the weights that were kept, and the order of allocation. Two take turns.
struct HeldRows {
  float *read, *read_before, *written, *written_before;  // [H, held_row] twice, [held_slots] twice
  int* order;                                            // [held_slots]
  static constexpr int numbers = 2 * held_heads * held_row + 3 * held_slots;
  __device__ __forceinline__ explicit HeldRows(float* first)
      : read(first), read_before(read + held_heads * held_row), written(read_before + held_heads * held_row),
        written_before(written + held_slots), order(reinterpret_cast<int*>(written_before + held_slots)) {}
};

template <int C>
struct HeldBackward {
  static constexpr int H = held_heads, columns = C * column_lanes;
  // Sums over slots for each column: of the erase vector, the write vector, and of each head's dot products and squares.
  enum { of_erase, of_vector, of_dots, of_squares = of_dots + H + 1, sums = of_squares + H + 1 };
  // What a step finds, in device memory: each thread has its own of the links and of the memory.
  static constexpr int64_t state_links = 0, state_memory = held_slots * held_slots,
                           state_usage = state_memory + held_slots * columns, state_precedence = state_usage + held_slots,
                           state_numbers = state_precedence + held_slots;
  // Gradients of single numbers, as they lie among the inputs from the sharpness on; and those of the keys' squares.
  static constexpr int singles = HeldInputs<C>::numbers - HeldInputs<C>::sharpness, key_squares = singles,
                       all_singles = singles + H + 1;

  float *in, *of_singles;               // [2, numbers], [2, all_singles]
  float *of_gates, *of_modes, *totals;  // [warps, H], [warps, 2]; of the write weights, of the gradient that their total has
  float* rows;                          // [2, HeldRows::numbers]
  float *usage, *products, *content, *precedence, *of_usage, *of_precedence, *of_retained, *of_written, *of_rows;
  float *of_read, *of_back, *of_forward, *by_rows;       // [H, held_row] each
  float *dots, *squares, *of_square;                     // [H + 1, held_row] each; the first then has its gradient
  float *by_columns, *columns_written, *columns_before;  // [warps, H, held_slots], [warps, held_row] twice
  float* of_columns;                                     // [warps, sums, columns], where the last three were
  float *memory, *links;                                 // their gradients, each thread its own

  __device__ __host__ explicit HeldBackward(Carver& carver)
      : in(carver.take<float>(2 * HeldInputs<C>::numbers)), of_singles(carver.take<float>(2 * all_singles)),
        of_gates(carver.take<float>(held_warps * H)), of_modes(carver.take<float>(held_warps * 2)),
        totals(carver.take<float>(2)), rows(carver.take<float>(2 * HeldRows::numbers)) {
    for (float** one :
         {&usage, &products, &content, &precedence, &of_usage, &of_precedence, &of_retained, &of_written, &of_rows})
      *one = carver.take<float>(held_slots);
    for (float** one : {&of_read, &of_back, &of_forward, &by_rows}) *one = carver.take<float>(H * held_row);
    for (float** one : {&dots, &squares, &of_square}) *one = carver.take<float>((H + 1) * held_row);
    by_columns = carver.take<float>(held_warps * H * held_slots);
    columns_written = carver.take<float>(held_warps * held_row), columns_before = carver.take<float>(held_warps * held_row);
    of_columns = by_columns;
    static_assert(sums * columns <= H * held_slots + 2 * held_row, "there is room for them");
    memory = carver.take<float>(held_slots * columns);
    links = carver.take<float>(held_slots * held_slots);
  }
};

template <int C>
struct HeldBackwardScan : HeldThread<C> {
  using Base = HeldThread<C>;
  using In = HeldInputs<C>;
  using My = HeldBackward<C>;
  using Base::plan, Base::lane, Base::warp, Base::column, Base::columns, Base::H, Base::first_slot, Base::own_slot,
      Base::own_share, Base::eps;
  const DncScanBackward& a;
  const DncGiven& given;
  const int64_t sample;
  Carver carver;
  const My my;
  HeldStream<C, true> stream;
  float* states;  // of the sample
  int visits = 0;
  // Asked for, of a step's weights: what a head read and had read, and one of what was written, written before, or the order.
  float asked_read = 0, asked_before = 0, asked_row = 0;

  // A state on its way through a replay: all warps have the precedence, four lanes a slot's usage.
  struct State {
    float links[warp_rows][lane_links], m[2][C], usage;
    Four<float> precedence;
  };

  __device__ __forceinline__ HeldBackwardScan(const DncScanBackward& a, const DncGiven& given, const DncPlan& plan,
                                              unsigned char* scratch)
      : Base(plan, a.eps), a(a), given(given), sample(gpu::block()), carver(gpu::shared_memory()), my(carver),
        stream(plan, a.input), states(reinterpret_cast<float*>(scratch + gpu::block() * plan.scratch)) {}

  __device__ __forceinline__ float* out(void* data, int64_t each) const { return static_cast<float*>(data) + sample * each; }
  __device__ __forceinline__ const float* came(const void* data, int64_t each) const {
    return static_cast<const float*>(data) + sample * each;
  }
  __device__ __forceinline__ bool begins(int64_t t) const { return a.sequences.begins(t, a.B, sample); }
  // Of step `step` of a segment: the first of each is kept, the others are those of the segment gone through.
  __device__ __forceinline__ float* state(int segment, int step) const {
    return states + (step == 0 ? segment : plan.segments + step - 1) * My::state_numbers;
  }

  // ---- what a step is told ---------------------------------------------------------------------------------------------

  __device__ __forceinline__ float* inputs(int visit) const { return my.in + visit % 2 * In::numbers; }
  __device__ __forceinline__ float* singles(int visit) const { return my.of_singles + visit % 2 * My::all_singles; }
  __device__ __forceinline__ HeldRows rows(int visit) const { return HeldRows(my.rows + visit % 2 * HeldRows::numbers); }

  __device__ __forceinline__ void ask(int64_t t) {
    stream.ask(t * a.B + sample);
    const bool anew = begins(t);
    const int64_t N = plan.N, at = t * a.B + sample, before = at - a.B;
    this->with_weights([&](int h, int i, bool there) {
      const float *reads = static_cast<const float*>(a.read_history), *writes = static_cast<const float*>(a.write_history);
      const int64_t place = h * N + i, R = plan.R;
      asked_read = there ? reads[at * R * N + place] : 0;
      asked_before = !there || anew ? 0 : t > 0 ? reads[before * R * N + place] : came(a.before.read_weights, R * N)[place];
      asked_row = 0;
      if (i >= N) return;
      if (h == 0) asked_row = writes[at * N + i];
      if (h == 1 && !anew) asked_row = t > 0 ? writes[before * N + i] : came(a.before.write_weights, N)[i];
      if (h == 2) asked_row = static_cast<float>(a.orders[at * N + i]);  // exact
    });
  }
  __device__ __forceinline__ void put(int visit) const {
    stream.put(inputs(visit));
    const HeldRows to = rows(visit);
    this->with_weights([&](int h, int i, bool) {
      to.read[h * held_row + i] = asked_read;
      to.read_before[h * held_row + i] = asked_before;
      if (h == 0) to.written[i] = asked_row;
      if (h == 1) to.written_before[i] = asked_row;
      if (h == 2) to.order[i] = static_cast<int>(asked_row);
    });
  }
  // Ends a step: the next one, which has been asked for, takes its place.
  __device__ __forceinline__ void turn() {
    ++visits;
    put(visits);
    gpu::sync();
  }

  // ---- the replay ------------------------------------------------------------------------------------------------------

  __device__ __forceinline__ void begin(bool anew, State& s) const {
    const int64_t N = plan.N;
    this->take_memory(anew ? static_cast<const float*>(a.sequences.start) : came(a.before.memory, N * plan.D), s.m);
    s.usage = own_slot < N && !anew ? came(a.before.usage, N)[own_slot] : 0;
    this->take_links(!anew && plan.links ? came(a.before.links, N * N) : nullptr, s.links);
#pragma unroll
    for (int k = 0; k < lane_links; ++k) {
      const int j = lane * lane_links + k;
      s.precedence.at[k] = j < N && !anew && plan.links ? came(a.before.precedence, N)[j] : 0;
    }
  }

  __device__ __forceinline__ void store(const State& s, float* to) const {
    if (plan.links)
#pragma unroll
      for (int r = 0; r < warp_rows; ++r) store_own(to + My::state_links, r, s.links[r]);
    store_memory(s.m, to + My::state_memory);
    if (own_share == 0) to[My::state_usage + own_slot] = s.usage;
    if (warp == 0) *reinterpret_cast<Four<float>*>(to + My::state_precedence + 4 * lane) = s.precedence;
  }
  __device__ __forceinline__ void load(const float* from, State& s) const {
#pragma unroll
    for (int r = 0; r < warp_rows; ++r) load_own(from + My::state_links, r, s.links[r]);
    load_memory(from + My::state_memory, s.m);
    s.usage = from[My::state_usage + own_slot];
    s.precedence = load_four(from + My::state_precedence + 4 * lane);
  }
  // A row of the thread's own links.
  __device__ __forceinline__ void load_own(const float* links, int r, float (&row)[lane_links]) const {
    const Four<float> four = load_four(links + (r * held_threads + gpu::thread()) * 4);
#pragma unroll
    for (int k = 0; k < lane_links; ++k) row[k] = plan.links ? four.at[k] : 0;
  }
  __device__ __forceinline__ void store_own(float* links, int r, const float (&row)[lane_links]) const {
    Four<float> four;
#pragma unroll
    for (int k = 0; k < lane_links; ++k) four.at[k] = row[k];
    *reinterpret_cast<Four<float>*>(links + (r * held_threads + gpu::thread()) * 4) = four;
  }
  // The thread's own numbers of a memory, or of its gradient.
  __device__ __forceinline__ void load_memory(const float* memory, float (&m)[2][C]) const {
#pragma unroll
    for (int i = 0; i < 2 * C; ++i) m[i / C][i % C] = memory[i * held_threads + gpu::thread()];
  }
  __device__ __forceinline__ void store_memory(const float (&m)[2][C], float* memory) const {
#pragma unroll
    for (int i = 0; i < 2 * C; ++i) memory[i * held_threads + gpu::thread()] = m[i / C][i % C];
  }

  // What the thread's slot retains; and where that is taken from the memory, what its two slots do.
  __device__ __forceinline__ float retain(const float* in, const HeldRows& rows, float (&kept)[2]) const {
    const float retained = this->retained(in[In::free_gates + own_share], rows.read_before[own_share * held_row + own_slot]);
#pragma unroll
    for (int s = 0; s < 2; ++s) kept[s] = plan.deallocate ? gpu::shuffle(retained, (lane / column_lanes * 2 + s) * 4) : 1;
    return retained;
  }
  // The memory after a step's write.
  __device__ __forceinline__ void after(const float* in, const HeldRows& rows, const float (&kept)[2], const float (&m)[2][C],
                                        float (&now)[2][C]) const {
    float erase[C], vector[C];
    this->load_columns(in + In::erase * columns, erase);
    this->load_columns(in + In::vector * columns, vector);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const float weight = rows.written[first_slot + s];
#pragma unroll
      for (int c = 0; c < C; ++c) now[s][c] = m[s][c] * (1 - weight * erase[c]) * kept[s] + weight * vector[c];
    }
  }

  __device__ __forceinline__ void replay(State& s) const {
    const float* in = inputs(visits);
    const HeldRows rows = this->rows(visits);
    float kept[2];
    const float retained = retain(in, rows, kept);
    s.usage = next_usage(s.usage, rows.written_before[own_slot], retained);
    after(in, rows, kept, s.m, s.m);
    if (!plan.links) return;
    const Four<float> written = load_four(rows.written + 4 * lane);
    this->next_links(rows.written + warp * warp_rows, written, s.precedence, s.links);
    const float total = add_warp(written.at[0] + written.at[1] + (written.at[2] + written.at[3]));
#pragma unroll
    for (int k = 0; k < lane_links; ++k) s.precedence.at[k] = (1 - total) * s.precedence.at[k] + written.at[k];
  }

  // ---- a step back -----------------------------------------------------------------------------------------------------

  // Adds up, over the lanes that share two slots, the slots' products with a row of each head: f(place in [H, held_row], sum),
  // by the lane that comes out with it.
  template <class F>
  __device__ __forceinline__ void give_products(float (&sums)[2 * H], F f) const {
    static_assert(2 * H == column_lanes, "a lane has one of the sums");
    add_lanes<4, 1, 2 * H>(sums, lane);
    f(column % H * held_row + first_slot + column / H, sums[0]);
  }

  // Dot products of slots with keys and with the gradients of the reads.
  __device__ __forceinline__ void compare_all(const float* in, const float (&m)[2][C], const float (&now)[2][C]) const {
    float key[C], mask[C];
    {
      float sums[4] = {};
      this->load_columns(in + (In::keys + H) * columns, key);
      this->load_masks(in, H, mask);
#pragma unroll
      for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int c = 0; c < C; ++c) {
          const float share = m[s][c] * mask[c];
          sums[s] += share * key[c];
          sums[2 + s] += share * m[s][c];
        }
      add_lanes<4, 1, 4>(sums, lane);
      const int which = first_sum<4, 1, 4>(lane);
      if (has_sums<4, 1, 4>(lane)) (which < 2 ? my.dots : my.squares)[H * held_row + first_slot + which % 2] = sums[0];
    }
    float dots[2 * H] = {}, of_read[2 * H] = {};
    if (plan.masks) {
      float squares[2 * H] = {};
#pragma unroll
      for (int h = 0; h < H; ++h) {
        this->load_columns(in + (In::keys + h) * columns, key);
        this->load_masks(in, h, mask);
#pragma unroll
        for (int s = 0; s < 2; ++s)
#pragma unroll
          for (int c = 0; c < C; ++c) {
            const float share = now[s][c] * mask[c];
            dots[s * H + h] += share * key[c];
            squares[s * H + h] += share * now[s][c];
          }
      }
      give_products(squares, [&](int at, float sum) { my.squares[at] = sum; });
    } else {
      float squares[2] = {};
#pragma unroll
      for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int c = 0; c < C; ++c) squares[s] += now[s][c] * now[s][c];
      add_lanes<4, 1, 2>(squares, lane);
      if (has_sums<4, 1, 2>(lane)) my.squares[first_slot + first_sum<4, 1, 2>(lane)] = squares[0];
#pragma unroll
      for (int h = 0; h < H; ++h) {
        this->load_columns(in + (In::keys + h) * columns, key);
#pragma unroll
        for (int s = 0; s < 2; ++s)
#pragma unroll
          for (int c = 0; c < C; ++c) dots[s * H + h] += now[s][c] * key[c];
      }
    }
    give_products(dots, [&](int at, float sum) { my.dots[at] = sum; });
#pragma unroll
    for (int h = 0; h < H; ++h) {
      this->load_columns(in + (In::grads + h) * columns, key);
#pragma unroll
      for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int c = 0; c < C; ++c) of_read[s * H + h] += now[s][c] * key[c];
    }
    give_products(of_read, [&](int at, float sum) { my.of_read[at] += sum; });
  }

  // By a warp, of 4 slots a lane.
  __device__ __forceinline__ float mean_of(const float (&weights)[lane_links], const float (&values)[lane_links]) const {
    float sum = 0;
#pragma unroll
    for (int k = 0; k < lane_links; ++k) sum += weights[k] * values[k];
    return add_warp(sum);
  }
  // As in the other kernel.
  __device__ __forceinline__ void through_content(const float* in, int h, float key_square, float share,
                                                  const float (&content)[lane_links], const float (&of_weights)[lane_links],
                                                  float mean) const {
    const float beta = in[In::sharpness + h];
    const float* squares = my.squares + (plan.masks || h == H ? h * held_row : 0);
    float sums[2] = {};
#pragma unroll
    for (int k = 0; k < lane_links; ++k) {
      const int i = lane + 32 * k, at = h * held_row + i;
      const float of_score = share * content[k] * (of_weights[k] - mean);
      const ScoreGradient<float> g = score_gradient(of_score, my.dots[at], beta, key_square, squares[i], eps);
      my.dots[at] = g.dot;
      my.of_square[at] = g.slot_square;
      sums[0] += g.beta;
      sums[1] += g.key_square;
    }
    add_lanes<16, 1, 2>(sums, lane);
    if (has_sums<16, 1, 2>(lane)) singles(visits)[first_sum<16, 1, 2>(lane) == 0 ? h : My::key_squares + h] = sums[0];
  }

  // By a warp: from the read weights of a head to a direction that was sharpened.
  __device__ __forceinline__ void through_sharpening(const float* direction, float exponent, float mode,
                                                     const float (&of_weights)[lane_links], float* out, float* of_mode,
                                                     float* of_exponent) const {
    constexpr float floor = DncThread<float>::link_floor;
    float weights[lane_links], from[lane_links], sum = 0;
#pragma unroll
    for (int k = 0; k < lane_links; ++k) from[k] = lane + 32 * k < plan.N ? direction[lane + 32 * k] : 0;
    const float most = this->sharpen(from, exponent, weights), mean = mean_of(weights, of_weights);
#pragma unroll
    for (int k = 0; k < lane_links; ++k) {
      const float raised = from[k] + floor, of_log = mode * weights[k] * (of_weights[k] - mean);
      if (lane + 32 * k < plan.N) sum += of_log * (log(raised) - most);
      out[lane + 32 * k] = exponent * of_log / raised;
    }
    sum = add_warp(sum);
    if (lane != 0) return;
    *of_mode = mean;
    *of_exponent = sum;
  }

  // By a warp: back through the read weights of head h.
  __device__ __forceinline__ void through_read(const float* in, int64_t t, int h) const {
    float content[lane_links], of_weights[lane_links];
    const float square = this->key_square(in, h), *modes = in + In::modes + 3 * h;
    this->soften(my.dots + h * held_row, my.squares + (plan.masks ? h * held_row : 0), in[In::sharpness + h], square, content);
    this->load_every(my.of_read + h * held_row, of_weights);
    const float mean = mean_of(content, of_weights);
    through_content(in, h, square, plan.links ? modes[1] : 1, content, of_weights, mean);
    if (!plan.links) return;
    float* of_modes = singles(visits) + In::modes - In::sharpness + 3 * h;
    if (lane == 0) of_modes[1] = mean;
    if (!plan.sharpened || h >= plan.R) return;
    const int64_t N = plan.N;
    const float* kept = static_cast<const float*>(a.directions) + ((t * a.B + sample) * plan.R + h) * 2 * N;
    const float* exponents = in + In::exponents + 2 * h;
    float* of_exponents = singles(visits) + In::exponents - In::sharpness + 2 * h;
    through_sharpening(kept, exponents[0], modes[0], of_weights, my.of_back + h * held_row, of_modes, of_exponents);
    through_sharpening(kept + N, exponents[1], modes[2], of_weights, my.of_forward + h * held_row, of_modes + 2,
                       of_exponents + 1);
  }

  __device__ __forceinline__ void soften_write(const float* in) const {
    float content[lane_links];
    this->soften(my.dots + H * held_row, my.squares + H * held_row, in[In::sharpness + H], this->key_square(in, H), content);
#pragma unroll
    for (int k = 0; k < lane_links; ++k) my.content[lane + 32 * k] = content[k];
  }

  // By a warp: for each slot the product of the usages before it in the order of allocation.
  __device__ __forceinline__ void products(const HeldRows& rows) const {
    const Four<int> order = load_four(rows.order + 4 * lane);
    float usage[4], own = 1;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      usage[k] = 4 * lane + k < plan.N ? my.usage[order.at[k]] : 1;
      own *= usage[k];
    }
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
      const float other = gpu::shuffle(own, lane >= by ? lane - by : lane);
      if (lane >= by) own *= other;
    }
    float before = gpu::shuffle(own, lane > 0 ? lane - 1 : 0);
    if (lane == 0) before = 1;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (4 * lane + k < plan.N) my.products[order.at[k]] = before;
      before *= usage[k];
    }
  }

  // By a warp: the sum of the write weights, and of the gradient that it has.
  __device__ __forceinline__ void total(const HeldRows& rows) const {
    float sums[2] = {};
#pragma unroll
    for (int k = 0; k < lane_links; ++k) {
      const int i = lane + 32 * k;
      sums[0] += rows.written[i];
      sums[1] -= my.precedence[i] * my.of_precedence[i];
    }
    add_lanes<16, 1, 2>(sums, lane);
    if (has_sums<16, 1, 2>(lane)) my.totals[first_sum<16, 1, 2>(lane)] = sums[0];
  }

  // The gradient of the memory after the write, and what of it comes to the slot's write weight and to what was retained.
  __device__ __forceinline__ void through_memory(const float* in, const HeldRows& rows, const float (&kept)[2],
                                                 const float (&m)[2][C], const float (&now)[2][C]) {
    float grad[2][C];
    load_memory(my.memory, grad);
    if (plan.masks) {
#pragma unroll
      for (int h = 0; h < H; ++h) {
        float key[C], mask[C];
        this->load_columns(in + (In::keys + h) * columns, key);
        this->load_masks(in, h, mask);
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          const int at = h * held_row + first_slot + s;
          const float of_dot = my.dots[at], of_square = 2 * my.of_square[at];
#pragma unroll
          for (int c = 0; c < C; ++c) grad[s][c] += mask[c] * (of_dot * key[c] + of_square * now[s][c]);
        }
      }
    } else {
      float by_square[2] = {};
#pragma unroll
      for (int h = 0; h < H; ++h) {
        float key[C];
        this->load_columns(in + (In::keys + h) * columns, key);
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          const int at = h * held_row + first_slot + s;
          const float of_dot = my.dots[at];
          by_square[s] += 2 * my.of_square[at];
#pragma unroll
          for (int c = 0; c < C; ++c) grad[s][c] += of_dot * key[c];
        }
      }
#pragma unroll
      for (int i = 0; i < 2 * C; ++i) grad[i / C][i % C] += by_square[i / C] * now[i / C][i % C];
    }
#pragma unroll
    for (int h = 0; h < H; ++h) {
      float of_reads[C];
      this->load_columns(in + (In::grads + h) * columns, of_reads);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const float weight = rows.read[h * held_row + first_slot + s];
#pragma unroll
        for (int c = 0; c < C; ++c) grad[s][c] += weight * of_reads[c];
      }
    }
    float erase[C], vector[C], sums[4] = {};
    this->load_columns(in + In::erase * columns, erase);
    this->load_columns(in + In::vector * columns, vector);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const float weight = rows.written[first_slot + s];
#pragma unroll
      for (int c = 0; c < C; ++c) {
        sums[s] += grad[s][c] * (vector[c] - m[s][c] * erase[c] * kept[s]);
        sums[2 + s] += grad[s][c] * m[s][c] * (1 - weight * erase[c]);
      }
    }
    store_memory(grad, my.memory);
    add_lanes<4, 1, 4>(sums, lane);
    const int which = first_sum<4, 1, 4>(lane);
    if (!has_sums<4, 1, 4>(lane)) return;
    if (which < 2) my.of_written[first_slot + which] = sums[0];
    else my.of_retained[first_slot + which - 2] = plan.deallocate ? sums[0] : 0;
  }

  // What the gradients of the directions are still to be multiplied by.
  __device__ __forceinline__ float mode(const float* in, int h, int of_direction) const {
    return plan.sharpened ? 1 : in[In::modes + 3 * h + of_direction];
  }

  struct alignas(8) Two {
    float at[2];
  };
  __device__ __forceinline__ static Two load_two(const float* from) { return *reinterpret_cast<const Two*>(from); }

  // Back through directions and links, two rows of the warp at a time.

  __device__ __forceinline__ void through_links(const float* in, const HeldRows& rows, const float* before) const {
    constexpr int at_once = 2;
    const int first_row = warp * warp_rows;
    const float *of_back = plan.sharpened ? my.of_back : my.of_read, *of_forward = plan.sharpened ? my.of_forward : my.of_read;
    const Four<float> written = load_four(rows.written + 4 * lane), precedence = load_four(my.precedence + 4 * lane);
    Four<float> of_weight = {}, of_precedence = {}, read[H], back[H], sums[H] = {};
#pragma unroll
    for (int h = 0; h < H; ++h) {
      read[h] = load_four(rows.read_before + h * held_row + 4 * lane);
      back[h] = load_four(of_back + h * held_row + 4 * lane);
    }
#pragma unroll 1
    for (int half = 0; half < warp_rows;
         half += lane_links)  // not unrolled: loads of all rows at once would take too many registers
#pragma unroll
      for (int part_ = 0; part_ < lane_links; part_ += at_once) {
        const int part = half + part_;
        float links[at_once][lane_links], gradients[at_once][lane_links], by_rows[at_once * H] = {}, of_rows[at_once] = {};
#pragma unroll
        for (int r = 0; r < at_once; ++r) {
          load_own(before + My::state_links, part + r, links[r]);
          load_own(my.links, part + r, gradients[r]);
        }
        const Two owns = load_two(rows.written + first_row + part);
        Two aheads[H], reads[H];
#pragma unroll
        for (int h = 0; h < H; ++h) {
          aheads[h] = load_two(of_forward + h * held_row + first_row + part);
          reads[h] = load_two(rows.read_before + h * held_row + first_row + part);
        }
#pragma unroll
        for (int r = 0; r < at_once; ++r) {
          const float own = owns.at[r];
          float ahead[H], own_ahead[H], own_read[H];
#pragma unroll
          for (int h = 0; h < H; ++h) {
            ahead[h] = aheads[h].at[r];
            own_ahead[h] = mode(in, h, 2) * ahead[h];
            own_read[h] = mode(in, h, 0) * reads[h].at[r];
          }

#pragma unroll
          for (int k = 0; k < lane_links; ++k) {
            const float link = links[r][k], remains = 1 - own - written.at[k];
            const bool diagonal = part_ + r == k && lane == (first_row + half) / lane_links;
            const float next = diagonal ? 0 : remains * link + own * precedence.at[k];
            float gradient = gradients[r][k];
#pragma unroll
            for (int h = 0; h < H; ++h) {
              gradient += own_ahead[h] * read[h].at[k];
              gradient += own_read[h] * back[h].at[k];
              by_rows[r * H + h] += next * back[h].at[k];
              sums[h].at[k] += next * ahead[h];
            }
            if (diagonal) gradient = 0;
            of_rows[r] += gradient * (precedence.at[k] - link);
            of_weight.at[k] -= gradient * link;
            of_precedence.at[k] += gradient * own;
            gradients[r][k] = diagonal ? 0 : gradient * remains;
          }
          store_own(my.links, part + r, gradients[r]);
        }
        add_lanes<16, 1, at_once * H>(by_rows, lane);
        const int which = first_sum<16, 1, at_once * H>(lane);
        if (has_sums<16, 1, at_once * H>(lane)) my.by_rows[which % H * held_row + first_row + part + which / H] = by_rows[0];
        add_lanes<16, 1, at_once>(of_rows, lane);
        if (has_sums<16, 1, at_once>(lane)) my.of_rows[first_row + part + first_sum<16, 1, at_once>(lane)] = of_rows[0];
      }
#pragma unroll
    for (int h = 0; h < H; ++h)
      *reinterpret_cast<Four<float>*>(my.by_columns + (warp * H + h) * held_slots + 4 * lane) = sums[h];
    *reinterpret_cast<Four<float>*>(my.columns_written + warp * held_row + 4 * lane) = of_weight;
    *reinterpret_cast<Four<float>*>(my.columns_before + warp * held_row + 4 * lane) = of_precedence;
  }

  // Adds up what comes to the write weights, to the precedence and to the read weights of the step before by the links.
  __device__ __forceinline__ void gather(const float* in, const HeldRows& rows, bool ends) const {
    const int h = warp / 4, i = gpu::thread() % held_slots, at = h * held_row + i;
    float by_links = 0, sum = 0, of_precedence = 0;
    if (plan.links) {
      float by_column = 0;
#pragma unroll
      for (int w = 0; w < held_warps; ++w) by_column += my.by_columns[(w * H + h) * held_slots + i];
      const float by_row = my.by_rows[at], read = rows.read_before[at];
      by_links = mode(in, h, 0) * by_row + mode(in, h, 2) * by_column;
      float sums[2] = {read * by_row, read * by_column};
      add_lanes<16, 1, 2>(sums, lane);
      if (has_sums<16, 1, 2>(lane)) my.of_modes[warp * 2 + first_sum<16, 1, 2>(lane)] = sums[0];
#pragma unroll
      for (int w = 0; w < held_warps; w += 4) {
        sum += my.columns_written[(w + own_share) * held_row + own_slot];
        of_precedence += my.columns_before[(w + own_share) * held_row + own_slot];
      }
      sum = add_between<2, 1>(sum);
      of_precedence = add_between<2, 1>(of_precedence);
    }
    my.of_read[at] = by_links;
    if (own_share != 0) return;
    sum += my.of_written[own_slot];
    if (ends && a.grad_after.write_weights && own_slot < plan.N) sum += came(a.grad_after.write_weights, plan.N)[own_slot];
    if (plan.links) {
      sum += my.of_rows[own_slot] + my.of_precedence[own_slot] + my.totals[1];
      my.of_precedence[own_slot] = (1 - my.totals[0]) * my.of_precedence[own_slot] + of_precedence;
    }
    my.of_written[own_slot] = sum;
  }

  // By a warp: back through the write weights, to gates and content.
  __device__ __forceinline__ void through_write(const float* in) const {
    const float allocated = in[In::gates], gate = in[In::gates + 1];
    float content[lane_links], of_weights[lane_links], of_allocated = 0;
    this->load_every(my.content, content);
    this->load_every(my.of_written, of_weights);
#pragma unroll
    for (int k = 0; k < lane_links; ++k) {
      const int i = lane + 32 * k;
      if (i < plan.N) of_allocated += of_weights[k] * (1 - my.usage[i]) * my.products[i];
    }
    of_allocated = add_warp(of_allocated);
    const float of_content = mean_of(content, of_weights);
    if (lane == 0) {
      float* of_gates = singles(visits) + In::gates - In::sharpness;
      of_gates[0] = gate * (of_allocated - of_content);
      of_gates[1] = allocated * of_allocated + (1 - allocated) * of_content;
    }
    through_content(in, H, this->key_square(in, H), gate * (1 - allocated), content, of_weights, of_content);
  }

  // By a warp: back through the allocation, to the usages, as in the other kernel.
  __device__ __forceinline__ void through_allocation(const float* in, const HeldRows& rows) const {
    const float share = in[In::gates] * in[In::gates + 1];
    const Four<int> order = load_four(rows.order + 4 * lane);
    float usage[4], of_allocation[4], offset = 0, factor = 1;
#pragma unroll
    for (int k = 3; k >= 0; --k) {
      const bool there = 4 * lane + k < plan.N;
      usage[k] = there ? my.usage[order.at[k]] : 1;
      of_allocation[k] = there ? share * my.of_written[order.at[k]] : 0;
      if (!there) continue;
      offset = (1 - usage[k]) * of_allocation[k] + usage[k] * offset;
      factor *= usage[k];
    }
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
      const int from = lane + by < 32 ? lane + by : lane;
      const float right_offset = gpu::shuffle(offset, from), right_factor = gpu::shuffle(factor, from);
      if (lane + by < 32) {
        offset += factor * right_offset;
        factor *= right_factor;
      }
    }
    float q = gpu::shuffle(offset, lane < 31 ? lane + 1 : lane);
    if (lane == 31) q = 0;
#pragma unroll
    for (int k = 3; k >= 0; --k) {
      if (4 * lane + k >= plan.N) continue;
      const int slot = order.at[k];
      my.of_usage[slot] += my.products[slot] * (q - of_allocation[k]);
      q = (1 - usage[k]) * of_allocation[k] + usage[k] * q;
    }
  }

  // The warp's part of sums over slots, but for the head that writes.
  __device__ __forceinline__ void add_columns_read(const HeldRows& rows, const float (&kept)[2], const float (&m)[2][C],
                                                   const float (&now)[2][C]) const {
    float* to = my.of_columns + warp * My::sums * columns + column;
    float sums[H * C];
#pragma unroll
    for (int h = 0; h < H; ++h) {
      const float *of = my.dots + h * held_row + first_slot, first = of[0], second = of[1];
#pragma unroll
      for (int c = 0; c < C; ++c) sums[h * C + c] = first * now[0][c] + second * now[1][c];
    }
    store_warp_sums<H, C>(sums, lane, to + My::of_dots * columns, columns);
    if (plan.masks) {
#pragma unroll
      for (int h = 0; h < H; ++h) {
        const float *of = my.of_square + h * held_row + first_slot, first = of[0], second = of[1];
#pragma unroll
        for (int c = 0; c < C; ++c) sums[h * C + c] = first * now[0][c] * now[0][c] + second * now[1][c] * now[1][c];
      }
      store_warp_sums<H, C>(sums, lane, to + My::of_squares * columns, columns);
    }
    const float first = rows.written[first_slot], second = rows.written[first_slot + 1];
    float pair[2 * C], grad[2][C];
    load_memory(my.memory, grad);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      pair[c] = -(grad[0][c] * m[0][c] * first * kept[0] + grad[1][c] * m[1][c] * second * kept[1]);
      pair[C + c] = grad[0][c] * first + grad[1][c] * second;
    }
    store_warp_sums<2, C>(pair, lane, to + My::of_erase * columns, columns);
  }

  // Those of the head that writes, and the gradient of the memory before the write, in grad.
  __device__ __forceinline__ void add_columns_write(const float* in, const HeldRows& rows, const float (&kept)[2],
                                                    const float (&m)[2][C], float (&grad)[2][C]) const {
    float* to = my.of_columns + warp * My::sums * columns + column;
    const int at = H * held_row + first_slot;
    const float of_dots[2] = {my.dots[at], my.dots[at + 1]}, of_square[2] = {my.of_square[at], my.of_square[at + 1]};
    load_memory(my.memory, grad);
    float sums[C], key[C], mask[C], erase[C];
#pragma unroll
    for (int c = 0; c < C; ++c) sums[c] = of_dots[0] * m[0][c] + of_dots[1] * m[1][c];
    store_warp_sums<1, C>(sums, lane, to + (My::of_dots + H) * columns, columns);
    if (plan.masks) {
#pragma unroll
      for (int c = 0; c < C; ++c) sums[c] = of_square[0] * m[0][c] * m[0][c] + of_square[1] * m[1][c] * m[1][c];
      store_warp_sums<1, C>(sums, lane, to + (My::of_squares + H) * columns, columns);
    }
    this->load_columns(in + (In::keys + H) * columns, key);
    this->load_masks(in, H, mask);
    this->load_columns(in + In::erase * columns, erase);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const float weight = rows.written[first_slot + s];
#pragma unroll
      for (int c = 0; c < C; ++c)
        grad[s][c] =
            grad[s][c] * (1 - weight * erase[c]) * kept[s] + mask[c] * (of_dots[s] * key[c] + 2 * of_square[s] * m[s][c]);
    }
  }

  // Back through what was retained: to a head's free gate and its weight of a slot; and to the usage before. filled: the usage
  // of which so much was retained. Where the step began anew, nothing before it has a gradient.
  __device__ __forceinline__ void through_retained(const float* in, const HeldRows& rows, float retained, float filled,
                                                   bool anew) const {
    const int at = own_share * held_row + own_slot;
    const float gate = in[In::free_gates + own_share], read = rows.read_before[at], of_usage = my.of_usage[own_slot];
    float of_factor = my.of_retained[own_slot] + of_usage * filled;
#pragma unroll
    for (int r = 0; r < H; ++r)
      of_factor *= r == own_share ? 1 : 1 - in[In::free_gates + r] * rows.read_before[r * held_row + own_slot];
    my.of_read[at] = anew ? 0 : my.of_read[at] - of_factor * gate;
    const float of_gate = add_between<16, 4>(-of_factor * read);  // all four lanes have read of_usage
    if (lane < H) my.of_gates[warp * H + lane] = of_gate;
    gpu::sync_warp();
    if (own_share != 0) return;
    my.of_usage[own_slot] = anew ? 0 : of_usage * (retained * (1 - rows.written_before[own_slot]));
    if (anew) my.of_precedence[own_slot] = 0;
  }

  // Before a step at which the sample began anew nothing has a gradient, but the start.
  __device__ __forceinline__ void through_start(float (&grad)[2][C]) const {
    float sum[2][C];
    float* of_start = out(a.grad_start, static_cast<int64_t>(plan.N) * plan.D);
    this->take_memory(of_start, sum);
#pragma unroll
    for (int i = 0; i < 2 * C; ++i) sum[i / C][i % C] += grad[i / C][i % C], grad[i / C][i % C] = 0;
    this->give_memory(sum, of_start);
    const float none[lane_links] = {};
#pragma unroll
    for (int r = 0; r < warp_rows; ++r) store_own(my.links, r, none);
  }

  __device__ __forceinline__ float column_sum(int which, int c) const {
    float sum = 0;
#pragma unroll 4  // the memory is on its way to registers
    for (int w = 0; w < held_warps; ++w) sum += my.of_columns[(w * My::sums + which) * columns + c];
    return sum;
  }
  // The gradients of what step t, of such a visit, was told.
  __device__ __forceinline__ void give(int64_t t, int visit) const {
    const float *in = inputs(visit), *of_singles = singles(visit);
    const int D = plan.D;
    for (int i = gpu::thread(); i < plan.first[Told::grad_reads]; i += held_threads) {
      int kind = 0;
      while (i >= plan.first[kind + 1]) ++kind;
      const int j = i - plan.first[kind], place = In::place(kind, j, D), row = place / columns, c = place % columns;
      float value = 0;
      if (place >= In::sharpness) {
        value = of_singles[place - In::sharpness];
        if (kind == Told::free_gates) {
          value = 0;
#pragma unroll
          for (int w = 0; w < held_warps; ++w) value += my.of_gates[w * H + j];
        }
        if (kind == Told::read_modes && !plan.sharpened && j % 3 != 1) {
          value = 0;
#pragma unroll
          for (int w = 0; w < held_warps / H; ++w) value += my.of_modes[(j / 3 * (held_warps / H) + w) * 2 + j % 3 / 2];
        }
      } else if (row >= In::erase) {
        value = column_sum(row == In::erase ? My::of_erase : My::of_vector, c);
      } else {
        const bool of_mask = row >= In::masks;
        const int h = of_mask ? row - In::masks : row;
        const float key = in[(In::keys + h) * columns + c], mask = plan.masks ? in[(In::masks + h) * columns + c] : 1;
        const float of_square = of_singles[My::key_squares + h], of_dots = column_sum(My::of_dots + h, c);
        if (of_mask) value = 2 * mask * (key * (of_dots + key * of_square) + column_sum(My::of_squares + h, c));
        else value = mask * mask * (of_dots + 2 * of_square * key);
      }
      store_as(given.told[kind], a.input, (t * a.B + sample) * plan.count(kind) + j, value);
    }
  }

  // gives: the gradients of the step after it are still to be given. next: the step after this one.
  __device__ __forceinline__ void back(int t, const float* before, bool gives, int next, bool ends) {
    const float* in = inputs(visits);
    const HeldRows rows = this->rows(visits);
    float kept[2], retained, filled, m[2][C], now[2][C];
    load_memory(before + My::state_memory, m);
    if (gives) give(t + 1, visits - 1);  // meanwhile
    retained = retain(in, rows, kept);
    {
      const float usage = before[My::state_usage + own_slot];
      filled = usage + (1 - usage) * rows.written_before[own_slot];
      if (own_share == 0) my.usage[own_slot] = filled * retained;
    }
    this->with_slots([&](int i, bool) { my.precedence[i] = before[My::state_precedence + i]; });
    after(in, rows, kept, m, now);
    compare_all(in, m, now);
    gpu::sync();
    // One warp each, while the links keep the others at work.

    if (warp < H) through_read(in, t, warp);
    else if (warp == H) soften_write(in);
    else if (warp == H + 1) products(rows);
    else if (warp == H + 2) total(rows);

    if (plan.sharpened) gpu::sync();  // the directions have other gradients than the weights
    if (plan.links) through_links(in, rows, before);
    gpu::sync();
    load_memory(before + My::state_memory, m);  // again, which takes no registers meanwhile
    ask(next);
    after(in, rows, kept, m, now);
    through_memory(in, rows, kept, m, now);
    gpu::sync_warp();  // which has what comes to its slots
    gather(in, rows, ends);
    gpu::sync();
    if (warp == 0) through_write(in);
    if (warp == 1) through_allocation(in, rows);
    add_columns_read(rows, kept, m, now);
    gpu::sync();
    add_columns_write(in, rows, kept, m, now);
    const bool anew = begins(t);
    through_retained(in, rows, retained, filled, anew);
    if (anew) through_start(now);
    store_memory(now, my.memory);
    turn();
  }

  __device__ __forceinline__ void begin_gradients() {
    const int64_t N = plan.N;
    float grad[2][C];
    this->take_memory(a.grad_after.memory ? came(a.grad_after.memory, N * plan.D) : nullptr, grad);
    store_memory(grad, my.memory);
    this->with_slots([&](int i, bool there) {
      my.of_usage[i] = there && a.grad_after.usage ? came(a.grad_after.usage, N)[i] : 0;
      my.of_precedence[i] = there && a.grad_after.precedence ? came(a.grad_after.precedence, N)[i] : 0;
      my.products[i] = 0;
    });
    this->with_weights([&](int h, int i, bool there) {
      my.of_back[h * held_row + i] = my.of_forward[h * held_row + i] = 0;
      my.of_read[h * held_row + i] =
          there && a.grad_after.read_weights ? came(a.grad_after.read_weights, plan.R * N)[h * N + i] : 0;
    });
    float links[warp_rows][lane_links];
    this->take_links(a.grad_after.links ? came(a.grad_after.links, N * N) : nullptr, links);
#pragma unroll
    for (int r = 0; r < warp_rows; ++r) store_own(my.links, r, links[r]);
    const float none[2][C] = {};
    if (a.grad_start) this->give_memory(none, out(a.grad_start, N * plan.D));
  }

  __device__ __forceinline__ void end() {
    const int64_t N = plan.N;
    float grad[2][C];
    load_memory(my.memory, grad);
    this->give_memory(grad, out(a.grad_before.memory, N * plan.D));
    this->with_slots([&](int i, bool there) {
      if (!there) return;
      out(a.grad_before.usage, N)[i] = my.of_usage[i];
      if (plan.links) out(a.grad_before.precedence, N)[i] = my.of_precedence[i];
    });
    this->with_weights([&](int h, int i, bool there) {
      if (there) out(a.grad_before.read_weights, plan.R * N)[h * N + i] = my.of_read[h * held_row + i];
    });
    if (!plan.links) return;
    float links[warp_rows][lane_links];
#pragma unroll
    for (int r = 0; r < warp_rows; ++r) load_own(my.links, r, links[r]);
    this->give_links(links, out(a.grad_before.links, N * N));
  }

  // The first replay keeps the state of every segment; then each is replayed, all its states kept, and gone back through.
  __device__ __forceinline__ void run() {
    // A scan of so many steps that an int does not count them has no room in any memory.
    const int steps = static_cast<int>(a.sequences.length(a.T, sample)), every = plan.segment;
    const int last = (steps - 1) / every;  // segment
    for (int i = gpu::thread(); i < 2 * In::numbers; i += held_threads) my.in[i] = 0;
    begin_gradients();
    gpu::sync();
    if (steps > 0) {
      ask(0);
      turn();
      State s;
      begin(begins(0), s);
      for (int segment = 0; segment < last; ++segment) {
        store(s, state(segment, 0));
        for (int t = segment * every; t < (segment + 1) * every; ++t) {
          ask(t + 1);
          replay(s);
          if (begins(t + 1)) begin(true, s);
          turn();
        }
      }
      store(s, state(last, 0));
      gpu::sync();  // of a state, the usage and the precedence are of other threads
    }
    for (int segment = steps > 0 ? last : -1; segment >= 0; --segment) {
      const int first = segment * every, count = first + every < steps ? every : steps - first;
      {
        State s;
        load(state(segment, 0), s);
        for (int step = 1; step < count; ++step) {
          ask(first + step);
          replay(s);
          if (begins(first + step)) begin(true, s);
          store(s, state(segment, step));
          turn();
        }
      }
      for (int step = count - 1; step >= 0; --step) {
        const int next =
            step > 0 ? first + step - 1 : first - every;  // the last time there is none, and whichever does no harm
        back(first + step, state(segment, step), step + 1 < count, next < 0 ? 0 : next, first + step == steps - 1);
      }
      give(first, visits - 1);
      gpu::sync();
    }
    end();
    for (int kind = 0; kind < Told::grad_reads; ++kind)
      if (given.told[kind]) DncThread<float>(plan, a.eps).clear_steps(a, sample, steps, given.told[kind], plan.count(kind));
  }
};

template <int C>
__global__ void __launch_bounds__(held_threads, 1)
    dnc_backward_held_kernel(const __grid_constant__ DncScanBackward a, const __grid_constant__ DncGiven given,
                             const __grid_constant__ DncPlan plan, unsigned char* scratch) {
  HeldBackwardScan<C>(a, given, plan, scratch).run();
}

// Bytes of shared memory, and numbers of a state.
inline size_t held_bytes(const DncPlan& plan, int64_t& state_numbers) {
  return with_held(plan, [&](auto c) {
    using My = HeldBackward<decltype(c)::value>;
    state_numbers = My::state_numbers;
    Carver carver(nullptr);
    My{carver};
    return carver.used;
  });
}

template <class T>
const char* plan_of(const DncScanBackward& a, DncPlan& plan) {
  if (const char* why = dnc_too_large(a)) return why;
  plan = dnc_sizes_of(a, a.grad_reads, true);
  while (static_cast<int64_t>(plan.segment) * plan.segment < a.T) ++plan.segment;
  if (plan.segment == 0) plan.segment = 1;
  plan.segments = static_cast<int>((a.T + plan.segment - 1) / plan.segment);
  const gpu::Limits limits = gpu::limits();
  int64_t state_numbers = 0;
  if (sizeof(T) == 4 && dnc_hold(plan, limits, held_bytes(plan, state_numbers))) {
    plan.scratch = static_cast<size_t>((plan.segments + plan.segment - 1) * state_numbers) * sizeof(float);
    return nullptr;
  }
  dnc_place<DncBackward<T>>(plan, limits);
  return nullptr;
}

template <class T>
const char* scan_backward(const DncScanBackward& a, const Queue& queue) {
  DncPlan plan;
  if (const char* why = plan_of<T>(a, plan)) return why;
  const size_t bytes = plan.scratch * static_cast<size_t>(a.B);
  unsigned char* scratch = bytes ? static_cast<unsigned char*>(queue.scratch(queue.owner, bytes)) : nullptr;
  const auto& g = a.grad_told;
  const DncGiven given = {{g.read_keys, g.read_sharpness, g.write_key, g.write_sharpness, g.erase, g.write_vector, g.free_gates,
                           g.allocation_gate, g.write_gate, g.read_modes, g.read_masks, g.write_mask, g.link_sharpening}};
  const gpu::Launch how{a.B, 32 * plan.warps, 1, plan.shared, queue.stream};
  if constexpr (sizeof(T) == 4) {
    if (plan.held)
      return with_held(plan, [&](auto c) {
        return gpu::launch(dnc_backward_held_kernel<decltype(c)::value>, how, a, given, plan, scratch);
      });
  }
  if (sizeof(T) == 4 && plan.near) return gpu::launch(dnc_backward_kernel<T, sizeof(T) == 4>, how, a, given, plan, scratch);
  return gpu::launch(dnc_backward_kernel<T, false>, how, a, given, plan, scratch);
}

}  // namespace

const char* dnc_scan_backward(const DncScanBackward& a, const Queue& queue) {
  return a.state == Dtype::float64 ? scan_backward<double>(a, queue) : scan_backward<float>(a, queue);
}
const char* dnc_scan_backward_layout(const DncScanBackward& a, Layout& layout) {
  DncPlan plan;
  const char* why = plan_of<float>(a, plan);
  if (!why) layout = dnc_layout_of(plan);
  return why;
}

}  // namespace cuda
}  // namespace mann_fast

// dnc_scan backward of common sizes: a sample is in registers. dnc_scan_backward.cu launches it, and says what the directions keep.
#pragma once
#include "dnc_held.cuh"

namespace mann_fast {
namespace cuda {
namespace {

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
    float key[C];
    this->compare_write(in, m, my.dots, my.squares);
    float dots[2 * H] = {}, of_read[2 * H] = {};
    if (plan.masks) {
      float squares[2 * H] = {};
#pragma unroll
      for (int h = 0; h < H; ++h) {
        this->template add_compared<H>(in, h, now, dots + h, squares + h);
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
      if (given.told[kind])
        DncThread<float>(plan, a.eps).clear_steps(a, sample, steps, given.told[kind], a.input, plan.count(kind));
  }
};

}  // namespace
}  // namespace cuda
}  // namespace mann_fast

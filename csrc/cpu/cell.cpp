// A whole MANN sequence: controller, heads, and the LRUA memory for all T steps in one call, forward and backward.
//
// The input's part of the controller comes in ready, one product for all steps. What is left of the controller's product
// depends on the step before; it is taken for a block of a few samples at a time on packed weights (products.h), and each sample's
// memory takes the step of lrua_step.h. Blocks know nothing of one another: a thread takes its block through all steps.
// Backward hands out the gradients of the gates and of the heads for all steps, so that the gradient of every weight is one
// large product after it.
#include "lrua_step.h"
#include "products.h"

namespace mann_fast {
namespace MANN_FAST_ISA {
namespace {

template <class T>
Vec<T> load_some(const T* from, int64_t count) {
  if (count >= width<T>) return load(from);
  Vec<T> v{};
  std::memcpy(&v, from, count * sizeof(T));
  return v;
}
template <class T>
void store_some(T* to, Vec<T> v, int64_t count) {
  std::memcpy(to, &v, count >= width<T> ? sizeof v : count * sizeof(T));
}

// Forward and backward's common sizes. K numbers go round: the hidden state and the reads. One row of head values holds keys
// and write vectors (after tanh), the logits of the gates, and sharpness before its softplus, as far as they are there.
template <class T, class Arguments>
struct Sizes {
  int64_t RD, K, G, kept, vectors, heads;
  Scan<T> scan;
  explicit Sizes(const Arguments& a)
      : RD(a.R * a.D), K(a.H + RD),
        G(gates_per_unit(a.controller) * a.H), kept(kept_per_unit(a.controller) * a.H), vectors(a.separate_vector ? 2 * RD : RD),
        heads(vectors + (a.learned_sharpness ? 2 : 1) * a.R),
        scan{a.N, a.D, a.R, padded_slots(a.N), 1, a.read_first, a.shared_target, static_cast<T>(a.eps)} {}
};

template <class T>
T softplus(T x) {
  return (x > 0 ? x : T(0)) + std::log1p(std::exp(x > 0 ? -x : x));
}

// Hands a row of head values to the memory's step.
template <class T, class Arguments>
void set_inputs(const Arguments& a, const Sizes<T, Arguments>& n, const T* values, StepInputs<T>& in) {
  for (int64_t r = 0; r < a.R; ++r)
    in.beta_buffer[r] =
        a.learned_sharpness
            ? static_cast<T>(a.sharpness) + static_cast<T>(a.sharpness_scale) * softplus(values[n.vectors + a.R + r])
            : static_cast<T>(a.sharpness);
  in.set(a.R, a.D, values, a.separate_vector ? values + n.RD : values, values + n.vectors, in.beta_buffer);
}

// Blocks of at most block_rows samples, as many for each thread; run(block, samples, scratch) for each.
template <class T, class Arguments, class Blockpad, class Run>
bool run_blocks(const Arguments& a, const Parallel& parallel, double work, Blockpad blockpad, Run run) {
  const int64_t threads = worthwhile_tasks(parallel, a.B, work);
  int64_t blocks = (a.B + block_rows - 1) / block_rows;
  blocks = (blocks + threads - 1) / threads * threads;
  blocks = blocks < a.B ? blocks : a.B;
  if (blocks == 0) return true;
  return run_items(parallel, blocks, threads < blocks ? threads : blocks, blockpad,
                   [&](int64_t block, auto& s) { run(part_of(a.B, blocks, block), s); });
}

// The weights, packed: of_hidden is not there in a feed-forward controller. In backward they are the transposes.
template <class T>
struct Weights {
  Packed<T> of_hidden, of_reads, head;
  bool bfloat16;
  void round(const Parallel& parallel) const {
    if constexpr (sizeof(T) == 4)
      for (const Packed<T>* weight : {&of_hidden, &of_reads, &head})
        if (bfloat16) round_packed(parallel, *weight);
  }
  // out = a times one of them, for the rows of a block.
  void times(const T* a, int64_t lda, int64_t rows, const Packed<T>& weight, T* out, int64_t ldo,
             [[maybe_unused]] T* room) const {
    if constexpr (sizeof(T) == 4)
      if (bfloat16) return rounded_product(a, lda, rows, weight, out, ldo, room);
    product<T>(a, lda, rows, weight, out, ldo);
  }
};

// ---- forward ----------------------------------------------------------------------------------------------------

template <class T>
struct CellBlock {  // of one block; rows side by side
  int64_t gates_ld, heads_ld;
  T *round, *cell, *of_reads, *of_hidden, *heads;  // [K]: hidden state and reads; [H]; parts of the gates [G]; head values
  T* room;                                         // for rounded products
  ScanScratch<T>* samples;
  CellBlock(Arena& arena, const Cell& a, const Sizes<T, Cell>& n)
      : gates_ld(padded<T>(n.G + width<T>)),  // a gate's last vector reaches into what comes after it
        heads_ld(padded<T>(n.heads)), round(arena.take<T>(block_rows * n.K)), cell(arena.take<T>(block_rows * a.H)),
        of_reads(arena.take<T>(block_rows * gates_ld)), of_hidden(arena.take<T>(block_rows * gates_ld)),
        heads(arena.take<T>(block_rows * heads_ld)), room(arena.take<T>(a.bfloat16 ? rounded_numbers(n.K) : 0)),
        samples(arena.take<ScanScratch<T>>(block_rows)) {
    for (int m = 0; m < block_rows; ++m) {
      const ScanScratch<T> sample(arena, n.scan);
      if (samples != nullptr) samples[m] = sample;
    }
  }
};

// One row of a controller's gates before their nonlinearities: what the input, the reads, and the hidden state gave.
template <class T>
struct GateParts {
  int64_t H;
  const T *of_input, *of_reads, *of_hidden, *hidden_bias;
  Vec<T> input(int64_t gate, int64_t i) const {
    return load_some(of_input + gate * H + i, H - i) + load(of_reads + gate * H + i);
  }
  Vec<T> hidden(int64_t gate, int64_t i) const {
    return load(of_hidden + gate * H + i) + load_some(hidden_bias + gate * H + i, H - i);
  }
  Vec<T> both(int64_t gate, int64_t i) const { return input(gate, i) + hidden(gate, i); }
};

// The gates as torch.nn.LSTMCell orders them: admit, keep, candidate, expose. What backward needs goes to kept [4 H] and
// kept_cell [H], unless these are null.
template <class T>
void lstm(const GateParts<T>& gate, T* cell, T* hidden, T* kept, T* kept_cell) {
  const int64_t H = gate.H;
  for (int64_t i = 0; i < H; i += width<T>) {
    const int64_t count = H - i;
    const Vec<T> admit = sigmoid<T>(gate.both(0, i)), keep = sigmoid<T>(gate.both(1, i)),
                 candidate = hyperbolic_tangent<T>(gate.both(2, i)), expose = sigmoid<T>(gate.both(3, i));
    const Vec<T> now = keep * load_some(cell + i, count) + admit * candidate;
    store_some(cell + i, now, count);
    store_some(hidden + i, expose * hyperbolic_tangent<T>(now), count);
    if (kept == nullptr) continue;
    store_some(kept + i, admit, count);
    store_some(kept + H + i, keep, count);
    store_some(kept + 2 * H + i, candidate, count);
    store_some(kept + 3 * H + i, expose, count);
    store_some(kept_cell + i, now, count);
  }
}

// As torch.nn.GRUCell: reset, update, candidate.
template <class T>
void gru(const GateParts<T>& gate, T* hidden, T* kept, T* kept_hidden) {
  const int64_t H = gate.H;
  for (int64_t i = 0; i < H; i += width<T>) {
    const int64_t count = H - i;
    const Vec<T> reset = sigmoid<T>(gate.both(0, i)), update = sigmoid<T>(gate.both(1, i)), shown = gate.hidden(2, i);
    const Vec<T> candidate = hyperbolic_tangent<T>(gate.input(2, i) + reset * shown);
    const Vec<T> now = candidate + update * (load_some(hidden + i, count) - candidate);
    store_some(hidden + i, now, count);
    if (kept == nullptr) continue;
    store_some(kept + i, reset, count);
    store_some(kept + H + i, update, count);
    store_some(kept + 2 * H + i, candidate, count);
    store_some(kept + 3 * H + i, shown, count);
    store_some(kept_hidden + i, now, count);
  }
}

template <class T>
void feedforward(const GateParts<T>& gate, T* hidden, T* kept) {
  for (int64_t i = 0; i < gate.H; i += width<T>) {
    const Vec<T> now = hyperbolic_tangent<T>(gate.input(0, i));
    store_some(hidden + i, now, gate.H - i);
    if (kept != nullptr) store_some(kept + i, now, gate.H - i);
  }
}


template <class T>
void cell_block(const Cell& a, const Sizes<T, Cell>& n, const Weights<T>& weights, Range samples, CellBlock<T>& s) {
  const int64_t rows = samples.hi - samples.lo, H = a.H, N = a.N, D = a.D, R = a.R, every = a.anchor_every;
  const Parallel alone = {1, nullptr};
  const T* head_bias = static_cast<const T*>(a.head_bias);
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t b = samples.lo + m;
    if (a.hidden) std::memcpy(s.round + m * n.K, static_cast<const T*>(a.hidden) + b * H, H * sizeof(T));
    std::memcpy(s.round + m * n.K + H, static_cast<const T*>(a.reads) + b * n.RD, n.RD * sizeof(T));
    if (a.cell) std::memcpy(s.cell + m * H, static_cast<const T*>(a.cell) + b * H, H * sizeof(T));
    begin_sample(n.scan, static_cast<const T*>(a.memory) + b * N * D, static_cast<const T*>(a.read_weights) + b * R * N,
                 static_cast<const T*>(a.usage) + b * N, alone, s.samples[m]);
  }
  for (int64_t t = 0; t < a.T; ++t) {
    const int64_t first = t * a.B + samples.lo;
    weights.times(s.round + H, n.K, rows, weights.of_reads, s.of_reads, s.gates_ld, s.room);
    if (a.hidden) weights.times(s.round, n.K, rows, weights.of_hidden, s.of_hidden, s.gates_ld, s.room);
    for (int64_t m = 0; m < rows; ++m) {
      const GateParts<T> gate = {H, static_cast<const T*>(a.gates) + (first + m) * n.G, s.of_reads + m * s.gates_ld,
                                 s.of_hidden + m * s.gates_ld, static_cast<const T*>(a.hidden_bias)};
      T* hidden = s.round + m * n.K;
      T* kept = every > 0 ? static_cast<T*>(a.kept_gates) + (first + m) * n.kept : nullptr;
      T* kept_state = every > 0 && a.hidden ? static_cast<T*>(a.kept_states) + (first + m) * H : nullptr;
      switch (a.controller) {
        case Controller::lstm: lstm(gate, s.cell + m * H, hidden, kept, kept_state); break;
        case Controller::gru: gru(gate, hidden, kept, kept_state); break;
        case Controller::feedforward: feedforward(gate, hidden, kept); break;
      }
    }
    weights.times(s.round, n.K, rows, weights.head, s.heads, s.heads_ld, s.room);
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t row = first + m;
      T* raw = s.heads + m * s.heads_ld;
      for (int64_t j = 0; j < n.heads; j += width<T>)
        store(raw + j, load(raw + j) + load_some(head_bias + j, n.heads - j));
      T* values = every > 0 ? static_cast<T*>(a.kept_heads) + row * n.heads : raw;
      for (int64_t j = 0; j < n.vectors; j += width<T>)
        store_some(values + j, hyperbolic_tangent<T>(load(raw + j)), n.vectors - j);
      if (values != raw)
        std::memcpy(values + n.vectors, raw + n.vectors, (n.heads - n.vectors) * sizeof(T));
      ScanScratch<T>& memory = s.samples[m];
      set_inputs(a, n, static_cast<const T*>(values), memory.in);
      T* anchor = has_anchor(t, every)
                      ? static_cast<T*>(a.anchors) + anchor_offset(t, every, a.B, samples.lo + m, D + R, N)
                      : nullptr;
      step_sample(n.scan, static_cast<T>(a.usage_decay), every > 0 ? a.slots + row * R : nullptr, anchor, alone, memory);
      std::memcpy(s.round + m * n.K + H, memory.reads, n.RD * sizeof(T));
      std::memcpy(static_cast<T*>(a.output) + row * n.K, s.round + m * n.K, n.K * sizeof(T));
    }
  }
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t b = samples.lo + m;
    if (a.cell) std::memcpy(static_cast<T*>(a.out_cell) + b * H, s.cell + m * H, H * sizeof(T));
    end_sample(n.scan, static_cast<T*>(a.out_memory) + b * N * D, static_cast<T*>(a.out_read_weights) + b * R * N,
               static_cast<T*>(a.out_usage) + b * N, alone, s.samples[m]);
  }
}

template <class T>
bool cell(const Cell& a, const Parallel& parallel) {
  const Sizes<T, Cell> n(a);
  const auto layout = [&](Arena& arena) {
    return Weights<T>{{arena, a.hidden ? a.H : 0, n.G}, {arena, n.RD, n.G}, {arena, a.H, n.heads}, a.bfloat16};
  };
  Arena size;
  layout(size);
  const Scratch scratch(size.used());
  if (scratch.data() == nullptr) return false;
  Arena arena(scratch.data());
  const Weights<T> weights = layout(arena);
  if (a.hidden) pack_transposed(parallel, weights.of_hidden, static_cast<const T*>(a.hidden_weight), a.H);
  pack_transposed(parallel, weights.of_reads, static_cast<const T*>(a.reads_weight), a.reads_weight_ld);
  pack_transposed(parallel, weights.head, static_cast<const T*>(a.head_weight), a.H);
  weights.round(parallel);
  const double step = static_cast<double>(n.K * n.G + a.H * n.heads + a.N * a.D * (3 * a.R + 1));
  return run_blocks<T>(
      a, parallel, static_cast<double>(a.T * a.B) * step, [&](Arena& arena) { return CellBlock<T>(arena, a, n); },
      [&](Range samples, CellBlock<T>& s) { cell_block<T>(a, n, weights, samples, s); });
}

// ---- backward ---------------------------------------------------------------------------------------------------

template <class T>
struct CellBackwardBlock {
  int64_t round_ld, hidden_ld;
  // Of the hidden state and reads [K]; of the hidden state through the heads [H]; of the cell, or what of the hidden state's
  // gradient passes a GRU by [H].
  T *grad_round, *grad_hidden, *grad_state;
  T* room;  // for rounded products
  ScanBackwardScratch<T>* samples;
  CellBackwardBlock(Arena& arena, const CellBackward& a, const Sizes<T, CellBackward>& n, int64_t steps)
      : round_ld(a.H + padded<T>(n.RD) + width<T>), hidden_ld(padded<T>(a.H)),
        grad_round(arena.take<T>(block_rows * round_ld)), grad_hidden(arena.take<T>(block_rows * hidden_ld)),
        grad_state(arena.take<T>(block_rows * a.H)),
        room(arena.take<T>(a.bfloat16 ? rounded_numbers(n.G > n.heads ? n.G : n.heads) : 0)),
        samples(arena.take<ScanBackwardScratch<T>>(block_rows)) {
    for (int m = 0; m < block_rows; ++m) {
      const ScanBackwardScratch<T> sample(arena, n.scan, steps);
      if (samples != nullptr) samples[m] = sample;
    }
  }
};

// From the gradients of the hidden state (two parts) and the cell: the gradient of the gates before their nonlinearities,
// and in place of the cell's gradient that of the cell before.
template <class T>
void lstm_backward(int64_t H, const T* kept, const T* cell_now, const T* cell_before, const T* grad_hidden,
                   const T* more_grad_hidden, T* grad_cell, T* grad_gates) {
  for (int64_t i = 0; i < H; i += width<T>) {
    const int64_t count = H - i;
    const Vec<T> admit = load_some(kept + i, count), keep = load_some(kept + H + i, count),
                 candidate = load_some(kept + 2 * H + i, count), expose = load_some(kept + 3 * H + i, count);
    const Vec<T> shown = hyperbolic_tangent<T>(load_some(cell_now + i, count));
    const Vec<T> grad = load_some(grad_hidden + i, count) + load_some(more_grad_hidden + i, count);
    const Vec<T> grad_now = load_some(grad_cell + i, count) + grad * expose * (T(1) - shown * shown);
    store_some(grad_gates + i, grad_now * candidate * admit * (T(1) - admit), count);
    store_some(grad_gates + H + i, grad_now * load_some(cell_before + i, count) * keep * (T(1) - keep), count);
    store_some(grad_gates + 2 * H + i, grad_now * admit * (T(1) - candidate * candidate), count);
    store_some(grad_gates + 3 * H + i, grad * shown * expose * (T(1) - expose), count);
    store_some(grad_cell + i, grad_now * keep, count);
  }
}

// The same for a GRU. In grad_state is what passes it by: through the share `update` of the hidden state before.
template <class T>
void gru_backward(int64_t H, const T* kept, const T* before, const T* grad_hidden, const T* more_grad_hidden, T* grad_state,
                  T* grad_gates, T* grad_hidden_gates) {
  for (int64_t i = 0; i < H; i += width<T>) {
    const int64_t count = H - i;
    const Vec<T> reset = load_some(kept + i, count), update = load_some(kept + H + i, count),
                 candidate = load_some(kept + 2 * H + i, count), shown = load_some(kept + 3 * H + i, count);
    const Vec<T> grad = load_some(grad_hidden + i, count) + load_some(more_grad_hidden + i, count) +
                        load_some(grad_state + i, count);
    const Vec<T> grad_candidate = grad * (T(1) - update) * (T(1) - candidate * candidate);
    const Vec<T> grad_reset = grad_candidate * shown * reset * (T(1) - reset);
    const Vec<T> grad_update = grad * (load_some(before + i, count) - candidate) * update * (T(1) - update);
    for (T* to : {grad_gates, grad_hidden_gates}) {
      store_some(to + i, grad_reset, count);
      store_some(to + H + i, grad_update, count);
    }
    store_some(grad_gates + 2 * H + i, grad_candidate, count);
    store_some(grad_hidden_gates + 2 * H + i, grad_candidate * reset, count);
    store_some(grad_state + i, grad * update, count);
  }
}

template <class T>
void feedforward_backward(int64_t H, const T* kept, const T* grad_hidden, const T* more_grad_hidden, T* grad_gates) {
  for (int64_t i = 0; i < H; i += width<T>) {
    const int64_t count = H - i;
    const Vec<T> now = load_some(kept + i, count);
    const Vec<T> grad = load_some(grad_hidden + i, count) + load_some(more_grad_hidden + i, count);
    store_some(grad_gates + i, grad * (T(1) - now * now), count);
  }
}

// The gradient of one row of heads before their nonlinearities, from what step_backward left.
template <class T>
void head_gradient(const CellBackward& a, const Sizes<T, CellBackward>& n, const T* values,
                   const ScanBackwardScratch<T>& memory, T* grad) {
  for (int64_t j = 0; j < n.RD; j += width<T>) {
    const int64_t count = n.RD - j;
    const Vec<T> key = load_some(values + j, count), grad_vector = load_some(memory.grad_vector + j, count);
    Vec<T> grad_key = load_some(memory.grad_key + j, count);
    if (!a.separate_vector) grad_key += grad_vector;
    store_some(grad + j, grad_key * (T(1) - key * key), count);
    if (!a.separate_vector) continue;
    const Vec<T> vector = load_some(values + n.RD + j, count);
    store_some(grad + n.RD + j, grad_vector * (T(1) - vector * vector), count);
  }
  for (int64_t r = 0; r < a.R; ++r) {
    grad[n.vectors + r] = memory.grad_gate[r];
    if (!a.learned_sharpness) continue;
    T slope, rest;
    sigmoids(values[n.vectors + a.R + r], &slope, &rest);
    grad[n.vectors + a.R + r] = memory.grad_sharpness[r] * static_cast<T>(a.sharpness_scale) * slope;
  }
}

template <class T>
void cell_backward_block(const CellBackward& a, const Sizes<T, CellBackward>& n, const Weights<T>& weights, Range samples,
                         CellBackwardBlock<T>& s) {
  const int64_t rows = samples.hi - samples.lo, H = a.H, N = a.N, D = a.D, R = a.R, every = a.anchor_every;
  const Parallel alone = {1, nullptr};
  const auto row_of = [](const void* from, int64_t row, int64_t size) {
    return from == nullptr ? nullptr : static_cast<const T*>(from) + row * size;
  };
  std::memset(s.grad_round, 0, block_rows * s.round_ld * sizeof(T));
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t b = samples.lo + m;
    if (a.grad_cell) std::memcpy(s.grad_state + m * H, row_of(a.grad_cell, b, H), H * sizeof(T));
    else std::memset(s.grad_state + m * H, 0, H * sizeof(T));
    begin_backward(n.scan, row_of(a.grad_memory, b, N * D), row_of(a.grad_read_weights, b, R * N), alone, s.samples[m]);
  }
  for (int64_t start = last_replay(a.T, every); start >= 0; start -= every) {
    const int64_t steps = a.T - start < every ? a.T - start : every;
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t b = samples.lo + m;
      ScanBackwardScratch<T>& memory = s.samples[m];
      const T* anchor = start == 0 ? nullptr : static_cast<const T*>(a.anchors) + anchor_offset(start, every, a.B, b, D + R, N);
      begin_replay(n.scan, anchor, row_of(a.memory, b, N * D), row_of(a.read_weights, b, R * N), memory);
      for (int64_t step = 0; step < steps; ++step) {
        const int64_t row = (start + step) * a.B + b;
        set_inputs(a, n, row_of(a.kept_heads, row, n.heads), memory.in);
        replay_step(n.scan, a.slots + row * R, step, alone, memory);
      }
    }
    for (int64_t step = steps - 1; step >= 0; --step) {
      const int64_t t = start + step, first = t * a.B + samples.lo;
      for (int64_t m = 0; m < rows; ++m) {
        const int64_t row = first + m;
        T* round = s.grad_round + m * s.round_ld;
        if (const T* grad = row_of(a.grad_output, row, n.K))
          for (int64_t j = 0; j < n.K; ++j) round[j] += grad[j];
        ScanBackwardScratch<T>& memory = s.samples[m];
        const T* values = row_of(a.kept_heads, row, n.heads);
        set_inputs(a, n, values, memory.in);
        step_backward(n.scan, a.slots + row * R, step, static_cast<const T*>(round + H), alone, memory);
        head_gradient(a, n, values, memory, static_cast<T*>(a.grad_heads) + row * n.heads);
      }
      weights.times(row_of(a.grad_heads, first, n.heads), n.heads, rows, weights.head, s.grad_hidden, s.hidden_ld, s.room);
      for (int64_t m = 0; m < rows; ++m) {
        const int64_t row = first + m;
        const T* kept = row_of(a.kept_gates, row, n.kept);
        const T *round = s.grad_round + m * s.round_ld, *more = s.grad_hidden + m * s.hidden_ld;
        const void* start_state = a.controller == Controller::lstm ? a.cell : a.hidden;
        const T* before = t > 0 ? row_of(a.kept_states, row - a.B, H) : row_of(start_state, samples.lo + m, H);
        T *state = s.grad_state + m * H, *gates = static_cast<T*>(a.grad_gates) + row * n.G;
        switch (a.controller) {
          case Controller::lstm:
            lstm_backward<T>(H, kept, row_of(a.kept_states, row, H), before, round, more, state, gates);
            break;
          case Controller::gru:
            gru_backward<T>(H, kept, before, round, more, state, gates,
                            static_cast<T*>(a.grad_hidden_gates) + row * n.G);
            break;
          case Controller::feedforward: feedforward_backward<T>(H, kept, round, more, gates); break;
        }
      }
      // The padding of the first product's columns is overwritten by the second.
      if (a.hidden)
        weights.times(row_of(a.grad_hidden_gates ? a.grad_hidden_gates : a.grad_gates, first, n.G), n.G, rows,
                      weights.of_hidden, s.grad_round, s.round_ld, s.room);
      else
        for (int64_t m = 0; m < rows; ++m) std::memset(s.grad_round + m * s.round_ld, 0, H * sizeof(T));
      weights.times(row_of(a.grad_gates, first, n.G), n.G, rows, weights.of_reads, s.grad_round + H, s.round_ld, s.room);
    }
  }
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t b = samples.lo + m;
    const T* round = s.grad_round + m * s.round_ld;
    if (a.hidden) {
      T* grad_hidden = static_cast<T*>(a.grad_hidden) + b * H;
      std::memcpy(grad_hidden, round, H * sizeof(T));
      if (a.controller == Controller::gru)
        for (int64_t i = 0; i < H; ++i) grad_hidden[i] += s.grad_state[m * H + i];
    }
    std::memcpy(static_cast<T*>(a.grad_reads) + b * n.RD, round + H, n.RD * sizeof(T));
    if (a.cell) std::memcpy(static_cast<T*>(a.grad_in_cell) + b * H, s.grad_state + m * H, H * sizeof(T));
    end_backward(n.scan, static_cast<T*>(a.grad_in_memory) + b * N * D,
                 static_cast<T*>(a.grad_in_read_weights) + b * R * N, alone, s.samples[m]);
  }
}

template <class T>
bool cell_backward(const CellBackward& a, const Parallel& parallel) {
  const Sizes<T, CellBackward> n(a);
  const auto layout = [&](Arena& arena) {
    return Weights<T>{{arena, n.G, a.hidden ? a.H : 0}, {arena, n.G, n.RD}, {arena, n.heads, a.H}, a.bfloat16};
  };
  Arena size;
  layout(size);
  const Scratch scratch(size.used());
  if (scratch.data() == nullptr) return false;
  Arena arena(scratch.data());
  const Weights<T> weights = layout(arena);
  if (a.hidden) pack(parallel, weights.of_hidden, static_cast<const T*>(a.hidden_weight), a.H);
  pack(parallel, weights.of_reads, static_cast<const T*>(a.reads_weight), a.reads_weight_ld);
  pack(parallel, weights.head, static_cast<const T*>(a.head_weight), a.H);
  weights.round(parallel);
  const int64_t steps = a.T < a.anchor_every ? a.T : a.anchor_every;
  const double step = static_cast<double>(n.K * n.G + a.H * n.heads + a.N * a.D * (8 * a.R + 2));
  return run_blocks<T>(
      a, parallel, static_cast<double>(a.T * a.B) * step,
      [&](Arena& arena) { return CellBackwardBlock<T>(arena, a, n, steps); },
      [&](Range samples, CellBackwardBlock<T>& s) { cell_backward_block<T>(a, n, weights, samples, s); });
}

}  // namespace

MANN_FAST_CELL_OPS(MANN_FAST_BY_DTYPE)

}  // namespace MANN_FAST_ISA
}  // namespace mann_fast

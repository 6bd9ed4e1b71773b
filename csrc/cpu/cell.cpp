// A whole MANN sequence: an LSTM controller, the heads, and the LRUA memory for all T steps in one call, forward and backward.
//
// The input's part of the gates comes in ready, one product for all steps. What is left of the controller's product depends
// on the step before; it is taken for a block of a few samples at a time on packed weights (products.h), and each sample's
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
  int64_t RD, K, G, vectors, heads;
  Scan<T> scan;
  explicit Sizes(const Arguments& a)
      : RD(a.R * a.D), K(a.H + RD), G(4 * a.H), vectors(a.separate_vector ? 2 * RD : RD),
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
  const int64_t tasks = threads < blocks ? threads : blocks;
  Arena size;
  blockpad(size);
  const Scratch scratch(tasks * size.used());
  if (scratch.data() == nullptr) return false;
  parallel_run(parallel, tasks, [&](int64_t task) {
    const Range mine = part_of(blocks, tasks, task);
    for (int64_t block = mine.lo; block < mine.hi; ++block) {
      Arena arena(scratch.data() + task * size.used());
      auto s = blockpad(arena);
      run(part_of(a.B, blocks, block), s);
    }
  });
  return true;
}

template <class T, class Pack>
void pack_panels(const Parallel& parallel, const Packed<T>& packed, Pack pack) {
  const int64_t tasks =
      worthwhile_tasks(parallel, packed.panels(), static_cast<double>(packed.depth) * static_cast<double>(packed.columns));
  parallel_run(parallel, tasks, [&](int64_t task) {
    const Range panels = part_of(packed.panels(), tasks, task);
    for (int64_t p = panels.lo; p < panels.hi; ++p) pack(p);
  });
}

// ---- forward ----------------------------------------------------------------------------------------------------

template <class T>
struct CellBlock {  // of one block; rows side by side
  int64_t gates_ld, heads_ld;
  T *round, *cell, *gates, *heads;  // [K]: hidden state and reads; [H]; [4 H]; head values
  ScanScratch<T>* samples;
  CellBlock(Arena& arena, const Cell& a, const Sizes<T, Cell>& n)
      : gates_ld(padded_columns<T>(n.G)), heads_ld(padded_columns<T>(n.heads)), round(arena.take<T>(block_rows * n.K)),
        cell(arena.take<T>(block_rows * a.H)), gates(arena.take<T>(block_rows * gates_ld)),
        heads(arena.take<T>(block_rows * heads_ld)), samples(arena.take<ScanScratch<T>>(block_rows)) {
    for (int m = 0; m < block_rows; ++m) {
      const ScanScratch<T> sample(arena, n.scan);
      if (samples != nullptr) samples[m] = sample;
    }
  }
};

// Gates before their nonlinearities, the recurrent part in `recurrent`, give cell and hidden state (torch's order of gates:
// admit, keep, candidate, expose). Values for backward go to kept [4 H] and kept_cell [H], unless these are null.
template <class T>
void lstm(int64_t H, const T* input, const T* recurrent, T* cell, T* hidden, T* kept, T* kept_cell) {
  for (int64_t i = 0; i < H; i += width<T>) {
    const int64_t count = H - i;
    const auto gate = [&](int64_t q) {
      return load_some(input + q * H + i, count) + load_some(recurrent + q * H + i, count);
    };
    const Vec<T> admit = sigmoid<T>(gate(0)), keep = sigmoid<T>(gate(1)), candidate = hyperbolic_tangent<T>(gate(2)),
                 expose = sigmoid<T>(gate(3));
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

template <class T>
void cell_block(const Cell& a, const Sizes<T, Cell>& n, const Packed<T>& recurrent, const Packed<T>& head, Range samples,
                CellBlock<T>& s) {
  const int64_t rows = samples.hi - samples.lo, H = a.H, N = a.N, D = a.D, R = a.R, every = a.anchor_every;
  const Parallel alone = {1, nullptr};
  const T* head_bias = static_cast<const T*>(a.head_bias);
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t b = samples.lo + m;
    std::memcpy(s.round + m * n.K, static_cast<const T*>(a.hidden) + b * H, H * sizeof(T));
    std::memcpy(s.round + m * n.K + H, static_cast<const T*>(a.reads) + b * n.RD, n.RD * sizeof(T));
    std::memcpy(s.cell + m * H, static_cast<const T*>(a.cell) + b * H, H * sizeof(T));
    begin_sample(n.scan, static_cast<const T*>(a.memory) + b * N * D, static_cast<const T*>(a.read_weights) + b * R * N,
                 static_cast<const T*>(a.usage) + b * N, alone, s.samples[m]);
  }
  for (int64_t t = 0; t < a.T; ++t) {
    const int64_t first = t * a.B + samples.lo;
    product<T>(s.round, n.K, rows, recurrent, s.gates, s.gates_ld);
    for (int64_t m = 0; m < rows; ++m)
      lstm<T>(H, static_cast<const T*>(a.gates) + (first + m) * n.G, s.gates + m * s.gates_ld, s.cell + m * H,
              s.round + m * n.K, every > 0 ? static_cast<T*>(a.kept_gates) + (first + m) * n.G : nullptr,
              every > 0 ? static_cast<T*>(a.kept_cells) + (first + m) * H : nullptr);
    product<T>(s.round, n.K, rows, head, s.heads, s.heads_ld);
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
      T* anchor = every > 0 && t > 0 && t % every == 0
                      ? static_cast<T*>(a.anchors) + ((t / every - 1) * a.B + samples.lo + m) * (D + R) * n.scan.ld
                      : nullptr;
      step_sample(n.scan, static_cast<T>(a.usage_decay), every > 0 ? a.slots + row * R : nullptr, anchor, alone, memory);
      std::memcpy(s.round + m * n.K + H, memory.reads, n.RD * sizeof(T));
      std::memcpy(static_cast<T*>(a.output) + row * n.K, s.round + m * n.K, n.K * sizeof(T));
    }
  }
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t b = samples.lo + m;
    std::memcpy(static_cast<T*>(a.out_cell) + b * H, s.cell + m * H, H * sizeof(T));
    end_sample(n.scan, static_cast<T*>(a.out_memory) + b * N * D, static_cast<T*>(a.out_read_weights) + b * R * N,
               static_cast<T*>(a.out_usage) + b * N, alone, s.samples[m]);
  }
}

template <class T>
bool cell(const Cell& a, const Parallel& parallel) {
  const Sizes<T, Cell> n(a);
  Arena size;
  Packed<T>(size, n.K, n.G), Packed<T>(size, a.H, n.heads);
  const Scratch scratch(size.used());
  if (scratch.data() == nullptr) return false;
  Arena arena(scratch.data());
  const Packed<T> recurrent(arena, n.K, n.G), head(arena, a.H, n.heads);
  pack_panels<T>(parallel, recurrent, [&](int64_t p) {
    recurrent.pack_transposed(p, {0, a.H}, static_cast<const T*>(a.hidden_weight), a.H);
    recurrent.pack_transposed(p, {a.H, n.K}, static_cast<const T*>(a.reads_weight), a.reads_weight_ld);
  });
  pack_panels<T>(parallel, head, [&](int64_t p) {
    head.pack_transposed(p, {0, a.H}, static_cast<const T*>(a.head_weight), a.H);
  });
  const double step = static_cast<double>(n.K * n.G + a.H * n.heads + a.N * a.D * (3 * a.R + 1));
  return run_blocks<T>(
      a, parallel, static_cast<double>(a.T * a.B) * step, [&](Arena& arena) { return CellBlock<T>(arena, a, n); },
      [&](Range samples, CellBlock<T>& s) { cell_block<T>(a, n, recurrent, head, samples, s); });
}

// ---- backward ---------------------------------------------------------------------------------------------------

template <class T>
struct CellBackwardBlock {
  int64_t round_ld, hidden_ld;
  T *grad_round, *grad_hidden, *grad_cell;  // [K], [H] and [H] per row
  ScanBackwardScratch<T>* samples;
  CellBackwardBlock(Arena& arena, const CellBackward& a, const Sizes<T, CellBackward>& n, int64_t steps)
      : round_ld(padded_columns<T>(n.K)), hidden_ld(padded_columns<T>(a.H)),
        grad_round(arena.take<T>(block_rows * round_ld)), grad_hidden(arena.take<T>(block_rows * hidden_ld)),
        grad_cell(arena.take<T>(block_rows * a.H)), samples(arena.take<ScanBackwardScratch<T>>(block_rows)) {
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
void cell_backward_block(const CellBackward& a, const Sizes<T, CellBackward>& n, const Packed<T>& recurrent,
                         const Packed<T>& head, Range samples, CellBackwardBlock<T>& s) {
  const int64_t rows = samples.hi - samples.lo, H = a.H, N = a.N, D = a.D, R = a.R, every = a.anchor_every;
  const Parallel alone = {1, nullptr};
  const auto row_of = [](const void* from, int64_t row, int64_t size) {
    return from == nullptr ? nullptr : static_cast<const T*>(from) + row * size;
  };
  std::memset(s.grad_round, 0, block_rows * s.round_ld * sizeof(T));
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t b = samples.lo + m;
    if (a.grad_cell) std::memcpy(s.grad_cell + m * H, row_of(a.grad_cell, b, H), H * sizeof(T));
    else std::memset(s.grad_cell + m * H, 0, H * sizeof(T));
    begin_backward(n.scan, row_of(a.grad_memory, b, N * D), row_of(a.grad_read_weights, b, R * N), alone, s.samples[m]);
  }
  for (int64_t start = a.T > 0 ? (a.T - 1) / every * every : -1; start >= 0; start -= every) {
    const int64_t steps = a.T - start < every ? a.T - start : every;
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t b = samples.lo + m;
      ScanBackwardScratch<T>& memory = s.samples[m];
      const T* anchor = start == 0 ? nullptr : row_of(a.anchors, (start / every - 1) * a.B + b, (D + R) * n.scan.ld);
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
      product<T>(row_of(a.grad_heads, first, n.heads), n.heads, rows, head, s.grad_hidden, s.hidden_ld);
      for (int64_t m = 0; m < rows; ++m) {
        const int64_t row = first + m;
        lstm_backward<T>(H, row_of(a.kept_gates, row, n.G), row_of(a.kept_cells, row, H),
                         t > 0 ? row_of(a.kept_cells, row - a.B, H) : row_of(a.cell, samples.lo + m, H),
                         s.grad_round + m * s.round_ld, s.grad_hidden + m * s.hidden_ld, s.grad_cell + m * H,
                         static_cast<T*>(a.grad_gates) + row * n.G);
      }
      product<T>(row_of(a.grad_gates, first, n.G), n.G, rows, recurrent, s.grad_round, s.round_ld);
    }
  }
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t b = samples.lo + m;
    const T* round = s.grad_round + m * s.round_ld;
    std::memcpy(static_cast<T*>(a.grad_hidden) + b * H, round, H * sizeof(T));
    std::memcpy(static_cast<T*>(a.grad_reads) + b * n.RD, round + H, n.RD * sizeof(T));
    std::memcpy(static_cast<T*>(a.grad_in_cell) + b * H, s.grad_cell + m * H, H * sizeof(T));
    end_backward(n.scan, static_cast<T*>(a.grad_in_memory) + b * N * D,
                 static_cast<T*>(a.grad_in_read_weights) + b * R * N, alone, s.samples[m]);
  }
}

template <class T>
bool cell_backward(const CellBackward& a, const Parallel& parallel) {
  const Sizes<T, CellBackward> n(a);
  Arena size;
  Packed<T>(size, n.G, n.K), Packed<T>(size, n.heads, a.H);
  const Scratch scratch(size.used());
  if (scratch.data() == nullptr) return false;
  Arena arena(scratch.data());
  const Packed<T> recurrent(arena, n.G, n.K), head(arena, n.heads, a.H);
  pack_panels<T>(parallel, recurrent, [&](int64_t p) {
    recurrent.pack_columns(p, {0, a.H}, static_cast<const T*>(a.hidden_weight), a.H);
    recurrent.pack_columns(p, {a.H, n.K}, static_cast<const T*>(a.reads_weight), a.reads_weight_ld);
  });
  pack_panels<T>(parallel, head, [&](int64_t p) {
    head.pack_columns(p, {0, a.H}, static_cast<const T*>(a.head_weight), a.H);
  });
  const int64_t steps = a.T < a.anchor_every ? a.T : a.anchor_every;
  const double step = static_cast<double>(n.K * n.G + a.H * n.heads + a.N * a.D * (8 * a.R + 2));
  return run_blocks<T>(
      a, parallel, static_cast<double>(a.T * a.B) * step,
      [&](Arena& arena) { return CellBackwardBlock<T>(arena, a, n, steps); },
      [&](Range samples, CellBackwardBlock<T>& s) { cell_backward_block<T>(a, n, recurrent, head, samples, s); });
}

bool forward_any(const Cell& a, const Parallel& parallel) {
  return a.dtype == Dtype::float64 ? cell<double>(a, parallel) : cell<float>(a, parallel);
}
bool backward_any(const CellBackward& a, const Parallel& parallel) {
  return a.dtype == Dtype::float64 ? cell_backward<double>(a, parallel) : cell_backward<float>(a, parallel);
}

}  // namespace

extern const CellKernels cell_kernels;
const CellKernels cell_kernels = {forward_any, backward_any};

}  // namespace MANN_FAST_ISA
}  // namespace mann_fast

// A whole MANN sequence: controller, heads, and memory for all T steps in one call, forward and backward.
//
// The input's part of the controller comes in ready, one product for all steps. What is left of the controller's product
// depends on the step before; it is taken for a block of a few samples at a time on packed weights (products.h). The memory is
// a template's argument: lrua_cell.h says what one must provide. Blocks know nothing of one another: a thread takes its block
// through all steps. Where samples have lengths, blocks are made of samples of much the same length, the longest first: of the
// rows of a block those that still run are always the first ones.
// Backward hands out the gradients of the gates and of the heads for all steps, so that the gradient of every weight is one
// large product after it.
#include <unistd.h>

#include "controller.h"
#include "dnc_cell.h"
#include "lrua_cell.h"
#include "ntm_cell.h"
#include "products.h"
#include "sparse_cell.h"

namespace mann_fast {
namespace MANN_FAST_ISA {
namespace {

// How much scratch the samples of a block may have, but for one. A block goes round in it at every step. Products take least time
// with as many rows as they can have; but a DNC's backward, which has the links of several steps there, is faster with 4 samples
// than with 8 where the second-level cache has 1 MB (at the paper's size; with 2 MB 8 are faster).
inline size_t block_scratch() {
  static const size_t bytes = [] {  // once: a virtual machine takes its time to tell
    long cache = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
    cache = sysconf(_SC_LEVEL2_CACHE_SIZE);  // 0 or less where nobody knows
#endif
    return 6 * static_cast<size_t>(cache > 0 ? cache : 1 << 20);
  }();
  return bytes;
}

// Forward and backward's common sizes. K numbers go round: the hidden state and the reads.
struct Sizes {
  int64_t RD, K, G, kept, block;  // block: how many samples a block may have
  template <class Memory>
  explicit Sizes(const Memory& memory)
      : RD(memory.a.R * memory.a.D), K(memory.a.H + RD), G(gates_per_unit(memory.a.controller) * memory.a.H),
        kept(kept_per_unit(memory.a.controller) * memory.a.H), block(block_rows) {
    Arena size, common;
    memory.scratch(size, common);
    while (block > 1 && static_cast<size_t>(block) * size.used() > block_scratch()) --block;
  }
};

// The samples in the order in which blocks take them.
class Order {
 public:
  Order(Arena& arena, const Sequences& sequences, int64_t T, int64_t B)
      : samples_(sequences.lengths ? arena.take<int64_t>(B) : nullptr),
        counts_(sequences.lengths ? arena.take<int64_t>(T + 1) : nullptr) {}
  // By length, the greatest first.
  void sort(const Sequences& sequences, int64_t T, int64_t B) const {
    if (samples_ == nullptr) return;
    std::memset(counts_, 0, (T + 1) * sizeof(int64_t));
    for (int64_t b = 0; b < B; ++b) ++counts_[T - sequences.length(T, b)];
    for (int64_t i = 0, place = 0; i <= T; ++i) {
      const int64_t count = counts_[i];
      counts_[i] = place;
      place += count;
    }
    for (int64_t b = 0; b < B; ++b) samples_[counts_[T - sequences.length(T, b)]++] = b;
  }
  int64_t operator[](int64_t i) const { return samples_ == nullptr ? i : samples_[i]; }

 private:
  int64_t *samples_, *counts_;
};

// The samples of a block, and how many of them take part in a step.
struct Rows {
  int64_t count, b[block_rows], length[block_rows];
  Rows(const Order& order, Range samples, const Sequences& sequences, int64_t T) : count(samples.hi - samples.lo) {
    for (int64_t m = 0; m < count; ++m) {
      b[m] = order[samples.lo + m];
      length[m] = sequences.length(T, b[m]);
    }
  }
  int64_t longest() const { return length[0]; }
  int64_t active(int64_t t) const {
    int64_t rows = count;
    while (rows > 0 && length[rows - 1] <= t) --rows;
    return rows;
  }
};

// Blocks of at most so many samples (rows), as many for each thread; run(block, samples, scratch) for each.
template <class T, class Arguments, class Blockpad, class Run>
bool run_blocks(const Arguments& a, int64_t rows, const Parallel& parallel, double work, Blockpad blockpad, Run run) {
  const int64_t threads = worthwhile_tasks(parallel, a.B, work);
  int64_t blocks = (a.B + rows - 1) / rows;
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

template <class T>
struct Shared {  // by all blocks
  Weights<T> weights;
  Order order;
};

// Those with many slots may use the threads for one sample.
template <class Memory, class Arguments>
Memory memory_of(const Arguments& a, const Parallel& parallel) {
  if constexpr (std::is_constructible_v<Memory, const Arguments&, const Parallel&>) return Memory(a, parallel);
  else return Memory(a);
}

// The scratch arrays of a block's samples. What no step leaves to the next they have in common, so that it stays in the first
// cache, and what goes round in the second is less.
template <class Memory>
typename Memory::Scratch* take_samples(Arena& arena, const Sizes& n, const Memory& memory) {
  auto* samples = arena.take<typename Memory::Scratch>(n.block);
  Arena size, end = arena;
  memory.scratch(size, end);
  const Arena common = arena;
  arena = end;
  for (int64_t m = 0; m < n.block; ++m) {
    Arena again = common;
    const auto sample = memory.scratch(arena, again);
    if (samples != nullptr) samples[m] = sample;
  }
  return samples;
}

// ---- forward ----------------------------------------------------------------------------------------------------

template <class T, class Memory>
struct ForwardBlock {  // of one block; rows side by side
  int64_t gates_ld, heads_ld;
  T *round, *cell, *of_reads, *of_hidden, *heads;  // [K]: hidden state and reads; [H]; parts of the gates [G]; head values
  T* room;                                         // for rounded products
  typename Memory::Scratch* samples;
  template <class Arguments>
  ForwardBlock(Arena& arena, const Arguments& a, const Sizes& n, const Memory& memory)
      : gates_ld(padded<T>(n.G + width<T>)),  // a gate's last vector reaches into what comes after it
        heads_ld(padded<T>(memory.heads)), round(arena.take<T>(block_rows * n.K)), cell(arena.take<T>(block_rows * a.H)),
        of_reads(arena.take<T>(block_rows * gates_ld)), of_hidden(arena.take<T>(block_rows * gates_ld)),
        heads(arena.take<T>(block_rows * heads_ld)), room(arena.take<T>(a.bfloat16 ? rounded_numbers(n.K) : 0)),
        samples(take_samples(arena, n, memory)) {}
};

template <class T, class Memory, class Arguments>
void forward_block(const Arguments& a, const Sizes& n, const Memory& memory, const Weights<T>& weights, const Rows& block,
                   ForwardBlock<T, Memory>& s) {
  const int64_t H = a.H;
  const bool keeps = a.anchor_every > 0;
  const T* head_bias = static_cast<const T*>(a.head_bias);
  for (int64_t m = 0; m < block.count; ++m) {
    const int64_t b = block.b[m];
    if (a.hidden) std::memcpy(s.round + m * n.K, static_cast<const T*>(a.hidden) + b * H, H * sizeof(T));
    std::memcpy(s.round + m * n.K + H, static_cast<const T*>(a.reads) + b * n.RD, n.RD * sizeof(T));
    if (a.cell) std::memcpy(s.cell + m * H, static_cast<const T*>(a.cell) + b * H, H * sizeof(T));
    memory.begin(b, s.samples[m]);
  }
  for (int64_t t = 0; t < block.longest(); ++t) {
    const int64_t rows = block.active(t);
    for (int64_t m = 0; m < rows; ++m) {
      if (!a.sequences.begins(t, a.B, block.b[m])) continue;
      std::memset(s.round + m * n.K, 0, n.K * sizeof(T));
      std::memset(s.cell + m * H, 0, H * sizeof(T));
      memory.restart(s.samples[m]);
    }
    weights.times(s.round + H, n.K, rows, weights.of_reads, s.of_reads, s.gates_ld, s.room);
    if (a.hidden) weights.times(s.round, n.K, rows, weights.of_hidden, s.of_hidden, s.gates_ld, s.room);
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t row = t * a.B + block.b[m];
      const GateParts<T> gate = {H, static_cast<const T*>(a.gates) + row * n.G, s.of_reads + m * s.gates_ld,
                                 s.of_hidden + m * s.gates_ld, static_cast<const T*>(a.hidden_bias)};
      T* hidden = s.round + m * n.K;
      T* kept = keeps ? static_cast<T*>(a.kept_gates) + row * n.kept : nullptr;
      T* kept_state = keeps && a.hidden ? static_cast<T*>(a.kept_states) + row * H : nullptr;
      switch (a.controller) {
        case Controller::lstm: lstm(gate, s.cell + m * H, hidden, kept, kept_state); break;
        case Controller::gru: gru(gate, hidden, kept, kept_state); break;
        case Controller::feedforward: feedforward(gate, hidden, kept); break;
      }
    }
    weights.times(s.round, n.K, rows, weights.head, s.heads, s.heads_ld, s.room);
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t row = t * a.B + block.b[m];
      T* raw = s.heads + m * s.heads_ld;
      for (int64_t j = 0; j < memory.heads; j += width<T>)
        store(raw + j, load(raw + j) + load_some(head_bias + j, memory.heads - j));
      T* values = keeps ? static_cast<T*>(a.kept_heads) + row * memory.heads : raw;
      for (int64_t j = 0; j < memory.squashed; j += width<T>)
        store_some(values + j, hyperbolic_tangent<T>(load(raw + j)), memory.squashed - j);
      if (values != raw)
        std::memcpy(values + memory.squashed, raw + memory.squashed, (memory.heads - memory.squashed) * sizeof(T));
      memory.step(t, block.b[m], values, s.samples[m]);
      std::memcpy(s.round + m * n.K + H, s.samples[m].reads, n.RD * sizeof(T));
      std::memcpy(static_cast<T*>(a.output) + row * n.K, s.round + m * n.K, n.K * sizeof(T));
    }
  }
  for (int64_t m = 0; m < block.count; ++m) {
    const int64_t b = block.b[m];
    clear_steps<T>(a.output, a.state, block.length[m], a.T, a.B, b, n.K);
    if (a.hidden) std::memcpy(static_cast<T*>(a.out_hidden) + b * H, s.round + m * n.K, H * sizeof(T));
    std::memcpy(static_cast<T*>(a.out_reads) + b * n.RD, s.round + m * n.K + H, n.RD * sizeof(T));
    if (a.cell) std::memcpy(static_cast<T*>(a.out_cell) + b * H, s.cell + m * H, H * sizeof(T));
    memory.end(b, s.samples[m]);
  }
}

template <class T, class Memory, class Arguments>
bool forward(const Arguments& a, const Parallel& parallel) {
  const Memory memory = memory_of<Memory>(a, parallel);
  const Sizes n(memory);
  const auto layout = [&](Arena& arena) {
    return Shared<T>{{{arena, a.hidden ? a.H : 0, n.G}, {arena, n.RD, n.G}, {arena, a.H, memory.heads}, a.bfloat16},
                     {arena, a.sequences, a.T, a.B}};
  };
  Arena size;
  layout(size);
  const Scratch scratch(size.used());
  if (scratch.data() == nullptr) return false;
  Arena arena(scratch.data());
  const auto [weights, order] = layout(arena);
  order.sort(a.sequences, a.T, a.B);
  if (a.hidden) pack_transposed(parallel, weights.of_hidden, static_cast<const T*>(a.hidden_weight), a.H);
  pack_transposed(parallel, weights.of_reads, static_cast<const T*>(a.reads_weight), a.reads_weight_ld);
  pack_transposed(parallel, weights.head, static_cast<const T*>(a.head_weight), a.H);
  weights.round(parallel);
  const double step = static_cast<double>(n.K * n.G + a.H * memory.heads + memory.multiply_adds());
  return run_blocks<T>(
      a, n.block, parallel, static_cast<double>(a.T * a.B) * step,
      [&](Arena& arena) { return ForwardBlock<T, Memory>(arena, a, n, memory); },
      [&, &weights = weights, &order = order](Range samples, ForwardBlock<T, Memory>& s) {
        forward_block(a, n, memory, weights, Rows(order, samples, a.sequences, a.T), s);
      });
}

// ---- backward ---------------------------------------------------------------------------------------------------

template <class T, class Memory>
struct BackwardBlock {
  int64_t round_ld, hidden_ld;
  // Of the hidden state and reads [K]; of the hidden state through the heads [H]; of the cell, or what of the hidden state's
  // gradient passes a GRU by [H].
  T *grad_round, *grad_hidden, *grad_state;
  T *grad_heads, *grad_gates, *grad_hidden_gates;  // of the step, before they are handed out; rows side by side
  T* zeros;                                        // [H], the state before the first step of a sample that begins anew
  T* room;                                         // for rounded products
  typename Memory::Scratch* samples;
  template <class Arguments>
  BackwardBlock(Arena& arena, const Arguments& a, const Sizes& n, const Memory& memory)
      : round_ld(a.H + padded<T>(n.RD) + width<T>), hidden_ld(padded<T>(a.H)), grad_round(arena.take<T>(block_rows * round_ld)),
        grad_hidden(arena.take<T>(block_rows * hidden_ld)), grad_state(arena.take<T>(block_rows * a.H)),
        grad_heads(arena.take<T>(block_rows * memory.heads)), grad_gates(arena.take<T>(block_rows * n.G)),
        grad_hidden_gates(arena.take<T>(a.grad_hidden_gates ? block_rows * n.G : 0)), zeros(arena.take<T>(a.H)),
        room(arena.take<T>(a.bfloat16 ? rounded_numbers(n.G > memory.heads ? n.G : memory.heads) : 0)),
        samples(take_samples(arena, n, memory)) {}
};

template <class T, class Memory, class Arguments>
void backward_block(const Arguments& a, const Sizes& n, const Memory& memory, const Weights<T>& weights, const Rows& block,
                    BackwardBlock<T, Memory>& s) {
  const int64_t H = a.H, heads = memory.heads;
  const auto row_of = [](const void* from, int64_t row, int64_t size) {
    return from == nullptr ? nullptr : static_cast<const T*>(from) + row * size;
  };
  const auto copy = [](void* to, int64_t row, const T* from, int64_t size) {
    std::memcpy(static_cast<T*>(to) + row * size, from, size * sizeof(T));
  };
  std::memset(s.grad_round, 0, block_rows * s.round_ld * sizeof(T));
  std::memset(s.grad_state, 0, block_rows * H * sizeof(T));
  std::memset(s.zeros, 0, H * sizeof(T));
  int64_t replayed[block_rows];  // from which step on
  for (int64_t m = 0; m < block.count; ++m) {
    const int64_t b = block.b[m];
    T* round = s.grad_round + m * s.round_ld;
    if (a.grad_hidden) std::memcpy(round, row_of(a.grad_hidden, b, H), H * sizeof(T));
    if (a.grad_reads) std::memcpy(round + H, row_of(a.grad_reads, b, n.RD), n.RD * sizeof(T));
    if (a.grad_cell) std::memcpy(s.grad_state + m * H, row_of(a.grad_cell, b, H), H * sizeof(T));
    memory.begin(b, s.samples[m]);
    replayed[m] = block.length[m];
  }
  for (int64_t t = block.longest() - 1; t >= 0; --t) {
    const int64_t rows = block.active(t);
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t b = block.b[m], row = t * a.B + b;
      if (t < replayed[m]) {
        replayed[m] = a.sequences.replay_from(t, a.anchor_every, a.B, b);
        memory.replay(replayed[m], t + 1, b, s.samples[m]);
      }
      T *round = s.grad_round + m * s.round_ld, *grad_heads = s.grad_heads + m * heads;
      if (const T* grad = row_of(a.grad_output, row, n.K))
        for (int64_t j = 0; j < n.K; ++j) round[j] += grad[j];
      memory.step(replayed[m], t - replayed[m], b, row_of(a.kept_heads, row, heads), round + H, grad_heads, s.samples[m]);
      copy(a.grad_heads, row, grad_heads, heads);
    }
    weights.times(s.grad_heads, heads, rows, weights.head, s.grad_hidden, s.hidden_ld, s.room);
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t b = block.b[m], row = t * a.B + b;
      const T* kept = row_of(a.kept_gates, row, n.kept);
      const T *round = s.grad_round + m * s.round_ld, *more = s.grad_hidden + m * s.hidden_ld;
      const void* first_state = a.controller == Controller::lstm ? a.cell : a.hidden;
      const T* before = a.sequences.begins(t, a.B, b) ? s.zeros
                        : t > 0                       ? row_of(a.kept_states, row - a.B, H)
                                                      : row_of(first_state, b, H);
      T *state = s.grad_state + m * H, *gates = s.grad_gates + m * n.G;
      switch (a.controller) {
        case Controller::lstm:
          lstm_backward<T>(H, kept, row_of(a.kept_states, row, H), before, round, more, state, gates);
          break;
        case Controller::gru:
          gru_backward<T>(H, kept, before, round, more, state, gates, s.grad_hidden_gates + m * n.G);
          copy(a.grad_hidden_gates, row, s.grad_hidden_gates + m * n.G, n.G);
          break;
        case Controller::feedforward: feedforward_backward<T>(H, kept, round, more, gates); break;
      }
      copy(a.grad_gates, row, gates, n.G);
    }
    // The padding of the first product's columns is overwritten by the second.
    if (a.hidden)
      weights.times(a.grad_hidden_gates ? s.grad_hidden_gates : s.grad_gates, n.G, rows, weights.of_hidden, s.grad_round,
                    s.round_ld, s.room);
    else
      for (int64_t m = 0; m < rows; ++m) std::memset(s.grad_round + m * s.round_ld, 0, H * sizeof(T));
    weights.times(s.grad_gates, n.G, rows, weights.of_reads, s.grad_round + H, s.round_ld, s.room);
    for (int64_t m = 0; m < rows; ++m) {
      if (!a.sequences.begins(t, a.B, block.b[m])) continue;
      std::memset(s.grad_round + m * s.round_ld, 0, s.round_ld * sizeof(T));
      std::memset(s.grad_state + m * H, 0, H * sizeof(T));
      memory.back_to_start(block.b[m], s.samples[m]);
    }
  }
  for (int64_t m = 0; m < block.count; ++m) {
    const int64_t b = block.b[m];
    const T* round = s.grad_round + m * s.round_ld;
    if (a.hidden) {
      T* grad_hidden = static_cast<T*>(a.grad_in_hidden) + b * H;
      std::memcpy(grad_hidden, round, H * sizeof(T));
      if (a.controller == Controller::gru)
        for (int64_t i = 0; i < H; ++i) grad_hidden[i] += s.grad_state[m * H + i];
    }
    copy(a.grad_in_reads, b, round + H, n.RD);
    if (a.cell) copy(a.grad_in_cell, b, s.grad_state + m * H, H);
    memory.end(b, s.samples[m]);
    for (void* grad : {a.grad_gates, a.grad_hidden_gates}) clear_steps<T>(grad, a.state, block.length[m], a.T, a.B, b, n.G);
    clear_steps<T>(a.grad_heads, a.state, block.length[m], a.T, a.B, b, heads);
  }
}

template <class T, class Memory, class Arguments>
bool backward(const Arguments& a, const Parallel& parallel) {
  const Memory memory = memory_of<Memory>(a, parallel);
  const Sizes n(memory);
  const auto layout = [&](Arena& arena) {
    return Shared<T>{{{arena, n.G, a.hidden ? a.H : 0}, {arena, n.G, n.RD}, {arena, memory.heads, a.H}, a.bfloat16},
                     {arena, a.sequences, a.T, a.B}};
  };
  Arena size;
  layout(size);
  const Scratch scratch(size.used());
  if (scratch.data() == nullptr) return false;
  Arena arena(scratch.data());
  const auto [weights, order] = layout(arena);
  order.sort(a.sequences, a.T, a.B);
  if (a.hidden) pack(parallel, weights.of_hidden, static_cast<const T*>(a.hidden_weight), a.H);
  pack(parallel, weights.of_reads, static_cast<const T*>(a.reads_weight), a.reads_weight_ld);
  pack(parallel, weights.head, static_cast<const T*>(a.head_weight), a.H);
  weights.round(parallel);
  const double step = static_cast<double>(n.K * n.G + a.H * memory.heads + memory.multiply_adds());
  return run_blocks<T>(
      a, n.block, parallel, static_cast<double>(a.T * a.B) * step,
      [&](Arena& arena) { return BackwardBlock<T, Memory>(arena, a, n, memory); },
      [&, &weights = weights, &order = order](Range samples, BackwardBlock<T, Memory>& s) {
        backward_block(a, n, memory, weights, Rows(order, samples, a.sequences, a.T), s);
      });
}

// ---- with the LRUA memory ---------------------------------------------------------------------------------------------

template <class T>
bool cell(const Cell& a, const Parallel& parallel) {
  return forward<T, LruaForward<T>>(a, parallel);
}
template <class T>
bool cell_backward(const CellBackward& a, const Parallel& parallel) {
  return backward<T, LruaBackward<T>>(a, parallel);
}

// ---- with a Neural Turing Machine's -----------------------------------------------------------------------------------

template <class T>
bool ntm_cell(const NtmCell& a, const Parallel& parallel) {
  return forward<T, NtmForward<T>>(a, parallel);
}
template <class T>
bool ntm_cell_backward(const NtmCellBackward& a, const Parallel& parallel) {
  return backward<T, NtmBackward<T>>(a, parallel);
}

// ---- with a Differentiable Neural Computer's --------------------------------------------------------------------------

template <class T>
bool dnc_cell(const DncCell& a, const Parallel& parallel) {
  return forward<T, DncForward<T>>(a, parallel);
}
template <class T>
bool dnc_cell_backward(DncCellBackward a, const Parallel& parallel) {
  a.anchor_every = replay_every(a.T);  // its anchors are made in backward
  return backward<T, DncBackward<T>>(a, parallel);
}

// ---- with sparse access -----------------------------------------------------------------------------------------------

template <class T>
bool sparse_cell(const SparseCell& a, const Parallel& parallel) {
  return forward<T, SparseForward<T>>(a, parallel);
}
template <class T>
bool sparse_cell_backward(SparseCellBackward a, const Parallel& parallel) {
  a.anchor_every = 1;  // it replays nothing
  return backward<T, SparseBackward<T>>(a, parallel);
}

}  // namespace

MANN_FAST_CELL_OPS(MANN_FAST_BY_DTYPE)
MANN_FAST_SPARSE_CELL_OPS(MANN_FAST_BY_DTYPE)

}  // namespace MANN_FAST_ISA
}  // namespace mann_fast

// One step of a Neural Turing Machine's memory for one sample, forward and backward: what ntm_scan and ntm_cell share.
//
// The sample's memory is held in cache through all T steps, slots in lanes, as in lrua_step.h. An erase cannot be undone where
// weight times erase nears 1, so backward never divides: it replays the writes, whose weights are remaining, from a memory saved
// every so many steps, and goes back through the replayed memories.
#pragma once
#include "blocks.h"

namespace mann_fast {
namespace {

template <class T>
struct NtmSizes {
  int64_t N, D, R, W, heads, shifts, ld;  // heads: R that read, then W that write
  int64_t reach, lead, ring_ld;           // how far a shift goes; of a ring: where its slots begin, and its length
  T eps;
  template <class Arguments>
  explicit NtmSizes(const Arguments& a)
      : N(a.N), D(a.D), R(a.R), W(a.W), heads(a.R + a.W), shifts(a.shifts), ld(padded_slots(a.N)), reach(a.shifts / 2),
        lead(padded<T>(reach)), ring_ld(lead + ld + lead), eps(static_cast<T>(a.eps)) {}
};

template <class T>
struct NtmInputs {  // of one sample and step
  const T *key, *sharpness, *gate, *shift, *sharpening, *erase, *add;
  T *buffers[7], *key_square;
  NtmInputs(Arena& arena, const NtmSizes<T>& n) : key_square(arena.take<T>(n.heads)) {
    const int64_t counts[] = {n.heads * n.D, n.heads, n.heads, n.heads * n.shifts, n.heads, n.W * n.D, n.W * n.D};
    for (int i = 0; i < 7; ++i) buffers[i] = arena.take<T>(counts[i]);
  }
  template <class Arguments>
  void load(const Arguments& a, const NtmSizes<T>& n, int64_t row) {
    const auto take = [&](const void* from, int64_t count, T* buffer) {
      return widen(from, a.input, row * count, count, buffer);
    };
    key = take(a.keys, n.heads * n.D, buffers[0]);
    sharpness = take(a.sharpness, n.heads, buffers[1]);
    gate = take(a.gates, n.heads, buffers[2]);
    shift = take(a.shift, n.heads * n.shifts, buffers[3]);
    sharpening = take(a.sharpening, n.heads, buffers[4]);
    erase = take(a.erase, n.W * n.D, buffers[5]);
    add = take(a.add, n.W * n.D, buffers[6]);
    for (int64_t h = 0; h < n.heads; ++h) key_square[h] = square_sum(key + h * n.D, n.D);
  }
};

// ---- addressing -----------------------------------------------------------------------------------------------------

// Rows [R+W][ld]: what backward goes through again.
template <class T>
struct Address {
  T *dots, *q, *by_content, *relative, *weights;
  T* gated;    // [R+W][ring_ld], rings
  T* squares;  // [2][ld], of the memory before the write and, where the read comes after it, of that after it
  T* maximum;  // [R+W], of the shifted weights
  Address(Arena& arena, const NtmSizes<T>& n)
      : dots(arena.take<T>(n.heads * n.ld)), q(arena.take<T>(n.heads * n.ld)), by_content(arena.take<T>(n.heads * n.ld)),
        relative(arena.take<T>(n.heads * n.ld)), weights(arena.take<T>(n.heads * n.ld)),
        gated(arena.take<T>(n.heads * n.ring_ld)), squares(arena.take<T>(2 * n.ld)), maximum(arena.take<T>(n.heads)) {}
};

// A ring is a row of slots that has on both sides those which a shift brings round: slot k mod N also where k is outside. The
// lanes that no shift brings to a slot are 0.
template <class T>
void close_ring(const NtmSizes<T>& n, T* ring) {
  T* slots = ring + n.lead;
  for (int64_t i = n.N; i < n.ld + n.lead; ++i) slots[i] = 0;
  for (int64_t k = 0; k < n.reach; ++k) {
    slots[n.N + k] = slots[k % n.N];
    slots[-1 - k] = slots[n.N - 1 - k % n.N];
  }
}

// Heads [first, first + count) compared with the slots of a memory.
template <class T>
void compare(const NtmSizes<T>& n, const NtmInputs<T>& in, const T* memory, int64_t first, int64_t count, T* squares,
             Address<T>& x) {
  dot_and_square_slots(memory, n.ld, n.ld, n.D, count, in.key + first * n.D, x.dots + first * n.ld, squares);
}

// From the comparison of head h to its shifted weights, relative to the greatest of them: all of the addressing but the
// sharpening, from the weights of the step before.
template <class T>
void shift_weights(const NtmSizes<T>& n, const NtmInputs<T>& in, const T* previous, int64_t h, const T* squares,
                   Address<T>& x) {
  const int64_t row = h * n.ld;
  T *content = x.by_content + row, *ring = x.gated + h * n.ring_ld, *gated = ring + n.lead, *relative = x.relative + row;
  const T maximum =
      score_slots<T>(x.dots + row, squares, n.ld, n.N, in.key_square[h], in.sharpness[h], n.eps, x.q + row, content);
  const T scale = T(1) / exp_slots(content, n.ld, maximum), gate = in.gate[h];
  for (int64_t i = 0; i < n.ld; i += width<T>) {
    const Vec<T> weight = load(content + i) * scale;
    store(content + i, weight);
    store(gated + i, weight * gate + load(previous + row + i) * (T(1) - gate));
  }
  close_ring(n, ring);
  const T* shift = in.shift + h * n.shifts + n.reach;
  for (int64_t i = 0; i < n.ld; i += width<T>) {
    Vec<T> sum{};
    for (int64_t j = -n.reach; j <= n.reach; ++j) sum += load(gated + i - j) * shift[j];
    store(relative + i, sum);
  }
  for (int64_t i = n.N; i < n.ld; ++i) relative[i] = 0;
  const T most = greatest_of_row(relative, n.ld);
  x.maximum[h] = most;
  // Divided: so the greatest is exactly 1, to any power, also an infinite one.
  for (int64_t i = 0; i < n.ld; i += width<T>) store(relative + i, load(relative + i) / most);
}

// The weights of heads [first, first + count) on a memory that they have been compared with.
template <class T>
void address(const NtmSizes<T>& n, const NtmInputs<T>& in, const T* previous, int64_t first, int64_t count, const T* squares,
             Address<T>& x) {
  for (int64_t h = first; h < first + count; ++h) {
    shift_weights(n, in, previous, h, squares, x);
    const T* relative = x.relative + h * n.ld;
    T* weights = x.weights + h * n.ld;
    Vec<T> total{};
    for (int64_t i = 0; i < n.ld; i += width<T>) {
      const Vec<T> u = load(relative + i), p = power(u, log_of_share<T>(u), in.sharpening[h]);
      store(weights + i, p);
      total += p;
    }
    scale_slots(weights, n.ld, T(1) / sum_lanes<T>(total));
  }
}

// to = from * product over heads of (1 - weights[w] * erase[w]), and with ADD + sum of weights[w] * add[w]; from and to may be the
// same.
template <class T, int HEADS, int U, bool ADD>
void erase_columns(const NtmSizes<T>& n, const T* weights, const T* erase, const T* add, const T* from, T* to, int64_t i) {
  Vec<T> weight[HEADS][U];
  for (int w = 0; w < HEADS; ++w)
    for (int u = 0; u < U; ++u) weight[w][u] = load(weights + w * n.ld + i + u * width<T>);
  for (int64_t d = 0; d < n.D; ++d)
    for (int u = 0; u < U; ++u) {
      const int64_t place = d * n.ld + i + u * width<T>;
      Vec<T> m = load(from + place);
      for (int w = 0; w < HEADS; ++w) m *= T(1) - weight[w][u] * erase[w * n.D + d];
      for (int w = 0; ADD && w < HEADS; ++w) m += weight[w][u] * add[w * n.D + d];
      store(to + place, m);
    }
}
template <class T, int HEADS, bool ADD>
void erase_heads(const NtmSizes<T>& n, const T* weights, const T* erase, const T* add, const T* from, T* to) {
  constexpr int U = vector_registers == 32 ? 2 : 1;
  int64_t i = 0;
  for (; i + U * width<T> <= n.ld; i += U * width<T>) erase_columns<T, HEADS, U, ADD>(n, weights, erase, add, from, to, i);
  for (; i < n.ld; i += width<T>) erase_columns<T, HEADS, 1, ADD>(n, weights, erase, add, from, to, i);
}

// The write: all heads erase, then all add. One pass where they fit one group, else one per group and kind.
template <class T>
void erase_and_add(const NtmSizes<T>& n, const T* weights, const T* erase, const T* add, const T* from, T* to) {
  if (n.W == 0 && from != to) std::memcpy(to, from, n.D * n.ld * sizeof(T));
  const bool together = n.W <= 4;
  for_heads<T>(n.W, [&](int64_t w, auto group) {
    const T* source = w == 0 ? from : to;
    if (together) erase_heads<T, group, true>(n, weights, erase, add, source, to);
    else erase_heads<T, group, false>(n, weights + w * n.ld, erase + w * n.D, add, source, to);
  });
  if (!together) write_slots(static_cast<const T*>(to), to, n.ld, n.ld, n.D, n.W, weights, add);
}

// ---- forward --------------------------------------------------------------------------------------------------------

template <class T>
struct NtmScratch {
  T *memory, *previous;  // from step to step; all else is of one step
  NtmInputs<T> in;
  Address<T> x;
  T* reads;
  NtmScratch(Arena& own, Arena& common, const NtmSizes<T>& n)
      : memory(own.take<T>(n.D * n.ld)), previous(own.take<T>(n.heads * n.ld)), in(common, n), x(common, n),
        reads(common.take<T>(n.R * n.D)) {}
};

// One step with the inputs in s.in, from the weights in s.previous: the reads come to lie in s.reads, the new weights in s.previous
// too. The memory as it was before the step goes to `anchor`, unless that is null.
template <class T>
void ntm_step(const NtmSizes<T>& n, bool read_first, T* anchor, NtmScratch<T>& s) {
  const T *memory = s.memory, *previous = s.previous;
  T *before = s.x.squares, *after = before + n.ld;
  const auto read = [&] {
    address(n, s.in, previous, 0, n.R, read_first ? before : after, s.x);
    weighted_sums<T, false>(memory, n.ld, n.ld, n.D, n.R, s.x.weights, s.reads);
  };
  if (anchor != nullptr) std::memcpy(anchor, memory, n.D * n.ld * sizeof(T));
  compare(n, s.in, memory, read_first ? 0 : n.R, read_first ? n.heads : n.W, before, s.x);
  address(n, s.in, previous, n.R, n.W, before, s.x);
  if (read_first) read();
  erase_and_add(n, s.x.weights + n.R * n.ld, s.in.erase, s.in.add, memory, s.memory);
  if (!read_first) {
    compare(n, s.in, memory, 0, n.R, after, s.x);
    read();
  }
  std::memcpy(s.previous, s.x.weights, n.heads * n.ld * sizeof(T));
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <class T>
struct NtmBackwardScratch {
  // From step to step; grad_weights [R+W][ld] is of the weights that a step comes out with.
  T *memories, *grad_memory, *grad_weights;
  // Of one step:
  NtmInputs<T> in;
  Address<T> x;
  T *previous, *grad_dots, *grad_squares, *grad_read;
  T* ring;  // the gradient of one head's shifted weights
  T *grad_key, *grad_sharpness, *grad_gate, *grad_shift, *grad_sharpening, *grad_erase, *grad_add;
  NtmBackwardScratch(Arena& own, Arena& common, const NtmSizes<T>& n, int64_t steps)
      : memories(own.take<T>((steps + 1) * n.D * n.ld)), grad_memory(own.take<T>(n.D * n.ld)),
        grad_weights(own.take<T>(n.heads * n.ld)), in(common, n), x(common, n), previous(common.take<T>(n.heads * n.ld)),
        grad_dots(common.take<T>(n.heads * n.ld)), grad_squares(common.take<T>(n.ld)), grad_read(common.take<T>(n.R * n.D)),
        ring(common.take<T>(n.ring_ld)), grad_key(common.take<T>(n.heads * n.D)), grad_sharpness(common.take<T>(n.heads)),
        grad_gate(common.take<T>(n.heads)), grad_shift(common.take<T>(n.heads * n.shifts)),
        grad_sharpening(common.take<T>(n.heads)), grad_erase(common.take<T>(n.W * n.D)), grad_add(common.take<T>(n.W * n.D)) {}
};

// Back through the addressing of head h, which s.x has gone through again: from its row of grad_weights to its own gradients and
// those of its comparison with the memory; the row becomes the gradient of its weights at the step before.
template <class T>
void address_backward(const NtmSizes<T>& n, int64_t h, const T* squares, NtmBackwardScratch<T>& s) {
  const NtmInputs<T>& in = s.in;
  const int64_t ld = n.ld, row = h * ld;
  const T *u = s.x.relative + row, *w = s.x.weights + row, *content = s.x.by_content + row, *before = s.previous + row;
  const T *gated = s.x.gated + h * n.ring_ld + n.lead, *shift = in.shift + h * n.shifts + n.reach;
  T *grad = s.grad_weights + row, *of_content = s.grad_dots + row, *of_shifted = s.ring + n.lead;
  // Sharpening: w = u^gamma over its sum. With g - mean, dL/d(u^gamma) is (g - mean) over the sum, so w (g - mean) is
  // u^gamma dL/d(u^gamma), and w / u^gamma the inverse of the sum, the same for all: taken where u is 1.
  const T mean = dot_rows(w, static_cast<const T*>(grad), ld), gamma = in.sharpening[h];
  const T scale = gamma * greatest_of_row(w, ld) / s.x.maximum[h];
  Vec<T> of_gamma{};
  for (int64_t i = 0; i < ld; i += width<T>) {
    const Vec<T> ratio = load(u + i), centred = load(grad + i) - mean, logarithm = log_of_share<T>(ratio);
    of_gamma += load(w + i) * centred * (ratio > T(0) ? logarithm : Vec<T>{});
    store(of_shifted + i, power(ratio, logarithm, gamma - T(1)) * centred * scale);
  }
  s.grad_sharpening[h] = sum_lanes<T>(of_gamma);
  // Shift.
  for (int64_t i = n.N; i < ld; ++i) of_shifted[i] = 0;
  for (int64_t j = -n.reach; j <= n.reach; ++j) {
    Vec<T> sum{};
    for (int64_t i = 0; i < ld; i += width<T>) sum += load(of_shifted + i) * load(gated + i - j);
    s.grad_shift[h * n.shifts + n.reach + j] = sum_lanes<T>(sum);
  }
  close_ring(n, s.ring);
  // Interpolation.
  const T gate = in.gate[h];
  Vec<T> of_gate{};
  for (int64_t i = 0; i < ld; i += width<T>) {
    Vec<T> sum{};
    for (int64_t j = -n.reach; j <= n.reach; ++j) sum += load(of_shifted + i + j) * shift[j];
    of_gate += sum * (load(content + i) - load(before + i));
    store(of_content + i, sum * gate);
    store(grad + i, sum * (T(1) - gate));
  }
  for (int64_t i = n.N; i < ld; ++i) grad[i] = of_content[i] = 0;
  s.grad_gate[h] = sum_lanes<T>(of_gate);
  // Softmax and similarity.
  const T delta = dot_rows(content, static_cast<const T*>(of_content), ld);
  const ScoreGradient<T> score = score_gradient(content, s.x.dots + row, s.x.q + row, squares, ld, delta, in.key_square[h],
                                                in.sharpness[h], of_content, s.grad_squares);
  s.grad_sharpness[h] = score.beta;
  in.key_square[h] = score.key_square;  // the square itself is not needed any more
}

// Back through all that heads [first, first + count) do with a memory: their reads, where grad_read is not null, their addressing
// and their comparison with its slots.
template <class T>
void heads_backward(const NtmSizes<T>& n, const T* memory, const T* squares, int64_t first, int64_t count, const T* grad_read,
                    NtmBackwardScratch<T>& s) {
  const int64_t ld = n.ld, readers = first == 0 && grad_read != nullptr ? n.R : 0;
  dot_slots(memory, ld, ld, n.D, readers, grad_read, s.grad_dots);
  for (int64_t i = 0; i < readers * ld; i += width<T>)
    store(s.grad_weights + i, load(s.grad_weights + i) + load(s.grad_dots + i));
  std::memset(s.grad_squares, 0, ld * sizeof(T));
  for (int64_t h = first; h < first + count; ++h) address_backward(n, h, squares, s);
  weighted_sums<T, false>(memory, ld, ld, n.D, count, s.grad_dots + first * ld, s.grad_key + first * n.D);
  for (int64_t h = first; h < first + count; ++h)
    for (int64_t d = 0; d < n.D; ++d) s.grad_key[h * n.D + d] += 2 * s.in.key_square[h] * s.in.key[h * n.D + d];
  const T *none = nullptr, *grad_squares = s.grad_squares;
  add_gradient<T, true, true>(memory, s.grad_memory, ld, ld, n.D, readers, s.x.weights, grad_read, s.grad_dots, s.in.key,
                              grad_squares);
  const int64_t others = first + readers;
  add_gradient<T, false, true>(memory, s.grad_memory, ld, ld, n.D, first + count - others, none, none,
                               s.grad_dots + others * ld, s.in.key + others * n.D, readers > 0 ? none : grad_squares);
}

// Back through the part of the write heads [first, first + HEADS): the gradients of their weights and erase vectors; with
// LAST grad_memory becomes that of the memory before the write.
template <class T, int HEADS, int ROWS, bool LAST>
void write_rows_backward(const NtmSizes<T>& n, int64_t first, int64_t d, const T* before, NtmBackwardScratch<T>& s) {
  const T* weights = s.x.weights + n.R * n.ld;
  const T *erase = s.in.erase + first * n.D + d, *add = s.in.add + first * n.D + d;
  T* grad_weights = s.grad_weights + (n.R + first) * n.ld;
  Vec<T> of_erase[HEADS][ROWS];
  for (int w = 0; w < HEADS; ++w)
    for (int j = 0; j < ROWS; ++j) of_erase[w][j] = Vec<T>{};
  for (int64_t i = 0; i < n.ld; i += width<T>) {
    Vec<T> weight[HEADS], grad_weight[HEADS];
    for (int w = 0; w < HEADS; ++w) {
      weight[w] = load(weights + (first + w) * n.ld + i);
      grad_weight[w] = load(grad_weights + w * n.ld + i);
    }
    for (int j = 0; j < ROWS; ++j) {
      const int64_t place = (d + j) * n.ld + i;
      const Vec<T> g = load(s.grad_memory + place);
      Vec<T> left = g, kept[HEADS], others[HEADS];
      // What is left by the heads of other groups, then by those before each, and by those after it: nothing is divided.
      const auto pass = [&](int64_t v) { left *= T(1) - load(weights + v * n.ld + i) * s.in.erase[v * n.D + d + j]; };
      for (int64_t v = 0; v < first; ++v) pass(v);
      for (int64_t v = first + HEADS; v < n.W; ++v) pass(v);
      for (int w = 0; w < HEADS; ++w) {
        kept[w] = T(1) - weight[w] * erase[w * n.D + j];
        others[w] = left;
        left *= kept[w];
      }
      Vec<T> right = load(before + place);
      if (LAST) store(s.grad_memory + place, left);
      for (int w = HEADS - 1; w >= 0; --w) {
        const Vec<T> erased = others[w] * right;
        right *= kept[w];
        of_erase[w][j] += erased * weight[w];
        grad_weight[w] += g * add[w * n.D + j];
        grad_weight[w] -= erased * erase[w * n.D + j];
      }
    }
    for (int w = 0; w < HEADS; ++w) store(grad_weights + w * n.ld + i, grad_weight[w]);
  }
  for (int w = 0; w < HEADS; ++w)
    for (int j = 0; j < ROWS; ++j) s.grad_erase[(first + w) * n.D + d + j] = -sum_lanes<T>(of_erase[w][j]);
}

// Back through the write: grad_memory from that of the memory after it to that of the memory before it.
template <class T>
void write_backward(const NtmSizes<T>& n, const T* before, NtmBackwardScratch<T>& s) {
  constexpr int ROWS = vector_registers == 32 ? 2 : 1;
  weighted_sums<T, false>(s.grad_memory, n.ld, n.ld, n.D, n.W, s.x.weights + n.R * n.ld, s.grad_add);
  for_heads<T>(n.W, [&](int64_t first, auto group) {
    const auto rows = [&](auto last) {
      int64_t d = 0;
      for (; d + ROWS <= n.D; d += ROWS) write_rows_backward<T, group, ROWS, last>(n, first, d, before, s);
      for (; d < n.D; ++d) write_rows_backward<T, group, 1, last>(n, first, d, before, s);
    };
    if (first + group == n.W) rows(std::true_type());
    else rows(std::false_type());
  });
}

// Back through a step with its inputs in s.in, from the weights in s.previous to those in s.x.weights, between two memories.
// grad_read [R, D] may be null. The gradients of the inputs come to lie in s.grad_key and those after it.
template <class T>
void ntm_step_backward(const NtmSizes<T>& n, bool read_first, const T* before, const T* after, const T* grad_read,
                       NtmBackwardScratch<T>& s) {
  T *squares_before = s.x.squares, *squares_after = squares_before + n.ld;
  compare(n, s.in, before, read_first ? 0 : n.R, read_first ? n.heads : n.W, squares_before, s.x);
  if (!read_first) compare(n, s.in, after, 0, n.R, squares_after, s.x);
  for (int64_t h = 0; h < n.heads; ++h)
    shift_weights<T>(n, s.in, s.previous, h, read_first || h >= n.R ? squares_before : squares_after, s.x);
  if (read_first) {
    write_backward(n, before, s);
    heads_backward<T>(n, before, squares_before, 0, n.heads, grad_read, s);
  } else {
    heads_backward<T>(n, after, squares_after, 0, n.R, grad_read, s);
    write_backward(n, before, s);
    heads_backward<T>(n, before, squares_before, n.R, n.W, grad_read, s);
  }
}

}  // namespace
}  // namespace mann_fast

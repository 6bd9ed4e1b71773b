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
  int64_t N, D, R, W, heads, shifts, ld, extended;  // heads: R that read, then W that write
  T eps;
  template <class Arguments>
  explicit NtmSizes(const Arguments& a)
      : N(a.N), D(a.D), R(a.R), W(a.W), heads(a.R + a.W), shifts(a.shifts), ld(padded_slots(a.N)),
        extended(ld + a.shifts + width<T>), eps(static_cast<T>(a.eps)) {}
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

template <class T>
struct Address {  // rows [R+W][ld]: what backward goes through again; squares is of the memory that was addressed last
  T *dots, *q, *squares, *by_content, *gated, *relative, *weights;
  T* maximum;  // [R+W], of the shifted weights
  T* ring;     // the slots of one head, and on both sides those that a shift brings round
  Address(Arena& arena, const NtmSizes<T>& n)
      : dots(arena.take<T>(n.heads * n.ld)), q(arena.take<T>(n.heads * n.ld)), squares(arena.take<T>(n.ld)),
        by_content(arena.take<T>(n.heads * n.ld)), gated(arena.take<T>(n.heads * n.ld)),
        relative(arena.take<T>(n.heads * n.ld)), weights(arena.take<T>(n.heads * n.ld)), maximum(arena.take<T>(n.heads)),
        ring(arena.take<T>(n.extended)) {}
};

// ring[k] = row[(k - reach) mod N] for k in [0, N + 2 reach).
template <class T>
void close_ring(const T* row, const NtmSizes<T>& n, T* ring) {
  const int64_t reach = n.shifts / 2;
  int64_t slot = (n.N - reach % n.N) % n.N;
  for (int64_t k = 0; k < n.N + 2 * reach; ++k) {
    ring[k] = row[slot];
    if (++slot == n.N) slot = 0;
  }
  for (int64_t k = n.N + 2 * reach; k < n.extended; ++k) ring[k] = 0;
}

// Weights of heads [first, first + count) on a memory, from those of the step before.
template <class T>
void address(const NtmSizes<T>& n, const NtmInputs<T>& in, const T* memory, const T* previous, int64_t first, int64_t count,
             Address<T>& x) {
  if (count == 0) return;
  dot_and_square_slots(memory, n.ld, n.ld, n.D, count, in.key + first * n.D, x.dots + first * n.ld, x.squares);
  const int64_t reach = n.shifts / 2;
  for (int64_t h = first; h < first + count; ++h) {
    const int64_t row = h * n.ld;
    T *content = x.by_content + row, *gated = x.gated + row, *relative = x.relative + row, *weights = x.weights + row;
    const T maximum =
        score_slots<T>(x.dots + row, x.squares, n.ld, n.N, in.key_square[h], in.sharpness[h], n.eps, x.q + row, content);
    scale_slots(content, n.ld, T(1) / exp_slots(content, n.ld, maximum));
    const T gate = in.gate[h];
    for (int64_t i = 0; i < n.ld; i += width<T>)
      store(gated + i, load(content + i) * gate + load(previous + row + i) * (T(1) - gate));
    close_ring(static_cast<const T*>(gated), n, x.ring);
    Vec<T> most{};
    for (int64_t i = 0; i < n.ld; i += width<T>) {
      Vec<T> sum{};
      for (int64_t j = -reach; j <= reach; ++j) sum += load(x.ring + i - j + reach) * in.shift[h * n.shifts + j + reach];
      store(relative + i, sum);
    }
    for (int64_t i = n.N; i < n.ld; ++i) relative[i] = 0;
    for (int64_t i = 0; i < n.ld; i += width<T>) {
      const Vec<T> s = load(relative + i);
      most = s > most ? s : most;
    }
    x.maximum[h] = maximum_lane<T>(most);
    Vec<T> total{};
    for (int64_t i = 0; i < n.ld; i += width<T>) {
      // Divided: so the greatest is exactly 1, to any power, also an infinite one.
      const Vec<T> u = load(relative + i) / x.maximum[h], p = power(u, in.sharpening[h]);
      store(relative + i, u);
      store(weights + i, p);
      total += p;
    }
    scale_slots(weights, n.ld, T(1) / sum_lanes<T>(total));
  }
}

// memory = memory * product over write heads of (1 - weight * erase) + sum of weight * add. from and to may be the same.
template <class T>
void erase_and_add(const NtmSizes<T>& n, const T* weights, const T* erase, const T* add, const T* from, T* to) {
  for (int64_t d = 0; d < n.D; ++d)
    for (int64_t i = 0; i < n.ld; i += width<T>) {
      Vec<T> remaining = splat<T>(1), added{};
      for (int64_t w = 0; w < n.W; ++w) {
        const Vec<T> weight = load(weights + w * n.ld + i);
        remaining *= T(1) - weight * erase[w * n.D + d];
        added += weight * add[w * n.D + d];
      }
      store(to + d * n.ld + i, load(from + d * n.ld + i) * remaining + added);
    }
}

// ---- forward --------------------------------------------------------------------------------------------------------

template <class T>
struct NtmScratch {
  NtmInputs<T> in;
  Address<T> x;
  T *memory, *previous, *reads;
  NtmScratch(Arena& arena, const NtmSizes<T>& n)
      : in(arena, n), x(arena, n), memory(arena.take<T>(n.D * n.ld)), previous(arena.take<T>(n.heads * n.ld)),
        reads(arena.take<T>(n.R * n.D)) {}
};

// One step with the inputs in s.in, from the weights in s.previous: the reads come to lie in s.reads, the new weights in s.previous
// too. The memory as it was before the step goes to `anchor`, unless that is null.
template <class T>
void ntm_step(const NtmSizes<T>& n, bool read_first, T* anchor, NtmScratch<T>& s) {
  const T *memory = s.memory, *previous = s.previous;
  const auto read = [&] {
    address(n, s.in, memory, previous, 0, n.R, s.x);
    weighted_sums<T, false>(memory, n.ld, n.ld, n.D, n.R, s.x.weights, s.reads);
  };
  if (anchor != nullptr) std::memcpy(anchor, memory, n.D * n.ld * sizeof(T));
  address(n, s.in, memory, previous, n.R, n.W, s.x);
  if (read_first) read();
  erase_and_add(n, s.x.weights + n.R * n.ld, s.in.erase, s.in.add, memory, s.memory);
  if (!read_first) read();
  std::memcpy(s.previous, s.x.weights, n.heads * n.ld * sizeof(T));
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <class T>
struct NtmBackwardScratch {
  NtmInputs<T> in;
  Address<T> x;
  T *memories, *previous, *grad_memory, *grad_weights;  // grad_weights [R+W][ld]: of the weights that a step comes out with
  T *grad_row, *grad_squares, *grad_read;
  T *grad_key, *grad_sharpness, *grad_gate, *grad_shift, *grad_sharpening, *grad_erase, *grad_add;
  NtmBackwardScratch(Arena& arena, const NtmSizes<T>& n, int64_t steps)
      : in(arena, n), x(arena, n), memories(arena.take<T>((steps + 1) * n.D * n.ld)), previous(arena.take<T>(n.heads * n.ld)),
        grad_memory(arena.take<T>(n.D * n.ld)), grad_weights(arena.take<T>(n.heads * n.ld)),
        grad_row(arena.take<T>(n.heads * n.ld)), grad_squares(arena.take<T>(n.ld)), grad_read(arena.take<T>(n.R * n.D)),
        grad_key(arena.take<T>(n.heads * n.D)), grad_sharpness(arena.take<T>(n.heads)), grad_gate(arena.take<T>(n.heads)),
        grad_shift(arena.take<T>(n.heads * n.shifts)), grad_sharpening(arena.take<T>(n.heads)),
        grad_erase(arena.take<T>(n.W * n.D)), grad_add(arena.take<T>(n.W * n.D)) {}
};

// Back through the addressing of heads [first, first + count), which s.x has gone through again: from grad_weights to the heads'
// own gradients and the memory's; grad_weights becomes that of the weights of the step before.
template <class T>
void address_backward(const NtmSizes<T>& n, const T* memory, int64_t first, int64_t count, NtmBackwardScratch<T>& s) {
  if (count == 0) return;
  const NtmInputs<T>& in = s.in;
  const int64_t reach = n.shifts / 2, ld = n.ld;
  std::memset(s.grad_squares, 0, ld * sizeof(T));
  for (int64_t h = first; h < first + count; ++h) {
    const int64_t row = h * ld;
    const T *u = s.x.relative + row, *w = s.x.weights + row, *content = s.x.by_content + row;
    T *grad = s.grad_weights + row, *of_content = s.grad_row + row;
    const T gamma = in.sharpening[h], inverse = T(1) / s.x.maximum[h];
    // Sharpening: w = u^gamma over its sum. With g - mean, dL/d(u^gamma) is (g - mean) over the sum, so w (g - mean) is
    // u^gamma dL/d(u^gamma), and w / u^gamma the inverse of the sum, the same for all: taken where u is 1.
    const T mean = dot_rows(w, static_cast<const T*>(grad), ld);
    T per_sum = 0;
    for (int64_t i = 0; i < n.N; ++i) per_sum = w[i] > per_sum ? w[i] : per_sum;
    Vec<T> of_gamma{};
    for (int64_t i = 0; i < ld; i += width<T>) {
      const Vec<T> ratio = load(u + i), centred = load(grad + i) - mean;
      const Vec<T> logarithm = log_positive(ratio > T(0) ? ratio : splat<T>(1));
      of_gamma += load(w + i) * centred * logarithm;
      store(grad + i, power(ratio, gamma - T(1)) * centred * (gamma * per_sum * inverse));
    }
    s.grad_sharpening[h] = sum_lanes<T>(of_gamma);
    // Shift.
    for (int64_t i = n.N; i < ld; ++i) grad[i] = 0;
    close_ring(s.x.gated + row, n, s.x.ring);
    for (int64_t j = -reach; j <= reach; ++j) {
      Vec<T> sum{};
      for (int64_t i = 0; i < ld; i += width<T>) sum += load(grad + i) * load(s.x.ring + i - j + reach);
      s.grad_shift[h * n.shifts + j + reach] = sum_lanes<T>(sum);
    }
    close_ring(static_cast<const T*>(grad), n, s.x.ring);
    // Interpolation.
    const T gate = in.gate[h];
    const T* before = s.previous + row;
    Vec<T> of_gate{};
    for (int64_t i = 0; i < ld; i += width<T>) {
      Vec<T> sum{};
      for (int64_t j = -reach; j <= reach; ++j) sum += load(s.x.ring + i + j + reach) * in.shift[h * n.shifts + j + reach];
      of_gate += sum * (load(content + i) - load(before + i));
      store(of_content + i, sum * gate);
      store(grad + i, sum * (T(1) - gate));
    }
    for (int64_t i = n.N; i < ld; ++i) grad[i] = of_content[i] = 0;
    s.grad_gate[h] = sum_lanes<T>(of_gate);
    // Softmax and similarity.
    const T delta = dot_rows(content, static_cast<const T*>(of_content), ld);
    const ScoreGradient<T> score = score_gradient(content, s.x.dots + row, s.x.q + row, s.x.squares, ld, delta,
                                                  in.key_square[h], in.sharpness[h], of_content, s.grad_squares);
    s.grad_sharpness[h] = score.beta;
    in.key_square[h] = score.key_square;  // the square itself is not needed any more
  }
  const T* grad_dots = s.grad_row + first * ld;
  weighted_sums<T, false>(memory, ld, ld, n.D, count, grad_dots, s.grad_key + first * n.D);
  for (int64_t h = first; h < first + count; ++h)
    for (int64_t d = 0; d < n.D; ++d) s.grad_key[h * n.D + d] += 2 * in.key_square[h] * in.key[h * n.D + d];
  const T* none = nullptr;
  add_gradient<T, false, true>(memory, s.grad_memory, ld, ld, n.D, count, none, none, grad_dots, in.key + first * n.D,
                               s.grad_squares);
}

// Back through the write: grad_memory from that of the memory after it to that of the memory before it.
template <class T>
void write_backward(const NtmSizes<T>& n, const T* before, NtmBackwardScratch<T>& s) {
  const T* weights = s.x.weights + n.R * n.ld;
  T* grad_weights = s.grad_weights + n.R * n.ld;
  for (int64_t d = 0; d < n.D; ++d) {
    T* grad = s.grad_memory + d * n.ld;
    const T* memory = before + d * n.ld;
    for (int64_t w = 0; w < n.W; ++w) {
      const T erase = s.in.erase[w * n.D + d], add = s.in.add[w * n.D + d];
      Vec<T> of_erase{}, of_add{};
      for (int64_t i = 0; i < n.ld; i += width<T>) {
        Vec<T> others = splat<T>(1);
        for (int64_t v = 0; v < n.W; ++v)
          if (v != w) others *= T(1) - load(weights + v * n.ld + i) * s.in.erase[v * n.D + d];
        const Vec<T> g = load(grad + i), weight = load(weights + w * n.ld + i), erased = g * load(memory + i) * others;
        of_erase += erased * weight;
        of_add += g * weight;
        store(grad_weights + w * n.ld + i, load(grad_weights + w * n.ld + i) + g * add - erased * erase);
      }
      s.grad_erase[w * n.D + d] = -sum_lanes<T>(of_erase);
      s.grad_add[w * n.D + d] = sum_lanes<T>(of_add);
    }
    for (int64_t i = 0; i < n.ld; i += width<T>) {
      Vec<T> remaining = splat<T>(1);
      for (int64_t w = 0; w < n.W; ++w) remaining *= T(1) - load(weights + w * n.ld + i) * s.in.erase[w * n.D + d];
      store(grad + i, load(grad + i) * remaining);
    }
  }
}

template <class T>
void read_backward(const NtmSizes<T>& n, const T* memory, const T* grad_read, NtmBackwardScratch<T>& s) {
  if (grad_read == nullptr || n.R == 0) return;
  dot_slots(memory, n.ld, n.ld, n.D, n.R, grad_read, s.grad_row);
  for (int64_t i = 0; i < n.R * n.ld; i += width<T>) store(s.grad_weights + i, load(s.grad_weights + i) + load(s.grad_row + i));
  const T* none = nullptr;
  add_gradient<T, true, false>(memory, s.grad_memory, n.ld, n.ld, n.D, n.R, s.x.weights, grad_read, none, none, none);
}

// Back through a step with its inputs in s.in, from the weights in s.previous, between two memories. grad_read [R, D] may be null.
// The gradients of the inputs come to lie in s.grad_key and those after it.
template <class T>
void ntm_step_backward(const NtmSizes<T>& n, bool read_first, const T* before, const T* after, const T* grad_read,
                       NtmBackwardScratch<T>& s) {
  const T* previous = s.previous;
  // A head's own arrays are apart, but squares are of one memory: so the heads of each go forward and back together.
  address(n, s.in, before, previous, n.R, n.W, s.x);
  if (read_first) {
    address(n, s.in, before, previous, 0, n.R, s.x);
    write_backward(n, before, s);
    read_backward(n, before, grad_read, s);
    address_backward(n, before, 0, n.R, s);
    address_backward(n, before, n.R, n.W, s);
  } else {
    address(n, s.in, after, previous, 0, n.R, s.x);
    read_backward(n, after, grad_read, s);
    address_backward(n, after, 0, n.R, s);
    write_backward(n, before, s);
    address(n, s.in, before, previous, n.R, n.W, s.x);
    address_backward(n, before, n.R, n.W, s);
  }
}

}  // namespace
}  // namespace mann_fast

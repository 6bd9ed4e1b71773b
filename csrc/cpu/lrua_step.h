// One step of the memory for one sample, forward and backward: what lrua_scan and the whole MANN sequence have in common.
//
// A sample's memory is held in cache, slots in lanes. A step is three phases: every slot is written and compared; every slot
// is weighed and read, now that the maximum similarity is known; the weights are normalised, usage is updated and the least
// used slots are found. The slots of a sample may be in parts, a task each, with a barrier between phases.
//
// Backward replays a few steps from an anchor into memories side by side in cache, then goes back through them.
#pragma once
#include "least_used.h"

namespace mann_fast {
namespace {

// ---- pieces -----------------------------------------------------------------------------------------------------

// write_weights = gate * read_weights + rest * target, with rest = 1 - gate, for slots [lo, hi).
template <class T>
void mix_write_weights(const T* read_weights, int64_t ld, int64_t R, Range range, const T* gate, const T* rest,
                       const int64_t* slots, bool shared_target, T* write_weights) {
  for (int64_t r = 0; r < R; ++r) {
    T* row = write_weights + r * ld;
    for (int64_t i = range.lo; i < range.hi; i += width<T>) store(row + i, load(read_weights + r * ld + i) * gate[r]);
    for (int64_t j = shared_target ? 0 : r; j < (shared_target ? R : r + 1); ++j)
      if (slots[j] >= range.lo && slots[j] < range.hi) row[slots[j]] += rest[r];
  }
}

// dL/d(gate logit) of head r from g = dL/d(write weights): its share of the slots of `range`.
template <class T>
T gate_gradient(const T* g, const T* read_weights, int64_t r, int64_t R, Range range, T gate, T rest, const int64_t* slots,
                bool shared_target) {
  T sum = dot_rows(g + range.lo, read_weights + range.lo, range.hi - range.lo);
  for (int64_t j = shared_target ? 0 : r; j < (shared_target ? R : r + 1); ++j)
    if (slots[j] >= range.lo && slots[j] < range.hi) sum -= g[slots[j]];
  return sum * gate * rest;
}

template <class T>
void clear_slot(T* block, int64_t ld, int64_t D, int64_t slot) {
  for (int64_t d = 0; d < D; ++d) block[d * ld + slot] = 0;
}

template <class T>
void select_slots(Int<T>* order, int64_t count, int64_t n, Int<T>* least, int64_t* slots) {
  for (int64_t j = 0; j < n; ++j) take_least<T>(order, count, least + j, slots + j);
}

// ---- one step ----------------------------------------------------------------------------------------

// What forward and backward of a scan have in common.
template <class T>
struct Scan {
  int64_t N, D, R, ld, parts;
  bool read_first, shared_target;
  T eps;
  Range part(int64_t p) const { return part_of(ld, parts, p, 64); }
  int64_t valid(Range range) const { return (N < range.hi ? N : range.hi) - range.lo; }
};

template <class T>
struct StepInputs {  // of one sample and step
  const T *key, *vector, *beta;
  T *gate, *rest, *key_square, *key_buffer, *vector_buffer, *beta_buffer;
  StepInputs(Arena& arena, int64_t R, int64_t D)
      : gate(arena.take<T>(R)), rest(arena.take<T>(R)), key_square(arena.take<T>(R)), key_buffer(arena.take<T>(R * D)),
        vector_buffer(arena.take<T>(R * D)), beta_buffer(arena.take<T>(R)) {}

  // All of the dtype of the state: key and vector [R, D], logits of the gates and sharpness [R].
  void set(int64_t R, int64_t D, const T* key_now, const T* vector_now, const T* gate_logits, const T* beta_now) {
    key = key_now;
    vector = vector_now;
    beta = beta_now;
    for (int64_t r = 0; r < R; ++r) sigmoids(gate_logits[r], gate + r, rest + r);
    for (int64_t r = 0; r < R; ++r) key_square[r] = square_sum(key + r * D, D);
  }

  template <class Arguments>
  void load(const Arguments& a, int64_t t, int64_t b) {
    const int64_t row = (t * a.B + b) * a.R;
    if (!a.sharpness)
      for (int64_t r = 0; r < a.R; ++r) beta_buffer[r] = 1;
    set(a.R, a.D, widen(a.keys, a.input, row * a.D, a.R * a.D, key_buffer),
        widen(a.write_vectors, a.input, row * a.D, a.R * a.D, vector_buffer), widen(a.gate_logits, a.input, row, a.R, rest),
        a.sharpness ? widen(a.sharpness, a.input, row, a.R, beta_buffer) : beta_buffer);
  }

  // Asks for the keys and write vectors of a step that comes next.
  template <class Arguments>
  void fetch(const Arguments& a, int64_t t, int64_t b) {
    if (t < 0 || t >= a.T) return;
    const bool half = a.input == Dtype::bfloat16 || a.input == Dtype::float16;
    const int64_t size = half ? 2 : static_cast<int64_t>(sizeof(T)), row = (t * a.B + b) * a.R * a.D * size;
    prefetch(static_cast<const char*>(a.keys) + row, a.R * a.D * size);
    prefetch(static_cast<const char*>(a.write_vectors) + row, a.R * a.D * size);
  }
};

template <class T>
struct Softmax {  // of each part: the maximum similarity, and the sum of weights relative to the maximum of all; [parts, R]
  T *maximum, *total, *scale;
  Softmax(Arena& arena, int64_t parts, int64_t R)
      : maximum(arena.take<T>(parts * R)), total(arena.take<T>(parts * R)), scale(arena.take<T>(R)) {}

  // Leaves the maximum over all parts in the first.
  void combine_maximum(int64_t parts, int64_t R) {
    for (int64_t p = 1; p < parts; ++p)
      for (int64_t r = 0; r < R; ++r) maximum[r] = maximum[p * R + r] > maximum[r] ? maximum[p * R + r] : maximum[r];
  }
  // What all weights are to be multiplied by.
  void combine_total(int64_t parts, int64_t R) {
    for (int64_t r = 0; r < R; ++r) {
      T sum = total[r];
      for (int64_t p = 1; p < parts; ++p) sum += total[p * R + r];
      scale[r] = T(1) / sum;
    }
  }
};

template <class T>
struct StepArrays {  // rows [R][ld] and [ld]; from and to: [D][ld]. q may be null. read_weights may be before's.
  T *from, *to, *before, *write_weights, *read_weights, *dots, *squares, *q;
};

// First phase, slots of part p: write, and similarities in the place of the new read weights.
template <class T>
void write_and_compare(const Scan<T>& scan, const StepInputs<T>& in, const int64_t* slots, int64_t p, const StepArrays<T>& x,
                       Softmax<T>& softmax, T* column) {
  const Range range = scan.part(p);
  const int64_t lo = range.lo, count = range.hi - range.lo, ld = scan.ld, D = scan.D, R = scan.R;
  mix_write_weights(static_cast<const T*>(x.before), ld, R, range, in.gate, in.rest, slots, scan.shared_target,
                    x.write_weights);
  if (scan.read_first)
    dot_and_square_slots(static_cast<const T*>(x.from + lo), ld, count, D, R, in.key, x.dots + lo, x.squares + lo);
  const bool erases = slots[0] >= range.lo && slots[0] < range.hi;
  if (erases) {
    for (int64_t d = 0; d < D; ++d) column[d] = x.from[d * ld + slots[0]];
    clear_slot(x.from, ld, D, slots[0]);
  }
  if (scan.read_first)
    write_slots(static_cast<const T*>(x.from + lo), x.to + lo, ld, count, D, R, x.write_weights + lo, in.vector);
  else
    write_dot_and_square_slots(static_cast<const T*>(x.from + lo), x.to + lo, ld, count, D, R, x.write_weights + lo, in.vector,
                               in.key, x.dots + lo, x.squares + lo);
  if (erases && x.from != x.to)  // a replay needs the memory before the step as it was
    for (int64_t d = 0; d < D; ++d) x.from[d * ld + slots[0]] = column[d];
  for (int64_t r = 0; r < R; ++r) {
    T* weights = x.read_weights + r * ld + lo;
    T* q = x.q == nullptr ? nullptr : x.q + r * ld + lo;
    softmax.maximum[p * R + r] = score_slots<T>(x.dots + r * ld + lo, x.squares + lo, count, scan.valid(range),
                                                in.key_square[r], in.beta[r], scan.eps, q, weights);
  }
}

// Second phase, slots of part p: similarities to weights, not yet normalised.
template <class T>
void weigh(const Scan<T>& scan, int64_t p, T* read_weights, Softmax<T>& softmax) {
  const Range range = scan.part(p);
  for (int64_t r = 0; r < scan.R; ++r)
    softmax.total[p * scan.R + r] = exp_slots(read_weights + r * scan.ld + range.lo, range.hi - range.lo, softmax.maximum[r]);
}

// ---- forward -----------------------------------------------------------------------------------------

template <class T>
struct ScanScratch {
  // From step to step:
  T *memory, *read_weights, *usage;
  Int<T>* least;
  int64_t* candidates;
  // Of one step:
  StepInputs<T> in;
  Softmax<T> softmax;
  T *write_weights, *dots, *squares, *reads, *columns;
  Int<T>* order;
  int64_t* slots;
  ScanScratch(Arena& own, Arena& common, const Scan<T>& scan)
      : memory(own.take<T>(scan.D * scan.ld)), read_weights(own.take<T>(scan.R * scan.ld)), usage(own.take<T>(scan.ld)),
        least(own.take<Int<T>>(scan.parts * scan.R)), candidates(own.take<int64_t>(scan.parts * scan.R)),
        in(common, scan.R, scan.D), softmax(common, scan.parts, scan.R), write_weights(common.take<T>(scan.R * scan.ld)),
        dots(common.take<T>(scan.R * scan.ld)), squares(common.take<T>(scan.ld)),
        reads(common.take<T>(scan.parts * scan.R * scan.D)), columns(common.take<T>(scan.parts * scan.D)),
        order(common.take<Int<T>>(scan.ld)), slots(common.take<int64_t>(scan.R)) {}
};

// The R least used slots of part p.
template <class T>
void find_candidates(const Scan<T>& scan, int64_t p, ScanScratch<T>& s) {
  const Range range = scan.part(p);
  order_slots(s.usage + range.lo, range.hi - range.lo, scan.valid(range), s.order + range.lo);
  int64_t* candidates = s.candidates + p * scan.R;
  select_slots<T>(s.order + range.lo, range.hi - range.lo, scan.R, s.least + p * scan.R, candidates);
  for (int64_t j = 0; j < scan.R; ++j) candidates[j] += range.lo;
}

// The least used of all parts' candidates. Parts hold ascending slots, so the first part among equals has the lower slot.
template <class T>
void choose_slots(const Scan<T>& scan, ScanScratch<T>& s) {
  for (int64_t j = 0; j < scan.R; ++j) {
    int64_t best = 0;
    for (int64_t k = 1; k < scan.parts * scan.R; ++k)
      if (s.least[k] < s.least[best]) best = k;
    s.slots[j] = s.candidates[best];
    s.least[best] = taken<T>;
  }
}

// Third phase, slots of part p: normalise the weights, update usage, find the least used.
template <class T>
void normalise_and_use(const Scan<T>& scan, T usage_decay, int64_t p, ScanScratch<T>& s) {
  const Range range = scan.part(p);
  const T* scale = s.softmax.scale;
  for (int64_t i = range.lo; i < range.hi; i += width<T>) {
    Vec<T> total{};
    for (int64_t r = 0; r < scan.R; ++r) {
      const Vec<T> weight = load(s.read_weights + r * scan.ld + i) * scale[r];
      store(s.read_weights + r * scan.ld + i, weight);
      const Vec<T> touched = weight + load(s.write_weights + r * scan.ld + i);
      total = r == 0 ? touched : total + touched;
    }
    store(s.usage + i, load(s.usage + i) * usage_decay + total);
  }
  find_candidates(scan, p, s);
}

// Takes in the memory [N, D], read weights [R, N] and usage [N] that a sample starts from; null where it begins anew.
template <class T>
void begin_sample(const Scan<T>& scan, const T* memory, const T* read_weights, const T* usage, const Parallel& parallel,
                  ScanScratch<T>& s) {
  parallel_run(parallel, scan.parts, [&](int64_t p) {
    const Range range = scan.part(p);
    load_slots(memory, scan.N, scan.D, range.lo, range.hi, s.memory + range.lo, scan.ld);
    if (read_weights) load_rows(read_weights, scan.R, scan.N, range.lo, range.hi, s.read_weights, scan.ld);
    else start_rows(scan.R, range.lo, range.hi, s.read_weights, scan.ld);
    if (usage) load_rows(usage, 1, scan.N, range.lo, range.hi, s.usage, scan.ld);
    else start_rows(1, range.lo, range.hi, s.usage, scan.ld);
    find_candidates(scan, p, s);
  });
}

// One step with the inputs in s.in; the reads come to lie in s.reads [R, D]. The slots chosen go to `slots`, memory and read
// weights as they were before the step to `anchor`, unless these are null.
template <class T>
void step_sample(const Scan<T>& scan, T usage_decay, int64_t* slots, T* anchor, const Parallel& parallel, ScanScratch<T>& s) {
  const int64_t D = scan.D, R = scan.R, ld = scan.ld, parts = scan.parts;
  const StepArrays<T> arrays = {s.memory,       s.memory, s.read_weights, s.write_weights,
                                s.read_weights, s.dots,   s.squares,      nullptr};
  choose_slots(scan, s);
  if (slots != nullptr)
    for (int64_t j = 0; j < R; ++j) slots[j] = s.slots[j];
  parallel_run(parallel, parts, [&](int64_t p) {
    const Range range = scan.part(p);
    if (anchor != nullptr) {
      const size_t bytes = (range.hi - range.lo) * sizeof(T);
      for (int64_t d = 0; d < D; ++d) std::memcpy(anchor + d * ld + range.lo, s.memory + d * ld + range.lo, bytes);
      for (int64_t r = 0; r < R; ++r) std::memcpy(anchor + (D + r) * ld + range.lo, s.read_weights + r * ld + range.lo, bytes);
    }
    write_and_compare(scan, s.in, s.slots, p, arrays, s.softmax, s.columns + p * D);
  });
  s.softmax.combine_maximum(parts, R);
  parallel_run(parallel, parts, [&](int64_t p) {
    const Range range = scan.part(p);
    weigh(scan, p, s.read_weights, s.softmax);
    weighted_sums<T, false>(s.memory + range.lo, ld, range.hi - range.lo, D, R, s.read_weights + range.lo, s.reads + p * R * D);
  });
  s.softmax.combine_total(parts, R);
  for (int64_t r = 0; r < R; ++r) {
    T* read = s.reads + r * D;
    for (int64_t p = 1; p < parts; ++p)
      for (int64_t d = 0; d < D; ++d) read[d] += s.reads[(p * R + r) * D + d];
    for (int64_t d = 0; d < D; ++d) read[d] *= s.softmax.scale[r];
  }
  parallel_run(parallel, parts, [&](int64_t p) { normalise_and_use(scan, usage_decay, p, s); });
}

// Hands out memory, read weights and usage as they are after the last step.
template <class T>
void end_sample(const Scan<T>& scan, T* memory, T* read_weights, T* usage, const Parallel& parallel, ScanScratch<T>& s) {
  parallel_run(parallel, scan.parts, [&](int64_t p) {
    const Range range = scan.part(p);
    store_slots(static_cast<const T*>(s.memory + range.lo), scan.ld, scan.N, scan.D, range.lo, range.hi, memory);
    store_rows(static_cast<const T*>(s.read_weights), scan.ld, scan.R, scan.N, range.lo, range.hi, read_weights);
    store_rows(static_cast<const T*>(s.usage), scan.ld, 1, scan.N, range.lo, range.hi, usage);
  });
}
// ---- backward ----------------------------------------------------------------------------------------

template <class T>
struct ScanBackwardScratch {
  // From step to step. Of one replay: memories and read weights before each of its steps and after the last, similarity of each.
  T *memories, *read_weights, *dots, *q, *squares;
  T *grad_memory, *grad_read_weights;
  // Of one step:
  StepInputs<T> in;
  Softmax<T> softmax;
  T *write_weights, *grad_weights, *grad_write_weights, *grad_squares, *columns;
  T *grad_read, *delta;                                                      // [R, D]; [parts, R]
  T *grad_key, *grad_vector, *grad_key_square, *grad_sharpness, *grad_gate;  // of each part: [R, D] and [R]
  ScanBackwardScratch(Arena& own, Arena& common, const Scan<T>& scan, int64_t steps)
      : memories(own.take<T>((steps + 1) * scan.D * scan.ld)), read_weights(own.take<T>((steps + 1) * scan.R * scan.ld)),
        dots(own.take<T>(steps * scan.R * scan.ld)), q(own.take<T>(steps * scan.R * scan.ld)),
        squares(own.take<T>(steps * scan.ld)), grad_memory(own.take<T>(scan.D * scan.ld)),
        grad_read_weights(own.take<T>(scan.R * scan.ld)), in(common, scan.R, scan.D), softmax(common, scan.parts, scan.R),
        write_weights(common.take<T>(scan.R * scan.ld)), grad_weights(common.take<T>(scan.R * scan.ld)),
        grad_write_weights(common.take<T>(scan.R * scan.ld)), grad_squares(common.take<T>(scan.ld)),
        columns(common.take<T>(scan.parts * scan.D)), grad_read(common.take<T>(scan.R * scan.D)),
        delta(common.take<T>(scan.parts * scan.R)), grad_key(common.take<T>(scan.parts * scan.R * scan.D)),
        grad_vector(common.take<T>(scan.parts * scan.R * scan.D)), grad_key_square(common.take<T>(scan.parts * scan.R)),
        grad_sharpness(common.take<T>(scan.parts * scan.R)), grad_gate(common.take<T>(scan.parts * scan.R)) {}
};

// First phase back, slots of part p: the gradient that reaches this step's read weights.
template <class T>
void gather_weight_gradient(const Scan<T>& scan, int64_t p, const T* memory, const T* read_weights, const T* grad_read,
                            ScanBackwardScratch<T>& s) {
  const Range range = scan.part(p);
  const int64_t lo = range.lo, count = range.hi - range.lo, ld = scan.ld;
  if (grad_read) dot_slots(memory + lo, ld, count, scan.D, scan.R, grad_read, s.grad_weights + lo);
  for (int64_t r = 0; r < scan.R; ++r) {
    T* g = s.grad_weights + r * ld + lo;
    const T* later = s.grad_read_weights + r * ld + lo;
    for (int64_t i = 0; i < count; i += width<T>) store(g + i, grad_read ? load(g + i) + load(later + i) : load(later + i));
    s.delta[p * scan.R + r] = dot_rows(read_weights + r * ld + lo, static_cast<const T*>(g), count);
  }
}

// Second phase back, slots of part p: through the similarity, the read and the write.
template <class T>
void back_through_step(const Scan<T>& scan, int64_t p, const int64_t* slots, int64_t step, const T* grad_read,
                       ScanBackwardScratch<T>& s) {
  const Range range = scan.part(p);
  const int64_t lo = range.lo, count = range.hi - range.lo, ld = scan.ld, D = scan.D, R = scan.R;
  const T* before = s.memories + step * D * ld;
  const T* after = before + D * ld;
  const T* addressed = scan.read_first ? before : after;
  const T* weights_before = s.read_weights + step * R * ld;
  const T* weights = weights_before + R * ld;
  const T* none = nullptr;
  std::memset(s.grad_squares + lo, 0, count * sizeof(T));
  for (int64_t r = 0; r < R; ++r) {
    T delta = 0;
    for (int64_t part = 0; part < scan.parts; ++part) delta += s.delta[part * R + r];
    const int64_t row = (step * R + r) * ld + lo;
    const ScoreGradient<T> grad =
        score_gradient(weights + r * ld + lo, s.dots + row, s.q + row, s.squares + step * ld + lo, count, delta,
                       s.in.key_square[r], s.in.beta[r], s.grad_weights + r * ld + lo, s.grad_squares + lo);
    s.grad_sharpness[p * R + r] = grad.beta;
    s.grad_key_square[p * R + r] = grad.key_square;
  }
  const T* grad_dots = s.grad_weights;  // score_gradient left the gradient of the dot products there
  weighted_sums<T, false>(addressed + lo, ld, count, D, R, grad_dots + lo, s.grad_key + p * R * D);
  T* grad = s.grad_memory + lo;
  T* out = s.grad_write_weights + lo;
  if (scan.read_first && grad_read)
    add_gradient_and_dot<T, true, false>(after + lo, grad, ld, count, D, R, weights + lo, grad_read, none, none, none,
                                         s.in.vector, out);
  else if (scan.read_first) dot_slots(static_cast<const T*>(grad), ld, count, D, R, s.in.vector, out);
  else if (grad_read)
    add_gradient_and_dot<T, true, true>(after + lo, grad, ld, count, D, R, weights + lo, grad_read, grad_dots + lo, s.in.key,
                                        s.grad_squares + lo, s.in.vector, out);
  else
    add_gradient_and_dot<T, false, true>(after + lo, grad, ld, count, D, R, none, none, grad_dots + lo, s.in.key,
                                         s.grad_squares + lo, s.in.vector, out);
  mix_write_weights(weights_before, ld, R, range, s.in.gate, s.in.rest, slots, scan.shared_target, s.write_weights);
  weighted_sums<T, false>(grad, ld, count, D, R, s.write_weights + lo, s.grad_vector + p * R * D);
  for (int64_t r = 0; r < R; ++r) {
    const T* g = s.grad_write_weights + r * ld;
    s.grad_gate[p * R + r] =
        gate_gradient(g, weights_before + r * ld, r, R, range, s.in.gate[r], s.in.rest[r], slots, scan.shared_target);
    for (int64_t i = range.lo; i < range.hi; i += width<T>) store(s.grad_read_weights + r * ld + i, load(g + i) * s.in.gate[r]);
  }
  if (slots[0] >= range.lo && slots[0] < range.hi) clear_slot(s.grad_memory, ld, D, slots[0]);
  if (scan.read_first)
    add_gradient<T, false, true>(before + lo, grad, ld, count, D, R, none, none, grad_dots + lo, s.in.key, s.grad_squares + lo);
}

// Takes in the gradients [N, D] and [R, N] of the last memory and read weights; null stands for zero.
template <class T>
void begin_backward(const Scan<T>& scan, const T* grad_memory, const T* grad_read_weights, const Parallel& parallel,
                    ScanBackwardScratch<T>& s) {
  const int64_t N = scan.N, D = scan.D, R = scan.R, ld = scan.ld;
  parallel_run(parallel, scan.parts, [&](int64_t p) {
    const Range range = scan.part(p);
    const size_t bytes = (range.hi - range.lo) * sizeof(T);
    if (grad_memory) load_slots(grad_memory, N, D, range.lo, range.hi, s.grad_memory + range.lo, ld);
    else
      for (int64_t d = 0; d < D; ++d) std::memset(s.grad_memory + d * ld + range.lo, 0, bytes);
    if (grad_read_weights) load_rows(grad_read_weights, R, N, range.lo, range.hi, s.grad_read_weights, ld);
    else
      for (int64_t r = 0; r < R; ++r) std::memset(s.grad_read_weights + r * ld + range.lo, 0, bytes);
  });
}

// Starts a replay: from an anchor, or where that is null from a memory [N, D] and read weights [R, N], null where the sample
// begins anew.
template <class T>
void begin_replay(const Scan<T>& scan, const T* anchor, const T* memory, const T* read_weights, ScanBackwardScratch<T>& s) {
  if (anchor != nullptr) {
    std::memcpy(s.memories, anchor, scan.D * scan.ld * sizeof(T));
    std::memcpy(s.read_weights, anchor + scan.D * scan.ld, scan.R * scan.ld * sizeof(T));
  } else {
    load_slots(memory, scan.N, scan.D, 0, scan.ld, s.memories, scan.ld);
    if (read_weights) load_rows(read_weights, scan.R, scan.N, 0, scan.ld, s.read_weights, scan.ld);
    else start_rows(scan.R, 0, scan.ld, s.read_weights, scan.ld);
  }
}

// Having gone back to where the sample began anew: the memory's gradient is that of the start, and none goes further.
template <class T>
void back_to_start(const Scan<T>& scan, T* grad_start, const Parallel& parallel, ScanBackwardScratch<T>& s) {
  parallel_run(parallel, scan.parts, [&](int64_t p) {
    const Range range = scan.part(p);
    give_to_start(s.grad_memory, scan.ld, scan.N, scan.D, range.lo, range.hi, grad_start);
    for (int64_t r = 0; r < scan.R; ++r)
      std::memset(s.grad_read_weights + r * scan.ld + range.lo, 0, (range.hi - range.lo) * sizeof(T));
  });
}

// Step number `step` of the replay, with the inputs in s.in.
template <class T>
void replay_step(const Scan<T>& scan, const int64_t* slots, int64_t step, const Parallel& parallel, ScanBackwardScratch<T>& s) {
  const int64_t D = scan.D, R = scan.R, ld = scan.ld, parts = scan.parts;
  T* memory = s.memories + step * D * ld;
  T* read_weights = s.read_weights + step * R * ld;
  const StepArrays<T> arrays = {memory,
                                memory + D * ld,
                                read_weights,
                                s.write_weights,
                                read_weights + R * ld,
                                s.dots + step * R * ld,
                                s.squares + step * ld,
                                s.q + step * R * ld};
  parallel_run(parallel, parts,
               [&](int64_t p) { write_and_compare(scan, s.in, slots, p, arrays, s.softmax, s.columns + p * D); });
  s.softmax.combine_maximum(parts, R);
  parallel_run(parallel, parts, [&](int64_t p) { weigh(scan, p, arrays.read_weights, s.softmax); });
  s.softmax.combine_total(parts, R);
  parallel_run(parallel, parts, [&](int64_t p) {
    const Range range = scan.part(p);
    for (int64_t r = 0; r < R; ++r)
      scale_slots(arrays.read_weights + r * ld + range.lo, range.hi - range.lo, s.softmax.scale[r]);
  });
}

// Back through step number `step` of the replay, with its inputs in s.in. grad_read [R, D] may be null. The gradients of the
// inputs come to lie in s.grad_key, grad_vector [R, D], grad_gate and grad_sharpness [R].
template <class T>
void step_backward(const Scan<T>& scan, const int64_t* slots, int64_t step, const T* grad_read, const Parallel& parallel,
                   ScanBackwardScratch<T>& s) {
  const int64_t D = scan.D, R = scan.R, ld = scan.ld, parts = scan.parts;
  parallel_run(parallel, parts, [&](int64_t p) {
    gather_weight_gradient(scan, p, s.memories + (step + 1) * D * ld, s.read_weights + (step + 1) * R * ld, grad_read, s);
  });
  parallel_run(parallel, parts, [&](int64_t p) { back_through_step(scan, p, slots, step, grad_read, s); });
  for (int64_t p = 1; p < parts; ++p) {
    for (int64_t j = 0; j < R * D; ++j) {
      s.grad_key[j] += s.grad_key[p * R * D + j];
      s.grad_vector[j] += s.grad_vector[p * R * D + j];
    }
    for (int64_t r = 0; r < R; ++r) {
      s.grad_key_square[r] += s.grad_key_square[p * R + r];
      s.grad_sharpness[r] += s.grad_sharpness[p * R + r];
      s.grad_gate[r] += s.grad_gate[p * R + r];
    }
  }
  for (int64_t r = 0; r < R; ++r)
    for (int64_t d = 0; d < D; ++d) s.grad_key[r * D + d] += 2 * s.grad_key_square[r] * s.in.key[r * D + d];
}

// Hands out the gradients of the memory and read weights that the sample started from.
template <class T>
void end_backward(const Scan<T>& scan, T* grad_memory, T* grad_read_weights, const Parallel& parallel,
                  ScanBackwardScratch<T>& s) {
  parallel_run(parallel, scan.parts, [&](int64_t p) {
    const Range range = scan.part(p);
    store_slots(static_cast<const T*>(s.grad_memory + range.lo), scan.ld, scan.N, scan.D, range.lo, range.hi, grad_memory);
    store_rows(static_cast<const T*>(s.grad_read_weights), scan.ld, scan.R, scan.N, range.lo, range.hi, grad_read_weights);
  });
}
}  // namespace
}  // namespace mann_fast

// least_used, lrua_write and lrua_scan (a step is a scan of one), forward and backward.
//
// A scan holds one sample's memory in cache, slots in lanes, through all T steps. Each step is three phases: every slot is
// written and compared; every slot is weighed and read, now that the greatest similarity is known; the weights are
// normalised, usage is updated and the least used slots are found. Where there are fewer samples than threads and the
// memory is large, the slots of a sample are split over the threads, which meet between phases.
//
// Backward replays a few steps from the last anchor into memories kept side by side in cache, then goes back through them.
#include <cstdlib>

#include "blocks.h"

namespace mann_fast {
namespace MANN_FAST_ISA {
namespace {

// ---- pieces -----------------------------------------------------------------------------------------------------

// write_weights = gate * read_weights + keep * target for slots [lo, hi).
template <class T>
void mix_write_weights(const T* read_weights, int64_t ld, int64_t R, Range range, const T* gate, const T* keep,
                       const int64_t* slots, bool shared_target, T* write_weights) {
  for (int64_t r = 0; r < R; ++r) {
    T* row = write_weights + r * ld;
    for (int64_t i = range.lo; i < range.hi; i += width<T>) store(row + i, load(read_weights + r * ld + i) * gate[r]);
    for (int64_t j = shared_target ? 0 : r; j < (shared_target ? R : r + 1); ++j)
      if (slots[j] >= range.lo && slots[j] < range.hi) row[slots[j]] += keep[r];
  }
}

// dL/d(gate logit) of head r from g = dL/d(write weights): its share of the slots of `range`.
template <class T>
T gate_gradient(const T* g, const T* read_weights, int64_t r, int64_t R, Range range, T gate, T keep,
                const int64_t* slots, bool shared_target) {
  T sum = dot_rows(g + range.lo, read_weights + range.lo, range.hi - range.lo);
  for (int64_t j = shared_target ? 0 : r; j < (shared_target ? R : r + 1); ++j)
    if (slots[j] >= range.lo && slots[j] < range.hi) sum -= g[slots[j]];
  return sum * gate * keep;
}

template <class T>
void clear_slot(T* block, int64_t ld, int64_t D, int64_t slot) {
  for (int64_t d = 0; d < D; ++d) block[d * ld + slot] = 0;
}

template <class T>
void select_slots(Int<T>* order, int64_t count, int64_t n, Int<T>* least, int64_t* slots) {
  for (int64_t j = 0; j < n; ++j) take_least<T>(order, count, least + j, slots + j);
}

template <class T>
void load_gates(const void* gate_logits, Dtype input, int64_t offset, int64_t R, T* gate, T* keep) {
  const T* logits = widen(gate_logits, input, offset, R, keep);
  for (int64_t r = 0; r < R; ++r) sigmoids(logits[r], gate + r, keep + r);
}

// ---- least_used -------------------------------------------------------------------------------------------------

template <class T>
struct Ranked {
  Int<T> order, slot;
};

template <class T>
int compare_ranked(const void* a, const void* b) {
  const Ranked<T>&x = *static_cast<const Ranked<T>*>(a), &y = *static_cast<const Ranked<T>*>(b);
  if (x.order != y.order) return x.order < y.order ? -1 : 1;
  return x.slot < y.slot ? -1 : 1;
}

template <class T>
bool least_used(const LeastUsed& a, const Parallel& parallel) {
  const int64_t ld = padded_slots(a.N);
  const bool sorted = a.n > 32;  // from about here a sort beats taking one slot after the other
  const auto layout = [&](Arena& arena, T*& usage, Int<T>*& order, Int<T>*& least, Ranked<T>*& ranked) {
    usage = arena.take<T>(ld);
    order = arena.take<Int<T>>(ld);
    least = arena.take<Int<T>>(a.n);
    ranked = arena.take<Ranked<T>>(sorted ? a.N : 0);
  };
  T* usage;
  Int<T>*order, *least;
  Ranked<T>* ranked;
  Arena size;
  layout(size, usage, order, least, ranked);
  const int64_t tasks =
      worthwhile_tasks(parallel, a.B, static_cast<double>(a.B) * static_cast<double>(a.N) * (sorted ? 20.0 : 1.0 + a.n));
  const Scratch scratch(tasks * size.used());
  if (scratch.data() == nullptr) return false;
  parallel_run(parallel, tasks, [&](int64_t task) {
    T* usage;
    Int<T>*order, *least;
    Ranked<T>* ranked;
    Arena arena(scratch.data() + task * size.used());
    layout(arena, usage, order, least, ranked);
    const Range samples = part_of(a.B, tasks, task);
    for (int64_t b = samples.lo; b < samples.hi; ++b) {
      load_rows(static_cast<const T*>(a.usage) + b * a.N, 1, a.N, 0, ld, usage, ld);
      order_slots(usage, ld, a.N, order);
      int64_t* slots = a.slots + b * a.n;
      if (!sorted) {
        select_slots<T>(order, ld, a.n, least, slots);
        continue;
      }
      for (int64_t i = 0; i < a.N; ++i) ranked[i] = {order[i], static_cast<Int<T>>(i)};
      std::qsort(ranked, a.N, sizeof(Ranked<T>), compare_ranked<T>);
      for (int64_t i = 0; i < a.n; ++i) slots[i] = ranked[i].slot;
    }
  });
  return true;
}

// ---- lrua_write -------------------------------------------------------------------------------------------------

// Parts of one sample's slots for ops that go over the memory once: more than one only where samples are few.
int64_t slot_parts(const Parallel& parallel, int64_t B, int64_t N, int64_t D, int64_t R) {
  if (B >= parallel.threads) return 1;
  const double multiply_adds = static_cast<double>(N) * static_cast<double>(D) * static_cast<double>(R + 4);
  return worthwhile_tasks(parallel, (N + tile - 1) / tile, multiply_adds);
}

template <class T>
struct WriteScratch {
  T *block, *read_weights, *write_weights, *vector, *gate, *keep, *usage;
  Int<T>*order, *least;
  WriteScratch(Arena& arena, const LruaWrite& a)
      : block(arena.take<T>(a.D * tile)), read_weights(arena.take<T>(a.R * tile)),
        write_weights(arena.take<T>(a.R * tile)), vector(arena.take<T>(a.R * a.D)), gate(arena.take<T>(a.R)),
        keep(arena.take<T>(a.R)), usage(arena.take<T>(padded_slots(a.N))),
        order(arena.take<Int<T>>(padded_slots(a.N))), least(arena.take<Int<T>>(a.R)) {}
};

template <class T>
void write_part(const LruaWrite& a, int64_t b, Range slots, WriteScratch<T>& s) {
  const T* memory = static_cast<const T*>(a.memory) + b * a.N * a.D;
  const T* read_weights = static_cast<const T*>(a.read_weights) + b * a.R * a.N;
  T* out_memory = static_cast<T*>(a.out_memory) + b * a.N * a.D;
  T* write_weights = static_cast<T*>(a.write_weights) + b * a.R * a.N;
  const int64_t* chosen = a.slots + b * a.R;
  const T* vector = widen(a.write_vector, a.input, b * a.R * a.D, a.R * a.D, s.vector);
  load_gates(a.gate_logit, a.input, b * a.R, a.R, s.gate, s.keep);
  for (int64_t lo = slots.lo; lo < slots.hi; lo += tile) {
    const int64_t end = lo + tile < slots.hi ? lo + tile : slots.hi, count = padded_slots(end - lo);
    load_slots(memory, a.N, a.D, lo, lo + count, s.block, tile);
    load_tile_rows(read_weights + lo, a.R, a.N, end - lo, count, s.read_weights);
    // Row pointers moved back by lo, so that slots keep their numbers; only [lo, lo + count) is touched.
    mix_write_weights<T>(s.read_weights - lo, tile, a.R, {lo, lo + count}, s.gate, s.keep, chosen, a.shared_target,
                         s.write_weights - lo);
    if (chosen[0] >= lo && chosen[0] < end) clear_slot(s.block, tile, a.D, chosen[0] - lo);
    write_slots(static_cast<const T*>(s.block), s.block, tile, count, a.D, a.R, s.write_weights, vector);
    store_slots(static_cast<const T*>(s.block), tile, a.N, a.D, lo, lo + count, out_memory);
    for (int64_t r = 0; r < a.R; ++r)
      for (int64_t i = lo; i < end; ++i) write_weights[r * a.N + i] = s.write_weights[r * tile + i - lo];
  }
}

template <class T>
bool lrua_write(const LruaWrite& a, const Parallel& parallel) {
  const int64_t parts = slot_parts(parallel, a.B, a.N, a.D, a.R);
  const double work = static_cast<double>(a.B * a.N) * static_cast<double>(a.D * (a.R + 4));
  const int64_t tasks = parts > 1 ? parts : worthwhile_tasks(parallel, a.B, work);
  Arena size;
  WriteScratch<T>(size, a);
  const Scratch scratch(tasks * size.used());
  if (scratch.data() == nullptr) return false;
  const auto choose = [&](int64_t b, WriteScratch<T>& s) {
    const int64_t ld = padded_slots(a.N);
    load_rows(static_cast<const T*>(a.usage) + b * a.N, 1, a.N, 0, ld, s.usage, ld);
    order_slots(s.usage, ld, a.N, s.order);
    select_slots<T>(s.order, ld, a.R, s.least, a.slots + b * a.R);
  };
  if (parts == 1) {
    parallel_run(parallel, tasks, [&](int64_t task) {
      Arena arena(scratch.data() + task * size.used());
      WriteScratch<T> s(arena, a);
      const Range samples = part_of(a.B, tasks, task);
      for (int64_t b = samples.lo; b < samples.hi; ++b) {
        choose(b, s);
        write_part<T>(a, b, {0, a.N}, s);
      }
    });
    return true;
  }
  for (int64_t b = 0; b < a.B; ++b) {
    Arena arena(scratch.data());
    WriteScratch<T> s(arena, a);
    choose(b, s);
    parallel_run(parallel, parts, [&](int64_t p) {
      Arena arena(scratch.data() + p * size.used());
      WriteScratch<T> s(arena, a);
      write_part<T>(a, b, part_of(a.N, parts, p, tile), s);
    });
  }
  return true;
}

template <class T>
struct WriteBackwardScratch {
  T *grad, *read_weights, *write_weights, *grad_write_weights, *vector, *gate, *keep, *grad_vector, *grad_gate;
  WriteBackwardScratch(Arena& arena, const LruaWriteBackward& a)
      : grad(arena.take<T>(a.D * tile)), read_weights(arena.take<T>(a.R * tile)),
        write_weights(arena.take<T>(a.R * tile)), grad_write_weights(arena.take<T>(a.R * tile)),
        vector(arena.take<T>(a.R * a.D)), gate(arena.take<T>(a.R)), keep(arena.take<T>(a.R)),
        grad_vector(arena.take<T>(a.R * a.D)), grad_gate(arena.take<T>(a.R)) {}
};

template <class T>
void write_backward_part(const LruaWriteBackward& a, int64_t b, Range slots, WriteBackwardScratch<T>& s) {
  const T* grad_memory = a.grad_memory ? static_cast<const T*>(a.grad_memory) + b * a.N * a.D : nullptr;
  const T* grad_write_weights =
      a.grad_write_weights ? static_cast<const T*>(a.grad_write_weights) + b * a.R * a.N : nullptr;
  const T* read_weights = static_cast<const T*>(a.read_weights) + b * a.R * a.N;
  T* grad_in_memory = static_cast<T*>(a.grad_in_memory) + b * a.N * a.D;
  T* grad_read_weights = static_cast<T*>(a.grad_read_weights) + b * a.R * a.N;
  const int64_t* chosen = a.slots + b * a.R;
  const T* vector = widen(a.write_vector, a.input, b * a.R * a.D, a.R * a.D, s.vector);
  load_gates(a.gate_logit, a.input, b * a.R, a.R, s.gate, s.keep);
  for (int64_t j = 0; j < a.R * a.D; ++j) s.grad_vector[j] = 0;
  for (int64_t r = 0; r < a.R; ++r) s.grad_gate[r] = 0;
  for (int64_t lo = slots.lo; lo < slots.hi; lo += tile) {
    const int64_t end = lo + tile < slots.hi ? lo + tile : slots.hi, count = padded_slots(end - lo);
    const Range range{lo, lo + count};
    if (grad_memory) load_slots(grad_memory, a.N, a.D, lo, lo + count, s.grad, tile);
    else std::memset(s.grad, 0, a.D * tile * sizeof(T));
    load_tile_rows(read_weights + lo, a.R, a.N, end - lo, count, s.read_weights);
    mix_write_weights<T>(s.read_weights - lo, tile, a.R, range, s.gate, s.keep, chosen, a.shared_target,
                         s.write_weights - lo);
    dot_slots(static_cast<const T*>(s.grad), tile, count, a.D, a.R, vector, s.grad_write_weights);
    for (int64_t r = 0; r < a.R; ++r) {
      T* g = s.grad_write_weights + r * tile;
      if (grad_write_weights)
        for (int64_t i = lo; i < end; ++i) g[i - lo] += grad_write_weights[r * a.N + i];
      s.grad_gate[r] += gate_gradient<T>(g - lo, s.read_weights + r * tile - lo, r, a.R, range, s.gate[r], s.keep[r],
                                         chosen, a.shared_target);
      for (int64_t i = lo; i < end; ++i) grad_read_weights[r * a.N + i] = g[i - lo] * s.gate[r];
    }
    weighted_sums<T, true>(s.grad, tile, count, a.D, a.R, s.write_weights, s.grad_vector);
    if (chosen[0] >= lo && chosen[0] < end) clear_slot(s.grad, tile, a.D, chosen[0] - lo);
    store_slots(static_cast<const T*>(s.grad), tile, a.N, a.D, lo, lo + count, grad_in_memory);
  }
}

template <class T>
bool lrua_write_backward(const LruaWriteBackward& a, const Parallel& parallel) {
  const int64_t parts = slot_parts(parallel, a.B, a.N, a.D, 2 * a.R);
  const double work = static_cast<double>(a.B * a.N) * static_cast<double>(a.D * (2 * a.R + 4));
  const int64_t tasks = parts > 1 ? parts : worthwhile_tasks(parallel, a.B, work);
  Arena size;
  WriteBackwardScratch<T>(size, a);
  const Scratch scratch(tasks * size.used());
  if (scratch.data() == nullptr) return false;
  const auto finish = [&](int64_t b, WriteBackwardScratch<T>& s) {
    narrow(s.grad_vector, a.R * a.D, a.grad_write_vector, a.input, b * a.R * a.D);
    narrow(s.grad_gate, a.R, a.grad_gate_logit, a.input, b * a.R);
  };
  if (parts == 1) {
    parallel_run(parallel, tasks, [&](int64_t task) {
      Arena arena(scratch.data() + task * size.used());
      WriteBackwardScratch<T> s(arena, a);
      const Range samples = part_of(a.B, tasks, task);
      for (int64_t b = samples.lo; b < samples.hi; ++b) {
        write_backward_part<T>(a, b, {0, a.N}, s);
        finish(b, s);
      }
    });
    return true;
  }
  for (int64_t b = 0; b < a.B; ++b) {
    parallel_run(parallel, parts, [&](int64_t p) {
      Arena arena(scratch.data() + p * size.used());
      WriteBackwardScratch<T> s(arena, a);
      write_backward_part<T>(a, b, part_of(a.N, parts, p, tile), s);
    });
    Arena arena(scratch.data());
    WriteBackwardScratch<T> sum(arena, a);
    for (int64_t p = 1; p < parts; ++p) {
      Arena arena(scratch.data() + p * size.used());
      const WriteBackwardScratch<T> s(arena, a);
      for (int64_t j = 0; j < a.R * a.D; ++j) sum.grad_vector[j] += s.grad_vector[j];
      for (int64_t r = 0; r < a.R; ++r) sum.grad_gate[r] += s.grad_gate[r];
    }
    finish(b, sum);
  }
  return true;
}

// ---- lrua_scan: one step ----------------------------------------------------------------------------------------

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
  T *gate, *keep, *key_square, *key_buffer, *vector_buffer, *beta_buffer;
  StepInputs(Arena& arena, int64_t R, int64_t D)
      : gate(arena.take<T>(R)), keep(arena.take<T>(R)), key_square(arena.take<T>(R)),
        key_buffer(arena.take<T>(R * D)), vector_buffer(arena.take<T>(R * D)), beta_buffer(arena.take<T>(R)) {}

  template <class Arguments>
  void load(const Arguments& a, int64_t t, int64_t b) {
    const int64_t row = (t * a.B + b) * a.R;
    key = widen(a.keys, a.input, row * a.D, a.R * a.D, key_buffer);
    vector = widen(a.write_vectors, a.input, row * a.D, a.R * a.D, vector_buffer);
    load_gates(a.gate_logits, a.input, row, a.R, gate, keep);
    if (a.sharpness) {
      beta = widen(a.sharpness, a.input, row, a.R, beta_buffer);
    } else {
      for (int64_t r = 0; r < a.R; ++r) beta_buffer[r] = 1;
      beta = beta_buffer;
    }
    for (int64_t r = 0; r < a.R; ++r) key_square[r] = square_sum(key + r * a.D, a.D);
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
struct Softmax {  // of each part: the greatest similarity, and the sum of weights relative to the greatest of all; [parts, R]
  T *greatest, *total, *scale;
  Softmax(Arena& arena, int64_t parts, int64_t R)
      : greatest(arena.take<T>(parts * R)), total(arena.take<T>(parts * R)), scale(arena.take<T>(R)) {}

  // Leaves the greatest of all parts in the first.
  void combine_greatest(int64_t parts, int64_t R) {
    for (int64_t p = 1; p < parts; ++p)
      for (int64_t r = 0; r < R; ++r)
        greatest[r] = greatest[p * R + r] > greatest[r] ? greatest[p * R + r] : greatest[r];
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
void write_and_compare(const Scan<T>& scan, const StepInputs<T>& in, const int64_t* slots, int64_t p,
                       const StepArrays<T>& x, Softmax<T>& softmax, T* column) {
  const Range range = scan.part(p);
  const int64_t lo = range.lo, count = range.hi - range.lo, ld = scan.ld, D = scan.D, R = scan.R;
  mix_write_weights(static_cast<const T*>(x.before), ld, R, range, in.gate, in.keep, slots, scan.shared_target,
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
    write_dot_and_square_slots(static_cast<const T*>(x.from + lo), x.to + lo, ld, count, D, R, x.write_weights + lo,
                               in.vector, in.key, x.dots + lo, x.squares + lo);
  if (erases && x.from != x.to)  // a replay keeps the memory before the step as it was
    for (int64_t d = 0; d < D; ++d) x.from[d * ld + slots[0]] = column[d];
  for (int64_t r = 0; r < R; ++r) {
    T* weights = x.read_weights + r * ld + lo;
    T* q = x.q == nullptr ? nullptr : x.q + r * ld + lo;
    softmax.greatest[p * R + r] = score_slots<T>(x.dots + r * ld + lo, x.squares + lo, count, scan.valid(range),
                                                 in.key_square[r], in.beta[r], scan.eps, q, weights);
  }
}

// Second phase, slots of part p: similarities to weights, not yet normalised.
template <class T>
void weigh(const Scan<T>& scan, int64_t p, T* read_weights, Softmax<T>& softmax) {
  const Range range = scan.part(p);
  for (int64_t r = 0; r < scan.R; ++r)
    softmax.total[p * scan.R + r] =
        exp_slots(read_weights + r * scan.ld + range.lo, range.hi - range.lo, softmax.greatest[r]);
}

// ---- lrua_scan: forward -----------------------------------------------------------------------------------------

template <class T>
struct ScanScratch {
  StepInputs<T> in;
  Softmax<T> softmax;
  T *memory, *read_weights, *write_weights, *dots, *squares, *usage, *reads, *columns;
  Int<T>*order, *least;
  int64_t *candidates, *slots;
  ScanScratch(Arena& arena, const Scan<T>& scan)
      : in(arena, scan.R, scan.D), softmax(arena, scan.parts, scan.R), memory(arena.take<T>(scan.D * scan.ld)),
        read_weights(arena.take<T>(scan.R * scan.ld)), write_weights(arena.take<T>(scan.R * scan.ld)),
        dots(arena.take<T>(scan.R * scan.ld)), squares(arena.take<T>(scan.ld)), usage(arena.take<T>(scan.ld)),
        reads(arena.take<T>(scan.parts * scan.R * scan.D)), columns(arena.take<T>(scan.parts * scan.D)),
        order(arena.take<Int<T>>(scan.ld)), least(arena.take<Int<T>>(scan.parts * scan.R)),
        candidates(arena.take<int64_t>(scan.parts * scan.R)), slots(arena.take<int64_t>(scan.R)) {}
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

template <class T>
void scan_sample(const LruaScan& a, const Scan<T>& scan, int64_t b, const Parallel& parallel, ScanScratch<T>& s) {
  const int64_t N = a.N, D = a.D, R = a.R, ld = scan.ld, parts = scan.parts;
  parallel_run(parallel, parts, [&](int64_t p) {
    const Range range = scan.part(p);
    load_slots(static_cast<const T*>(a.memory) + b * N * D, N, D, range.lo, range.hi, s.memory + range.lo, ld);
    load_rows(static_cast<const T*>(a.read_weights) + b * R * N, R, N, range.lo, range.hi, s.read_weights, ld);
    load_rows(static_cast<const T*>(a.usage) + b * N, 1, N, range.lo, range.hi, s.usage, ld);
    find_candidates(scan, p, s);
  });
  const StepArrays<T> arrays = {s.memory, s.memory, s.read_weights, s.write_weights, s.read_weights, s.dots, s.squares,
                                nullptr};
  for (int64_t t = 0; t < a.T; ++t) {
    choose_slots(scan, s);
    if (a.anchor_every > 0)
      for (int64_t j = 0; j < R; ++j) a.slots[(t * a.B + b) * R + j] = s.slots[j];
    s.in.load(a, t, b);
    s.in.fetch(a, t + 1, b);
    const bool keeps = a.anchor_every > 0 && t > 0 && t % a.anchor_every == 0;
    T* anchor = keeps ? static_cast<T*>(a.anchors) + ((t / a.anchor_every - 1) * a.B + b) * (D + R) * ld : nullptr;
    parallel_run(parallel, parts, [&](int64_t p) {
      const Range range = scan.part(p);
      if (keeps) {
        const size_t bytes = (range.hi - range.lo) * sizeof(T);
        for (int64_t d = 0; d < D; ++d) std::memcpy(anchor + d * ld + range.lo, s.memory + d * ld + range.lo, bytes);
        for (int64_t r = 0; r < R; ++r)
          std::memcpy(anchor + (D + r) * ld + range.lo, s.read_weights + r * ld + range.lo, bytes);
      }
      write_and_compare(scan, s.in, s.slots, p, arrays, s.softmax, s.columns + p * D);
    });
    s.softmax.combine_greatest(parts, R);
    parallel_run(parallel, parts, [&](int64_t p) {
      const Range range = scan.part(p);
      weigh(scan, p, s.read_weights, s.softmax);
      weighted_sums<T, false>(s.memory + range.lo, ld, range.hi - range.lo, D, R, s.read_weights + range.lo,
                              s.reads + p * R * D);
    });
    s.softmax.combine_total(parts, R);
    for (int64_t r = 0; r < R; ++r) {
      T* read = s.reads + r * D;
      for (int64_t p = 1; p < parts; ++p)
        for (int64_t d = 0; d < D; ++d) read[d] += s.reads[(p * R + r) * D + d];
      for (int64_t d = 0; d < D; ++d) read[d] *= s.softmax.scale[r];
    }
    narrow(s.reads, R * D, a.reads, a.input, (t * a.B + b) * R * D);
    parallel_run(parallel, parts,
                 [&](int64_t p) { normalise_and_use(scan, static_cast<T>(a.usage_decay), p, s); });
  }
  parallel_run(parallel, parts, [&](int64_t p) {
    const Range range = scan.part(p);
    store_slots(static_cast<const T*>(s.memory + range.lo), ld, N, D, range.lo, range.hi,
                static_cast<T*>(a.out_memory) + b * N * D);
    store_rows(static_cast<const T*>(s.read_weights), ld, R, N, range.lo, range.hi,
               static_cast<T*>(a.out_read_weights) + b * R * N);
    store_rows(static_cast<const T*>(s.usage), ld, 1, N, range.lo, range.hi, static_cast<T*>(a.out_usage) + b * N);
  });
}

// Runs sample(b, scan, arena) for all samples: on as many threads as there are samples, or one sample after the other with
// its slots in parts where the memory is large enough that meeting twice a step pays.
template <class T, class Arguments, class Scratchpad, class Sample>
bool run_scan(const Arguments& a, const Parallel& parallel, Scan<T> scan, double work_per_slot, Scratchpad scratchpad,
              Sample sample) {
  const double step = static_cast<double>(a.N) * work_per_slot;
  scan.parts = 1;
  if (a.B < parallel.threads && step > 400000) scan.parts = worthwhile_tasks(parallel, scan.ld / 64, step / 8);
  const int64_t tasks =
      scan.parts > 1 ? 1
                     : worthwhile_tasks(parallel, a.B, static_cast<double>(a.B) * static_cast<double>(a.T + 1) * step);
  Arena size;
  scratchpad(size, scan);
  const Scratch scratch(tasks * size.used());
  if (scratch.data() == nullptr) return false;
  parallel_run(parallel, tasks, [&](int64_t task) {
    const Range samples = part_of(a.B, tasks, task);
    for (int64_t b = samples.lo; b < samples.hi; ++b) {
      Arena arena(scratch.data() + task * size.used());
      auto s = scratchpad(arena, scan);
      sample(b, scan, s);
    }
  });
  return true;
}

template <class T>
bool lrua_scan(const LruaScan& a, const Parallel& parallel) {
  const Scan<T> scan = {a.N, a.D, a.R, padded_slots(a.N), 1, a.read_first, a.shared_target, static_cast<T>(a.eps)};
  return run_scan<T>(
      a, parallel, scan, static_cast<double>(a.D * (3 * a.R + 1)),
      [](Arena& arena, const Scan<T>& scan) { return ScanScratch<T>(arena, scan); },
      [&](int64_t b, const Scan<T>& scan, ScanScratch<T>& s) { scan_sample(a, scan, b, parallel, s); });
}

// ---- lrua_scan: backward ----------------------------------------------------------------------------------------

template <class T>
struct ScanBackwardScratch {
  StepInputs<T> in;
  Softmax<T> softmax;
  // One replay: memories and read weights before each of its steps and after the last, similarity of each step.
  T *memories, *read_weights, *dots, *q, *squares;
  T *write_weights, *grad_memory, *grad_read_weights, *grad_weights, *grad_write_weights, *grad_squares, *columns;
  T *grad_read, *delta;                                                       // [R, D]; [parts, R]
  T *grad_key, *grad_vector, *grad_key_square, *grad_sharpness, *grad_gate;  // of each part: [R, D] and [R]
  ScanBackwardScratch(Arena& arena, const Scan<T>& scan, int64_t steps)
      : in(arena, scan.R, scan.D), softmax(arena, scan.parts, scan.R),
        memories(arena.take<T>((steps + 1) * scan.D * scan.ld)),
        read_weights(arena.take<T>((steps + 1) * scan.R * scan.ld)), dots(arena.take<T>(steps * scan.R * scan.ld)),
        q(arena.take<T>(steps * scan.R * scan.ld)), squares(arena.take<T>(steps * scan.ld)),
        write_weights(arena.take<T>(scan.R * scan.ld)), grad_memory(arena.take<T>(scan.D * scan.ld)),
        grad_read_weights(arena.take<T>(scan.R * scan.ld)), grad_weights(arena.take<T>(scan.R * scan.ld)),
        grad_write_weights(arena.take<T>(scan.R * scan.ld)), grad_squares(arena.take<T>(scan.ld)),
        columns(arena.take<T>(scan.parts * scan.D)), grad_read(arena.take<T>(scan.R * scan.D)),
        delta(arena.take<T>(scan.parts * scan.R)), grad_key(arena.take<T>(scan.parts * scan.R * scan.D)),
        grad_vector(arena.take<T>(scan.parts * scan.R * scan.D)), grad_key_square(arena.take<T>(scan.parts * scan.R)),
        grad_sharpness(arena.take<T>(scan.parts * scan.R)), grad_gate(arena.take<T>(scan.parts * scan.R)) {}
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
  else if (scan.read_first)
    dot_slots(static_cast<const T*>(grad), ld, count, D, R, s.in.vector, out);
  else if (grad_read)
    add_gradient_and_dot<T, true, true>(after + lo, grad, ld, count, D, R, weights + lo, grad_read, grad_dots + lo,
                                        s.in.key, s.grad_squares + lo, s.in.vector, out);
  else
    add_gradient_and_dot<T, false, true>(after + lo, grad, ld, count, D, R, none, none, grad_dots + lo, s.in.key,
                                         s.grad_squares + lo, s.in.vector, out);
  mix_write_weights(weights_before, ld, R, range, s.in.gate, s.in.keep, slots, scan.shared_target, s.write_weights);
  weighted_sums<T, false>(grad, ld, count, D, R, s.write_weights + lo, s.grad_vector + p * R * D);
  for (int64_t r = 0; r < R; ++r) {
    const T* g = s.grad_write_weights + r * ld;
    s.grad_gate[p * R + r] = gate_gradient(g, weights_before + r * ld, r, R, range, s.in.gate[r], s.in.keep[r], slots,
                                           scan.shared_target);
    for (int64_t i = range.lo; i < range.hi; i += width<T>)
      store(s.grad_read_weights + r * ld + i, load(g + i) * s.in.gate[r]);
  }
  if (slots[0] >= range.lo && slots[0] < range.hi) clear_slot(s.grad_memory, ld, D, slots[0]);
  if (scan.read_first)
    add_gradient<T, false, true>(before + lo, grad, ld, count, D, R, none, none, grad_dots + lo, s.in.key,
                                 s.grad_squares + lo);
}

template <class T>
void scan_backward_sample(const LruaScanBackward& a, const Scan<T>& scan, int64_t b, const Parallel& parallel,
                          ScanBackwardScratch<T>& s) {
  const int64_t N = a.N, D = a.D, R = a.R, ld = scan.ld, parts = scan.parts, every = a.anchor_every;
  parallel_run(parallel, parts, [&](int64_t p) {
    const Range range = scan.part(p);
    if (a.grad_memory) {
      load_slots(static_cast<const T*>(a.grad_memory) + b * N * D, N, D, range.lo, range.hi, s.grad_memory + range.lo, ld);
    } else {
      for (int64_t d = 0; d < D; ++d)
        std::memset(s.grad_memory + d * ld + range.lo, 0, (range.hi - range.lo) * sizeof(T));
    }
    if (a.grad_read_weights) {
      load_rows(static_cast<const T*>(a.grad_read_weights) + b * R * N, R, N, range.lo, range.hi, s.grad_read_weights, ld);
    } else {
      for (int64_t r = 0; r < R; ++r)
        std::memset(s.grad_read_weights + r * ld + range.lo, 0, (range.hi - range.lo) * sizeof(T));
    }
  });
  for (int64_t first = a.T > 0 ? (a.T - 1) / every * every : -1; first >= 0; first -= every) {
    const int64_t steps = a.T - first < every ? a.T - first : every;
    const T* anchor =
        first == 0 ? nullptr : static_cast<const T*>(a.anchors) + ((first / every - 1) * a.B + b) * (D + R) * ld;
    if (anchor) {
      std::memcpy(s.memories, anchor, D * ld * sizeof(T));
      std::memcpy(s.read_weights, anchor + D * ld, R * ld * sizeof(T));
    } else {
      load_slots(static_cast<const T*>(a.memory) + b * N * D, N, D, 0, ld, s.memories, ld);
      load_rows(static_cast<const T*>(a.read_weights) + b * R * N, R, N, 0, ld, s.read_weights, ld);
    }
    for (int64_t step = 0; step < steps; ++step) {
      s.in.load(a, first + step, b);
      s.in.fetch(a, first + step + 1, b);
      const int64_t* slots = a.slots + ((first + step) * a.B + b) * R;
      T* memory = s.memories + step * D * ld;
      T* read_weights = s.read_weights + step * R * ld;
      const StepArrays<T> arrays = {memory, memory + D * ld, read_weights, s.write_weights, read_weights + R * ld,
                                    s.dots + step * R * ld, s.squares + step * ld, s.q + step * R * ld};
      parallel_run(parallel, parts, [&](int64_t p) {
        write_and_compare(scan, s.in, slots, p, arrays, s.softmax, s.columns + p * D);
      });
      s.softmax.combine_greatest(parts, R);
      parallel_run(parallel, parts, [&](int64_t p) { weigh(scan, p, arrays.read_weights, s.softmax); });
      s.softmax.combine_total(parts, R);
      parallel_run(parallel, parts, [&](int64_t p) {
        const Range range = scan.part(p);
        for (int64_t r = 0; r < R; ++r)
          scale_slots(arrays.read_weights + r * ld + range.lo, range.hi - range.lo, s.softmax.scale[r]);
      });
    }
    for (int64_t step = steps - 1; step >= 0; --step) {
      const int64_t t = first + step, row = (t * a.B + b) * R;
      s.in.load(a, t, b);
      s.in.fetch(a, t - 1, b);
      const T* grad_read = a.grad_reads ? widen(a.grad_reads, a.input, row * D, R * D, s.grad_read) : nullptr;
      parallel_run(parallel, parts, [&](int64_t p) {
        gather_weight_gradient(scan, p, s.memories + (step + 1) * D * ld, s.read_weights + (step + 1) * R * ld,
                               grad_read, s);
      });
      parallel_run(parallel, parts,
                   [&](int64_t p) { back_through_step(scan, p, a.slots + row, step, grad_read, s); });
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
      narrow(s.grad_key, R * D, a.grad_keys, a.input, row * D);
      narrow(s.grad_vector, R * D, a.grad_write_vectors, a.input, row * D);
      narrow(s.grad_gate, R, a.grad_gate_logits, a.input, row);
      if (a.grad_sharpness) narrow(s.grad_sharpness, R, a.grad_sharpness, a.input, row);
    }
  }
  parallel_run(parallel, parts, [&](int64_t p) {
    const Range range = scan.part(p);
    store_slots(static_cast<const T*>(s.grad_memory + range.lo), ld, N, D, range.lo, range.hi,
                static_cast<T*>(a.grad_in_memory) + b * N * D);
    store_rows(static_cast<const T*>(s.grad_read_weights), ld, R, N, range.lo, range.hi,
               static_cast<T*>(a.grad_in_read_weights) + b * R * N);
  });
}

template <class T>
bool lrua_scan_backward(const LruaScanBackward& a, const Parallel& parallel) {
  const Scan<T> scan = {a.N, a.D, a.R, padded_slots(a.N), 1, a.read_first, a.shared_target, static_cast<T>(a.eps)};
  const int64_t steps = a.T < a.anchor_every ? a.T : a.anchor_every;
  return run_scan<T>(
      a, parallel, scan, static_cast<double>(a.D * (8 * a.R + 2)),
      [&](Arena& arena, const Scan<T>& scan) { return ScanBackwardScratch<T>(arena, scan, steps); },
      [&](int64_t b, const Scan<T>& scan, ScanBackwardScratch<T>& s) { scan_backward_sample(a, scan, b, parallel, s); });
}

// ---- by dtype ---------------------------------------------------------------------------------------------------

bool least_used_any(const LeastUsed& a, const Parallel& parallel) {
  return a.state == Dtype::float64 ? least_used<double>(a, parallel) : least_used<float>(a, parallel);
}
bool write_any(const LruaWrite& a, const Parallel& parallel) {
  return a.state == Dtype::float64 ? lrua_write<double>(a, parallel) : lrua_write<float>(a, parallel);
}
bool write_backward_any(const LruaWriteBackward& a, const Parallel& parallel) {
  return a.state == Dtype::float64 ? lrua_write_backward<double>(a, parallel) : lrua_write_backward<float>(a, parallel);
}
bool scan_any(const LruaScan& a, const Parallel& parallel) {
  return a.state == Dtype::float64 ? lrua_scan<double>(a, parallel) : lrua_scan<float>(a, parallel);
}
bool scan_backward_any(const LruaScanBackward& a, const Parallel& parallel) {
  return a.state == Dtype::float64 ? lrua_scan_backward<double>(a, parallel) : lrua_scan_backward<float>(a, parallel);
}

}  // namespace

extern const LruaKernels lrua_kernels;
const LruaKernels lrua_kernels = {least_used_any, write_any, write_backward_any, scan_any, scan_backward_any};

}  // namespace MANN_FAST_ISA
}  // namespace mann_fast

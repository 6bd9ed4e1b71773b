// least_used, lrua_write and lrua_scan (a step is a scan of one), forward and backward.
//
// A scan holds one sample's memory in cache through all T steps; lrua_step.h has the step. Where there are fewer samples than
// threads and the memory is large, the slots of a sample are split over the threads.
#include "lrua_step.h"

namespace mann_fast {
namespace MANN_FAST_ISA {
namespace {

// ---- least_used -------------------------------------------------------------------------------------------------

template <class T>
bool least_used(const LeastUsed& a, const Parallel& parallel) {
  const double work = static_cast<double>(a.B) * (2.0 * static_cast<double>(a.N) + 20.0 * static_cast<double>(a.n));
  const auto make = [&](Arena& arena) { return LeastUsedScratch<T>(arena, a.n); };
  return run_items(parallel, a.B, worthwhile_tasks(parallel, a.B, work), make, [&](int64_t b, LeastUsedScratch<T>& s) {
    least_used_slots(static_cast<const T*>(a.usage) + b * a.N, a.N, a.n, a.slots + b * a.n, s);
  });
}

// ---- lrua_write -------------------------------------------------------------------------------------------------

template <class T>
void load_gates(const void* gate_logits, Dtype input, int64_t offset, int64_t R, T* gate, T* rest) {
  const T* logits = widen(gate_logits, input, offset, R, rest);
  for (int64_t r = 0; r < R; ++r) sigmoids(logits[r], gate + r, rest + r);
}

template <class T>
struct WriteScratch {
  T *block, *read_weights, *write_weights, *vector, *gate, *rest;
  LeastUsedScratch<T> least_used;
  WriteScratch(Arena& arena, const LruaWrite& a)
      : block(arena.take<T>(a.D * tile)), read_weights(arena.take<T>(a.R * tile)), write_weights(arena.take<T>(a.R * tile)),
        vector(arena.take<T>(a.R * a.D)), gate(arena.take<T>(a.R)), rest(arena.take<T>(a.R)), least_used(arena, a.R) {}
};

template <class T>
void write_part(const LruaWrite& a, int64_t b, Range slots, WriteScratch<T>& s) {
  const T* memory = static_cast<const T*>(a.memory) + b * a.N * a.D;
  const T* read_weights = static_cast<const T*>(a.read_weights) + b * a.R * a.N;
  T* out_memory = static_cast<T*>(a.out_memory) + b * a.N * a.D;
  T* write_weights = static_cast<T*>(a.write_weights) + b * a.R * a.N;
  const int64_t* chosen = a.slots + b * a.R;
  const T* vector = widen(a.write_vector, a.input, b * a.R * a.D, a.R * a.D, s.vector);
  load_gates(a.gate_logit, a.input, b * a.R, a.R, s.gate, s.rest);
  for (int64_t lo = slots.lo; lo < slots.hi; lo += tile) {
    const int64_t end = lo + tile < slots.hi ? lo + tile : slots.hi, count = padded_slots(end - lo);
    load_slots(memory, a.N, a.D, lo, lo + count, s.block, tile);
    load_tile_rows(read_weights + lo, a.R, a.N, end - lo, count, s.read_weights);
    // Row pointers moved back by lo, so that slots keep their numbers; only [lo, lo + count) is touched.
    mix_write_weights<T>(s.read_weights - lo, tile, a.R, {lo, lo + count}, s.gate, s.rest, chosen, a.shared_target,
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
  const int64_t multiply_adds = a.D * (a.R + 4);
  return run_samples_or_slots<WriteScratch<T>>(
      a, parallel, multiply_adds, multiply_adds,
      [&](int64_t b, WriteScratch<T>& s) {
        least_used_slots(static_cast<const T*>(a.usage) + b * a.N, a.N, a.R, a.slots + b * a.R, s.least_used);
      },
      [&](int64_t b, Range slots, WriteScratch<T>& s) { write_part<T>(a, b, slots, s); },
      [](int64_t, const WriteScratch<T>*, int64_t) {});
}

template <class T>
struct WriteBackwardScratch {
  T *grad, *read_weights, *write_weights, *grad_write_weights, *vector, *gate, *rest, *grad_vector, *grad_gate;
  WriteBackwardScratch(Arena& arena, const LruaWriteBackward& a)
      : grad(arena.take<T>(a.D * tile)), read_weights(arena.take<T>(a.R * tile)), write_weights(arena.take<T>(a.R * tile)),
        grad_write_weights(arena.take<T>(a.R * tile)), vector(arena.take<T>(a.R * a.D)), gate(arena.take<T>(a.R)),
        rest(arena.take<T>(a.R)), grad_vector(arena.take<T>(a.R * a.D)), grad_gate(arena.take<T>(a.R)) {}
};

template <class T>
void write_backward_part(const LruaWriteBackward& a, int64_t b, Range slots, WriteBackwardScratch<T>& s) {
  const T* grad_memory = a.grad_memory ? static_cast<const T*>(a.grad_memory) + b * a.N * a.D : nullptr;
  const T* grad_write_weights = a.grad_write_weights ? static_cast<const T*>(a.grad_write_weights) + b * a.R * a.N : nullptr;
  const T* read_weights = static_cast<const T*>(a.read_weights) + b * a.R * a.N;
  T* grad_in_memory = static_cast<T*>(a.grad_in_memory) + b * a.N * a.D;
  T* grad_read_weights = static_cast<T*>(a.grad_read_weights) + b * a.R * a.N;
  const int64_t* chosen = a.slots + b * a.R;
  const T* vector = widen(a.write_vector, a.input, b * a.R * a.D, a.R * a.D, s.vector);
  load_gates(a.gate_logit, a.input, b * a.R, a.R, s.gate, s.rest);
  for (int64_t j = 0; j < a.R * a.D; ++j) s.grad_vector[j] = 0;
  for (int64_t r = 0; r < a.R; ++r) s.grad_gate[r] = 0;
  for (int64_t lo = slots.lo; lo < slots.hi; lo += tile) {
    const int64_t end = lo + tile < slots.hi ? lo + tile : slots.hi, count = padded_slots(end - lo);
    const Range range{lo, lo + count};
    if (grad_memory) load_slots(grad_memory, a.N, a.D, lo, lo + count, s.grad, tile);
    else std::memset(s.grad, 0, a.D * tile * sizeof(T));
    load_tile_rows(read_weights + lo, a.R, a.N, end - lo, count, s.read_weights);
    mix_write_weights<T>(s.read_weights - lo, tile, a.R, range, s.gate, s.rest, chosen, a.shared_target, s.write_weights - lo);
    dot_slots(static_cast<const T*>(s.grad), tile, count, a.D, a.R, vector, s.grad_write_weights);
    for (int64_t r = 0; r < a.R; ++r) {
      T* g = s.grad_write_weights + r * tile;
      if (grad_write_weights)
        for (int64_t i = lo; i < end; ++i) g[i - lo] += grad_write_weights[r * a.N + i];
      s.grad_gate[r] += gate_gradient<T>(g - lo, s.read_weights + r * tile - lo, r, a.R, range, s.gate[r], s.rest[r], chosen,
                                         a.shared_target);
      for (int64_t i = lo; i < end; ++i) grad_read_weights[r * a.N + i] = g[i - lo] * s.gate[r];
    }
    weighted_sums<T, true>(s.grad, tile, count, a.D, a.R, s.write_weights, s.grad_vector);
    if (chosen[0] >= lo && chosen[0] < end) clear_slot(s.grad, tile, a.D, chosen[0] - lo);
    store_slots(static_cast<const T*>(s.grad), tile, a.N, a.D, lo, lo + count, grad_in_memory);
  }
}

template <class T>
bool lrua_write_backward(const LruaWriteBackward& a, const Parallel& parallel) {
  const int64_t multiply_adds = a.D * (2 * a.R + 4);
  return run_samples_or_slots<WriteBackwardScratch<T>>(
      a, parallel, multiply_adds, multiply_adds, [](int64_t, WriteBackwardScratch<T>&) {},
      [&](int64_t b, Range slots, WriteBackwardScratch<T>& s) { write_backward_part<T>(a, b, slots, s); },
      [&](int64_t b, const WriteBackwardScratch<T>* parts, int64_t count) {
        const WriteBackwardScratch<T>& sum = parts[0];
        for (int64_t p = 1; p < count; ++p) {
          for (int64_t j = 0; j < a.R * a.D; ++j) sum.grad_vector[j] += parts[p].grad_vector[j];
          for (int64_t r = 0; r < a.R; ++r) sum.grad_gate[r] += parts[p].grad_gate[r];
        }
        narrow(sum.grad_vector, a.R * a.D, a.grad_write_vector, a.input, b * a.R * a.D);
        narrow(sum.grad_gate, a.R, a.grad_gate_logit, a.input, b * a.R);
      });
}

// ---- lrua_scan --------------------------------------------------------------------------------------------------

template <class T>
void scan_sample(const LruaScan& a, const Scan<T>& scan, int64_t b, const Parallel& parallel, ScanScratch<T>& s) {
  const int64_t N = a.N, D = a.D, R = a.R, every = a.anchor_every;
  begin_sample(scan, static_cast<const T*>(a.memory) + b * N * D, static_cast<const T*>(a.read_weights) + b * R * N,
               static_cast<const T*>(a.usage) + b * N, parallel, s);
  const int64_t length = a.sequences.length(a.T, b);
  const T* start = static_cast<const T*>(a.sequences.start);
  const T* none = nullptr;
  for (int64_t t = 0; t < length; ++t) {
    if (a.sequences.begins(t, a.B, b)) begin_sample(scan, start, none, none, parallel, s);
    s.in.load(a, t, b);
    s.in.fetch(a, t + 1, b);
    T* anchor = has_anchor(t, every) ? static_cast<T*>(a.anchors) + anchor_offset(t, every, a.B, b, D + R, N) : nullptr;
    step_sample(scan, static_cast<T>(a.usage_decay), every > 0 ? a.slots + (t * a.B + b) * R : nullptr, anchor, parallel, s);
    narrow(s.reads, R * D, a.reads, a.input, (t * a.B + b) * R * D);
  }
  clear_steps<T>(a.reads, a.input, length, a.T, a.B, b, R * D);
  end_sample(scan, static_cast<T*>(a.out_memory) + b * N * D, static_cast<T*>(a.out_read_weights) + b * R * N,
             static_cast<T*>(a.out_usage) + b * N, parallel, s);
}

// Runs sample(b, scan, arena) for all samples: on as many threads as there are samples, or one sample after the other with
// its slots in parts where the memory is large enough that two barriers a step pay.
template <class T, class Arguments, class Scratchpad, class Sample>
bool run_scan(const Arguments& a, const Parallel& parallel, Scan<T> scan, double work_per_slot, Scratchpad scratchpad,
              Sample sample) {
  const double step = static_cast<double>(a.N) * work_per_slot;
  scan.parts = 1;
  if (a.B < parallel.threads && step > 400000) scan.parts = worthwhile_tasks(parallel, scan.ld / 64, step / 8);
  const int64_t tasks =
      scan.parts > 1 ? 1 : worthwhile_tasks(parallel, a.B, static_cast<double>(a.B) * static_cast<double>(a.T + 1) * step);
  return run_items(
      parallel, a.B, tasks, [&](Arena& arena) { return scratchpad(arena, scan); },
      [&](int64_t b, auto& s) { sample(b, scan, s); });
}

template <class T>
bool lrua_scan(const LruaScan& a, const Parallel& parallel) {
  const Scan<T> scan = {a.N, a.D, a.R, padded_slots(a.N), 1, a.read_first, a.shared_target, static_cast<T>(a.eps)};
  return run_scan<T>(
      a, parallel, scan, static_cast<double>(a.D * (3 * a.R + 1)),
      [](Arena& arena, const Scan<T>& scan) { return ScanScratch<T>(arena, arena, scan); },
      [&](int64_t b, const Scan<T>& scan, ScanScratch<T>& s) { scan_sample(a, scan, b, parallel, s); });
}

template <class T>
void scan_backward_sample(const LruaScanBackward& a, const Scan<T>& scan, int64_t b, const Parallel& parallel,
                          ScanBackwardScratch<T>& s) {
  const int64_t N = a.N, D = a.D, R = a.R, every = a.anchor_every;
  const auto of_sample = [b](const void* from, int64_t size) {
    return from == nullptr ? nullptr : static_cast<const T*>(from) + b * size;
  };
  begin_backward(scan, of_sample(a.grad_memory, N * D), of_sample(a.grad_read_weights, R * N), parallel, s);
  const Sequences& sequences = a.sequences;
  const int64_t length = sequences.length(a.T, b);
  T* grad_start = a.grad_start ? static_cast<T*>(a.grad_start) + b * N * D : nullptr;
  if (grad_start) std::memset(grad_start, 0, N * D * sizeof(T));
  for (int64_t end = length, first = 0; end > 0; end = first) {
    first = sequences.replay_from(end - 1, every, a.B, b);
    const int64_t steps = end - first;
    const bool begins = sequences.begins(first, a.B, b);
    if (begins) {
      const T* none = nullptr;
      begin_replay(scan, none, static_cast<const T*>(sequences.start), none, s);
    } else {
      const T* anchor = first == 0 ? nullptr : static_cast<const T*>(a.anchors) + anchor_offset(first, every, a.B, b, D + R, N);
      begin_replay(scan, anchor, of_sample(a.memory, N * D), of_sample(a.read_weights, R * N), s);
    }
    for (int64_t step = 0; step < steps; ++step) {
      s.in.load(a, first + step, b);
      s.in.fetch(a, first + step + 1, b);
      replay_step(scan, a.slots + ((first + step) * a.B + b) * R, step, parallel, s);
    }
    for (int64_t step = steps - 1; step >= 0; --step) {
      const int64_t t = first + step, row = (t * a.B + b) * R;
      s.in.load(a, t, b);
      s.in.fetch(a, t - 1, b);
      const T* grad_read = a.grad_reads ? widen(a.grad_reads, a.input, row * D, R * D, s.grad_read) : nullptr;
      step_backward(scan, a.slots + row, step, grad_read, parallel, s);
      narrow(s.grad_key, R * D, a.grad_keys, a.input, row * D);
      narrow(s.grad_vector, R * D, a.grad_write_vectors, a.input, row * D);
      narrow(s.grad_gate, R, a.grad_gate_logits, a.input, row);
      if (a.grad_sharpness) narrow(s.grad_sharpness, R, a.grad_sharpness, a.input, row);
    }
    if (begins) back_to_start(scan, grad_start, parallel, s);
  }
  for (void* grad : {a.grad_keys, a.grad_write_vectors}) clear_steps<T>(grad, a.input, length, a.T, a.B, b, R * D);
  for (void* grad : {a.grad_gate_logits, a.grad_sharpness}) clear_steps<T>(grad, a.input, length, a.T, a.B, b, R);
  end_backward(scan, static_cast<T*>(a.grad_in_memory) + b * N * D, static_cast<T*>(a.grad_in_read_weights) + b * R * N,
               parallel, s);
}

template <class T>
bool lrua_scan_backward(const LruaScanBackward& a, const Parallel& parallel) {
  const Scan<T> scan = {a.N, a.D, a.R, padded_slots(a.N), 1, a.read_first, a.shared_target, static_cast<T>(a.eps)};
  const int64_t steps = a.T < a.anchor_every ? a.T : a.anchor_every;
  return run_scan<T>(
      a, parallel, scan, static_cast<double>(a.D * (8 * a.R + 2)),
      [&](Arena& arena, const Scan<T>& scan) { return ScanBackwardScratch<T>(arena, arena, scan, steps); },
      [&](int64_t b, const Scan<T>& scan, ScanBackwardScratch<T>& s) { scan_backward_sample(a, scan, b, parallel, s); });
}

}  // namespace

MANN_FAST_LRUA_OPS(MANN_FAST_BY_DTYPE)

}  // namespace MANN_FAST_ISA
}  // namespace mann_fast

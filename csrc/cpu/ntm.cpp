// ntm_scan (a step is a scan of one, an address a step without write heads), forward and backward; ntm_step.h says how.
#include "ntm_step.h"

namespace mann_fast {
namespace MANN_FAST_ISA {
namespace {

template <class T>
void scan_sample(const NtmScan& a, const NtmSizes<T>& n, int64_t b, NtmScratch<T>& s) {
  load_slots(static_cast<const T*>(a.memory) + b * n.N * n.D, n.N, n.D, 0, n.ld, s.memory, n.ld);
  load_rows(static_cast<const T*>(a.weights) + b * n.heads * n.N, n.heads, n.N, 0, n.ld, s.previous, n.ld);
  const int64_t length = a.sequences.length(a.T, b);
  for (int64_t t = 0; t < length; ++t) {
    const int64_t row = t * a.B + b;
    if (a.sequences.begins(t, a.B, b)) {
      load_slots(static_cast<const T*>(a.sequences.start), n.N, n.D, 0, n.ld, s.memory, n.ld);
      start_rows(n.heads, 0, n.ld, s.previous, n.ld);
    }
    s.in.load(a, n, row);
    T* anchor = has_anchor(t, a.anchor_every) ? static_cast<T*>(a.anchors) + anchor_offset(t, a.anchor_every, a.B, b, n.D, n.N)
                                              : nullptr;
    ntm_step(n, a.read_first, anchor, s);
    narrow(s.reads, n.R * n.D, a.reads, a.input, row * n.R * n.D);
    if (a.anchor_every > 0)
      store_rows(static_cast<const T*>(s.x.weights), n.ld, n.heads, n.N, 0, n.ld,
                 static_cast<T*>(a.history) + row * n.heads * n.N);
  }
  clear_steps<T>(a.reads, a.input, length, a.T, a.B, b, n.R * n.D);
  store_slots(static_cast<const T*>(s.memory), n.ld, n.N, n.D, 0, n.ld, static_cast<T*>(a.out_memory) + b * n.N * n.D);
  store_rows(static_cast<const T*>(s.previous), n.ld, n.heads, n.N, 0, n.ld,
             static_cast<T*>(a.out_weights) + b * n.heads * n.N);
}

template <class T>
void scan_backward_sample(const NtmScanBackward& a, const NtmSizes<T>& n, int64_t b, NtmBackwardScratch<T>& s) {
  const int64_t ld = n.ld, D = n.D, block = D * ld, every = a.anchor_every;
  if (a.grad_memory) load_slots(static_cast<const T*>(a.grad_memory) + b * n.N * D, n.N, D, 0, ld, s.grad_memory, ld);
  else std::memset(s.grad_memory, 0, block * sizeof(T));
  if (a.grad_weights)
    load_rows(static_cast<const T*>(a.grad_weights) + b * n.heads * n.N, n.heads, n.N, 0, ld, s.grad_weights, ld);
  else std::memset(s.grad_weights, 0, n.heads * ld * sizeof(T));
  const T* history = static_cast<const T*>(a.history);
  const Sequences& sequences = a.sequences;
  const int64_t length = sequences.length(a.T, b);
  T* grad_start = a.grad_start ? static_cast<T*>(a.grad_start) + b * n.N * D : nullptr;
  if (grad_start) std::memset(grad_start, 0, n.N * D * sizeof(T));
  for (int64_t end = length, first = 0; end > 0; end = first) {
    first = sequences.replay_from(end - 1, every, a.B, b);
    const int64_t steps = end - first;
    const bool begins = sequences.begins(first, a.B, b);
    if (begins) load_slots(static_cast<const T*>(sequences.start), n.N, D, 0, ld, s.memories, ld);
    else if (first > 0)
      std::memcpy(s.memories, static_cast<const T*>(a.anchors) + anchor_offset(first, every, a.B, b, D, n.N),
                  block * sizeof(T));
    else load_slots(static_cast<const T*>(a.memory) + b * n.N * D, n.N, D, 0, ld, s.memories, ld);
    for (int64_t step = 0; step < steps; ++step) {  // the writes again
      const int64_t row = (first + step) * a.B + b;
      s.in.load(a, n, row);
      load_rows(history + (row * n.heads + n.R) * n.N, n.W, n.N, 0, ld, s.x.weights + n.R * ld, ld);
      erase_and_add(n, s.x.weights + n.R * ld, s.in.erase, s.in.add, static_cast<const T*>(s.memories + step * block),
                    s.memories + (step + 1) * block);
    }
    for (int64_t step = steps - 1; step >= 0; --step) {
      const int64_t t = first + step, row = t * a.B + b;
      const T *before = s.memories + step * block, *after = before + block;
      s.in.load(a, n, row);
      const T* came = t > 0 ? history + (row - a.B) * n.heads * n.N : static_cast<const T*>(a.weights) + b * n.heads * n.N;
      if (begins && step == 0) start_rows(n.heads, 0, ld, s.previous, ld);
      else load_rows(came, n.heads, n.N, 0, ld, s.previous, ld);
      load_rows(history + row * n.heads * n.N, n.heads, n.N, 0, ld, s.x.weights, ld);
      const T* grad_read = a.grad_reads ? widen(a.grad_reads, a.input, row * n.R * D, n.R * D, s.grad_read) : nullptr;
      ntm_step_backward(n, a.read_first, before, after, grad_read, s);
      narrow(s.grad_key, n.heads * D, a.grad_keys, a.input, row * n.heads * D);
      narrow(s.grad_sharpness, n.heads, a.grad_sharpness, a.input, row * n.heads);
      narrow(s.grad_gate, n.heads, a.grad_gates, a.input, row * n.heads);
      narrow(s.grad_shift, n.heads * n.shifts, a.grad_shift, a.input, row * n.heads * n.shifts);
      narrow(s.grad_sharpening, n.heads, a.grad_sharpening, a.input, row * n.heads);
      narrow(s.grad_erase, n.W * D, a.grad_erase, a.input, row * n.W * D);
      narrow(s.grad_add, n.W * D, a.grad_add, a.input, row * n.W * D);
    }
    if (begins) {
      give_to_start(s.grad_memory, ld, n.N, D, 0, ld, grad_start);
      std::memset(s.grad_weights, 0, n.heads * ld * sizeof(T));
    }
  }
  clear_steps<T>(a.grad_keys, a.input, length, a.T, a.B, b, n.heads * D);
  for (void* grad : {a.grad_sharpness, a.grad_gates, a.grad_sharpening})
    clear_steps<T>(grad, a.input, length, a.T, a.B, b, n.heads);
  clear_steps<T>(a.grad_shift, a.input, length, a.T, a.B, b, n.heads * n.shifts);
  for (void* grad : {a.grad_erase, a.grad_add}) clear_steps<T>(grad, a.input, length, a.T, a.B, b, n.W * D);
  store_slots(static_cast<const T*>(s.grad_memory), ld, n.N, D, 0, ld, static_cast<T*>(a.grad_in_memory) + b * n.N * D);
  store_rows(static_cast<const T*>(s.grad_weights), ld, n.heads, n.N, 0, ld,
             static_cast<T*>(a.grad_in_weights) + b * n.heads * n.N);
}

// ---- samples over threads -----------------------------------------------------------------------------------

template <class T, class Arguments, class Scratchpad, class Sample>
bool run_samples(const Arguments& a, const Parallel& parallel, double multiply_adds, Scratchpad scratchpad, Sample sample) {
  const NtmSizes<T> n(a);
  const double work = static_cast<double>(a.B) * static_cast<double>(a.T + 1) * static_cast<double>(a.N) *
                      (static_cast<double>(a.D) * multiply_adds + 20.0) * static_cast<double>(n.heads + 1);
  return run_items(
      parallel, a.B, worthwhile_tasks(parallel, a.B, work), [&](Arena& arena) { return scratchpad(arena, n); },
      [&](int64_t b, auto& s) { sample(n, b, s); });
}

template <class T>
bool ntm_scan(const NtmScan& a, const Parallel& parallel) {
  return run_samples<T>(
      a, parallel, 3, [](Arena& arena, const NtmSizes<T>& n) { return NtmScratch<T>(arena, arena, n); },
      [&](const NtmSizes<T>& n, int64_t b, NtmScratch<T>& s) { scan_sample(a, n, b, s); });
}

template <class T>
bool ntm_scan_backward(const NtmScanBackward& a, const Parallel& parallel) {
  const int64_t steps = a.T < a.anchor_every ? a.T : a.anchor_every;
  return run_samples<T>(
      a, parallel, 10, [&](Arena& arena, const NtmSizes<T>& n) { return NtmBackwardScratch<T>(arena, arena, n, steps); },
      [&](const NtmSizes<T>& n, int64_t b, NtmBackwardScratch<T>& s) { scan_backward_sample(a, n, b, s); });
}

}  // namespace

MANN_FAST_NTM_OPS(MANN_FAST_BY_DTYPE)

}  // namespace MANN_FAST_ISA
}  // namespace mann_fast

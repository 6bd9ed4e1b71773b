// dnc_scan (a step is a scan of one), forward and backward; dnc_step.h says how.
#include "dnc_step.h"

namespace mann_fast {
namespace MANN_FAST_ISA {
namespace {

template <class T>
void scan_sample(const DncScan& a, const DncSizes<T>& n, int64_t b, DncScratch<T>& s) {
  const int64_t length = a.sequences.length(a.T, b);
  begin_state(a.before, n, b, s);
  for (int64_t t = 0; t < length; ++t) {
    const int64_t row = t * n.B + b;
    if (a.sequences.begins(t, n.B, b)) restart_state(a.sequences.start, n, s);
    s.in.load(a.told, a.input, n, row);
    dnc_step(n, s);
    narrow(s.reads, n.R * n.D, a.reads, a.input, row * n.R * n.D);
    keep_step(a, n, row, s);
  }
  clear_steps<T>(a.reads, a.input, length, a.T, n.B, b, n.R * n.D);
  end_state(a.after, n, b, s);
}

template <class T>
void scan_backward_sample(const DncScanBackward& a, const DncSizes<T>& n, int64_t b, DncBackwardScratch<T>& s) {
  const int64_t length = a.sequences.length(a.T, b), RD = n.R * n.D;
  const auto tell = [&](int64_t t) { s.in.load(a.told, a.input, n, t * n.B + b); };
  T* grad_start = a.grad_start ? static_cast<T*>(a.grad_start) + b * n.N * n.D : nullptr;
  begin_backward(a.grad_after, n, b, grad_start, s);
  replay_to_anchors(a, n, b, tell, s);
  for (int64_t end = length, first = 0; end > 0; end = first) {
    first = a.sequences.replay_from(end - 1, s.every, n.B, b);
    replay_segment(a, n, b, first, end, tell, s);
    for (int64_t step = end - first - 1; step >= 0; --step) {
      const int64_t row = (first + step) * n.B + b;
      tell(first + step);
      const T* grad_read = a.grad_reads ? widen(a.grad_reads, a.input, row * RD, RD, s.grad_read) : nullptr;
      dnc_step_backward(a, n, b, first, step, grad_read, s);
      for (int k = 0; k < told_count; ++k)
        if (void* to = a.grad_told.*told_fields<void*>[k])
          narrow(s.grad_told.*told_fields<T*>[k], n.told[k], to, a.input, row * n.told[k]);
    }
    if (a.sequences.begins(first, n.B, b)) back_to_start(n, grad_start, s);
  }
  for (int k = 0; k < told_count; ++k)
    clear_steps<T>(a.grad_told.*told_fields<void*>[k], a.input, length, a.T, n.B, b, n.told[k]);
  end_backward(a.grad_before, n, b, s);
}

// ---- samples over threads -----------------------------------------------------------------------------------------------

template <class T, class Arguments, class Scratchpad, class Sample>
bool run_samples(const Arguments& a, const Parallel& parallel, double times, Scratchpad scratchpad, Sample sample) {
  const DncSizes<T> n(a, a.told.read_masks != nullptr, a.told.link_sharpening != nullptr);
  const double work = times * static_cast<double>(a.B) * static_cast<double>((a.T + 1) * n.multiply_adds());
  return run_items(
      parallel, a.B, worthwhile_tasks(parallel, a.B, work), [&](Arena& arena) { return scratchpad(arena, n); },
      [&](int64_t b, auto& s) { sample(n, b, s); });
}

template <class T>
bool dnc_scan(const DncScan& a, const Parallel& parallel) {
  return run_samples<T>(
      a, parallel, 1, [](Arena& arena, const DncSizes<T>& n) { return DncScratch<T>(arena, arena, n); },
      [&](const DncSizes<T>& n, int64_t b, DncScratch<T>& s) { scan_sample(a, n, b, s); });
}

template <class T>
bool dnc_scan_backward(const DncScanBackward& a, const Parallel& parallel) {
  return run_samples<T>(
      a, parallel, 3, [&](Arena& arena, const DncSizes<T>& n) { return DncBackwardScratch<T>(arena, arena, n, a.T); },
      [&](const DncSizes<T>& n, int64_t b, DncBackwardScratch<T>& s) { scan_backward_sample(a, n, b, s); });
}

}  // namespace

MANN_FAST_DNC_OPS(MANN_FAST_BY_DTYPE)

}  // namespace MANN_FAST_ISA
}  // namespace mann_fast

// sparse_read and sparse_scan. A scan copies the memory once and then changes rows of it; a step reads all of it once, in the
// search, for all heads; the square of each slot's norm is kept from the first step on. Where nearly all rows are alike it reads
// the others alone. Backward goes over the rows that were kept, and needs no memory.
#include "sparse_step.h"

namespace mann_fast {
namespace MANN_FAST_ISA {
namespace {

// ---- sparse_read -------------------------------------------------------------------------------------------------------

template <class T>
struct ReadScratch {
  T *key, *sharpness, *reads;
  Searching<T> searching;
  ReadScratch(Arena& arena, const SparseRead& a, int64_t parts)
      : key(arena.take<T>(a.R * a.D)), sharpness(arena.take<T>(a.R)), reads(arena.take<T>(a.R * a.D)),
        searching(arena, a, parts) {}
};

template <class T>
bool sparse_read(const SparseRead& a, const Parallel& parallel) {
  const int64_t parts = search_parts(a, parallel), RD = a.R * a.D, RK = a.R * a.K;
  const double work = static_cast<double>(a.B * a.N) * static_cast<double>(a.D * (a.R + 1));
  return run_items(
      parallel, a.B, parts > 1 ? 1 : worthwhile_tasks(parallel, a.B, work),
      [&](Arena& arena) { return ReadScratch<T>(arena, a, parts); },
      [&](int64_t b, ReadScratch<T>& s) {
        const T* memory = static_cast<const T*>(a.memory) + b * a.N * a.D;
        const T* key = widen(a.key, a.input, b * RD, RD, s.key);
        const T* sharpness = a.sharpness ? widen(a.sharpness, a.input, b * a.R, a.R, s.sharpness) : nullptr;
        T* squares = nullptr;
        const Best<T>* best = s.searching.run(memory, key, a.R, a.D, static_cast<T>(a.eps), squares, false, parallel);
        for (int64_t r = 0; r < a.R; ++r) {
          const int64_t row = b * RK + r * a.K;
          T* rows = static_cast<T*>(a.rows) + row * a.D;
          std::memcpy(a.slots + row, best[r].slot, a.K * sizeof(int64_t));
          copy_rows(memory, best[r].slot, a.K, a.D, rows);
          read_rows<T>(best[r].score, rows, a.K, a.D, sharpness ? sharpness[r] : T(1), static_cast<T*>(a.weights) + row,
                       s.reads + r * a.D);
        }
        narrow(s.reads, RD, a.read, a.input, b * RD);
      });
}

template <class T>
struct ReadBackwardScratch {
  T *key, *sharpness, *grad_read, *grad_weights, *grad_key, *grad_sharpness;
  template <class Arguments>
  ReadBackwardScratch(Arena& arena, const Arguments& a)
      : key(arena.take<T>(a.R * a.D)), sharpness(arena.take<T>(a.R)), grad_read(arena.take<T>(a.R * a.D)),
        grad_weights(arena.take<T>(a.R * a.K)), grad_key(arena.take<T>(a.R * a.D)), grad_sharpness(arena.take<T>(a.R)) {}
};

template <class T>
bool sparse_read_backward(const SparseReadBackward& a, const Parallel& parallel) {
  const int64_t ND = a.N * a.D, RD = a.R * a.D, RK = a.R * a.K;
  const double work = static_cast<double>(a.B) * static_cast<double>(ND + 6 * RK * a.D);
  return run_items(
      parallel, a.B, worthwhile_tasks(parallel, a.B, work), [&](Arena& arena) { return ReadBackwardScratch<T>(arena, a); },
      [&](int64_t b, ReadBackwardScratch<T>& s) {
        T* grad_memory = static_cast<T*>(a.grad_memory) + b * ND;
        const T* key = widen(a.key, a.input, b * RD, RD, s.key);
        const T* sharpness = a.sharpness ? widen(a.sharpness, a.input, b * a.R, a.R, s.sharpness) : nullptr;
        const T* grad_read = a.grad_read ? widen(a.grad_read, a.input, b * RD, RD, s.grad_read) : nullptr;
        std::memset(grad_memory, 0, ND * sizeof(T));
        std::memset(s.grad_key, 0, RD * sizeof(T));
        std::memset(s.grad_sharpness, 0, a.R * sizeof(T));
        if (a.grad_weights) std::memcpy(s.grad_weights, static_cast<const T*>(a.grad_weights) + b * RK, RK * sizeof(T));
        else std::memset(s.grad_weights, 0, RK * sizeof(T));
        for (int64_t r = 0; r < a.R; ++r) {
          const int64_t row = b * RK + r * a.K;
          read_rows_backward<T>(
              static_cast<const T*>(a.rows) + row * a.D, a.slots + row, static_cast<const T*>(a.weights) + row, a.K, a.D,
              key + r * a.D, sharpness ? sharpness[r] : T(1), static_cast<T>(a.eps), grad_read ? grad_read + r * a.D : nullptr,
              s.grad_weights + r * a.K, grad_memory, s.grad_key + r * a.D, s.grad_sharpness + r);
        }
        narrow(s.grad_key, RD, a.grad_key, a.input, b * RD);
        if (a.grad_sharpness) narrow(s.grad_sharpness, a.R, a.grad_sharpness, a.input, b * a.R);
      });
}

// ---- sparse_scan ---------------------------------------------------------------------------------------------------------

template <class T>
void scan_sample(const SparseScan& a, int64_t b, const Parallel& parallel, SparseScratch<T>& s) {
  const int64_t length = a.sequences.length(a.T, b), RD = a.R * a.D;
  begin_sample(a, b, parallel, s);
  for (int64_t t = 0; t < length; ++t) {
    const int64_t row = t * a.B + b;
    if (a.sequences.begins(t, a.B, b)) restart_sample(a, parallel, s);
    s.told.load(a, row);
    step_sample(a, t, b, parallel, s);
    narrow(s.reads, RD, a.reads, a.input, row * RD);
  }
  clear_steps<T>(a.reads, a.input, length, a.T, a.B, b, RD);
}

template <class T>
bool sparse_scan(const SparseScan& a, const Parallel& parallel) {
  const int64_t parts = search_parts(a, parallel);
  const double work = static_cast<double>((a.T + 1) * a.B) * static_cast<double>(a.N * a.D * a.R);
  return run_items(
      parallel, a.B, parts > 1 ? 1 : worthwhile_tasks(parallel, a.B, work),
      [&](Arena& arena) { return SparseScratch<T>(arena, arena, a, parts); },
      [&](int64_t b, SparseScratch<T>& s) { scan_sample(a, b, parallel, s); });
}

template <class T>
void scan_backward_sample(const SparseScanBackward& a, int64_t b, SparseBackwardScratch<T>& s) {
  const int64_t R = a.R, RD = a.R * a.D, length = a.sequences.length(a.T, b);
  begin_backward(a, b, s);
  for (int64_t t = length - 1; t >= 0; --t) {
    const int64_t row = t * a.B + b;
    s.told.load(a, row);
    step_backward(a, t, b, a.grad_reads ? widen(a.grad_reads, a.input, row * RD, RD, s.grad_read) : nullptr, s);
    narrow(s.grad_keys, RD, a.grad_told.keys, a.input, row * RD);
    narrow(s.grad_vectors, RD, a.grad_told.write_vectors, a.input, row * RD);
    narrow(s.grad_gates, R, a.grad_told.gate_logits, a.input, row * R);
    if (a.grad_told.sharpness) narrow(s.grad_sharpness, R, a.grad_told.sharpness, a.input, row * R);
    if (a.grad_told.write_gate_logits) narrow(s.grad_write_gates, R, a.grad_told.write_gate_logits, a.input, row * R);
    if (a.sequences.begins(t, a.B, b)) back_to_start(a, b, s);
  }
  end_backward(a, b, s);
  for (void* grad : {a.grad_told.keys, a.grad_told.write_vectors}) clear_steps<T>(grad, a.input, length, a.T, a.B, b, RD);
  for (void* grad : {a.grad_told.gate_logits, a.grad_told.sharpness, a.grad_told.write_gate_logits})
    clear_steps<T>(grad, a.input, length, a.T, a.B, b, R);
}

template <class T>
bool sparse_scan_backward(const SparseScanBackward& a, const Parallel& parallel) {
  const double work = static_cast<double>(a.B) * static_cast<double>(a.N * a.D + a.T * 8 * a.R * a.K * a.D);
  return run_items(
      parallel, a.B, worthwhile_tasks(parallel, a.B, work),
      [&](Arena& arena) { return SparseBackwardScratch<T>(arena, arena, a); },
      [&](int64_t b, SparseBackwardScratch<T>& s) { scan_backward_sample(a, b, s); });
}

}  // namespace

MANN_FAST_SPARSE_OPS(MANN_FAST_BY_DTYPE)

}  // namespace MANN_FAST_ISA
}  // namespace mann_fast

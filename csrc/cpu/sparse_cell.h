// A memory with sparse access as cell.cpp drives it, for all samples; lrua_cell.h says what that must provide. Of every step the
// rows that were read are kept, so that backward replays nothing.
#pragma once
#include "lrua_cell.h"
#include "sparse_step.h"

namespace mann_fast {
namespace {

// A row of head values holds keys and write vectors (after tanh), the logits of the gates, sharpness before its softplus, and the
// logits of the write gates.
template <class T, class Arguments>
struct SparseHeads {
  const Arguments& a;
  int64_t RD, squashed, heads;
  explicit SparseHeads(const Arguments& a) : a(a), RD(a.R * a.D), squashed(2 * RD), heads(squashed + 3 * a.R) {}

  // Hands a row of head values to the memory's step.
  void set(const T* values, SparseTold<T>& told) const {
    for (int64_t r = 0; r < a.R; ++r)
      told.sharpness_buffer[r] =
          static_cast<T>(a.sharpness) + static_cast<T>(a.sharpness_scale) * softplus(values[squashed + a.R + r]);
    told.keys = values;
    told.vectors = values + RD;
    told.gates = values + squashed;
    told.sharpness = told.sharpness_buffer;
    told.write_gates = values + squashed + 2 * a.R;
  }
};

template <class T>
struct SparseForward : SparseHeads<T, SparseCell> {
  using SparseHeads<T, SparseCell>::a;
  using Scratch = SparseScratch<T>;
  Parallel within;  // of a sample, where there is but one
  SparseForward(const SparseCell& a, const Parallel& parallel)
      : SparseHeads<T, SparseCell>(a), within(a.B == 1 ? parallel : alone) {}
  int64_t multiply_adds() const { return a.N * a.D * a.R; }
  Scratch scratch(Arena& own, Arena& common) const { return Scratch(own, common, a.scan, search_parts(a.scan, within)); }

  void begin(int64_t b, Scratch& s) const { begin_sample(a.scan, b, within, s); }
  void restart(Scratch& s) const { restart_sample(a.scan, within, s); }
  void step(int64_t t, int64_t b, const T* values, Scratch& s) const {
    this->set(values, s.told);
    step_sample(a.scan, t, b, within, s);
  }
  void end(int64_t, Scratch&) const {}  // the state is changed where it comes out
};

template <class T>
struct SparseBackward : SparseHeads<T, SparseCellBackward> {
  using SparseHeads<T, SparseCellBackward>::SparseHeads, SparseHeads<T, SparseCellBackward>::a;
  using SparseHeads<T, SparseCellBackward>::RD, SparseHeads<T, SparseCellBackward>::squashed;
  using Scratch = SparseBackwardScratch<T>;
  int64_t multiply_adds() const { return 8 * a.R * a.scan.K * a.D; }
  Scratch scratch(Arena& own, Arena& common) const { return Scratch(own, common, a.scan); }

  void begin(int64_t b, Scratch& s) const { begin_backward(a.scan, b, s); }
  void back_to_start(int64_t b, Scratch& s) const { mann_fast::back_to_start(a.scan, b, s); }
  void replay(int64_t, int64_t, int64_t, Scratch&) const {}
  void step(int64_t first, int64_t step, int64_t b, const T* values, const T* grad_read, T* grad_values, Scratch& s) const {
    this->set(values, s.told);
    step_backward(a.scan, first + step, b, grad_read, s);
    to_values(values, s, grad_values);
  }
  void end(int64_t b, Scratch& s) const { end_backward(a.scan, b, s); }

 private:
  // The gradient of a row of head values before their nonlinearities, from what step_backward left.
  void to_values(const T* values, const Scratch& s, T* grad) const {
    for (int64_t j = 0; j < RD; ++j) {
      grad[j] = s.grad_keys[j] * (T(1) - values[j] * values[j]);
      grad[RD + j] = s.grad_vectors[j] * (T(1) - values[RD + j] * values[RD + j]);
    }
    for (int64_t r = 0; r < a.R; ++r) {
      T slope, rest;
      sigmoids(values[squashed + a.R + r], &slope, &rest);
      grad[squashed + r] = s.grad_gates[r];
      grad[squashed + a.R + r] = s.grad_sharpness[r] * static_cast<T>(a.sharpness_scale) * slope;
      grad[squashed + 2 * a.R + r] = s.grad_write_gates[r];
    }
  }
};

}  // namespace
}  // namespace mann_fast

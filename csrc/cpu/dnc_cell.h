// A Differentiable Neural Computer's memory as cell.cpp drives it, for all samples; lrua_cell.h says what that must provide.
#pragma once
#include "dnc_step.h"
#include "lrua_cell.h"

namespace mann_fast {
namespace {

// How the heads' values become what a step is told, in the order of DncInterface.
enum class Squash { none, oneplus, sigmoid, modes, mask };
constexpr Squash squashes[told_count] = {Squash::none, Squash::oneplus, Squash::none,    Squash::oneplus, Squash::sigmoid,
                                         Squash::none, Squash::sigmoid, Squash::sigmoid, Squash::sigmoid, Squash::modes,
                                         Squash::mask, Squash::mask,    Squash::oneplus};
constexpr int told_erase = 4, told_write_vector = 5, told_free_gates = 6;  // what a write takes

template <class T, class Arguments>
struct DncHeads {
  static constexpr int64_t squashed = 0;  // of what the heads give: all is squashed here
  const Arguments& a;
  DncSizes<T> n;
  int64_t heads, places[told_count];  // where the values of each field are in their row
  bool there[told_count];
  explicit DncHeads(const Arguments& a) : a(a), n(a, a.masks, a.sharpened), heads(0) {
    for (int k = 0; k < told_count; ++k) {
      there[k] = k < 9 || (k == 9 ? n.links : k < 12 ? n.masks : n.sharpened);
      places[k] = heads;
      if (there[k]) heads += n.told[k];
    }
  }

  const T* row(int64_t t, int64_t b) const { return static_cast<const T*>(a.kept_heads) + (t * a.B + b) * heads; }
  const T* of_sample(const void* from, int64_t b, int64_t size) const {
    return from == nullptr ? nullptr : static_cast<const T*>(from) + b * size;
  }
  // A value between -clip and clip, NaN as it is.
  template <class V>
  V clipped(V x) const {
    const T clip = static_cast<T>(a.clip);
    return a.clip > 0 ? (x > clip ? V{} + clip : x < -clip ? V{} - clip : x) : x;
  }

  void set(const T* values, int k, DncTold<T>& in) const {
    T* to = in.buffers[k];
    const T* from = values + places[k];
    const int64_t count = n.told[k];
    switch (squashes[k]) {
      case Squash::oneplus:
        for (int64_t j = 0; j < count; ++j) to[j] = T(1) + softplus(clipped(from[j]));
        break;
      case Squash::modes:
        for (int64_t r = 0; r < n.R; ++r) shares(from + 3 * r, to + 3 * r);
        break;
      default:
        for (int64_t j = 0; j < count; j += width<T>) {
          Vec<T> x = clipped(load_some(from + j, count - j));
          if (squashes[k] != Squash::none) x = sigmoid<T>(x);
          if (squashes[k] == Squash::mask) x = x * T(1 - a.mask_min) + T(a.mask_min);
          store_some(to + j, x, count - j);
        }
    }
    in.*told_fields<const T*>[k] = to;
  }
  // What the write takes of a row of head values.
  void set_written(const T* values, DncTold<T>& in) const {
    for (const int k : {told_erase, told_write_vector, told_free_gates}) set(values, k, in);
  }
  // All that the step takes.
  void set(const T* values, DncTold<T>& in) const {
    for (int k = 0; k < told_count; ++k) {
      if (there[k]) set(values, k, in);
      else in.*told_fields<const T*>[k] = nullptr;
    }
  }

 private:
  void shares(const T* logits, T* modes) const {  // softmax
    T most = clipped(logits[0]), total = 0;
    for (int j = 1; j < 3; ++j) most = clipped(logits[j]) > most ? clipped(logits[j]) : most;
    for (int j = 0; j < 3; ++j) total += modes[j] = std::exp(clipped(logits[j]) - most);
    for (int j = 0; j < 3; ++j) modes[j] /= total;
  }
};

template <class T>
struct DncForward : DncHeads<T, DncCell> {
  using DncHeads<T, DncCell>::DncHeads, DncHeads<T, DncCell>::a, DncHeads<T, DncCell>::n;
  using Scratch = DncScratch<T>;
  int64_t multiply_adds() const { return n.multiply_adds(); }
  Scratch scratch(Arena& own, Arena& common) const { return Scratch(own, common, n); }

  void begin(int64_t b, Scratch& s) const { begin_state(a.before, n, b, s); }
  void restart(Scratch& s) const { restart_state(a.sequences.start, n, s); }
  void step(int64_t t, int64_t b, const T* values, Scratch& s) const {
    this->set(values, s.in);
    dnc_step(n, s);
    keep_step(a, n, t * a.B + b, s);
  }
  void end(int64_t b, Scratch& s) const { end_state(a.after, n, b, s); }
};

// Of the arguments, anchor_every is that of the scratch.
template <class T>
struct DncBackward : DncHeads<T, DncCellBackward> {
  using Heads = DncHeads<T, DncCellBackward>;
  using Heads::Heads, Heads::a, Heads::n, Heads::there, Heads::places;
  using Scratch = DncBackwardScratch<T>;
  int64_t multiply_adds() const { return 3 * n.multiply_adds(); }
  Scratch scratch(Arena& own, Arena& common) const { return Scratch(own, common, n, a.T); }

  void begin(int64_t b, Scratch& s) const {
    begin_backward(a.grad_after, n, b, grad_start(b), s);
    replay_to_anchors(a, n, b, teller(b, s), s);
  }
  void back_to_start(int64_t b, Scratch& s) const { mann_fast::back_to_start(n, grad_start(b), s); }
  void replay(int64_t first, int64_t end, int64_t b, Scratch& s) const { replay_segment(a, n, b, first, end, teller(b, s), s); }
  void step(int64_t first, int64_t step, int64_t b, const T* values, const T* grad_read, T* grad_values, Scratch& s) const {
    this->set(values, s.in);
    dnc_step_backward(a, n, b, first, step, grad_read, s);
    for (int k = 0; k < told_count; ++k)
      if (there[k]) to_values(values + places[k], k, s, grad_values + places[k]);
  }
  void end(int64_t b, Scratch& s) const { end_backward(a.grad_before, n, b, s); }

 private:
  T* grad_start(int64_t b) const { return a.grad_start ? static_cast<T*>(a.grad_start) + b * n.N * n.D : nullptr; }
  auto teller(int64_t b, Scratch& s) const {
    return [this, b, &s](int64_t t) { this->set_written(this->row(t, b), s.in); };
  }

  // The gradient of a field's values before their nonlinearities, from what dnc_step_backward left.
  void to_values(const T* values, int k, const Scratch& s, T* grad) const {
    const T *told = s.in.*told_fields<const T*>[k], *of_told = s.grad_told.*told_fields<T*>[k];
    const int64_t count = n.told[k];
    const T clip = static_cast<T>(a.clip);
    if (squashes[k] == Squash::modes)
      for (int64_t r = 0; r < 3 * n.R; r += 3) {
        T mean = 0;
        for (int64_t j = r; j < r + 3; ++j) mean += told[j] * of_told[j];
        for (int64_t j = r; j < r + 3; ++j) grad[j] = told[j] * (of_told[j] - mean);
      }
    for (int64_t j = 0; j < count; j += width<T>) {
      const Vec<T> value = load_some(values + j, count - j);
      Vec<T> g = load_some((squashes[k] == Squash::modes ? grad : of_told) + j, count - j);
      if (squashes[k] == Squash::oneplus) g *= sigmoid<T>(this->clipped(value));
      if (squashes[k] == Squash::sigmoid) {
        const Vec<T> y = load_some(told + j, count - j);
        g *= y * (T(1) - y);
      }
      if (squashes[k] == Squash::mask) {
        const Vec<T> y = sigmoid<T>(this->clipped(value));
        g *= y * (T(1) - y) * T(1 - a.mask_min);
      }
      if (clip > 0) g = value > clip ? Vec<T>{} : value < -clip ? Vec<T>{} : g;
      store_some(grad + j, g, count - j);
    }
  }
};

}  // namespace
}  // namespace mann_fast

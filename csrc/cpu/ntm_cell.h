// A Neural Turing Machine's memory as cell.cpp drives it, for all samples; lrua_cell.h says what that must provide.
#pragma once
#include "lrua_cell.h"
#include "ntm_step.h"

namespace mann_fast {
namespace {

// R read heads and as many write heads. Where heads go by content alone, they have one shift, of 1 to where they are.
template <class Arguments>
struct WithWriteHeads {
  int64_t N, D, R, W, shifts;
  double eps;
  explicit WithWriteHeads(const Arguments& a)
      : N(a.N), D(a.D), R(a.R), W(a.R), shifts(a.shifts > 0 ? a.shifts : 1), eps(a.eps) {}
};

template <class T, class Arguments>
struct NtmHeads {
  static constexpr int64_t squashed = 0;  // of what the heads give: all is squashed here
  const Arguments& a;
  int64_t RD, of_kind, heads;  // of_kind: values of the heads that read, and as many of those that write
  bool location;
  NtmSizes<T> n;
  explicit NtmHeads(const Arguments& a)
      : a(a), RD(a.R * a.D), of_kind(RD + a.R * (a.shifts > 0 ? 3 + a.shifts : 1)), heads(2 * of_kind + 2 * RD),
        location(a.shifts > 0), n(WithWriteHeads<Arguments>(a)) {}

  // Where the values of heads of a kind are in their row: 0 for those that read, 1 for those that write.
  struct Places {
    int64_t key, sharpness, gate, shift, sharpening;
  };
  Places places(int64_t kind) const {
    const int64_t key = kind * of_kind, sharpness = key + RD, gate = sharpness + a.R, shift = gate + a.R;
    return {key, sharpness, gate, shift, shift + a.R * n.shifts};
  }

  // What the write takes of a row of head values.
  void set_written(const T* values, NtmInputs<T>& in) const {
    const T *erase = values + 2 * of_kind, *add = erase + RD;
    for (int64_t j = 0; j < RD; j += width<T>) {
      store_some(in.buffers[5] + j, sigmoid<T>(load_some(erase + j, RD - j)), RD - j);
      store_some(in.buffers[6] + j, hyperbolic_tangent<T>(load_some(add + j, RD - j)), RD - j);
    }
    in.erase = in.buffers[5];
    in.add = in.buffers[6];
  }
  // All that the step takes.
  void set(const T* values, NtmInputs<T>& in) const {
    set_written(values, in);
    for (int64_t kind = 0; kind < 2; ++kind) {
      const Places at = places(kind);
      T* keys = in.buffers[0] + kind * RD;
      for (int64_t j = 0; j < RD; j += width<T>)
        store_some(keys + j, hyperbolic_tangent<T>(load_some(values + at.key + j, RD - j)), RD - j);
      for (int64_t r = 0; r < a.R; ++r) {
        const int64_t h = kind * a.R + r;
        in.buffers[1][h] = T(1) + softplus(values[at.sharpness + r]);
        T gate = 1, rest, *shift = in.buffers[3] + h * n.shifts;
        if (location) {
          sigmoids(values[at.gate + r], &gate, &rest);
          shares(values + at.shift + r * n.shifts, shift);
        } else shift[0] = 1;
        in.buffers[2][h] = gate;
        in.buffers[4][h] = location ? T(1) + softplus(values[at.sharpening + r]) : T(1);
      }
    }
    in.key = in.buffers[0];
    in.sharpness = in.buffers[1];
    in.gate = in.buffers[2];
    in.shift = in.buffers[3];
    in.sharpening = in.buffers[4];
    for (int64_t h = 0; h < n.heads; ++h) in.key_square[h] = square_sum(in.key + h * n.D, n.D);
  }
  const T* of_sample(const void* from, int64_t b, int64_t size) const {
    return from == nullptr ? nullptr : static_cast<const T*>(from) + b * size;
  }

 private:
  void shares(const T* logits, T* shift) const {  // softmax
    T most = logits[0], total = 0;
    for (int64_t j = 1; j < n.shifts; ++j) most = logits[j] > most ? logits[j] : most;
    for (int64_t j = 0; j < n.shifts; ++j) total += shift[j] = std::exp(logits[j] - most);
    for (int64_t j = 0; j < n.shifts; ++j) shift[j] /= total;
  }
};

template <class T>
struct NtmForward : NtmHeads<T, NtmCell> {
  using NtmHeads<T, NtmCell>::NtmHeads, NtmHeads<T, NtmCell>::a, NtmHeads<T, NtmCell>::n;
  using Scratch = NtmScratch<T>;
  int64_t multiply_adds() const { return n.N * n.heads * (3 * n.D + 20); }
  Scratch scratch(Arena& own, Arena& common) const { return Scratch(own, common, n); }

  void begin(int64_t b, Scratch& s) const {
    load_slots(this->of_sample(a.memory, b, n.N * n.D), n.N, n.D, 0, n.ld, s.memory, n.ld);
    load_rows(this->of_sample(a.weights, b, n.heads * n.N), n.heads, n.N, 0, n.ld, s.previous, n.ld);
  }
  void restart(Scratch& s) const {
    load_slots(static_cast<const T*>(a.sequences.start), n.N, n.D, 0, n.ld, s.memory, n.ld);
    start_rows(n.heads, 0, n.ld, s.previous, n.ld);
  }
  void step(int64_t t, int64_t b, const T* values, Scratch& s) const {
    this->set(values, s.in);
    T* anchor = has_anchor(t, a.anchor_every) ? static_cast<T*>(a.anchors) + anchor_offset(t, a.anchor_every, a.B, b, n.D, n.N)
                                              : nullptr;
    ntm_step(n, a.read_first, anchor, s);
    if (a.anchor_every > 0)
      store_rows(static_cast<const T*>(s.x.weights), n.ld, n.heads, n.N, 0, n.ld,
                 static_cast<T*>(a.history) + (t * a.B + b) * n.heads * n.N);
  }
  void end(int64_t b, Scratch& s) const {
    store_slots(static_cast<const T*>(s.memory), n.ld, n.N, n.D, 0, n.ld, static_cast<T*>(a.out_memory) + b * n.N * n.D);
    store_rows(static_cast<const T*>(s.previous), n.ld, n.heads, n.N, 0, n.ld,
               static_cast<T*>(a.out_weights) + b * n.heads * n.N);
  }
};

template <class T>
struct NtmBackward : NtmHeads<T, NtmCellBackward> {
  using Heads = NtmHeads<T, NtmCellBackward>;
  using Heads::Heads, Heads::a, Heads::n, Heads::RD, Heads::of_kind, Heads::location;
  using Scratch = NtmBackwardScratch<T>;
  int64_t multiply_adds() const { return n.N * n.heads * (10 * n.D + 60); }
  Scratch scratch(Arena& own, Arena& common) const {
    return Scratch(own, common, n, a.T < a.anchor_every ? a.T : a.anchor_every);
  }

  void begin(int64_t b, Scratch& s) const {
    const T *memory = this->of_sample(a.grad_memory, b, n.N * n.D),
            *weights = this->of_sample(a.grad_weights, b, n.heads * n.N);
    if (memory) load_slots(memory, n.N, n.D, 0, n.ld, s.grad_memory, n.ld);
    else std::memset(s.grad_memory, 0, n.D * n.ld * sizeof(T));
    if (weights) load_rows(weights, n.heads, n.N, 0, n.ld, s.grad_weights, n.ld);
    else std::memset(s.grad_weights, 0, n.heads * n.ld * sizeof(T));
    if (a.grad_start) std::memset(grad_start(b), 0, n.N * n.D * sizeof(T));
  }
  void back_to_start(int64_t b, Scratch& s) const {
    give_to_start(s.grad_memory, n.ld, n.N, n.D, 0, n.ld, grad_start(b));
    std::memset(s.grad_weights, 0, n.heads * n.ld * sizeof(T));
  }
  void replay(int64_t first, int64_t end, int64_t b, Scratch& s) const {
    if (a.sequences.begins(first, a.B, b))
      load_slots(static_cast<const T*>(a.sequences.start), n.N, n.D, 0, n.ld, s.memories, n.ld);
    else if (first > 0)
      std::memcpy(s.memories, static_cast<const T*>(a.anchors) + anchor_offset(first, a.anchor_every, a.B, b, n.D, n.N),
                  n.D * n.ld * sizeof(T));
    else load_slots(this->of_sample(a.memory, b, n.N * n.D), n.N, n.D, 0, n.ld, s.memories, n.ld);
    T* before = s.memories;
    for (int64_t t = first; t < end; ++t, before += n.D * n.ld) {
      this->set_written(this->of_sample(a.kept_heads, t * a.B + b, this->heads), s.in);
      load_rows(history(t, b) + n.R * n.N, n.W, n.N, 0, n.ld, s.x.weights + n.R * n.ld, n.ld);
      erase_and_add(n, s.x.weights + n.R * n.ld, s.in.erase, s.in.add, static_cast<const T*>(before), before + n.D * n.ld);
    }
  }
  void step(int64_t first, int64_t step, int64_t b, const T* values, const T* grad_read, T* grad_values, Scratch& s) const {
    const int64_t t = first + step;
    this->set(values, s.in);
    if (a.sequences.begins(t, a.B, b)) start_rows(n.heads, 0, n.ld, s.previous, n.ld);
    else
      load_rows(t > 0 ? history(t - 1, b) : this->of_sample(a.weights, b, n.heads * n.N), n.heads, n.N, 0, n.ld, s.previous,
                n.ld);
    load_rows(history(t, b), n.heads, n.N, 0, n.ld, s.x.weights, n.ld);
    const T* before = s.memories + step * n.D * n.ld;
    ntm_step_backward(n, a.read_first, before, before + n.D * n.ld, grad_read, s);
    to_values(values, s, grad_values);
  }
  void end(int64_t b, Scratch& s) const {
    store_slots(static_cast<const T*>(s.grad_memory), n.ld, n.N, n.D, 0, n.ld,
                static_cast<T*>(a.grad_in_memory) + b * n.N * n.D);
    store_rows(static_cast<const T*>(s.grad_weights), n.ld, n.heads, n.N, 0, n.ld,
               static_cast<T*>(a.grad_in_weights) + b * n.heads * n.N);
  }

 private:
  T* grad_start(int64_t b) const { return static_cast<T*>(a.grad_start) + b * n.N * n.D; }
  const T* history(int64_t t, int64_t b) const { return static_cast<const T*>(a.history) + (t * a.B + b) * n.heads * n.N; }

  // The gradient of a row of head values before their nonlinearities, from what ntm_step_backward left.
  void to_values(const T* values, const Scratch& s, T* grad) const {
    const auto slope = [](T x) {  // of softplus
      T positive, negative;
      sigmoids(x, &positive, &negative);
      return positive;
    };
    for (int64_t kind = 0; kind < 2; ++kind) {
      const typename Heads::Places at = this->places(kind);
      through_tanh(s.in.key + kind * RD, s.grad_key + kind * RD, grad + at.key);
      for (int64_t r = 0; r < a.R; ++r) {
        const int64_t h = kind * a.R + r;
        grad[at.sharpness + r] = s.grad_sharpness[h] * slope(values[at.sharpness + r]);
        if (!location) continue;
        T gate, rest;
        sigmoids(values[at.gate + r], &gate, &rest);
        grad[at.gate + r] = s.grad_gate[h] * gate * rest;
        const T *shift = s.in.shift + h * n.shifts, *grad_shift = s.grad_shift + h * n.shifts;
        T mean = 0;
        for (int64_t j = 0; j < n.shifts; ++j) mean += shift[j] * grad_shift[j];
        for (int64_t j = 0; j < n.shifts; ++j) grad[at.shift + r * n.shifts + j] = shift[j] * (grad_shift[j] - mean);
        grad[at.sharpening + r] = s.grad_sharpening[h] * slope(values[at.sharpening + r]);
      }
    }
    T* grad_erase = grad + 2 * of_kind;
    for (int64_t j = 0; j < RD; j += width<T>) {
      const Vec<T> erase = load_some(s.in.erase + j, RD - j);
      store_some(grad_erase + j, load_some(s.grad_erase + j, RD - j) * erase * (T(1) - erase), RD - j);
    }
    through_tanh(s.in.add, s.grad_add, grad_erase + RD);
  }
  void through_tanh(const T* y, const T* grad_y, T* grad) const {
    for (int64_t j = 0; j < RD; j += width<T>) {
      const Vec<T> of = load_some(y + j, RD - j);
      store_some(grad + j, load_some(grad_y + j, RD - j) * (T(1) - of * of), RD - j);
    }
  }
};

}  // namespace
}  // namespace mann_fast

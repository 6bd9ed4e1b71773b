// The LRUA memory as cell.cpp drives it, for all samples.
//
// What a memory must provide to have its whole sequence. One row of head values is what its heads take of a step and a sample.
//
//   heads                numbers in such a row
//   squashed             of them, the first so many go through tanh
//   multiply_adds        of a step
//   Scratch, scratch(own, common)                   the arrays of one sample: of its own those that go from step to step, the
//                                                   others in common with the samples beside it; forward also `reads` [R, D]
// forward, of sample b:
//   begin(b, scratch)                               takes in the state
//   restart(scratch)                                takes the state of a sample that begins anew instead
//   step(t, b, values, scratch)                     one step, with a row of head values; saves the anchors
//   end(b, scratch)                                 hands out the state
// backward, of sample b:
//   begin(b, scratch)                               takes in the gradients of the last state
//   back_to_start(b, scratch)                       having gone back to where the sample began anew
//   replay(first, end, b, scratch)                  steps [first, end) again, from the state before `first`
//   step(first, step, b, values, grad_read, grad_values, scratch)   back through it: leaves the gradient of the head values
//   end(b, scratch)                                 hands out the gradients of the first state
#pragma once
#include "lrua_step.h"

namespace mann_fast {
namespace {

template <class T>
T softplus(T x) {
  return (x > 0 ? x : T(0)) + std::log1p(std::exp(x > 0 ? -x : x));
}

constexpr Parallel alone = {1, nullptr};  // a cell has its samples on the threads

// A row of head values holds keys and write vectors (after tanh), the logits of the gates, and sharpness before its softplus, as
// far as they are there.
template <class T, class Arguments>
struct LruaHeads {
  const Arguments& a;
  int64_t RD, squashed, heads;
  Scan<T> scan;
  explicit LruaHeads(const Arguments& a)
      : a(a), RD(a.R * a.D), squashed(a.separate_vector ? 2 * RD : RD), heads(squashed + (a.learned_sharpness ? 2 : 1) * a.R),
        scan{a.N, a.D, a.R, padded_slots(a.N), 1, a.read_first, a.shared_target, static_cast<T>(a.eps)} {}

  // Hands a row of head values to the memory's step.
  void set(const T* values, StepInputs<T>& in) const {
    for (int64_t r = 0; r < a.R; ++r)
      in.beta_buffer[r] = a.learned_sharpness ? static_cast<T>(a.sharpness) +
                                                    static_cast<T>(a.sharpness_scale) * softplus(values[squashed + a.R + r])
                                              : static_cast<T>(a.sharpness);
    in.set(a.R, a.D, values, a.separate_vector ? values + RD : values, values + squashed, in.beta_buffer);
  }
  const T* of_sample(const void* from, int64_t b, int64_t size) const {
    return from == nullptr ? nullptr : static_cast<const T*>(from) + b * size;
  }
};

template <class T>
struct LruaForward : LruaHeads<T, Cell> {
  using LruaHeads<T, Cell>::LruaHeads, LruaHeads<T, Cell>::a, LruaHeads<T, Cell>::scan;
  using Scratch = ScanScratch<T>;
  int64_t multiply_adds() const { return a.N * a.D * (3 * a.R + 1); }
  Scratch scratch(Arena& own, Arena& common) const { return Scratch(own, common, scan); }

  void begin(int64_t b, Scratch& s) const {
    begin_sample(scan, this->of_sample(a.memory, b, a.N * a.D), this->of_sample(a.read_weights, b, a.R * a.N),
                 this->of_sample(a.usage, b, a.N), alone, s);
  }
  void restart(Scratch& s) const {
    const T* none = nullptr;
    begin_sample(scan, static_cast<const T*>(a.sequences.start), none, none, alone, s);
  }
  void step(int64_t t, int64_t b, const T* values, Scratch& s) const {
    this->set(values, s.in);
    T* anchor = has_anchor(t, a.anchor_every)
                    ? static_cast<T*>(a.anchors) + anchor_offset(t, a.anchor_every, a.B, b, a.D + a.R, a.N)
                    : nullptr;
    int64_t* slots = a.anchor_every > 0 ? a.slots + (t * a.B + b) * a.R : nullptr;
    step_sample(scan, static_cast<T>(a.usage_decay), slots, anchor, alone, s);
  }
  void end(int64_t b, Scratch& s) const {
    end_sample(scan, static_cast<T*>(a.out_memory) + b * a.N * a.D, static_cast<T*>(a.out_read_weights) + b * a.R * a.N,
               static_cast<T*>(a.out_usage) + b * a.N, alone, s);
  }
};

template <class T>
struct LruaBackward : LruaHeads<T, CellBackward> {
  using LruaHeads<T, CellBackward>::LruaHeads, LruaHeads<T, CellBackward>::a, LruaHeads<T, CellBackward>::scan;
  using LruaHeads<T, CellBackward>::RD, LruaHeads<T, CellBackward>::squashed, LruaHeads<T, CellBackward>::heads;
  using Scratch = ScanBackwardScratch<T>;
  int64_t multiply_adds() const { return a.N * a.D * (8 * a.R + 2); }
  Scratch scratch(Arena& own, Arena& common) const {
    return Scratch(own, common, scan, a.T < a.anchor_every ? a.T : a.anchor_every);
  }

  void begin(int64_t b, Scratch& s) const {
    begin_backward(scan, this->of_sample(a.grad_memory, b, a.N * a.D), this->of_sample(a.grad_read_weights, b, a.R * a.N),
                   alone, s);
    if (a.grad_start) std::memset(grad_start(b), 0, a.N * a.D * sizeof(T));
  }
  void back_to_start(int64_t b, Scratch& s) const { mann_fast::back_to_start(scan, grad_start(b), alone, s); }
  void replay(int64_t first, int64_t end, int64_t b, Scratch& s) const {
    const T *none = nullptr, *anchor = none;
    if (a.sequences.begins(first, a.B, b)) {
      begin_replay(scan, none, static_cast<const T*>(a.sequences.start), none, s);
    } else {
      if (first > 0) anchor = static_cast<const T*>(a.anchors) + anchor_offset(first, a.anchor_every, a.B, b, a.D + a.R, a.N);
      begin_replay(scan, anchor, this->of_sample(a.memory, b, a.N * a.D), this->of_sample(a.read_weights, b, a.R * a.N), s);
    }
    for (int64_t t = first; t < end; ++t) {
      this->set(this->of_sample(a.kept_heads, t * a.B + b, heads), s.in);
      replay_step(scan, slots(t, b), t - first, alone, s);
    }
  }
  void step(int64_t first, int64_t step, int64_t b, const T* values, const T* grad_read, T* grad_values, Scratch& s) const {
    this->set(values, s.in);
    step_backward(scan, slots(first + step, b), step, grad_read, alone, s);
    to_values(values, s, grad_values);
  }
  void end(int64_t b, Scratch& s) const {
    end_backward(scan, static_cast<T*>(a.grad_in_memory) + b * a.N * a.D,
                 static_cast<T*>(a.grad_in_read_weights) + b * a.R * a.N, alone, s);
  }

 private:
  T* grad_start(int64_t b) const { return static_cast<T*>(a.grad_start) + b * a.N * a.D; }
  const int64_t* slots(int64_t t, int64_t b) const { return a.slots + (t * a.B + b) * a.R; }

  // The gradient of a row of head values before their nonlinearities, from what step_backward left.
  void to_values(const T* values, const Scratch& s, T* grad) const {
    for (int64_t j = 0; j < RD; j += width<T>) {
      const int64_t count = RD - j;
      const Vec<T> key = load_some(values + j, count), grad_vector = load_some(s.grad_vector + j, count);
      Vec<T> grad_key = load_some(s.grad_key + j, count);
      if (!a.separate_vector) grad_key += grad_vector;
      store_some(grad + j, grad_key * (T(1) - key * key), count);
      if (!a.separate_vector) continue;
      const Vec<T> vector = load_some(values + RD + j, count);
      store_some(grad + RD + j, grad_vector * (T(1) - vector * vector), count);
    }
    for (int64_t r = 0; r < a.R; ++r) {
      grad[squashed + r] = s.grad_gate[r];
      if (!a.learned_sharpness) continue;
      T slope, rest;
      sigmoids(values[squashed + a.R + r], &slope, &rest);
      grad[squashed + a.R + r] = s.grad_sharpness[r] * static_cast<T>(a.sharpness_scale) * slope;
    }
  }
};

}  // namespace
}  // namespace mann_fast

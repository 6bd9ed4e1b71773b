// One step of a controller for one sample, forward and backward: LSTM, GRU, feed-forward. The products with its weights are the
// caller's.
#pragma once
#include "simd.h"

namespace mann_fast {
namespace {

// ---- forward --------------------------------------------------------------------------------------------------------

// One row of a controller's gates before their nonlinearities: what the input, the reads, and the hidden state gave.
template <class T>
struct GateParts {
  int64_t H;
  const T *of_input, *of_reads, *of_hidden, *hidden_bias;
  Vec<T> input(int64_t gate, int64_t i) const {
    return load_some(of_input + gate * H + i, H - i) + load(of_reads + gate * H + i);
  }
  Vec<T> hidden(int64_t gate, int64_t i) const {
    return load(of_hidden + gate * H + i) + load_some(hidden_bias + gate * H + i, H - i);
  }
  Vec<T> both(int64_t gate, int64_t i) const { return input(gate, i) + hidden(gate, i); }
};

// The gates as torch.nn.LSTMCell orders them: input, forget, cell and output gate. What backward needs goes to kept [4 H] and
// kept_cell [H], unless these are null.
template <class T>
void lstm(const GateParts<T>& gate, T* cell, T* hidden, T* kept, T* kept_cell) {
  const int64_t H = gate.H;
  for (int64_t i = 0; i < H; i += width<T>) {
    const int64_t count = H - i;
    const Vec<T> input = sigmoid<T>(gate.both(0, i)), forget = sigmoid<T>(gate.both(1, i)),
                 cell_gate = hyperbolic_tangent<T>(gate.both(2, i)), output = sigmoid<T>(gate.both(3, i));
    const Vec<T> now = forget * load_some(cell + i, count) + input * cell_gate;
    store_some(cell + i, now, count);
    store_some(hidden + i, output * hyperbolic_tangent<T>(now), count);
    if (kept == nullptr) continue;
    store_some(kept + i, input, count);
    store_some(kept + H + i, forget, count);
    store_some(kept + 2 * H + i, cell_gate, count);
    store_some(kept + 3 * H + i, output, count);
    store_some(kept_cell + i, now, count);
  }
}

// As torch.nn.GRUCell: reset, update, candidate.
template <class T>
void gru(const GateParts<T>& gate, T* hidden, T* kept, T* kept_hidden) {
  const int64_t H = gate.H;
  for (int64_t i = 0; i < H; i += width<T>) {
    const int64_t count = H - i;
    const Vec<T> reset = sigmoid<T>(gate.both(0, i)), update = sigmoid<T>(gate.both(1, i)), shown = gate.hidden(2, i);
    const Vec<T> candidate = hyperbolic_tangent<T>(gate.input(2, i) + reset * shown);
    const Vec<T> now = candidate + update * (load_some(hidden + i, count) - candidate);
    store_some(hidden + i, now, count);
    if (kept == nullptr) continue;
    store_some(kept + i, reset, count);
    store_some(kept + H + i, update, count);
    store_some(kept + 2 * H + i, candidate, count);
    store_some(kept + 3 * H + i, shown, count);
    store_some(kept_hidden + i, now, count);
  }
}

template <class T>
void feedforward(const GateParts<T>& gate, T* hidden, T* kept) {
  for (int64_t i = 0; i < gate.H; i += width<T>) {
    const Vec<T> now = hyperbolic_tangent<T>(gate.input(0, i));
    store_some(hidden + i, now, gate.H - i);
    if (kept != nullptr) store_some(kept + i, now, gate.H - i);
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

// From the gradients of the hidden state (two parts) and the cell: the gradient of the gates before their nonlinearities,
// and in place of the cell's gradient that of the cell before.
template <class T>
void lstm_backward(int64_t H, const T* kept, const T* cell_now, const T* cell_before, const T* grad_hidden,
                   const T* more_grad_hidden, T* grad_cell, T* grad_gates) {
  for (int64_t i = 0; i < H; i += width<T>) {
    const int64_t count = H - i;
    const Vec<T> input = load_some(kept + i, count), forget = load_some(kept + H + i, count),
                 cell_gate = load_some(kept + 2 * H + i, count), output = load_some(kept + 3 * H + i, count);
    const Vec<T> shown = hyperbolic_tangent<T>(load_some(cell_now + i, count));
    const Vec<T> grad = load_some(grad_hidden + i, count) + load_some(more_grad_hidden + i, count);
    const Vec<T> grad_now = load_some(grad_cell + i, count) + grad * output * (T(1) - shown * shown);
    store_some(grad_gates + i, grad_now * cell_gate * input * (T(1) - input), count);
    store_some(grad_gates + H + i, grad_now * load_some(cell_before + i, count) * forget * (T(1) - forget), count);
    store_some(grad_gates + 2 * H + i, grad_now * input * (T(1) - cell_gate * cell_gate), count);
    store_some(grad_gates + 3 * H + i, grad * shown * output * (T(1) - output), count);
    store_some(grad_cell + i, grad_now * forget, count);
  }
}

// The same for a GRU. In grad_state is what passes it by: through the share `update` of the hidden state before.
template <class T>
void gru_backward(int64_t H, const T* kept, const T* before, const T* grad_hidden, const T* more_grad_hidden, T* grad_state,
                  T* grad_gates, T* grad_hidden_gates) {
  for (int64_t i = 0; i < H; i += width<T>) {
    const int64_t count = H - i;
    const Vec<T> reset = load_some(kept + i, count), update = load_some(kept + H + i, count),
                 candidate = load_some(kept + 2 * H + i, count), shown = load_some(kept + 3 * H + i, count);
    const Vec<T> grad =
        load_some(grad_hidden + i, count) + load_some(more_grad_hidden + i, count) + load_some(grad_state + i, count);
    const Vec<T> grad_candidate = grad * (T(1) - update) * (T(1) - candidate * candidate);
    const Vec<T> grad_reset = grad_candidate * shown * reset * (T(1) - reset);
    const Vec<T> grad_update = grad * (load_some(before + i, count) - candidate) * update * (T(1) - update);
    for (T* to : {grad_gates, grad_hidden_gates}) {
      store_some(to + i, grad_reset, count);
      store_some(to + H + i, grad_update, count);
    }
    store_some(grad_gates + 2 * H + i, grad_candidate, count);
    store_some(grad_hidden_gates + 2 * H + i, grad_candidate * reset, count);
    store_some(grad_state + i, grad * update, count);
  }
}

template <class T>
void feedforward_backward(int64_t H, const T* kept, const T* grad_hidden, const T* more_grad_hidden, T* grad_gates) {
  for (int64_t i = 0; i < H; i += width<T>) {
    const int64_t count = H - i;
    const Vec<T> now = load_some(kept + i, count);
    const Vec<T> grad = load_some(grad_hidden + i, count) + load_some(more_grad_hidden + i, count);
    store_some(grad_gates + i, grad * (T(1) - now * now), count);
  }
}

}  // namespace
}  // namespace mann_fast

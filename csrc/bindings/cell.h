// cell and ntm_cell. Each op checks the shapes of its tensors, makes its results, and runs on a Device.
#pragma once
#include "tensors.h"

namespace mann_fast {
namespace {

// A weight that may be part of the columns of a wider one.
Tensor weight(const Tensor& tensor, const Shape& shape) {
  const bool rows = tensor.dim() == 2 && tensor.size(0) == shape[0] && tensor.size(1) == shape[1] && tensor.stride(1) == 1;
  return rows ? tensor : input(tensor, shape);
}

struct CellShape {
  int64_t T, B, H, N, D, R, K, G, kept, heads;
  Controller controller;
  CellShape(int64_t T, const Tensor& memory, int64_t R, const Tensor& head_weight, int64_t number)
      : T(T), B(memory.size(0)), H(head_weight.size(1)), N(memory.size(1)), D(memory.size(2)), R(R), K(H + R * D),
        heads(head_weight.size(0)) {
    STD_TORCH_CHECK(number >= 0 && number <= 2, "controller must be 0 (LSTM), 1 (GRU) or 2 (feed-forward)");
    controller = static_cast<Controller>(number);
    G = gates_per_unit(controller) * H;
    kept = kept_per_unit(controller) * H;
  }
  void check(bool separate_vector, bool learned_sharpness, Dtype dtype, bool bfloat16, bool hidden, bool cell) const {
    check((separate_vector ? 2 : 1) * R * D + (learned_sharpness ? 2 : 1) * R, dtype, bfloat16, hidden, cell);
  }
  // The number of shifts, 0 of heads that go by content alone (max_shift -1).
  int64_t check_ntm(int64_t max_shift, Dtype dtype, bool bfloat16, bool hidden, bool cell) const {
    STD_TORCH_CHECK(max_shift >= -1, "max_shift must be at least 0, or -1 for none");
    const int64_t shifts = max_shift < 0 ? 0 : 2 * max_shift + 1;
    check(2 * (R * D + R * (shifts > 0 ? 3 + shifts : 1)) + 2 * R * D, dtype, bfloat16, hidden, cell);
    return shifts;
  }

 private:
  void check(int64_t values, Dtype dtype, bool bfloat16, bool hidden, bool cell) const {
    STD_TORCH_CHECK(heads == values, "head_weight has not as many rows as the heads have values");
    STD_TORCH_CHECK(dtype == Dtype::float32 || (dtype == Dtype::float64 && !bfloat16),
                    "cell takes float32 and float64 only, and rounds to bfloat16 beside float32 only");
    STD_TORCH_CHECK(hidden == (controller != Controller::feedforward) && cell == (controller == Controller::lstm),
                    "the state is not that of this controller");
  }
};

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cell(
    Tensor gates, std::optional<Tensor> hidden, std::optional<Tensor> cell, Tensor memory, Tensor read_weights, Tensor usage,
    Tensor reads, std::optional<Tensor> hidden_weight, std::optional<Tensor> hidden_bias, Tensor reads_weight,
    Tensor head_weight, Tensor head_bias, std::optional<Tensor> resets, std::optional<Tensor> lengths,
    std::optional<Tensor> start, int64_t controller, bool separate_vector, bool learned_sharpness, double sharpness,
    double sharpness_scale, bool read_first, bool shared_target, double usage_decay, double eps, bool bfloat16,
    int64_t anchor_every) {
  const CellShape shape(gates.size(0), memory, read_weights.size(1), head_weight, controller);
  const auto [T, B, H, N, D, R, K, G, kept, heads, kind] = shape;
  shape.check(separate_vector, learned_sharpness, dtype_of(gates), bfloat16, hidden.has_value(), cell.has_value());
  STD_TORCH_CHECK(hidden.has_value() == hidden_weight.has_value() && hidden.has_value() == hidden_bias.has_value(),
                  "hidden, hidden_weight and hidden_bias go together");
  gates = input(gates, {T, B, G});
  hidden = input(hidden, {B, H});
  cell = input(cell, {B, H});
  memory = input(memory, {B, N, D});
  read_weights = input(read_weights, {B, R, N});
  usage = input(usage, {B, N});
  reads = input(reads, {B, R, D});
  hidden_weight = input(hidden_weight, {G, H});
  hidden_bias = input(hidden_bias, {G});
  reads_weight = weight(reads_weight, {G, R * D});
  head_weight = input(head_weight, {heads, H});
  head_bias = input(head_bias, {heads});
  const SequenceTensors sequences(resets, lengths, start, {T, B}, B, memory);
  const bool keeps = anchor_every > 0;
  Tensor output = empty(gates, {T, B, K}), out_hidden = empty(gates, hidden ? Shape{B, H} : Shape{0});
  Tensor out_cell = empty(gates, cell ? Shape{B, H} : Shape{0}), out_reads = empty(gates, {B, R, D});
  Tensor out_memory = empty(gates, {B, N, D}), out_read_weights = empty(gates, {B, R, N}), out_usage = empty(gates, {B, N});
  Tensor kept_gates = empty(gates, keeps ? Shape{T, B, kept} : Shape{0});
  Tensor kept_states = empty(gates, keeps && hidden ? Shape{T, B, H} : Shape{0});
  Tensor kept_heads = empty(gates, keeps ? Shape{T, B, heads} : Shape{0});
  Tensor slots = empty_slots(gates, keeps ? Shape{T, B, R} : Shape{0});
  Tensor anchors = empty(gates, keeps ? anchors_shape(T, anchor_every, B, D + R, N) : Shape{0});
  Device(memory).run(Cell{
      T, B, H, N, D, R, dtype_of(gates), bfloat16, kind, separate_vector, learned_sharpness, sharpness, sharpness_scale,
      read_first, shared_target, usage_decay, eps, anchor_every, data(gates), data(hidden), data(cell), data(memory),
      data(read_weights), data(usage), data(reads), data(hidden_weight), data(hidden_bias), data(reads_weight),
      reads_weight.stride(0), data(head_weight), data(head_bias), sequences.arguments(),
      // results
      output.mutable_data_ptr(), hidden ? out_hidden.mutable_data_ptr() : nullptr, cell ? out_cell.mutable_data_ptr() : nullptr,
      out_reads.mutable_data_ptr(), out_memory.mutable_data_ptr(), out_read_weights.mutable_data_ptr(),
      out_usage.mutable_data_ptr(), kept_gates.mutable_data_ptr(), kept_states.mutable_data_ptr(),
      kept_heads.mutable_data_ptr(), slots.mutable_data_ptr<int64_t>(), anchors.mutable_data_ptr()});
  return {output,    out_hidden, out_cell,    out_reads,  out_memory, out_read_weights,
          out_usage, kept_gates, kept_states, kept_heads, slots,      anchors};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cell_backward(
    std::optional<Tensor> grad_output, std::optional<Tensor> grad_hidden, std::optional<Tensor> grad_cell,
    std::optional<Tensor> grad_reads, std::optional<Tensor> grad_memory, std::optional<Tensor> grad_read_weights,
    std::optional<Tensor> hidden, std::optional<Tensor> cell, Tensor memory, Tensor read_weights,
    std::optional<Tensor> hidden_weight, Tensor reads_weight, Tensor head_weight, Tensor kept_gates, Tensor kept_states,
    Tensor kept_heads, Tensor slots, Tensor anchors, std::optional<Tensor> resets, std::optional<Tensor> lengths,
    std::optional<Tensor> start, int64_t controller, bool separate_vector, bool learned_sharpness, double sharpness,
    double sharpness_scale, bool read_first, bool shared_target, double eps, bool bfloat16, int64_t anchor_every) {
  const CellShape shape(kept_gates.size(0), memory, read_weights.size(1), head_weight, controller);
  const auto [T, B, H, N, D, R, K, G, kept, heads, kind] = shape;
  STD_TORCH_CHECK(anchor_every > 0, "anchor_every must be positive");
  shape.check(separate_vector, learned_sharpness, dtype_of(memory), bfloat16, hidden.has_value(), cell.has_value());
  STD_TORCH_CHECK(hidden.has_value() == hidden_weight.has_value(), "hidden and hidden_weight go together");
  grad_output = input(grad_output, {T, B, K});
  grad_hidden = hidden ? input(grad_hidden, {B, H}) : std::nullopt;
  grad_cell = cell ? input(grad_cell, {B, H}) : std::nullopt;
  grad_reads = input(grad_reads, {B, R, D});
  grad_memory = input(grad_memory, {B, N, D});
  grad_read_weights = input(grad_read_weights, {B, R, N});
  hidden = input(hidden, {B, H});
  cell = input(cell, {B, H});
  memory = input(memory, {B, N, D});
  read_weights = input(read_weights, {B, R, N});
  hidden_weight = input(hidden_weight, {G, H});
  reads_weight = weight(reads_weight, {G, R * D});
  head_weight = input(head_weight, {heads, H});
  kept_gates = input(kept_gates, {T, B, kept});
  kept_states = input(kept_states, hidden ? Shape{T, B, H} : Shape{0});
  kept_heads = input(kept_heads, {T, B, heads});
  slots = input(slots, {T, B, R});
  anchors = input(anchors, anchors_shape(T, anchor_every, B, D + R, N));
  const SequenceTensors sequences(resets, lengths, start, {T, B}, B, memory);
  const bool gru = kind == Controller::gru;
  Tensor grad_gates = empty(memory, {T, B, G}), grad_hidden_gates = empty(memory, gru ? Shape{T, B, G} : Shape{0});
  Tensor grad_heads = empty(memory, {T, B, heads}), grad_in_hidden = empty(memory, hidden ? Shape{B, H} : Shape{0});
  Tensor grad_in_cell = empty(memory, cell ? Shape{B, H} : Shape{0}), grad_in_memory = empty(memory, {B, N, D});
  Tensor grad_in_read_weights = empty(memory, {B, R, N}), grad_in_reads = empty(memory, {B, R, D});
  Tensor grad_start = sequences.gradient(memory);
  Device(memory).run(CellBackward{
      T, B, H, N, D, R, dtype_of(memory), bfloat16, kind, separate_vector, learned_sharpness, sharpness, sharpness_scale,
      read_first, shared_target, eps, anchor_every, data(grad_output), data(grad_hidden), data(grad_cell), data(grad_reads),
      data(grad_memory), data(grad_read_weights), data(hidden), data(cell), data(memory), data(read_weights),
      data(hidden_weight), data(reads_weight), reads_weight.stride(0), data(head_weight), data(kept_gates), data(kept_states),
      data(kept_heads), slots.const_data_ptr<int64_t>(), data(anchors), sequences.arguments(),
      // results
      grad_gates.mutable_data_ptr(), gru ? grad_hidden_gates.mutable_data_ptr() : nullptr, grad_heads.mutable_data_ptr(),
      hidden ? grad_in_hidden.mutable_data_ptr() : nullptr, cell ? grad_in_cell.mutable_data_ptr() : nullptr,
      grad_in_memory.mutable_data_ptr(), grad_in_read_weights.mutable_data_ptr(), grad_in_reads.mutable_data_ptr(),
      start ? grad_start.mutable_data_ptr() : nullptr});
  return {grad_gates,     grad_hidden_gates,    grad_heads,    grad_in_hidden, grad_in_cell,
          grad_in_memory, grad_in_read_weights, grad_in_reads, grad_start};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ntm_cell(
    Tensor gates, std::optional<Tensor> hidden, std::optional<Tensor> cell, Tensor memory, Tensor weights, Tensor reads,
    std::optional<Tensor> hidden_weight, std::optional<Tensor> hidden_bias, Tensor reads_weight, Tensor head_weight,
    Tensor head_bias, std::optional<Tensor> resets, std::optional<Tensor> lengths, std::optional<Tensor> start,
    int64_t controller, int64_t max_shift, bool read_first, double eps, bool bfloat16, int64_t anchor_every) {
  const CellShape shape(gates.size(0), memory, reads.size(1), head_weight, controller);
  const auto [T, B, H, N, D, R, K, G, kept, heads, kind] = shape;
  const int64_t shifts = shape.check_ntm(max_shift, dtype_of(gates), bfloat16, hidden.has_value(), cell.has_value());
  STD_TORCH_CHECK(hidden.has_value() == hidden_weight.has_value() && hidden.has_value() == hidden_bias.has_value(),
                  "hidden, hidden_weight and hidden_bias go together");
  gates = input(gates, {T, B, G});
  hidden = input(hidden, {B, H});
  cell = input(cell, {B, H});
  memory = input(memory, {B, N, D});
  weights = input(weights, {B, 2 * R, N});
  reads = input(reads, {B, R, D});
  hidden_weight = input(hidden_weight, {G, H});
  hidden_bias = input(hidden_bias, {G});
  reads_weight = weight(reads_weight, {G, R * D});
  head_weight = input(head_weight, {heads, H});
  head_bias = input(head_bias, {heads});
  const SequenceTensors sequences(resets, lengths, start, {T, B}, B, memory);
  const bool keeps = anchor_every > 0;
  Tensor output = empty(gates, {T, B, K}), out_hidden = empty(gates, hidden ? Shape{B, H} : Shape{0});
  Tensor out_cell = empty(gates, cell ? Shape{B, H} : Shape{0}), out_reads = empty(gates, {B, R, D});
  Tensor out_memory = empty(gates, {B, N, D}), out_weights = empty(gates, {B, 2 * R, N});
  Tensor kept_gates = empty(gates, keeps ? Shape{T, B, kept} : Shape{0});
  Tensor kept_states = empty(gates, keeps && hidden ? Shape{T, B, H} : Shape{0});
  Tensor kept_heads = empty(gates, keeps ? Shape{T, B, heads} : Shape{0});
  Tensor history = empty(gates, keeps ? Shape{T, B, 2 * R, N} : Shape{0});
  Tensor anchors = empty(gates, keeps ? anchors_shape(T, anchor_every, B, D, N) : Shape{0});
  Device(memory).run(
      NtmCell{T, B, H, N, D, R, shifts, dtype_of(gates), bfloat16, kind, read_first, eps, anchor_every, data(gates),
              data(hidden), data(cell), data(memory), data(weights), data(reads), data(hidden_weight), data(hidden_bias),
              data(reads_weight), reads_weight.stride(0), data(head_weight), data(head_bias), sequences.arguments(),
              // results
              output.mutable_data_ptr(), hidden ? out_hidden.mutable_data_ptr() : nullptr,
              cell ? out_cell.mutable_data_ptr() : nullptr, out_reads.mutable_data_ptr(), out_memory.mutable_data_ptr(),
              out_weights.mutable_data_ptr(), kept_gates.mutable_data_ptr(), kept_states.mutable_data_ptr(),
              kept_heads.mutable_data_ptr(), history.mutable_data_ptr(), anchors.mutable_data_ptr()});
  return {output,     out_hidden,  out_cell,   out_reads, out_memory, out_weights,
          kept_gates, kept_states, kept_heads, history,   anchors};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ntm_cell_backward(
    std::optional<Tensor> grad_output, std::optional<Tensor> grad_hidden, std::optional<Tensor> grad_cell,
    std::optional<Tensor> grad_reads, std::optional<Tensor> grad_memory, std::optional<Tensor> grad_weights,
    std::optional<Tensor> hidden, std::optional<Tensor> cell, Tensor memory, Tensor weights,
    std::optional<Tensor> hidden_weight, Tensor reads_weight, Tensor head_weight, Tensor kept_gates, Tensor kept_states,
    Tensor kept_heads, Tensor history, Tensor anchors, std::optional<Tensor> resets, std::optional<Tensor> lengths,
    std::optional<Tensor> start, int64_t controller, int64_t max_shift, bool read_first, double eps, bool bfloat16,
    int64_t anchor_every) {
  const CellShape shape(kept_gates.size(0), memory, weights.size(1) / 2, head_weight, controller);
  const auto [T, B, H, N, D, R, K, G, kept, heads, kind] = shape;
  STD_TORCH_CHECK(anchor_every > 0, "anchor_every must be positive");
  const int64_t shifts = shape.check_ntm(max_shift, dtype_of(memory), bfloat16, hidden.has_value(), cell.has_value());
  STD_TORCH_CHECK(hidden.has_value() == hidden_weight.has_value(), "hidden and hidden_weight go together");
  grad_output = input(grad_output, {T, B, K});
  grad_hidden = hidden ? input(grad_hidden, {B, H}) : std::nullopt;
  grad_cell = cell ? input(grad_cell, {B, H}) : std::nullopt;
  grad_reads = input(grad_reads, {B, R, D});
  grad_memory = input(grad_memory, {B, N, D});
  grad_weights = input(grad_weights, {B, 2 * R, N});
  hidden = input(hidden, {B, H});
  cell = input(cell, {B, H});
  memory = input(memory, {B, N, D});
  weights = input(weights, {B, 2 * R, N});
  hidden_weight = input(hidden_weight, {G, H});
  reads_weight = weight(reads_weight, {G, R * D});
  head_weight = input(head_weight, {heads, H});
  kept_gates = input(kept_gates, {T, B, kept});
  kept_states = input(kept_states, hidden ? Shape{T, B, H} : Shape{0});
  kept_heads = input(kept_heads, {T, B, heads});
  history = input(history, {T, B, 2 * R, N});
  anchors = input(anchors, anchors_shape(T, anchor_every, B, D, N));
  const SequenceTensors sequences(resets, lengths, start, {T, B}, B, memory);
  const bool gru = kind == Controller::gru;
  Tensor grad_gates = empty(memory, {T, B, G}), grad_hidden_gates = empty(memory, gru ? Shape{T, B, G} : Shape{0});
  Tensor grad_heads = empty(memory, {T, B, heads}), grad_in_hidden = empty(memory, hidden ? Shape{B, H} : Shape{0});
  Tensor grad_in_cell = empty(memory, cell ? Shape{B, H} : Shape{0}), grad_in_memory = empty(memory, {B, N, D});
  Tensor grad_in_weights = empty(memory, {B, 2 * R, N}), grad_in_reads = empty(memory, {B, R, D});
  Tensor grad_start = sequences.gradient(memory);
  Device(memory).run(NtmCellBackward{
      T, B, H, N, D, R, shifts, dtype_of(memory), bfloat16, kind, read_first, eps, anchor_every, data(grad_output),
      data(grad_hidden), data(grad_cell), data(grad_reads), data(grad_memory), data(grad_weights), data(hidden), data(cell),
      data(memory), data(weights), data(hidden_weight), data(reads_weight), reads_weight.stride(0), data(head_weight),
      data(kept_gates), data(kept_states), data(kept_heads), data(history), data(anchors), sequences.arguments(),
      // results
      grad_gates.mutable_data_ptr(), gru ? grad_hidden_gates.mutable_data_ptr() : nullptr, grad_heads.mutable_data_ptr(),
      hidden ? grad_in_hidden.mutable_data_ptr() : nullptr, cell ? grad_in_cell.mutable_data_ptr() : nullptr,
      grad_in_memory.mutable_data_ptr(), grad_in_weights.mutable_data_ptr(), grad_in_reads.mutable_data_ptr(),
      start ? grad_start.mutable_data_ptr() : nullptr});
  return {grad_gates,     grad_hidden_gates, grad_heads,    grad_in_hidden, grad_in_cell,
          grad_in_memory, grad_in_weights,   grad_in_reads, grad_start};
}

}  // namespace
}  // namespace mann_fast

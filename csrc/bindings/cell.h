// cell, ntm_cell, dnc_cell and sparse_cell. Each op checks the shapes of its tensors, makes its results, and runs on a Device.
#pragma once
#include "dnc.h"
#include "sparse.h"
#include "tensors.h"

namespace mann_fast {
namespace {

// A weight that may be part of the columns of a wider one.
Tensor weight(const Tensor& tensor, const Shape& shape) {
  const bool rows = tensor.dim() == 2 && tensor.size(0) == shape[0] && tensor.size(1) == shape[1] && tensor.stride(1) == 1;
  return rows ? tensor : input(tensor, shape);
}

struct NetworkShape {
  int64_t T, B, H, N, D, R, K, G, kept, heads;
  Controller controller;
  NetworkShape(int64_t T, const Tensor& memory, int64_t R, const Tensor& head_weight, int64_t number)
      : T(T), B(memory.size(0)), H(head_weight.size(1)), N(memory.size(1)), D(memory.size(2)), R(R), K(H + R * D),
        heads(head_weight.size(0)) {
    STD_TORCH_CHECK(number >= 0 && number <= 2, "controller must be 0 (LSTM), 1 (GRU) or 2 (feed-forward)");
    controller = static_cast<Controller>(number);
    G = gates_per_unit(controller) * H;
    kept = kept_per_unit(controller) * H;
  }
  void check(int64_t values, Dtype dtype, bool bfloat16, bool hidden, bool cell) const {
    STD_TORCH_CHECK(heads == values, "head_weight has not as many rows as the heads have values");
    STD_TORCH_CHECK(dtype == Dtype::float32 || (dtype == Dtype::float64 && !bfloat16),
                    "cell takes float32 and float64 only, and rounds to bfloat16 beside float32 only");
    STD_TORCH_CHECK(hidden == (controller != Controller::feedforward) && cell == (controller == Controller::lstm),
                    "the state is not that of this controller");
  }
};

// How many values a memory's heads have.
int64_t lrua_values(const NetworkShape& n, bool separate_vector, bool learned_sharpness) {
  return (separate_vector ? 2 : 1) * n.R * n.D + (learned_sharpness ? 2 : 1) * n.R;
}
int64_t ntm_shifts(int64_t max_shift) {  // 0 of heads that go by content alone (max_shift -1)
  STD_TORCH_CHECK(max_shift >= -1, "max_shift must be at least 0, or -1 for none");
  return max_shift < 0 ? 0 : 2 * max_shift + 1;
}
int64_t ntm_values(const NetworkShape& n, int64_t shifts) {
  return 2 * (n.R * n.D + n.R * (shifts > 0 ? 3 + shifts : 1)) + 2 * n.R * n.D;
}
int64_t dnc_values(const NetworkShape& n, bool links, bool masks, bool sharpened) {
  STD_TORCH_CHECK(links || !sharpened, "there is no link_sharpening without links");
  const int64_t of_reads = n.D + 2 + (links ? 3 : 0) + (masks ? n.D : 0) + (sharpened ? 2 : 0);
  return n.R * of_reads + 3 * n.D + 3 + (masks ? n.D : 0);
}
int64_t sparse_values(const NetworkShape& n) { return 2 * n.R * n.D + 3 * n.R; }

// What comes in of a network and goes out, whatever its memory.
struct NetworkTensors {
  const NetworkShape& n;
  Tensor gates, reads, reads_weight, head_weight, head_bias;
  MaybeTensor hidden, cell, hidden_weight, hidden_bias;
  SequenceTensors sequences;
  bool bfloat16;
  int64_t anchor_every;
  Tensor output, out_hidden, out_cell, out_reads, kept_gates, kept_states, kept_heads;

  // values: how many the memory's heads have.
  NetworkTensors(const NetworkShape& n, int64_t values, const Tensor& memory, const Tensor& gates, const MaybeTensor& hidden,
                 const MaybeTensor& cell, const Tensor& reads, const MaybeTensor& hidden_weight, const MaybeTensor& hidden_bias,
                 const Tensor& reads_weight, const Tensor& head_weight, const Tensor& head_bias, const MaybeTensor& resets,
                 const MaybeTensor& lengths, const MaybeTensor& start, bool bfloat16, int64_t anchor_every)
      : n(n), gates(input(gates, {n.T, n.B, n.G})), reads(input(reads, {n.B, n.R, n.D})),
        reads_weight(weight(reads_weight, {n.G, n.R * n.D})), head_weight(input(head_weight, {n.heads, n.H})),
        head_bias(input(head_bias, {n.heads})), hidden(input(hidden, {n.B, n.H})), cell(input(cell, {n.B, n.H})),
        hidden_weight(input(hidden_weight, {n.G, n.H})), hidden_bias(input(hidden_bias, {n.G})),
        sequences(resets, lengths, start, {n.T, n.B}, n.B, memory), bfloat16(bfloat16), anchor_every(anchor_every) {
    n.check(values, dtype_of(gates), bfloat16, hidden.has_value(), cell.has_value());
    STD_TORCH_CHECK(hidden.has_value() == hidden_weight.has_value() && hidden.has_value() == hidden_bias.has_value(),
                    "hidden, hidden_weight and hidden_bias go together");
    output = empty(gates, {n.T, n.B, n.K});
    out_hidden = empty(gates, hidden ? Shape{n.B, n.H} : Shape{0});
    out_cell = empty(gates, cell ? Shape{n.B, n.H} : Shape{0});
    out_reads = empty(gates, {n.B, n.R, n.D});
    kept_gates = empty(gates, keeps() ? Shape{n.T, n.B, n.kept} : Shape{0});
    kept_states = empty(gates, keeps() && hidden ? Shape{n.T, n.B, n.H} : Shape{0});
    kept_heads = empty(gates, keeps() ? Shape{n.T, n.B, n.heads} : Shape{0});
  }
  bool keeps() const { return anchor_every > 0; }
  Network arguments() {
    return {n.T, n.B, n.H, n.N, n.D, n.R, dtype_of(gates), bfloat16, n.controller, anchor_every, data(gates), data(hidden),
            data(cell), data(reads), data(hidden_weight), data(hidden_bias), data(reads_weight), reads_weight.stride(0),
            data(head_weight), data(head_bias), sequences.arguments(),
            // results
            output.mutable_data_ptr(), pointer(out_hidden, hidden.has_value()), pointer(out_cell, cell.has_value()),
            out_reads.mutable_data_ptr(), kept_gates.mutable_data_ptr(), kept_states.mutable_data_ptr(),
            kept_heads.mutable_data_ptr()};
  }
};

struct NetworkBackwardTensors {
  const NetworkShape& n;
  Dtype dtype;
  MaybeTensor grad_output, grad_hidden, grad_cell, grad_reads, hidden, cell, hidden_weight;
  Tensor reads_weight, head_weight, kept_gates, kept_states, kept_heads;
  SequenceTensors sequences;
  bool bfloat16;
  int64_t anchor_every;
  Tensor grad_gates, grad_hidden_gates, grad_heads, grad_in_hidden, grad_in_cell, grad_in_reads, grad_start;

  NetworkBackwardTensors(const NetworkShape& n, int64_t values, const Tensor& memory, const MaybeTensor& grad_output,
                         const MaybeTensor& grad_hidden, const MaybeTensor& grad_cell, const MaybeTensor& grad_reads,
                         const MaybeTensor& hidden, const MaybeTensor& cell, const MaybeTensor& hidden_weight,
                         const Tensor& reads_weight, const Tensor& head_weight, const Tensor& kept_gates,
                         const Tensor& kept_states, const Tensor& kept_heads, const MaybeTensor& resets,
                         const MaybeTensor& lengths, const MaybeTensor& start, bool bfloat16, int64_t anchor_every)
      : n(n), dtype(dtype_of(memory)), grad_output(input(grad_output, {n.T, n.B, n.K})),
        grad_hidden(hidden ? input(grad_hidden, {n.B, n.H}) : std::nullopt),
        grad_cell(cell ? input(grad_cell, {n.B, n.H}) : std::nullopt), grad_reads(input(grad_reads, {n.B, n.R, n.D})),
        hidden(input(hidden, {n.B, n.H})), cell(input(cell, {n.B, n.H})), hidden_weight(input(hidden_weight, {n.G, n.H})),
        reads_weight(weight(reads_weight, {n.G, n.R * n.D})), head_weight(input(head_weight, {n.heads, n.H})),
        kept_gates(input(kept_gates, {n.T, n.B, n.kept})),
        kept_states(input(kept_states, hidden ? Shape{n.T, n.B, n.H} : Shape{0})),
        kept_heads(input(kept_heads, {n.T, n.B, n.heads})), sequences(resets, lengths, start, {n.T, n.B}, n.B, memory),
        bfloat16(bfloat16), anchor_every(anchor_every) {
    STD_TORCH_CHECK(anchor_every > 0, "anchor_every must be positive");
    n.check(values, dtype, bfloat16, hidden.has_value(), cell.has_value());
    STD_TORCH_CHECK(hidden.has_value() == hidden_weight.has_value(), "hidden and hidden_weight go together");
    grad_gates = empty(memory, {n.T, n.B, n.G});
    grad_hidden_gates = empty(memory, gru() ? Shape{n.T, n.B, n.G} : Shape{0});
    grad_heads = empty(memory, {n.T, n.B, n.heads});
    grad_in_hidden = empty(memory, hidden ? Shape{n.B, n.H} : Shape{0});
    grad_in_cell = empty(memory, cell ? Shape{n.B, n.H} : Shape{0});
    grad_in_reads = empty(memory, {n.B, n.R, n.D});
    grad_start = sequences.gradient(memory);
  }
  bool gru() const { return n.controller == Controller::gru; }
  NetworkBackward arguments() {
    return {n.T, n.B, n.H, n.N, n.D, n.R, dtype, bfloat16, n.controller, anchor_every, data(grad_output), data(grad_hidden),
            data(grad_cell), data(grad_reads), data(hidden), data(cell), data(hidden_weight), data(reads_weight),
            reads_weight.stride(0), data(head_weight), data(kept_gates), data(kept_states), data(kept_heads),
            sequences.arguments(),
            // results
            grad_gates.mutable_data_ptr(), pointer(grad_hidden_gates, gru()), grad_heads.mutable_data_ptr(),
            pointer(grad_in_hidden, hidden.has_value()), pointer(grad_in_cell, cell.has_value()),
            grad_in_reads.mutable_data_ptr(), pointer(grad_start, sequences.start.has_value())};
  }
};

// ---- with the LRUA memory -------------------------------------------------------------------------------------------

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cell(
    Tensor gates, MaybeTensor hidden, MaybeTensor cell, Tensor memory, Tensor read_weights, Tensor usage, Tensor reads,
    MaybeTensor hidden_weight, MaybeTensor hidden_bias, Tensor reads_weight, Tensor head_weight, Tensor head_bias,
    MaybeTensor resets, MaybeTensor lengths, MaybeTensor start, int64_t controller, bool separate_vector,
    bool learned_sharpness, double sharpness, double sharpness_scale, bool read_first, bool shared_target, double usage_decay,
    double eps, bool bfloat16, int64_t anchor_every) {
  const NetworkShape n(gates.size(0), memory, read_weights.size(1), head_weight, controller);
  NetworkTensors network(n, lrua_values(n, separate_vector, learned_sharpness), memory, gates, hidden, cell, reads,
                         hidden_weight, hidden_bias, reads_weight, head_weight, head_bias, resets, lengths, start, bfloat16,
                         anchor_every);
  memory = input(memory, {n.B, n.N, n.D});
  read_weights = input(read_weights, {n.B, n.R, n.N});
  usage = input(usage, {n.B, n.N});
  Tensor out_memory = empty(gates, {n.B, n.N, n.D}), out_read_weights = empty(gates, {n.B, n.R, n.N});
  Tensor out_usage = empty(gates, {n.B, n.N});
  Tensor slots = empty_slots(gates, network.keeps() ? Shape{n.T, n.B, n.R} : Shape{0});
  Tensor anchors = empty(gates, network.keeps() ? anchors_shape(n.T, anchor_every, n.B, n.D + n.R, n.N) : Shape{0});
  Device(memory).run(Cell{network.arguments(), separate_vector, learned_sharpness, sharpness, sharpness_scale, read_first,
                          shared_target, usage_decay, eps, data(memory), data(read_weights), data(usage),
                          // results
                          out_memory.mutable_data_ptr(), out_read_weights.mutable_data_ptr(), out_usage.mutable_data_ptr(),
                          slots.mutable_data_ptr<int64_t>(), anchors.mutable_data_ptr()});
  return {network.output, network.out_hidden, network.out_cell,    network.out_reads,  out_memory, out_read_weights,
          out_usage,      network.kept_gates, network.kept_states, network.kept_heads, slots,      anchors};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cell_backward(
    MaybeTensor grad_output, MaybeTensor grad_hidden, MaybeTensor grad_cell, MaybeTensor grad_reads, MaybeTensor grad_memory,
    MaybeTensor grad_read_weights, MaybeTensor hidden, MaybeTensor cell, Tensor memory, Tensor read_weights,
    MaybeTensor hidden_weight, Tensor reads_weight, Tensor head_weight, Tensor kept_gates, Tensor kept_states,
    Tensor kept_heads, Tensor slots, Tensor anchors, MaybeTensor resets, MaybeTensor lengths, MaybeTensor start,
    int64_t controller, bool separate_vector, bool learned_sharpness, double sharpness, double sharpness_scale, bool read_first,
    bool shared_target, double eps, bool bfloat16, int64_t anchor_every) {
  const NetworkShape n(kept_gates.size(0), memory, read_weights.size(1), head_weight, controller);
  NetworkBackwardTensors network(n, lrua_values(n, separate_vector, learned_sharpness), memory, grad_output, grad_hidden,
                                 grad_cell, grad_reads, hidden, cell, hidden_weight, reads_weight, head_weight, kept_gates,
                                 kept_states, kept_heads, resets, lengths, start, bfloat16, anchor_every);
  grad_memory = input(grad_memory, {n.B, n.N, n.D});
  grad_read_weights = input(grad_read_weights, {n.B, n.R, n.N});
  memory = input(memory, {n.B, n.N, n.D});
  read_weights = input(read_weights, {n.B, n.R, n.N});
  slots = input(slots, {n.T, n.B, n.R});
  anchors = input(anchors, anchors_shape(n.T, anchor_every, n.B, n.D + n.R, n.N));
  Tensor grad_in_memory = empty(memory, {n.B, n.N, n.D}), grad_in_read_weights = empty(memory, {n.B, n.R, n.N});
  Device(memory).run(CellBackward{network.arguments(), separate_vector, learned_sharpness, sharpness, sharpness_scale,
                                  read_first, shared_target, eps, data(grad_memory), data(grad_read_weights), data(memory),
                                  data(read_weights), slots.const_data_ptr<int64_t>(), data(anchors),
                                  // results
                                  grad_in_memory.mutable_data_ptr(), grad_in_read_weights.mutable_data_ptr()});
  return {network.grad_gates, network.grad_hidden_gates, network.grad_heads,    network.grad_in_hidden, network.grad_in_cell,
          grad_in_memory,     grad_in_read_weights,      network.grad_in_reads, network.grad_start};
}

// ---- with a Neural Turing Machine's ---------------------------------------------------------------------------------

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ntm_cell(
    Tensor gates, MaybeTensor hidden, MaybeTensor cell, Tensor memory, Tensor weights, Tensor reads, MaybeTensor hidden_weight,
    MaybeTensor hidden_bias, Tensor reads_weight, Tensor head_weight, Tensor head_bias, MaybeTensor resets, MaybeTensor lengths,
    MaybeTensor start, int64_t controller, int64_t max_shift, bool read_first, double eps, bool bfloat16,
    int64_t anchor_every) {
  const NetworkShape n(gates.size(0), memory, reads.size(1), head_weight, controller);
  const int64_t shifts = ntm_shifts(max_shift);
  NetworkTensors network(n, ntm_values(n, shifts), memory, gates, hidden, cell, reads, hidden_weight, hidden_bias, reads_weight,
                         head_weight, head_bias, resets, lengths, start, bfloat16, anchor_every);
  memory = input(memory, {n.B, n.N, n.D});
  weights = input(weights, {n.B, 2 * n.R, n.N});
  Tensor out_memory = empty(gates, {n.B, n.N, n.D}), out_weights = empty(gates, {n.B, 2 * n.R, n.N});
  Tensor history = empty(gates, network.keeps() ? Shape{n.T, n.B, 2 * n.R, n.N} : Shape{0});
  Tensor anchors = empty(gates, network.keeps() ? anchors_shape(n.T, anchor_every, n.B, n.D, n.N) : Shape{0});
  Device(memory).run(NtmCell{network.arguments(), shifts, read_first, eps, data(memory), data(weights),
                             // results
                             out_memory.mutable_data_ptr(), out_weights.mutable_data_ptr(), history.mutable_data_ptr(),
                             anchors.mutable_data_ptr()});
  return {network.output,     network.out_hidden,  network.out_cell,   network.out_reads, out_memory, out_weights,
          network.kept_gates, network.kept_states, network.kept_heads, history,           anchors};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ntm_cell_backward(
    MaybeTensor grad_output, MaybeTensor grad_hidden, MaybeTensor grad_cell, MaybeTensor grad_reads, MaybeTensor grad_memory,
    MaybeTensor grad_weights, MaybeTensor hidden, MaybeTensor cell, Tensor memory, Tensor weights, MaybeTensor hidden_weight,
    Tensor reads_weight, Tensor head_weight, Tensor kept_gates, Tensor kept_states, Tensor kept_heads, Tensor history,
    Tensor anchors, MaybeTensor resets, MaybeTensor lengths, MaybeTensor start, int64_t controller, int64_t max_shift,
    bool read_first, double eps, bool bfloat16, int64_t anchor_every) {
  const NetworkShape n(kept_gates.size(0), memory, weights.size(1) / 2, head_weight, controller);
  const int64_t shifts = ntm_shifts(max_shift);
  NetworkBackwardTensors network(n, ntm_values(n, shifts), memory, grad_output, grad_hidden, grad_cell, grad_reads, hidden,
                                 cell, hidden_weight, reads_weight, head_weight, kept_gates, kept_states, kept_heads, resets,
                                 lengths, start, bfloat16, anchor_every);
  grad_memory = input(grad_memory, {n.B, n.N, n.D});
  grad_weights = input(grad_weights, {n.B, 2 * n.R, n.N});
  memory = input(memory, {n.B, n.N, n.D});
  weights = input(weights, {n.B, 2 * n.R, n.N});
  history = input(history, {n.T, n.B, 2 * n.R, n.N});
  anchors = input(anchors, anchors_shape(n.T, anchor_every, n.B, n.D, n.N));
  Tensor grad_in_memory = empty(memory, {n.B, n.N, n.D}), grad_in_weights = empty(memory, {n.B, 2 * n.R, n.N});
  Device(memory).run(NtmCellBackward{network.arguments(), shifts, read_first, eps, data(grad_memory), data(grad_weights),
                                     data(memory), data(weights), data(history), data(anchors),
                                     // results
                                     grad_in_memory.mutable_data_ptr(), grad_in_weights.mutable_data_ptr()});
  return {network.grad_gates, network.grad_hidden_gates, network.grad_heads,    network.grad_in_hidden, network.grad_in_cell,
          grad_in_memory,     grad_in_weights,           network.grad_in_reads, network.grad_start};
}

// ---- with a Differentiable Neural Computer's ------------------------------------------------------------------------

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
           Tensor, Tensor, Tensor>
dnc_cell(Tensor gates, MaybeTensor hidden, MaybeTensor cell, Tensor memory, Tensor usage, MaybeTensor precedence,
         MaybeTensor links, Tensor read_weights, Tensor write_weights, Tensor reads, MaybeTensor hidden_weight,
         MaybeTensor hidden_bias, Tensor reads_weight, Tensor head_weight, Tensor head_bias, MaybeTensor resets,
         MaybeTensor lengths, MaybeTensor start, int64_t controller, bool masks, double mask_min, bool deallocate,
         bool link_sharpening, double clip, double eps, bool bfloat16, int64_t anchor_every) {
  const NetworkShape n(gates.size(0), memory, read_weights.size(1), head_weight, controller);
  NetworkTensors network(n, dnc_values(n, links.has_value(), masks, link_sharpening), memory, gates, hidden, cell, reads,
                         hidden_weight, hidden_bias, reads_weight, head_weight, head_bias, resets, lengths, start, bfloat16,
                         anchor_every);
  const DncShape shape(n.T, memory, links, n.R);
  const auto before = shape.state(memory, usage, precedence, links, read_weights, write_weights);
  DncStateTensors after(shape, memory);
  DncHistoryTensors history(shape, memory, network.keeps(), link_sharpening);
  Device(memory).run(DncCell{network.arguments(),
                             {masks, link_sharpening, deallocate, mask_min, clip, eps},
                             history.arguments(),
                             before,
                             after.arguments()});
  return {network.output,     network.out_hidden,  network.out_cell,   network.out_reads,    after.memory,
          after.usage,        after.precedence,    after.links,        after.read_weights,   after.write_weights,
          network.kept_gates, network.kept_states, network.kept_heads, history.read_history, history.write_history,
          history.orders,     history.directions};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dnc_cell_backward(
    MaybeTensor grad_output, MaybeTensor grad_hidden, MaybeTensor grad_cell, MaybeTensor grad_reads, MaybeTensor grad_memory,
    MaybeTensor grad_usage, MaybeTensor grad_precedence, MaybeTensor grad_links, MaybeTensor grad_read_weights,
    MaybeTensor grad_write_weights, MaybeTensor hidden, MaybeTensor cell, Tensor memory, Tensor usage, MaybeTensor precedence,
    MaybeTensor links, Tensor read_weights, Tensor write_weights, MaybeTensor hidden_weight, Tensor reads_weight,
    Tensor head_weight, Tensor kept_gates, Tensor kept_states, Tensor kept_heads, Tensor read_history, Tensor write_history,
    Tensor orders, Tensor directions, MaybeTensor resets, MaybeTensor lengths, MaybeTensor start, int64_t controller,
    bool masks, double mask_min, bool deallocate, bool link_sharpening, double clip, double eps, bool bfloat16,
    int64_t anchor_every) {
  const NetworkShape n(kept_gates.size(0), memory, read_weights.size(1), head_weight, controller);
  NetworkBackwardTensors network(n, dnc_values(n, links.has_value(), masks, link_sharpening), memory, grad_output, grad_hidden,
                                 grad_cell, grad_reads, hidden, cell, hidden_weight, reads_weight, head_weight, kept_gates,
                                 kept_states, kept_heads, resets, lengths, start, bfloat16, anchor_every);
  const DncShape shape(n.T, memory, links, n.R);
  const auto grad_after =
      shape.gradients(grad_memory, grad_usage, grad_precedence, grad_links, grad_read_weights, grad_write_weights);
  const auto before = shape.state(memory, usage, precedence, links, read_weights, write_weights);
  const auto history = shape.history(read_history, write_history, orders, directions, link_sharpening);
  DncStateTensors grad_before(shape, memory);
  Device(memory).run(DncCellBackward{network.arguments(),
                                     {masks, link_sharpening, deallocate, mask_min, clip, eps},
                                     history,
                                     grad_after,
                                     before,
                                     grad_before.gradients()});
  return {network.grad_gates,   network.grad_hidden_gates, network.grad_heads,    network.grad_in_hidden,
          network.grad_in_cell, grad_before.memory,        grad_before.usage,     grad_before.precedence,
          grad_before.links,    grad_before.read_weights,  network.grad_in_reads, network.grad_start};
}

// ---- with sparse access ---------------------------------------------------------------------------------------------

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
           Tensor, Tensor>
sparse_cell(Tensor gates, MaybeTensor hidden, MaybeTensor cell, Tensor memory, Tensor read_slots, Tensor read_weights,
            Tensor last_access, Tensor clock, Tensor reads, MaybeTensor hidden_weight, MaybeTensor hidden_bias,
            Tensor reads_weight, Tensor head_weight, Tensor head_bias, MaybeTensor resets, MaybeTensor lengths,
            MaybeTensor start, int64_t controller, int64_t num_slots, double threshold, double eps, double sharpness,
            double sharpness_scale, bool bfloat16, int64_t anchor_every) {
  const NetworkShape n(gates.size(0), memory, read_slots.size(1), head_weight, controller);
  NetworkTensors network(n, sparse_values(n), memory, gates, hidden, cell, reads, hidden_weight, hidden_bias, reads_weight,
                         head_weight, head_bias, resets, lengths, start, bfloat16, anchor_every);
  const SparseStateTensors before(memory, read_slots, read_weights, last_access, clock, num_slots);
  SparseResultTensors after(before, n.T, network.keeps());
  Device(memory).run(
      SparseCell{network.arguments(), sharpness, sharpness_scale,
                 after.arguments(before, n.T, dtype_of(memory), threshold, eps, {}, network.sequences.arguments(), nullptr)});
  return {network.output, network.out_hidden, network.out_cell,     network.out_reads,
          after.memory,   after.read_slots,   after.read_weights,   after.last_access,
          after.clock,    network.kept_gates, network.kept_states,  network.kept_heads,
          after.oldest,   after.slot_history, after.weight_history, after.rows};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sparse_cell_backward(
    MaybeTensor grad_output, MaybeTensor grad_hidden, MaybeTensor grad_cell, MaybeTensor grad_reads, MaybeTensor grad_memory,
    MaybeTensor grad_read_weights, MaybeTensor hidden, MaybeTensor cell, Tensor read_slots, Tensor read_weights,
    MaybeTensor hidden_weight, Tensor reads_weight, Tensor head_weight, Tensor kept_gates, Tensor kept_states,
    Tensor kept_heads, Tensor oldest, Tensor slot_history, Tensor weight_history, Tensor rows, MaybeTensor resets,
    MaybeTensor lengths, MaybeTensor start, int64_t controller, int64_t num_slots, double eps, double sharpness,
    double sharpness_scale, bool bfloat16, int64_t anchor_every) {
  SparseBackwardTensors memory(grad_memory, grad_read_weights, read_slots, read_weights, oldest, slot_history, weight_history,
                               rows, num_slots);
  const NetworkShape n(memory.T, memory.grad_in_memory, memory.R, head_weight, controller);
  NetworkBackwardTensors network(n, sparse_values(n), memory.grad_in_memory, grad_output, grad_hidden, grad_cell, grad_reads,
                                 hidden, cell, hidden_weight, reads_weight, head_weight, kept_gates, kept_states, kept_heads,
                                 resets, lengths, start, bfloat16, anchor_every);
  Device(rows).run(SparseCellBackward{network.arguments(), sharpness, sharpness_scale,
                                      memory.arguments(dtype_of(rows), eps, nullptr, {}, network.sequences.arguments(), {},
                                                       pointer(network.grad_start, start.has_value()))});
  return {network.grad_gates,          network.grad_hidden_gates, network.grad_heads,
          network.grad_in_hidden,      network.grad_in_cell,      memory.grad_in_memory,
          memory.grad_in_read_weights, network.grad_in_reads,     network.grad_start};
}

}  // namespace
}  // namespace mann_fast

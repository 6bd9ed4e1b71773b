// The raw ops on LibTorch's stable ABI, for whichever device has the kernels: a Device is made from a tensor on it and runs
// what it is given. Schemas and fake rules are in mann_fast/ops/*.py, which also checks every argument: only there can
// ValueError and TypeError be raised. What is checked here guards against a caller of torch.ops.mann_fast that bypasses it.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "include/arguments.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace mann_fast {
namespace {

using Shape = std::vector<int64_t>;

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Double: return Dtype::float64;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: STD_TORCH_CHECK(false, "mann_fast ops take float32, float64, bfloat16 and float16 only");
  }
  return Dtype::float32;
}

// A contiguous tensor of the shape that the kernel will index.
Tensor input(const Tensor& tensor, const Shape& shape) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = tensor.size(static_cast<int64_t>(i)) == shape[i];
  STD_TORCH_CHECK(same, "a tensor has another shape than this op's other arguments ask for");
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

std::optional<Tensor> input(const std::optional<Tensor>& tensor, const Shape& shape) {
  return tensor ? std::optional<Tensor>(input(*tensor, shape)) : std::nullopt;
}

const void* data(const Tensor& tensor) { return tensor.const_data_ptr(); }
const void* data(const std::optional<Tensor>& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

Tensor empty(const Tensor& like, const Shape& shape) { return torch::stable::new_empty(like, shape); }
Tensor empty_slots(const Tensor& like, const Shape& shape) {
  return torch::stable::new_empty(like, shape, std::make_optional(ScalarType::Long));
}

template <class Device>
std::tuple<Tensor, Tensor> content_read(Tensor memory, Tensor key, std::optional<Tensor> sharpness, double eps) {
  const int64_t B = memory.size(0), N = memory.size(1), D = memory.size(2), R = key.size(1);
  memory = input(memory, {B, N, D});
  key = input(key, {B, R, D});
  sharpness = input(sharpness, {B, R});
  Tensor read = empty(key, {B, R, D}), weights = empty(memory, {B, R, N});
  Device(memory).run(ContentRead{
      B, N, D, R, dtype_of(memory), dtype_of(key), eps, data(memory), data(key), data(sharpness),
       read.mutable_data_ptr(), weights.mutable_data_ptr()});
  return {read, weights};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> content_read_backward(std::optional<Tensor> grad_read,
                                                         std::optional<Tensor> grad_weights, Tensor memory, Tensor key,
                                                         std::optional<Tensor> sharpness, Tensor read, Tensor weights,
                                                         double eps) {
  const int64_t B = memory.size(0), N = memory.size(1), D = memory.size(2), R = key.size(1);
  grad_read = input(grad_read, {B, R, D});
  grad_weights = input(grad_weights, {B, R, N});
  memory = input(memory, {B, N, D});
  key = input(key, {B, R, D});
  sharpness = input(sharpness, {B, R});
  read = input(read, {B, R, D});
  weights = input(weights, {B, R, N});
  Tensor grad_memory = empty(memory, {B, N, D}), grad_key = empty(key, {B, R, D});
  Tensor grad_sharpness = empty(key, sharpness ? Shape{B, R} : Shape{0});
  Device(memory).run(ContentReadBackward{
      B, N, D, R, dtype_of(memory), dtype_of(key), eps, data(grad_read), data(grad_weights), data(memory), data(key),
       data(sharpness), data(read), data(weights), grad_memory.mutable_data_ptr(), grad_key.mutable_data_ptr(),
       sharpness ? grad_sharpness.mutable_data_ptr() : nullptr});
  return {grad_memory, grad_key, grad_sharpness};
}

template <class Device>
Tensor least_used(Tensor usage, int64_t n) {
  const int64_t B = usage.size(0), N = usage.size(1);
  STD_TORCH_CHECK(n >= 0 && n <= N, "n must be within [0, N]");
  usage = input(usage, {B, N});
  Tensor slots = empty_slots(usage, {B, n});
  Device(usage).run(LeastUsed{
      B, N, n, dtype_of(usage), data(usage), slots.mutable_data_ptr<int64_t>()});
  return slots;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> lrua_write(Tensor memory, Tensor read_weights, Tensor usage, Tensor write_vector,
                                              Tensor gate_logit, bool shared_target) {
  const int64_t B = memory.size(0), N = memory.size(1), D = memory.size(2), R = read_weights.size(1);
  memory = input(memory, {B, N, D});
  read_weights = input(read_weights, {B, R, N});
  usage = input(usage, {B, N});
  write_vector = input(write_vector, {B, R, D});
  gate_logit = input(gate_logit, {B, R});
  Tensor out_memory = empty(memory, {B, N, D}), write_weights = empty(memory, {B, R, N});
  Tensor slots = empty_slots(memory, {B, R});
  Device(memory).run(LruaWrite{
      B, N, D, R, dtype_of(memory), dtype_of(write_vector), shared_target, data(memory), data(read_weights), data(usage),
       data(write_vector), data(gate_logit), out_memory.mutable_data_ptr(), write_weights.mutable_data_ptr(),
       slots.mutable_data_ptr<int64_t>()});
  return {out_memory, write_weights, slots};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> lrua_write_backward(std::optional<Tensor> grad_memory,
                                                               std::optional<Tensor> grad_write_weights,
                                                               Tensor read_weights, Tensor write_vector,
                                                               Tensor gate_logit, Tensor slots, bool shared_target) {
  const int64_t B = read_weights.size(0), R = read_weights.size(1), N = read_weights.size(2), D = write_vector.size(2);
  grad_memory = input(grad_memory, {B, N, D});
  grad_write_weights = input(grad_write_weights, {B, R, N});
  read_weights = input(read_weights, {B, R, N});
  write_vector = input(write_vector, {B, R, D});
  gate_logit = input(gate_logit, {B, R});
  slots = input(slots, {B, R});
  Tensor grad_in_memory = empty(read_weights, {B, N, D}), grad_read_weights = empty(read_weights, {B, R, N});
  Tensor grad_write_vector = empty(write_vector, {B, R, D}), grad_gate_logit = empty(write_vector, {B, R});
  Device(read_weights).run(LruaWriteBackward{
      B, N, D, R, dtype_of(read_weights), dtype_of(write_vector), shared_target, data(grad_memory),
       data(grad_write_weights), data(read_weights), data(write_vector), data(gate_logit),
       slots.const_data_ptr<int64_t>(), grad_in_memory.mutable_data_ptr(), grad_read_weights.mutable_data_ptr(),
       grad_write_vector.mutable_data_ptr(), grad_gate_logit.mutable_data_ptr()});
  return {grad_in_memory, grad_read_weights, grad_write_vector, grad_gate_logit};
}

// Keys [B, R, D] are one step, keys [T, B, R, D] a scan.
struct ScanShape {
  int64_t T, B, N, D, R;
  Shape keys, gates;  // as they came
  ScanShape(const Tensor& memory, const Tensor& read_weights, const Tensor& first)
      : T(first.dim() == 4 ? first.size(0) : 1), B(memory.size(0)), N(memory.size(1)), D(memory.size(2)),
        R(read_weights.size(1)), keys(first.dim() == 4 ? Shape{T, B, R, D} : Shape{B, R, D}),
        gates(keys.begin(), keys.end() - 1) {}
};

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lrua_scan(
    Tensor memory, Tensor read_weights, Tensor usage, Tensor keys, Tensor write_vectors, Tensor gate_logits,
    std::optional<Tensor> sharpness, bool read_first, bool shared_target, double usage_decay, double eps,
    int64_t anchor_every) {
  const ScanShape shape(memory, read_weights, keys);
  const auto [T, B, N, D, R] = std::tie(shape.T, shape.B, shape.N, shape.D, shape.R);
  memory = input(memory, {B, N, D});
  read_weights = input(read_weights, {B, R, N});
  usage = input(usage, {B, N});
  keys = input(keys, shape.keys);
  write_vectors = input(write_vectors, shape.keys);
  gate_logits = input(gate_logits, shape.gates);
  sharpness = input(sharpness, shape.gates);
  Tensor reads = empty(keys, shape.keys), out_memory = empty(memory, {B, N, D});
  Tensor out_read_weights = empty(memory, {B, R, N}), out_usage = empty(memory, {B, N});
  const int64_t anchors_count = anchor_every > 0 && T > 0 ? (T - 1) / anchor_every : 0;
  Tensor slots = empty_slots(memory, anchor_every > 0 ? shape.gates : Shape{0});
  Tensor anchors = empty(memory, anchor_every > 0 ? Shape{anchors_count, B, D + R, padded_slots(N)} : Shape{0});
  Device(memory).run(LruaScan{
      T, B, N, D, R, dtype_of(memory), dtype_of(keys), read_first, shared_target, usage_decay, eps, anchor_every,
       data(memory), data(read_weights), data(usage), data(keys), data(write_vectors), data(gate_logits), data(sharpness),
       reads.mutable_data_ptr(), out_memory.mutable_data_ptr(), out_read_weights.mutable_data_ptr(),
       out_usage.mutable_data_ptr(), slots.mutable_data_ptr<int64_t>(), anchors.mutable_data_ptr()});
  return {reads, out_memory, out_read_weights, out_usage, slots, anchors};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lrua_scan_backward(
    std::optional<Tensor> grad_reads, std::optional<Tensor> grad_memory, std::optional<Tensor> grad_read_weights,
    Tensor memory, Tensor read_weights, Tensor keys, Tensor write_vectors, Tensor gate_logits,
    std::optional<Tensor> sharpness, Tensor slots, Tensor anchors, bool read_first, bool shared_target, double eps,
    int64_t anchor_every) {
  const ScanShape shape(memory, read_weights, keys);
  const auto [T, B, N, D, R] = std::tie(shape.T, shape.B, shape.N, shape.D, shape.R);
  STD_TORCH_CHECK(anchor_every > 0, "anchor_every must be positive");
  grad_reads = input(grad_reads, shape.keys);
  grad_memory = input(grad_memory, {B, N, D});
  grad_read_weights = input(grad_read_weights, {B, R, N});
  memory = input(memory, {B, N, D});
  read_weights = input(read_weights, {B, R, N});
  keys = input(keys, shape.keys);
  write_vectors = input(write_vectors, shape.keys);
  gate_logits = input(gate_logits, shape.gates);
  sharpness = input(sharpness, shape.gates);
  slots = input(slots, shape.gates);
  anchors = input(anchors, {T > 0 ? (T - 1) / anchor_every : 0, B, D + R, padded_slots(N)});
  Tensor grad_in_memory = empty(memory, {B, N, D}), grad_in_read_weights = empty(memory, {B, R, N});
  Tensor grad_keys = empty(keys, shape.keys), grad_write_vectors = empty(keys, shape.keys);
  Tensor grad_gate_logits = empty(keys, shape.gates);
  Tensor grad_sharpness = empty(keys, sharpness ? shape.gates : Shape{0});
  Device(memory).run(LruaScanBackward{
      T, B, N, D, R, dtype_of(memory), dtype_of(keys), read_first, shared_target, eps, anchor_every, data(grad_reads),
       data(grad_memory), data(grad_read_weights), data(memory), data(read_weights), data(keys), data(write_vectors),
       data(gate_logits), data(sharpness), slots.const_data_ptr<int64_t>(), data(anchors),
       grad_in_memory.mutable_data_ptr(), grad_in_read_weights.mutable_data_ptr(), grad_keys.mutable_data_ptr(),
       grad_write_vectors.mutable_data_ptr(), grad_gate_logits.mutable_data_ptr(),
       sharpness ? grad_sharpness.mutable_data_ptr() : nullptr});
  return {grad_in_memory, grad_in_read_weights, grad_keys, grad_write_vectors, grad_gate_logits, grad_sharpness};
}

// A weight that may be part of the columns of a wider one.
Tensor weight(const Tensor& tensor, const Shape& shape) {
  const bool rows = tensor.dim() == 2 && tensor.size(0) == shape[0] && tensor.size(1) == shape[1] && tensor.stride(1) == 1;
  return rows ? tensor : input(tensor, shape);
}

struct CellShape {
  int64_t T, B, H, N, D, R, K, G, kept, heads;
  Controller controller;
  CellShape(int64_t T, const Tensor& memory, const Tensor& read_weights, const Tensor& head_weight, int64_t number)
      : T(T), B(memory.size(0)), H(head_weight.size(1)), N(memory.size(1)), D(memory.size(2)), R(read_weights.size(1)),
        K(H + R * D), heads(head_weight.size(0)) {
    STD_TORCH_CHECK(number >= 0 && number <= 2, "controller must be 0 (LSTM), 1 (GRU) or 2 (feed-forward)");
    controller = static_cast<Controller>(number);
    G = gates_per_unit(controller) * H;
    kept = kept_per_unit(controller) * H;
  }
  void check(bool separate_vector, bool learned_sharpness, Dtype dtype, bool bfloat16, bool hidden, bool cell) const {
    STD_TORCH_CHECK(heads == (separate_vector ? 2 : 1) * R * D + (learned_sharpness ? 2 : 1) * R,
                    "head_weight has not as many rows as the heads have values");
    STD_TORCH_CHECK(dtype == Dtype::float32 || (dtype == Dtype::float64 && !bfloat16),
                    "cell takes float32 and float64 only, and rounds to bfloat16 beside float32 only");
    STD_TORCH_CHECK(hidden == (controller != Controller::feedforward) && cell == (controller == Controller::lstm),
                    "the state is not that of this controller");
  }
};

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cell(
    Tensor gates, std::optional<Tensor> hidden, std::optional<Tensor> cell, Tensor memory, Tensor read_weights,
    Tensor usage, Tensor reads, std::optional<Tensor> hidden_weight, std::optional<Tensor> hidden_bias,
    Tensor reads_weight, Tensor head_weight, Tensor head_bias, int64_t controller, bool separate_vector,
    bool learned_sharpness, double sharpness, double sharpness_scale, bool read_first, bool shared_target,
    double usage_decay, double eps, bool bfloat16, int64_t anchor_every) {
  const CellShape shape(gates.size(0), memory, read_weights, head_weight, controller);
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
  const bool keeps = anchor_every > 0;
  Tensor output = empty(gates, {T, B, K}), out_cell = empty(gates, cell ? Shape{B, H} : Shape{0});
  Tensor out_memory = empty(gates, {B, N, D}), out_read_weights = empty(gates, {B, R, N}), out_usage = empty(gates, {B, N});
  Tensor kept_gates = empty(gates, keeps ? Shape{T, B, kept} : Shape{0});
  Tensor kept_states = empty(gates, keeps && hidden ? Shape{T, B, H} : Shape{0});
  Tensor kept_heads = empty(gates, keeps ? Shape{T, B, heads} : Shape{0});
  Tensor slots = empty_slots(gates, keeps ? Shape{T, B, R} : Shape{0});
  const int64_t anchors_count = keeps && T > 0 ? (T - 1) / anchor_every : 0;
  Tensor anchors = empty(gates, keeps ? Shape{anchors_count, B, D + R, padded_slots(N)} : Shape{0});
  Device(memory).run(Cell{
      T, B, H, N, D, R, dtype_of(gates), bfloat16, kind, separate_vector, learned_sharpness, sharpness, sharpness_scale,
       read_first, shared_target, usage_decay, eps, anchor_every, data(gates), data(hidden), data(cell), data(memory),
       data(read_weights), data(usage), data(reads), data(hidden_weight), data(hidden_bias), data(reads_weight),
       reads_weight.stride(0), data(head_weight), data(head_bias), output.mutable_data_ptr(), out_cell.mutable_data_ptr(),
       out_memory.mutable_data_ptr(), out_read_weights.mutable_data_ptr(), out_usage.mutable_data_ptr(),
       kept_gates.mutable_data_ptr(), kept_states.mutable_data_ptr(), kept_heads.mutable_data_ptr(),
       slots.mutable_data_ptr<int64_t>(), anchors.mutable_data_ptr()});
  return {output, out_cell, out_memory, out_read_weights, out_usage, kept_gates, kept_states, kept_heads, slots, anchors};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cell_backward(
    std::optional<Tensor> grad_output, std::optional<Tensor> grad_cell, std::optional<Tensor> grad_memory,
    std::optional<Tensor> grad_read_weights, std::optional<Tensor> hidden, std::optional<Tensor> cell, Tensor memory,
    Tensor read_weights, std::optional<Tensor> hidden_weight, Tensor reads_weight, Tensor head_weight, Tensor kept_gates,
    Tensor kept_states, Tensor kept_heads, Tensor slots, Tensor anchors, int64_t controller, bool separate_vector,
    bool learned_sharpness, double sharpness, double sharpness_scale, bool read_first, bool shared_target, double eps,
    bool bfloat16, int64_t anchor_every) {
  const CellShape shape(kept_gates.size(0), memory, read_weights, head_weight, controller);
  const auto [T, B, H, N, D, R, K, G, kept, heads, kind] = shape;
  STD_TORCH_CHECK(anchor_every > 0, "anchor_every must be positive");
  shape.check(separate_vector, learned_sharpness, dtype_of(memory), bfloat16, hidden.has_value(), cell.has_value());
  STD_TORCH_CHECK(hidden.has_value() == hidden_weight.has_value(), "hidden and hidden_weight go together");
  grad_output = input(grad_output, {T, B, K});
  grad_cell = cell ? input(grad_cell, {B, H}) : std::nullopt;
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
  anchors = input(anchors, {T > 0 ? (T - 1) / anchor_every : 0, B, D + R, padded_slots(N)});
  const bool gru = kind == Controller::gru;
  Tensor grad_gates = empty(memory, {T, B, G}), grad_hidden_gates = empty(memory, gru ? Shape{T, B, G} : Shape{0});
  Tensor grad_heads = empty(memory, {T, B, heads}), grad_hidden = empty(memory, hidden ? Shape{B, H} : Shape{0});
  Tensor grad_in_cell = empty(memory, cell ? Shape{B, H} : Shape{0}), grad_in_memory = empty(memory, {B, N, D});
  Tensor grad_in_read_weights = empty(memory, {B, R, N}), grad_reads = empty(memory, {B, R, D});
  Device(memory).run(CellBackward{
      T, B, H, N, D, R, dtype_of(memory), bfloat16, kind, separate_vector, learned_sharpness, sharpness, sharpness_scale,
       read_first, shared_target, eps, anchor_every, data(grad_output), data(grad_cell), data(grad_memory),
       data(grad_read_weights), data(hidden), data(cell), data(memory), data(read_weights), data(hidden_weight),
       data(reads_weight), reads_weight.stride(0), data(head_weight), data(kept_gates), data(kept_states),
       data(kept_heads), slots.const_data_ptr<int64_t>(), data(anchors), grad_gates.mutable_data_ptr(),
       gru ? grad_hidden_gates.mutable_data_ptr() : nullptr, grad_heads.mutable_data_ptr(),
       grad_hidden.mutable_data_ptr(), grad_in_cell.mutable_data_ptr(), grad_in_memory.mutable_data_ptr(),
       grad_in_read_weights.mutable_data_ptr(), grad_reads.mutable_data_ptr()});
  return {grad_gates, grad_hidden_gates, grad_heads, grad_hidden, grad_in_cell, grad_in_memory, grad_in_read_weights,
          grad_reads};
}

// H = R + W heads, those that read first.
struct NtmShape {
  int64_t T, B, N, D, H, W, R, shifts;
  NtmShape(const Tensor& memory, const Tensor& weights, const Tensor& keys, const Tensor& shift, const Tensor& erase)
      : T(keys.size(0)), B(memory.size(0)), N(memory.size(1)), D(memory.size(2)), H(weights.size(1)), W(erase.size(2)),
        R(H - W), shifts(shift.size(3)) {
    STD_TORCH_CHECK(R >= 0 && shifts % 2 == 1, "there are more write heads than heads, or an even number of shifts");
  }
  // Makes each contiguous, of the shape that the kernel will index.
  void check(Tensor& memory, Tensor& weights, Tensor& keys, Tensor& sharpness, Tensor& gates, Tensor& shift,
             Tensor& sharpening, Tensor& erase, Tensor& add) const {
    memory = input(memory, {B, N, D});
    weights = input(weights, {B, H, N});
    keys = input(keys, {T, B, H, D});
    for (Tensor* per_head : {&sharpness, &gates, &sharpening}) *per_head = input(*per_head, {T, B, H});
    shift = input(shift, {T, B, H, shifts});
    for (Tensor* written : {&erase, &add}) *written = input(*written, {T, B, W, D});
  }
};

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ntm_scan(Tensor memory, Tensor weights, Tensor keys, Tensor sharpness,
                                                            Tensor gates, Tensor shift, Tensor sharpening, Tensor erase,
                                                            Tensor add, bool read_first, double eps, int64_t anchor_every) {
  const NtmShape shape(memory, weights, keys, shift, erase);
  const auto [T, B, N, D, H, W, R, shifts] =
      std::tie(shape.T, shape.B, shape.N, shape.D, shape.H, shape.W, shape.R, shape.shifts);
  shape.check(memory, weights, keys, sharpness, gates, shift, sharpening, erase, add);
  const int64_t anchors_count = anchor_every > 0 && T > 0 ? (T - 1) / anchor_every : 0;
  Tensor reads = empty(keys, {T, B, R, D}), out_memory = empty(memory, {B, N, D}), out_weights = empty(memory, {B, H, N});
  Tensor history = empty(memory, anchor_every > 0 ? Shape{T, B, H, N} : Shape{0});
  Tensor anchors = empty(memory, anchor_every > 0 ? Shape{anchors_count, B, D, padded_slots(N)} : Shape{0});
  Device(memory).run(NtmScan{
      T, B, N, D, R, W, shifts, dtype_of(memory), dtype_of(keys), read_first, eps, anchor_every, data(memory),
       data(weights), data(keys), data(sharpness), data(gates), data(shift), data(sharpening), data(erase), data(add),
       reads.mutable_data_ptr(), out_memory.mutable_data_ptr(), out_weights.mutable_data_ptr(),
       history.mutable_data_ptr(), anchors.mutable_data_ptr()});
  return {reads, out_memory, out_weights, history, anchors};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ntm_scan_backward(
    std::optional<Tensor> grad_reads, std::optional<Tensor> grad_memory, std::optional<Tensor> grad_weights,
    Tensor memory, Tensor weights, Tensor keys, Tensor sharpness, Tensor gates, Tensor shift, Tensor sharpening,
    Tensor erase, Tensor add, Tensor history, Tensor anchors, bool read_first, double eps, int64_t anchor_every) {
  const NtmShape shape(memory, weights, keys, shift, erase);
  const auto [T, B, N, D, H, W, R, shifts] =
      std::tie(shape.T, shape.B, shape.N, shape.D, shape.H, shape.W, shape.R, shape.shifts);
  STD_TORCH_CHECK(anchor_every > 0, "anchor_every must be positive");
  grad_reads = input(grad_reads, {T, B, R, D});
  grad_memory = input(grad_memory, {B, N, D});
  grad_weights = input(grad_weights, {B, H, N});
  shape.check(memory, weights, keys, sharpness, gates, shift, sharpening, erase, add);
  history = input(history, {T, B, H, N});
  anchors = input(anchors, {T > 0 ? (T - 1) / anchor_every : 0, B, D, padded_slots(N)});
  Tensor grad_in_memory = empty(memory, {B, N, D}), grad_in_weights = empty(memory, {B, H, N});
  Tensor grad_keys = empty(keys, {T, B, H, D}), grad_sharpness = empty(keys, {T, B, H}), grad_gates = empty(keys, {T, B, H});
  Tensor grad_shift = empty(keys, {T, B, H, shifts}), grad_sharpening = empty(keys, {T, B, H});
  Tensor grad_erase = empty(keys, {T, B, W, D}), grad_add = empty(keys, {T, B, W, D});
  Device(memory).run(NtmScanBackward{
      T, B, N, D, R, W, shifts, dtype_of(memory), dtype_of(keys), read_first, eps, anchor_every, data(grad_reads),
       data(grad_memory), data(grad_weights), data(memory), data(weights), data(keys), data(sharpness), data(gates),
       data(shift), data(sharpening), data(erase), data(add), data(history), data(anchors),
       grad_in_memory.mutable_data_ptr(), grad_in_weights.mutable_data_ptr(), grad_keys.mutable_data_ptr(),
       grad_sharpness.mutable_data_ptr(), grad_gates.mutable_data_ptr(), grad_shift.mutable_data_ptr(),
       grad_sharpening.mutable_data_ptr(), grad_erase.mutable_data_ptr(), grad_add.mutable_data_ptr()});
  return {grad_in_memory, grad_in_weights, grad_keys,  grad_sharpness, grad_gates,
          grad_shift,     grad_sharpening, grad_erase, grad_add};
}

}  // namespace
}  // namespace mann_fast

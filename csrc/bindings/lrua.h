// least_used, lrua_write and lrua_scan. Each op checks the shapes of its tensors, makes its results, and runs on a Device.
#pragma once
#include "tensors.h"

namespace mann_fast {
namespace {

template <class Device>
Tensor least_used(Tensor usage, int64_t n) {
  const int64_t B = usage.size(0), N = usage.size(1);
  STD_TORCH_CHECK(n >= 0 && n <= N, "n must be within [0, N]");
  usage = input(usage, {B, N});
  Tensor slots = empty_slots(usage, {B, n});
  Device(usage).run(LeastUsed{B, N, n, dtype_of(usage), data(usage), slots.mutable_data_ptr<int64_t>()});
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
  Device(memory).run(LruaWrite{B, N, D, R, dtype_of(memory), dtype_of(write_vector), shared_target, data(memory),
                               data(read_weights), data(usage), data(write_vector), data(gate_logit),
                               out_memory.mutable_data_ptr(), write_weights.mutable_data_ptr(),
                               slots.mutable_data_ptr<int64_t>()});
  return {out_memory, write_weights, slots};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> lrua_write_backward(std::optional<Tensor> grad_memory,
                                                               std::optional<Tensor> grad_write_weights, Tensor read_weights,
                                                               Tensor write_vector, Tensor gate_logit, Tensor slots,
                                                               bool shared_target) {
  const int64_t B = read_weights.size(0), R = read_weights.size(1), N = read_weights.size(2), D = write_vector.size(2);
  grad_memory = input(grad_memory, {B, N, D});
  grad_write_weights = input(grad_write_weights, {B, R, N});
  read_weights = input(read_weights, {B, R, N});
  write_vector = input(write_vector, {B, R, D});
  gate_logit = input(gate_logit, {B, R});
  slots = input(slots, {B, R});
  Tensor grad_in_memory = empty(read_weights, {B, N, D}), grad_read_weights = empty(read_weights, {B, R, N});
  Tensor grad_write_vector = empty(write_vector, {B, R, D}), grad_gate_logit = empty(write_vector, {B, R});
  Device(read_weights)
      .run(LruaWriteBackward{B, N, D, R, dtype_of(read_weights), dtype_of(write_vector), shared_target, data(grad_memory),
                             data(grad_write_weights), data(read_weights), data(write_vector), data(gate_logit),
                             slots.const_data_ptr<int64_t>(), grad_in_memory.mutable_data_ptr(),
                             grad_read_weights.mutable_data_ptr(), grad_write_vector.mutable_data_ptr(),
                             grad_gate_logit.mutable_data_ptr()});
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
    std::optional<Tensor> sharpness, std::optional<Tensor> resets, std::optional<Tensor> lengths, std::optional<Tensor> start,
    bool read_first, bool shared_target, double usage_decay, double eps, int64_t anchor_every) {
  const ScanShape shape(memory, read_weights, keys);
  const auto [T, B, N, D, R] = std::tie(shape.T, shape.B, shape.N, shape.D, shape.R);
  memory = input(memory, {B, N, D});
  read_weights = input(read_weights, {B, R, N});
  usage = input(usage, {B, N});
  keys = input(keys, shape.keys);
  write_vectors = input(write_vectors, shape.keys);
  gate_logits = input(gate_logits, shape.gates);
  sharpness = input(sharpness, shape.gates);
  const SequenceTensors sequences(resets, lengths, start, {shape.gates.begin(), shape.gates.end() - 1}, B, memory);
  Tensor reads = empty(keys, shape.keys), out_memory = empty(memory, {B, N, D});
  Tensor out_read_weights = empty(memory, {B, R, N}), out_usage = empty(memory, {B, N});
  Tensor slots = empty_slots(memory, anchor_every > 0 ? shape.gates : Shape{0});
  Tensor anchors = empty(memory, anchor_every > 0 ? anchors_shape(T, anchor_every, B, D + R, N) : Shape{0});
  Device(memory).run(LruaScan{T, B, N, D, R, dtype_of(memory), dtype_of(keys), read_first, shared_target, usage_decay, eps,
                              anchor_every, data(memory), data(read_weights), data(usage), data(keys), data(write_vectors),
                              data(gate_logits), data(sharpness), sequences.arguments(),
                              // results
                              reads.mutable_data_ptr(), out_memory.mutable_data_ptr(), out_read_weights.mutable_data_ptr(),
                              out_usage.mutable_data_ptr(), slots.mutable_data_ptr<int64_t>(), anchors.mutable_data_ptr()});
  return {reads, out_memory, out_read_weights, out_usage, slots, anchors};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lrua_scan_backward(
    std::optional<Tensor> grad_reads, std::optional<Tensor> grad_memory, std::optional<Tensor> grad_read_weights, Tensor memory,
    Tensor read_weights, Tensor keys, Tensor write_vectors, Tensor gate_logits, std::optional<Tensor> sharpness,
    std::optional<Tensor> resets, std::optional<Tensor> lengths, std::optional<Tensor> start, Tensor slots, Tensor anchors,
    bool read_first, bool shared_target, double eps, int64_t anchor_every) {
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
  const SequenceTensors sequences(resets, lengths, start, {shape.gates.begin(), shape.gates.end() - 1}, B, memory);
  slots = input(slots, shape.gates);
  anchors = input(anchors, anchors_shape(T, anchor_every, B, D + R, N));
  Tensor grad_in_memory = empty(memory, {B, N, D}), grad_in_read_weights = empty(memory, {B, R, N});
  Tensor grad_keys = empty(keys, shape.keys), grad_write_vectors = empty(keys, shape.keys);
  Tensor grad_gate_logits = empty(keys, shape.gates);
  Tensor grad_sharpness = empty(keys, sharpness ? shape.gates : Shape{0}), grad_start = sequences.gradient(memory);
  Device(memory).run(LruaScanBackward{
      T, B, N, D, R, dtype_of(memory), dtype_of(keys), read_first, shared_target, eps, anchor_every, data(grad_reads),
      data(grad_memory), data(grad_read_weights), data(memory), data(read_weights), data(keys), data(write_vectors),
      data(gate_logits), data(sharpness), sequences.arguments(), slots.const_data_ptr<int64_t>(), data(anchors),
      // results
      grad_in_memory.mutable_data_ptr(), grad_in_read_weights.mutable_data_ptr(), grad_keys.mutable_data_ptr(),
      grad_write_vectors.mutable_data_ptr(), grad_gate_logits.mutable_data_ptr(),
      sharpness ? grad_sharpness.mutable_data_ptr() : nullptr, start ? grad_start.mutable_data_ptr() : nullptr});
  return {grad_in_memory, grad_in_read_weights, grad_keys, grad_write_vectors, grad_gate_logits, grad_sharpness, grad_start};
}

}  // namespace
}  // namespace mann_fast

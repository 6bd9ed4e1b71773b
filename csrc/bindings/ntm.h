// ntm_scan. Each op checks the shapes of its tensors, makes its results, and runs on a Device.
#pragma once
#include "tensors.h"

namespace mann_fast {
namespace {

// Read heads first, then write heads.
struct NtmShape {
  int64_t T, B, N, D, heads, W, R, shifts;
  NtmShape(const Tensor& memory, const Tensor& weights, const Tensor& keys, const Tensor& shift, const Tensor& erase)
      : T(keys.size(0)), B(memory.size(0)), N(memory.size(1)), D(memory.size(2)), heads(weights.size(1)), W(erase.size(2)),
        R(heads - W), shifts(shift.size(3)) {
    STD_TORCH_CHECK(R >= 0 && shifts % 2 == 1, "there are more write heads than heads, or an even number of shifts");
  }
  // Makes each contiguous, of the shape that the kernel will index.
  void check(Tensor& memory, Tensor& weights, Tensor& keys, Tensor& sharpness, Tensor& gates, Tensor& shift, Tensor& sharpening,
             Tensor& erase, Tensor& add) const {
    memory = input(memory, {B, N, D});
    weights = input(weights, {B, heads, N});
    keys = input(keys, {T, B, heads, D});
    for (Tensor* per_head : {&sharpness, &gates, &sharpening}) *per_head = input(*per_head, {T, B, heads});
    shift = input(shift, {T, B, heads, shifts});
    for (Tensor* written : {&erase, &add}) *written = input(*written, {T, B, W, D});
  }
};

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ntm_scan(Tensor memory, Tensor weights, Tensor keys, Tensor sharpness,
                                                            Tensor gates, Tensor shift, Tensor sharpening, Tensor erase,
                                                            Tensor add, std::optional<Tensor> resets,
                                                            std::optional<Tensor> lengths, std::optional<Tensor> start,
                                                            bool read_first, double eps, int64_t anchor_every) {
  const NtmShape shape(memory, weights, keys, shift, erase);
  const auto [T, B, N, D, heads, W, R, shifts] =
      std::tie(shape.T, shape.B, shape.N, shape.D, shape.heads, shape.W, shape.R, shape.shifts);
  shape.check(memory, weights, keys, sharpness, gates, shift, sharpening, erase, add);
  const SequenceTensors sequences(resets, lengths, start, {T, B}, B, memory);
  Tensor reads = empty(keys, {T, B, R, D}), out_memory = empty(memory, {B, N, D}), out_weights = empty(memory, {B, heads, N});
  Tensor history = empty(memory, anchor_every > 0 ? Shape{T, B, heads, N} : Shape{0});
  Tensor anchors = empty(memory, anchor_every > 0 ? anchors_shape(T, anchor_every, B, D, N) : Shape{0});
  Device(memory).run(NtmScan{T, B, N, D, R, W, shifts, dtype_of(memory), dtype_of(keys), read_first, eps, anchor_every,
                             data(memory), data(weights), data(keys), data(sharpness), data(gates), data(shift),
                             data(sharpening), data(erase), data(add), sequences.arguments(),
                             // results
                             reads.mutable_data_ptr(), out_memory.mutable_data_ptr(), out_weights.mutable_data_ptr(),
                             history.mutable_data_ptr(), anchors.mutable_data_ptr()});
  return {reads, out_memory, out_weights, history, anchors};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ntm_scan_backward(
    std::optional<Tensor> grad_reads, std::optional<Tensor> grad_memory, std::optional<Tensor> grad_weights, Tensor memory,
    Tensor weights, Tensor keys, Tensor sharpness, Tensor gates, Tensor shift, Tensor sharpening, Tensor erase, Tensor add,
    std::optional<Tensor> resets, std::optional<Tensor> lengths, std::optional<Tensor> start, Tensor history, Tensor anchors,
    bool read_first, double eps, int64_t anchor_every) {
  const NtmShape shape(memory, weights, keys, shift, erase);
  const auto [T, B, N, D, heads, W, R, shifts] =
      std::tie(shape.T, shape.B, shape.N, shape.D, shape.heads, shape.W, shape.R, shape.shifts);
  STD_TORCH_CHECK(anchor_every > 0, "anchor_every must be positive");
  grad_reads = input(grad_reads, {T, B, R, D});
  grad_memory = input(grad_memory, {B, N, D});
  grad_weights = input(grad_weights, {B, heads, N});
  shape.check(memory, weights, keys, sharpness, gates, shift, sharpening, erase, add);
  const SequenceTensors sequences(resets, lengths, start, {T, B}, B, memory);
  history = input(history, {T, B, heads, N});
  anchors = input(anchors, anchors_shape(T, anchor_every, B, D, N));
  Tensor grad_in_memory = empty(memory, {B, N, D}), grad_in_weights = empty(memory, {B, heads, N});
  Tensor grad_keys = empty(keys, {T, B, heads, D}), grad_sharpness = empty(keys, {T, B, heads}),
         grad_gates = empty(keys, {T, B, heads});
  Tensor grad_shift = empty(keys, {T, B, heads, shifts}), grad_sharpening = empty(keys, {T, B, heads});
  Tensor grad_erase = empty(keys, {T, B, W, D}), grad_add = empty(keys, {T, B, W, D});
  Tensor grad_start = sequences.gradient(memory);
  Device(memory).run(NtmScanBackward{
      T, B, N, D, R, W, shifts, dtype_of(memory), dtype_of(keys), read_first, eps, anchor_every, data(grad_reads),
      data(grad_memory), data(grad_weights), data(memory), data(weights), data(keys), data(sharpness), data(gates), data(shift),
      data(sharpening), data(erase), data(add), sequences.arguments(), data(history), data(anchors),
      // results
      grad_in_memory.mutable_data_ptr(), grad_in_weights.mutable_data_ptr(), grad_keys.mutable_data_ptr(),
      grad_sharpness.mutable_data_ptr(), grad_gates.mutable_data_ptr(), grad_shift.mutable_data_ptr(),
      grad_sharpening.mutable_data_ptr(), grad_erase.mutable_data_ptr(), grad_add.mutable_data_ptr(),
      start ? grad_start.mutable_data_ptr() : nullptr});
  return {grad_in_memory, grad_in_weights, grad_keys,  grad_sharpness, grad_gates,
          grad_shift,     grad_sharpening, grad_erase, grad_add,       grad_start};
}

}  // namespace
}  // namespace mann_fast

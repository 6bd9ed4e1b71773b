// dnc_scan. Each op checks the shapes of its tensors, makes its results, and runs on a Device.
#pragma once
#include "tensors.h"

namespace mann_fast {
namespace {

using MaybeTensor = std::optional<Tensor>;

struct DncShape {
  int64_t T, B, N, D, R;
  bool links;
  DncShape(const Tensor& memory, const MaybeTensor& links, const Tensor& read_keys)
      : T(read_keys.size(0)), B(memory.size(0)), N(memory.size(1)), D(memory.size(2)), R(read_keys.size(2)),
        links(links.has_value()) {}

  // Makes each contiguous, of the shape that the kernel will index, in the order of DncState.
  DncState<const void*> state(Tensor& memory, Tensor& usage, MaybeTensor& precedence, MaybeTensor& links, Tensor& read_weights,
                              Tensor& write_weights) const {
    STD_TORCH_CHECK(precedence.has_value() == links.has_value(), "precedence and links go together");
    memory = input(memory, {B, N, D});
    usage = input(usage, {B, N});
    precedence = input(precedence, {B, N});
    links = input(links, {B, N, N});
    read_weights = input(read_weights, {B, R, N});
    write_weights = input(write_weights, {B, N});
    return {data(memory), data(usage), data(precedence), data(links), data(read_weights), data(write_weights)};
  }
  // The same of the interface, in the order of DncInterface.
  DncInterface<const void*> told(Tensor& read_keys, Tensor& read_sharpness, Tensor& write_key, Tensor& write_sharpness,
                                 Tensor& erase, Tensor& write_vector, Tensor& free_gates, Tensor& allocation_gate,
                                 Tensor& write_gate, MaybeTensor& read_modes, MaybeTensor& read_masks, MaybeTensor& write_mask,
                                 MaybeTensor& link_sharpening) const {
    STD_TORCH_CHECK(read_modes.has_value() == links, "read_modes and links go together");
    STD_TORCH_CHECK(read_masks.has_value() == write_mask.has_value(), "masks go together");
    STD_TORCH_CHECK(links || !link_sharpening, "there is no link_sharpening without links");
    read_keys = input(read_keys, {T, B, R, D});
    for (Tensor* per_head : {&read_sharpness, &free_gates}) *per_head = input(*per_head, {T, B, R});
    for (Tensor* vector : {&write_key, &erase, &write_vector}) *vector = input(*vector, {T, B, D});
    for (Tensor* one : {&write_sharpness, &allocation_gate, &write_gate}) *one = input(*one, {T, B});
    read_modes = input(read_modes, {T, B, R, 3});
    read_masks = input(read_masks, {T, B, R, D});
    write_mask = input(write_mask, {T, B, D});
    link_sharpening = input(link_sharpening, {T, B, R, 2});
    return {data(read_keys),    data(read_sharpness), data(write_key),       data(write_sharpness), data(erase),
            data(write_vector), data(free_gates),     data(allocation_gate), data(write_gate),      data(read_modes),
            data(read_masks),   data(write_mask),     data(link_sharpening)};
  }
};

// A tensor like another, or of shape [0] where there is none.
Tensor empty(const MaybeTensor& like, const Tensor& other) {
  if (!like) return empty(other, {0});
  Shape shape;
  for (int64_t i = 0; i < like->dim(); ++i) shape.push_back(like->size(i));
  return empty(*like, shape);
}
void* pointer(Tensor& tensor, bool there) { return there ? tensor.mutable_data_ptr() : nullptr; }

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dnc_scan(
    Tensor memory, Tensor usage, MaybeTensor precedence, MaybeTensor links, Tensor read_weights, Tensor write_weights,
    Tensor read_keys, Tensor read_sharpness, Tensor write_key, Tensor write_sharpness, Tensor erase, Tensor write_vector,
    Tensor free_gates, Tensor allocation_gate, Tensor write_gate, MaybeTensor read_modes, MaybeTensor read_masks,
    MaybeTensor write_mask, MaybeTensor link_sharpening, MaybeTensor resets, MaybeTensor lengths, MaybeTensor start,
    bool deallocate, double eps, int64_t anchor_every) {
  const DncShape shape(memory, links, read_keys);
  const auto [T, B, N, D, R] = std::tie(shape.T, shape.B, shape.N, shape.D, shape.R);
  const auto before = shape.state(memory, usage, precedence, links, read_weights, write_weights);
  const auto told = shape.told(read_keys, read_sharpness, write_key, write_sharpness, erase, write_vector, free_gates,
                               allocation_gate, write_gate, read_modes, read_masks, write_mask, link_sharpening);
  const SequenceTensors sequences(resets, lengths, start, {T, B}, B, memory);
  const bool keeps = anchor_every > 0, sharpened = link_sharpening.has_value();
  Tensor reads = empty(read_keys, {T, B, R, D});
  Tensor out_memory = empty(memory, {B, N, D}), out_usage = empty(memory, {B, N});
  Tensor out_precedence = empty(precedence, memory), out_links = empty(links, memory);
  Tensor out_read_weights = empty(memory, {B, R, N}), out_write_weights = empty(memory, {B, N});
  Tensor read_history = empty(memory, keeps ? Shape{T, B, R, N} : Shape{0});
  Tensor write_history = empty(memory, keeps ? Shape{T, B, N} : Shape{0});
  Tensor orders = empty_slots(memory, keeps ? Shape{T, B, N} : Shape{0});
  Tensor directions = empty(memory, keeps && sharpened ? Shape{T, B, R, 2, N} : Shape{0});
  Device(memory).run(DncScan{T, B, N, D, R, dtype_of(memory), dtype_of(read_keys), deallocate, eps, before, told,
                             sequences.arguments(), reads.mutable_data_ptr(),
                             DncState<void*>{out_memory.mutable_data_ptr(), out_usage.mutable_data_ptr(),
                                             pointer(out_precedence, shape.links), pointer(out_links, shape.links),
                                             out_read_weights.mutable_data_ptr(), out_write_weights.mutable_data_ptr()},
                             pointer(read_history, keeps), pointer(write_history, keeps),
                             static_cast<int64_t*>(pointer(orders, keeps)), pointer(directions, keeps && sharpened)});
  return {reads,        out_memory,    out_usage, out_precedence, out_links, out_read_weights, out_write_weights,
          read_history, write_history, orders,    directions};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
           Tensor, Tensor, Tensor, Tensor, Tensor>
dnc_scan_backward(MaybeTensor grad_reads, MaybeTensor grad_memory, MaybeTensor grad_usage, MaybeTensor grad_precedence,
                  MaybeTensor grad_links, MaybeTensor grad_read_weights, MaybeTensor grad_write_weights, Tensor memory,
                  Tensor usage, MaybeTensor precedence, MaybeTensor links, Tensor read_weights, Tensor write_weights,
                  Tensor read_keys, Tensor read_sharpness, Tensor write_key, Tensor write_sharpness, Tensor erase,
                  Tensor write_vector, Tensor free_gates, Tensor allocation_gate, Tensor write_gate, MaybeTensor read_modes,
                  MaybeTensor read_masks, MaybeTensor write_mask, MaybeTensor link_sharpening, MaybeTensor resets,
                  MaybeTensor lengths, MaybeTensor start, Tensor read_history, Tensor write_history, Tensor orders,
                  Tensor directions, bool deallocate, double eps, int64_t anchor_every) {
  const DncShape shape(memory, links, read_keys);
  const auto [T, B, N, D, R] = std::tie(shape.T, shape.B, shape.N, shape.D, shape.R);
  STD_TORCH_CHECK(anchor_every > 0, "anchor_every must be positive");
  grad_reads = input(grad_reads, {T, B, R, D});
  grad_memory = input(grad_memory, {B, N, D});
  for (MaybeTensor* row : {&grad_usage, &grad_precedence, &grad_write_weights}) *row = input(*row, {B, N});
  grad_links = input(grad_links, {B, N, N});
  grad_read_weights = input(grad_read_weights, {B, R, N});
  const auto before = shape.state(memory, usage, precedence, links, read_weights, write_weights);
  const auto told = shape.told(read_keys, read_sharpness, write_key, write_sharpness, erase, write_vector, free_gates,
                               allocation_gate, write_gate, read_modes, read_masks, write_mask, link_sharpening);
  const SequenceTensors sequences(resets, lengths, start, {T, B}, B, memory);
  const bool sharpened = link_sharpening.has_value(), masked = read_masks.has_value();
  read_history = input(read_history, {T, B, R, N});
  write_history = input(write_history, {T, B, N});
  orders = input(orders, {T, B, N});
  STD_TORCH_CHECK(orders.scalar_type() == ScalarType::Long, "orders must be int64");
  if (sharpened) directions = input(directions, {T, B, R, 2, N});
  Tensor grad_in_memory = empty(memory, {B, N, D}), grad_in_usage = empty(memory, {B, N});
  Tensor grad_in_precedence = empty(precedence, memory), grad_in_links = empty(links, memory);
  Tensor grad_in_read_weights = empty(memory, {B, R, N});
  Tensor grad_read_keys = empty(read_keys, {T, B, R, D}), grad_read_sharpness = empty(read_keys, {T, B, R});
  Tensor grad_write_key = empty(read_keys, {T, B, D}), grad_write_sharpness = empty(read_keys, {T, B});
  Tensor grad_erase = empty(read_keys, {T, B, D}), grad_write_vector = empty(read_keys, {T, B, D});
  Tensor grad_free_gates = empty(read_keys, {T, B, R});
  Tensor grad_allocation_gate = empty(read_keys, {T, B}), grad_write_gate = empty(read_keys, {T, B});
  Tensor grad_read_modes = empty(read_modes, read_keys), grad_read_masks = empty(read_masks, read_keys);
  Tensor grad_write_mask = empty(write_mask, read_keys), grad_link_sharpening = empty(link_sharpening, read_keys);
  Tensor grad_start = sequences.gradient(memory);
  Device(memory).run(DncScanBackward{
      T, B, N, D, R, dtype_of(memory), dtype_of(read_keys), deallocate, eps, data(grad_reads),
      DncState<const void*>{data(grad_memory), data(grad_usage), data(grad_precedence), data(grad_links),
                            data(grad_read_weights), data(grad_write_weights)},
      before, told, sequences.arguments(), data(read_history), data(write_history), orders.const_data_ptr<int64_t>(),
      sharpened ? data(directions) : nullptr,
      // results
      DncState<void*>{grad_in_memory.mutable_data_ptr(), grad_in_usage.mutable_data_ptr(),
                      pointer(grad_in_precedence, shape.links), pointer(grad_in_links, shape.links),
                      grad_in_read_weights.mutable_data_ptr(), nullptr},
      DncInterface<void*>{
          grad_read_keys.mutable_data_ptr(), grad_read_sharpness.mutable_data_ptr(), grad_write_key.mutable_data_ptr(),
          grad_write_sharpness.mutable_data_ptr(), grad_erase.mutable_data_ptr(), grad_write_vector.mutable_data_ptr(),
          grad_free_gates.mutable_data_ptr(), grad_allocation_gate.mutable_data_ptr(), grad_write_gate.mutable_data_ptr(),
          pointer(grad_read_modes, shape.links), pointer(grad_read_masks, masked), pointer(grad_write_mask, masked),
          pointer(grad_link_sharpening, sharpened)},
      pointer(grad_start, start.has_value())});
  return {grad_in_memory,       grad_in_usage,        grad_in_precedence,  grad_in_links,
          grad_in_read_weights, grad_read_keys,       grad_read_sharpness, grad_write_key,
          grad_write_sharpness, grad_erase,           grad_write_vector,   grad_free_gates,
          grad_allocation_gate, grad_write_gate,      grad_read_modes,     grad_read_masks,
          grad_write_mask,      grad_link_sharpening, grad_start};
}

}  // namespace
}  // namespace mann_fast

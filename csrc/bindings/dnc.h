// dnc_scan. Each op checks the shapes of its tensors, makes its results, and runs on a Device.
#pragma once
#include "tensors.h"

namespace mann_fast {
namespace {

struct DncShape {
  int64_t T, B, N, D, R;
  bool links;
  DncShape(int64_t T, const Tensor& memory, const MaybeTensor& links, int64_t R)
      : T(T), B(memory.size(0)), N(memory.size(1)), D(memory.size(2)), R(R), links(links.has_value()) {}

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
  // The same of gradients, each of which may be missing.
  DncState<const void*> gradients(MaybeTensor& memory, MaybeTensor& usage, MaybeTensor& precedence, MaybeTensor& links,
                                  MaybeTensor& read_weights, MaybeTensor& write_weights) const {
    memory = input(memory, {B, N, D});
    for (MaybeTensor* row : {&usage, &precedence, &write_weights}) *row = input(*row, {B, N});
    links = input(links, {B, N, N});
    read_weights = input(read_weights, {B, R, N});
    return {data(memory), data(usage), data(precedence), data(links), data(read_weights), data(write_weights)};
  }
  // The same of what was kept.
  DncHistory<const void*, const int64_t*> history(Tensor& read_history, Tensor& write_history, Tensor& orders,
                                                  Tensor& directions, bool sharpened) const {
    read_history = input(read_history, {T, B, R, N});
    write_history = input(write_history, {T, B, N});
    orders = input(orders, {T, B, N});
    STD_TORCH_CHECK(orders.scalar_type() == ScalarType::Long, "orders must be int64");
    if (sharpened) directions = input(directions, {T, B, R, 2, N});
    return {data(read_history), data(write_history), orders.const_data_ptr<int64_t>(), sharpened ? data(directions) : nullptr};
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

// A state that comes out, or the gradients of one.
struct DncStateTensors {
  bool linked;
  Tensor memory, usage, precedence, links, read_weights, write_weights;
  DncStateTensors(const DncShape& n, const Tensor& like)
      : linked(n.links), memory(empty(like, {n.B, n.N, n.D})), usage(empty(like, {n.B, n.N})),
        precedence(empty(like, linked ? Shape{n.B, n.N} : Shape{0})),
        links(empty(like, linked ? Shape{n.B, n.N, n.N} : Shape{0})), read_weights(empty(like, {n.B, n.R, n.N})),
        write_weights(empty(like, {n.B, n.N})) {}
  DncState<void*> arguments() {
    return {memory.mutable_data_ptr(), usage.mutable_data_ptr(),        pointer(precedence, linked),
            pointer(links, linked),    read_weights.mutable_data_ptr(), write_weights.mutable_data_ptr()};
  }
  DncState<void*> gradients() {  // the write weights that come in are a constant
    DncState<void*> of = arguments();
    of.write_weights = nullptr;
    return of;
  }
};

struct DncHistoryTensors {
  bool keeps, sharpened;
  Tensor read_history, write_history, orders, directions;
  DncHistoryTensors(const DncShape& n, const Tensor& like, bool keeps, bool sharpened)
      : keeps(keeps), sharpened(keeps && sharpened), read_history(empty(like, keeps ? Shape{n.T, n.B, n.R, n.N} : Shape{0})),
        write_history(empty(like, keeps ? Shape{n.T, n.B, n.N} : Shape{0})),
        orders(empty_slots(like, keeps ? Shape{n.T, n.B, n.N} : Shape{0})),
        directions(empty(like, this->sharpened ? Shape{n.T, n.B, n.R, 2, n.N} : Shape{0})) {}
  DncHistory<void*, int64_t*> arguments() {
    return {pointer(read_history, keeps), pointer(write_history, keeps), static_cast<int64_t*>(pointer(orders, keeps)),
            pointer(directions, sharpened)};
  }
};

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dnc_scan(
    Tensor memory, Tensor usage, MaybeTensor precedence, MaybeTensor links, Tensor read_weights, Tensor write_weights,
    Tensor read_keys, Tensor read_sharpness, Tensor write_key, Tensor write_sharpness, Tensor erase, Tensor write_vector,
    Tensor free_gates, Tensor allocation_gate, Tensor write_gate, MaybeTensor read_modes, MaybeTensor read_masks,
    MaybeTensor write_mask, MaybeTensor link_sharpening, MaybeTensor resets, MaybeTensor lengths, MaybeTensor start,
    bool deallocate, double eps, int64_t anchor_every) {
  const DncShape shape(read_keys.size(0), memory, links, read_keys.size(2));
  const auto [T, B, N, D, R] = std::tie(shape.T, shape.B, shape.N, shape.D, shape.R);
  const auto before = shape.state(memory, usage, precedence, links, read_weights, write_weights);
  const auto told = shape.told(read_keys, read_sharpness, write_key, write_sharpness, erase, write_vector, free_gates,
                               allocation_gate, write_gate, read_modes, read_masks, write_mask, link_sharpening);
  const SequenceTensors sequences(resets, lengths, start, {T, B}, B, memory);
  Tensor reads = empty(read_keys, {T, B, R, D});
  DncStateTensors after(shape, memory);
  DncHistoryTensors history(shape, memory, anchor_every > 0, link_sharpening.has_value());
  Device(memory).run(DncScan{history.arguments(), T, B, N, D, R, dtype_of(memory), dtype_of(read_keys), deallocate, eps, before,
                             told, sequences.arguments(), reads.mutable_data_ptr(), after.arguments()});
  return {reads,
          after.memory,
          after.usage,
          after.precedence,
          after.links,
          after.read_weights,
          after.write_weights,
          history.read_history,
          history.write_history,
          history.orders,
          history.directions};
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
  const DncShape shape(read_keys.size(0), memory, links, read_keys.size(2));
  const auto [T, B, N, D, R] = std::tie(shape.T, shape.B, shape.N, shape.D, shape.R);
  STD_TORCH_CHECK(anchor_every > 0, "anchor_every must be positive");
  grad_reads = input(grad_reads, {T, B, R, D});
  const auto grad_after =
      shape.gradients(grad_memory, grad_usage, grad_precedence, grad_links, grad_read_weights, grad_write_weights);
  const auto before = shape.state(memory, usage, precedence, links, read_weights, write_weights);
  const auto told = shape.told(read_keys, read_sharpness, write_key, write_sharpness, erase, write_vector, free_gates,
                               allocation_gate, write_gate, read_modes, read_masks, write_mask, link_sharpening);
  const SequenceTensors sequences(resets, lengths, start, {T, B}, B, memory);
  const bool sharpened = link_sharpening.has_value(), masked = read_masks.has_value();
  const auto history = shape.history(read_history, write_history, orders, directions, sharpened);
  DncStateTensors grad_before(shape, memory);
  Tensor grad_read_keys = empty(read_keys, {T, B, R, D}), grad_read_sharpness = empty(read_keys, {T, B, R});
  Tensor grad_write_key = empty(read_keys, {T, B, D}), grad_write_sharpness = empty(read_keys, {T, B});
  Tensor grad_erase = empty(read_keys, {T, B, D}), grad_write_vector = empty(read_keys, {T, B, D});
  Tensor grad_free_gates = empty(read_keys, {T, B, R});
  Tensor grad_allocation_gate = empty(read_keys, {T, B}), grad_write_gate = empty(read_keys, {T, B});
  Tensor grad_read_modes = empty(read_modes, read_keys), grad_read_masks = empty(read_masks, read_keys);
  Tensor grad_write_mask = empty(write_mask, read_keys), grad_link_sharpening = empty(link_sharpening, read_keys);
  Tensor grad_start = sequences.gradient(memory);
  Device(memory).run(DncScanBackward{
      history, T, B, N, D, R, dtype_of(memory), dtype_of(read_keys), deallocate, eps, data(grad_reads), grad_after, before,
      told, sequences.arguments(),
      // results
      grad_before.gradients(),
      DncInterface<void*>{
          grad_read_keys.mutable_data_ptr(), grad_read_sharpness.mutable_data_ptr(), grad_write_key.mutable_data_ptr(),
          grad_write_sharpness.mutable_data_ptr(), grad_erase.mutable_data_ptr(), grad_write_vector.mutable_data_ptr(),
          grad_free_gates.mutable_data_ptr(), grad_allocation_gate.mutable_data_ptr(), grad_write_gate.mutable_data_ptr(),
          pointer(grad_read_modes, shape.links), pointer(grad_read_masks, masked), pointer(grad_write_mask, masked),
          pointer(grad_link_sharpening, sharpened)},
      pointer(grad_start, start.has_value())});
  return {grad_before.memory,
          grad_before.usage,
          grad_before.precedence,
          grad_before.links,
          grad_before.read_weights,
          grad_read_keys,
          grad_read_sharpness,
          grad_write_key,
          grad_write_sharpness,
          grad_erase,
          grad_write_vector,
          grad_free_gates,
          grad_allocation_gate,
          grad_write_gate,
          grad_read_modes,
          grad_read_masks,
          grad_write_mask,
          grad_link_sharpening,
          grad_start};
}

}  // namespace
}  // namespace mann_fast

// sparse_read and sparse_scan. Each op checks the shapes of its tensors, makes its results, and runs on a Device.
#pragma once
#include "tensors.h"

namespace mann_fast {
namespace {

// int64, and contiguous.
Tensor integers(const Tensor& tensor, const Shape& shape) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Long, "slots, times and clocks must be int64");
  return input(tensor, shape);
}
int64_t* slots_of(const Tensor& tensor) { return tensor.mutable_data_ptr<int64_t>(); }

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> sparse_read(Tensor memory, Tensor key, std::optional<Tensor> sharpness,
                                                       int64_t num_slots, int64_t num_reads, double eps) {
  const int64_t B = memory.size(0), N = memory.size(1), D = memory.size(2), R = key.size(1), K = num_reads;
  STD_TORCH_CHECK(num_slots == N && K >= 1 && K <= N, "num_slots must be N, and num_reads within [1, N]");
  memory = input(memory, {B, N, D});
  key = input(key, {B, R, D});
  sharpness = input(sharpness, {B, R});
  Tensor read = empty(key, {B, R, D}), slots = empty_slots(memory, {B, R, K});
  Tensor weights = empty(memory, {B, R, K}), rows = empty(memory, {B, R, K, D});
  Device(memory).run(SparseRead{B, N, D, R, K, dtype_of(memory), dtype_of(key), eps, data(memory), data(key), data(sharpness),
                                // results
                                read.mutable_data_ptr(), slots_of(slots), weights.mutable_data_ptr(), rows.mutable_data_ptr()});
  return {read, slots, weights, rows};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> sparse_read_backward(std::optional<Tensor> grad_read, std::optional<Tensor> grad_weights,
                                                        Tensor key, std::optional<Tensor> sharpness, Tensor weights,
                                                        Tensor slots, Tensor rows, int64_t num_slots, int64_t num_reads,
                                                        double eps) {
  const int64_t B = key.size(0), R = key.size(1), D = key.size(2), N = num_slots, K = num_reads;
  grad_read = input(grad_read, {B, R, D});
  grad_weights = input(grad_weights, {B, R, K});
  key = input(key, {B, R, D});
  sharpness = input(sharpness, {B, R});
  weights = input(weights, {B, R, K});
  slots = integers(slots, {B, R, K});
  rows = input(rows, {B, R, K, D});
  Tensor grad_memory = empty(weights, {B, N, D}), grad_key = empty(key, {B, R, D});
  Tensor grad_sharpness = empty(key, sharpness ? Shape{B, R} : Shape{0});
  Device(key).run(SparseReadBackward{B, N, D, R, K, dtype_of(weights), dtype_of(key), eps, data(grad_read), data(grad_weights),
                                     data(key), data(sharpness), data(weights), slots.const_data_ptr<int64_t>(), data(rows),
                                     // results
                                     grad_memory.mutable_data_ptr(), grad_key.mutable_data_ptr(),
                                     sharpness ? grad_sharpness.mutable_data_ptr() : nullptr});
  return {grad_memory, grad_key, grad_sharpness};
}

// What a step is told, made contiguous.
struct SparseTold {
  Tensor keys, write_vectors, gate_logits;
  std::optional<Tensor> sharpness, write_gate_logits;
  SparseTold(const Shape& vectors, const Shape& gates, const Tensor& keys, const Tensor& write_vectors,
             const Tensor& gate_logits, const std::optional<Tensor>& sharpness, const std::optional<Tensor>& write_gate_logits)
      : keys(input(keys, vectors)), write_vectors(input(write_vectors, vectors)), gate_logits(input(gate_logits, gates)),
        sharpness(input(sharpness, gates)), write_gate_logits(input(write_gate_logits, gates)) {}
  SparseInputs<const void*> arguments() const {
    return {data(keys), data(write_vectors), data(gate_logits), data(sharpness), data(write_gate_logits)};
  }
};

// The state that comes in, made contiguous.
struct SparseStateTensors {
  int64_t B, N, D, R, K;
  Tensor memory, read_slots, read_weights, last_access, clock;
  SparseStateTensors(const Tensor& memory, const Tensor& read_slots, const Tensor& read_weights, const Tensor& last_access,
                     const Tensor& clock, int64_t num_slots)
      : B(memory.size(0)), N(memory.size(1)), D(memory.size(2)), R(read_slots.size(1)), K(read_slots.size(2)),
        memory(input(memory, {B, N, D})), read_slots(integers(read_slots, {B, R, K})),
        read_weights(input(read_weights, {B, R, K})), last_access(integers(last_access, {B, N})), clock(integers(clock, {B})) {
    STD_TORCH_CHECK(num_slots == N && R >= 1 && R <= N && K >= 1 && K <= N, "num_slots must be N, R and K within [1, N]");
  }
};

// The state that goes out, and what is kept of T steps.
struct SparseResultTensors {
  bool keeps;
  Tensor memory, read_slots, read_weights, last_access, clock, oldest, slot_history, weight_history, rows;
  SparseResultTensors(const SparseStateTensors& n, int64_t T, bool keeps)
      : keeps(keeps), memory(empty(n.memory, {n.B, n.N, n.D})), read_slots(empty_slots(n.memory, {n.B, n.R, n.K})),
        read_weights(empty(n.memory, {n.B, n.R, n.K})), last_access(empty_slots(n.memory, {n.B, n.N})),
        clock(empty_slots(n.memory, {n.B})), oldest(empty_slots(n.memory, keeps ? Shape{T, n.B, n.R} : Shape{0})),
        slot_history(empty_slots(n.memory, keeps ? Shape{T, n.B, n.R, n.K} : Shape{0})),
        weight_history(empty(n.memory, keeps ? Shape{T, n.B, n.R, n.K} : Shape{0})),
        rows(empty(n.memory, keeps ? Shape{T, n.B, n.R, n.K, n.D} : Shape{0})) {}
  SparseScan arguments(const SparseStateTensors& n, int64_t T, Dtype of_inputs, double threshold, double eps,
                       const SparseInputs<const void*>& told, const Sequences& sequences, void* reads) {
    return {T, n.B, n.N, n.D, n.R, n.K, dtype_of(n.memory), of_inputs, threshold, eps, data(n.memory),
            n.read_slots.const_data_ptr<int64_t>(), data(n.read_weights), n.last_access.const_data_ptr<int64_t>(),
            n.clock.const_data_ptr<int64_t>(), told, sequences,
            // results
            reads, memory.mutable_data_ptr(), slots_of(read_slots), read_weights.mutable_data_ptr(), slots_of(last_access),
            slots_of(clock), keeps ? slots_of(oldest) : nullptr, keeps ? slots_of(slot_history) : nullptr,
            pointer(weight_history, keeps), pointer(rows, keeps)};
  }
};

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sparse_scan(
    Tensor memory, Tensor read_slots, Tensor read_weights, Tensor last_access, Tensor clock, Tensor keys, Tensor write_vectors,
    Tensor gate_logits, std::optional<Tensor> sharpness, std::optional<Tensor> write_gate_logits, std::optional<Tensor> resets,
    std::optional<Tensor> lengths, std::optional<Tensor> start, int64_t num_slots, double threshold, double eps,
    int64_t anchor_every) {
  const SparseStateTensors n(memory, read_slots, read_weights, last_access, clock, num_slots);
  const int64_t T = keys.size(0);
  const SparseTold told({T, n.B, n.R, n.D}, {T, n.B, n.R}, keys, write_vectors, gate_logits, sharpness, write_gate_logits);
  const SequenceTensors sequences(resets, lengths, start, {T, n.B}, n.B, memory);
  SparseResultTensors after(n, T, anchor_every > 0);
  Tensor reads = empty(keys, {T, n.B, n.R, n.D});
  Device(memory).run(
      after.arguments(n, T, dtype_of(keys), threshold, eps, told.arguments(), sequences.arguments(), reads.mutable_data_ptr()));
  return {reads,       after.memory, after.read_slots,   after.read_weights,   after.last_access,
          after.clock, after.oldest, after.slot_history, after.weight_history, after.rows};
}

// What comes into backward of the memory, and its gradients: grad_told goes to what the steps were told, where that is known.
struct SparseBackwardTensors {
  int64_t T, B, N, D, R, K;
  MaybeTensor grad_memory, grad_read_weights;
  Tensor read_slots, read_weights, oldest, slot_history, weight_history, rows, grad_in_memory, grad_in_read_weights;
  SparseBackwardTensors(const MaybeTensor& grad_memory, const MaybeTensor& grad_read_weights, const Tensor& read_slots,
                        const Tensor& read_weights, const Tensor& oldest, const Tensor& slot_history,
                        const Tensor& weight_history, const Tensor& rows, int64_t num_slots)
      : T(rows.size(0)), B(rows.size(1)), N(num_slots), D(rows.size(4)), R(rows.size(2)), K(rows.size(3)),
        grad_memory(input(grad_memory, {B, N, D})), grad_read_weights(input(grad_read_weights, {B, R, K})),
        read_slots(integers(read_slots, {B, R, K})), read_weights(input(read_weights, {B, R, K})),
        oldest(integers(oldest, {T, B, R})), slot_history(integers(slot_history, {T, B, R, K})),
        weight_history(input(weight_history, {T, B, R, K})), rows(input(rows, {T, B, R, K, D})),
        grad_in_memory(empty(rows, {B, N, D})), grad_in_read_weights(empty(rows, {B, R, K})) {}
  SparseScanBackward arguments(Dtype of_inputs, double eps, const void* grad_reads, const SparseInputs<const void*>& told,
                               const Sequences& sequences, const SparseInputs<void*>& grad_told, void* grad_start) {
    return {T, B, N, D, R, K, dtype_of(rows), of_inputs, eps, grad_reads, data(grad_memory), data(grad_read_weights),
            read_slots.const_data_ptr<int64_t>(), data(read_weights), told, sequences, oldest.const_data_ptr<int64_t>(),
            slot_history.const_data_ptr<int64_t>(), data(weight_history), data(rows),
            // results
            grad_in_memory.mutable_data_ptr(), grad_in_read_weights.mutable_data_ptr(), grad_told, grad_start};
  }
};

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sparse_scan_backward(
    std::optional<Tensor> grad_reads, std::optional<Tensor> grad_memory, std::optional<Tensor> grad_read_weights,
    Tensor read_slots, Tensor read_weights, Tensor keys, Tensor write_vectors, Tensor gate_logits,
    std::optional<Tensor> sharpness, std::optional<Tensor> write_gate_logits, std::optional<Tensor> resets,
    std::optional<Tensor> lengths, std::optional<Tensor> start, Tensor oldest, Tensor slot_history, Tensor weight_history,
    Tensor rows, int64_t num_slots, double eps, int64_t anchor_every) {
  STD_TORCH_CHECK(anchor_every > 0, "anchor_every must be positive");
  SparseBackwardTensors n(grad_memory, grad_read_weights, read_slots, read_weights, oldest, slot_history, weight_history, rows,
                          num_slots);
  const Shape vectors = {n.T, n.B, n.R, n.D}, gates = {n.T, n.B, n.R};
  grad_reads = input(grad_reads, vectors);
  const SparseTold told(vectors, gates, keys, write_vectors, gate_logits, sharpness, write_gate_logits);
  const SequenceTensors sequences(resets, lengths, start, {n.T, n.B}, n.B, n.grad_in_memory);
  Tensor grad_keys = empty(keys, vectors), grad_write_vectors = empty(keys, vectors), grad_gate_logits = empty(keys, gates);
  Tensor grad_sharpness = empty(keys, sharpness ? gates : Shape{0});
  Tensor grad_write_gate_logits = empty(keys, write_gate_logits ? gates : Shape{0});
  Tensor grad_start = sequences.gradient(n.grad_in_memory);
  const SparseInputs<void*> grad_told = {grad_keys.mutable_data_ptr(), grad_write_vectors.mutable_data_ptr(),
                                         grad_gate_logits.mutable_data_ptr(), pointer(grad_sharpness, sharpness.has_value()),
                                         pointer(grad_write_gate_logits, write_gate_logits.has_value())};
  Device(keys).run(n.arguments(dtype_of(keys), eps, data(grad_reads), told.arguments(), sequences.arguments(), grad_told,
                               pointer(grad_start, start.has_value())));
  return {n.grad_in_memory, n.grad_in_read_weights, grad_keys, grad_write_vectors, grad_gate_logits,
          grad_sharpness,   grad_write_gate_logits, grad_start};
}

// What the steps of a sequence hand on beside the state: for sparse_step_, which fills it in the first of them.
template <class Device>
Tensor sparse_lists(Tensor memory) {
  const int64_t B = memory.size(0), count = lists_size(memory.size(1));
  Tensor lists = empty_slots(memory, {B, count});
  for (int64_t b = 0; b < B; ++b) slots_of(lists)[b * count] = unmade;
  return lists;
}

// One step that changes memory and last_access where they are; for mann_fast/layers/sparse_steps.py, which owns them.
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sparse_step_(
    Tensor memory, Tensor read_slots, Tensor read_weights, Tensor last_access, Tensor clock, Tensor key, Tensor write_vector,
    Tensor gate_logit, Tensor sharpness, Tensor write_gate_logit, std::optional<Tensor> resets, std::optional<Tensor> lengths,
    std::optional<Tensor> start, std::optional<Tensor> lists, std::optional<Tensor> candidates, double threshold, double eps) {
  const int64_t B = memory.size(0), N = memory.size(1), D = memory.size(2), R = read_slots.size(1), K = read_slots.size(2);
  STD_TORCH_CHECK(!lists || lists->is_contiguous(), "what steps hand on must be contiguous");
  if (lists) lists = integers(*lists, {B, lists_size(N)});
  STD_TORCH_CHECK(!candidates || lists, "candidates are of a step of several, which have lists");
  const int64_t num_candidates = candidates ? candidates->size(1) : 0;
  if (candidates) candidates = integers(*candidates, {B, num_candidates});
  STD_TORCH_CHECK(R >= 1 && R <= N && K >= 1 && K <= N, "R and K must be within [1, N]");
  STD_TORCH_CHECK(memory.is_contiguous() && last_access.is_contiguous(), "memory and last_access must be contiguous");
  memory = input(memory, {B, N, D});
  read_slots = integers(read_slots, {B, R, K});
  read_weights = input(read_weights, {B, R, K});
  last_access = integers(last_access, {B, N});
  clock = integers(clock, {B});
  const SparseTold told({B, R, D}, {B, R}, key, write_vector, gate_logit, sharpness, write_gate_logit);
  const SequenceTensors sequences(resets, lengths, start, {B}, B, memory);
  Tensor read = empty(key, {B, R, D}), out_read_slots = empty_slots(memory, {B, R, K}), out_clock = empty_slots(memory, {B});
  Tensor out_read_weights = empty(memory, {B, R, K}), oldest = empty_slots(memory, {B, R});
  Tensor slots = empty_slots(memory, {B, R, K}), weights = empty(memory, {B, R, K}), rows = empty(memory, {B, R, K, D});
  Device(memory).run(SparseScan{
      1, B, N, D, R, K, dtype_of(memory), dtype_of(key), threshold, eps, data(memory), read_slots.const_data_ptr<int64_t>(),
      data(read_weights), slots_of(last_access), clock.const_data_ptr<int64_t>(), told.arguments(), sequences.arguments(),
      // results
      read.mutable_data_ptr(), memory.mutable_data_ptr(), slots_of(out_read_slots), out_read_weights.mutable_data_ptr(),
      slots_of(last_access), slots_of(out_clock), slots_of(oldest), slots_of(slots), weights.mutable_data_ptr(),
      rows.mutable_data_ptr(), lists ? slots_of(*lists) : nullptr, candidates ? candidates->const_data_ptr<int64_t>() : nullptr,
      num_candidates});
  return {read, out_read_slots, out_read_weights, out_clock, oldest, rows};
}

// Back through it, the gradient of the memory changed where it is. That of the start [B, N, D] is made where it is wanted.
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sparse_step_backward_(
    std::optional<Tensor> grad_read, Tensor grad_memory, std::optional<Tensor> grad_weights, Tensor slots_before,
    Tensor weights_before, Tensor key, Tensor write_vector, Tensor gate_logit, Tensor sharpness, Tensor write_gate_logit,
    std::optional<Tensor> resets, std::optional<Tensor> lengths, std::optional<Tensor> start, Tensor oldest, Tensor slots,
    Tensor weights, Tensor rows, double eps, bool of_start) {
  const int64_t B = grad_memory.size(0), N = grad_memory.size(1), D = grad_memory.size(2), R = slots.size(1), K = slots.size(2);
  STD_TORCH_CHECK(grad_memory.is_contiguous(), "grad_memory must be contiguous");
  const Shape vectors = {B, R, D}, gates = {B, R}, reads = {B, R, K};
  grad_read = input(grad_read, vectors);
  grad_weights = input(grad_weights, reads);
  slots_before = integers(slots_before, reads);
  weights_before = input(weights_before, reads);
  const SparseTold told(vectors, gates, key, write_vector, gate_logit, sharpness, write_gate_logit);
  const SequenceTensors sequences(resets, lengths, start, {B}, B, grad_memory);
  oldest = integers(oldest, gates);
  slots = integers(slots, reads);
  weights = input(weights, reads);
  rows = input(rows, {B, R, K, D});
  Tensor grad_before = empty(weights, reads), grad_key = empty(key, vectors), grad_vector = empty(key, vectors);
  Tensor grad_gate = empty(key, gates), grad_sharpness = empty(key, gates), grad_write_gate = empty(key, gates);
  Tensor grad_start = start && of_start ? sequences.gradient(grad_memory) : empty(grad_memory, {0});
  Device(key).run(SparseScanBackward{
      1, B, N, D, R, K, dtype_of(weights), dtype_of(key), eps, data(grad_read), data(grad_memory), data(grad_weights),
      slots_before.const_data_ptr<int64_t>(), data(weights_before), told.arguments(), sequences.arguments(),
      oldest.const_data_ptr<int64_t>(), slots.const_data_ptr<int64_t>(), data(weights), data(rows),
      // results
      grad_memory.mutable_data_ptr(), grad_before.mutable_data_ptr(),
      SparseInputs<void*>{grad_key.mutable_data_ptr(), grad_vector.mutable_data_ptr(), grad_gate.mutable_data_ptr(),
                          grad_sharpness.mutable_data_ptr(), grad_write_gate.mutable_data_ptr()},
      pointer(grad_start, start && of_start)});
  return {grad_before, grad_key, grad_vector, grad_gate, grad_sharpness, grad_write_gate, grad_start};
}

}  // namespace
}  // namespace mann_fast

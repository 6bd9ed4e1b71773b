// content_read, and of LRUA the write and the scan.
#pragma once
#include "arrays.h"

namespace {

Results content(const Kernels& k, const Case& c) {
  Random random;
  const Parallel parallel = on_threads(c.threads);
  const Array memory = random.normal(c.state, c.B * c.N * c.D), key = random.normal(c.input, c.B * c.R * c.D);
  const auto sharpness = optional(c.sharp, random.positive(c.input, c.B * c.R));
  Array read(c.input, c.B * c.R * c.D), weights(c.state, c.B * c.R * c.N);
  succeeded(k.content_read({c.B, c.N, c.D, c.R, c.state, c.input, 1e-6, pointer(memory), pointer(key), pointer(sharpness),
                            read.data.get(), weights.data.get()},
                           parallel));
  for (int64_t row = 0; row < c.B * c.R; ++row) {
    double total = 0;
    for (int64_t i = 0; i < c.N; ++i) total += weights[row * c.N + i];
    if (!(std::abs(total - 1) < 1e-4)) fail("content_read: weights do not add up to 1");
  }
  Results results;
  for (const bool of_read : {true, false}) {  // each gradient may be missing
    const auto grad_read = optional(of_read, random.normal(c.input, c.B * c.R * c.D));
    const auto grad_weights = optional(!of_read || c.shared_target, random.normal(c.state, c.B * c.R * c.N));
    Array grad_memory(c.state, memory.count), grad_key(c.input, key.count), grad_sharpness(c.input, c.sharp ? c.B * c.R : 0);
    succeeded(
        k.content_read_backward({c.B, c.N, c.D, c.R, c.state, c.input, 1e-6, pointer(grad_read), pointer(grad_weights),
                                 pointer(memory), pointer(key), pointer(sharpness), pointer(weights), grad_memory.data.get(),
                                 grad_key.data.get(), c.sharp ? grad_sharpness.data.get() : nullptr},
                                parallel));
    results.push_back(std::move(grad_memory));
    results.push_back(std::move(grad_key));
    results.push_back(std::move(grad_sharpness));
  }
  results.push_back(std::move(read));
  results.push_back(std::move(weights));
  return results;
}

Results write(const Kernels& k, const Case& c) {
  Random random;
  const Parallel parallel = on_threads(c.threads);
  const Array memory = random.normal(c.state, c.B * c.N * c.D), read_weights = random.positive(c.state, c.B * c.R * c.N);
  const Array usage = random.positive(c.state, c.B * c.N), vectors = random.normal(c.input, c.B * c.R * c.D);
  const Array gates = random.normal(c.input, c.B * c.R);
  for (const int64_t n : {int64_t(0), c.R, c.N}) {
    std::vector<int64_t> slots(c.B * n, -1);
    succeeded(k.least_used({c.B, c.N, n, c.state, pointer(usage), slots.data()}, parallel));
    check_slots(slots, c.B, n, c.N);
  }
  std::vector<int64_t> slots(c.B * c.R, -1);
  Array out_memory(c.state, memory.count), write_weights(c.state, read_weights.count);
  succeeded(k.lrua_write(
      {c.B, c.N, c.D, c.R, c.state, c.input, c.shared_target, pointer(memory), pointer(read_weights), pointer(usage),
       pointer(vectors), pointer(gates), out_memory.data.get(), write_weights.data.get(), slots.data()},
      parallel));
  check_slots(slots, c.B, c.R, c.N);
  Results results;
  for (const bool of_memory : {true, false}) {
    const auto grad_memory = optional(of_memory, random.normal(c.state, memory.count));
    const auto grad_weights = optional(!of_memory || c.sharp, random.normal(c.state, read_weights.count));
    Array grad_in_memory(c.state, memory.count), grad_read_weights(c.state, read_weights.count);
    Array grad_vectors(c.input, vectors.count), grad_gates(c.input, gates.count);
    succeeded(k.lrua_write_backward(
        {c.B, c.N, c.D, c.R, c.state, c.input, c.shared_target, pointer(grad_memory), pointer(grad_weights),
         pointer(read_weights), pointer(vectors), pointer(gates), slots.data(), grad_in_memory.data.get(),
         grad_read_weights.data.get(), grad_vectors.data.get(), grad_gates.data.get()},
        parallel));
    for (Array* array : {&grad_in_memory, &grad_read_weights, &grad_vectors, &grad_gates}) results.push_back(std::move(*array));
  }
  results.push_back(std::move(out_memory));
  results.push_back(std::move(write_weights));
  return results;
}

Results scan(const Kernels& k, const Case& c) {
  Random random;
  const Parallel parallel = on_threads(c.threads);
  const int64_t vectors_count = c.T * c.B * c.R * c.D, gates_count = c.T * c.B * c.R;
  const Array memory = random.normal(c.state, c.B * c.N * c.D), usage = random.positive(c.state, c.B * c.N);
  Array read_weights = random.positive(c.state, c.B * c.R * c.N);
  for (int64_t i = 0; i < read_weights.count; ++i) read_weights.set(i, read_weights[i] / static_cast<double>(c.N));
  Array keys = random.normal(c.input, vectors_count), vectors = random.normal(c.input, vectors_count);
  Array gates = random.normal(c.input, gates_count);
  const auto sharpness = optional(c.sharp, random.positive(c.input, gates_count));
  // So large that an exponential needs the maximum similarity taken off; with an eps that keeps the cosines so small that
  // the softmax does not saturate, since nothing is left of its gradients then.
  const bool large = sharpness && c.shared_target;
  const double eps = large ? 1e4 : 1e-6;
  for (int64_t i = 0; large && i < gates_count; ++i) sharpness->set(i, 60 * (*sharpness)[i]);
  const Cuts cuts(c, random);
  for (Array* array : {&keys, &vectors, &gates, sharpness.get()})
    if (array) cuts.spoil(c, *array);
  Array anchors(c.state, anchors_count(c.T, c.anchor_every) * c.B * (c.D + c.R) * padded_slots(c.N));
  std::vector<int64_t> slots(c.anchor_every > 0 ? gates_count : 0, -1);
  Array reads(c.input, vectors_count), out_memory(c.state, memory.count), out_weights(c.state, read_weights.count);
  Array out_usage(c.state, usage.count);
  succeeded(k.lrua_scan(
      {c.T, c.B, c.N, c.D, c.R, c.state, c.input, c.read_first, c.shared_target, 0.95, eps, c.anchor_every, pointer(memory),
       pointer(read_weights), pointer(usage), pointer(keys), pointer(vectors), pointer(gates), pointer(sharpness),
       cuts.sequences(),
       // results
       reads.data.get(), out_memory.data.get(), out_weights.data.get(), out_usage.data.get(), slots.data(), anchors.data.get()},
      parallel));
  Results results;
  if (c.anchor_every > 0) {
    cuts.check_slots(c, slots);
    for (const int present : {0b001, 0b110, 0b111}) {  // each of the three gradients may be missing
      const auto grad_reads = optional(present & 1, random.normal(c.input, vectors_count));
      const auto grad_memory = optional(present & 2, random.normal(c.state, memory.count));
      const auto grad_weights = optional(present & 4, random.normal(c.state, read_weights.count));
      Array grad_in_memory(c.state, memory.count), grad_in_weights(c.state, read_weights.count);
      Array grad_keys(c.input, vectors_count), grad_vectors(c.input, vectors_count), grad_gates(c.input, gates_count);
      Array grad_sharpness(c.input, c.sharp ? gates_count : 0), grad_start = cuts.of_start(c);
      succeeded(k.lrua_scan_backward(
          {c.T, c.B, c.N, c.D, c.R, c.state, c.input, c.read_first, c.shared_target, eps, c.anchor_every, pointer(grad_reads),
           pointer(grad_memory), pointer(grad_weights), pointer(memory), pointer(read_weights), pointer(keys), pointer(vectors),
           pointer(gates), pointer(sharpness), cuts.sequences(), slots.data(), anchors.data.get(),
           // results
           grad_in_memory.data.get(), grad_in_weights.data.get(), grad_keys.data.get(), grad_vectors.data.get(),
           grad_gates.data.get(), c.sharp ? grad_sharpness.data.get() : nullptr, c.cut ? grad_start.data.get() : nullptr},
          parallel));
      for (Array* array :
           {&grad_in_memory, &grad_in_weights, &grad_keys, &grad_vectors, &grad_gates, &grad_sharpness, &grad_start})
        results.push_back(std::move(*array));
    }
  }
  for (Array* array : {&reads, &out_memory, &out_weights, &out_usage}) results.push_back(std::move(*array));
  return results;
}

}  // namespace

// A Neural Turing Machine: its scan and its whole sequence.
#pragma once
#include "cell.h"

namespace {

// sharp stands for heads with a location, of 2 S + 1 = 3 moves.
Results ntm_cell(const Kernels& k, const Case& c, Controller controller, bool bfloat16) {
  Random random;
  const Parallel parallel = on_threads(c.threads);
  const int64_t shifts = c.sharp ? 3 : 0, RD = c.R * c.D;
  NetworkArrays n(c, random, controller, bfloat16, 2 * (RD + c.R * (c.sharp ? 3 + shifts : 1)) + 2 * RD);
  const Array memory = n.normal(c.B * c.N * c.D);
  Array weights = random.positive(c.state, c.B * 2 * c.R * c.N);
  for (int64_t i = 0; i < weights.count; ++i) weights.set(i, weights[i] / static_cast<double>(c.N));
  Array anchors(c.state, anchors_count(c.T, c.anchor_every) * c.B * c.D * padded_slots(c.N));
  Array history(c.state, n.rows * 2 * c.R * c.N), out_memory(c.state, memory.count), out_weights(c.state, weights.count);
  succeeded(k.ntm_cell({n.arguments(), shifts, c.read_first, 1e-6, pointer(memory), pointer(weights),
                        // results
                        out_memory.data.get(), out_weights.data.get(), history.data.get(), anchors.data.get()},
                       parallel));
  Results results;
  n.backward(results, [&](const NetworkBackward& network, int present) {
    const auto grad_memory = optional(present & 4, n.normal(memory.count));
    const auto grad_weights = optional(present & 8, n.normal(weights.count));
    Array grad_in_memory(c.state, memory.count), grad_in_weights(c.state, weights.count);
    succeeded(k.ntm_cell_backward({network, shifts, c.read_first, 1e-6, pointer(grad_memory), pointer(grad_weights),
                                   pointer(memory), pointer(weights), pointer(history), pointer(anchors),
                                   // results
                                   grad_in_memory.data.get(), grad_in_weights.data.get()},
                                  parallel));
    for (Array* array : {&grad_in_memory, &grad_in_weights}) results.push_back(std::move(*array));
  });
  n.take(results);
  for (Array* array : {&out_memory, &out_weights}) results.push_back(std::move(*array));
  return results;
}

// R heads that read and one less that write, or one where there are many slots; 2 S + 1 = 3 moves.
Results ntm(const Kernels& k, const Case& c) {
  Random random;
  const Parallel parallel = on_threads(c.threads);
  const int64_t W = c.N > 100 ? 1 : c.R - 1, heads = c.R + W, shifts = 3, rows = c.T * c.B;
  const Array memory = random.normal(c.state, c.B * c.N * c.D);
  Array weights = random.positive(c.state, c.B * heads * c.N);
  for (int64_t i = 0; i < weights.count; ++i) weights.set(i, weights[i] / static_cast<double>(c.N));
  Array keys = random.normal(c.input, rows * heads * c.D);
  Array sharpness = random.positive(c.input, rows * heads);
  for (int64_t i = 0; c.sharp && i < sharpness.count; ++i) sharpness.set(i, 60 * sharpness[i]);  // some beyond the bound of exp
  Array gates = random.positive(c.input, rows * heads), shift = random.positive(c.input, rows * heads * shifts);
  Array sharpening = random.positive(c.input, rows * heads);
  for (int64_t i = 0; i < sharpening.count; ++i) sharpening.set(i, 1 + 3 * sharpening[i]);
  Array erase = random.positive(c.input, rows * W * c.D), add = random.normal(c.input, rows * W * c.D);
  const Cuts cuts(c, random);
  for (Array* array : {&keys, &sharpness, &gates, &shift, &sharpening, &erase, &add}) cuts.spoil(c, *array);
  const int64_t kept = c.anchor_every > 0 ? rows : 0;
  Array reads(c.input, rows * c.R * c.D), out_memory(c.state, memory.count), out_weights(c.state, weights.count);
  Array history(c.state, kept * heads * c.N),
      anchors(c.state, anchors_count(c.T, c.anchor_every) * c.B * c.D * padded_slots(c.N));
  succeeded(
      k.ntm_scan({c.T, c.B, c.N, c.D, c.R, W, shifts, c.state, c.input, c.read_first, 1e-6, c.anchor_every, pointer(memory),
                  pointer(weights), pointer(keys), pointer(sharpness), pointer(gates), pointer(shift), pointer(sharpening),
                  pointer(erase), pointer(add), cuts.sequences(),
                  // results
                  reads.data.get(), out_memory.data.get(), out_weights.data.get(), history.data.get(), anchors.data.get()},
                 parallel));
  Results results;
  for (const int present : {0b001, 0b110}) {  // each of the three gradients may be missing
    if (c.anchor_every == 0) continue;
    const auto grad_reads = optional(present & 1, random.normal(c.input, reads.count));
    const auto grad_memory = optional(present & 2, random.normal(c.state, memory.count));
    const auto grad_weights = optional(present & 4, random.normal(c.state, weights.count));
    Array grad_in_memory(c.state, memory.count), grad_in_weights(c.state, weights.count), grad_keys(c.input, keys.count);
    Array grad_sharpness(c.input, rows * heads), grad_gates(c.input, rows * heads), grad_shift(c.input, shift.count);
    Array grad_sharpening(c.input, rows * heads), grad_erase(c.input, erase.count), grad_add(c.input, add.count);
    Array grad_start = cuts.of_start(c);
    succeeded(k.ntm_scan_backward(
        {c.T, c.B, c.N, c.D, c.R, W, shifts, c.state, c.input, c.read_first, 1e-6, c.anchor_every, pointer(grad_reads),
         pointer(grad_memory), pointer(grad_weights), pointer(memory), pointer(weights), pointer(keys), pointer(sharpness),
         pointer(gates), pointer(shift), pointer(sharpening), pointer(erase), pointer(add), cuts.sequences(), pointer(history),
         pointer(anchors),
         // results
         grad_in_memory.data.get(), grad_in_weights.data.get(), grad_keys.data.get(), grad_sharpness.data.get(),
         grad_gates.data.get(), grad_shift.data.get(), grad_sharpening.data.get(), grad_erase.data.get(), grad_add.data.get(),
         c.cut ? grad_start.data.get() : nullptr},
        parallel));
    for (Array* array : {&grad_in_memory, &grad_in_weights, &grad_keys, &grad_sharpness, &grad_gates, &grad_shift,
                         &grad_sharpening, &grad_erase, &grad_add, &grad_start})
      results.push_back(std::move(*array));
  }
  for (Array* array : {&reads, &out_memory, &out_weights}) results.push_back(std::move(*array));
  return results;
}

}  // namespace

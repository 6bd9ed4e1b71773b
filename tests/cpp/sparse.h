// Sparse access.
#pragma once
#include "cell.h"

namespace {

// sparse_read and sparse_scan, with sharpness and write gates or without (c.sharp); shared_target: of a memory whose rows are
// alike but for the first few, and with both gradients of a read.
[[maybe_unused]] Results sparse(const Kernels& k, const Case& c) {
  Random random;
  const Parallel parallel = on_threads(c.threads);
  const int64_t K = std::min<int64_t>(c.N, 3), rows = c.T * c.B * c.R, heads = c.B * c.R;
  const Array memory = random.normal(c.state, c.B * c.N * c.D), weights = random.positive(c.state, heads * K);
  const int64_t row = c.D * size_of(c.state), alike = c.shared_target && c.N > 9 ? 9 : c.N;
  for (int64_t i = 0; i < c.B * c.N; ++i)
    if (i % c.N > alike) std::memcpy(memory.data.get() + i * row, memory.data.get() + (i - 1) * row, row);
  Array keys = random.normal(c.input, rows * c.D), vectors = random.normal(c.input, rows * c.D);
  Array gates = random.normal(c.input, rows);
  auto sharpness = optional(c.sharp, random.positive(c.input, rows)), open = optional(c.sharp, random.normal(c.input, rows));
  const Cuts cuts(c, random);
  for (Array* array : {&keys, &vectors, &gates, sharpness.get(), open.get()})
    if (array) cuts.spoil(c, *array);
  std::vector<int64_t> slots(heads * K), times(c.B * c.N), clock(c.B, 3);
  for (int64_t j = 0; j < heads * K; ++j) slots[j] = (j % K + j / K) % c.N;
  for (int64_t j = 0; j < c.B * c.N; ++j) times[j] = j * 7 % 5 - 1;
  std::vector<int64_t> out_slots(heads * K), out_times(c.B * c.N), out_clock(c.B);
  const bool keeps = c.anchor_every > 0;
  std::vector<int64_t> oldest(keeps ? rows : 0), history(keeps ? rows * K : 0);
  Array weight_history(c.state, keeps ? rows * K : 0), kept(c.state, keeps ? rows * K * c.D : 0);
  Array reads(c.input, rows * c.D), out_memory(c.state, memory.count), out_weights(c.state, weights.count);
  const SparseInputs<const void*> told = {pointer(keys), pointer(vectors), pointer(gates), pointer(sharpness), pointer(open)};
  succeeded(k.sparse_scan({c.T, c.B, c.N, c.D, c.R, K, c.state, c.input, 0.005, 1e-6, pointer(memory), slots.data(),
                           pointer(weights), times.data(), clock.data(), told, cuts.sequences(),
                           // results
                           reads.data.get(), out_memory.data.get(), out_slots.data(), out_weights.data.get(), out_times.data(),
                           out_clock.data(), keeps ? oldest.data() : nullptr, keeps ? history.data() : nullptr,
                           keeps ? weight_history.data.get() : nullptr, keeps ? kept.data.get() : nullptr},
                          parallel));
  check_slots(out_slots, heads, K, c.N);
  Results results;
  if (keeps) cuts.check_slots(c, oldest);
  for (const int present : {0b001, 0b110, 0b111}) {  // each of the three gradients may be missing
    if (!keeps) continue;
    const auto grad_reads = optional(present & 1, random.normal(c.input, reads.count));
    const auto grad_memory = optional(present & 2, random.normal(c.state, memory.count));
    const auto grad_weights = optional(present & 4, random.normal(c.state, weights.count));
    Array grad_in_memory(c.state, memory.count), grad_in_weights(c.state, weights.count), grad_keys(c.input, keys.count);
    Array grad_vectors(c.input, keys.count), grad_gates(c.input, rows), grad_sharpness(c.input, c.sharp ? rows : 0);
    Array grad_open(c.input, c.sharp ? rows : 0), grad_start = cuts.of_start(c);
    succeeded(k.sparse_scan_backward(
        {c.T, c.B, c.N, c.D, c.R, K, c.state, c.input, 1e-6, pointer(grad_reads), pointer(grad_memory), pointer(grad_weights),
         slots.data(), pointer(weights), told, cuts.sequences(), oldest.data(), history.data(), pointer(weight_history),
         pointer(kept),
         // results
         grad_in_memory.data.get(), grad_in_weights.data.get(),
         SparseInputs<void*>{grad_keys.data.get(), grad_vectors.data.get(), grad_gates.data.get(),
                             c.sharp ? grad_sharpness.data.get() : nullptr, c.sharp ? grad_open.data.get() : nullptr},
         c.cut ? grad_start.data.get() : nullptr},
        parallel));
    for (Array* array :
         {&grad_in_memory, &grad_in_weights, &grad_keys, &grad_vectors, &grad_gates, &grad_sharpness, &grad_open, &grad_start})
      results.push_back(std::move(*array));
  }
  const Array key = random.normal(c.input, heads * c.D);
  const auto beta = optional(c.sharp, random.positive(c.input, heads));
  Array read(c.input, key.count), read_weights(c.state, weights.count), read_rows(c.state, heads * K * c.D);
  succeeded(k.sparse_read({c.B, c.N, c.D, c.R, K, c.state, c.input, 1e-6, pointer(memory), pointer(key), pointer(beta),
                           read.data.get(), out_slots.data(), read_weights.data.get(), read_rows.data.get()},
                          parallel));
  check_slots(out_slots, heads, K, c.N);
  for (const bool of_read : {true, false}) {
    const auto grad_read = optional(of_read, random.normal(c.input, key.count));
    const auto grad_weights = optional(!of_read || c.shared_target, random.normal(c.state, weights.count));
    Array grad_memory(c.state, memory.count), grad_key(c.input, key.count), grad_beta(c.input, c.sharp ? heads : 0);
    succeeded(k.sparse_read_backward({c.B, c.N, c.D, c.R, K, c.state, c.input, 1e-6, pointer(grad_read), pointer(grad_weights),
                                      pointer(key), pointer(beta), pointer(read_weights), out_slots.data(), pointer(read_rows),
                                      grad_memory.data.get(), grad_key.data.get(), c.sharp ? grad_beta.data.get() : nullptr},
                                     parallel));
    for (Array* array : {&grad_memory, &grad_key, &grad_beta}) results.push_back(std::move(*array));
  }
  for (Array* array : {&reads, &out_memory, &out_weights, &read, &read_weights}) results.push_back(std::move(*array));
  return results;
}

// Steps in place that hand on what they know, with candidates as an index gives them: some twice, some none, the last of a sample
// none at all.
[[maybe_unused]] Results sparse_steps(const Kernels& k, const Case& c) {
  Random random;
  const Parallel parallel = on_threads(c.threads);
  const int64_t K = std::min<int64_t>(c.N, 3), heads = c.B * c.R, size = lists_size(c.N), count = 5;
  Array memory = random.normal(c.state, c.B * c.N * c.D), weights = random.positive(c.state, heads * K);
  std::vector<int64_t> slots(heads * K), times(c.B * c.N), clock(c.B, 3), lists(c.B * size, unmade), found(c.B * count);
  for (int64_t j = 0; j < heads * K; ++j) slots[j] = (j % K + j / K) % c.N;
  for (int64_t j = 0; j < c.B * c.N; ++j) times[j] = j * 7 % 5 - 1;
  for (int64_t b = 0; b < c.B; ++b) {
    const int64_t of_sample[] = {c.N - 1, 0, c.N - 1, -1, c.N / 2};
    for (int64_t j = 0; j < count; ++j) found[b * count + j] = b % 2 == 1 ? -1 : of_sample[j];
  }
  Results results;
  for (int64_t t = 0; t < c.T; ++t) {
    const Array keys = random.normal(c.input, heads * c.D), vectors = random.normal(c.input, heads * c.D);
    const Array gates = random.normal(c.input, heads);
    const auto sharpness = optional(c.sharp, random.positive(c.input, heads)),
               open = optional(c.sharp, random.normal(c.input, heads));
    Array reads(c.input, heads * c.D), out_weights(c.state, weights.count);
    std::vector<int64_t> out_slots(heads * K), out_clock(c.B);
    const SparseInputs<const void*> told = {pointer(keys), pointer(vectors), pointer(gates), pointer(sharpness), pointer(open)};
    succeeded(k.sparse_scan(
        {1, c.B, c.N, c.D, c.R, K, c.state, c.input, 0.005, 1e-6, pointer(memory), slots.data(), pointer(weights), times.data(),
         clock.data(), told, Sequences{},
         // results
         reads.data.get(), memory.data.get(), out_slots.data(), out_weights.data.get(), times.data(), out_clock.data(), nullptr,
         nullptr, nullptr, nullptr, lists.data(), t == 0 ? nullptr : found.data(), count},
        parallel));
    check_slots(out_slots, heads, K, c.N);
    for (int64_t b = 0; b < c.B; ++b)
      if (t == 0 && c.N >= 1024) lists[b * size] = 0;  // all are in the index
    slots = out_slots;
    clock = out_clock;
    weights = std::move(out_weights);
    results.push_back(std::move(reads));
  }
  results.push_back(std::move(memory));
  results.push_back(std::move(weights));
  return results;
}

[[maybe_unused]] Results sparse_cell(const Kernels& k, const Case& c, Controller controller, bool bfloat16) {
  Random random;
  const Parallel parallel = on_threads(c.threads);
  NetworkArrays n(c, random, controller, bfloat16, 2 * c.R * c.D + 3 * c.R);
  const int64_t K = std::min<int64_t>(c.N, 3), reads = c.B * c.R * K;
  const Array memory = n.normal(c.B * c.N * c.D), weights = random.positive(c.state, reads);
  std::vector<int64_t> slots(reads), times(c.B * c.N), clock(c.B, 3);
  for (int64_t j = 0; j < reads; ++j) slots[j] = (j % K + j / K) % c.N;
  for (int64_t j = 0; j < c.B * c.N; ++j) times[j] = j * 7 % 5 - 1;
  std::vector<int64_t> out_slots(reads), out_times(c.B * c.N), out_clock(c.B), oldest(n.rows * c.R), history(n.rows * c.R * K);
  Array out_memory(c.state, memory.count), out_weights(c.state, reads);
  Array weight_history(c.state, n.rows * c.R * K), rows(c.state, n.rows * c.R * K * c.D);
  succeeded(k.sparse_cell({n.arguments(), 1.0, 10.0,
                           SparseScan{c.T,
                                      c.B,
                                      c.N,
                                      c.D,
                                      c.R,
                                      K,
                                      c.state,
                                      c.state,
                                      0.005,
                                      1e-6,
                                      pointer(memory),
                                      slots.data(),
                                      pointer(weights),
                                      times.data(),
                                      clock.data(),
                                      {},
                                      n.cuts.sequences(),
                                      nullptr,
                                      // results
                                      out_memory.data.get(),
                                      out_slots.data(),
                                      out_weights.data.get(),
                                      out_times.data(),
                                      out_clock.data(),
                                      n.keeps ? oldest.data() : nullptr,
                                      n.keeps ? history.data() : nullptr,
                                      n.keeps ? weight_history.data.get() : nullptr,
                                      n.keeps ? rows.data.get() : nullptr}},
                          parallel));
  check_slots(out_slots, c.B * c.R, K, c.N);
  Results results;
  n.backward(results, [&](const NetworkBackward& network, int present) {
    const auto grad_memory = optional(present & 4, n.normal(memory.count)),
               grad_weights = optional(present & 8, n.normal(reads));
    Array grad_in_memory(c.state, memory.count), grad_in_weights(c.state, reads);
    succeeded(k.sparse_cell_backward({network, 1.0, 10.0,
                                      SparseScanBackward{c.T,
                                                         c.B,
                                                         c.N,
                                                         c.D,
                                                         c.R,
                                                         K,
                                                         c.state,
                                                         c.state,
                                                         1e-6,
                                                         nullptr,
                                                         pointer(grad_memory),
                                                         pointer(grad_weights),
                                                         slots.data(),
                                                         pointer(weights),
                                                         {},
                                                         n.cuts.sequences(),
                                                         oldest.data(),
                                                         history.data(),
                                                         pointer(weight_history),
                                                         pointer(rows),
                                                         // results
                                                         grad_in_memory.data.get(),
                                                         grad_in_weights.data.get(),
                                                         {},
                                                         network.grad_start}},
                                     parallel));
    for (Array* array : {&grad_in_memory, &grad_in_weights}) results.push_back(std::move(*array));
  });
  n.take(results);
  for (Array* array : {&out_memory, &out_weights}) results.push_back(std::move(*array));
  return results;
}

}  // namespace

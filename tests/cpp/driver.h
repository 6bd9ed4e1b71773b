// Runs kernels over arrays with nothing of torch around them: each array is a heap block of its own and exactly as long as the
// kernel may touch. For kernels_driver.cpp and cuda_driver.cpp.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/kernels.h"
#include "../../csrc/include/half.h"

using namespace mann_fast;

namespace {

std::string current;  // what is being run, for messages

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "%s: %s\n", current.c_str(), what.c_str());
  std::exit(1);
}

size_t size_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

// A heap block of exactly `count` numbers.
struct Array {
  Dtype dtype;
  int64_t count;
  std::unique_ptr<char[]> data;

  explicit Array(Dtype dtype, int64_t count) : dtype(dtype), count(count), data(new char[count * size_of(dtype)]) {
    std::memset(data.get(), 0xff, count * size_of(dtype));  // NaN in every dtype: shows what was not written
  }
  double operator[](int64_t i) const {
    if (dtype == Dtype::float64) return reinterpret_cast<const double*>(data.get())[i];
    if (dtype == Dtype::float32) return reinterpret_cast<const float*>(data.get())[i];
    const uint16_t half = reinterpret_cast<const uint16_t*>(data.get())[i];
    return dtype == Dtype::bfloat16 ? from_bfloat16(half) : from_float16(half);
  }
  void set(int64_t i, double value) {
    const float single = static_cast<float>(value);
    if (dtype == Dtype::float64) reinterpret_cast<double*>(data.get())[i] = value;
    if (dtype == Dtype::float32) reinterpret_cast<float*>(data.get())[i] = single;
    if (dtype == Dtype::bfloat16) reinterpret_cast<uint16_t*>(data.get())[i] = to_bfloat16(single);
    if (dtype == Dtype::float16) reinterpret_cast<uint16_t*>(data.get())[i] = to_float16(single);
  }
};

struct Random {
  std::mt19937 generator{20260101};
  Array normal(Dtype dtype, int64_t count) {
    Array array(dtype, count);
    for (int64_t i = 0; i < count; ++i) array.set(i, std::normal_distribution<double>()(generator));
    return array;
  }
  Array positive(Dtype dtype, int64_t count) {
    Array array(dtype, count);
    for (int64_t i = 0; i < count; ++i) array.set(i, std::uniform_real_distribution<double>(0.1, 1.0)(generator));
    return array;
  }
};

void run_on_threads(int64_t tasks, void (*task)(void*, int64_t), void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < tasks; ++i) threads.emplace_back(task, context, i);
  if (tasks > 0) task(context, 0);
  for (std::thread& thread : threads) thread.join();
}

Parallel on_threads(int64_t threads) { return {threads, run_on_threads}; }

struct Case {
  int64_t T, B, N, D, R;
  Dtype state, input;
  bool sharp, read_first, shared_target;
  int64_t anchor_every, threads;
  bool cut = false;  // samples begin anew and end in the middle
};

using Results = std::vector<Array>;

const void* pointer(const Array& array) { return array.data.get(); }
const void* pointer(const std::unique_ptr<Array>& array) { return array ? array->data.get() : nullptr; }

std::unique_ptr<Array> optional(bool there, Array array) { return there ? std::make_unique<Array>(std::move(array)) : nullptr; }

void succeeded(bool ok) {
  if (!ok) fail("a kernel found no scratch memory");
}

void check_slots(const std::vector<int64_t>& slots, int64_t rows, int64_t n, int64_t N) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < n; ++i) {
      const int64_t slot = slots[row * n + i];
      if (slot < 0 || slot >= N) fail("a slot out of range");
      for (int64_t j = 0; j < i; ++j)
        if (slots[row * n + j] == slot) fail("the same slot twice");
    }
}

// Where the samples of a case begin anew, the start, and where they end: some at their first step, or never.
struct Cuts {
  std::unique_ptr<bool[]> resets;
  std::unique_ptr<int64_t[]> lengths;
  std::unique_ptr<Array> start;
  Cuts(const Case& c, Random& random) {
    if (!c.cut) return;
    resets.reset(new bool[c.T * c.B]);
    lengths.reset(new int64_t[c.B]);
    start = std::make_unique<Array>(random.normal(c.state, c.N * c.D));
    for (int64_t i = 0; i < c.T * c.B; ++i) resets[i] = (i / c.B + 2 - i % c.B % 3) % 3 == 0;
    for (int64_t b = 0; b < c.B; ++b) lengths[b] = c.T - (b % 4 == 3 ? c.T : std::min(c.T, b % 4));
  }
  Sequences sequences() const { return {resets.get(), lengths.get(), pointer(start)}; }
  Array of_start(const Case& c) const { return Array(c.state, start ? c.B * c.N * c.D : 0); }
  int64_t length(const Case& c, int64_t b) const { return lengths ? lengths[b] : c.T; }
  // Of an input [T, B, count], what no sample takes: NaN.
  void spoil(const Case& c, Array& input) const {
    const int64_t count = c.T * c.B > 0 ? input.count / (c.T * c.B) : 0;
    for (int64_t i = 0; i < input.count; ++i)
      if (i / count / c.B >= length(c, i / count % c.B)) input.set(i, NAN);
  }
  void check_slots(const Case& c, const std::vector<int64_t>& slots) const {
    for (int64_t row = 0; row < c.T * c.B; ++row)
      if (row / c.B < length(c, row % c.B))
        ::check_slots({slots.begin() + row * c.R, slots.begin() + (row + 1) * c.R}, 1, c.R, c.N);
  }
};

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

// Controller and heads of a case, whatever its memory: what goes in and comes out. bfloat16: the products of each step take rounded
// numbers.
struct NetworkArrays {
  const Case& c;
  Random& random;
  Controller controller;
  bool bfloat16, recurrent, lstm, keeps;
  int64_t H, G, RD, heads, ld, rows;  // ld: the reads' weight is part of a wider one
  Array gates, reads;
  std::unique_ptr<Array> hidden, cell, hidden_weight, hidden_bias;
  Array reads_weight, head_weight, head_bias;
  Cuts cuts;
  Array kept_gates, kept_states, kept_heads, output, out_hidden, out_cell, out_reads;

  Array normal(int64_t count) const { return random.normal(c.state, count); }
  Array weight(int64_t count, int64_t fan_in) const {  // as large as a layer's
    Array array = normal(count);
    for (int64_t i = 0; i < count; ++i) array.set(i, array[i] / std::sqrt(static_cast<double>(fan_in)));
    return array;
  }
  // heads: how many values they have.
  NetworkArrays(const Case& c, Random& random, Controller controller, bool bfloat16, int64_t heads)
      : c(c), random(random), controller(controller), bfloat16(bfloat16), recurrent(controller != Controller::feedforward),
        lstm(controller == Controller::lstm), keeps(c.anchor_every > 0), H(2 * c.D + 1), G(gates_per_unit(controller) * H),
        RD(c.R * c.D), heads(heads), ld(RD + 3), rows(keeps ? c.T * c.B : 0), gates(normal(c.T * c.B * G)),
        reads(normal(c.B * RD)), hidden(optional(recurrent, normal(c.B * H))), cell(optional(lstm, normal(c.B * H))),
        hidden_weight(optional(recurrent, weight(G * H, H))), hidden_bias(optional(recurrent, normal(G))),
        reads_weight(weight(G * ld - 3, RD)), head_weight(weight(heads * H, H)), head_bias(normal(heads)), cuts(c, random),
        kept_gates(c.state, rows * kept_per_unit(controller) * H), kept_states(c.state, recurrent ? rows * H : 0),
        kept_heads(c.state, rows * heads), output(c.state, c.T * c.B * (H + RD)), out_hidden(c.state, recurrent ? c.B * H : 0),
        out_cell(c.state, lstm ? c.B * H : 0), out_reads(c.state, reads.count) {
    cuts.spoil(c, gates);
  }
  Network arguments() {
    return {c.T, c.B, H, c.N, c.D, c.R, c.state, bfloat16, controller, c.anchor_every, pointer(gates), pointer(hidden),
            pointer(cell), pointer(reads), pointer(hidden_weight), pointer(hidden_bias), pointer(reads_weight), ld,
            pointer(head_weight), pointer(head_bias), cuts.sequences(),
            // results
            output.data.get(), out_hidden.data.get(), out_cell.data.get(), out_reads.data.get(), kept_gates.data.get(),
            kept_states.data.get(), kept_heads.data.get()};
  }
  void take(Results& results) {
    for (Array* array : {&output, &out_hidden, &out_cell, &out_reads}) results.push_back(std::move(*array));
  }

  // Runs backward(its arguments, present), where each gradient may be missing; present & 4 and 8 say which of the memory's are there.
  template <class Run>
  void backward(Results& results, Run run) {
    for (const int present : {0b010001, 0b100110, 0b011011}) {
      if (!keeps) continue;
      const auto grad_output = optional(present & 1, normal(output.count));
      const auto grad_cell = optional(lstm && (present & 2), normal(out_cell.count));
      const auto grad_hidden = optional(recurrent && (present & 16), normal(c.B * H));
      const auto grad_reads = optional(present & 32, normal(reads.count));
      const bool gru = recurrent && !lstm;
      Array grad_gates(c.state, gates.count), grad_hidden_gates(c.state, gru ? gates.count : 0);
      Array grad_heads(c.state, kept_heads.count), grad_in_hidden(c.state, out_hidden.count);
      Array grad_in_cell(c.state, out_cell.count), grad_in_reads(c.state, reads.count), grad_start = cuts.of_start(c);
      run(NetworkBackward{c.T, c.B, H, c.N, c.D, c.R, c.state, bfloat16, controller, c.anchor_every, pointer(grad_output),
                          pointer(grad_hidden), pointer(grad_cell), pointer(grad_reads), pointer(hidden), pointer(cell),
                          pointer(hidden_weight), pointer(reads_weight), ld, pointer(head_weight), pointer(kept_gates),
                          pointer(kept_states), pointer(kept_heads), cuts.sequences(),
                          // results
                          grad_gates.data.get(), gru ? grad_hidden_gates.data.get() : nullptr, grad_heads.data.get(),
                          grad_in_hidden.data.get(), grad_in_cell.data.get(), grad_in_reads.data.get(),
                          c.cut ? grad_start.data.get() : nullptr},
          present);
      for (Array* array :
           {&grad_gates, &grad_hidden_gates, &grad_heads, &grad_in_hidden, &grad_in_cell, &grad_in_reads, &grad_start})
        results.push_back(std::move(*array));
    }
  }
};

Results cell(const Kernels& k, const Case& c, Controller controller, bool bfloat16) {
  Random random;
  const Parallel parallel = on_threads(c.threads);
  NetworkArrays n(c, random, controller, bfloat16, (c.sharp ? 2 : 1) * (c.R * c.D + c.R));
  const Array memory = n.normal(c.B * c.N * c.D), usage = random.positive(c.state, c.B * c.N);
  const Array read_weights = random.positive(c.state, c.B * c.R * c.N);
  Array anchors(c.state, anchors_count(c.T, c.anchor_every) * c.B * (c.D + c.R) * padded_slots(c.N));
  std::vector<int64_t> slots(n.rows * c.R, -1);
  Array out_memory(c.state, memory.count), out_weights(c.state, read_weights.count), out_usage(c.state, usage.count);
  succeeded(k.cell({n.arguments(), c.sharp, c.sharp, 1.0, 10.0, c.read_first, c.shared_target, 0.95, 1e-6, pointer(memory),
                    pointer(read_weights), pointer(usage),
                    // results
                    out_memory.data.get(), out_weights.data.get(), out_usage.data.get(), slots.data(), anchors.data.get()},
                   parallel));
  Results results;
  if (n.keeps) n.cuts.check_slots(c, slots);
  n.backward(results, [&](const NetworkBackward& network, int present) {
    const auto grad_memory = optional(present & 4, n.normal(memory.count));
    const auto grad_weights = optional(present & 8, n.normal(read_weights.count));
    Array grad_in_memory(c.state, memory.count), grad_in_weights(c.state, read_weights.count);
    succeeded(k.cell_backward({network, c.sharp, c.sharp, 1.0, 10.0, c.read_first, c.shared_target, 1e-6, pointer(grad_memory),
                               pointer(grad_weights), pointer(memory), pointer(read_weights), slots.data(), anchors.data.get(),
                               // results
                               grad_in_memory.data.get(), grad_in_weights.data.get()},
                              parallel));
    for (Array* array : {&grad_in_memory, &grad_in_weights}) results.push_back(std::move(*array));
  });
  n.take(results);
  for (Array* array : {&out_memory, &out_weights, &out_usage}) results.push_back(std::move(*array));
  return results;
}

// sharp stands for heads with a location, of 2 S + 1 = 3 moves. CUDA has no kernel for it.
[[maybe_unused]] Results ntm_cell(const Kernels& k, const Case& c, Controller controller, bool bfloat16) {
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

// R heads that read and one less that write; 2 S + 1 = 3 moves.
Results ntm(const Kernels& k, const Case& c) {
  Random random;
  const Parallel parallel = on_threads(c.threads);
  const int64_t W = c.R - 1, heads = c.R + W, shifts = 3, rows = c.T * c.B;
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

// The state of a DNC, its gradients, and what is kept of it; read_first stands for no links, shared_target for masks and what is
// given free erased, sharp for sharpened links.
struct DncArrays {
  const Case& c;
  bool links, sharpened, keeps;
  Array memory, usage, precedence, linked, read_weights, write_weights;
  Array read_history, write_history, directions;
  std::vector<int64_t> orders;
  static bool has_links(const Case& c) { return !c.read_first && c.N < 512; }  // those of more slots take a sanitizer minutes
  static Array shares(const Case& c, Random& random, int64_t count) {          // of N slots
    Array array = random.positive(c.state, count);
    for (int64_t i = 0; i < count; ++i) array.set(i, array[i] / static_cast<double>(c.N));
    return array;
  }
  DncArrays(const Case& c, Random& random)
      : c(c), links(has_links(c)), sharpened(links && c.sharp), keeps(c.anchor_every > 0),
        memory(random.normal(c.state, c.B * c.N * c.D)), usage(random.positive(c.state, c.B * c.N)),
        precedence(shares(c, random, links ? c.B * c.N : 0)), linked(shares(c, random, links ? c.B * c.N * c.N : 0)),
        read_weights(shares(c, random, c.B * c.R * c.N)), write_weights(shares(c, random, c.B * c.N)),
        read_history(c.state, keeps ? c.T * c.B * c.R * c.N : 0), write_history(c.state, keeps ? c.T * c.B * c.N : 0),
        directions(c.state, keeps && sharpened ? c.T * c.B * c.R * 2 * c.N : 0), orders(keeps ? c.T * c.B * c.N : 0) {}

  Results results() const {  // arrays as large as the state
    Results arrays;
    for (const Array* like : {&memory, &usage, &precedence, &linked, &read_weights, &write_weights})
      arrays.emplace_back(c.state, like->count);
    return arrays;
  }
  template <class Pointer>
  DncState<Pointer> state(const Results& x) const {
    return {x[0].data.get(), x[1].data.get(), links ? x[2].data.get() : nullptr, links ? x[3].data.get() : nullptr,
            x[4].data.get(), x[5].data.get()};
  }
  DncState<void*> gradients(const Results& x) const {  // the write weights are a constant
    DncState<void*> of = state<void*>(x);
    of.write_weights = nullptr;
    return of;
  }
  DncState<const void*> before() const {
    return {
        pointer(memory),       pointer(usage),        links ? pointer(precedence) : nullptr, links ? pointer(linked) : nullptr,
        pointer(read_weights), pointer(write_weights)};
  }
  template <class Pointer, class Slots>
  DncHistory<Pointer, Slots> history() {
    if (!keeps) return {};
    return {read_history.data.get(), write_history.data.get(), orders.data(), sharpened ? directions.data.get() : nullptr};
  }
  void check_orders(const Cuts& cuts) const {
    for (int64_t row = 0; keeps && row < c.T * c.B; ++row)
      if (row / c.B < cuts.length(c, row % c.B))
        check_slots({orders.begin() + row * c.N, orders.begin() + (row + 1) * c.N}, 1, c.N, c.N);
  }
};

// CUDA has no kernel for it.
[[maybe_unused]] Results dnc_cell(const Kernels& k, const Case& c, Controller controller, bool bfloat16) {
  Random random;
  const Parallel parallel = on_threads(c.threads);
  DncArrays memory(c, random);
  const bool masks = c.shared_target;
  const int64_t of_reads = c.D + 2 + (memory.links ? 3 : 0) + (masks ? c.D : 0) + (memory.sharpened ? 2 : 0);
  NetworkArrays n(c, random, controller, bfloat16, c.R * of_reads + 3 * c.D + 3 + (masks ? c.D : 0));
  const DncHeadOptions options = {masks, memory.sharpened, masks, masks ? 0.1 : 0.0, c.sharp ? 1.0 : 0.0, 1e-6};
  Results after = memory.results(), results;
  succeeded(k.dnc_cell({n.arguments(), options, memory.history<void*, int64_t*>(), memory.before(), memory.state<void*>(after)},
                       parallel));
  memory.check_orders(n.cuts);
  n.backward(results, [&](const NetworkBackward& network, int present) {
    Results grads, grad_before = memory.results();
    for (const Array& x : after) grads.push_back(n.normal(x.count));
    DncState<const void*> grad_after = {};
    if (present & 4) grad_after = memory.state<const void*>(grads);
    succeeded(k.dnc_cell_backward({network, options, memory.history<const void*, const int64_t*>(), grad_after, memory.before(),
                                   memory.gradients(grad_before)},
                                  parallel));
    grad_before.pop_back();
    for (Array& array : grad_before) results.push_back(std::move(array));
  });
  n.take(results);
  for (Array& array : after) results.push_back(std::move(array));
  return results;
}

Results dnc(const Kernels& k, const Case& c) {
  Random random;
  const Parallel parallel = on_threads(c.threads);
  DncArrays state(c, random);
  const bool links = state.links, masks = c.shared_target, sharpened = state.sharpened, keeps = state.keeps;
  const int64_t rows = c.T * c.B, heads = rows * c.R;
  const auto from_1 = [&](int64_t count) {
    Array array = random.positive(c.input, count);
    for (int64_t i = 0; i < count; ++i) array.set(i, 1 + 3 * array[i]);
    return array;
  };
  Array told[] = {random.normal(c.input, heads * c.D),
                  from_1(heads),
                  random.normal(c.input, rows * c.D),
                  from_1(rows),
                  random.positive(c.input, rows * c.D),
                  random.normal(c.input, rows * c.D),
                  random.positive(c.input, heads),
                  random.positive(c.input, rows),
                  random.positive(c.input, rows),
                  random.positive(c.input, links ? heads * 3 : 0),
                  random.positive(c.input, masks ? heads * c.D : 0),
                  random.positive(c.input, masks ? rows * c.D : 0),
                  from_1(sharpened ? heads * 2 : 0)};
  const Cuts cuts(c, random);
  for (Array& array : told) cuts.spoil(c, array);
  const bool there[] = {true, true, true, true, true, true, true, true, true, links, masks, masks, sharpened};
  const auto at = [&](int i) { return there[i] ? pointer(told[i]) : nullptr; };
  const DncInterface<const void*> interface = {at(0), at(1), at(2), at(3),  at(4),  at(5), at(6),
                                               at(7), at(8), at(9), at(10), at(11), at(12)};
  Array reads(c.input, heads * c.D);
  Results after = state.results();
  succeeded(k.dnc_scan({state.history<void*, int64_t*>(), c.T, c.B, c.N, c.D, c.R, c.state, c.input, masks, 1e-6,
                        state.before(), interface, cuts.sequences(), reads.data.get(), state.state<void*>(after)},
                       parallel));
  state.check_orders(cuts);
  Results results;
  for (const bool of_reads : {true, false}) {  // each gradient may be missing
    if (!keeps) continue;
    const auto grad_reads = optional(of_reads, random.normal(c.input, reads.count));
    DncState<const void*> grad_after = {};
    Results grads;
    if (!of_reads) {
      for (const Array& x : after) grads.push_back(random.normal(c.state, x.count));
      grad_after = state.state<const void*>(grads);
    }
    Results grad_before = state.results(), grad_told;
    for (const Array& array : told) grad_told.emplace_back(c.input, array.count);
    const auto of = [&](int i) -> void* { return there[i] ? grad_told[i].data.get() : nullptr; };
    Array grad_start = cuts.of_start(c);
    succeeded(
        k.dnc_scan_backward({state.history<const void*, const int64_t*>(),
                             c.T,
                             c.B,
                             c.N,
                             c.D,
                             c.R,
                             c.state,
                             c.input,
                             masks,
                             1e-6,
                             pointer(grad_reads),
                             grad_after,
                             state.before(),
                             interface,
                             cuts.sequences(),
                             // results
                             state.gradients(grad_before),
                             {of(0), of(1), of(2), of(3), of(4), of(5), of(6), of(7), of(8), of(9), of(10), of(11), of(12)},
                             c.cut ? grad_start.data.get() : nullptr},
                            parallel));
    grad_before.pop_back();  // the write weights are a constant
    for (Results* arrays : {&grad_before, &grad_told})
      for (Array& array : *arrays) results.push_back(std::move(array));
    results.push_back(std::move(grad_start));
  }
  results.push_back(std::move(reads));
  for (Array& array : after) results.push_back(std::move(array));
  return results;
}

// sparse_read and sparse_scan, with sharpness and write gates or without (c.sharp); shared_target: with both gradients of a read.
[[maybe_unused]] Results sparse(const Kernels& k, const Case& c) {
  Random random;
  const Parallel parallel = on_threads(c.threads);
  const int64_t K = std::min<int64_t>(c.N, 3), rows = c.T * c.B * c.R, heads = c.B * c.R;
  const Array memory = random.normal(c.state, c.B * c.N * c.D), weights = random.positive(c.state, heads * K);
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

}  // namespace

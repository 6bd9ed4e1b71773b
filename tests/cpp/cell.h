// Controller and heads of the whole sequences, whatever their memory, and the one with LRUA.
#pragma once
#include "arrays.h"

namespace {

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

}  // namespace

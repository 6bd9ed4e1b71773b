// Runs every kernel over odd sizes, dtypes and options, with nothing of torch around it, so that scripts/sanitize.py can
// build it with sanitizers: each array is a heap block of its own and exactly as long as the kernel may touch, and tasks
// run on threads. Checks beside that: every number of every output is written and finite, and threads change nothing
// beyond rounding. What the numbers are is tested from Python.
#include "driver.h"

namespace {

Results cell(const Kernels& k, const Case& c, Controller controller) {
  Random random;
  const Parallel parallel = on_threads(c.threads);
  const bool recurrent = controller != Controller::feedforward, lstm = controller == Controller::lstm;
  const int64_t H = 2 * c.D + 1, G = gates_per_unit(controller) * H, RD = c.R * c.D;
  const int64_t heads = (c.sharp ? 2 : 1) * (RD + c.R), kept = c.anchor_every > 0 ? c.T * c.B : 0;
  const auto normal = [&](int64_t count) { return random.normal(c.state, count); };
  const Array gates = normal(c.T * c.B * G), memory = normal(c.B * c.N * c.D), reads = normal(c.B * RD);
  const auto hidden = optional(recurrent, normal(c.B * H)), state = optional(lstm, normal(c.B * H));
  const Array usage = random.positive(c.state, c.B * c.N), read_weights = random.positive(c.state, c.B * c.R * c.N);
  const int64_t ld = RD + 3;  // the reads' weight as part of a wider one
  const bool bfloat16 = c.state == Dtype::float32 && c.shared_target;
  const auto hidden_weight = optional(recurrent, normal(G * H)), hidden_bias = optional(recurrent, normal(G));
  const Array reads_weight = normal(G * ld - 3), head_weight = normal(heads * H), head_bias = normal(heads);
  const int64_t anchors_count = c.T > 0 && kept > 0 ? (c.T - 1) / c.anchor_every : 0;
  Array anchors(c.state, anchors_count * c.B * (c.D + c.R) * padded_slots(c.N));
  Array kept_gates(c.state, kept * kept_per_unit(controller) * H), kept_states(c.state, recurrent ? kept * H : 0);
  Array kept_heads(c.state, kept * heads);
  std::vector<int64_t> slots(kept * c.R, -1);
  Array output(c.state, c.T * c.B * (H + RD)), out_cell(c.state, lstm ? c.B * H : 0), out_memory(c.state, memory.count);
  Array out_weights(c.state, read_weights.count), out_usage(c.state, usage.count);
  succeeded(k.cell.forward(
      {c.T, c.B, H, c.N, c.D, c.R, c.state, bfloat16, controller, c.sharp, c.sharp, 1.0, 10.0, c.read_first, c.shared_target, 0.95,
       1e-6, c.anchor_every, pointer(gates), pointer(hidden), pointer(state), pointer(memory), pointer(read_weights),
       pointer(usage), pointer(reads), pointer(hidden_weight), pointer(hidden_bias), pointer(reads_weight), ld,
       pointer(head_weight), pointer(head_bias), output.data.get(), out_cell.data.get(), out_memory.data.get(),
       out_weights.data.get(), out_usage.data.get(), kept_gates.data.get(), kept_states.data.get(),
       kept_heads.data.get(), slots.data(), anchors.data.get()},
      parallel));
  Results results;
  if (c.anchor_every > 0) {
    check_slots(slots, c.T * c.B, c.R, c.N);
    for (const int present : {0b0001, 0b0110, 0b1011}) {  // each of the four gradients may be missing
      const auto grad_output = optional(present & 1, normal(output.count));
      const auto grad_cell = optional(lstm && (present & 2), normal(out_cell.count));
      const auto grad_memory = optional(present & 4, normal(memory.count));
      const auto grad_weights = optional(present & 8, normal(read_weights.count));
      Array grad_gates(c.state, gates.count), grad_hidden_gates(c.state, recurrent && !lstm ? gates.count : 0);
      Array grad_heads(c.state, kept_heads.count), grad_hidden(c.state, recurrent ? c.B * H : 0);
      Array grad_in_cell(c.state, out_cell.count), grad_in_memory(c.state, memory.count);
      Array grad_in_weights(c.state, read_weights.count), grad_reads(c.state, reads.count);
      succeeded(k.cell.backward(
          {c.T, c.B, H, c.N, c.D, c.R, c.state, bfloat16, controller, c.sharp, c.sharp, 1.0, 10.0, c.read_first, c.shared_target,
           1e-6, c.anchor_every, pointer(grad_output), pointer(grad_cell), pointer(grad_memory), pointer(grad_weights),
           pointer(hidden), pointer(state), pointer(memory), pointer(read_weights), pointer(hidden_weight),
           pointer(reads_weight), ld, pointer(head_weight), pointer(kept_gates), pointer(kept_states),
           pointer(kept_heads), slots.data(), anchors.data.get(), grad_gates.data.get(),
           recurrent && !lstm ? grad_hidden_gates.data.get() : nullptr, grad_heads.data.get(), grad_hidden.data.get(),
           grad_in_cell.data.get(), grad_in_memory.data.get(), grad_in_weights.data.get(), grad_reads.data.get()},
          parallel));
      for (Array* array : {&grad_gates, &grad_hidden_gates, &grad_heads, &grad_hidden, &grad_in_cell, &grad_in_memory,
                           &grad_in_weights, &grad_reads})
        results.push_back(std::move(*array));
    }
  }
  for (Array* array : {&output, &out_cell, &out_memory, &out_weights, &out_usage}) results.push_back(std::move(*array));
  return results;
}

// Runs the case on one thread and on several; the number of threads decides how slots are split, so sums are rounded
// otherwise, and no more than that.
template <class Run>
void check(const char* name, Run run, const Kernels& k, Case c) {
  current = std::string(k.isa) + " " + name;
  for (const int64_t value : {c.T, c.B, c.N, c.D, c.R, c.anchor_every, c.threads}) current += " " + std::to_string(value);
  current += " dtypes " + std::to_string(static_cast<int>(c.state)) + " " + std::to_string(static_cast<int>(c.input));
  const Results several = run(k, c);
  c.threads = 1;
  const Results one = run(k, c);
  for (size_t j = 0; j < one.size(); ++j) {
    const double tolerance = one[j].dtype == Dtype::float64 ? 1e-9 : one[j].dtype == Dtype::float32 ? 1e-3 : 5e-2;
    double greatest = 1e-3;
    for (int64_t i = 0; i < one[j].count; ++i) greatest = std::max(greatest, std::abs(one[j][i]));
    for (int64_t i = 0; i < one[j].count; ++i) {
      if (!std::isfinite(one[j][i]) || !std::isfinite(several[j][i]))
        fail("result " + std::to_string(j) + " is not finite at " + std::to_string(i));
      if (std::abs(one[j][i] - several[j][i]) > tolerance * greatest)
        fail("result " + std::to_string(j) + " depends on the threads at " + std::to_string(i));
    }
  }
}

}  // namespace

int main() {
  const Kernels* k = kernels();
  if (k == nullptr) {
    std::puts("this processor does not have the instruction set");
    return 77;
  }
  const int64_t sizes[][5] = {  // T, B, N, D, R
      {1, 1, 1, 1, 1},    {3, 2, 5, 3, 2},   {4, 1, 17, 7, 3},   {2, 3, 33, 16, 5}, {5, 1, 130, 9, 4}, {2, 1, 64, 33, 1},
      {3, 2, 4, 1, 4},    {2, 5, 16, 64, 6}, {0, 2, 4, 4, 1},    {3, 0, 4, 4, 1},   {2, 1, 301, 20, 4},
      {2, 1, 1037, 33, 4}, {3, 19, 6, 5, 2}};
  const Dtype dtypes[][2] = {{Dtype::float32, Dtype::float32},
                             {Dtype::float64, Dtype::float64},
                             {Dtype::float32, Dtype::bfloat16},
                             {Dtype::float32, Dtype::float16}};
  int cases = 0;
  for (const auto& size : sizes)
    for (const auto& dtype : dtypes)
      for (int options = 0; options < 8; options += &dtype == &dtypes[0] ? 1 : 3) {
        const bool sharp = options & 1, read_first = options & 2, shared_target = options & 4;
        Case c = {size[0], size[1], size[2], size[3], size[4], dtype[0], dtype[1], sharp, read_first, shared_target, 0, 3};
        if (!read_first) {  // an option of the scan only
          check("content", content, *k, c);
          check("write", write, *k, c);
        }
        for (const int64_t every : {0, 1, 2}) {
          c.anchor_every = every;
          check("scan", scan, *k, c);
          if (!shared_target) check("ntm", ntm, *k, c);  // an option of the scan only
          if (c.state != c.input) continue;
          for (const Controller kind : {Controller::lstm, Controller::gru, Controller::feedforward})
            check("cell", [kind](const Kernels& k, const Case& c) { return cell(k, c, kind); }, *k, c);
        }
        ++cases;
      }
  std::printf("%s: %d cases\n", k->isa, cases);
}

// A Differentiable Neural Computer: its scan and its whole sequence.
#pragma once
#include "cell.h"

namespace {

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

Results dnc_cell(const Kernels& k, const Case& c, Controller controller, bool bfloat16) {
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

}  // namespace

// How kernels split their work into tasks for the threads, and the scratch memory of each task.
#pragma once
#include "kernels.h"

namespace mann_fast {
namespace {

// Ops that go over a memory once take it in tiles of so many slots: 128 x D numbers stay in the nearer caches.
constexpr int64_t tile = 128;

template <class Task>
inline void parallel_run(const Parallel& parallel, int64_t tasks, Task task) {
  if (tasks == 1 || parallel.threads == 1) {
    for (int64_t i = 0; i < tasks; ++i) task(i);
    return;
  }
  parallel.run(tasks, [](void* context, int64_t index) { (*static_cast<Task*>(context))(index); }, &task);
}

// How many tasks are worth their start: about 20,000 multiply-adds each at least.
inline int64_t worthwhile_tasks(const Parallel& parallel, int64_t parts, double multiply_adds) {
  const int64_t by_work = static_cast<int64_t>(multiply_adds / 20000) + 1;
  int64_t tasks = parts < parallel.threads ? parts : parallel.threads;
  tasks = tasks < by_work ? tasks : by_work;
  return tasks > 1 ? tasks : 1;
}

// Part `index` of [0, total) in `parts` parts whose borders are multiples of `step`.
struct Range {
  int64_t lo, hi;
};
inline Range part_of(int64_t total, int64_t parts, int64_t index, int64_t step = 1) {
  const int64_t steps = (total + step - 1) / step;
  const int64_t lo = steps * index / parts * step, hi = steps * (index + 1) / parts * step;
  return {lo < total ? lo : total, hi < total ? hi : total};
}

// Hands out 64-byte aligned arrays; without a base it only counts, so that one description gives size and layout.
class Arena {
 public:
  explicit Arena(void* base = nullptr) : base_(static_cast<char*>(base)) {}
  template <class U>
  U* take(int64_t count) {
    U* array = base_ == nullptr ? nullptr : reinterpret_cast<U*>(base_ + used_);
    used_ += (static_cast<size_t>(count) * sizeof(U) + 63) / 64 * 64;
    return array;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

class Scratch {
 public:
  explicit Scratch(size_t bytes) : data_(scratch_allocate(bytes)) {}
  ~Scratch() { scratch_free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return static_cast<char*>(data_); }

 private:
  void* data_;
};

// Runs run(item, scratch) for every item of [0, items) in so many tasks, each with scratch arrays of its own, laid out by
// make(arena). False where memory could not be had.
template <class Make, class Run>
bool run_items(const Parallel& parallel, int64_t items, int64_t tasks, Make make, Run run) {
  Arena size;
  make(size);
  const Scratch memory(tasks * size.used());
  if (memory.data() == nullptr) return false;
  parallel_run(parallel, tasks, [&](int64_t task) {
    Arena arena(memory.data() + task * size.used());
    auto scratch = make(arena);
    // In strides, since items may be sorted by their work, which is then much the same for every task.
    for (int64_t item = task; item < items; item += tasks) run(item, scratch);
  });
  return true;
}

// Runs an op that goes over all slots once, at so many multiply-adds a slot. Samples are split over the threads; where there
// are fewer samples than threads, one sample after the other has its slots in parts of whole tiles, if `to_split`
// multiply-adds a slot make that worth it. Of each sample: begin(b, scratch), then part(b, slots, scratch) for every part, then
// finish(b, scratches, parts); the scratch arrays of each part are a Pad.
template <class Pad, class Arguments, class Begin, class Part, class Finish>
bool run_samples_or_slots(const Arguments& a, const Parallel& parallel, int64_t to_split, int64_t multiply_adds, Begin begin,
                          Part part, Finish finish) {
  const auto make = [&](Arena& arena) { return Pad(arena, a); };
  const auto work = [](int64_t slots, int64_t each) { return static_cast<double>(slots) * static_cast<double>(each); };
  const int64_t tiles = (a.N + tile - 1) / tile;
  const int64_t parts = a.B >= parallel.threads ? 1 : worthwhile_tasks(parallel, tiles, work(a.N, to_split));
  if (parts == 1) {
    const int64_t tasks = worthwhile_tasks(parallel, a.B, work(a.B * a.N, multiply_adds));
    return run_items(parallel, a.B, tasks, make, [&](int64_t b, Pad& pad) {
      begin(b, pad);
      part(b, Range{0, a.N}, pad);
      finish(b, &pad, int64_t{1});
    });
  }
  Arena size;
  make(size);
  const Scratch memory(parts * (size.used() + sizeof(Pad)));
  if (memory.data() == nullptr) return false;
  Pad* pads = reinterpret_cast<Pad*>(memory.data() + parts * size.used());
  for (int64_t p = 0; p < parts; ++p) {
    Arena arena(memory.data() + p * size.used());
    pads[p] = make(arena);
  }
  for (int64_t b = 0; b < a.B; ++b) {
    begin(b, pads[0]);
    parallel_run(parallel, parts, [&](int64_t p) { part(b, part_of(a.N, parts, p, tile), pads[p]); });
    finish(b, pads, parts);
  }
  return true;
}

}  // namespace
}  // namespace mann_fast

// Defines a kernel from a template of its name over the dtype of the state; for the lists of ../include/ops.h.
#define MANN_FAST_BY_DTYPE(op, Arguments)                                                \
  bool op(const Arguments& a, const Parallel& parallel) {                                \
    return a.state == Dtype::float64 ? op<double>(a, parallel) : op<float>(a, parallel); \
  }

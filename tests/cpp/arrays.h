// What runs kernels with nothing of torch around them: arrays, each a heap block of its own and exactly as long as the kernel may
// touch, the threads, and a case's sizes.
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
int nudged = 0;       // which of the ways in which numbers in float64 are one rounding of float32 off; 0: they are not

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
  // In float64 rounded to float32, so that a case in one is the same in the other, and one rounding off where that is asked for.
  void set(int64_t i, double value) {
    const float single = static_cast<float>(value);
    const bool up = (static_cast<uint64_t>(i + 1) * static_cast<uint64_t>(nudged) * 0x9e3779b97f4a7c15u) >> 63;
    const double by = nudged == 0 ? 0 : up ? 0x1p-24 : -0x1p-24;
    if (dtype == Dtype::float64) reinterpret_cast<double*>(data.get())[i] = single * (1 + by);
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

}  // namespace

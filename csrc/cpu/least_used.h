// The least used slots: taken one by one out of usage held as integers, or gathered while usage goes by in tiles.
#pragma once
#include "blocks.h"

namespace mann_fast {
namespace {

// Usage as an integer of the same order: NaN after everything, -0 equal to 0; `taken` after NaN.
template <class T>
constexpr Int<T> taken = std::numeric_limits<Int<T>>::max();

template <class T>
inline void order_slots(const T* usage, int64_t count, int64_t valid, Int<T>* order) {
  for (int64_t i = 0; i < count; i += width<T>) {
    const Vec<T> u = load(usage + i) + T(0);
    const IntVec<T> bits = as_int(u);
    const IntVec<T> ordered = bits ^ ((bits >> (8 * sizeof(T) - 1)) & splat_int<T>(taken<T>));
    const IntVec<T> result = u == u ? ordered : splat_int<T>(taken<T> - 1);
    std::memcpy(order + i, &result, sizeof result);
  }
  for (int64_t i = valid; i < count; ++i) order[i] = taken<T>;
}

template <class T>
inline Int<T> find_least(const Int<T>* order, int64_t count) {
  IntVec<T> smallest = splat_int<T>(taken<T>);
  for (int64_t i = 0; i < count; i += width<T>) {
    const IntVec<T> o = load_int(order + i);
    smallest = o < smallest ? o : smallest;
  }
  return least_lane<T>(smallest);
}

// Takes the first slot of this value out of order.
template <class T>
inline int64_t take_first(Int<T>* order, int64_t count, Int<T> value) {
  IntVec<T> index{}, first = splat_int<T>(taken<T>);
  for (int lane = 0; lane < width<T>; ++lane) index[lane] = lane;
  for (int64_t i = 0; i < count; i += width<T>) {
    const IntVec<T> found = load_int(order + i) == value ? index : splat_int<T>(taken<T>);
    first = found < first ? found : first;
    index += width<T>;
  }
  const Int<T> position = least_lane<T>(first);
  order[position] = taken<T>;
  return position;
}

// Takes the least (order, slot) out of order: the lowest slot among equals.
template <class T>
inline void take_least(Int<T>* order, int64_t count, Int<T>* least, int64_t* slot) {
  *least = find_least<T>(order, count);
  *slot = take_first<T>(order, count, *least);
}

// The n least used of the slots offered in ascending order, in room for n of them: a heap with the last to be taken, the
// greatest (order, slot), at its root.
template <class T>
class LeastUsedSlots {
 public:
  LeastUsedSlots(int64_t n, Int<T>* order, int64_t* slots) : n_(n), order_(order), slots_(slots) {
    for (int64_t j = 0; j < n; ++j) order_[j] = taken<T>, slots_[j] = std::numeric_limits<int64_t>::max();
  }

  // Takes out of order what goes into the n. Of equals the first offered stays, since it has the lower slot.
  void offer(Int<T>* order, int64_t count, int64_t first_slot) {
    // In a large memory most tiles have none.
    for (Int<T> least; (least = find_least<T>(order, count)) < order_[0];) {
      order_[0] = least;
      slots_[0] = first_slot + take_first<T>(order, count, least);
      sink(0, n_);
    }
  }

  // Leaves the slots ascending by usage.
  void sort() {
    for (int64_t end = n_ - 1; end > 0; --end) {
      swap(0, end);
      sink(0, end);
    }
  }

 private:
  bool after(int64_t i, int64_t j) const { return order_[i] != order_[j] ? order_[i] > order_[j] : slots_[i] > slots_[j]; }

  void swap(int64_t i, int64_t j) {
    const Int<T> order = order_[i];
    const int64_t slot = slots_[i];
    order_[i] = order_[j], slots_[i] = slots_[j];
    order_[j] = order, slots_[j] = slot;
  }

  void sink(int64_t i, int64_t count) {
    for (int64_t child = 2 * i + 1; child < count; i = child, child = 2 * i + 1) {
      if (child + 1 < count && after(child + 1, child)) ++child;
      if (!after(child, i)) return;
      swap(i, child);
    }
  }

  int64_t n_;
  Int<T>* order_;
  int64_t* slots_;
};

// Scratch of least_used_slots: no more than a tile beside the n slots, whatever N.
template <class T>
struct LeastUsedScratch {
  T* usage;
  Int<T>*order, *least;
  LeastUsedScratch(Arena& arena, int64_t n)
      : usage(arena.take<T>(tile)), order(arena.take<Int<T>>(tile)), least(arena.take<Int<T>>(n)) {}
};

// The n least used slots of one sample, ascending by usage, from its usage [N].
template <class T>
void least_used_slots(const T* usage, int64_t N, int64_t n, int64_t* slots, const LeastUsedScratch<T>& s) {
  if (n == 0) return;
  LeastUsedSlots<T> found(n, s.least, slots);
  for (int64_t lo = 0; lo < N; lo += tile) {
    const int64_t valid = lo + tile < N ? tile : N - lo, count = padded_slots(valid);
    load_tile_rows(usage + lo, 1, N, valid, count, s.usage);
    order_slots(s.usage, count, valid, s.order);
    found.offer(s.order, count, lo);
  }
  found.sort();
}

}  // namespace
}  // namespace mann_fast

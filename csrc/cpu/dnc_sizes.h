// A Differentiable Neural Computer's step for one sample: sizes, what it is told, and the state.
#pragma once
#include "blocks.h"

namespace mann_fast {
namespace {

constexpr int told_count = 13;
template <class P>
constexpr P DncInterface<P>::* told_fields[told_count] = {
    &DncInterface<P>::read_keys,       &DncInterface<P>::read_sharpness,  &DncInterface<P>::write_key,
    &DncInterface<P>::write_sharpness, &DncInterface<P>::erase,           &DncInterface<P>::write_vector,
    &DncInterface<P>::free_gates,      &DncInterface<P>::allocation_gate, &DncInterface<P>::write_gate,
    &DncInterface<P>::read_modes,      &DncInterface<P>::read_masks,      &DncInterface<P>::write_mask,
    &DncInterface<P>::link_sharpening};

template <class T>
struct DncSizes {
  int64_t B, N, D, R, ld, told[told_count];  // told: how many numbers of each field a step takes
  bool links, masks, sharpened, deallocate;
  T eps;
  template <class Arguments>
  DncSizes(const Arguments& a, bool masks, bool sharpened)
      : B(a.B), N(a.N), D(a.D), R(a.R), ld(padded_slots(a.N)), told{R * D, R, D, 1, D, D, R, 1, 1, 3 * R, R * D, D, 2 * R},
        links(a.before.links != nullptr), masks(masks), sharpened(sharpened), deallocate(a.deallocate),
        eps(static_cast<T>(a.eps)) {}
  // Of a step forward.
  int64_t multiply_adds() const { return N * ((2 * R + 5) * D + (links ? (2 * R + 3) * N : 0)); }
  // Of one sample's memory, usage, precedence and links, as DncHeld lays them out.
  int64_t state() const { return (D + 1) * ld + (links ? ld + ld * ld : 0); }
};

// One sample's and step's; fields are null where the op's are.
template <class T>
struct DncTold : DncInterface<const T*> {
  T* buffers[told_count];
  DncTold(Arena& arena, const DncSizes<T>& n) {
    for (int k = 0; k < told_count; ++k) buffers[k] = arena.take<T>(n.told[k]);
  }
  void load(const DncInterface<const void*>& from, Dtype input, const DncSizes<T>& n, int64_t row) {
    for (int k = 0; k < told_count; ++k) {
      const void* field = from.*told_fields<const void*>[k];
      this->*told_fields<const T*>[k] = field ? widen(field, input, row * n.told[k], n.told[k], buffers[k]) : nullptr;
    }
  }
};

template <class T>
struct DncHeld {  // memory [D][ld]; usage, precedence [ld]; links [ld][ld]. Padding is 0.
  T *memory, *usage, *precedence, *links;
  DncHeld(T* block, const DncSizes<T>& n)
      : memory(block), usage(block + n.D * n.ld), precedence(usage + n.ld), links(precedence + n.ld) {}
};

// A row of slots, or 0 where there is none.
template <class T>
void load_or_clear(const void* from, int64_t rows, const DncSizes<T>& n, int64_t b, T* to) {
  if (from) load_rows(static_cast<const T*>(from) + b * rows * n.N, rows, n.N, 0, n.ld, to, n.ld);
  else std::memset(to, 0, rows * n.ld * sizeof(T));
}

template <class T>
void load_state(const DncState<const void*>& from, const DncSizes<T>& n, int64_t b, const DncHeld<T>& to) {
  if (from.memory) load_slots(static_cast<const T*>(from.memory) + b * n.N * n.D, n.N, n.D, 0, n.ld, to.memory, n.ld);
  else std::memset(to.memory, 0, n.D * n.ld * sizeof(T));
  load_or_clear(from.usage, 1, n, b, to.usage);
  if (!n.links) return;
  load_or_clear(from.precedence, 1, n, b, to.precedence);
  load_or_clear(from.links, n.N, n, b, to.links);
  std::memset(to.links + n.N * n.ld, 0, (n.ld - n.N) * n.ld * sizeof(T));
}

// All but the memory of a sample that begins anew.
template <class T>
void clear_rows(const DncSizes<T>& n, const DncHeld<T>& to) {
  std::memset(to.usage, 0, n.ld * sizeof(T));
  if (!n.links) return;
  std::memset(to.precedence, 0, n.ld * sizeof(T));
  std::memset(to.links, 0, n.ld * n.ld * sizeof(T));
}

template <class T>
void start_state(const void* start, const DncSizes<T>& n, const DncHeld<T>& to) {
  load_slots(static_cast<const T*>(start), n.N, n.D, 0, n.ld, to.memory, n.ld);
  clear_rows(n, to);
}

template <class T>
void store_state(const DncHeld<T>& from, const DncSizes<T>& n, int64_t b, const DncState<void*>& to) {
  const auto rows = [&](const T* row, int64_t count, void* target) {
    store_rows(row, n.ld, count, n.N, 0, n.ld, static_cast<T*>(target) + b * count * n.N);
  };
  store_slots(static_cast<const T*>(from.memory), n.ld, n.N, n.D, 0, n.ld, static_cast<T*>(to.memory) + b * n.N * n.D);
  rows(from.usage, 1, to.usage);
  if (!n.links) return;
  rows(from.precedence, 1, to.precedence);
  rows(from.links, n.N, to.links);
}

}  // namespace
}  // namespace mann_fast

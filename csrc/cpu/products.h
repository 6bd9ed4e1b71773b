// Matrix products of a few rows, as a recurrent network takes at every step: out [rows][columns] = a [rows][depth] times a
// weight matrix that stays the same for all steps. The matrix is packed once, into panels as wide as the registers allow,
// each stored in the order in which it is read; every number of a panel serves up to `block_rows` rows.
#pragma once
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "../include/half.h"
#include "blocks.h"

namespace mann_fast {
namespace {

constexpr int block_rows = 8;
constexpr int panel_vectors = 3;                            // times panel_rows accumulators
constexpr int panel_rows = vector_registers == 32 ? 8 : 4;  // that go through a panel together
// A panel comes from the second cache or the third, since a step reads all of them and much else: so many of its rows ahead
// they are sent for.
constexpr int64_t rows_ahead = 24;

// A packed matrix of so many rows (the depth of the product) and columns; the padding of the columns is 0.
template <class T>
struct Packed {
  int64_t depth, columns;
  T* data;
  Packed(Arena& arena, int64_t depth, int64_t columns)
      : depth(depth), columns(columns), data(arena.take<T>(depth * padded<T>(columns))) {}

  // All panels are panel_vectors wide but the last.
  int64_t panels() const { return (padded<T>(columns) + panel_vectors * width<T> - 1) / (panel_vectors * width<T>); }
  int64_t panel_start(int64_t panel) const { return panel * panel_vectors * width<T>; }
  int64_t panel_width(int64_t panel) const {
    const int64_t left = padded<T>(columns) - panel_start(panel);
    return left < panel_vectors * width<T> ? left : panel_vectors * width<T>;
  }
  T* panel(int64_t panel) const { return data + panel_start(panel) * depth; }
};

template <class T, class PackPanel>
void pack_panels(const Parallel& parallel, const Packed<T>& packed, PackPanel pack_panel) {
  const int64_t tasks =
      worthwhile_tasks(parallel, packed.panels(), static_cast<double>(packed.depth) * static_cast<double>(packed.columns));
  parallel_run(parallel, tasks, [&](int64_t task) {
    const Range panels = part_of(packed.panels(), tasks, task);
    for (int64_t p = panels.lo; p < panels.hi; ++p) {
      const int64_t start = packed.panel_start(p), wide = packed.panel_width(p);
      pack_panel(packed.panel(p), start, wide, packed.columns - start < wide ? packed.columns - start : wide);
    }
  });
}

// Packs a matrix [depth][columns], its rows `stride` numbers apart.
template <class T>
void pack(const Parallel& parallel, const Packed<T>& packed, const T* from, int64_t stride) {
  pack_panels(parallel, packed, [&](T* to, int64_t start, int64_t wide, int64_t valid) {
    for (int64_t k = 0; k < packed.depth; ++k) {
      std::memcpy(to + k * wide, from + k * stride + start, valid * sizeof(T));
      for (int64_t j = valid; j < wide; ++j) to[k * wide + j] = 0;
    }
  });
}

// Packs the transpose of a matrix [columns][depth], its rows `stride` numbers apart.
template <class T>
void pack_transposed(const Parallel& parallel, const Packed<T>& packed, const T* from, int64_t stride) {
  constexpr int W = width<T>;
  pack_panels(parallel, packed, [&](T* to, int64_t start, int64_t wide, int64_t valid) {
    for (int64_t j = 0; j < wide; j += W) {
      const T* rows = from + (start + j) * stride;
      int64_t k = 0;
      if (valid - j >= W)
        for (; k + W <= packed.depth; k += W) transpose_square<T, W>(rows + k, stride, to + k * wide + j, wide);
      for (; k < packed.depth; ++k)
        for (int64_t i = 0; i < W; ++i) to[k * wide + j + i] = j + i < valid ? rows[i * stride + k] : T(0);
    }
  });
}

template <class T, int ROWS, int VECTORS>
inline void product_panel(const T* a, int64_t lda, int64_t depth, const T* panel, T* out, int64_t ldo) {
  constexpr int W = width<T>;
  Vec<T> sum[ROWS][VECTORS];
  for (int m = 0; m < ROWS; ++m)
    for (int j = 0; j < VECTORS; ++j) sum[m][j] = Vec<T>{};
  for (int64_t k = 0; k < depth; ++k, panel += VECTORS * W) {
    Vec<T> weight[VECTORS];
    for (int j = 0; j < VECTORS; ++j) {
      __builtin_prefetch(panel + (rows_ahead * VECTORS + j) * W);
      weight[j] = load(panel + j * W);
    }
    for (int m = 0; m < ROWS; ++m)
      for (int j = 0; j < VECTORS; ++j) sum[m][j] += weight[j] * a[m * lda + k];
  }
  for (int m = 0; m < ROWS; ++m)
    for (int j = 0; j < VECTORS; ++j) store(out + m * ldo + j * W, sum[m][j]);
}

template <class T, int ROWS>
inline void product_panel(const T* a, int64_t lda, const Packed<T>& b, int64_t p, T* out, int64_t ldo) {
  if constexpr (ROWS > panel_rows) {
    product_panel<T, panel_rows>(a, lda, b, p, out, ldo);
    product_panel<T, ROWS - panel_rows>(a + panel_rows * lda, lda, b, p, out + panel_rows * ldo, ldo);
  } else {
    T* to = out + b.panel_start(p);
    switch (b.panel_width(p) / width<T>) {
      case 1: return product_panel<T, ROWS, 1>(a, lda, b.depth, b.panel(p), to, ldo);
      case 2: return product_panel<T, ROWS, 2>(a, lda, b.depth, b.panel(p), to, ldo);
      default: return product_panel<T, ROWS, 3>(a, lda, b.depth, b.panel(p), to, ldo);
    }
  }
}

template <class T, int ROWS>
inline void product_rows(const T* a, int64_t lda, const Packed<T>& b, T* out, int64_t ldo) {
  for (int64_t p = 0; p < b.panels(); ++p) product_panel<T, ROWS>(a, lda, b, p, out, ldo);
}

// out[m][:] = a[m][:] b for 1 to block_rows rows; out has padded<T> columns, ldo apart.
template <class T>
void product(const T* a, int64_t lda, int64_t rows, const Packed<T>& b, T* out, int64_t ldo) {
  switch (rows) {
    case 1: return product_rows<T, 1>(a, lda, b, out, ldo);
    case 2: return product_rows<T, 2>(a, lda, b, out, ldo);
    case 3: return product_rows<T, 3>(a, lda, b, out, ldo);
    case 4: return product_rows<T, 4>(a, lda, b, out, ldo);
    case 5: return product_rows<T, 5>(a, lda, b, out, ldo);
    case 6: return product_rows<T, 6>(a, lda, b, out, ldo);
    case 7: return product_rows<T, 7>(a, lda, b, out, ldo);
    default: return product_rows<T, 8>(a, lda, b, out, ldo);
  }
}

// ---- rounded to bfloat16, sums in float -------------------------------------------------------------------------------
//
// AVX512-BF16 multiplies two pairs of bfloat16 a lane and adds both products: twice the rate of float. So two rows of a packed
// matrix share one, the first in the low half of each lane. Other processors multiply the same rounded numbers as floats.

#ifdef __AVX512F__
inline bool has_pair_products() {
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has;
}

template <int ROWS, int VECTORS>
__attribute__((target("avx512bf16"))) inline void pair_product_panel(const uint16_t* a, int64_t lda, int64_t pairs,
                                                                     const float* panel, float* out, int64_t ldo) {
  __m512 sum[ROWS][VECTORS];
  for (int m = 0; m < ROWS; ++m)
    for (int j = 0; j < VECTORS; ++j) sum[m][j] = _mm512_setzero_ps();
  for (int64_t k = 0; k < pairs; ++k, panel += VECTORS * 16) {
    __m512i weight[VECTORS];
    for (int j = 0; j < VECTORS; ++j) {
      __builtin_prefetch(panel + (rows_ahead * VECTORS + j) * 16);
      weight[j] = _mm512_loadu_si512(panel + j * 16);
    }
    for (int m = 0; m < ROWS; ++m) {
      int32_t pair;
      std::memcpy(&pair, a + m * lda + 2 * k, sizeof pair);
      const __m512i both = _mm512_set1_epi32(pair);
      for (int j = 0; j < VECTORS; ++j) sum[m][j] = _mm512_dpbf16_ps(sum[m][j], (__m512bh)weight[j], (__m512bh)both);
    }
  }
  for (int m = 0; m < ROWS; ++m)
    for (int j = 0; j < VECTORS; ++j) _mm512_storeu_ps(out + m * ldo + j * 16, sum[m][j]);
}

template <int ROWS>
inline void pair_product_rows(const uint16_t* a, int64_t lda, const Packed<float>& b, float* out, int64_t ldo) {
  const int64_t pairs = (b.depth + 1) / 2;
  for (int64_t p = 0; p < b.panels(); ++p) {
    float* to = out + b.panel_start(p);
    switch (b.panel_width(p) / 16) {
      case 1: pair_product_panel<ROWS, 1>(a, lda, pairs, b.panel(p), to, ldo); break;
      case 2: pair_product_panel<ROWS, 2>(a, lda, pairs, b.panel(p), to, ldo); break;
      default: pair_product_panel<ROWS, 3>(a, lda, pairs, b.panel(p), to, ldo);
    }
  }
}
#else
constexpr bool has_pair_products() { return false; }
#endif

// Rounds a packed matrix to bfloat16, in its place.
inline void round_packed(const Parallel& parallel, const Packed<float>& packed) {
  const int64_t tasks =
      worthwhile_tasks(parallel, packed.panels(), static_cast<double>(packed.depth) * static_cast<double>(packed.columns));
  parallel_run(parallel, tasks, [&](int64_t task) {
    const Range panels = part_of(packed.panels(), tasks, task);
    for (int64_t p = panels.lo; p < panels.hi; ++p) {
      const int64_t wide = packed.panel_width(p);
      float* panel = packed.panel(p);
      if (!has_pair_products()) {
        for (int64_t i = 0; i < packed.depth * wide; ++i) panel[i] = from_bfloat16(to_bfloat16(panel[i]));
        continue;
      }
      uint32_t row[panel_vectors * width<float>];
      for (int64_t k = 0; k < packed.depth; k += 2) {
        const float *first = panel + k * wide, *second = first + wide;
        for (int64_t j = 0; j < wide; ++j) row[j] = to_bfloat16(first[j]);
        if (k + 1 < packed.depth)
          for (int64_t j = 0; j < wide; ++j) row[j] |= static_cast<uint32_t>(to_bfloat16(second[j])) << 16;
        std::memcpy(panel + k / 2 * wide, row, wide * sizeof(float));  // of what has been read already
      }
    }
  });
}

// The room that a rounded product of so many numbers a row needs.
constexpr int64_t rounded_numbers(int64_t depth) { return block_rows * (depth + 1); }

// As product, of a matrix that round_packed has rounded; a is rounded into `room`.
inline void rounded_product(const float* a, int64_t lda, int64_t rows, const Packed<float>& b, float* out, int64_t ldo,
                            float* room) {
#ifdef __AVX512F__
  if (has_pair_products()) {
    const int64_t ld = (b.depth + 1) / 2 * 2;
    uint16_t* halves = reinterpret_cast<uint16_t*>(room);
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t k = 0; k < b.depth; ++k) halves[m * ld + k] = to_bfloat16(a[m * lda + k]);
      if (b.depth < ld) halves[m * ld + b.depth] = 0;
    }
    switch (rows) {
      case 1: return pair_product_rows<1>(halves, ld, b, out, ldo);
      case 2: return pair_product_rows<2>(halves, ld, b, out, ldo);
      case 3: return pair_product_rows<3>(halves, ld, b, out, ldo);
      case 4: return pair_product_rows<4>(halves, ld, b, out, ldo);
      case 5: return pair_product_rows<5>(halves, ld, b, out, ldo);
      case 6: return pair_product_rows<6>(halves, ld, b, out, ldo);
      case 7: return pair_product_rows<7>(halves, ld, b, out, ldo);
      default: return pair_product_rows<8>(halves, ld, b, out, ldo);
    }
  }
#endif
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t k = 0; k < b.depth; ++k) room[m * b.depth + k] = from_bfloat16(to_bfloat16(a[m * lda + k]));
  product<float>(room, b.depth, rows, b, out, ldo);
}

}  // namespace
}  // namespace mann_fast

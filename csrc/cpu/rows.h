// The slots as they lie, [count][ld], ld a multiple of the vector width: to transpose a memory that is gone over once or twice
// would take longer than all else.
#pragma once
#include "blocks.h"

namespace mann_fast {
namespace {

// Rows [rows][D] into [padded_rows][ld], the rest 0.
template <class T>
inline void pad_rows(const T* from, int64_t rows, int64_t D, int64_t padded_rows, int64_t ld, T* to) {
  for (int64_t i = 0; i < padded_rows; ++i) {
    const int64_t valid = i < rows ? D : 0;
    if (valid > 0) std::memcpy(to + i * ld, from + i * D, D * sizeof(T));
    for (int64_t d = valid; d < ld; ++d) to[i * ld + d] = 0;
  }
}

// As below, of HEADS vectors and some slots at a time: a vector is loaded once for all of these.
template <class T, int HEADS, bool SQUARES>
inline void dot_group_of_slots(const T* rows, int64_t ld, int64_t count, const T* vectors, T* dots, T* squares, const T* next,
                               int64_t D) {
  constexpr int W = width<T>, ROWS = vector_registers == 32 ? 4 : 2, SUMS = HEADS + (SQUARES ? 1 : 0);
  for (int64_t i = 0; i < count; i += W) {
    Vec<T> part[SUMS][W];
    for (int lane = 0; lane < W; lane += ROWS) {
      const T* row = rows + (i + lane) * ld;
      if (next) prefetch_far(next + (i + lane) * D, ROWS * D);
      Vec<T> sum[SUMS][ROWS];
      for (int r = 0; r < SUMS; ++r)
        for (int j = 0; j < ROWS; ++j) sum[r][j] = Vec<T>{};
      for (int64_t d = 0; d < ld; d += W) {
        Vec<T> m[ROWS];
        for (int j = 0; j < ROWS; ++j) m[j] = load(row + j * ld + d);
        for (int r = 0; r < HEADS; ++r) {
          const Vec<T> vector = load(vectors + r * ld + d);
          for (int j = 0; j < ROWS; ++j) sum[r][j] += m[j] * vector;
        }
        for (int j = 0; SQUARES && j < ROWS; ++j) sum[HEADS][j] += m[j] * m[j];
      }
      for (int r = 0; r < SUMS; ++r)
        for (int j = 0; j < ROWS; ++j) part[r][lane + j] = sum[r][j];
    }
    for (int r = 0; r < HEADS; ++r) store(dots + r * tile + i, sum_lanes<T>(part[r]));
    if (SQUARES) store(squares + i, sum_lanes<T>(part[HEADS]));
  }
}

// Of slots [0, count), count a multiple of the width, with vectors [R][ld]: dots[r][i], and unless it is null squares[i]. By the
// same instructions for every slot, so that equal slots have equal bits wherever they are. The slots that come
// `next`, [count][D] or null, are sent for meanwhile, row by row and no nearer than the second cache: the processor does not see
// by itself that one tile follows the other, and has room for few that are on their way at once.
template <class T>
inline void dot_rows_of_slots(const T* rows, int64_t ld, int64_t count, int64_t R, const T* vectors, T* dots, T* squares,
                              const T* next, int64_t D) {
  for_heads<T>(R, [&](int64_t r, auto group) {
    const auto dot = [&](auto with_squares) {
      dot_group_of_slots<T, group, with_squares>(rows, ld, count, vectors + r * ld, dots + r * tile, squares,
                                                 r == 0 ? next : nullptr, D);
    };
    if (r == 0 && squares != nullptr) dot(std::true_type());
    else dot(std::false_type());
  });
}

}  // namespace
}  // namespace mann_fast

// The links of a Differentiable Neural Computer for one sample, row by row: updated and multiplied by the read weights of all heads in
// one traversal, forward and backward; and the sharpening of what comes of it.
#pragma once
#include "dnc_sizes.h"

namespace mann_fast {
namespace {

// The vector with 0 in one lane, whatever was there.
template <class T>
inline Vec<T> without_lane(Vec<T> v, int64_t lane) {
  IntVec<T> index{};
  for (int l = 0; l < width<T>; ++l) index[l] = l;
  return index == static_cast<Int<T>>(lane) ? Vec<T>{} : v;
}

// Calls body(j, whether the diagonal is there) for vectors j of a row whose diagonal is in the vector at `block`.
template <class T, class Body>
inline __attribute__((always_inline)) void along_row(int64_t ld, int64_t block, Body body) {
  for (int64_t j = 0; j < block; j += width<T>) body(j, std::false_type());
  body(block, std::true_type());
  for (int64_t j = block + width<T>; j < ld; j += width<T>) body(j, std::false_type());
}

// So many updates of each link while it is in a register: (1 - w[i] - w[j]) * links[i, j] + w[i] * precedence[j], 0 where i = j.
// weights and precedences: a row for each step. The links after a step are `stride` after those of the step before; with 0 only
// the last ones are stored, and may be where they came from.
template <class T>
void update_links(const DncSizes<T>& n, int64_t steps, const T* weights, const T* precedences, const T* from, T* to,
                  int64_t stride) {
  const int64_t ld = n.ld;
  for (int64_t i = 0; i < ld; ++i) {
    const int64_t block = i / width<T> * width<T>;
    along_row<T>(ld, block, [&](int64_t j, auto diagonal) __attribute__((always_inline)) {
      Vec<T> link = load(from + i * ld + j);
      for (int64_t step = 0; step < steps; ++step) {
        const T *row = weights + step * ld, *precedence = precedences + step * ld;
        link = link * ((T(1) - load(row + j)) - row[i]) + load(precedence + j) * row[i];
        if constexpr (decltype(diagonal)::value) link = without_lane<T>(link, i - block);
        if (stride != 0 || step + 1 == steps) store(to + step * stride + i * ld + j, link);
      }
    });
  }
}

// One traversal for HEADS heads: the update above in place where UPDATE, then forward[r][i] = sum over j of links[i, j]
// read_weights[r][j] and backward[r][j] = sum over i of links[i, j] read_weights[r][i]. Rows of directions are 2 ld apart.
template <class T, int HEADS, bool UPDATE>
void follow_links(const DncSizes<T>& n, const T* weights, const T* precedence, const T* read_weights, T* links, T* backward,
                  T* forward) {
  constexpr int W = width<T>, ROWS = vector_registers == 32 ? 4 : 2;
  const int64_t ld = n.ld;
  for (int r = 0; r < HEADS; ++r) std::memset(backward + 2 * r * ld, 0, ld * sizeof(T));
  for (int64_t block = 0; block < ld; block += W) {
    Vec<T> parts[HEADS][W];  // of each row, whose lanes are yet to be added
    for (int64_t row = 0; row < W; row += ROWS) {
      const int64_t i = block + row;
      Vec<T> sums[ROWS][HEADS];
      for (int g = 0; g < ROWS; ++g)
        for (int r = 0; r < HEADS; ++r) sums[g][r] = Vec<T>{};
      along_row<T>(ld, block, [&](int64_t j, auto diagonal) __attribute__((always_inline)) {
        const Vec<T> left = T(1) - load(weights + j), before = load(precedence + j);
        Vec<T> link[ROWS];
        for (int g = 0; g < ROWS; ++g) {
          T* place = links + (i + g) * ld + j;
          link[g] = load(place);
          if constexpr (UPDATE) {
            link[g] = link[g] * (left - weights[i + g]) + before * weights[i + g];
            if constexpr (decltype(diagonal)::value) link[g] = without_lane<T>(link[g], row + g);
            store(place, link[g]);
          }
        }
        for (int r = 0; r < HEADS; ++r) {
          const Vec<T> read = load(read_weights + r * ld + j);
          Vec<T> column = load(backward + 2 * r * ld + j);
          for (int g = 0; g < ROWS; ++g) {
            sums[g][r] += link[g] * read;
            column += link[g] * read_weights[r * ld + i + g];
          }
          store(backward + 2 * r * ld + j, column);
        }
      });
      for (int g = 0; g < ROWS; ++g)
        for (int r = 0; r < HEADS; ++r) parts[r][row + g] = sums[g][r];
    }
    for (int r = 0; r < HEADS; ++r) store(forward + 2 * r * ld + block, sum_lanes<T>(parts[r]));
  }
}

// directions [R][2][ld]: backward and forward.
template <class T>
void follow_links(const DncSizes<T>& n, const T* weights, const T* precedence, const T* read_weights, T* links, T* directions) {
  for_heads<T>(n.R, [&](int64_t first, auto group) {
    constexpr int HEADS = decltype(group)::value;
    const T* read = read_weights + first * n.ld;
    T *backward = directions + 2 * first * n.ld, *forward = backward + n.ld;
    if (first == 0) follow_links<T, HEADS, true>(n, weights, precedence, read, links, backward, forward);
    else follow_links<T, HEADS, false>(n, weights, precedence, read, links, backward, forward);
  });
}

constexpr double link_floor = 1e-6;  // added to a direction before it is sharpened

// shares = (direction + floor)^exponent over their sum, through logarithms; logs = logarithm less that of the largest.
template <class T>
void sharpen(const DncSizes<T>& n, const T* direction, T exponent, T* logs, T* shares) {
  const T infinity = std::numeric_limits<T>::infinity();
  const Vec<T> none = splat<T>(std::numeric_limits<T>::quiet_NaN());
  for (int64_t i = 0; i < n.ld; i += width<T>) {
    const Vec<T> d = load(direction + i) + T(link_floor);
    const Vec<T> usable = d >= std::numeric_limits<T>::min() ? d : none, logarithm = log_positive(usable);
    store(logs + i, usable < infinity ? logarithm : none);
  }
  for (int64_t i = n.N; i < n.ld; ++i) logs[i] = -infinity;
  Vec<T> most = splat<T>(-infinity), total{};
  for (int64_t i = 0; i < n.ld; i += width<T>) most = load(logs + i) > most ? load(logs + i) : most;
  const T maximum = maximum_lane<T>(most);
  for (int64_t i = n.N; i < n.ld; ++i) logs[i] = maximum;  // no infinity is multiplied
  for (int64_t i = 0; i < n.ld; i += width<T>) {
    const Vec<T> relative = load(logs + i) - maximum;
    store(logs + i, relative);
    store(shares + i, exp_nonpositive(relative * exponent));
  }
  for (int64_t i = n.N; i < n.ld; ++i) shares[i] = 0;
  for (int64_t i = 0; i < n.ld; i += width<T>) total += load(shares + i);
  scale_slots(shares, n.ld, T(1) / sum_lanes<T>(total));
}

// Back through sharpen, which logs and shares have gone through again: grad, of the shares, becomes that of the direction.
// Returns that of the exponent.
template <class T>
T sharpen_backward(const DncSizes<T>& n, const T* direction, T exponent, const T* logs, const T* shares, T* grad) {
  const T mean = dot_rows(shares, static_cast<const T*>(grad), n.ld);
  Vec<T> of_exponent{};
  for (int64_t i = 0; i < n.ld; i += width<T>) {
    const Vec<T> of_score = load(shares + i) * (load(grad + i) - mean);
    of_exponent += of_score * load(logs + i);
    store(grad + i, of_score * exponent / (load(direction + i) + T(link_floor)));
  }
  return sum_lanes<T>(of_exponent);
}

// Back through the links for HEADS heads, in one traversal. `across` and `down` are gradients of backward[r][j] and forward[r][i]
// up to factors that are in of_across and of_down instead: grad_links += sum over r of of_across[r][i] across[r][j] + down[r][i]
// of_down[r][j]. Results: by_row[r][i] = sum over j of links[i, j] across[r][j], by_column[r][j] = sum over i of links[i, j]
// down[r][i], of the links after the step, made again from those before. LAST: grad_links becomes that of the links before, and
// the gradients of the write weights and of the precedence before are added.
template <class T, int HEADS, bool LAST>
void follow_back(const DncSizes<T>& n, const T* weights, const T* precedence, const T* links, const T* across, const T* down,
                 const T* of_across, const T* of_down, T* grad_links, T* by_row, T* by_column, T* grad_weights,
                 T* grad_precedence, T* columns) {
  constexpr int W = width<T>, ROWS = vector_registers == 32 ? 2 : 1;
  const int64_t ld = n.ld;
  std::memset(by_column, 0, HEADS * ld * sizeof(T));
  if (LAST) std::memset(columns, 0, ld * sizeof(T));
  for (int64_t block = 0; block < ld; block += W) {
    Vec<T> parts[HEADS][W], own[W];
    for (int64_t row = 0; row < W; row += ROWS) {
      const int64_t i = block + row;
      Vec<T> sums[ROWS][HEADS], of_weight[ROWS];
      for (int g = 0; g < ROWS; ++g) {
        of_weight[g] = Vec<T>{};
        for (int r = 0; r < HEADS; ++r) sums[g][r] = Vec<T>{};
      }
      along_row<T>(ld, block, [&](int64_t j, auto diagonal) __attribute__((always_inline)) {
        const Vec<T> left = T(1) - load(weights + j), before = load(precedence + j);
        Vec<T> old[ROWS], link[ROWS], grad[ROWS];
        for (int g = 0; g < ROWS; ++g) {
          old[g] = load(links + (i + g) * ld + j);
          grad[g] = load(grad_links + (i + g) * ld + j);
          link[g] = old[g] * (left - weights[i + g]) + before * weights[i + g];
          if constexpr (decltype(diagonal)::value) {
            old[g] = without_lane<T>(old[g], row + g);
            link[g] = without_lane<T>(link[g], row + g);
          }
        }
        for (int r = 0; r < HEADS; ++r) {
          const Vec<T> in_row = load(across + r * ld + j), of_column = load(of_down + r * ld + j);
          Vec<T> column = load(by_column + r * ld + j);
          for (int g = 0; g < ROWS; ++g) {
            grad[g] += in_row * of_across[r * ld + i + g];
            grad[g] += of_column * down[r * ld + i + g];
            sums[g][r] += link[g] * in_row;
            column += link[g] * down[r * ld + i + g];
          }
          store(by_column + r * ld + j, column);
        }
        if constexpr (LAST) {
          Vec<T> column = load(columns + j), of_before = load(grad_precedence + j);
          for (int g = 0; g < ROWS; ++g) {
            if constexpr (decltype(diagonal)::value) grad[g] = without_lane<T>(grad[g], row + g);
            const Vec<T> lost = grad[g] * old[g];
            column += lost;
            of_before += grad[g] * weights[i + g];
            of_weight[g] += grad[g] * before - lost;
            grad[g] *= left - weights[i + g];
          }
          store(columns + j, column);
          store(grad_precedence + j, of_before);
        }
        for (int g = 0; g < ROWS; ++g) store(grad_links + (i + g) * ld + j, grad[g]);
      });
      for (int g = 0; g < ROWS; ++g) {
        own[row + g] = of_weight[g];
        for (int r = 0; r < HEADS; ++r) parts[r][row + g] = sums[g][r];
      }
    }
    for (int r = 0; r < HEADS; ++r) store(by_row + r * ld + block, sum_lanes<T>(parts[r]));
    if (LAST) store(grad_weights + block, load(grad_weights + block) + sum_lanes<T>(own));
  }
  if (LAST)
    for (int64_t j = 0; j < ld; j += W) store(grad_weights + j, load(grad_weights + j) - load(columns + j));
}

}  // namespace
}  // namespace mann_fast

// The inner loops that all memory kernels are made of. A block of memory is held transposed, [D][ld] with the slots in
// lanes: similarity, norms, softmax and writes then need no communication between lanes, and every slot goes through the
// same instructions, so that equal slots keep equal bits. Only the weighted read sums over lanes.
#pragma once
#include <limits>

#include "../include/half.h"
#include "simd.h"
#include "tasks.h"

namespace mann_fast {
namespace {

template <class T, class Body>
inline void for_heads(int64_t heads, Body body) {  // in groups of at most 4, whose size the body gets as a type
  int64_t first = 0;
  for (; first + 4 <= heads; first += 4) body(first, std::integral_constant<int, 4>());
  if (heads - first == 3) body(first, std::integral_constant<int, 3>());
  if (heads - first == 2) body(first, std::integral_constant<int, 2>());
  if (heads - first == 1) body(first, std::integral_constant<int, 1>());
}

// ---- layout and dtype -------------------------------------------------------------------------------------------

// Numbers [d, D) of `width` rows, as columns from squares of LANES x LANES; returns the first number that is left over.
template <class T, int LANES>
inline int64_t transpose_rows(const T* rows, int64_t D, int64_t d, T* block, int64_t ld) {
  if constexpr (LANES >= 2) {
    for (; d + LANES <= D; d += LANES)
      for (int j = 0; j < width<T>; j += LANES) transpose_square<T, LANES>(rows + j * D + d, D, block + d * ld + j, ld);
    return transpose_rows<T, LANES / 2>(rows, D, d, block, ld);
  }
  return d;
}
template <class T, int LANES>
inline int64_t transpose_columns(const T* block, int64_t ld, T* rows, int64_t D, int64_t d) {
  if constexpr (LANES >= 2) {
    for (; d + LANES <= D; d += LANES)
      for (int j = 0; j < width<T>; j += LANES) transpose_square<T, LANES>(block + d * ld + j, ld, rows + j * D + d, D);
    return transpose_columns<T, LANES / 2>(block, ld, rows, D, d);
  }
  return d;
}

// Slots [lo, hi) of memory [N][D] into block [D][ld]; lanes from N on become 0. lo and hi are multiples of slot_padding.
template <class T>
inline void load_slots(const T* memory, int64_t N, int64_t D, int64_t lo, int64_t hi, T* block, int64_t ld) {
  constexpr int W = width<T>;
  for (int64_t i = lo; i < hi; i += W) {
    const int64_t slots = N - i < W ? (N > i ? N - i : 0) : W;
    int64_t d = slots == W ? transpose_rows<T, W>(memory + i * D, D, 0, block + i - lo, ld) : 0;
    for (; d < D; ++d) {
      T* lanes = block + d * ld + i - lo;
      for (int64_t j = 0; j < slots; ++j) lanes[j] = memory[(i + j) * D + d];
      for (int64_t j = slots; j < W; ++j) lanes[j] = 0;
    }
  }
}

template <class T>
inline void store_slots(const T* block, int64_t ld, int64_t N, int64_t D, int64_t lo, int64_t hi, T* memory) {
  constexpr int W = width<T>;
  for (int64_t i = lo; i < hi; i += W) {
    const int64_t slots = N - i < W ? (N > i ? N - i : 0) : W;
    int64_t d = slots == W ? transpose_columns<T, W>(block + i - lo, ld, memory + i * D, D, 0) : 0;
    for (; d < D; ++d)
      for (int64_t j = 0; j < slots; ++j) memory[(i + j) * D + d] = block[d * ld + i - lo + j];
  }
}

// Rows [rows][N] to and from rows [rows][ld], the padding 0; slots [lo, hi).
template <class T>
inline void load_rows(const T* from, int64_t rows, int64_t N, int64_t lo, int64_t hi, T* to, int64_t ld) {
  const int64_t end = hi < N ? hi : N;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = lo; i < end; ++i) to[r * ld + i] = from[r * N + i];
    for (int64_t i = end > lo ? end : lo; i < hi; ++i) to[r * ld + i] = 0;
  }
}
// Rows of the weights of a sample that begins anew: 1 at slot 0.
template <class T>
inline void start_rows(int64_t rows, int64_t lo, int64_t hi, T* to, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = lo; i < hi; ++i) to[r * ld + i] = i == 0 ? T(1) : T(0);
}
// The first `valid` slots of rows [rows][N] into rows [rows][tile], then 0 up to `count`.
template <class T>
inline void load_tile_rows(const T* from, int64_t rows, int64_t N, int64_t valid, int64_t count, T* to) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < valid; ++i) to[r * tile + i] = from[r * N + i];
    for (int64_t i = valid; i < count; ++i) to[r * tile + i] = 0;
  }
}
template <class T>
inline void store_rows(const T* from, int64_t ld, int64_t rows, int64_t N, int64_t lo, int64_t hi, T* to) {
  const int64_t end = hi < N ? hi : N;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = lo; i < end; ++i) to[r * N + i] = from[r * ld + i];
}

// Numbers [offset, offset + count) of an array in the dtype of keys, as T: in place where it is T already, else converted
// into buffer.
template <class T>
inline const T* widen(const void* from, Dtype dtype, int64_t offset, int64_t count, T* buffer) {
  if (dtype == Dtype::bfloat16) {
    const uint16_t* half = static_cast<const uint16_t*>(from) + offset;
    for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<T>(from_bfloat16(half[i]));
    return buffer;
  }
  if (dtype == Dtype::float16) {
    const uint16_t* half = static_cast<const uint16_t*>(from) + offset;
    for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<T>(from_float16(half[i]));
    return buffer;
  }
  return static_cast<const T*>(from) + offset;
}

template <class T>
inline void narrow(const T* from, int64_t count, void* to, Dtype dtype, int64_t offset) {
  if (dtype == Dtype::bfloat16) {
    uint16_t* half = static_cast<uint16_t*>(to) + offset;
    for (int64_t i = 0; i < count; ++i) half[i] = to_bfloat16(static_cast<float>(from[i]));
  } else if (dtype == Dtype::float16) {
    uint16_t* half = static_cast<uint16_t*>(to) + offset;
    for (int64_t i = 0; i < count; ++i) half[i] = to_float16(static_cast<float>(from[i]));
  } else {
    std::memcpy(static_cast<T*>(to) + offset, from, count * sizeof(T));
  }
}

// 0 to `count` numbers for each of the steps [from, T) of sample b: what a sample that has ended leaves of an array
// [T, B, count], which may be null.
template <class T>
inline void clear_steps(void* to, Dtype dtype, int64_t from, int64_t steps, int64_t B, int64_t b, int64_t count) {
  const bool half = dtype == Dtype::bfloat16 || dtype == Dtype::float16;
  const int64_t size = count * (half ? 2 : static_cast<int64_t>(sizeof(T)));
  if (to == nullptr) return;
  for (int64_t t = from; t < steps; ++t) std::memset(static_cast<char*>(to) + (t * B + b) * size, 0, size);
}

// grad_start [N, D] += the gradient [D][ld] of a memory that began anew, which becomes 0; slots [lo, hi).
template <class T>
inline void give_to_start(T* grad, int64_t ld, int64_t N, int64_t D, int64_t lo, int64_t hi, T* grad_start) {
  const int64_t end = hi < N ? hi : N;
  for (int64_t d = 0; d < D; ++d) {
    for (int64_t i = lo; i < end; ++i) grad_start[i * D + d] += grad[d * ld + i];
    for (int64_t i = lo; i < hi; ++i) grad[d * ld + i] = 0;
  }
}

// The steps of a sample lie B R D numbers apart: too far for the processor to see them coming by itself.
template <class T>
inline void prefetch(const T* from, int64_t count) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += line) __builtin_prefetch(from + i);
}

// The same, but into the second cache: what is at hand keeps the first.
template <class T>
inline void prefetch_far(const T* from, int64_t count) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += line) __builtin_prefetch(from + i, 0, 2);
}

// ---- the three passes over a block ------------------------------------------------------------------------------

// For slots [0, count): to[d][i] = from[d][i] + sum over WRITE heads of weights[r][i] * vectors[r][d], and on the result
// dots[r][i] = sum over d of keys[r][d] * to[d][i] for DOT heads; squares[i] = sum over d of to[d][i]^2 unless null.
// Without WRITE heads nothing is stored. from and to may be the same.
template <class T, int WRITE, int DOT, int U, bool SQUARES>
inline void write_and_dot_columns(const T* from, T* to, int64_t ld, int64_t D, const T* weights, const T* vectors,
                                  const T* keys, T* dots, T* squares, int64_t i) {
  constexpr int W = width<T>;
  Vec<T> weight[WRITE > 0 ? WRITE : 1][U], dot[DOT > 0 ? DOT : 1][U], square[U];
  for (int u = 0; u < U; ++u) {
    for (int r = 0; r < WRITE; ++r) weight[r][u] = load(weights + r * ld + i + u * W);
    for (int r = 0; r < DOT; ++r) dot[r][u] = Vec<T>{};
    square[u] = Vec<T>{};
  }
  const T* source = from + i;
  T* target = to + i;
  for (int64_t d = 0; d < D; ++d, source += ld, target += ld) {
    for (int u = 0; u < U; ++u) {
      Vec<T> m = load(source + u * W);
      for (int r = 0; r < WRITE; ++r) m += weight[r][u] * vectors[r * D + d];
      if (WRITE > 0) store(target + u * W, m);
      for (int r = 0; r < DOT; ++r) dot[r][u] += m * keys[r * D + d];
      if (SQUARES) square[u] += m * m;
    }
  }
  for (int u = 0; u < U; ++u) {
    for (int r = 0; r < DOT; ++r) store(dots + r * ld + i + u * W, dot[r][u]);
    if (SQUARES) store(squares + i + u * W, square[u]);
  }
}

template <class T, int WRITE, int DOT, bool SQUARES>
inline void write_and_dot_heads(const T* from, T* to, int64_t ld, int64_t count, int64_t D, const T* weights, const T* vectors,
                                const T* keys, T* dots, T* squares) {
  constexpr int U = 2 * (WRITE + DOT + 1) + 4 <= vector_registers ? 2 : 1;
  int64_t i = 0;
  for (; i + U * width<T> <= count; i += U * width<T>)
    write_and_dot_columns<T, WRITE, DOT, U, SQUARES>(from, to, ld, D, weights, vectors, keys, dots, squares, i);
  for (; i < count; i += width<T>)
    write_and_dot_columns<T, WRITE, DOT, 1, SQUARES>(from, to, ld, D, weights, vectors, keys, dots, squares, i);
}

template <class T>
inline void write_slots(const T* from, T* to, int64_t ld, int64_t count, int64_t D, int64_t R, const T* weights,
                        const T* vectors) {
  for_heads<T>(R, [&](int64_t r, auto group) {
    write_and_dot_heads<T, group, 0, false>(r == 0 ? from : to, to, ld, count, D, weights + r * ld, vectors + r * D,
                                            static_cast<const T*>(nullptr), static_cast<T*>(nullptr), static_cast<T*>(nullptr));
  });
}

template <class T>
inline void dot_slots(const T* block, int64_t ld, int64_t count, int64_t D, int64_t R, const T* keys, T* dots) {
  for_heads<T>(R, [&](int64_t r, auto group) {
    write_and_dot_heads<T, 0, group, false>(block, static_cast<T*>(nullptr), ld, count, D, static_cast<const T*>(nullptr),
                                            static_cast<const T*>(nullptr), keys + r * D, dots + r * ld,
                                            static_cast<T*>(nullptr));
  });
}

template <class T>
inline void dot_and_square_slots(const T* block, int64_t ld, int64_t count, int64_t D, int64_t R, const T* keys, T* dots,
                                 T* squares) {
  for_heads<T>(R, [&](int64_t r, auto group) {
    const auto compare = [&](auto with_squares) {
      write_and_dot_heads<T, 0, group, with_squares>(block, static_cast<T*>(nullptr), ld, count, D,
                                                     static_cast<const T*>(nullptr), static_cast<const T*>(nullptr),
                                                     keys + r * D, dots + r * ld, squares);
    };
    if (r == 0) compare(std::true_type());
    else compare(std::false_type());
  });
}

// Write, then similarity on what was written: one pass where the heads fit one group, else one per group and kind.
template <class T>
inline void write_dot_and_square_slots(const T* from, T* to, int64_t ld, int64_t count, int64_t D, int64_t R, const T* weights,
                                       const T* vectors, const T* keys, T* dots, T* squares) {
  if (R > 4) {
    write_slots(from, to, ld, count, D, R, weights, vectors);
    dot_and_square_slots(static_cast<const T*>(to), ld, count, D, R, keys, dots, squares);
    return;
  }
  for_heads<T>(R, [&](int64_t, auto group) {
    write_and_dot_heads<T, group, group, true>(from, to, ld, count, D, weights, vectors, keys, dots, squares);
  });
}

// sums[r][d] = (or +=) sum over slots [0, count) of weights[r][i] * block[d][i].
template <class T, int HEADS, int ROWS>
inline void weighted_sum_rows(const T* block, int64_t ld, int64_t count, const T* weights, T (&sums)[HEADS * ROWS]) {
  constexpr int W = width<T>, COUNT = HEADS * ROWS;
  Vec<T> sum[COUNT];
  for (int j = 0; j < COUNT; ++j) sum[j] = Vec<T>{};
  for (int64_t i = 0; i < count; i += W) {
    Vec<T> m[ROWS];
    for (int d = 0; d < ROWS; ++d) m[d] = load(block + d * ld + i);
    for (int r = 0; r < HEADS; ++r) {
      const Vec<T> weight = load(weights + r * ld + i);
      for (int d = 0; d < ROWS; ++d) sum[r * ROWS + d] += weight * m[d];
    }
  }
  if constexpr (COUNT % W == 0) {
    for (int j = 0; j < COUNT; j += W) {
      Vec<T> part[W];
      for (int lane = 0; lane < W; ++lane) part[lane] = sum[j + lane];
      store(sums + j, sum_lanes<T>(part));
    }
  } else {
    for (int j = 0; j < COUNT; ++j) sums[j] = sum_lanes<T>(sum[j]);
  }
}

template <class T, bool ADD>
inline void weighted_sums(const T* block, int64_t ld, int64_t count, int64_t D, int64_t R, const T* weights, T* sums) {
  constexpr int ROWS = vector_registers == 32 ? 4 : 2;
  for_heads<T>(R, [&](int64_t first, auto group) {
    constexpr int HEADS = decltype(group)::value;
    const T* weight = weights + first * ld;
    T* sum = sums + first * D;
    int64_t d = 0;
    for (; d + ROWS <= D; d += ROWS) {
      T part[HEADS * ROWS];
      weighted_sum_rows<T, HEADS, ROWS>(block + d * ld, ld, count, weight, part);
      for (int r = 0; r < HEADS; ++r)
        for (int j = 0; j < ROWS; ++j) sum[r * D + d + j] = part[r * ROWS + j] + (ADD ? sum[r * D + d + j] : T(0));
    }
    for (; d < D; ++d) {
      T part[HEADS];
      weighted_sum_rows<T, HEADS, 1>(block + d * ld, ld, count, weight, part);
      for (int r = 0; r < HEADS; ++r) sum[r * D + d] = part[r] + (ADD ? sum[r * D + d] : T(0));
    }
  });
}

// The memory's gradient, one pass: grad[d][i] += sum over heads of weights[r][i] * grad_reads[r][d] (READ) + of
// grad_dots[r][i] * keys[r][d] (DOT) + 2 grad_squares[i] * block[d][i] (DOT, where grad_squares is not null). DOTS with the
// result: out[r][i] = sum over d of vectors[r][d] * grad[d][i], unless out is null.
template <class T, int HEADS, bool READ, bool DOT, bool SQUARES, bool OUT>
inline void add_gradient_columns(const T* block, T* grad, int64_t ld, int64_t count, int64_t D, const T* weights,
                                 const T* grad_reads, const T* grad_dots, const T* keys, const T* grad_squares,
                                 const T* vectors, T* out) {
  for (int64_t i = 0; i < count; i += width<T>) {
    Vec<T> weight[HEADS], grad_dot[HEADS], sum[HEADS], grad_square{};
    for (int r = 0; r < HEADS; ++r) {
      if (READ) weight[r] = load(weights + r * ld + i);
      if (DOT) grad_dot[r] = load(grad_dots + r * ld + i);
      sum[r] = Vec<T>{};
    }
    if (SQUARES) grad_square = load(grad_squares + i) * T(2);
    T* target = grad + i;
    const T* source = block + i;
    for (int64_t d = 0; d < D; ++d, target += ld, source += ld) {
      Vec<T> g = load(target);
      for (int r = 0; r < HEADS; ++r) {
        if (READ) g += weight[r] * grad_reads[r * D + d];
        if (DOT) g += grad_dot[r] * keys[r * D + d];
      }
      if (SQUARES) g += grad_square * load(source);
      store(target, g);
      if (OUT)
        for (int r = 0; r < HEADS; ++r) sum[r] += g * vectors[r * D + d];
    }
    if (OUT)
      for (int r = 0; r < HEADS; ++r) store(out + r * ld + i, sum[r]);
  }
}

// The gradient that reads (READ) and similarities (DOT) send to the memory they addressed.
template <class T, bool READ, bool DOT>
inline void add_gradient(const T* block, T* grad, int64_t ld, int64_t count, int64_t D, int64_t R, const T* weights,
                         const T* grad_reads, const T* grad_dots, const T* keys, const T* grad_squares) {
  for_heads<T>(R, [&](int64_t r, auto group) {
    constexpr int HEADS = decltype(group)::value;
    const T* none = nullptr;
    const auto add = [&](auto squares) {
      add_gradient_columns<T, HEADS, READ, DOT, decltype(squares)::value, false>(
          block, grad, ld, count, D, READ ? weights + r * ld : none, READ ? grad_reads + r * D : none,
          DOT ? grad_dots + r * ld : none, DOT ? keys + r * D : none, grad_squares, none, static_cast<T*>(nullptr));
    };
    if (DOT && r == 0 && grad_squares != nullptr) add(std::true_type());
    else add(std::false_type());
  });
}

// The same, then out[r][i] = sum over d of vectors[r][d] * grad[d][i]: one pass where the heads fit one group.
template <class T, bool READ, bool DOT>
inline void add_gradient_and_dot(const T* block, T* grad, int64_t ld, int64_t count, int64_t D, int64_t R, const T* weights,
                                 const T* grad_reads, const T* grad_dots, const T* keys, const T* grad_squares,
                                 const T* vectors, T* out) {
  if (R > 4) {
    add_gradient<T, READ, DOT>(block, grad, ld, count, D, R, weights, grad_reads, grad_dots, keys, grad_squares);
    dot_slots(static_cast<const T*>(grad), ld, count, D, R, vectors, out);
    return;
  }
  for_heads<T>(R, [&](int64_t, auto group) {
    add_gradient_columns<T, decltype(group)::value, READ, DOT, DOT, true>(block, grad, ld, count, D, weights, grad_reads,
                                                                          grad_dots, keys, grad_squares, vectors, out);
  });
}

// ---- one row of slots -------------------------------------------------------------------------------------------

// Similarity of one head: scores[i] = beta * dots[i] * q[i] with q[i] = 1 / sqrt(key_square * squares[i] + eps); returns the
// maximum. Slots from `valid` on are padding and get -inf. q may be null.
template <class T>
inline T score_slots(const T* dots, const T* squares, int64_t count, int64_t valid, T key_square, T beta, T eps, T* q,
                     T* scores) {
  const T infinity = std::numeric_limits<T>::infinity();
  for (int64_t i = 0; i < count; i += width<T>) {
    const Vec<T> inverse = inverse_root<T>(load(squares + i) * key_square + eps);
    if (q != nullptr) store(q + i, inverse);
    store(scores + i, load(dots + i) * inverse * beta);
  }
  for (int64_t i = valid; i < count; ++i) scores[i] = -infinity;
  Vec<T> maximum = splat<T>(-infinity);
  for (int64_t i = 0; i < count; i += width<T>) {
    const Vec<T> c = load(scores + i);
    maximum = c > maximum ? c : maximum;
  }
  return maximum_lane<T>(maximum);
}

// scores[i] = exp(scores[i] - maximum), in place; returns the sum.
template <class T>
inline T exp_slots(T* scores, int64_t count, T maximum) {
  Vec<T> total{};
  for (int64_t i = 0; i < count; i += width<T>) {
    const Vec<T> e = exp_nonpositive(load(scores + i) - maximum);
    store(scores + i, e);
    total += e;
  }
  return sum_lanes<T>(total);
}

template <class T>
inline T greatest_of_row(const T* row, int64_t count) {  // at least 0; a NaN loses
  Vec<T> greatest{};
  for (int64_t i = 0; i < count; i += width<T>) {
    const Vec<T> x = load(row + i);
    greatest = x > greatest ? x : greatest;
  }
  return maximum_lane<T>(greatest);
}

template <class T>
inline void scale_slots(T* row, int64_t count, T factor) {
  for (int64_t i = 0; i < count; i += width<T>) store(row + i, load(row + i) * factor);
}

template <class T>
inline T dot_rows(const T* a, const T* b, int64_t count) {
  Vec<T> total{};
  for (int64_t i = 0; i < count; i += width<T>) total += load(a + i) * load(b + i);
  return sum_lanes<T>(total);
}

// The gradient of one head's similarity, from w = softmax and g = dL/dw: in place of g comes dL/d(dot); dL/d(square of a
// slot's norm) is added to grad_squares; dL/d(beta) and dL/d(square of the key's norm) are returned.
template <class T>
struct ScoreGradient {
  T beta, key_square;
};
template <class T>
inline ScoreGradient<T> score_gradient(const T* w, const T* dots, const T* q, const T* squares, int64_t count, T delta,
                                       T key_square, T beta, T* g, T* grad_squares) {
  Vec<T> grad_beta{}, grad_key_square{};
  for (int64_t i = 0; i < count; i += width<T>) {
    const Vec<T> inverse = load(q + i), dot = load(dots + i);
    const Vec<T> grad_score = load(w + i) * (load(g + i) - delta);
    const Vec<T> scaled = grad_score * inverse;
    store(g + i, scaled * beta);
    const Vec<T> grad_cosine = scaled * dot;  // times cosine: dL/d(beta); times beta * cosine: dL/d(score) * score
    grad_beta += grad_cosine;
    const Vec<T> grad_norms = grad_cosine * (T(-0.5) * beta) * (inverse * inverse);
    grad_key_square += grad_norms * load(squares + i);
    store(grad_squares + i, load(grad_squares + i) + grad_norms * key_square);
  }
  return {sum_lanes<T>(grad_beta), sum_lanes<T>(grad_key_square)};
}

template <class T>
inline T square_sum(const T* vector, int64_t count) {
  Vec<T> sum{};
  int64_t d = 0;
  for (; d + width<T> <= count; d += width<T>) sum += load(vector + d) * load(vector + d);
  T total = 0;
  for (; d < count; ++d) total += vector[d] * vector[d];
  return total + sum_lanes<T>(sum);
}

// sigmoid(x) and sigmoid(-x), both to full relative precision.
template <class T>
inline void sigmoids(T x, T* positive, T* negative) {
  const T e = std::exp(x > 0 ? -x : x), larger = T(1) / (T(1) + e), smaller = e * larger;
  *positive = x > 0 ? larger : smaller;
  *negative = x > 0 ? smaller : larger;
}

}  // namespace
}  // namespace mann_fast

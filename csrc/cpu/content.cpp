// content_read: forward in one pass over the memory in tiles of slots, with an online softmax as in flash attention (Dao et
// al. 2022), backward in two. The weights are made from the similarities when the maximum of all is known, so that equal
// slots get equal bits whatever tile they fall in.
#include "rows.h"

namespace mann_fast {
namespace MANN_FAST_ISA {
namespace {

// Calls body(d, chunks) for the columns [0, ld) in as many vectors at once, a type, as there are registers for.
template <class T, int MOST, class Body>
inline void for_columns(int64_t ld, Body body) {
  int64_t d = 0;
  for (; d + MOST * width<T> <= ld; d += MOST * width<T>) body(d, std::integral_constant<int, MOST>());
  if (MOST > 2 && d + 2 * width<T> <= ld) {
    body(d, std::integral_constant<int, 2>());
    d += 2 * width<T>;
  }
  for (; d < ld; d += width<T>) body(d, std::integral_constant<int, 1>());
}

// sums[r][d] += sum over slots [0, count) of weights[r][i] * rows[i][d], for sums [R][ld].
template <class T>
inline void add_weighted_rows(const T* rows, int64_t ld, int64_t count, int64_t R, const T* weights, T* sums) {
  constexpr int W = width<T>;
  for_heads<T>(R, [&](int64_t first, auto group) {
    constexpr int HEADS = decltype(group)::value;
    for_columns<T, vector_registers == 32 ? 4 : 2>(ld, [&](int64_t d, auto chunks) {
      constexpr int C = decltype(chunks)::value;
      Vec<T> sum[HEADS][C];
      for (int r = 0; r < HEADS; ++r)
        for (int c = 0; c < C; ++c) sum[r][c] = Vec<T>{};
      for (int64_t i = 0; i < count; ++i) {
        Vec<T> m[C];
        for (int c = 0; c < C; ++c) m[c] = load(rows + i * ld + d + c * W);
        for (int r = 0; r < HEADS; ++r)
          for (int c = 0; c < C; ++c) sum[r][c] += m[c] * weights[(first + r) * tile + i];
      }
      for (int r = 0; r < HEADS; ++r)
        for (int c = 0; c < C; ++c) {
          T* to = sums + (first + r) * ld + d + c * W;
          store(to, load(to) + sum[r][c]);
        }
    });
  });
}

// As below, of HEADS heads and C vectors of columns, to all of which the pointers point; what other heads made is `so_far`,
// null for the first ones.
template <class T, int HEADS, int C, bool READ>
inline void gradient_of_columns(const T* rows, int64_t ld, int64_t count, const T* weights, const T* grad_reads,
                                const T* grad_dots, const T* keys, const T* grad_squares, const T* next, int64_t D,
                                const T* so_far, bool streams, T* to, T* sums) {
  constexpr int W = width<T>;
  Vec<T> grad_read[HEADS][C], key[HEADS][C], grad_key[HEADS][C];
#pragma GCC unroll 4  // or g++ stores all of grad_key at every slot
  for (int r = 0; r < HEADS; ++r)
    for (int c = 0; c < C; ++c) {
      if (READ) grad_read[r][c] = load(grad_reads + r * ld + c * W);
      key[r][c] = load(keys + r * ld + c * W);
      grad_key[r][c] = Vec<T>{};
    }
  for (int64_t i = 0; i < count; ++i, rows += ld, to += ld) {
    if (next) prefetch_far(next + i * D, C * W);
    Vec<T> m[C], sum[C];
    for (int c = 0; c < C; ++c) {
      m[c] = load(rows + c * W);
      sum[c] = so_far ? load(so_far + i * ld + c * W) : m[c] * (2 * grad_squares[i]);
    }
    for (int r = 0; r < HEADS; ++r) {
      const Vec<T> grad_dot = splat(grad_dots[r * tile + i]);
      for (int c = 0; c < C; ++c) {
        if (READ) sum[c] += grad_read[r][c] * weights[r * tile + i];
        sum[c] += key[r][c] * grad_dot;
        grad_key[r][c] += m[c] * grad_dot;
      }
    }
    if (streams)
      for (int c = 0; c < C; ++c) stream(to + c * W, sum[c]);
    else
      for (int c = 0; c < C; ++c) store(to + c * W, sum[c]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < HEADS; ++r)
    for (int c = 0; c < C; ++c) store(sums + r * ld + c * W, load(sums + r * ld + c * W) + grad_key[r][c]);
}

// The gradient of slots [0, count): to[i][d] = sum over heads of weights[r][i] * grad_reads[r][d] (READ) + of grad_dots[r][i] *
// keys[r][d], + 2 grad_squares[i] * rows[i][d]; and that of the keys, sums[r][d] += sum over slots of grad_dots[r][i] *
// rows[i][d], these slots' sum first, as a sum of all slots one by one would lose digits. Vectors and sums are [R][ld]. The slots
// that come `next` are sent for as in dot_rows_of_slots. What all heads but the last ones make is in `room`; with `streams` these
// write past the caches.
template <class T, bool READ>
inline void gradient_of_rows(const T* rows, int64_t ld, int64_t count, int64_t R, const T* weights, const T* grad_reads,
                             const T* grad_dots, const T* keys, const T* grad_squares, const T* next, int64_t D, T* room,
                             bool streams, T* to, T* sums) {
  for_heads<T>(R, [&](int64_t r, auto group) {
    constexpr int HEADS = decltype(group)::value;
    const bool last = r + HEADS == R;
    for_columns<T, vector_registers == 32 ? (HEADS > 2 ? 2 : 4) : (HEADS > 1 ? 1 : 2)>(ld, [&](int64_t d, auto chunks) {
      gradient_of_columns<T, HEADS, decltype(chunks)::value, READ>(
          rows + d, ld, count, READ ? weights + r * tile : nullptr, READ ? grad_reads + r * ld + d : nullptr,
          grad_dots + r * tile, keys + r * ld + d, grad_squares, r == 0 && next ? next + d : nullptr, D,
          r == 0 ? nullptr : room + d, last && streams, (last ? to : room) + d, sums + r * ld + d);
    });
  });
}

// A tile of slots from `lo` on: where they lie if they are whole vectors there, else in `room`.
template <class T>
inline const T* rows_of_tile(const T* memory, int64_t D, int64_t lo, int64_t valid, int64_t count, T* room) {
  if (padded<T>(D) == D && valid == count) return memory + lo * D;
  pad_rows(memory + lo * D, valid, D, count, padded<T>(D), room);
  return room;
}

// ---- forward ------------------------------------------------------------------------------------------------------

template <class T>
struct ReadScratch {
  T *rows, *dots, *squares, *key, *padded_key, *sharpness, *sums;
  // What one part of a sample's slots leaves for the others, [R], [R], [R, ld]: relative to the part's own maximum.
  T *maximum, *total, *read;
  ReadScratch(Arena& arena, const ContentRead& a)
      : rows(arena.take<T>(padded<T>(a.D) * tile)), dots(arena.take<T>(a.R * tile)), squares(arena.take<T>(tile)),
        key(arena.take<T>(a.R * a.D)), padded_key(arena.take<T>(a.R * padded<T>(a.D))), sharpness(arena.take<T>(a.R)),
        sums(arena.take<T>(a.R * a.D)), maximum(arena.take<T>(a.R)), total(arena.take<T>(a.R)),
        read(arena.take<T>(a.R * padded<T>(a.D))) {}
};

template <class T>
void read_part(const ContentRead& a, int64_t b, Range slots, ReadScratch<T>& s) {
  const T* memory = static_cast<const T*>(a.memory) + b * a.N * a.D;
  T* weights = static_cast<T*>(a.weights) + b * a.R * a.N;
  const T* key = widen(a.key, a.input, b * a.R * a.D, a.R * a.D, s.key);
  const T* sharpness = a.sharpness ? widen(a.sharpness, a.input, b * a.R, a.R, s.sharpness) : nullptr;
  const int64_t ld = padded<T>(a.D);
  pad_rows(key, a.R, a.D, a.R, ld, s.padded_key);
  for (int64_t r = 0; r < a.R; ++r) {
    s.maximum[r] = -std::numeric_limits<T>::infinity();
    s.total[r] = 0;
  }
  for (int64_t j = 0; j < a.R * ld; ++j) s.read[j] = 0;
  for (int64_t lo = slots.lo; lo < slots.hi; lo += tile) {
    const int64_t end = lo + tile < slots.hi ? lo + tile : slots.hi, valid = end - lo, count = padded_slots(valid);
    const T* rows = rows_of_tile(memory, a.D, lo, valid, count, s.rows);
    dot_rows_of_slots(rows, ld, count, a.R, static_cast<const T*>(s.padded_key), s.dots, s.squares,
                      end < slots.hi ? memory + end * a.D : nullptr, a.D);
    for (int64_t r = 0; r < a.R; ++r) {
      T* row = s.dots + r * tile;
      const T maximum = score_slots<T>(row, s.squares, count, valid, square_sum(key + r * a.D, a.D),
                                       sharpness ? sharpness[r] : T(1), static_cast<T>(a.eps), nullptr, row);
      if (maximum > s.maximum[r]) {  // what was summed so far is relative to a smaller maximum
        const T factor = std::exp(s.maximum[r] - maximum);
        s.total[r] *= factor;
        for (int64_t d = 0; d < ld; ++d) s.read[r * ld + d] *= factor;
        s.maximum[r] = maximum;
      }
      std::memcpy(weights + r * a.N + lo, row, valid * sizeof(T));
      s.total[r] += exp_slots(row, count, s.maximum[r]);
    }
    add_weighted_rows(rows, ld, count, a.R, static_cast<const T*>(s.dots), s.read);
  }
}

// Sum and read of all parts, and the similarities that lie in `weights` made into weights.
template <class T>
void combine_parts(const ContentRead& a, int64_t b, const ReadScratch<T>* parts, int64_t count) {
  const ReadScratch<T>& s = parts[0];
  T* weights = static_cast<T*>(a.weights) + b * a.R * a.N;
  for (int64_t r = 0; r < a.R; ++r) {
    T maximum = parts[0].maximum[r], total = 0;
    for (int64_t p = 1; p < count; ++p) maximum = parts[p].maximum[r] > maximum ? parts[p].maximum[r] : maximum;
    for (int64_t p = 0; p < count; ++p) total += parts[p].total[r] * std::exp(parts[p].maximum[r] - maximum);
    T* read = s.sums + r * a.D;
    for (int64_t d = 0; d < a.D; ++d) read[d] = 0;
    for (int64_t p = 0; p < count; ++p) {
      const T factor = std::exp(parts[p].maximum[r] - maximum) / total;
      for (int64_t d = 0; d < a.D; ++d) read[d] += parts[p].read[r * padded<T>(a.D) + d] * factor;
    }
    const T inverse = T(1) / total;
    for (int64_t lo = 0; lo < a.N; lo += tile) {
      const int64_t valid = a.N - lo < tile ? a.N - lo : tile, count = padded_slots(valid);
      load_tile_rows(weights + r * a.N + lo, 1, a.N, valid, count, s.dots);
      for (int64_t i = 0; i < count; i += width<T>) store(s.dots + i, exp_nonpositive(load(s.dots + i) - maximum) * inverse);
      std::memcpy(weights + r * a.N + lo, s.dots, valid * sizeof(T));
    }
  }
  narrow(s.sums, a.R * a.D, a.read, a.input, b * a.R * a.D);
}

template <class T>
bool content_read(const ContentRead& a, const Parallel& parallel) {
  const int64_t multiply_adds = a.D * (2 * a.R + 1);
  return run_samples_or_slots<ReadScratch<T>>(
      a, parallel, multiply_adds, multiply_adds, [](int64_t, ReadScratch<T>&) {},
      [&](int64_t b, Range slots, ReadScratch<T>& s) { read_part(a, b, slots, s); },
      [&](int64_t b, const ReadScratch<T>* parts, int64_t count) { combine_parts(a, b, parts, count); });
}

// ---- backward -------------------------------------------------------------------------------------------------------
// Two passes over the memory: a weight's gradient counts only as far as it differs from the mean of all under the weights. The
// mean must come from the very same bits: a product of the read's gradient and the read would do but for its rounding, which a
// great sharpness would magnify where one slot has all the weight and nothing is left of the difference.

// What the first pass finds of a tile and the second needs: products with the keys [R][tile] and, where there is one, with the
// read's gradient, which become dL/dw [R][tile]; and the slots' squares [tile].
template <class T>
struct Products {
  T *dots, *grad_weights, *squares;
  static int64_t numbers(const ContentReadBackward& a) { return (2 * a.R + 1) * tile; }
  Products(const ContentReadBackward& a, T* all, int64_t b, int64_t lo)
      : dots(all + (b * ((a.N + tile - 1) / tile) + lo / tile) * numbers(a)), grad_weights(dots + a.R * tile),
        squares(grad_weights + a.R * tile) {}
};

// keys and the gradient of the reads of a sample, [R][D], as T in rows of `padded` numbers, one after the other.
template <class T>
void pad_vectors(const ContentReadBackward& a, int64_t b, T* room, T* to) {
  const int64_t ld = padded<T>(a.D);
  pad_rows(widen(a.key, a.input, b * a.R * a.D, a.R * a.D, room), a.R, a.D, a.R, ld, to);
  if (a.grad_read) pad_rows(widen(a.grad_read, a.input, b * a.R * a.D, a.R * a.D, room), a.R, a.D, a.R, ld, to + a.R * ld);
}

template <class T>
struct MeanScratch {
  T *rows, *weights, *wide, *vectors, *mean;
  MeanScratch(Arena& arena, const ContentReadBackward& a)
      : rows(arena.take<T>(padded<T>(a.D) * tile)), weights(arena.take<T>(a.R * tile)), wide(arena.take<T>(a.R * a.D)),
        vectors(arena.take<T>(2 * a.R * padded<T>(a.D))), mean(arena.take<T>(a.R)) {}
};

// All products of a part's slots, and the part's share of sum over slots of w dL/dw.
template <class T>
void mean_part(const ContentReadBackward& a, int64_t b, Range slots, T* products, MeanScratch<T>& s) {
  const T* memory = static_cast<const T*>(a.memory) + b * a.N * a.D;
  const T* weights = static_cast<const T*>(a.weights) + b * a.R * a.N;
  pad_vectors(a, b, s.wide, s.vectors);
  for (int64_t r = 0; r < a.R; ++r) s.mean[r] = 0;
  for (int64_t lo = slots.lo; lo < slots.hi; lo += tile) {
    const int64_t end = lo + tile < slots.hi ? lo + tile : slots.hi, valid = end - lo, count = padded_slots(valid);
    const T* rows = rows_of_tile(memory, a.D, lo, valid, count, s.rows);
    const Products<T> of(a, products, b, lo);
    dot_rows_of_slots(rows, padded<T>(a.D), count, a.grad_read ? 2 * a.R : a.R, static_cast<const T*>(s.vectors), of.dots,
                      of.squares, end < slots.hi ? memory + end * a.D : nullptr, a.D);
    if (a.grad_read == nullptr) std::memset(of.grad_weights, 0, a.R * tile * sizeof(T));
    if (a.grad_weights) {
      const T* more = static_cast<const T*>(a.grad_weights) + b * a.R * a.N + lo;
      for (int64_t r = 0; r < a.R; ++r)
        for (int64_t i = 0; i < valid; ++i) of.grad_weights[r * tile + i] += more[r * a.N + i];
    }
    load_tile_rows(weights + lo, a.R, a.N, valid, count, s.weights);
    for (int64_t r = 0; r < a.R; ++r)
      s.mean[r] +=
          dot_rows(static_cast<const T*>(s.weights + r * tile), static_cast<const T*>(of.grad_weights + r * tile), count);
  }
}

template <class T>
struct BackwardScratch {
  T *rows, *grad, *q, *weights, *grad_squares, *wide, *vectors, *sharpness;
  T *grad_key, *grad_sharpness, *grad_key_square;  // of one part of a sample's slots: [R, ld], [R], [R]
  BackwardScratch(Arena& arena, const ContentReadBackward& a)
      : rows(arena.take<T>(padded<T>(a.D) * tile)), grad(arena.take<T>(padded<T>(a.D) * tile)), q(arena.take<T>(tile)),
        weights(arena.take<T>(a.R * tile)), grad_squares(arena.take<T>(tile)), wide(arena.take<T>(a.R * a.D)),
        vectors(arena.take<T>(2 * a.R * padded<T>(a.D))), sharpness(arena.take<T>(a.R)),
        grad_key(arena.take<T>(a.R * padded<T>(a.D))), grad_sharpness(arena.take<T>(a.R)), grad_key_square(arena.take<T>(a.R)) {
  }
};

template <class T>
void backward_part(const ContentReadBackward& a, int64_t b, Range slots, const T* mean, T* products, BackwardScratch<T>& s) {
  const int64_t ld = padded<T>(a.D);
  const T* memory = static_cast<const T*>(a.memory) + b * a.N * a.D;
  const T* weights = static_cast<const T*>(a.weights) + b * a.R * a.N;
  T* grad_memory = static_cast<T*>(a.grad_memory) + b * a.N * a.D;
  pad_vectors(a, b, s.wide, s.vectors);
  const T *key = s.vectors, *grad_read = s.vectors + a.R * ld;
  const T* sharpness = a.sharpness ? widen(a.sharpness, a.input, b * a.R, a.R, s.sharpness) : nullptr;
  for (int64_t r = 0; r < a.R; ++r) s.grad_sharpness[r] = s.grad_key_square[r] = 0;
  for (int64_t j = 0; j < a.R * ld; ++j) s.grad_key[j] = 0;
  // A gradient that no cache keeps need not go through them.
  const bool large = a.B * a.N * a.D * static_cast<int64_t>(sizeof(T)) >= int64_t{1} << 24;
  const bool whole_lines = (a.D * sizeof(T)) % 64 == 0 && reinterpret_cast<uintptr_t>(grad_memory) % 64 == 0;
  // From the end on: what the first pass read last may still be in a cache.
  for (int64_t left = (slots.hi - slots.lo + tile - 1) / tile; left > 0; --left) {
    const int64_t lo = slots.lo + (left - 1) * tile, end = lo + tile < slots.hi ? lo + tile : slots.hi;
    const int64_t valid = end - lo, count = padded_slots(valid);
    const T* rows = rows_of_tile(memory, a.D, lo, valid, count, s.rows);
    const Products<T> of(a, products, b, lo);
    load_tile_rows(weights + lo, a.R, a.N, valid, count, s.weights);
    std::memset(s.grad_squares, 0, tile * sizeof(T));
    for (int64_t r = 0; r < a.R; ++r) {
      T *w = s.weights + r * tile, *g = of.grad_weights + r * tile;
      const T key_square = square_sum(key + r * ld, ld), beta = sharpness ? sharpness[r] : T(1);
      for (int64_t i = 0; i < count; i += width<T>)
        store(s.q + i, inverse_root<T>(load(of.squares + i) * key_square + static_cast<T>(a.eps)));
      const ScoreGradient<T> grad =
          score_gradient<T>(w, of.dots + r * tile, s.q, of.squares, count, mean[r], key_square, beta, g, s.grad_squares);
      s.grad_sharpness[r] += grad.beta;
      s.grad_key_square[r] += grad.key_square;
    }
    const T* next = left > 1 ? memory + (lo - tile) * a.D : nullptr;
    const bool streams = large && whole_lines && rows != s.rows;
    T* to = grad_memory + lo * a.D;
    // Vectors of half a cache line and less make a row in pieces: these must meet before they go past the caches.
    T* made = rows == s.rows || (streams && sizeof(Vec<T>) < 64) ? s.grad : to;
    T* room = streams ? s.grad : made;
    if (a.grad_read)
      gradient_of_rows<T, true>(rows, ld, count, a.R, s.weights, grad_read, of.grad_weights, key, s.grad_squares, next, a.D,
                                room, streams && made == to, made, s.grad_key);
    else
      gradient_of_rows<T, false>(rows, ld, count, a.R, nullptr, nullptr, of.grad_weights, key, s.grad_squares, next, a.D, room,
                                 streams && made == to, made, s.grad_key);
    if (made == to) continue;
    for (int64_t j = 0; streams && j < count * ld; j += width<T>) stream(to + j, load(made + j));
    for (int64_t i = 0; !streams && i < valid; ++i) std::memcpy(to + i * a.D, made + i * ld, a.D * sizeof(T));
  }
  finish_streams();  // before another thread reads them
}

template <class T>
void combine_backward(const ContentReadBackward& a, int64_t b, const BackwardScratch<T>* parts, int64_t count) {
  const BackwardScratch<T>& sum = parts[0];
  const int64_t ld = padded<T>(a.D);
  for (int64_t p = 1; p < count; ++p) {
    for (int64_t j = 0; j < a.R * ld; ++j) sum.grad_key[j] += parts[p].grad_key[j];
    for (int64_t r = 0; r < a.R; ++r) {
      sum.grad_sharpness[r] += parts[p].grad_sharpness[r];
      sum.grad_key_square[r] += parts[p].grad_key_square[r];
    }
  }
  for (int64_t r = 0; r < a.R; ++r)
    for (int64_t d = 0; d < a.D; ++d)
      sum.wide[r * a.D + d] = sum.grad_key[r * ld + d] + 2 * sum.grad_key_square[r] * sum.vectors[r * ld + d];
  narrow(sum.wide, a.R * a.D, a.grad_key, a.input, b * a.R * a.D);
  if (a.grad_sharpness) narrow(sum.grad_sharpness, a.R, a.grad_sharpness, a.input, b * a.R);
}

template <class T>
bool content_read_backward(const ContentReadBackward& a, const Parallel& parallel) {
  const Scratch means(a.B * a.R * sizeof(T)), found(a.B * ((a.N + tile - 1) / tile) * Products<T>::numbers(a) * sizeof(T));
  if (means.data() == nullptr || found.data() == nullptr) return false;
  T *const mean = reinterpret_cast<T*>(means.data()), *const products = reinterpret_cast<T*>(found.data());
  const auto nothing = [](int64_t, auto&) {};
  return run_samples_or_slots<MeanScratch<T>>(
             a, parallel, a.D * (2 * a.R + 1), a.D * (2 * a.R + 1), nothing,
             [&](int64_t b, Range slots, MeanScratch<T>& s) { mean_part(a, b, slots, products, s); },
             [&](int64_t b, const MeanScratch<T>* parts, int64_t count) {
               for (int64_t r = 0; r < a.R; ++r) {
                 mean[b * a.R + r] = 0;
                 for (int64_t p = 0; p < count; ++p) mean[b * a.R + r] += parts[p].mean[r];
               }
             }) &&
         run_samples_or_slots<BackwardScratch<T>>(
             a, parallel, a.D * (2 * a.R + 1), a.D * (3 * a.R + 1), nothing,
             [&](int64_t b, Range slots, BackwardScratch<T>& s) { backward_part(a, b, slots, mean + b * a.R, products, s); },
             [&](int64_t b, const BackwardScratch<T>* parts, int64_t count) { combine_backward(a, b, parts, count); });
}

}  // namespace

MANN_FAST_CONTENT_OPS(MANN_FAST_BY_DTYPE)

}  // namespace MANN_FAST_ISA
}  // namespace mann_fast

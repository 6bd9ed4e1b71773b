// Where a Differentiable Neural Computer's heads go but for links, for one sample: usage, allocation, content; forward and
// backward.
#pragma once
#include "dnc_sizes.h"
#include "least_used.h"

namespace mann_fast {
namespace {

// ---- usage and allocation -----------------------------------------------------------------------------------------------

// retained = product over heads of (1 - free gate * read weight), and usage from that before. from and to may be the same.
template <class T>
void use_slots(const DncSizes<T>& n, const T* free_gates, const T* read_weights, const T* write_weights, const T* from,
               T* retained, T* to) {
  for (int64_t i = 0; i < n.ld; i += width<T>) {
    Vec<T> product = splat<T>(1);
    for (int64_t r = 0; r < n.R; ++r) product *= T(1) - load(read_weights + r * n.ld + i) * free_gates[r];
    const Vec<T> usage = load(from + i);
    store(retained + i, product);
    store(to + i, (usage + (T(1) - usage) * load(write_weights + i)) * product);
  }
}

template <class T>
struct DncSorting {
  Int<T>* keys;
  int64_t *order, *other;
  DncSorting(Arena& arena, const DncSizes<T>& n)
      : keys(arena.take<Int<T>>(n.ld)), order(arena.take<int64_t>(n.ld)), other(arena.take<int64_t>(n.ld)) {}
};

// The place of each slot is how many are before it: those with less, and of equal ones those of a lower number.
template <class T>
void sort_few(const DncSizes<T>& n, DncSorting<T>& s) {
  constexpr int64_t W = width<T>;
  const Int<T>* keys = s.keys;
  IntVec<T> index{};
  for (int l = 0; l < W; ++l) index[l] = l;
  for (int64_t block = 0; block < n.N; block += W) {
    const IntVec<T> own = load_int(keys + block);
    const int64_t end = block + W < n.N ? block + W : n.N;
    IntVec<T> place{};  // a comparison that holds is -1
    for (int64_t j = 0; j < block; ++j) place -= splat_int<T>(keys[j]) <= own;
    for (int64_t j = block; j < end; ++j) {
      const IntVec<T> other = splat_int<T>(keys[j]), lower = splat_int<T>(static_cast<Int<T>>(j - block)) < index;
      place -= (other < own) | ((other == own) & lower);
    }
    for (int64_t j = end; j < n.N; ++j) place -= splat_int<T>(keys[j]) < own;
    for (int64_t i = block; i < end; ++i) s.order[place[i - block]] = i;
  }
}

// A radix sort, byte by byte from the lowest.
template <class T>
void sort_many(const DncSizes<T>& n, DncSorting<T>& s) {
  constexpr int bytes = sizeof(T);
  using Key = std::make_unsigned_t<Int<T>>;
  int32_t counts[bytes][256] = {};
  for (int64_t i = 0; i < n.N; ++i) {
    const Key key = static_cast<Key>(s.keys[i]) ^ (Key(1) << (8 * bytes - 1));  // negative ones first
    s.keys[i] = static_cast<Int<T>>(key);
    s.order[i] = i;
    for (int byte = 0; byte < bytes; ++byte) ++counts[byte][(key >> (8 * byte)) & 255];
  }
  for (int byte = 0; byte < bytes; ++byte) {
    const auto digit = [&](int64_t slot) { return (static_cast<Key>(s.keys[slot]) >> (8 * byte)) & 255; };
    int32_t* count = counts[byte];
    if (count[digit(0)] == n.N) continue;  // the same everywhere
    int32_t before = 0;
    for (int value = 0; value < 256; ++value) {
      const int32_t here = count[value];
      count[value] = before;
      before += here;
    }
    for (int64_t place = 0; place < n.N; ++place) s.other[count[digit(s.order[place])]++] = s.order[place];
    std::swap(s.order, s.other);
  }
}

// order = the slots by ascending usage, equal ones by number, NaN last.
template <class T>
void sort_slots(const DncSizes<T>& n, const T* usage, DncSorting<T>& s) {
  order_slots(usage, n.ld, n.N, s.keys);
  if (n.N <= 32 * width<T>) sort_few(n, s);  // which takes N^2 / width
  else sort_many(n, s);
}

// allocation[order[k]] = (1 - usage[order[k]]) * the product of the usages before, which goes to `products` unless null.
template <class T>
void allocate(const DncSizes<T>& n, const int64_t* order, const T* usage, T* allocation, T* products) {
  T product = 1;
  for (int64_t k = 0; k < n.N; ++k) {
    const T used = usage[order[k]];
    allocation[order[k]] = (T(1) - used) * product;
    if (products) products[k] = product;
    product *= used;
  }
  for (int64_t i = n.N; i < n.ld; ++i) allocation[i] = 0;
}

// Back through allocation, from the right and without a division: from grad, of the allocation, to grad_usage, added.
template <class T>
void allocate_backward(const DncSizes<T>& n, const int64_t* order, const T* usage, const T* products, const T* grad,
                       T* grad_usage) {
  T after = 0;
  for (int64_t k = n.N - 1; k >= 0; --k) {
    const int64_t i = order[k];
    grad_usage[i] += products[k] * (after - grad[i]);
    after = (T(1) - usage[i]) * grad[i] + usage[i] * after;
  }
}

// ---- content ------------------------------------------------------------------------------------------------------------

template <class T>
struct DncContent {  // rows [heads][ld]: what backward goes through again. Without masks all heads share one row of squares.
  int64_t heads;
  T *dots, *q, *squares, *weights;
  T *key_square, *scaled, *mask_square;  // scaled [heads][D]: key times mask_square, that is mask^2
  DncContent(Arena& arena, const DncSizes<T>& n, int64_t heads)
      : heads(heads), dots(arena.take<T>(heads * n.ld)), q(arena.take<T>(heads * n.ld)), squares(arena.take<T>(heads * n.ld)),
        weights(arena.take<T>(heads * n.ld)), key_square(arena.take<T>(heads)), scaled(arena.take<T>(heads * n.D)),
        mask_square(arena.take<T>(heads * n.D)) {}
};

// dots[r][i] = sum over d of scaled[r][d] * block[d][i]; squares[r][i] = sum over d of mask_square[r][d] * block[d][i]^2.
template <class T>
void masked_dots(const DncSizes<T>& n, const T* memory, const DncContent<T>& x) {
  for_heads<T>(x.heads, [&](int64_t first, auto group) {
    constexpr int HEADS = decltype(group)::value;
    const T *scaled = x.scaled + first * n.D, *mask_square = x.mask_square + first * n.D;
    for (int64_t i = 0; i < n.ld; i += width<T>) {
      Vec<T> dot[HEADS], square[HEADS];
      for (int r = 0; r < HEADS; ++r) dot[r] = square[r] = Vec<T>{};
      for (int64_t d = 0; d < n.D; ++d) {
        const Vec<T> m = load(memory + d * n.ld + i), m2 = m * m;
        for (int r = 0; r < HEADS; ++r) {
          dot[r] += m * scaled[r * n.D + d];
          square[r] += m2 * mask_square[r * n.D + d];
        }
      }
      for (int r = 0; r < HEADS; ++r) {
        store(x.dots + (first + r) * n.ld + i, dot[r]);
        store(x.squares + (first + r) * n.ld + i, square[r]);
      }
    }
  });
}

// Weights by content, softmax of sharpness times cosine. masks may be null.
template <class T>
void address(const DncSizes<T>& n, const T* memory, const T* keys, const T* sharpness, const T* masks, DncContent<T>& x) {
  if (masks) {
    for (int64_t r = 0; r < x.heads; ++r) {
      x.key_square[r] = 0;
      for (int64_t d = r * n.D; d < (r + 1) * n.D; ++d) {
        x.mask_square[d] = masks[d] * masks[d];
        x.scaled[d] = keys[d] * x.mask_square[d];
        x.key_square[r] += keys[d] * x.scaled[d];
      }
    }
    masked_dots(n, memory, x);
  } else {
    for (int64_t r = 0; r < x.heads; ++r) x.key_square[r] = square_sum(keys + r * n.D, n.D);
    dot_and_square_slots(memory, n.ld, n.ld, n.D, x.heads, keys, x.dots, x.squares);
  }
  for (int64_t r = 0; r < x.heads; ++r) {
    const int64_t row = r * n.ld;
    const T* squares = x.squares + (masks ? row : 0);
    const T maximum =
        score_slots<T>(x.dots + row, squares, n.ld, n.N, x.key_square[r], sharpness[r], n.eps, x.q + row, x.weights + row);
    scale_slots(x.weights + row, n.ld, T(1) / exp_slots(x.weights + row, n.ld, maximum));
  }
}

// Back through address, which x has gone through again: from grad, of the weights, which is overwritten, to the gradients of
// keys, sharpness and masks, and, added, of the memory. grad_squares: scratch as large as grad.
template <class T>
void address_backward(const DncSizes<T>& n, const T* memory, const T* keys, const T* sharpness, const T* masks,
                      DncContent<T>& x, T* grad, T* grad_squares, T* grad_memory, T* grad_keys, T* grad_sharpness,
                      T* grad_masks) {
  const int64_t ld = n.ld, D = n.D;
  std::memset(grad_squares, 0, x.heads * ld * sizeof(T));
  for (int64_t r = 0; r < x.heads; ++r) {
    const int64_t row = r * ld, shared = masks ? row : 0;
    const T delta = dot_rows(x.weights + row, static_cast<const T*>(grad + row), ld);
    const ScoreGradient<T> score = score_gradient<T>(x.weights + row, x.dots + row, x.q + row, x.squares + shared, ld, delta,
                                                     x.key_square[r], sharpness[r], grad + row, grad_squares + shared);
    grad_sharpness[r] = score.beta;
    x.key_square[r] = T(2) * score.key_square;  // the square itself is not needed any more
  }
  weighted_sums<T, false>(memory, ld, ld, D, x.heads, static_cast<const T*>(grad), grad_keys);
  if (!masks) {
    for (int64_t r = 0; r < x.heads; ++r)
      for (int64_t d = r * D; d < (r + 1) * D; ++d) grad_keys[d] += x.key_square[r] * keys[d];
    const T* none = nullptr;
    add_gradient<T, false, true>(memory, grad_memory, ld, ld, D, x.heads, none, none, static_cast<const T*>(grad), keys,
                                 static_cast<const T*>(grad_squares));
    return;
  }
  for_heads<T>(x.heads, [&](int64_t first, auto group) {
    constexpr int HEADS = decltype(group)::value;
    const T *of_dots = grad + first * ld, *of_squares = grad_squares + first * ld;
    for (int64_t d = 0; d < D; ++d) {
      const T* m = memory + d * ld;
      T* g = grad_memory + d * ld;
      Vec<T> sums[HEADS];
      for (int r = 0; r < HEADS; ++r) sums[r] = Vec<T>{};
      for (int64_t i = 0; i < ld; i += width<T>) {
        const Vec<T> slot = load(m + i), twice = slot + slot, square = slot * slot;
        Vec<T> total = load(g + i), of_slot{};
        for (int r = 0; r < HEADS; ++r) {
          const Vec<T> of_square = load(of_squares + r * ld + i);
          total += load(of_dots + r * ld + i) * x.scaled[(first + r) * D + d];
          of_slot += of_square * x.mask_square[(first + r) * D + d];
          sums[r] += of_square * square;
        }
        store(g + i, total + of_slot * twice);
      }
      for (int r = 0; r < HEADS; ++r) grad_masks[(first + r) * D + d] = sum_lanes<T>(sums[r]);
    }
  });
  for (int64_t r = 0; r < x.heads; ++r)
    for (int64_t d = r * D; d < (r + 1) * D; ++d) {
      const T of_key = x.key_square[r] * keys[d], of_dot = grad_keys[d];
      grad_keys[d] = x.mask_square[d] * (of_dot + of_key);
      grad_masks[d] = masks[d] * (T(2) * (keys[d] * of_dot + grad_masks[d]) + keys[d] * of_key);
    }
}

}  // namespace
}  // namespace mann_fast

// dnc_scan (a step is a scan of one), forward and backward.
//
// One sample's state is held in cache through all T steps: the memory with slots in lanes, as in lrua.cpp, the links row by row.
// Links are updated and multiplied by the read weights of all heads in one traversal. Backward keeps no memory and no links: a
// first replay from the state that came in leaves one every sqrt(T) steps in scratch, and a second one, segment by segment, that
// of every step. A replay needs no addressing, since the weights of every step are kept.
#include "blocks.h"

namespace mann_fast {
namespace MANN_FAST_ISA {
namespace {

// ---- what a step is told, and the state -------------------------------------------------------------------------------

constexpr int told_count = 13;
template <class P>
constexpr P DncInterface<P>::* told_fields[told_count] = {
    &DncInterface<P>::read_keys,       &DncInterface<P>::read_sharpness,  &DncInterface<P>::write_key,
    &DncInterface<P>::write_sharpness, &DncInterface<P>::erase,           &DncInterface<P>::write_vector,
    &DncInterface<P>::free_gates,      &DncInterface<P>::allocation_gate, &DncInterface<P>::write_gate,
    &DncInterface<P>::read_modes,      &DncInterface<P>::read_masks,      &DncInterface<P>::write_mask,
    &DncInterface<P>::link_sharpening};

template <class T>
struct Sizes {
  int64_t B, N, D, R, ld, told[told_count];  // told: how many numbers of each field a step takes
  bool links, masks, sharpened, deallocate;
  T eps;
  template <class Arguments>
  explicit Sizes(const Arguments& a)
      : B(a.B), N(a.N), D(a.D), R(a.R), ld(padded_slots(a.N)), told{R * D, R, D, 1, D, D, R, 1, 1, 3 * R, R * D, D, 2 * R},
        links(a.before.links != nullptr), masks(a.told.read_masks != nullptr), sharpened(a.told.link_sharpening != nullptr),
        deallocate(a.deallocate), eps(static_cast<T>(a.eps)) {}
  // Of one sample's memory, usage, precedence and links, as Held lays them out.
  int64_t state() const { return (D + 1) * ld + (links ? ld + ld * ld : 0); }
};

// One sample's and step's; fields are null where the op's are.
template <class T>
struct Told : DncInterface<const T*> {
  T* buffers[told_count];
  Told(Arena& arena, const Sizes<T>& n) {
    for (int k = 0; k < told_count; ++k) buffers[k] = arena.take<T>(n.told[k]);
  }
  void load(const DncInterface<const void*>& from, Dtype input, const Sizes<T>& n, int64_t row) {
    for (int k = 0; k < told_count; ++k) {
      const void* field = from.*told_fields<const void*>[k];
      this->*told_fields<const T*>[k] = field ? widen(field, input, row * n.told[k], n.told[k], buffers[k]) : nullptr;
    }
  }
};

template <class T>
struct Held {  // memory [D][ld]; usage, precedence [ld]; links [ld][ld]. Padding is 0.
  T *memory, *usage, *precedence, *links;
  Held(T* block, const Sizes<T>& n)
      : memory(block), usage(block + n.D * n.ld), precedence(usage + n.ld), links(precedence + n.ld) {}
};

// A row of slots, or 0 where there is none.
template <class T>
void load_or_clear(const void* from, int64_t rows, const Sizes<T>& n, int64_t b, T* to) {
  if (from) load_rows(static_cast<const T*>(from) + b * rows * n.N, rows, n.N, 0, n.ld, to, n.ld);
  else std::memset(to, 0, rows * n.ld * sizeof(T));
}

template <class T>
void load_state(const DncState<const void*>& from, const Sizes<T>& n, int64_t b, const Held<T>& to) {
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
void clear_rows(const Sizes<T>& n, const Held<T>& to) {
  std::memset(to.usage, 0, n.ld * sizeof(T));
  if (!n.links) return;
  std::memset(to.precedence, 0, n.ld * sizeof(T));
  std::memset(to.links, 0, n.ld * n.ld * sizeof(T));
}

template <class T>
void start_state(const void* start, const Sizes<T>& n, const Held<T>& to) {
  load_slots(static_cast<const T*>(start), n.N, n.D, 0, n.ld, to.memory, n.ld);
  clear_rows(n, to);
}

template <class T>
void store_state(const Held<T>& from, const Sizes<T>& n, int64_t b, const DncState<void*>& to) {
  const auto rows = [&](const T* row, int64_t count, void* target) {
    store_rows(row, n.ld, count, n.N, 0, n.ld, static_cast<T*>(target) + b * count * n.N);
  };
  store_slots(static_cast<const T*>(from.memory), n.ld, n.N, n.D, 0, n.ld, static_cast<T*>(to.memory) + b * n.N * n.D);
  rows(from.usage, 1, to.usage);
  if (!n.links) return;
  rows(from.precedence, 1, to.precedence);
  rows(from.links, n.N, to.links);
}

// ---- usage and allocation -----------------------------------------------------------------------------------------------

// retained = product over heads of (1 - free gate * read weight), and usage from that before. from and to may be the same.
template <class T>
void use_slots(const Sizes<T>& n, const T* free_gates, const T* read_weights, const T* write_weights, const T* from,
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
struct Sorting {
  Int<T>* keys;
  int64_t *order, *other;
  Sorting(Arena& arena, const Sizes<T>& n)
      : keys(arena.take<Int<T>>(n.ld)), order(arena.take<int64_t>(n.ld)), other(arena.take<int64_t>(n.ld)) {}
};

// order = the slots by ascending usage, equal ones by number, NaN last: a radix sort, byte by byte, which is stable.
template <class T>
void sort_slots(const Sizes<T>& n, const T* usage, Sorting<T>& s) {
  constexpr int bytes = sizeof(T);
  using Key = std::make_unsigned_t<Int<T>>;
  int32_t counts[bytes][256] = {};
  order_slots(usage, n.ld, n.N, s.keys);
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

// allocation[order[k]] = (1 - usage[order[k]]) * the product of the usages before, which goes to `products` unless null.
template <class T>
void allocate(const Sizes<T>& n, const int64_t* order, const T* usage, T* allocation, T* products) {
  T product = 1;
  for (int64_t k = 0; k < n.N; ++k) {
    const T used = usage[order[k]];
    allocation[order[k]] = (T(1) - used) * product;
    if (products) products[k] = product;
    product *= used;
  }
  for (int64_t i = n.N; i < n.ld; ++i) allocation[i] = 0;
}

// ---- content ------------------------------------------------------------------------------------------------------------

template <class T>
struct Content {  // rows [heads][ld]: what backward goes through again. Without masks all heads share one row of squares.
  int64_t heads;
  T *dots, *q, *squares, *weights;
  T *key_square, *scaled, *mask_square;  // scaled [heads][D]: key times mask_square, that is mask^2
  Content(Arena& arena, const Sizes<T>& n, int64_t heads)
      : heads(heads), dots(arena.take<T>(heads * n.ld)), q(arena.take<T>(heads * n.ld)), squares(arena.take<T>(heads * n.ld)),
        weights(arena.take<T>(heads * n.ld)), key_square(arena.take<T>(heads)), scaled(arena.take<T>(heads * n.D)),
        mask_square(arena.take<T>(heads * n.D)) {}
};

// dots[r][i] = sum over d of scaled[r][d] * block[d][i]; squares[r][i] = sum over d of mask_square[r][d] * block[d][i]^2.
template <class T>
void masked_dots(const Sizes<T>& n, const T* memory, const Content<T>& x) {
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
void address(const Sizes<T>& n, const T* memory, const T* keys, const T* sharpness, const T* masks, Content<T>& x) {
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
void address_backward(const Sizes<T>& n, const T* memory, const T* keys, const T* sharpness, const T* masks, Content<T>& x,
                      T* grad, T* grad_squares, T* grad_memory, T* grad_keys, T* grad_sharpness, T* grad_masks) {
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

// ---- the write ----------------------------------------------------------------------------------------------------------

// memory * (1 - weight * erase) + weight * vector, the first term times retained unless that is null. from and to may be the
// same.
template <class T>
void write_memory(const Sizes<T>& n, const T* weights, const T* erase, const T* vector, const T* retained, const T* from,
                  T* to) {
  for (int64_t d = 0; d < n.D; ++d)
    for (int64_t i = 0; i < n.ld; i += width<T>) {
      const Vec<T> weight = load(weights + i);
      Vec<T> kept = load(from + d * n.ld + i);
      if (retained) kept *= load(retained + i);
      store(to + d * n.ld + i, kept * (T(1) - weight * erase[d]) + weight * vector[d]);
    }
}

template <class T>
void mix(const Sizes<T>& n, const Told<T>& in, const T* allocation, const T* content, T* weights) {
  const T gate = *in.allocation_gate;
  for (int64_t i = 0; i < n.ld; i += width<T>)
    store(weights + i, (load(allocation + i) * gate + load(content + i) * (T(1) - gate)) * *in.write_gate);
}

template <class T>
void precede(const Sizes<T>& n, const T* weights, const T* from, T* to) {
  Vec<T> sum{};
  for (int64_t i = 0; i < n.ld; i += width<T>) sum += load(weights + i);
  const T rest = T(1) - sum_lanes<T>(sum);
  for (int64_t i = 0; i < n.ld; i += width<T>) store(to + i, load(from + i) * rest + load(weights + i));
}

// ---- links --------------------------------------------------------------------------------------------------------------

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

// (1 - w[i] - w[j]) * links[i, j] + w[i] * precedence[j], 0 where i = j. from and to may be the same.
template <class T>
void update_links(const Sizes<T>& n, const T* weights, const T* precedence, const T* from, T* to) {
  for (int64_t i = 0; i < n.ld; ++i) {
    const T weight = weights[i];
    for (int64_t j = 0; j < n.ld; j += width<T>)
      store(to + i * n.ld + j,
            load(from + i * n.ld + j) * ((T(1) - load(weights + j)) - weight) + load(precedence + j) * weight);
    to[i * n.ld + i] = 0;
  }
}

// One traversal for HEADS heads: the update above in place where UPDATE, then forward[r][i] = sum over j of links[i, j]
// read_weights[r][j] and backward[r][j] = sum over i of links[i, j] read_weights[r][i]. Rows of directions are 2 ld apart.
template <class T, int HEADS, bool UPDATE>
void follow_links(const Sizes<T>& n, const T* weights, const T* precedence, const T* read_weights, T* links, T* backward,
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
void follow_links(const Sizes<T>& n, const T* weights, const T* precedence, const T* read_weights, T* links, T* directions) {
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
void sharpen(const Sizes<T>& n, const T* direction, T exponent, T* logs, T* shares) {
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
T sharpen_backward(const Sizes<T>& n, const T* direction, T exponent, const T* logs, const T* shares, T* grad) {
  const T mean = dot_rows(shares, static_cast<const T*>(grad), n.ld);
  Vec<T> of_exponent{};
  for (int64_t i = 0; i < n.ld; i += width<T>) {
    const Vec<T> of_score = load(shares + i) * (load(grad + i) - mean);
    of_exponent += of_score * load(logs + i);
    store(grad + i, of_score * exponent / (load(direction + i) + T(link_floor)));
  }
  return sum_lanes<T>(of_exponent);
}

// ---- forward --------------------------------------------------------------------------------------------------------------

template <class T>
struct ForwardScratch {
  Told<T> in;
  Content<T> write, read;
  Sorting<T> sorting;
  T *state, *read_weights, *write_weights, *retained, *allocation, *directions, *logs, *shares, *reads;
  ForwardScratch(Arena& arena, const Sizes<T>& n)
      : in(arena, n), write(arena, n, 1), read(arena, n, n.R), sorting(arena, n), state(arena.take<T>(n.state())),
        read_weights(arena.take<T>(n.R * n.ld)), write_weights(arena.take<T>(n.ld)), retained(arena.take<T>(n.ld)),
        allocation(arena.take<T>(n.ld)), directions(arena.take<T>(2 * n.R * n.ld)), logs(arena.take<T>(n.ld)),
        shares(arena.take<T>(2 * n.ld)), reads(arena.take<T>(n.R * n.D)) {}
};

template <class T>
void scan_sample(const DncScan& a, const Sizes<T>& n, int64_t b, ForwardScratch<T>& s) {
  const int64_t ld = n.ld, N = n.N, R = n.R, length = a.sequences.length(a.T, b);
  const Held<T> state(s.state, n);
  Told<T>& in = s.in;
  load_state(a.before, n, b, state);
  load_or_clear(a.before.read_weights, R, n, b, s.read_weights);
  load_or_clear(a.before.write_weights, 1, n, b, s.write_weights);
  for (int64_t t = 0; t < length; ++t) {
    const int64_t row = t * n.B + b;
    if (a.sequences.begins(t, n.B, b)) {
      start_state(a.sequences.start, n, state);
      std::memset(s.read_weights, 0, R * ld * sizeof(T));
      std::memset(s.write_weights, 0, ld * sizeof(T));
    }
    in.load(a.told, a.input, n, row);
    const T* memory = state.memory;
    use_slots<T>(n, in.free_gates, s.read_weights, s.write_weights, state.usage, s.retained, state.usage);
    sort_slots<T>(n, state.usage, s.sorting);
    allocate<T>(n, s.sorting.order, state.usage, s.allocation, nullptr);
    address(n, memory, in.write_key, in.write_sharpness, in.write_mask, s.write);
    mix<T>(n, in, s.allocation, s.write.weights, s.write_weights);
    write_memory<T>(n, s.write_weights, in.erase, in.write_vector, n.deallocate ? s.retained : nullptr, memory, state.memory);
    address(n, memory, in.read_keys, in.read_sharpness, in.read_masks, s.read);
    if (n.links) {
      follow_links<T>(n, s.write_weights, state.precedence, s.read_weights, state.links, s.directions);
      precede<T>(n, s.write_weights, state.precedence, state.precedence);
      for (int64_t r = 0; r < R; ++r) {
        const T *backward = s.directions + 2 * r * ld, *forward = backward + ld, *content = s.read.weights + r * ld;
        const T* modes = in.read_modes + 3 * r;
        if (n.sharpened) {
          sharpen(n, backward, in.link_sharpening[2 * r], s.logs, s.shares);
          sharpen(n, forward, in.link_sharpening[2 * r + 1], s.logs, s.shares + ld);
          backward = s.shares;
          forward = s.shares + ld;
        }
        for (int64_t i = 0; i < ld; i += width<T>)
          store(s.read_weights + r * ld + i,
                load(backward + i) * modes[0] + load(content + i) * modes[1] + load(forward + i) * modes[2]);
      }
    } else {
      std::memcpy(s.read_weights, s.read.weights, R * ld * sizeof(T));
    }
    weighted_sums<T, false>(memory, ld, ld, n.D, R, s.read_weights, s.reads);
    narrow(s.reads, R * n.D, a.reads, a.input, row * R * n.D);
    const auto keep = [&](const T* from, int64_t rows, void* to) {
      if (to) store_rows(from, ld, rows, N, 0, ld, static_cast<T*>(to) + row * rows * N);
    };
    keep(s.read_weights, R, a.read_history);
    keep(s.write_weights, 1, a.write_history);
    keep(s.directions, 2 * R, a.directions);
    if (a.orders) std::memcpy(a.orders + row * N, s.sorting.order, N * sizeof(int64_t));
  }
  clear_steps<T>(a.reads, a.input, length, a.T, n.B, b, R * n.D);
  store_state(state, n, b, a.after);
  store_rows<T>(s.read_weights, ld, R, N, 0, ld, static_cast<T*>(a.after.read_weights) + b * R * N);
  store_rows<T>(s.write_weights, ld, 1, N, 0, ld, static_cast<T*>(a.after.write_weights) + b * N);
}

// ---- backward -------------------------------------------------------------------------------------------------------------

// How many steps lie between two states of the first replay: with so many, both replays hold the fewest.
inline int64_t replay_every(int64_t T) {
  int64_t every = 1;
  while (every * every < T) ++every;
  return every;
}

template <class T>
struct BackwardScratch {
  Told<T> in;
  Content<T> write, read;
  int64_t every;
  T *anchors, *states, *retained;  // states before every step of a segment and after its last one; retained of each step
  T *grad_state, *grad_read_weights, *grad_write_weights;
  T *came_read, *came_write, *read_weights, *write_weights;
  T *allocation, *products, *grad_rows, *grad_squares, *grad_retained, *grad_came, *columns;
  T *directions, *logs, *shares, *along, *scaled, *grad_read;
  DncInterface<T*> grad_told;
  BackwardScratch(Arena& arena, const Sizes<T>& n, int64_t steps)
      : in(arena, n), write(arena, n, 1), read(arena, n, n.R), every(replay_every(steps)),
        anchors(arena.take<T>((steps + every - 1) / every * n.state())), states(arena.take<T>((every + 1) * n.state())),
        retained(arena.take<T>(every * n.ld)), grad_state(arena.take<T>(n.state())),
        grad_read_weights(arena.take<T>(n.R * n.ld)), grad_write_weights(arena.take<T>(n.ld)),
        came_read(arena.take<T>(n.R * n.ld)), came_write(arena.take<T>(n.ld)), read_weights(arena.take<T>(n.R * n.ld)),
        write_weights(arena.take<T>(n.ld)), allocation(arena.take<T>(n.ld)), products(arena.take<T>(n.ld)),
        grad_rows(arena.take<T>(n.R * n.ld)), grad_squares(arena.take<T>(n.R * n.ld)), grad_retained(arena.take<T>(n.ld)),
        grad_came(arena.take<T>(n.R * n.ld)), columns(arena.take<T>(2 * n.ld)), directions(arena.take<T>(2 * n.R * n.ld)),
        logs(arena.take<T>(n.ld)), shares(arena.take<T>(n.ld)), along(arena.take<T>(2 * n.R * n.ld)),
        scaled(arena.take<T>(2 * n.R * n.ld)), grad_read(arena.take<T>(n.R * n.D)) {
    for (int k = 0; k < told_count; ++k) grad_told.*told_fields<T*>[k] = arena.take<T>(n.told[k]);
  }
};

// The weights that came into step t, or 0 where the sample begins anew there.
template <class T>
void load_came(const DncScanBackward& a, const Sizes<T>& n, int64_t b, int64_t t, T* read, T* write) {
  if (a.sequences.begins(t, n.B, b)) {
    std::memset(read, 0, n.R * n.ld * sizeof(T));
    std::memset(write, 0, n.ld * sizeof(T));
    return;
  }
  const int64_t row = t > 0 ? (t - 1) * n.B + b : b;
  load_or_clear(t > 0 ? a.read_history : a.before.read_weights, n.R, n, row, read);
  load_or_clear(t > 0 ? a.write_history : a.before.write_weights, 1, n, row, write);
}

// The state after step t from that before, by the weights that were kept; from and to may be the same.
template <class T>
void replay_step(const DncScanBackward& a, const Sizes<T>& n, int64_t b, int64_t t, const Held<T>& from, const Held<T>& to,
                 T* retained, bool links, BackwardScratch<T>& s) {
  const int64_t row = t * n.B + b;
  s.in.load(a.told, a.input, n, row);
  load_came(a, n, b, t, s.came_read, s.came_write);
  load_or_clear(a.write_history, 1, n, row, s.write_weights);
  use_slots<T>(n, s.in.free_gates, s.came_read, s.came_write, from.usage, retained, to.usage);
  write_memory<T>(n, s.write_weights, s.in.erase, s.in.write_vector, n.deallocate ? retained : nullptr, from.memory, to.memory);
  if (!n.links || !links) return;
  update_links<T>(n, s.write_weights, from.precedence, from.links, to.links);
  precede<T>(n, s.write_weights, from.precedence, to.precedence);
}

// Back through the links for HEADS heads, in one traversal. `across` and `down` are gradients of backward[r][j] and forward[r][i]
// up to factors that are in of_across and of_down instead: grad_links += sum over r of of_across[r][i] across[r][j] + down[r][i]
// of_down[r][j]. Results: by_row[r][i] = sum over j of links[i, j] across[r][j], by_column[r][j] = sum over i of links[i, j]
// down[r][i], of the links after the step, made again from those before. LAST: grad_links becomes that of the links before, and
// the gradients of the write weights and of the precedence before are added.
template <class T, int HEADS, bool LAST>
void follow_back(const Sizes<T>& n, const T* weights, const T* precedence, const T* links, const T* across, const T* down,
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

// Back through reading: from grad_read_weights, of those that came out, to grad_came, of those that came in, and the gradients
// of modes, sharpening and what was read by content.
template <class T>
void read_backward(const Sizes<T>& n, const DncScanBackward& a, int64_t row, const Held<T>& before, const T* memory,
                   const Held<T>& grad, BackwardScratch<T>& s) {
  const int64_t ld = n.ld, R = n.R, rows = R * ld;
  const Told<T>& in = s.in;
  const DncInterface<T*>& told = s.grad_told;
  address(n, memory, in.read_keys, in.read_sharpness, in.read_masks, s.read);
  std::memcpy(s.grad_rows, s.grad_read_weights, rows * sizeof(T));
  if (n.links) {
    const T *across = s.grad_read_weights, *down = across, *of_across = s.scaled, *of_down = s.scaled + rows;
    for (int64_t r = 0; r < R; ++r) {
      const T *modes = in.read_modes + 3 * r, *of_read = s.grad_read_weights + r * ld;
      told.read_modes[3 * r + 1] = dot_rows(static_cast<const T*>(s.read.weights + r * ld), of_read, ld);
      scale_slots(s.grad_rows + r * ld, ld, modes[1]);
    }
    if (n.sharpened) {
      load_or_clear(a.directions, 2 * R, n, row, s.directions);
      for (int64_t k = 0; k < 2 * R; ++k) {  // backward and forward of each head
        const T *direction = s.directions + k * ld, *of_read = s.grad_read_weights + k / 2 * ld;
        const int64_t mode = 3 * (k / 2) + 2 * (k % 2);
        T* of_direction = s.along + (k % 2 * R + k / 2) * ld;
        sharpen(n, direction, in.link_sharpening[k], s.logs, s.shares);
        told.read_modes[mode] = dot_rows(static_cast<const T*>(s.shares), of_read, ld);
        for (int64_t i = 0; i < ld; i += width<T>) store(of_direction + i, load(of_read + i) * in.read_modes[mode]);
        told.link_sharpening[k] = sharpen_backward<T>(n, direction, in.link_sharpening[k], s.logs, s.shares, of_direction);
      }
      across = s.along;
      down = s.along + rows;
      of_across = of_down = s.came_read;
    } else {
      for (int64_t r = 0; r < R; ++r)
        for (int64_t i = r * ld; i < (r + 1) * ld; i += width<T>) {
          const Vec<T> came = load(s.came_read + i);
          store(s.scaled + i, came * in.read_modes[3 * r]);
          store(s.scaled + rows + i, came * in.read_modes[3 * r + 2]);
        }
    }
    T *by_row = s.directions, *by_column = s.directions + rows;
    for_heads<T>(R, [&](int64_t first, auto group) {
      constexpr int HEADS = decltype(group)::value;
      const int64_t at = first * ld;
      const auto follow = [&](auto last) {
        follow_back<T, HEADS, decltype(last)::value>(n, s.write_weights, before.precedence, before.links, across + at,
                                                     down + at, of_across + at, of_down + at, grad.links, by_row + at,
                                                     by_column + at, s.grad_write_weights, grad.precedence, s.columns);
      };
      if (first + HEADS == R) follow(std::true_type());
      else follow(std::false_type());
    });
    for (int64_t r = 0; r < R; ++r) {
      const T *came = s.came_read + r * ld, *of_row = by_row + r * ld, *of_column = by_column + r * ld;
      T backward = 1, forward = 1;
      if (!n.sharpened) {
        told.read_modes[3 * r] = dot_rows(came, of_row, ld);
        told.read_modes[3 * r + 2] = dot_rows(came, of_column, ld);
        backward = in.read_modes[3 * r];
        forward = in.read_modes[3 * r + 2];
      }
      for (int64_t i = 0; i < ld; i += width<T>)
        store(s.grad_came + r * ld + i, load(of_row + i) * backward + load(of_column + i) * forward);
    }
  } else {
    std::memset(s.grad_came, 0, rows * sizeof(T));
  }
  address_backward<T>(n, memory, in.read_keys, in.read_sharpness, in.read_masks, s.read, s.grad_rows, s.grad_squares,
                      grad.memory, told.read_keys, told.read_sharpness, told.read_masks);
}

// Back through the write into memory: grad_memory from that of the memory after it to that of the memory before it; adds the
// gradient of the write weights, and with deallocation that of `retained`.
template <class T, bool DEALLOCATE>
void write_backward(const Sizes<T>& n, const T* memory, const T* retained, T* grad_memory, BackwardScratch<T>& s) {
  for (int64_t d = 0; d < n.D; ++d) {
    const T erase = s.in.erase[d], vector = s.in.write_vector[d];
    Vec<T> of_erase{}, of_vector{};
    for (int64_t i = 0; i < n.ld; i += width<T>) {
      const Vec<T> weight = load(s.write_weights + i), old = load(memory + d * n.ld + i), g = load(grad_memory + d * n.ld + i);
      Vec<T> kept = old, of_kept = g * (T(1) - weight * erase);
      if (DEALLOCATE) {
        const Vec<T> factor = load(retained + i);
        kept *= factor;
        store(s.grad_retained + i, load(s.grad_retained + i) + of_kept * old);
        of_kept *= factor;
      }
      const Vec<T> erased = g * kept;
      of_erase -= erased * weight;
      of_vector += g * weight;
      store(s.grad_write_weights + i, load(s.grad_write_weights + i) + g * vector - erased * erase);
      store(grad_memory + d * n.ld + i, of_kept);
    }
    s.grad_told.erase[d] = sum_lanes<T>(of_erase);
    s.grad_told.write_vector[d] = sum_lanes<T>(of_vector);
  }
}

// Back through allocation, from the right and without a division: from grad, of the allocation, to grad_usage, added.
template <class T>
void allocate_backward(const Sizes<T>& n, const int64_t* order, const T* usage, const T* products, const T* grad,
                       T* grad_usage) {
  T after = 0;
  for (int64_t k = n.N - 1; k >= 0; --k) {
    const int64_t i = order[k];
    grad_usage[i] += products[k] * (after - grad[i]);
    after = (T(1) - usage[i]) * grad[i] + usage[i] * after;
  }
}

// Back through the gates, allocation and content of the write, from grad_write_weights.
template <class T>
void choose_backward(const Sizes<T>& n, const DncScanBackward& a, int64_t row, const T* memory, const T* usage,
                     const Held<T>& grad, BackwardScratch<T>& s) {
  const Told<T>& in = s.in;
  const int64_t* order = a.orders + row * n.N;
  address(n, memory, in.write_key, in.write_sharpness, in.write_mask, s.write);
  allocate(n, order, usage, s.allocation, s.products);
  const T share = *in.allocation_gate, gate = *in.write_gate;
  Vec<T> of_gate{}, of_share{};
  for (int64_t i = 0; i < n.ld; i += width<T>) {
    const Vec<T> g = load(s.grad_write_weights + i), free = load(s.allocation + i), alike = load(s.write.weights + i);
    of_gate += g * (free * share + alike * (T(1) - share));
    of_share += g * (free - alike);
    store(s.grad_write_weights + i, g * (share * gate));
    store(s.grad_rows + i, g * ((T(1) - share) * gate));
  }
  *s.grad_told.write_gate = sum_lanes<T>(of_gate);
  *s.grad_told.allocation_gate = sum_lanes<T>(of_share) * gate;
  allocate_backward<T>(n, order, usage, s.products, s.grad_write_weights, grad.usage);
  address_backward<T>(n, memory, in.write_key, in.write_sharpness, in.write_mask, s.write, s.grad_rows, s.grad_squares,
                      grad.memory, s.grad_told.write_key, s.grad_told.write_sharpness, s.grad_told.write_mask);
}

// Back through usage and retention: grad_usage from that of the usage after to that before, and grad_came gains what comes
// through `retained`, whose own gradient is in grad_retained so far.
template <class T>
void use_backward(const Sizes<T>& n, const T* usage, const T* retained, T* grad_usage, BackwardScratch<T>& s) {
  const T* free_gates = s.in.free_gates;
  for (int64_t i = 0; i < n.ld; i += width<T>) {
    const Vec<T> g = load(grad_usage + i), used = load(usage + i), weight = load(s.came_write + i);
    store(s.grad_retained + i, load(s.grad_retained + i) + g * (used + (T(1) - used) * weight));
    store(grad_usage + i, g * load(retained + i) * (T(1) - weight));
  }
  for (int64_t r = 0; r < n.R; ++r) {
    Vec<T> of_gate{};
    for (int64_t i = 0; i < n.ld; i += width<T>) {
      Vec<T> others = load(s.grad_retained + i);
      for (int64_t v = 0; v < n.R; ++v)
        if (v != r) others *= T(1) - load(s.came_read + v * n.ld + i) * free_gates[v];
      of_gate -= others * load(s.came_read + r * n.ld + i);
      store(s.grad_came + r * n.ld + i, load(s.grad_came + r * n.ld + i) - others * free_gates[r]);
    }
    s.grad_told.free_gates[r] = sum_lanes<T>(of_gate);
  }
}

template <class T>
void step_backward(const DncScanBackward& a, const Sizes<T>& n, int64_t b, int64_t t, const Held<T>& before,
                   const Held<T>& after, const T* retained, const Held<T>& grad, BackwardScratch<T>& s) {
  const int64_t row = t * n.B + b, ld = n.ld, R = n.R;
  s.in.load(a.told, a.input, n, row);
  load_came(a, n, b, t, s.came_read, s.came_write);
  load_or_clear(a.read_history, R, n, row, s.read_weights);
  load_or_clear(a.write_history, 1, n, row, s.write_weights);
  if (a.grad_reads) {
    const T* grad_read = widen(a.grad_reads, a.input, row * R * n.D, R * n.D, s.grad_read);
    dot_slots<T>(after.memory, ld, ld, n.D, R, grad_read, s.grad_rows);
    for (int64_t i = 0; i < R * ld; i += width<T>)
      store(s.grad_read_weights + i, load(s.grad_read_weights + i) + load(s.grad_rows + i));
    const T* none = nullptr;
    add_gradient<T, true, false>(after.memory, grad.memory, ld, ld, n.D, R, s.read_weights, grad_read, none, none, none);
  }
  if (n.links) {  // of the precedence after: before the links, which add to that of the precedence before
    const T of_sum = dot_rows(static_cast<const T*>(grad.precedence), static_cast<const T*>(before.precedence), ld);
    Vec<T> written{};
    for (int64_t i = 0; i < ld; i += width<T>) written += load(s.write_weights + i);
    const T rest = T(1) - sum_lanes<T>(written);
    for (int64_t i = 0; i < ld; i += width<T>) {
      const Vec<T> g = load(grad.precedence + i);
      store(s.grad_write_weights + i, load(s.grad_write_weights + i) + (g - of_sum));
      store(grad.precedence + i, g * rest);
    }
    for (int64_t i = n.N; i < ld; ++i) s.grad_write_weights[i] = 0;
  }
  std::memset(s.grad_retained, 0, ld * sizeof(T));
  read_backward<T>(n, a, row, before, after.memory, grad, s);
  if (n.deallocate) write_backward<T, true>(n, before.memory, retained, grad.memory, s);
  else write_backward<T, false>(n, before.memory, retained, grad.memory, s);
  choose_backward<T>(n, a, row, before.memory, after.usage, grad, s);
  use_backward<T>(n, before.usage, retained, grad.usage, s);
  std::memcpy(s.grad_read_weights, s.grad_came, R * ld * sizeof(T));
  std::memset(s.grad_write_weights, 0, ld * sizeof(T));  // usage takes them as a constant
  for (int k = 0; k < told_count; ++k)
    if (void* to = a.grad_told.*told_fields<void*>[k])
      narrow(s.grad_told.*told_fields<T*>[k], n.told[k], to, a.input, row * n.told[k]);
}

template <class T>
void scan_backward_sample(const DncScanBackward& a, const Sizes<T>& n, int64_t b, BackwardScratch<T>& s) {
  const int64_t ld = n.ld, length = a.sequences.length(a.T, b);
  const Held<T> grad(s.grad_state, n);
  load_state(a.grad_after, n, b, grad);
  load_or_clear(a.grad_after.read_weights, n.R, n, b, s.grad_read_weights);
  load_or_clear(a.grad_after.write_weights, 1, n, b, s.grad_write_weights);
  T* grad_start = a.grad_start ? static_cast<T*>(a.grad_start) + b * n.N * n.D : nullptr;
  if (grad_start) std::memset(grad_start, 0, n.N * n.D * sizeof(T));
  // The first replay, to the state before each step at which a segment may begin; the second one's arrays are free for it.
  const auto anchor = [&](int64_t t) { return Held<T>(s.anchors + t / s.every * n.state(), n); };
  const auto state = [&](int64_t step) { return Held<T>(s.states + step * n.state(), n); };
  if (length > 0) load_state(a.before, n, b, anchor(0));
  for (int64_t t = 0; t < (length - 1) / s.every * s.every; ++t) {
    const Held<T> from = t % s.every == 0 ? anchor(t) : state(0), to = (t + 1) % s.every == 0 ? anchor(t + 1) : state(0);
    if (a.sequences.begins(t, n.B, b)) start_state(a.sequences.start, n, from);
    replay_step<T>(a, n, b, t, from, to, s.retained, true, s);
  }
  for (int64_t end = length, first = 0; end > 0; end = first) {
    first = a.sequences.replay_from(end - 1, s.every, n.B, b);
    const int64_t steps = end - first;
    const bool begins = a.sequences.begins(first, n.B, b);
    if (begins) start_state(a.sequences.start, n, state(0));
    else std::memcpy(s.states, s.anchors + first / s.every * n.state(), n.state() * sizeof(T));
    for (int64_t step = 0; step < steps; ++step)
      replay_step<T>(a, n, b, first + step, state(step), state(step + 1), s.retained + step * ld, step + 1 < steps, s);
    for (int64_t step = steps - 1; step >= 0; --step)
      step_backward<T>(a, n, b, first + step, state(step), state(step + 1), s.retained + step * ld, grad, s);
    if (begins) {
      give_to_start(grad.memory, ld, n.N, n.D, 0, ld, grad_start);
      clear_rows(n, grad);
      std::memset(s.grad_read_weights, 0, n.R * ld * sizeof(T));
    }
  }
  for (int k = 0; k < told_count; ++k)
    clear_steps<T>(a.grad_told.*told_fields<void*>[k], a.input, length, a.T, n.B, b, n.told[k]);
  store_state(grad, n, b, a.grad_before);
  store_rows<T>(s.grad_read_weights, ld, n.R, n.N, 0, ld, static_cast<T*>(a.grad_before.read_weights) + b * n.R * n.N);
}

// ---- samples over threads -----------------------------------------------------------------------------------------------

template <class T, class Arguments, class Scratchpad, class Sample>
bool run_samples(const Arguments& a, const Parallel& parallel, double times, Scratchpad scratchpad, Sample sample) {
  const Sizes<T> n(a);
  const double N = static_cast<double>(a.N), R = static_cast<double>(a.R);
  const double step = N * ((2 * R + 5) * static_cast<double>(a.D) + (n.links ? (2 * R + 3) * N : 0.0));
  const double work = times * static_cast<double>(a.B) * static_cast<double>(a.T + 1) * step;
  return run_items(
      parallel, a.B, worthwhile_tasks(parallel, a.B, work), [&](Arena& arena) { return scratchpad(arena, n); },
      [&](int64_t b, auto& s) { sample(n, b, s); });
}

template <class T>
bool dnc_scan(const DncScan& a, const Parallel& parallel) {
  return run_samples<T>(
      a, parallel, 1, [](Arena& arena, const Sizes<T>& n) { return ForwardScratch<T>(arena, n); },
      [&](const Sizes<T>& n, int64_t b, ForwardScratch<T>& s) { scan_sample(a, n, b, s); });
}

template <class T>
bool dnc_scan_backward(const DncScanBackward& a, const Parallel& parallel) {
  return run_samples<T>(
      a, parallel, 3, [&](Arena& arena, const Sizes<T>& n) { return BackwardScratch<T>(arena, n, a.T); },
      [&](const Sizes<T>& n, int64_t b, BackwardScratch<T>& s) { scan_backward_sample(a, n, b, s); });
}

}  // namespace

MANN_FAST_DNC_OPS(MANN_FAST_BY_DTYPE)

}  // namespace MANN_FAST_ISA
}  // namespace mann_fast

// Sparse access, one sample: the search for the most similar slots, which of them differ, and their order by age.
#pragma once
#include "rows.h"

namespace mann_fast {
namespace {

template <class T>
inline T dot_of(const T* a, const T* b, int64_t count) {
  Vec<T> sum{};
  int64_t d = 0;
  for (; d + width<T> <= count; d += width<T>) sum += load(a + d) * load(b + d);
  T total = 0;
  for (; d < count; ++d) total += a[d] * b[d];
  return total + sum_lanes<T>(sum);
}

template <class T>
inline void add_scaled(const T* from, T factor, int64_t count, T* to) {
  for (int64_t d = 0; d < count; ++d) to[d] += factor * from[d];
}

// ---- the search --------------------------------------------------------------------------------------------------------

// The order of a descending sort: NaN before all.
template <class T>
inline bool above(T a, T b) {
  return a > b || (a != a && b == b);
}

// The K greatest that one head has met, greatest first, of equal ones the first met first.
template <class T>
struct Best {
  T* score;
  int64_t* slot;
  int64_t K, count;
  Best(Arena& arena, int64_t K) : score(arena.take<T>(K)), slot(arena.take<int64_t>(K)), K(K), count(0) {}
  bool takes(T c) const { return count < K || above(c, score[K - 1]); }
  void insert(T c, int64_t i) {
    if (!takes(c)) return;
    int64_t place = count < K ? count++ : K - 1;
    for (; place > 0 && above(c, score[place - 1]); --place) {
      score[place] = score[place - 1];
      slot[place] = slot[place - 1];
    }
    score[place] = c;
    slot[place] = i;
  }
};

// Of one part of a sample's slots.
template <class T>
struct SearchPart {
  T *rows, *scores, *squares;  // [tile, D padded], [R, tile], [tile]
  Best<T>* best;               // [R]
  SearchPart(Arena& arena, int64_t D, int64_t R, int64_t K)
      : rows(arena.take<T>(padded<T>(D) * tile)), scores(arena.take<T>(R * tile)), squares(arena.take<T>(tile)),
        best(arena.take<Best<T>>(R)) {
    for (int64_t r = 0; r < R; ++r) {
      const Best<T> one(arena, K);
      if (best != nullptr) best[r] = one;
    }
  }
};

template <class T>
struct Keys {
  const T* padded_keys;  // [R][ld]
  const T* squares;      // [R]
  int64_t R, D;
  T eps;
};

// Offers slots [lo, hi) of memory [N][D], or where there is a list the slots at these places of it, ascending, to the best of
// each head: the memory is read once. squares [N] holds the square of each slot's norm where `known`, else it is made; where it
// is null, as with a list, it is not kept.
template <class T>
void search_slots(const T* memory, const int64_t* list, Range slots, const Keys<T>& keys, T* squares, bool known,
                  SearchPart<T>& s) {
  constexpr int W = width<T>;
  const int64_t ld = padded<T>(keys.D);
  const T infinity = std::numeric_limits<T>::infinity();
  for (int64_t r = 0; r < keys.R; ++r) s.best[r].count = 0;
  for (int64_t lo = slots.lo; lo < slots.hi; lo += tile) {
    const int64_t end = lo + tile < slots.hi ? lo + tile : slots.hi, valid = end - lo, count = padded<T>(valid);
    const T* rows = memory + lo * keys.D;
    if (list) {
      for (int64_t i = 0; i < count; ++i)
        pad_rows(memory + list[lo + (i < valid ? i : 0)] * keys.D, i < valid, keys.D, 1, ld, s.rows + i * ld);
      rows = s.rows;
    } else if (ld != keys.D || valid != count) {
      pad_rows(rows, valid, keys.D, count, ld, s.rows);
      rows = s.rows;
    }
    if (known) {
      std::memcpy(s.squares, squares + lo, valid * sizeof(T));
      for (int64_t i = valid; i < count; ++i) s.squares[i] = 0;
    }
    dot_rows_of_slots(rows, ld, count, keys.R, keys.padded_keys, s.scores, known ? nullptr : s.squares,
                      end < slots.hi && !list ? memory + end * keys.D : nullptr, keys.D);
    if (!known && squares) std::memcpy(squares + lo, s.squares, valid * sizeof(T));
    for (int64_t r = 0; r < keys.R; ++r) {
      Best<T>& best = s.best[r];
      T* scores = s.scores + r * tile;
      // One comparison for a vector: most have nothing that gets in.
      const T least = best.count < best.K ? -infinity : best.score[best.K - 1];
      IntVec<T> rejected = splat_int<T>(-1);
      for (int64_t i = 0; i < count; i += W) {
        const Vec<T> c = load(scores + i) * inverse_root<T>(load(s.squares + i) * keys.squares[r] + keys.eps);
        store(scores + i, c);
        rejected &= c <= least;
      }
      if (best.count == best.K && (least != least || least_lane<T>(-rejected) == 1)) continue;
      for (int64_t i = 0; i < valid; ++i) best.insert(scores[i], list ? list[lo + i] : lo + i);
    }
  }
}

// The best of all parts in those of the first. Parts hold ascending slots: so equal ones stay in the order of the slots.
template <class T>
void join_parts(SearchPart<T>* parts, int64_t count, int64_t R) {
  for (int64_t p = 1; p < count; ++p)
    for (int64_t r = 0; r < R; ++r)
      for (int64_t k = 0; k < parts[p].best[r].count; ++k)
        parts[0].best[r].insert(parts[p].best[r].score[k], parts[p].best[r].slot[k]);
}

inline void shell_sort(int64_t* x, int64_t count) {
  for (const int64_t gap : {1750, 701, 301, 132, 57, 23, 10, 4, 1})
    for (int64_t i = gap; i < count; ++i) {
      const int64_t value = x[i];
      int64_t j = i;
      for (; j >= gap && x[j - gap] > value; j -= gap) x[j] = x[j - gap];
      x[j] = value;
    }
}

// ---- the slots that differ -----------------------------------------------------------------------------------------------

// Those whose rows may differ from one that all others hold to the bit, as nearly all do in the steps after the start of a
// sequence. A search then compares these and K of the others, and finds what it would find among all.
struct Different {
  int64_t* count;  // -1: more than the limit, so that all are compared
  int64_t* slots;  // [limit], ascending
  int64_t limit;

  // By the last row: it is the one that is written last where none has been accessed.
  template <class T>
  void find(const T* memory, int64_t N, int64_t D) const {
    const T* last = memory + (N - 1) * D;
    *count = 0;
    for (int64_t i = 0; i < N && *count >= 0; ++i)
      if (std::memcmp(memory + i * D, last, D * sizeof(T)) != 0) insert(*count, i);
  }
  void add(int64_t slot) const {
    int64_t lo = 0, hi = *count < 0 ? 0 : *count;
    while (lo < hi) {
      const int64_t middle = (lo + hi) / 2;
      if (slots[middle] < slot) lo = middle + 1;
      else hi = middle;
    }
    if (*count >= 0 && (lo == *count || slots[lo] != slot)) insert(lo, slot);
  }
  // Into `list` [limit + K], ascending, these and the first K of the others; how many.
  int64_t candidates(int64_t N, int64_t K, int64_t* list) const {
    int64_t n = 0, at = 0;
    for (int64_t others = 0; others < K && n < N; ++n) {
      list[n] = n;
      if (at < *count && slots[at] == n) ++at;
      else ++others;
    }
    std::memcpy(list + n, slots + at, (*count - at) * sizeof(int64_t));
    return n + *count - at;
  }
  // The same of these, of what an index has found, which is sorted here, below 0 left out, and of the first K slots, so that
  // there are K.
  int64_t candidates(int64_t N, int64_t K, int64_t* found, int64_t found_count, int64_t* list) const {
    shell_sort(found, found_count);
    int64_t n = 0, at = 0, first = 0, next = 0;
    while (next < found_count && found[next] < 0) ++next;
    while (at < *count || next < found_count || first < K) {
      int64_t least = first < K ? first : N;
      if (at < *count && slots[at] < least) least = slots[at];
      if (next < found_count && found[next] < least) least = found[next];
      if (least == N) break;  // what is left is no slot
      list[n++] = least;
      first += first == least;
      at += at < *count && slots[at] == least;
      while (next < found_count && found[next] == least) ++next;
    }
    return n;
  }

 private:
  void insert(int64_t place, int64_t slot) const {
    if (*count == limit) {
      *count = -1;
      return;
    }
    std::memmove(slots + place + 1, slots + place, (*count - place) * sizeof(int64_t));
    slots[place] = slot;
    ++*count;
  }
};

// ---- the slots by age ----------------------------------------------------------------------------------------------------

// A doubly linked list of the slots, ascending by (last access, slot); place N stands before the first and after the last.
struct Ages {
  int32_t *next, *previous, *spare;  // [N + 1], [N + 1], [N]
  int64_t N;

  // A radix sort, byte by byte from the lowest, of times as they differ from the least; few bytes differ.
  void sort(const int64_t* times) const {
    int64_t least = times[0], most = times[0];
    for (int64_t i = 1; i < N; ++i) {
      least = times[i] < least ? times[i] : least;
      most = times[i] > most ? times[i] : most;
    }
    const uint64_t range = static_cast<uint64_t>(most) - static_cast<uint64_t>(least);
    int32_t *order = spare, *other = previous;
    for (int64_t i = 0; i < N; ++i) order[i] = static_cast<int32_t>(i);
    for (int shift = 0; shift < 64 && (range >> shift) != 0; shift += 8) {
      const auto digit = [&](int32_t i) {
        return ((static_cast<uint64_t>(times[i]) - static_cast<uint64_t>(least)) >> shift) & 255;
      };
      int64_t places[257] = {};
      for (int64_t i = 0; i < N; ++i) ++places[digit(static_cast<int32_t>(i)) + 1];
      for (int value = 0; value < 256; ++value) places[value + 1] += places[value];
      for (int64_t i = 0; i < N; ++i) other[places[digit(order[i])]++] = order[i];
      std::swap(order, other);
    }
    if (order == previous) std::memcpy(spare, previous, N * sizeof(int32_t));
    int32_t last = static_cast<int32_t>(N);
    for (int64_t i = 0; i < N; ++i) {
      link(last, spare[i]);
      last = spare[i];
    }
    link(last, static_cast<int32_t>(N));
  }
  void move_to_end(int64_t slot) const {
    const int32_t i = static_cast<int32_t>(slot), end = static_cast<int32_t>(N);
    link(previous[i], next[i]);
    link(previous[end], i);
    link(i, end);
  }
  void oldest(int64_t count, int64_t* slots) const {
    int32_t at = next[N];
    for (int64_t r = 0; r < count; ++r, at = next[at]) slots[r] = at;
  }

 private:
  void link(int32_t a, int32_t b) const {
    next[a] = b;
    previous[b] = a;
  }
};

// The same slots by going over all times: for a single step that takes less than to make the list.
inline void find_oldest(const int64_t* times, int64_t N, int64_t count, int64_t* slots) {
  int64_t found = 0;
  for (int64_t i = 0; i < N; ++i) {
    if (found == count && times[i] >= times[slots[count - 1]]) continue;
    int64_t place = found < count ? found++ : count - 1;
    for (; place > 0 && times[i] < times[slots[place - 1]]; --place) slots[place] = slots[place - 1];
    slots[place] = i;
  }
}

}  // namespace
}  // namespace mann_fast

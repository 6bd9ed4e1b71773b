// One step of a memory with sparse access for one sample, forward and backward: what sparse_scan and sparse_cell share.
#pragma once
#include "sparse_search.h"

namespace mann_fast {
namespace {

// In how many parts the slots of one sample are searched: where there are fewer samples than threads, and it is worth it.
template <class Arguments>
int64_t search_parts(const Arguments& a, const Parallel& parallel) {
  const double work = static_cast<double>(a.N) * static_cast<double>(a.D * a.R);
  return a.B < parallel.threads ? worthwhile_tasks(parallel, (a.N + tile - 1) / tile, work) : 1;
}

// The search of one sample, by all of its parts.
template <class T>
struct Searching {
  int64_t N, K, ld, count;
  SearchPart<T>* parts;
  T *padded_keys, *key_squares;
  template <class Arguments>
  Searching(Arena& arena, const Arguments& a, int64_t count)
      : N(a.N), K(a.K), ld(padded<T>(a.D)), count(count), parts(arena.take<SearchPart<T>>(count)),
        padded_keys(arena.take<T>(a.R * ld)), key_squares(arena.take<T>(a.R)) {
    for (int64_t p = 0; p < count; ++p) {
      const SearchPart<T> part(arena, a.D, a.R, a.K);
      if (parts != nullptr) parts[p] = part;
    }
  }
  // The best of each head, among all slots, or the first n of a list.
  const Best<T>* run(const T* memory, const T* keys, int64_t R, int64_t D, T eps, T* squares, bool known,
                     const Parallel& parallel, const int64_t* list = nullptr, int64_t n = 0) {
    pad_rows(keys, R, D, R, ld, padded_keys);
    for (int64_t r = 0; r < R; ++r) key_squares[r] = dot_of(keys + r * D, keys + r * D, D);
    const Keys<T> given = {padded_keys, key_squares, R, D, eps};
    const int64_t slots = list ? n : N, used = list && n < 16 * tile ? 1 : count;
    parallel_run(parallel, used, [&](int64_t p) {
      search_slots(memory, list, part_of(slots, used, p, tile), given, squares, known, parts[p]);
    });
    join_parts(parts, used, R);
    return parts[0].best;
  }
};

template <class T>
void copy_rows(const T* memory, const int64_t* slots, int64_t K, int64_t D, T* rows) {
  for (int64_t k = 0; k < K; ++k) std::memcpy(rows + k * D, memory + slots[k] * D, D * sizeof(T));
}

// A large array in parts.
template <class T>
void copy_array(const T* from, int64_t count, T* to, int64_t parts, const Parallel& parallel) {
  parallel_run(parallel, parts, [&](int64_t p) {
    const Range part = part_of(count, parts, p, 1024);
    std::memcpy(to + part.lo, from + part.lo, (part.hi - part.lo) * sizeof(T));
  });
}

// weights [K] = softmax of beta * scores, and read [D] = their sum of the rows [K][D].
template <class T>
void read_rows(const T* scores, const T* rows, int64_t K, int64_t D, T beta, T* weights, T* read) {
  T most = beta * scores[0], total = 0;
  for (int64_t k = 1; k < K; ++k) most = beta * scores[k] > most ? beta * scores[k] : most;
  for (int64_t k = 0; k < K; ++k) total += weights[k] = std::exp(beta * scores[k] - most);
  for (int64_t d = 0; d < D; ++d) read[d] = 0;
  for (int64_t k = 0; k < K; ++k) {
    weights[k] /= total;
    add_scaled(rows + k * D, weights[k], D, read);
  }
}

// ---- forward ---

// What head r wrote: sigmoid(eta) sigmoid(alpha) to the slots read last, sigmoid(eta) sigmoid(-alpha) to the oldest.
template <class T>
struct WriteGates {
  T gate, rest, write, closed;  // closed = 1 - write
  WriteGates(T alpha, const T* eta) : write(1), closed(0) {
    sigmoids(alpha, &gate, &rest);
    if (eta) sigmoids(*eta, &write, &closed);
  }
};

// What one step of one sample is told, in T.
template <class T>
struct SparseTold {
  const T *keys, *vectors, *gates, *sharpness, *write_gates;
  T *keys_buffer, *vectors_buffer, *gates_buffer, *sharpness_buffer, *write_gates_buffer;
  template <class Arguments>
  SparseTold(Arena& arena, const Arguments& a)
      : keys_buffer(arena.take<T>(a.R * a.D)), vectors_buffer(arena.take<T>(a.R * a.D)), gates_buffer(arena.take<T>(a.R)),
        sharpness_buffer(arena.take<T>(a.R)), write_gates_buffer(arena.take<T>(a.R)) {}
  template <class Arguments>
  void load(const Arguments& a, int64_t row) {
    const auto of = [&](const void* from, int64_t count, T* buffer) {
      return from ? widen(from, a.input, row * count, count, buffer) : nullptr;
    };
    keys = of(a.told.keys, a.R * a.D, keys_buffer);
    vectors = of(a.told.write_vectors, a.R * a.D, vectors_buffer);
    gates = of(a.told.gate_logits, a.R, gates_buffer);
    sharpness = of(a.told.sharpness, a.R, sharpness_buffer);
    write_gates = of(a.told.write_gate_logits, a.R, write_gates_buffer);
  }
  T beta(int64_t r) const { return sharpness ? sharpness[r] : T(1); }
  WriteGates<T> write(int64_t r) const { return WriteGates<T>(gates[r], write_gates ? write_gates + r : nullptr); }
};

// One sample's state, which is changed where it comes out.
template <class T>
struct SparseSample {
  T* memory;
  int64_t* slots;
  T* weights;
  int64_t *last_access, *clock;
  bool known;  // whether the squares of the norms are
  SparseSample() = default;
  SparseSample(const SparseScan& a, int64_t b)
      : memory(static_cast<T*>(a.out_memory) + b * a.N * a.D), slots(a.out_read_slots + b * a.R * a.K),
        weights(static_cast<T*>(a.out_read_weights) + b * a.R * a.K), last_access(a.out_last_access + b * a.N),
        clock(a.out_clock + b), known(false) {}
};

// The arrays of a sample: of its own those that go from step to step, the others in common with the samples beside it.
template <class T>
struct SparseScratch {
  bool listed;  // whether there are lists of the slots by age and of those that differ: not for a single step alone
  bool stale;   // whether these have to be made
  SparseSample<T> x;
  SparseTold<T> told;
  T *reads, *squares, *rows, *write_weights;  // [R, D], [N], [K, D], [R, K + 1]
  int64_t *oldest, *write_slots;              // [R], [R, K + 1]
  int64_t* touched;                           // those read before, erased, and read; then each once, ascending
  T *total, *of_head;                         // of the touched: sums of weights
  T* changed;                                 // rows whose norms are made anew
  int64_t *lists, *found;                     // [lists_size(N)], what one sample's steps hand on; [num_candidates]
  int64_t* candidates;                        // [different_limit(N) + K + num_candidates]
  int32_t* spare;
  Ages ages{};
  Different different{};
  Searching<T> searching;
  SparseScratch(Arena& own, Arena& common, const SparseScan& a, int64_t parts)
      : listed(a.T > 1 || a.lists), told(common, a), reads(common.take<T>(a.R * a.D)), squares(own.take<T>(a.N)),
        rows(common.take<T>(a.K * a.D)), write_weights(common.take<T>(a.R * (a.K + 1))), oldest(common.take<int64_t>(a.R)),
        write_slots(common.take<int64_t>(a.R * (a.K + 1))), touched(common.take<int64_t>(a.R * (2 * a.K + 1))),
        total(common.take<T>(a.R * (2 * a.K + 1))), of_head(common.take<T>(a.R * (2 * a.K + 1))),
        changed(common.take<T>(padded<T>(a.D) * width<T>)), lists(own.take<int64_t>(listed && !a.lists ? lists_size(a.N) : 0)),
        found(common.take<int64_t>(a.num_candidates)),
        candidates(common.take<int64_t>(listed ? different_limit(a.N) + a.K + a.num_candidates : 0)),
        spare(common.take<int32_t>(listed ? a.N : 0)), searching(common, a, parts) {}
};

template <class T>
void begin_sample(const SparseScan& a, int64_t b, const Parallel& parallel, SparseScratch<T>& s) {
  const int64_t parts = s.searching.count;
  s.x = SparseSample<T>(a, b);
  if (a.memory != a.out_memory)
    copy_array(static_cast<const T*>(a.memory) + b * a.N * a.D, a.N * a.D, s.x.memory, parts, parallel);
  if (a.last_access != a.out_last_access) copy_array(a.last_access + b * a.N, a.N, s.x.last_access, parts, parallel);
  std::memcpy(s.x.weights, static_cast<const T*>(a.read_weights) + b * a.R * a.K, a.R * a.K * sizeof(T));
  for (int64_t j = 0; j < a.R * a.K; ++j) {
    const int64_t slot = a.read_slots[b * a.R * a.K + j];
    s.x.slots[j] = slot < 0 ? 0 : slot < a.N ? slot : a.N - 1;
  }
  *s.x.clock = a.clock[b];
  if (!s.listed) return;
  int64_t* of_sample = a.lists ? a.lists + b * lists_size(a.N) : s.lists;
  const int64_t limit = different_limit(a.N);
  int32_t* next = reinterpret_cast<int32_t*>(of_sample + 1 + limit);
  s.different = {of_sample, of_sample + 1, limit};
  s.ages = {next, next + a.N + 1, s.spare, a.N};
  s.stale = !a.lists || *of_sample == unmade;
}

template <class T>
void restart_sample(const SparseScan& a, const Parallel& parallel, SparseScratch<T>& s) {
  copy_array(static_cast<const T*>(a.sequences.start), a.N * a.D, s.x.memory, s.searching.count, parallel);
  for (int64_t j = 0; j < a.R * a.K; ++j) {
    s.x.slots[j] = j % a.K;
    s.x.weights[j] = j % a.K == 0 ? T(1) : T(0);
  }
  for (int64_t i = 0; i < a.N; ++i) s.x.last_access[i] = i == 0 ? 0 : -1;
  *s.x.clock = 0;
  s.x.known = false;
  s.stale = true;
}

// The squares of the norms of rows that were written, by the instructions of the search.
template <class T>
void renew_squares(const SparseScan& a, SparseScratch<T>& s) {
  const int64_t count = a.R * (a.K + 1), ld = padded<T>(a.D);
  for (int64_t first = 0; first < count; first += width<T>) {
    const int64_t rows = count - first < width<T> ? count - first : width<T>;
    for (int64_t j = 0; j < width<T>; ++j)
      pad_rows(s.x.memory + s.write_slots[first + (j < rows ? j : 0)] * a.D, 1, a.D, 1, ld, s.changed + j * ld);
    T squares[width<T>];
    const T* none = nullptr;
    dot_group_of_slots<T, 0, true>(s.changed, ld, width<T>, none, static_cast<T*>(nullptr), squares, none, a.D);
    for (int64_t j = 0; j < rows; ++j) s.squares[s.write_slots[first + j]] = squares[j];
  }
}

template <class T>
void write(const SparseScan& a, SparseScratch<T>& s) {
  const SparseSample<T>& x = s.x;
  const int64_t D = a.D, K = a.K;
  if (s.listed) s.ages.oldest(a.R, s.oldest);
  else find_oldest(x.last_access, a.N, a.R, s.oldest);
  for (int64_t r = 0; r < a.R; ++r) std::memset(x.memory + s.oldest[r] * D, 0, D * sizeof(T));
  for (int64_t r = 0; r < a.R; ++r) {
    const WriteGates<T> gates = s.told.write(r);
    T* weights = s.write_weights + r * (K + 1);
    int64_t* slots = s.write_slots + r * (K + 1);
    for (int64_t k = 0; k < K; ++k) {
      weights[k] = gates.write * (gates.gate * x.weights[r * K + k]);
      slots[k] = x.slots[r * K + k];
    }
    weights[K] = gates.write * gates.rest;
    slots[K] = s.oldest[r];
    for (int64_t k = 0; k <= K; ++k) add_scaled(s.told.vectors + r * D, weights[k], D, x.memory + slots[k] * D);
  }
  if (s.listed)
    for (int64_t j = 0; j < a.R * (K + 1); ++j) s.different.add(s.write_slots[j]);
  if (x.known) renew_squares(a, s);
}

// last_access of the slots whose weights, summed over the heads, exceed the threshold.
template <class T>
void note_access(const SparseScan& a, SparseScratch<T>& s) {
  const SparseSample<T>& x = s.x;
  const int64_t R = a.R, K = a.K;
  std::memcpy(s.touched, s.write_slots, R * (K + 1) * sizeof(int64_t));
  std::memcpy(s.touched + R * (K + 1), x.slots, R * K * sizeof(int64_t));
  shell_sort(s.touched, R * (2 * K + 1));
  int64_t count = 1;
  for (int64_t j = 1; j < R * (2 * K + 1); ++j)
    if (s.touched[j] != s.touched[count - 1]) s.touched[count++] = s.touched[j];
  const auto place = [&](int64_t slot) {
    int64_t lo = 0, hi = count - 1;
    while (lo < hi) {
      const int64_t middle = (lo + hi) / 2;
      if (s.touched[middle] < slot) lo = middle + 1;
      else hi = middle;
    }
    return lo;
  };
  std::memset(s.total, 0, count * sizeof(T));
  for (int64_t r = 0; r < R; ++r) {
    std::memset(s.of_head, 0, count * sizeof(T));
    for (int64_t k = 0; k <= K; ++k) s.of_head[place(s.write_slots[r * (K + 1) + k])] += s.write_weights[r * (K + 1) + k];
    for (int64_t k = 0; k < K; ++k) s.of_head[place(x.slots[r * K + k])] += x.weights[r * K + k];
    for (int64_t j = 0; j < count; ++j) s.total[j] += s.of_head[j];
  }
  ++*x.clock;
  for (int64_t j = 0; j < count; ++j) {
    if (!(s.total[j] > static_cast<T>(a.threshold))) continue;
    x.last_access[s.touched[j]] = *x.clock;
    if (s.listed) s.ages.move_to_end(s.touched[j]);
  }
}

// Step t of sample b, of which s.told says what it is told; leaves the reads in s.reads, and keeps what backward takes.
template <class T>
void step_sample(const SparseScan& a, int64_t t, int64_t b, const Parallel& parallel, SparseScratch<T>& s) {
  const int64_t D = a.D, R = a.R, K = a.K, row = t * a.B + b;
  SparseSample<T>& x = s.x;
  if (s.listed && s.stale) {
    s.ages.sort(x.last_access);
    s.different.find(x.memory, a.N, D);
    s.stale = false;
  }
  write(a, s);
  const T eps = static_cast<T>(a.eps);
  const Best<T>* best;
  if (s.listed && *s.different.count >= 0) {
    const int64_t* found = a.candidates ? a.candidates + b * a.num_candidates : nullptr;
    const bool indexed = found && a.num_candidates > 0 && found[0] >= 0;
    if (indexed) std::memcpy(s.found, found, a.num_candidates * sizeof(int64_t));
    const int64_t count = indexed ? s.different.candidates(a.N, K, s.found, a.num_candidates, s.candidates)
                                  : s.different.candidates(a.N, K, s.candidates);
    best = s.searching.run(x.memory, s.told.keys, R, D, eps, nullptr, false, parallel, s.candidates, count);
  } else {
    best = s.searching.run(x.memory, s.told.keys, R, D, eps, s.squares, x.known, parallel);
    x.known = true;
  }
  for (int64_t r = 0; r < R; ++r) {
    T* rows = a.rows ? static_cast<T*>(a.rows) + (row * R + r) * K * D : s.rows;
    std::memcpy(x.slots + r * K, best[r].slot, K * sizeof(int64_t));
    copy_rows(x.memory, best[r].slot, K, D, rows);
    read_rows<T>(best[r].score, rows, K, D, s.told.beta(r), x.weights + r * K, s.reads + r * D);
  }
  note_access(a, s);
  if (a.rows == nullptr) return;
  std::memcpy(a.oldest + row * R, s.oldest, R * sizeof(int64_t));
  std::memcpy(a.slot_history + row * R * K, x.slots, R * K * sizeof(int64_t));
  std::memcpy(static_cast<T*>(a.weight_history) + row * R * K, x.weights, R * K * sizeof(T));
}

// ---- backward ----------------------------------------------------------------------------------------------------------

// Back through the read of one head, from the gradients of its read (or null) and of its weights [K], which are changed: adds to
// the gradients of the memory [N][D], of the key and of beta.
template <class T>
void read_rows_backward(const T* rows, const int64_t* slots, const T* weights, int64_t K, int64_t D, const T* key, T beta,
                        T eps, const T* grad_read, T* grad_weights, T* grad_memory, T* grad_key, T* grad_beta) {
  T mean = 0;
  for (int64_t k = 0; k < K; ++k) {
    if (grad_read) {
      grad_weights[k] += dot_of(grad_read, rows + k * D, D);
      add_scaled(grad_read, weights[k], D, grad_memory + slots[k] * D);
    }
    mean += weights[k] * grad_weights[k];
  }
  const T key_square = dot_of(key, key, D);
  T grad_key_square = 0;
  for (int64_t k = 0; k < K; ++k) {
    const T* row = rows + k * D;
    const T grad_score = weights[k] * (grad_weights[k] - mean);
    const T dot = dot_of(key, row, D), square = dot_of(row, row, D), inverse = T(1) / std::sqrt(key_square * square + eps);
    *grad_beta += grad_score * dot * inverse;
    const T grad_dot = grad_score * beta * inverse, grad_norms = T(-0.5) * grad_dot * dot * inverse * inverse;
    grad_key_square += grad_norms * square;
    T* grad_row = grad_memory + slots[k] * D;
    add_scaled(key, grad_dot, D, grad_row);
    add_scaled(row, 2 * grad_norms * key_square, D, grad_row);
    add_scaled(row, grad_dot, D, grad_key);
  }
  add_scaled(key, 2 * grad_key_square, D, grad_key);
}

template <class T>
struct SparseBackwardScratch {
  SparseTold<T> told;
  T* grad_weights;  // [R, K], which goes from step to step
  T *grad_read, *weights_before, *grad_keys, *grad_vectors, *grad_gates, *grad_sharpness, *grad_write_gates;
  int64_t* slots_before;
  SparseBackwardScratch(Arena& own, Arena& common, const SparseScanBackward& a)
      : told(common, a), grad_weights(own.take<T>(a.R * a.K)), grad_read(common.take<T>(a.R * a.D)),
        weights_before(common.take<T>(a.R * a.K)), grad_keys(common.take<T>(a.R * a.D)),
        grad_vectors(common.take<T>(a.R * a.D)), grad_gates(common.take<T>(a.R)), grad_sharpness(common.take<T>(a.R)),
        grad_write_gates(common.take<T>(a.R)), slots_before(common.take<int64_t>(a.R * a.K)) {}
};

// Where the heads read, and how much, before step t.
template <class T>
void load_before(const SparseScanBackward& a, int64_t t, int64_t b, SparseBackwardScratch<T>& s) {
  const int64_t RK = a.R * a.K;
  const bool begins = a.sequences.begins(t, a.B, b);
  const int64_t* slots = t > 0 ? a.slot_history + ((t - 1) * a.B + b) * RK : a.read_slots + b * RK;
  const T* weights = static_cast<const T*>(t > 0 ? a.weight_history : a.read_weights) + ((t > 0 ? t - 1 : 0) * a.B + b) * RK;
  for (int64_t j = 0; j < RK; ++j) {
    const int64_t slot = begins ? j % a.K : slots[j];
    s.slots_before[j] = slot < 0 ? 0 : slot < a.N ? slot : a.N - 1;
    s.weights_before[j] = !begins ? weights[j] : j % a.K == 0 ? T(1) : T(0);
  }
}

// Back through the write of head r: its gradients, and in grad_weights [K] that of the weights of the step before.
template <class T>
void write_backward(const SparseScanBackward& a, int64_t r, int64_t oldest, const T* grad_memory, T* grad_weights,
                    SparseBackwardScratch<T>& s) {
  const int64_t D = a.D, K = a.K;
  const WriteGates<T> gates = s.told.write(r);
  const T *vector = s.told.vectors + r * D, *before = s.weights_before + r * K;
  T* grad_vector = s.grad_vectors + r * D;
  T of_read = 0;
  for (int64_t k = 0; k < K; ++k) {
    const T* grad_row = grad_memory + s.slots_before[r * K + k] * D;
    add_scaled(grad_row, gates.write * (gates.gate * before[k]), D, grad_vector);
    const T grad = dot_of(vector, grad_row, D);
    of_read += before[k] * grad;
    grad_weights[k] = gates.write * gates.gate * grad;
  }
  const T* grad_row = grad_memory + oldest * D;
  add_scaled(grad_row, gates.write * gates.rest, D, grad_vector);
  const T of_oldest = dot_of(vector, grad_row, D);
  s.grad_gates[r] = gates.write * (gates.gate * gates.rest) * (of_read - of_oldest);
  s.grad_write_gates[r] = gates.write * gates.closed * (gates.gate * of_read + gates.rest * of_oldest);
}

// The gradient of sample b's memory, which is changed where it comes out.
template <class T>
T* grad_memory_of(const SparseScanBackward& a, int64_t b) {
  return static_cast<T*>(a.grad_in_memory) + b * a.N * a.D;
}

template <class T>
void begin_backward(const SparseScanBackward& a, int64_t b, SparseBackwardScratch<T>& s) {
  const auto begin = [b](const void* from, int64_t count, T* to) {
    if (from) std::memcpy(to, static_cast<const T*>(from) + b * count, count * sizeof(T));
    else std::memset(to, 0, count * sizeof(T));
  };
  if (a.grad_memory != a.grad_in_memory) begin(a.grad_memory, a.N * a.D, grad_memory_of<T>(a, b));
  begin(a.grad_read_weights, a.R * a.K, s.grad_weights);
  if (a.grad_start) std::memset(static_cast<T*>(a.grad_start) + b * a.N * a.D, 0, a.N * a.D * sizeof(T));
}

// Back through step t, of which s.told says what it was told: leaves the gradients of that.
template <class T>
void step_backward(const SparseScanBackward& a, int64_t t, int64_t b, const T* grad_read, SparseBackwardScratch<T>& s) {
  const int64_t D = a.D, R = a.R, K = a.K, row = t * a.B + b;
  T* grad_memory = grad_memory_of<T>(a, b);
  load_before(a, t, b, s);
  for (T* grad : {s.grad_keys, s.grad_vectors}) std::memset(grad, 0, R * D * sizeof(T));
  std::memset(s.grad_sharpness, 0, R * sizeof(T));
  for (int64_t r = 0; r < R; ++r) {
    const int64_t at = (row * R + r) * K;
    read_rows_backward<T>(static_cast<const T*>(a.rows) + at * D, a.slot_history + at,
                          static_cast<const T*>(a.weight_history) + at, K, D, s.told.keys + r * D, s.told.beta(r),
                          static_cast<T>(a.eps), grad_read ? grad_read + r * D : nullptr, s.grad_weights + r * K, grad_memory,
                          s.grad_keys + r * D, s.grad_sharpness + r);
  }
  const int64_t* oldest = a.oldest + row * R;
  for (int64_t r = 0; r < R; ++r) write_backward<T>(a, r, oldest[r], grad_memory, s.grad_weights + r * K, s);
  for (int64_t r = 0; r < R; ++r) std::memset(grad_memory + oldest[r] * D, 0, D * sizeof(T));
}

// Having gone back to where the sample began anew.
template <class T>
void back_to_start(const SparseScanBackward& a, int64_t b, SparseBackwardScratch<T>& s) {
  T* grad_memory = grad_memory_of<T>(a, b);
  if (a.grad_start) add_scaled(grad_memory, T(1), a.N * a.D, static_cast<T*>(a.grad_start) + b * a.N * a.D);
  std::memset(grad_memory, 0, a.N * a.D * sizeof(T));
  std::memset(s.grad_weights, 0, a.R * a.K * sizeof(T));
}

template <class T>
void end_backward(const SparseScanBackward& a, int64_t b, SparseBackwardScratch<T>& s) {
  std::memcpy(static_cast<T*>(a.grad_in_read_weights) + b * a.R * a.K, s.grad_weights, a.R * a.K * sizeof(T));
}

}  // namespace
}  // namespace mann_fast

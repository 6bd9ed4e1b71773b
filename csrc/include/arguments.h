// What the kernels take, those for the processor and those for CUDA: pointers and sizes, nothing of torch. All arrays are
// contiguous. The state (memory, weights, usage) is float or double; keys, write vectors, gates, sharpness and reads may be half
// precision beside float.
#pragma once
#include <cstddef>
#include <cstdint>

namespace mann_fast {

enum class Dtype { float32, float64, bfloat16, float16 };

// Slots are laid out in lanes; rows of N slots are padded to a multiple of this on every instruction set.
constexpr int64_t slot_padding = 16;
constexpr int64_t padded_slots(int64_t num_slots) { return (num_slots + slot_padding - 1) / slot_padding * slot_padding; }

// Anchors [count, B, rows, padded N] of a scan: its state, slots in lanes, as it was before steps every, 2 every, ...; backward
// replays from them. Rows are the memory's D, and with LRUA the read weights' R. every 0 keeps none.
constexpr int64_t anchors_count(int64_t T, int64_t every) { return every > 0 && T > 0 ? (T - 1) / every : 0; }
constexpr bool has_anchor(int64_t t, int64_t every) { return every > 0 && t > 0 && t % every == 0; }
// Where the anchor of sample b before step t begins.
constexpr int64_t anchor_offset(int64_t t, int64_t every, int64_t B, int64_t b, int64_t rows, int64_t N) {
  return ((t / every - 1) * B + b) * rows * padded_slots(N);
}

// Where samples begin anew and end, of every scan. All are null where they always go on to the end; resets and start come
// together. A sample that begins anew has the memory `start`, and weights and usage of 1 at slot 0 (a DNC's are 0, all of
// them); of a cell, a controller's state and reads of 0. It takes no part in steps from its length on: its outputs and gradients there are 0.
struct Sequences {
  const bool* resets;      // [T, B]
  const int64_t* lengths;  // [B], taken as within [0, T]
  const void* start;       // [N, D], of the dtype of the state
  constexpr bool begins(int64_t t, int64_t B, int64_t b) const { return resets != nullptr && resets[t * B + b]; }
  constexpr int64_t length(int64_t T, int64_t b) const {
    if (lengths == nullptr) return T;
    return lengths[b] < 0 ? 0 : lengths[b] < T ? lengths[b] : T;
  }
  // The first step of the replay by which backward comes to step t, where every > 0: the state before it is known, as an
  // anchor, a start, or what came in. At most `every` steps before.
  constexpr int64_t replay_from(int64_t t, int64_t every, int64_t B, int64_t b) const {
    const int64_t anchor = t / every * every;
    while (t > anchor && !begins(t, B, b)) --t;
    return t;
  }
};

struct ContentRead {
  int64_t B, N, D, R;
  Dtype state, input;
  double eps;
  const void *memory, *key, *sharpness;  // [B, N, D], [B, R, D], [B, R] or null
  void *read, *weights;                  // [B, R, D], [B, R, N]
};

struct ContentReadBackward {
  int64_t B, N, D, R;
  Dtype state, input;
  double eps;
  const void *grad_read, *grad_weights;  // either may be null
  const void *memory, *key, *sharpness, *weights;
  void *grad_memory, *grad_key, *grad_sharpness;  // grad_sharpness is null where sharpness is
};

struct LeastUsed {
  int64_t B, N, n;
  Dtype state;
  const void* usage;  // [B, N]
  int64_t* slots;     // [B, n]
};

struct LruaWrite {
  int64_t B, N, D, R;
  Dtype state, input;
  bool shared_target;
  const void *memory, *read_weights, *usage, *write_vector, *gate_logit;
  void *out_memory, *write_weights;
  int64_t* slots;  // [B, R]
};

struct LruaWriteBackward {
  int64_t B, N, D, R;
  Dtype state, input;
  bool shared_target;
  const void *grad_memory, *grad_write_weights;  // either may be null
  const void *read_weights, *write_vector, *gate_logit;
  const int64_t* slots;
  void *grad_in_memory, *grad_read_weights, *grad_write_vector, *grad_gate_logit;
};

// Anchors have D + R rows. anchor_every 0 keeps neither anchors nor slots.
struct LruaScan {
  int64_t T, B, N, D, R;
  Dtype state, input;
  bool read_first, shared_target;
  double usage_decay, eps;
  int64_t anchor_every;
  const void *memory, *read_weights, *usage;
  const void *keys, *write_vectors, *gate_logits, *sharpness;  // [T, B, R, D], [T, B, R]; sharpness may be null
  Sequences sequences;
  void *reads, *out_memory, *out_read_weights, *out_usage;
  int64_t* slots;  // [T, B, R]
  void* anchors;
};

struct LruaScanBackward {
  int64_t T, B, N, D, R;
  Dtype state, input;
  bool read_first, shared_target;
  double eps;
  int64_t anchor_every;
  const void *grad_reads, *grad_memory, *grad_read_weights;  // each may be null
  const void *memory, *read_weights, *keys, *write_vectors, *gate_logits, *sharpness;
  Sequences sequences;
  const int64_t* slots;
  const void* anchors;
  void *grad_in_memory, *grad_in_read_weights, *grad_keys, *grad_write_vectors, *grad_gate_logits, *grad_sharpness;
  void* grad_start;  // [B, N, D], the sum over a sample's resets; null without
};

enum class Controller { lstm, gru, feedforward };

// Numbers per hidden unit: gates, and what is kept of them for backward.
constexpr int64_t gates_per_unit(Controller c) { return c == Controller::lstm ? 4 : c == Controller::gru ? 3 : 1; }
constexpr int64_t kept_per_unit(Controller c) { return c == Controller::feedforward ? 1 : 4; }

// What surrounds the memory in a whole sequence: controller and heads. The input's part of the controller is `gates` [T, B, G]: G = 4 H
// (LSTM: input, forget, cell and output gate), 3 H (GRU: reset, update, candidate) or H. K = H + R D. anchor_every 0 keeps
// nothing for backward. Each memory adds its own.
struct Network {
  int64_t T, B, H, N, D, R;
  Dtype state;    // float32 or float64, of everything
  bool bfloat16;  // float32 only: what the products of each step take is rounded to it
  Controller controller;
  int64_t anchor_every;
  const void *gates, *hidden, *cell, *reads;  // hidden: null in a feed-forward controller; cell: null but in an LSTM
  const void *hidden_weight, *hidden_bias;    // [G, H], [G]; null in a feed-forward controller
  const void* reads_weight;                   // [G, R D], rows reads_weight_ld apart
  int64_t reads_weight_ld;
  const void *head_weight, *head_bias;  // [heads, H], [heads]
  Sequences sequences;
  void* output;                             // [T, B, K]: hidden states and reads
  void *out_hidden, *out_cell, *out_reads;  // the last; hidden and cell are null as those that come in
  // Kept for backward: [T, B, 4 H] (feed-forward: H) after the nonlinearities; [T, B, H] the cell, or the GRU's hidden
  // state; [T, B, heads] head values, as the memory says.
  void *kept_gates, *kept_states, *kept_heads;
};

struct NetworkBackward {
  int64_t T, B, H, N, D, R;
  Dtype state;
  bool bfloat16;
  Controller controller;
  int64_t anchor_every;
  const void *grad_output, *grad_hidden, *grad_cell, *grad_reads;  // each may be null
  const void *hidden, *cell;
  const void *hidden_weight, *reads_weight;
  int64_t reads_weight_ld;
  const void* head_weight;
  const void *kept_gates, *kept_states, *kept_heads;
  Sequences sequences;
  // Before the nonlinearities. The GRU's candidate has the hidden state's part inside a product, so that its gradient
  // differs from the input's: all of them again in grad_hidden_gates, which is null for the others.
  void *grad_gates, *grad_hidden_gates, *grad_heads;
  void *grad_in_hidden, *grad_in_cell, *grad_in_reads;
  void* grad_start;  // as in LruaScanBackward
};

// One row of heads has keys [R, D], write vectors [R, D] where separate, gate logits [R], and sharpness [R] where learned: then
// the factor on the similarity is sharpness + sharpness_scale softplus(of it), else sharpness. Of the kept ones keys and write
// vectors are after their nonlinearity.
struct Cell : Network {
  bool separate_vector, learned_sharpness;
  double sharpness, sharpness_scale;
  bool read_first, shared_target;
  double usage_decay, eps;
  const void *memory, *read_weights, *usage;
  void *out_memory, *out_read_weights, *out_usage;
  int64_t* slots;
  void* anchors;  // slots and anchors as in LruaScan
};

struct CellBackward : NetworkBackward {
  bool separate_vector, learned_sharpness;
  double sharpness, sharpness_scale;
  bool read_first, shared_target;
  double eps;
  const void *grad_memory, *grad_read_weights;  // each may be null
  const void *memory, *read_weights;
  const int64_t* slots;
  const void* anchors;
  void *grad_in_memory, *grad_in_read_weights;
};

// R + W heads: read heads first, then write heads. Anchors have D rows. anchor_every 0 keeps neither anchors nor history.
struct NtmScan {
  int64_t T, B, N, D, R, W, shifts;  // shifts: 2 S + 1
  Dtype state, input;
  bool read_first;
  double eps;
  int64_t anchor_every;
  const void *memory, *weights;          // [B, N, D], [B, R+W, N]
  const void *keys, *sharpness, *gates;  // [T, B, R+W, D], [T, B, R+W], [T, B, R+W]
  const void *shift, *sharpening;        // [T, B, R+W, shifts], [T, B, R+W]
  const void *erase, *add;               // [T, B, W, D]
  Sequences sequences;
  void *reads, *out_memory, *out_weights;  // reads [T, B, R, D]
  void *history, *anchors;                 // history [T, B, R+W, N]: the weights of every step
};

struct NtmScanBackward {
  int64_t T, B, N, D, R, W, shifts;
  Dtype state, input;
  bool read_first;
  double eps;
  int64_t anchor_every;
  const void *grad_reads, *grad_memory, *grad_weights;  // each may be null
  const void *memory, *weights, *keys, *sharpness, *gates, *shift, *sharpening, *erase, *add;
  Sequences sequences;
  const void *history, *anchors;
  void *grad_in_memory, *grad_in_weights, *grad_keys, *grad_sharpness, *grad_gates, *grad_shift, *grad_sharpening;
  void *grad_erase, *grad_add;
  void* grad_start;  // as in LruaScanBackward
};

// W = R. One row of heads has, of the read heads and then of the write heads, keys [R, D] and sharpness [R], and where they have a
// location (shifts > 0) gates [R], shifts [R, shifts] and sharpening [R]; then erase [R, D] and add [R, D]. All before their
// nonlinearities. Heads without a location go by content alone.
struct NtmCell : Network {
  int64_t shifts;
  bool read_first;
  double eps;
  const void *memory, *weights;  // weights [B, R+W, N]
  void *out_memory, *out_weights;
  void *history, *anchors;  // as in NtmScan
};

struct NtmCellBackward : NetworkBackward {
  int64_t shifts;
  bool read_first;
  double eps;
  const void *grad_memory, *grad_weights;  // each may be null
  const void *memory, *weights;
  const void *history, *anchors;
  void *grad_in_memory, *grad_in_weights;
};

// What a DNC's step is told, each with a leading [T, B]. read_modes is null without links; both masks are null or none;
// link_sharpening may be null. Pointer is const void*, or void* of the gradients.
template <class Pointer>
struct DncInterface {
  Pointer read_keys, read_sharpness, write_key, write_sharpness;  // [R, D], [R], [D], []
  Pointer erase, write_vector, free_gates;                        // [D], [D], [R]
  Pointer allocation_gate, write_gate;                            // []
  Pointer read_modes, read_masks, write_mask, link_sharpening;    // [R, 3], [R, D], [D], [R, 2]
};

// The state [B, ...]; precedence and links are null without links. As a gradient each may be null.
template <class Pointer>
struct DncState {
  Pointer memory, usage, precedence, links, read_weights, write_weights;  // [N, D], [N], [N], [N, N], [R, N], [N]
};

// Kept for backward of every step, all null where nothing is: the weights, [T, B, R, N] and [T, B, N]; the slots in the order of
// allocation, [T, B, N]; where directions are sharpened, backward and forward before that, [T, B, R, 2, N], else null.
template <class Pointer, class Slots>
struct DncHistory {
  Pointer read_history, write_history;
  Slots orders;
  Pointer directions;
};

struct DncScan : DncHistory<void*, int64_t*> {
  int64_t T, B, N, D, R;
  Dtype state, input;
  bool deallocate;
  double eps;
  DncState<const void*> before;
  DncInterface<const void*> told;
  Sequences sequences;
  void* reads;  // [T, B, R, D]
  DncState<void*> after;
};

struct DncScanBackward : DncHistory<const void*, const int64_t*> {
  int64_t T, B, N, D, R;
  Dtype state, input;
  bool deallocate;
  double eps;
  const void* grad_reads;            // may be null
  DncState<const void*> grad_after;  // each may be null
  DncState<const void*> before;
  DncInterface<const void*> told;
  Sequences sequences;
  DncState<void*> grad_before;    // write_weights is null: they are a constant
  DncInterface<void*> grad_told;  // null where what was told is
  void* grad_start;               // as in LruaScanBackward
};

// What the heads of a DNC's cell have, and how it is squashed. One row has, in the order of DncInterface, what is there, before its
// nonlinearity: read_modes with links, the masks, link_sharpening where sharpened. A mask is mask_min + (1 - mask_min) sigmoid.
// Values beyond -clip and clip are these, where clip > 0.
struct DncHeadOptions {
  bool masks, sharpened, deallocate;
  double mask_min, clip, eps;
};

struct DncCell : Network, DncHeadOptions, DncHistory<void*, int64_t*> {
  DncState<const void*> before;
  DncState<void*> after;
};

struct DncCellBackward : NetworkBackward, DncHeadOptions, DncHistory<const void*, const int64_t*> {
  DncState<const void*> grad_after;  // each may be null
  DncState<const void*> before;
  DncState<void*> grad_before;  // write_weights is null: they are a constant
};

// K of N slots for each head, the most similar first.
struct SparseRead {
  int64_t B, N, D, R, K;
  Dtype state, input;
  double eps;
  const void *memory, *key, *sharpness;  // sharpness may be null
  void* read;
  int64_t* slots;  // [B, R, K]
  void* weights;   // [B, R, K]
  void* rows;      // [B, R, K, D], the slots that were read
};

struct SparseReadBackward {
  int64_t B, N, D, R, K;
  Dtype state, input;
  double eps;
  const void *grad_read, *grad_weights;  // either may be null
  const void *key, *sharpness, *weights;
  const int64_t* slots;
  const void* rows;
  void *grad_memory, *grad_key, *grad_sharpness;  // grad_sharpness is null where sharpness is
};

// What a sparse memory's step is told, each with a leading [T, B]; the last two may be null.
template <class Pointer>
struct SparseInputs {
  Pointer keys, write_vectors, gate_logits, sharpness, write_gate_logits;  // [R, D], [R, D], [R], [R], [R]
};

struct SparseScan {
  int64_t T, B, N, D, R, K;
  Dtype state, input;
  double threshold, eps;
  const void* memory;
  const int64_t* read_slots;  // [B, R, K]; taken as within [0, N)
  const void* read_weights;
  const int64_t *last_access, *clock;  // [B, N], [B]
  SparseInputs<const void*> told;
  Sequences sequences;       // a sample begins anew as SparseState.initial has it
  void *reads, *out_memory;  // out_memory may be memory: then it is changed in place
  int64_t* out_read_slots;
  void* out_read_weights;
  int64_t *out_last_access, *out_clock;
  // Kept for backward: all null where nothing is kept. The slots erased [T, B, R]; those read, with what weights, and what
  // they held, [T, B, R, K] and [T, B, R, K, D].
  int64_t *oldest, *slot_history;
  void *weight_history, *rows;
  // Of a single step of several that follow one another: what they know of the memory, [B, lists_size(N)]; null: nothing.
  int64_t* lists = nullptr;
  // And what an index over the memory has found [B, num_candidates], below 0 where it found less: where a sample's first is a
  // slot, these and the slots of its list, which have changed since the index was told, are all that it compares.
  const int64_t* candidates = nullptr;
  int64_t num_candidates = 0;
};

// How many slots may differ from all others before all are compared (cpu/sparse_step.h).
constexpr int64_t different_limit(int64_t N) { return N < 1024 ? 0 : N / 4; }
// Numbers that steps hand on: how many slots differ (unmade: nothing is there yet), these, and the slots by age.
constexpr int64_t lists_size(int64_t N) { return 1 + different_limit(N) + (N + 1); }
constexpr int64_t unmade = -2;

struct SparseScanBackward {
  int64_t T, B, N, D, R, K;
  Dtype state, input;
  double eps;
  const void *grad_reads, *grad_memory, *grad_read_weights;  // each may be null
  const int64_t* read_slots;
  const void* read_weights;
  SparseInputs<const void*> told;
  Sequences sequences;
  const int64_t *oldest, *slot_history;
  const void *weight_history, *rows;
  void *grad_in_memory, *grad_in_read_weights;
  SparseInputs<void*> grad_told;  // null where what was told is
  void* grad_start;               // as in LruaScanBackward
};

// One row of heads has keys [R, D], write vectors [R, D], gate logits [R], sharpness [R] and write gate logits [R], before their
// nonlinearities; sharpness is sharpness + sharpness_scale * softplus. `scan` has the memory, and T, B, N, D and R once more; what it
// is told and its reads are the cell's own.
struct SparseCell : Network {
  double sharpness, sharpness_scale;
  SparseScan scan;
};

struct SparseCellBackward : NetworkBackward {
  double sharpness, sharpness_scale;
  SparseScanBackward scan;
};

}  // namespace mann_fast

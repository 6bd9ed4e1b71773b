// One step of a Differentiable Neural Computer's memory for one sample, forward and backward: what dnc_scan and dnc_cell share.
//
// The sample's state is held in cache through all T steps: the memory with slots in lanes, as in lrua_step.h, the links row by
// row. Backward keeps no memory and no links: a first replay from the state that came in leaves one every sqrt(T) steps in
// scratch, and a second one, segment by segment, that of every step. A replay needs no addressing, since the weights of every step
// are kept.
#pragma once
#include "dnc_address.h"
#include "dnc_links.h"

namespace mann_fast {
namespace {

// ---- the write ------------------------------------------------------------------------------------------------------

// memory * (1 - weight * erase) + weight * vector, the first term times retained unless that is null. from and to may be the
// same.
template <class T>
void write_memory(const DncSizes<T>& n, const T* weights, const T* erase, const T* vector, const T* retained, const T* from,
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
void mix(const DncSizes<T>& n, const DncTold<T>& in, const T* allocation, const T* content, T* weights) {
  const T gate = *in.allocation_gate;
  for (int64_t i = 0; i < n.ld; i += width<T>)
    store(weights + i, (load(allocation + i) * gate + load(content + i) * (T(1) - gate)) * *in.write_gate);
}

template <class T>
void precede(const DncSizes<T>& n, const T* weights, const T* from, T* to) {
  Vec<T> sum{};
  for (int64_t i = 0; i < n.ld; i += width<T>) sum += load(weights + i);
  const T rest = T(1) - sum_lanes<T>(sum);
  for (int64_t i = 0; i < n.ld; i += width<T>) store(to + i, load(from + i) * rest + load(weights + i));
}

// ---- forward --------------------------------------------------------------------------------------------------------

template <class T>
struct DncScratch {
  T *state, *read_weights, *write_weights;  // from step to step; all else is of one step
  DncTold<T> in;
  DncContent<T> write, read;
  DncSorting<T> sorting;
  T *retained, *allocation, *directions, *logs, *shares, *reads;
  DncScratch(Arena& own, Arena& common, const DncSizes<T>& n)
      : state(own.take<T>(n.state())), read_weights(own.take<T>(n.R * n.ld)), write_weights(own.take<T>(n.ld)), in(common, n),
        write(common, n, 1), read(common, n, n.R), sorting(common, n), retained(common.take<T>(n.ld)),
        allocation(common.take<T>(n.ld)), directions(common.take<T>(2 * n.R * n.ld)), logs(common.take<T>(n.ld)),
        shares(common.take<T>(2 * n.ld)), reads(common.take<T>(n.R * n.D)) {}
};

template <class T>
void begin_state(const DncState<const void*>& from, const DncSizes<T>& n, int64_t b, DncScratch<T>& s) {
  load_state(from, n, b, DncHeld<T>(s.state, n));
  load_or_clear(from.read_weights, n.R, n, b, s.read_weights);
  load_or_clear(from.write_weights, 1, n, b, s.write_weights);
}

template <class T>
void restart_state(const void* start, const DncSizes<T>& n, DncScratch<T>& s) {
  start_state(start, n, DncHeld<T>(s.state, n));
  std::memset(s.read_weights, 0, n.R * n.ld * sizeof(T));
  std::memset(s.write_weights, 0, n.ld * sizeof(T));
}

template <class T>
void end_state(const DncState<void*>& to, const DncSizes<T>& n, int64_t b, const DncScratch<T>& s) {
  store_state(DncHeld<T>(s.state, n), n, b, to);
  store_rows<T>(s.read_weights, n.ld, n.R, n.N, 0, n.ld, static_cast<T*>(to.read_weights) + b * n.R * n.N);
  store_rows<T>(s.write_weights, n.ld, 1, n.N, 0, n.ld, static_cast<T*>(to.write_weights) + b * n.N);
}

// One step with what it is told in s.in; the reads come to lie in s.reads.
template <class T>
void dnc_step(const DncSizes<T>& n, DncScratch<T>& s) {
  const int64_t ld = n.ld, R = n.R;
  const DncHeld<T> state(s.state, n);
  const DncTold<T>& in = s.in;
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
}

// What backward needs of the step, at its row.
template <class T>
void keep_step(const DncHistory<void*, int64_t*>& history, const DncSizes<T>& n, int64_t row, const DncScratch<T>& s) {
  const auto keep = [&](const T* from, int64_t rows, void* to) {
    if (to) store_rows(from, n.ld, rows, n.N, 0, n.ld, static_cast<T*>(to) + row * rows * n.N);
  };
  keep(s.read_weights, n.R, history.read_history);
  keep(s.write_weights, 1, history.write_history);
  keep(s.directions, 2 * n.R, history.directions);
  if (history.orders) std::memcpy(history.orders + row * n.N, s.sorting.order, n.N * sizeof(int64_t));
}

// ---- replay ---------------------------------------------------------------------------------------------------------

// How many steps lie between two states of the first replay: with so many, both replays hold the fewest.
inline int64_t replay_every(int64_t T) {
  int64_t every = 1;
  while (every * every < T) ++every;
  return every;
}

template <class T>
struct DncBackwardScratch {
  // From step to step:
  int64_t every;
  T *anchors, *states;                  // states: at the start of a segment and after each of its steps
  T *weights, *precedences, *retained;  // of each step of a segment: written, before it, retained
  T *grad_state, *grad_read_weights, *grad_write_weights;
  // Of one step:
  DncTold<T> in;
  DncContent<T> write, read;
  T *came_read, *came_write, *read_weights, *write_weights;
  T *allocation, *products, *grad_rows, *grad_squares, *grad_retained, *grad_came, *columns;
  T *directions, *logs, *shares, *along, *scaled, *grad_read;
  DncInterface<T*> grad_told;
  DncBackwardScratch(Arena& own, Arena& common, const DncSizes<T>& n, int64_t steps)
      : every(replay_every(steps)), anchors(own.take<T>((steps + every - 1) / every * n.state())),
        states(own.take<T>((every + 1) * n.state())), weights(own.take<T>(every * n.ld)),
        precedences(own.take<T>(every * n.ld)), retained(own.take<T>(every * n.ld)), grad_state(own.take<T>(n.state())),
        grad_read_weights(own.take<T>(n.R * n.ld)), grad_write_weights(own.take<T>(n.ld)), in(common, n), write(common, n, 1),
        read(common, n, n.R), came_read(common.take<T>(n.R * n.ld)), came_write(common.take<T>(n.ld)),
        read_weights(common.take<T>(n.R * n.ld)), write_weights(common.take<T>(n.ld)), allocation(common.take<T>(n.ld)),
        products(common.take<T>(n.ld)), grad_rows(common.take<T>(n.R * n.ld)), grad_squares(common.take<T>(n.R * n.ld)),
        grad_retained(common.take<T>(n.ld)), grad_came(common.take<T>(n.R * n.ld)), columns(common.take<T>(2 * n.ld)),
        directions(common.take<T>(2 * n.R * n.ld)), logs(common.take<T>(n.ld)), shares(common.take<T>(n.ld)),
        along(common.take<T>(2 * n.R * n.ld)), scaled(common.take<T>(2 * n.R * n.ld)), grad_read(common.take<T>(n.R * n.D)) {
    for (int k = 0; k < told_count; ++k) grad_told.*told_fields<T*>[k] = common.take<T>(n.told[k]);
  }
  // The state before step t, a multiple of `every`, and after a step of the segment.
  DncHeld<T> anchor(int64_t t, const DncSizes<T>& n) const { return DncHeld<T>(anchors + t / every * n.state(), n); }
  DncHeld<T> after(int64_t step, const DncSizes<T>& n) const { return DncHeld<T>(states + (step + 1) * n.state(), n); }
  DncHeld<T> before(const Sequences& sequences, int64_t first, int64_t step, int64_t b, const DncSizes<T>& n) const {
    return step > 0 || sequences.begins(first, n.B, b) ? after(step - 1, n) : anchor(first, n);
  }
};

// The weights that came into step t, or 0 where the sample begins anew there.
template <class T, class Arguments>
void load_came(const Arguments& a, const DncSizes<T>& n, int64_t b, int64_t t, T* read, T* write) {
  if (a.sequences.begins(t, n.B, b)) {
    std::memset(read, 0, n.R * n.ld * sizeof(T));
    std::memset(write, 0, n.ld * sizeof(T));
    return;
  }
  const int64_t row = t > 0 ? (t - 1) * n.B + b : b;
  load_or_clear(t > 0 ? a.read_history : a.before.read_weights, n.R, n, row, read);
  load_or_clear(t > 0 ? a.write_history : a.before.write_weights, 1, n, row, write);
}

// The states after so many steps from that before the first of them, by the weights that were kept. tell(t): sets s.in to what
// a write is told at step t. to(step): where each state goes, which may be one place for all, and the place of `from`. Links
// are wanted after the first `linked` steps only.
template <class T, class Arguments, class Tell, class To>
void replay(const Arguments& a, const DncSizes<T>& n, int64_t b, int64_t first, int64_t steps, int64_t linked,
            const DncHeld<T>& before, Tell tell, To to, DncBackwardScratch<T>& s) {
  const T *usage = before.usage, *memory = before.memory, *precedence = before.precedence;
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t t = first + step, row = t * n.B + b;
    const DncHeld<T> after = to(step);
    T *weights = s.weights + step * n.ld, *retained = s.retained + step * n.ld;
    tell(t);
    load_came(a, n, b, t, s.came_read, s.came_write);
    load_or_clear(a.write_history, 1, n, row, weights);
    use_slots<T>(n, s.in.free_gates, s.came_read, s.came_write, usage, retained, after.usage);
    write_memory<T>(n, weights, s.in.erase, s.in.write_vector, n.deallocate ? retained : nullptr, memory, after.memory);
    if (n.links) {
      std::memcpy(s.precedences + step * n.ld, precedence, n.ld * sizeof(T));
      precede<T>(n, weights, precedence, after.precedence);
    }
    usage = after.usage;
    memory = after.memory;
    precedence = after.precedence;
  }
  if (n.links && linked > 0)
    update_links<T>(n, linked, s.weights, s.precedences, before.links, to(0).links, linked > 1 ? to(1).links - to(0).links : 0);
}

// The first replay of a sample, to the state before each step at which a segment may begin.
template <class T, class Arguments, class Tell>
void replay_to_anchors(const Arguments& a, const DncSizes<T>& n, int64_t b, Tell tell, DncBackwardScratch<T>& s) {
  const int64_t every = s.every, length = a.sequences.length(a.T, b);
  if (length > 0) load_state(a.before, n, b, s.anchor(0, n));
  for (int64_t end = every; end < length; end += every) {
    const int64_t first = a.sequences.replay_from(end - 1, every, n.B, b);
    const bool begins = a.sequences.begins(first, n.B, b);
    const DncHeld<T> to = s.anchor(end, n), from = begins ? to : s.anchor(first, n);
    if (begins) start_state(a.sequences.start, n, from);
    replay<T>(a, n, b, first, end - first, end - first, from, tell, [&](int64_t) { return to; }, s);
  }
}

// The second one, of the segment of steps [first, end).
template <class T, class Arguments, class Tell>
void replay_segment(const Arguments& a, const DncSizes<T>& n, int64_t b, int64_t first, int64_t end, Tell tell,
                    DncBackwardScratch<T>& s) {
  const DncHeld<T> from = s.before(a.sequences, first, 0, b, n);
  if (a.sequences.begins(first, n.B, b)) start_state(a.sequences.start, n, from);
  replay<T>(a, n, b, first, end - first, end - first - 1, from, tell, [&](int64_t step) { return s.after(step, n); }, s);
}

// ---- backward -------------------------------------------------------------------------------------------------------

// Back through reading: from grad_read_weights, of those that came out, to grad_came, of those that came in, and the gradients
// of modes, sharpening and what was read by content.
template <class T, class Arguments>
void read_backward(const DncSizes<T>& n, const Arguments& a, int64_t row, const DncHeld<T>& before, const T* memory,
                   const DncHeld<T>& grad, DncBackwardScratch<T>& s) {
  const int64_t ld = n.ld, R = n.R, rows = R * ld;
  const DncTold<T>& in = s.in;
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
void write_backward(const DncSizes<T>& n, const T* memory, const T* retained, T* grad_memory, DncBackwardScratch<T>& s) {
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

// Back through the gates, allocation and content of the write, from grad_write_weights.
template <class T, class Arguments>
void choose_backward(const DncSizes<T>& n, const Arguments& a, int64_t row, const T* memory, const T* usage,
                     const DncHeld<T>& grad, DncBackwardScratch<T>& s) {
  const DncTold<T>& in = s.in;
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
void use_backward(const DncSizes<T>& n, const T* usage, const T* retained, T* grad_usage, DncBackwardScratch<T>& s) {
  const T* free_gates = s.in.free_gates;
  for (int64_t i = 0; i < n.ld; i += width<T>) {
    const Vec<T> g = load(grad_usage + i), used = load(usage + i), weight = load(s.came_write + i);
    store(s.grad_retained + i, load(s.grad_retained + i) + g * (used + (T(1) - used) * weight));
    store(grad_usage + i, g * load(retained + i) * (T(1) - weight));
  }
  // What all heads but one leave is a product from the front times one from the back: nothing is divided.
  T* others = s.grad_rows;
  for (int64_t i = 0; i < n.ld; i += width<T>) {
    Vec<T> front = load(s.grad_retained + i), back = splat<T>(1);
    for (int64_t r = 0; r < n.R; ++r) {
      store(others + r * n.ld + i, front);
      front *= T(1) - load(s.came_read + r * n.ld + i) * free_gates[r];
    }
    for (int64_t r = n.R - 1; r >= 0; --r) {
      store(others + r * n.ld + i, load(others + r * n.ld + i) * back);
      back *= T(1) - load(s.came_read + r * n.ld + i) * free_gates[r];
    }
  }
  for (int64_t r = 0; r < n.R; ++r) {
    Vec<T> of_gate{};
    for (int64_t i = r * n.ld; i < (r + 1) * n.ld; i += width<T>) {
      of_gate -= load(others + i) * load(s.came_read + i);
      store(s.grad_came + i, load(s.grad_came + i) - load(others + i) * free_gates[r]);
    }
    s.grad_told.free_gates[r] = sum_lanes<T>(of_gate);
  }
}

// Takes in the gradients of the last state; grad_start [N, D] may be null.
template <class T>
void begin_backward(const DncState<const void*>& grad_after, const DncSizes<T>& n, int64_t b, T* grad_start,
                    DncBackwardScratch<T>& s) {
  load_state(grad_after, n, b, DncHeld<T>(s.grad_state, n));
  load_or_clear(grad_after.read_weights, n.R, n, b, s.grad_read_weights);
  load_or_clear(grad_after.write_weights, 1, n, b, s.grad_write_weights);
  if (grad_start) std::memset(grad_start, 0, n.N * n.D * sizeof(T));
}

// Having gone back to where the sample began anew.
template <class T>
void back_to_start(const DncSizes<T>& n, T* grad_start, DncBackwardScratch<T>& s) {
  const DncHeld<T> grad(s.grad_state, n);
  give_to_start(grad.memory, n.ld, n.N, n.D, 0, n.ld, grad_start);
  clear_rows(n, grad);
  std::memset(s.grad_read_weights, 0, n.R * n.ld * sizeof(T));
}

template <class T>
void end_backward(const DncState<void*>& grad_before, const DncSizes<T>& n, int64_t b, const DncBackwardScratch<T>& s) {
  store_state(DncHeld<T>(s.grad_state, n), n, b, grad_before);
  store_rows<T>(s.grad_read_weights, n.ld, n.R, n.N, 0, n.ld, static_cast<T*>(grad_before.read_weights) + b * n.R * n.N);
}

// Back through step first + step of a segment that has been replayed, with what it was told in s.in. grad_read [R, D] may be null.
// The gradients of what was told come to lie in s.grad_told.
template <class T, class Arguments>
void dnc_step_backward(const Arguments& a, const DncSizes<T>& n, int64_t b, int64_t first, int64_t step, const T* grad_read,
                       DncBackwardScratch<T>& s) {
  const int64_t t = first + step, row = t * n.B + b, ld = n.ld, R = n.R;
  const DncHeld<T> before = s.before(a.sequences, first, step, b, n), after = s.after(step, n), grad(s.grad_state, n);
  const T* retained = s.retained + step * ld;
  load_came(a, n, b, t, s.came_read, s.came_write);
  load_or_clear(a.read_history, R, n, row, s.read_weights);
  load_or_clear(a.write_history, 1, n, row, s.write_weights);
  if (grad_read) {
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
}

}  // namespace
}  // namespace mann_fast

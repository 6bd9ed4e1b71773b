// A cell backward: all steps in one launch. The gradient of every weight is one product over all steps after it, from the
// gradients of gates and heads before their nonlinearities.
//
// Every block replays its sample's memory, at most `anchor_every` steps at a time, from an anchor or where the sample began
// anew, without a barrier of the cluster. A step back: add up what reached the reads of the own sample, and its memory's step
// back (two barriers of the block, and those that the step has itself); tell the gradients of its heads | barrier | back
// through heads and controller of own units, and their part of what goes round | barrier |.
#pragma once
#include "cell.cuh"

namespace mann_fast {
namespace cuda {

template <class Of, class T>
struct CellBackwardSide {
  using Memory = Of;
  using Room = typename Memory::template BackwardRoom<T>;
  static constexpr bool slots_anywhere = true, near = false;  // those of a replay seldom have room beside the weights
  struct Shared {
    int units_ld, heads_ld, columns_ld, slices;
    T *gate_weights, *head_weights;  // of [columns, round] and [heads, units]: weight_at
    T* heads;                        // [lanes, heads]: gradients of the heads of all samples
    T* gates;                        // [lanes, columns]: of own units
    T *hidden, *state;  // [lanes, units]: of the hidden state by what goes round; of the cell, or what passes a GRU by
    T* products;  // the hidden state's gradient by the heads, [slices, lanes, units], then own gates' part of what goes round,
                  // [lanes, round]
    __device__ __host__ Shared(Carver& carver, const CellPlan& plan)
        : units_ld(padded(plan.units)), heads_ld(padded(plan.heads)), columns_ld(padded(plan.columns)),
          slices(slices_of(units_ld)), gate_weights(carver.take<T>(columns_ld * plan.round)),
          head_weights(carver.take<T>(heads_ld * units_ld)), heads(carver.take<T>(plan.lanes * heads_ld)),
          gates(carver.take<T>(plan.lanes * columns_ld)), hidden(carver.take<T>(plan.items())),
          state(carver.take<T>(plan.recurrent ? plan.items() : 0)),
          products(carver.take<T>(plan.lanes * (slices * units_ld > plan.round ? slices * units_ld : plan.round))) {}
  };
};

// What a step's memory takes, on its way: the head values that forward kept, and what else the memory has kept.
template <class T, class Memory, class P>
class HeadStream {
  using Arguments = typename Memory::Backward;
  using Places = HeadPlaces<Memory, P, Arguments>;

 public:
  __device__ __forceinline__ HeadStream(const Arguments& a, const CellPlan& plan, const P& of_memory, const Places& places)
      : a_(a), plan_(plan), of_memory_(of_memory), places_(places) {}
  __device__ __forceinline__ void ask(int64_t row) {
    row_ = row;
    places_.get_known(get(), asked_);
  }
  template <class Inputs>
  __device__ __forceinline__ void put(const Inputs& in) const {
    places_.each(get(), asked_, [&](int, const auto& to, T kept) { Memory::put(a_, in, to, kept); });
    Memory::put_kept(a_, of_memory_, in, row_);
  }

 private:
  __device__ __forceinline__ auto get() const {
    return [this](int j) { return static_cast<const T*>(a_.kept_heads)[row_ * plan_.heads + j]; };
  }

  const Arguments& a_;
  const CellPlan& plan_;
  const P& of_memory_;
  const Places& places_;
  int64_t row_ = 0;
  T asked_[Places::known];
};

template <class T, int C, bool RESIDENT, class P, class Memory>
struct CellBack {
  using Arguments = typename Memory::Backward;
  using Step = typename Memory::template BackwardStep<T, C, RESIDENT, P>;
  using Inputs = typename Memory::template Inputs<T>;
  const Arguments& a;
  const CellPlanOf<Memory>& plan;
  const P& of_memory;
  const CellPlace place;
  const bool present;  // the block has a sample,
  const int length;    // of so many steps, else 0
  Step memory;
  typename CellBackwardSide<Memory, T>::Shared shared;
  const Product<T, Fours::terms, P::fixed> heads, gates;
  const HeadPlaces<Memory, P, Arguments> head_places;
  const int read_place;  // where the thread's first number of the reads lies

  __device__ __forceinline__ CellBack(const Arguments& a, const typename Memory::BackwardScan& scan,
                                      const CellPlanOf<Memory>& plan, const P& of_memory, Carver carver, unsigned char* scratch)
      : a(a), plan(plan), of_memory(of_memory), place(plan, a), present(place.there(place.rank)),
        length(present ? static_cast<int>(place.length(place.rank)) : 0),
        memory(scan, of_memory, plan.every,
               typename Memory::Places(plan.memory, scratch, plan.weights, Memory::scratch_of(place.sample(place.rank))),
               place.sample(place.rank), 0, true),
        shared(carver, plan), heads(shared.head_weights, shared.units_ld, shared.heads, shared.heads_ld, shared.slices),
        gates(shared.gate_weights, plan.round, shared.gates, shared.columns_ld, 1), head_places(a, of_memory, plan.heads),
        read_place(vector_at(of_memory, gpu::thread())) {}

  __device__ __forceinline__ void begin() {
    const int thread = gpu::thread(), threads = gpu::threads();
    bring_gates<T>(a, plan, place.rank, shared.columns_ld,
                   [&](int column, int k) { return shared.gate_weights + weight_at<Fours::terms>(column, k, plan.round); });
    bring_heads<T>(a, plan, place.rank, shared.heads_ld, shared.units_ld, [&](int head, int own) {
      return shared.head_weights + weight_at<Fours::terms>(head, own, shared.units_ld);
    });
    for (int i = thread; i < plan.lanes * shared.heads_ld; i += threads) shared.heads[i] = 0;
    for (int i = thread; i < plan.lanes * shared.columns_ld; i += threads) shared.gates[i] = 0;  // what pads it stays so
    place.each_item(0, [&](const Item& item) {
      if (!plan.recurrent || !item.is || place.item_lane() > 0) return;
      const bool is = a.grad_cell && item.has;
      shared.state[item.at] = is ? static_cast<const T*>(a.grad_cell)[place.sample(item.m) * plan.H + item.unit] : T(0);
    });
    Memory::clear_inputs(memory);
    if (present) memory.begin();
  }

  // The gradient of the hidden state of an own unit by the step t, or after the sample's last by the state that came out; all
  // lanes of the item have it. Nothing passes where the sample began anew before t.
  template <int LANES>
  __device__ __forceinline__ T hidden_by_step(int64_t t, const Item& item) const {
    if (!plan.recurrent) return 0;
    T grad = place.template total<LANES>(shared.products + (item.has ? item.m * plan.round + item.unit : 0));
    if (plan.controller == Controller::gru && item.is) grad += shared.state[item.at];
    if (place.begins(t, item.m, item.steps)) grad = 0;
    if (t < item.steps) return grad;
    return item.has && a.grad_hidden ? static_cast<const T*>(a.grad_hidden)[place.sample(item.m) * plan.H + item.unit] : T(0);
  }
  // The same of number j of the own sample's reads.
  __device__ __forceinline__ T read_by_step(int64_t t, int j) const {
    if (t >= length)
      return a.grad_reads ? static_cast<const T*>(a.grad_reads)[place.sample(place.rank) * plan.reads + j] : T(0);
    if (place.begins(t, place.rank, length)) return 0;
    return place.total(shared.products + place.rank * plan.round + plan.reads_at() + j);
  }

  // What comes from the step after and from outside, for the hidden states of own units and the reads of the own sample.
  __device__ __forceinline__ void gather(int64_t t, bool goes_on, const Inputs& in) {
    const T* outside = static_cast<const T*>(a.grad_output);
    for (int j = gpu::thread(); goes_on && j < plan.reads; j += gpu::threads()) {
      T grad = outside ? outside[place.row(t, place.rank) * plan.width() + plan.H + j] : T(0);
      grad += read_by_step(t + 1, j);
      in.grads[j < gpu::threads() ? read_place : vector_at(of_memory, j)] = grad;
    }
    place.with_lanes([&](auto lanes) {
      place.each_item(t, [&](const Item& item) {
        const bool of_output = outside && item.there;
        T grad = of_output ? outside[place.row(t, item.m) * plan.width() + item.unit] : T(0);
        grad += hidden_by_step<decltype(lanes)::value>(t + 1, item);
        if (item.is && place.item_lane() == 0) shared.hidden[item.at] = item.there ? grad : T(0);
      });
    });
  }

  // The gradients of the own sample's heads before their nonlinearities, to where they belong and to all blocks.
  __device__ __forceinline__ void tell_heads(int64_t t, const Inputs& in) {
    const int64_t start = place.row(t, place.rank) * plan.heads;
    T* row = shared.heads + place.rank * shared.heads_ld;
    head_places.each([&](int j) { return static_cast<const T*>(a.kept_heads) + start + j; },
                     [&](int j, const auto& from, const T* kept) {
                       const T grad = Memory::head_gradient(a, memory, in, from, kept);
                       static_cast<T*>(a.grad_heads)[start + j] = row[j] = grad;
                     });
    place.tell_row(row, plan.heads);
  }

  // What forward kept of an item, an own unit of a sample: the thread's gates, the state and the one before.
  struct Kept {
    T gate[4], now, before;
  };
  template <int LANES>
  __device__ __forceinline__ Kept ask(int64_t t, const Item& item) const {
    const int per_unit = plan.per_unit();
    Kept kept{};
    if (!item.there) return kept;
    const int64_t row = place.row(t, item.m);
    const T* gates = static_cast<const T*>(a.kept_gates) + row * per_unit * plan.H + item.unit;
#pragma unroll
    for (int i = 0; i < 4 / LANES; ++i) {
      const int gate = place.template gate<LANES>(i);
      if (gate < per_unit) kept.gate[i] = gates[gate * plan.H];
    }
    if (!plan.recurrent) return kept;
    const T* states = static_cast<const T*>(a.kept_states) + item.unit;
    const T* start = static_cast<const T*>(plan.controller == Controller::lstm ? a.cell : a.hidden);
    kept.now = states[row * plan.H];
    if (place.begins(t, item.m, item.steps)) return kept;  // from a state of 0
    kept.before = t > 0 ? states[(row - a.B) * plan.H] : start[place.sample(item.m) * plan.H + item.unit];
    return kept;
  }

  // asked: of the thread's first item.
  template <int LANES>
  __device__ __forceinline__ void control(int64_t t, const Kept& asked) {
    constexpr int own = 4 / LANES;  // gates of a lane
    const int per_unit = plan.per_unit(), of_input = static_cast<int>(gates_per_unit(plan.controller));
    const auto ask_next = [&](const Item& item) { return ask<LANES>(t, item); };
    place.each_item(t, asked, ask_next, [&](const Item& item, const Kept& kept) {
      const auto of = [&](int gate) { return place.template of_gate<LANES>(kept.gate, gate); };
      const bool first = place.item_lane() == 0;
      T grad = 0, state[own] = {};
      if (item.is) {
#pragma unroll 2
        for (int slice = place.item_lane(); slice < shared.slices; slice += LANES)
          grad += shared.products[(slice * plan.lanes + item.m) * shared.units_ld + item.own];
        if (first) {
          grad += shared.hidden[item.at];
          if (plan.recurrent) state[0] = shared.state[item.at];
        }
      }
      grad = place.over_lanes(grad);
      const T of_state = place.template of_gate<LANES>(state, 0);
      T of_gate[own], before = 0;  // before: what passes to the state before by itself
      if (plan.controller == Controller::lstm) {
        const T input = of(0), forget = of(1), cell = of(2), shown = tanh(kept.now);
        const T of_now = of_state + grad * of(3) * (T(1) - shown * shown);
#pragma unroll
        for (int i = 0; i < own; ++i) {
          const int number = place.template gate<LANES>(i);
          const T gate = kept.gate[i], of_cell = of_now * (number == 0 ? cell : number == 1 ? kept.before : input);
          of_gate[i] = (number == 3 ? grad * shown : of_cell) * (number == 2 ? T(1) - gate * gate : gate * (T(1) - gate));
        }
        before = of_now * forget;
      } else if (plan.controller == Controller::gru) {  // reset, update, candidate; the hidden state's part of the candidate
        const T reset = of(0), update = of(1), candidate = of(2), of_hidden = of(3);
        const T of_candidate = grad * (T(1) - update) * (T(1) - candidate * candidate);
#pragma unroll
        for (int i = 0; i < own; ++i) {
          const int number = place.template gate<LANES>(i);
          of_gate[i] = number == 0   ? of_candidate * of_hidden * reset * (T(1) - reset)
                       : number == 1 ? grad * (kept.before - candidate) * update * (T(1) - update)
                       : number == 2 ? of_candidate
                                     : of_candidate * reset;
        }
        before = grad * update;
      } else {
        of_gate[0] = grad * (T(1) - kept.gate[0] * kept.gate[0]);
      }
      if (!item.is) return;
      if (plan.recurrent && item.there && first) shared.state[item.at] = place.begins(t, item.m, item.steps) ? T(0) : before;
      const int64_t start = place.row(t, item.m) * of_input * plan.H + item.unit;
#pragma unroll
      for (int i = 0; i < own; ++i) {
        const int number = place.template gate<LANES>(i);
        if (number >= per_unit) continue;
        shared.gates[item.m * shared.columns_ld + item.own * per_unit + number] = item.there ? of_gate[i] : T(0);
        if (item.there && number < of_input) static_cast<T*>(a.grad_gates)[start + number * plan.H] = of_gate[i];
        const int of_hidden = plan.hidden_gate(number);
        if (item.there && plan.controller == Controller::gru && of_hidden >= 0)
          static_cast<T*>(a.grad_hidden_gates)[start + of_hidden * plan.H] = of_gate[i];
      }
    });
  }

  __device__ __forceinline__ void end() {
    place.each_item(0, [&](const Item& item) {
      const T grad = plan.item_bits == 2 ? hidden_by_step<4>(0, item) : hidden_by_step<1>(0, item);
      if (!plan.recurrent || !item.has || place.item_lane() > 0) return;
      const int64_t to = place.sample(item.m) * plan.H + item.unit;
      static_cast<T*>(a.grad_in_hidden)[to] = grad;
      if (plan.controller == Controller::lstm) static_cast<T*>(a.grad_in_cell)[to] = shared.state[item.at];
    });
    if (!present) return;
    const int64_t sample = place.sample(place.rank);
    for (int j = gpu::thread(); j < plan.reads; j += gpu::threads())
      static_cast<T*>(a.grad_in_reads)[sample * plan.reads + j] = read_by_step(0, j);
    memory.end();
    const int64_t of_input = gates_per_unit(plan.controller) * plan.H;
    memory.clear_steps(a, sample, length, a.grad_gates, a.state, of_input);
    if (a.grad_hidden_gates) memory.clear_steps(a, sample, length, a.grad_hidden_gates, a.state, of_input);
    memory.clear_steps(a, sample, length, a.grad_heads, a.state, plan.heads);
  }

  __device__ __forceinline__ void run() {
    HeadStream<T, Memory, P> stream(a, plan, of_memory, head_places);
    const int steps = static_cast<int>(place.steps());
    int first = length;  // the step at which the replay in hand begins
    begin();
    gpu::sync();
    for (int visit = 0; visit < 2; ++visit) Memory::put_constants(a, of_memory, memory.inputs(visit));
    if (length > 0) {
      stream.ask(place.row(memory.replay_before(length), place.rank));
      stream.put(memory.inputs(0));
    }
    place.barrier();
    for (int t = steps - 1; t >= 0; --t) {
      const bool goes_on = t < length;
      if (goes_on && t < first) {
        first = static_cast<int>(memory.replay_before(t + 1));
        memory.replay_all(stream, first, t + 1 - first);
      }
      const Inputs in = memory.inputs(memory.visits);
      gather(t, goes_on, in);
      if (goes_on) {
        gpu::sync();
        memory.step_back(in, t, t - first);
        gpu::sync();
        tell_heads(t, in);
        Memory::leave_step(memory, place.begins(t, place.rank, length));
        ++memory.visits;
      }
      Kept asked;
      place.with_lanes([&](auto lanes) { asked = ask<decltype(lanes)::value>(t, place.own_at(t)); });
      place.barrier();
      heads.multiply(plan.lanes, [&](int slice, int m, int own, T sum) {
        shared.products[(slice * plan.lanes + m) * shared.units_ld + own] = sum;
      });
      const bool more = goes_on && t > 0;
      if (more) stream.ask(place.row(t > first ? t - 1 : memory.replay_before(t), place.rank));
      gpu::sync();
      place.with_lanes([&](auto lanes) { control<decltype(lanes)::value>(t, asked); });
      if (more) stream.put(memory.inputs(memory.visits));  // by warps that have no unit, if there are any
      gpu::sync();
      gates.multiply(plan.lanes, [&](int, int m, int k, T sum) { shared.products[m * plan.round + k] = sum; });
      place.barrier();
    }
    end();
    if (plan.cluster > 1) gpu::sync_cluster();  // no block ends while another reads from it
  }
};

template <class T, int C, bool RESIDENT, class P, class Memory>
__global__ void __launch_bounds__(most_threads, 1)
    cell_backward_kernel(const __grid_constant__ typename Memory::Backward a,
                         const __grid_constant__ typename Memory::BackwardScan memory,
                         const __grid_constant__ CellPlanOf<Memory> plan, unsigned char* scratch) {
  const auto& known = P::of(plan.memory);
  CellBack<T, C, RESIDENT, P, Memory>(a, memory, plan, known, Carver(gpu::shared_memory()), scratch).run();
}

// queue: null asks for room alone.
template <class Memory, class T>
const char* cell_back_of(const typename Memory::Backward& a, const Queue* queue) {
  using Side = CellBackwardSide<Memory, T>;
  const auto kernel = [](auto c, auto resident, auto kind) {
    return cell_backward_kernel<T, decltype(c)::value, decltype(resident)::value, typename decltype(kind)::Type, Memory>;
  };
  return queue ? launch_cell<Side, T>(a, every_of(a), *queue, kernel) : no_room<Side, T>(a, kernel);
}
template <class Memory>
const char* cell_back(const typename Memory::Backward& a, const Queue* queue) {
  return a.state == Dtype::float64 ? cell_back_of<Memory, double>(a, queue) : cell_back_of<Memory, float>(a, queue);
}

}  // namespace cuda
}  // namespace mann_fast

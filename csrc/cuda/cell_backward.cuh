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
    int units_ld, round_ld;
    T *gate_weights, *head_weights;  // [columns, round_ld], [heads, units_ld]
    T* heads;                        // [heads, lanes]: gradients of the heads of all samples
    T* gates;                        // [columns, lanes]: of own units
    T *hidden, *state;  // [units, lanes]: of the hidden state by what goes round; of the cell, or what passes a GRU by
    T* products;        // the hidden state's gradient by the heads, in slices; then own units' part of what goes round
    __device__ __host__ Shared(Carver& carver, const CellPlan& plan)
        : units_ld(padded_columns(plan.units)), round_ld(padded_columns(plan.round)),
          gate_weights(carver.take<T>(plan.columns * round_ld)), head_weights(carver.take<T>(plan.heads * units_ld)),
          heads(carver.take<T>(plan.heads * plan.lanes)), gates(carver.take<T>(plan.columns * plan.lanes)),
          hidden(carver.take<T>(plan.items())), state(carver.take<T>(plan.recurrent ? plan.items() : 0)),
          products(carver.take<T>(
              plan.lanes * (slices_of(plan.units) * units_ld > round_ld ? slices_of(plan.units) * units_ld : round_ld))) {}
  };
};

// What a step's memory takes, on its way: the head values that forward kept, and what else the memory has kept. A thread asks
// for one number ahead; for more it would need registers that the step back has none of.
template <class T, class Memory, class P>
class HeadStream {
  using Arguments = typename Memory::Backward;
  using Places = HeadPlaces<Memory, P, Arguments>;

 public:
  __device__ __forceinline__ HeadStream(const Arguments& a, const CellPlan& plan, const P& of_memory, const Places& places)
      : a_(a), plan_(plan), of_memory_(of_memory), places_(places) {}
  __device__ __forceinline__ void ask(int64_t row) {
    row_ = row;
    asked_ = get(gpu::thread());
  }
  template <class Inputs>
  __device__ __forceinline__ void put(const Inputs& in) const {
    if (gpu::thread() < plan_.heads) Memory::put(a_, in, places_.first(), asked_);
    places_.each([&](int j, const auto& to) { Memory::put(a_, in, to, get(j)); }, 1);
    Memory::put_kept(a_, of_memory_, in, row_);
  }

 private:
  __device__ __forceinline__ T get(int j) const {
    return j < plan_.heads ? static_cast<const T*>(a_.kept_heads)[row_ * plan_.heads + j] : T(0);
  }

  const Arguments& a_;
  const CellPlan& plan_;
  const P& of_memory_;
  const Places& places_;
  int64_t row_ = 0;
  T asked_;
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
  const bool present;  // the block has a sample
  Step memory;
  typename CellBackwardSide<Memory, T>::Shared shared;
  const Product<T, P::fixed> heads, gates;
  const HeadPlaces<Memory, P, Arguments> head_places;
  const int read_place;  // where the thread's first number of the reads lies

  __device__ __forceinline__ CellBack(const Arguments& a, const typename Memory::BackwardScan& scan,
                                      const CellPlanOf<Memory>& plan, const P& of_memory, Carver carver, unsigned char* scratch)
      : a(a), plan(plan), of_memory(of_memory), place(plan, a), present(place.there(place.rank)),
        memory(scan, of_memory, plan.every,
               typename Memory::Places(plan.memory, scratch, plan.weights, Memory::scratch_of(place.sample(place.rank))),
               place.sample(place.rank), 0, true),
        shared(carver, plan),
        heads(shared.head_weights, shared.units_ld, shared.heads, plan.heads, slices_of(plan.units), shared.products),
        gates(shared.gate_weights, shared.round_ld, shared.gates, plan.columns, 1, shared.products),
        head_places(a, of_memory, plan.heads), read_place(vector_at(of_memory, gpu::thread())) {}

  __device__ __forceinline__ void begin() {
    const int thread = gpu::thread(), threads = gpu::threads(), per_unit = plan.per_unit();
    for (int i = thread; i < plan.columns * shared.round_ld; i += threads) {
      const int column = i / shared.round_ld, k = i % shared.round_ld, unit = place.unit(column / per_unit);
      shared.gate_weights[i] = k < plan.round && unit < plan.H ? gate_weight<T>(a, plan, column % per_unit, unit, k) : T(0);
    }
    for (int i = thread; i < plan.heads * shared.units_ld; i += threads) {
      const int j = i / shared.units_ld, own = i % shared.units_ld, unit = place.unit(own);
      shared.head_weights[i] = own < plan.units && unit < plan.H
                                   ? static_cast<const T*>(a.head_weight)[static_cast<int64_t>(j) * plan.H + unit]
                                   : T(0);
    }
    for (int i = thread; i < plan.heads * plan.lanes; i += threads) shared.heads[i] = 0;
    for (int i = thread; i < plan.lanes * shared.round_ld; i += threads) shared.products[i] = 0;
    for (int i = thread; plan.recurrent && i < plan.items(); i += threads) {
      const int own = i / plan.lanes, m = i % plan.lanes, unit = place.unit(own);
      const bool is = a.grad_cell && unit < plan.H && place.there(m);
      shared.state[i] = is ? static_cast<const T*>(a.grad_cell)[place.sample(m) * plan.H + unit] : T(0);
    }
    Memory::clear_inputs(memory);
    if (present) memory.begin();
  }

  // The gradient of the hidden state of an own unit by the step t, or after the sample's last by the state that came out.
  // Nothing passes where the sample began anew before t.
  __device__ __forceinline__ T hidden_by_step(int64_t t, const Item& item) const {
    if (!plan.recurrent || place.begins(t, item.m)) return 0;
    if (!place.goes_on(t, item.m))
      return a.grad_hidden ? static_cast<const T*>(a.grad_hidden)[place.sample(item.m) * plan.H + item.unit] : T(0);
    T grad = place.total(shared.products + item.m * shared.round_ld + item.unit);
    if (plan.controller == Controller::gru) grad += shared.state[item.at];
    return grad;
  }
  // The same of number j of the own sample's reads.
  __device__ __forceinline__ T read_by_step(int64_t t, int j) const {
    if (place.begins(t, place.rank)) return 0;
    if (!place.goes_on(t, place.rank))
      return a.grad_reads ? static_cast<const T*>(a.grad_reads)[place.sample(place.rank) * plan.reads + j] : T(0);
    return place.total(shared.products + place.rank * shared.round_ld + plan.reads_at() + j);
  }

  // What comes from the step after and from outside, for the hidden states of own units and the reads of the own sample.
  __device__ __forceinline__ void gather(int64_t t, bool goes_on, const Inputs& in) {
    const T* outside = static_cast<const T*>(a.grad_output);
    for (int i = gpu::thread(); i < plan.items(); i += gpu::threads()) {
      const Item item = place.item(t, i);
      T grad = 0;
      if (item.there) {
        grad = hidden_by_step(t + 1, item);
        if (outside) grad += outside[place.row(t, item.m) * plan.width() + item.unit];
      }
      shared.hidden[item.at] = grad;
    }
    for (int j = gpu::thread(); goes_on && j < plan.reads; j += gpu::threads()) {
      T grad = read_by_step(t + 1, j);
      if (outside) grad += outside[place.row(t, place.rank) * plan.width() + plan.H + j];
      in.grads[j < gpu::threads() ? read_place : vector_at(of_memory, j)] = grad;
    }
  }

  // The gradients of the own sample's heads before their nonlinearities, to where they belong and to all blocks.
  __device__ __forceinline__ void tell_heads(int64_t t, const Inputs& in) {
    const int64_t start = place.row(t, place.rank) * plan.heads;
    const T* kept = static_cast<const T*>(a.kept_heads) + start;
    head_places.each([&](int j, const auto& from) {
      const T grad = Memory::head_gradient(a, memory, in, from, kept + j);
      static_cast<T*>(a.grad_heads)[start + j] = grad;
      place.tell(shared.heads + j * plan.lanes + place.rank, grad);
    });
  }

  // What forward kept of an item, an own unit of a sample: its gates, its state and the one before.
  struct Kept {
    T gate[4], now, before;
  };
  __device__ __forceinline__ void ask(int64_t t, int i, Kept& kept) const {
    const Item item = place.item(t, i);
    const int per_unit = plan.per_unit();
    kept = Kept{};
    if (!item.there) return;
    const int64_t row = place.row(t, item.m);
    const T* gates = static_cast<const T*>(a.kept_gates) + row * per_unit * plan.H + item.unit;
#pragma unroll
    for (int g = 0; g < 4; ++g)
      if (g < per_unit) kept.gate[g] = gates[g * plan.H];
    if (!plan.recurrent) return;
    const T* states = static_cast<const T*>(a.kept_states) + item.unit;
    const T* start = static_cast<const T*>(plan.controller == Controller::lstm ? a.cell : a.hidden);
    kept.now = states[row * plan.H];
    if (place.begins(t, item.m)) return;  // from a state of 0
    kept.before = t > 0 ? states[(row - a.B) * plan.H] : start[place.sample(item.m) * plan.H + item.unit];
  }

  __device__ __forceinline__ void control(int64_t t, Kept& kept) {
    const int slices = slices_of(plan.units), per_unit = plan.per_unit();
    const int of_input = static_cast<int>(gates_per_unit(plan.controller));
    for (int i = gpu::thread(); i < plan.items(); i += gpu::threads()) {
      if (i >= gpu::threads()) ask(t, i, kept);
      const Item item = place.item(t, i);
      T grad = shared.hidden[item.at];
#pragma unroll 1  // more would spill registers
      for (int slice = 0; slice < slices; ++slice)
        grad += shared.products[(slice * plan.lanes + item.m) * shared.units_ld + item.own];
      const T(&gate)[4] = kept.gate;
      T of_gate[4] = {}, before = 0;  // before: what passes to the state before by itself
      if (plan.controller == Controller::lstm) {
        const T shown = tanh(kept.now), grad_now = shared.state[item.at] + grad * gate[3] * (T(1) - shown * shown);
        of_gate[0] = grad_now * gate[2] * gate[0] * (T(1) - gate[0]);
        of_gate[1] = grad_now * kept.before * gate[1] * (T(1) - gate[1]);
        of_gate[2] = grad_now * gate[0] * (T(1) - gate[2] * gate[2]);
        of_gate[3] = grad * shown * gate[3] * (T(1) - gate[3]);
        before = grad_now * gate[1];
      } else if (plan.controller == Controller::gru) {  // reset, update, candidate; the hidden state's part of the candidate
        of_gate[2] = grad * (T(1) - gate[1]) * (T(1) - gate[2] * gate[2]);
        of_gate[0] = of_gate[2] * gate[3] * gate[0] * (T(1) - gate[0]);
        of_gate[1] = grad * (kept.before - gate[2]) * gate[1] * (T(1) - gate[1]);
        of_gate[3] = of_gate[2] * gate[0];
        before = grad * gate[1];
      } else {
        of_gate[0] = grad * (T(1) - gate[0] * gate[0]);
      }
      if (plan.recurrent && item.there) shared.state[item.at] = place.begins(t, item.m) ? T(0) : before;
      const int64_t start = place.row(t, item.m) * of_input * plan.H + item.unit;
#pragma unroll
      for (int g = 0; g < 4; ++g) {
        if (g >= per_unit) continue;
        shared.gates[(item.own * per_unit + g) * plan.lanes + item.m] = item.there ? of_gate[g] : T(0);
        if (item.there && g < of_input) static_cast<T*>(a.grad_gates)[start + g * plan.H] = of_gate[g];
        const int gate = plan.hidden_gate(g);
        if (item.there && plan.controller == Controller::gru && gate >= 0)
          static_cast<T*>(a.grad_hidden_gates)[start + gate * plan.H] = of_gate[g];
      }
    }
  }

  __device__ __forceinline__ void end() {
    for (int i = gpu::thread(); plan.recurrent && i < plan.items(); i += gpu::threads()) {
      const Item item = place.item(i);
      if (!item.there) continue;
      const int64_t to = place.sample(item.m) * plan.H + item.unit;
      static_cast<T*>(a.grad_in_hidden)[to] = hidden_by_step(0, item);
      if (plan.controller == Controller::lstm) static_cast<T*>(a.grad_in_cell)[to] = shared.state[item.at];
    }
    if (!present) return;
    const int64_t sample = place.sample(place.rank), length = place.length(place.rank);
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
    const int steps = static_cast<int>(place.steps()), length = present ? static_cast<int>(place.length(place.rank)) : 0;
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
        Memory::leave_step(memory, place.begins(t, place.rank));
        ++memory.visits;
      }
      Kept kept;
      ask(t, gpu::thread(), kept);
      place.barrier();
      heads.multiply(plan.lanes);
      gpu::sync();
      control(t, kept);
      gpu::sync();
      const bool more = goes_on && t > 0;
      if (more) stream.ask(place.row(t > first ? t - 1 : memory.replay_before(t), place.rank));
      gates.multiply(plan.lanes);
      if (more) stream.put(memory.inputs(memory.visits));
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

// A cell forward: controller, heads and memory for all steps in one launch.
//
// A step: the gates of own units from what goes round, the controller, the units' part of every head | barrier | tell all
// blocks the hidden state; add up the heads of the own sample, and its memory's step (two barriers of the block, and those that
// the step has itself); tell the reads | barrier |.
#pragma once
#include "cell.cuh"

namespace mann_fast {
namespace cuda {

template <class Of, class T>
struct CellForwardSide {
  using Memory = Of;
  using Room = typename Memory::template ForwardRoom<T>;
  static constexpr bool slots_anywhere = false, near = true;
  struct Shared {
    int gates_ld, heads_ld;
    T *gate_weights, *head_weights;  // [round, gates_ld], [units, heads_ld]
    T* bias;                         // [columns]
    T* round;                        // [round, lanes]: hidden states and reads of all samples
    T *hidden, *state;               // [units, lanes]: of own units; state: an LSTM's cell, a GRU's hidden state
    T* products;                     // the gates in slices, then own units' part of the heads
    __device__ __host__ Shared(Carver& carver, const CellPlan& plan)
        : gates_ld(padded_columns(plan.columns)), heads_ld(padded_columns(plan.heads)),
          gate_weights(carver.take<T>(plan.round * gates_ld)), head_weights(carver.take<T>(plan.units * heads_ld)),
          bias(carver.take<T>(plan.columns)), round(carver.take<T>(plan.round * plan.lanes)),
          hidden(carver.take<T>(plan.items())), state(carver.take<T>(plan.recurrent ? plan.items() : 0)),
          products(carver.take<T>(
              plan.lanes * (slices_of(plan.columns) * gates_ld > heads_ld ? slices_of(plan.columns) * gates_ld : heads_ld))) {}
  };
};

template <class T, int C, bool RESIDENT, class P, class Memory>
struct CellForward {
  using Arguments = typename Memory::Forward;
  using Step = typename Memory::template ForwardStep<T, C, RESIDENT, P>;
  using Inputs = typename Memory::template Inputs<T>;
  const Arguments& a;
  const CellPlanOf<Memory>& plan;
  const P& of_memory;
  const CellPlace place;
  const bool present;  // the block has a sample
  Step memory;
  typename CellForwardSide<Memory, T>::Shared shared;
  const Product<T, P::fixed> gates, heads;
  const HeadPlaces<Memory, P, Arguments> head_places;
  const int read_place, read_head;  // where the thread's first number of the reads lies

  __device__ __forceinline__ CellForward(const Arguments& a, const typename Memory::ForwardScan& scan,
                                         const CellPlanOf<Memory>& plan, const P& of_memory, Carver carver,
                                         unsigned char* scratch)
      : a(a), plan(plan), of_memory(of_memory), place(plan, a), present(place.there(place.rank)),
        memory(scan, of_memory,
               typename Memory::Places(plan.memory, scratch, plan.weights, Memory::scratch_of(place.sample(place.rank))),
               place.sample(place.rank), 0),
        shared(carver, plan),
        gates(shared.gate_weights, shared.gates_ld, shared.round, plan.round, slices_of(plan.columns), shared.products),
        heads(shared.head_weights, shared.heads_ld, shared.hidden, plan.units, 1, shared.products),
        head_places(a, of_memory, plan.heads), read_place(vector_at(of_memory, gpu::thread())),
        read_head(gpu::thread() / of_memory.D) {}

  __device__ __forceinline__ void begin() {
    const int thread = gpu::thread(), threads = gpu::threads(), per_unit = plan.per_unit();
    for (int i = thread; i < plan.round * shared.gates_ld; i += threads) {
      const int column = i / plan.round, k = i % plan.round, unit = place.unit(column / per_unit);
      const bool is = column < plan.columns && unit < plan.H;
      shared.gate_weights[k * shared.gates_ld + column] = is ? gate_weight<T>(a, plan, column % per_unit, unit, k) : T(0);
    }
    for (int i = thread; i < plan.units * shared.heads_ld; i += threads) {
      const int own = i % plan.units, j = i / plan.units, unit = place.unit(own);
      shared.head_weights[own * shared.heads_ld + j] =
          j < plan.heads && unit < plan.H ? static_cast<const T*>(a.head_weight)[static_cast<int64_t>(j) * plan.H + unit]
                                          : T(0);
    }
    for (int i = thread; i < plan.columns; i += threads) {
      const int gate = plan.hidden_gate(i % per_unit), unit = place.unit(i / per_unit);
      const bool is = plan.recurrent && gate >= 0 && unit < plan.H;
      shared.bias[i] = is ? static_cast<const T*>(a.hidden_bias)[gate * plan.H + unit] : T(0);
    }
    const int reads = plan.reads_at();
    for (int i = thread; i < plan.round * plan.lanes; i += threads) {
      const int k = i / plan.lanes, m = i % plan.lanes;
      const int64_t sample = place.sample(m);
      T value = 0;
      if (place.there(m) && !place.begins(0, m))
        value = k < reads ? static_cast<const T*>(a.hidden)[sample * plan.H + k]
                          : static_cast<const T*>(a.reads)[sample * plan.reads + k - reads];
      shared.round[i] = value;
    }
    const void* state = plan.controller == Controller::lstm ? a.cell : a.hidden;
    for (int i = thread; plan.recurrent && i < plan.items(); i += threads) {
      const int own = i / plan.lanes, m = i % plan.lanes, unit = place.unit(own);
      const bool is = unit < plan.H && place.there(m) && !place.begins(0, m);
      shared.state[i] = is ? static_cast<const T*>(state)[place.sample(m) * plan.H + unit] : T(0);
    }
    for (int i = thread; i < plan.items(); i += threads) shared.hidden[i] = 0;  // what pads it stays so
    Memory::clear_inputs(memory);
    if (present) memory.begin(place.begins(0, place.rank));
  }

  // What an item's gates have of the input.
  __device__ __forceinline__ void ask(int64_t t, int i, T (&gates)[4]) const {
    const Item item = place.item(t, i);
    const int of_input = static_cast<int>(gates_per_unit(plan.controller));
    const T* from = static_cast<const T*>(a.gates) + place.row(t, item.m) * of_input * plan.H + item.unit;
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) gates[gate] = item.there && gate < of_input ? from[gate * plan.H] : T(0);
  }

  __device__ __forceinline__ void control(int64_t t, T (&asked)[4]) {
    const int slices = slices_of(plan.columns), per_unit = plan.per_unit();
    for (int i = gpu::thread(); i < plan.items(); i += gpu::threads()) {
      if (i >= gpu::threads()) ask(t, i, asked);
      const Item item = place.item(t, i);
      if (!item.there) continue;
      T gate[4] = {};
#pragma unroll
      for (int g = 0; g < 4; ++g) {
        if (g >= per_unit) continue;
        gate[g] = shared.bias[item.own * per_unit + g];
        for (int slice = 0; slice < slices; ++slice)
          gate[g] += shared.products[(slice * plan.lanes + item.m) * shared.gates_ld + item.own * per_unit + g];
      }
      T kept[4] = {}, now;
      if (plan.controller == Controller::lstm) {
        kept[0] = sigmoid(asked[0] + gate[0]);
        kept[1] = sigmoid(asked[1] + gate[1]);
        kept[2] = tanh(asked[2] + gate[2]);
        kept[3] = sigmoid(asked[3] + gate[3]);
        now = kept[1] * shared.state[item.at] + kept[0] * kept[2];
        shared.hidden[item.at] = kept[3] * tanh(now);
      } else if (plan.controller == Controller::gru) {
        kept[0] = sigmoid(asked[0] + gate[0]);
        kept[1] = sigmoid(asked[1] + gate[1]);
        kept[2] = tanh(asked[2] + gate[2] + kept[0] * gate[3]);
        kept[3] = gate[3];
        now = kept[2] + kept[1] * (shared.state[item.at] - kept[2]);
        shared.hidden[item.at] = now;
      } else {
        shared.hidden[item.at] = kept[0] = now = tanh(asked[0] + gate[0]);
      }
      if (plan.recurrent) shared.state[item.at] = place.begins(t + 1, item.m) ? T(0) : now;
      if (a.anchor_every == 0) continue;
      const int64_t row = place.row(t, item.m);
      T* to = static_cast<T*>(a.kept_gates) + row * per_unit * plan.H + item.unit;
#pragma unroll
      for (int g = 0; g < 4; ++g)
        if (g < per_unit) to[g * plan.H] = kept[g];
      if (plan.recurrent) static_cast<T*>(a.kept_states)[row * plan.H + item.unit] = now;
    }
  }

  __device__ __forceinline__ void tell_hidden(int64_t t) {
    for (int i = gpu::thread(); i < plan.items(); i += gpu::threads()) {
      const Item item = place.item(t, i);
      if (!item.there) continue;
      const T value = shared.hidden[item.at];
      static_cast<T*>(a.output)[place.row(t, item.m) * plan.width() + item.unit] = value;
      if (plan.recurrent)
        place.tell(shared.round + item.unit * plan.lanes + item.m, place.begins(t + 1, item.m) ? T(0) : value);
    }
  }

  __device__ __forceinline__ void take_heads(int64_t t, const Inputs& in) {
    head_places.each([&](int j, const auto& to) {
      T value = static_cast<const T*>(a.head_bias)[j] + place.total(shared.products + place.rank * shared.heads_ld + j);
      value = Memory::kept(to, value);
      if (a.anchor_every > 0) static_cast<T*>(a.kept_heads)[place.row(t, place.rank) * plan.heads + j] = value;
      Memory::put(a, in, to, value);
    });
  }

  __device__ __forceinline__ void tell_reads(int64_t t, bool next_anew) {
    for (int j = gpu::thread(); j < plan.reads; j += gpu::threads()) {
      const T value =
          j < gpu::threads() ? memory.read_at(read_place, read_head) : memory.read_at(vector_at(of_memory, j), j / of_memory.D);
      static_cast<T*>(a.output)[place.row(t, place.rank) * plan.width() + plan.H + j] = value;
      place.tell(shared.round + (plan.reads_at() + j) * plan.lanes + place.rank, next_anew ? T(0) : value);
    }
  }

  // The last state, of which what goes round is in every block, and nothing beyond a sample's end.
  __device__ __forceinline__ void end() {
    for (int i = gpu::thread(); plan.recurrent && i < plan.items(); i += gpu::threads()) {
      const Item item = place.item(i);
      if (!item.there) continue;
      const int64_t to = place.sample(item.m) * plan.H + item.unit;
      static_cast<T*>(a.out_hidden)[to] = shared.round[item.unit * plan.lanes + item.m];
      if (plan.controller == Controller::lstm) static_cast<T*>(a.out_cell)[to] = shared.state[item.at];
    }
    if (!present) return;
    for (int j = gpu::thread(); j < plan.reads; j += gpu::threads())
      static_cast<T*>(a.out_reads)[place.sample(place.rank) * plan.reads + j] =
          shared.round[(plan.reads_at() + j) * plan.lanes + place.rank];
    memory.end();
    memory.clear_steps(a, place.sample(place.rank), place.length(place.rank), a.output, a.state, plan.width());
  }

  __device__ __forceinline__ void run() {
    begin();
    gpu::sync();
    const Inputs in = memory.inputs(0);
    Memory::put_constants(a, of_memory, in);
    place.barrier();
    const int64_t steps = place.steps();
    for (int64_t t = 0; t < steps; ++t) {
      T asked[4];
      ask(t, gpu::thread(), asked);
      gates.multiply(plan.lanes);
      gpu::sync();
      control(t, asked);
      gpu::sync();
      heads.multiply(plan.lanes);
      place.barrier();
      tell_hidden(t);
      if (present && place.goes_on(t, place.rank)) {
        const bool next_anew = place.begins(t + 1, place.rank);
        take_heads(t, in);
        gpu::sync();
        memory.begin_step(in, t);
        gpu::sync();
        memory.end_step(next_anew);
        tell_reads(t, next_anew);
      }
      place.barrier();
    }
    end();
  }
};

template <class T, int C, bool RESIDENT, class P, class Memory>
__global__ void __launch_bounds__(most_threads, 1)
    cell_kernel(const __grid_constant__ typename Memory::Forward a, const __grid_constant__ typename Memory::ForwardScan memory,
                const __grid_constant__ CellPlanOf<Memory> plan, unsigned char* scratch) {
  const auto& known = P::of(plan.memory);
  CellForward<T, C, RESIDENT, P, Memory>(a, memory, plan, known, Carver(gpu::shared_memory()), scratch).run();
}

// queue: null asks for room alone.
template <class Memory, class T>
const char* cell_forward_of(const typename Memory::Forward& a, const Queue* queue) {
  using Side = CellForwardSide<Memory, T>;
  const auto kernel = [](auto c, auto resident, auto kind) {
    return cell_kernel<T, decltype(c)::value, decltype(resident)::value, typename decltype(kind)::Type, Memory>;
  };
  return queue ? launch_cell<Side, T>(a, 0, *queue, kernel) : no_room<Side, T>(a, kernel);
}
template <class Memory>
const char* cell_forward(const typename Memory::Forward& a, const Queue* queue) {
  return a.state == Dtype::float64 ? cell_forward_of<Memory, double>(a, queue) : cell_forward_of<Memory, float>(a, queue);
}

}  // namespace cuda
}  // namespace mann_fast

// A cell forward: controller, heads and memory for all steps in one launch.
//
// A step: the gates of own units from what goes round, the controller, the units' part of every head | barrier | add up the heads of the own sample; tell all blocks the hidden state; the memory's step (two barriers of
// the block, and those that the step has itself); tell the reads | barrier |.
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
    int gates_ld, heads_ld, slices;
    T *gate_weights, *head_weights;  // of [round, gates_ld] and [units, heads_ld]: weight_at
    T* bias;                         // [columns]
    T* round;                        // [lanes, round]: hidden states and reads of all samples
    T *hidden, *state;               // [lanes, units]: of own units; state: an LSTM's cell, a GRU's hidden state
    T* products;                     // [slices, lanes, gates_ld], then own units' part of the heads, [lanes, heads_ld]
    __device__ __host__ Shared(Carver& carver, const CellPlan& plan)
        : gates_ld(padded(plan.columns)), heads_ld(padded(plan.heads)), slices(slices_of(gates_ld)),
          gate_weights(carver.take<T>(plan.round * gates_ld)), head_weights(carver.take<T>(plan.units * heads_ld)),
          bias(carver.take<T>(plan.columns)), round(carver.take<T>(plan.lanes * plan.round)),
          hidden(carver.take<T>(plan.items())), state(carver.take<T>(plan.recurrent ? plan.items() : 0)),
          products(carver.take<T>(plan.lanes * (slices * gates_ld > heads_ld ? slices * gates_ld : heads_ld))) {}
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
  const bool present;  // the block has a sample,
  const int length;    // of so many steps, else 0
  Step memory;
  typename CellForwardSide<Memory, T>::Shared shared;
  const Product<T, Fours::terms, P::fixed> gates;
  const Product<T, Fours::columns, P::fixed> heads;
  const HeadPlaces<Memory, P, Arguments> head_places;
  const int read_place, read_head;  // where the thread's first number of the reads lies

  __device__ __forceinline__ CellForward(const Arguments& a, const typename Memory::ForwardScan& scan,
                                         const CellPlanOf<Memory>& plan, const P& of_memory, Carver carver,
                                         unsigned char* scratch)
      : a(a), plan(plan), of_memory(of_memory), place(plan, a), present(place.there(place.rank)),
        length(present ? static_cast<int>(place.length(place.rank)) : 0),
        memory(scan, of_memory,
               typename Memory::Places(plan.memory, scratch, plan.weights, Memory::scratch_of(place.sample(place.rank))),
               place.sample(place.rank), 0),
        shared(carver, plan), gates(shared.gate_weights, shared.gates_ld, shared.round, plan.round, shared.slices),
        heads(shared.head_weights, shared.heads_ld, shared.hidden, plan.units, 1), head_places(a, of_memory, plan.heads),
        read_place(vector_at(of_memory, gpu::thread())), read_head(gpu::thread() / of_memory.D) {}

  __device__ __forceinline__ void begin() {
    const int thread = gpu::thread(), threads = gpu::threads(), per_unit = plan.per_unit(), reads = plan.reads_at();
    bring_gates<T>(a, plan, place.rank, shared.gates_ld, [&](int column, int k) {
      return shared.gate_weights + weight_at<Fours::terms>(k, column, shared.gates_ld);
    });
    bring_heads<T>(a, plan, place.rank, shared.heads_ld, plan.units, [&](int head, int own) {
      return shared.head_weights + weight_at<Fours::columns>(own, head, shared.heads_ld);
    });
    for (int i = thread; i < plan.columns; i += threads) {
      const int gate = plan.hidden_gate(i % per_unit), unit = place.rank * plan.units + i / per_unit;
      const bool is = plan.recurrent && gate >= 0 && unit < plan.H;
      shared.bias[i] = is ? static_cast<const T*>(a.hidden_bias)[gate * plan.H + unit] : T(0);
    }
    for (int m = 0; m < plan.lanes; ++m) {
      const bool goes_on = place.there(m) && !place.begins(0, m, place.length(m));
      for (int k = thread; k < plan.round; k += threads) {
        T value = 0;
        if (goes_on && k < reads && k < plan.H) value = static_cast<const T*>(a.hidden)[place.sample(m) * plan.H + k];
        if (goes_on && k >= reads && k - reads < plan.reads)
          value = static_cast<const T*>(a.reads)[place.sample(m) * plan.reads + k - reads];
        shared.round[m * plan.round + k] = value;
      }
    }
    for (int i = thread; i < plan.items(); i += threads) shared.hidden[i] = 0;  // that of padding stays so
    const void* state = plan.controller == Controller::lstm ? a.cell : a.hidden;
    place.each_item(0, [&](const Item& item) {
      if (!plan.recurrent || !item.is || place.item_lane() > 0) return;
      const bool is = item.has && !place.begins(0, item.m, item.steps);
      shared.state[item.at] = is ? static_cast<const T*>(state)[place.sample(item.m) * plan.H + item.unit] : T(0);
    });
    Memory::clear_inputs(memory);
    if (present) memory.begin(place.begins(0, place.rank, length));
  }

  // What the thread's gates of an item have of the input.
  struct Asked {
    T gate[4];
  };
  template <int LANES>
  __device__ __forceinline__ Asked ask(int64_t t, const Item& item) const {
    const int of_input = static_cast<int>(gates_per_unit(plan.controller));
    const T* from = static_cast<const T*>(a.gates) + place.row(t, item.m) * of_input * plan.H + item.unit;
    Asked asked{};
#pragma unroll
    for (int i = 0; i < 4 / LANES; ++i) {
      const int gate = place.template gate<LANES>(i);
      if (item.there && gate < of_input) asked.gate[i] = from[gate * plan.H];
    }
    return asked;
  }

  // asked: for the thread's first item.
  template <int LANES>
  __device__ __forceinline__ void control(int64_t t, const Asked& asked) {
    constexpr int own = 4 / LANES;  // gates of a lane
    const int per_unit = plan.per_unit();
    const auto ask_next = [&](const Item& item) { return ask<LANES>(t, item); };
    place.each_item(t, asked, ask_next, [&](const Item& item, const Asked& of_input) {
      const auto of = [&](const T(&values)[own], int gate) { return place.template of_gate<LANES>(values, gate); };
      const bool first = place.item_lane() == 0;
      T kept[own] = {}, state[own] = {}, now, hidden;
#pragma unroll
      for (int i = 0; i < own; ++i) {
        const int gate = place.template gate<LANES>(i), column = item.own * per_unit + gate;
        if (!item.there || gate >= per_unit) continue;
        kept[i] = shared.bias[column];
#pragma unroll 4
        for (int slice = 0; slice < shared.slices; ++slice)
          kept[i] += shared.products[(slice * plan.lanes + item.m) * shared.gates_ld + column];
      }
      if (item.there && first && plan.recurrent) state[0] = shared.state[item.at];
      const T before = of(state, 0);
      if (plan.controller == Controller::lstm) {
#pragma unroll
        for (int i = 0; i < own; ++i) {
          const T sum = of_input.gate[i] + kept[i];
          kept[i] = place.template gate<LANES>(i) == 2 ? tanh(sum) : sigmoid(sum);
        }
        now = of(kept, 1) * before + of(kept, 0) * of(kept, 2);
        hidden = of(kept, 3) * tanh(now);
      } else if (plan.controller == Controller::gru) {
        // Number 2 is what the reads make of the candidate, 3 what the hidden state does.
#pragma unroll
        for (int i = 0; i < own; ++i) {
          const T sum = of_input.gate[i] + kept[i];
          kept[i] = place.template gate<LANES>(i) < 2 ? sigmoid(sum) : sum;
        }
        const T candidate = tanh(of(kept, 2) + of(kept, 0) * of(kept, 3));
        hidden = now = candidate + of(kept, 1) * (before - candidate);
#pragma unroll
        for (int i = 0; i < own; ++i)
          if (place.template gate<LANES>(i) == 2) kept[i] = candidate;
      } else {
        kept[0] = tanh(of_input.gate[0] + kept[0]);
        hidden = now = of(kept, 0);
      }
      if (!item.there) return;
      if (first) {
        shared.hidden[item.at] = hidden;
        if (plan.recurrent) shared.state[item.at] = place.begins(t + 1, item.m, item.steps) ? T(0) : now;
      }
      if (a.anchor_every == 0) return;
      const int64_t row = place.row(t, item.m);
      T* to = static_cast<T*>(a.kept_gates) + row * per_unit * plan.H + item.unit;
#pragma unroll
      for (int i = 0; i < own; ++i) {
        const int gate = place.template gate<LANES>(i);
        if (gate < per_unit) to[gate * plan.H] = kept[i];
      }
      if (plan.recurrent && first) static_cast<T*>(a.kept_states)[row * plan.H + item.unit] = now;
    });
  }

  __device__ __forceinline__ void tell_hidden(int64_t t) {
    place.each_item(t, [&](const Item& item) {
      if (!item.there) return;
      const T value = shared.hidden[item.at];
      if (place.item_lane() == 0) static_cast<T*>(a.output)[place.row(t, item.m) * plan.width() + item.unit] = value;
      if (!plan.recurrent) return;
      const T next = place.begins(t + 1, item.m, item.steps) ? T(0) : value;
      for (int block = place.item_lane(); block < plan.cluster; block += 1 << plan.item_bits)
        *place.of_block(shared.round + item.m * plan.round + item.unit, block) = next;
    });
  }

  __device__ __forceinline__ void take_heads(int64_t t, const Inputs& in) {
    head_places.each(
        [&](int j) {
          const T bias = static_cast<const T*>(a.head_bias)[j];
          return bias + place.total(shared.products + place.rank * shared.heads_ld + j);
        },
        [&](int j, const auto& to, T sum) {
          const T value = Memory::kept(to, sum);
          if (a.anchor_every > 0) static_cast<T*>(a.kept_heads)[place.row(t, place.rank) * plan.heads + j] = value;
          Memory::put(a, in, to, value);
        });
  }

  __device__ __forceinline__ void tell_reads(int64_t t, bool next_anew) {
    T* row = own_reads();
    for (int j = gpu::thread(); j < plan.reads; j += gpu::threads()) {
      const T value =
          j < gpu::threads() ? memory.read_at(read_place, read_head) : memory.read_at(vector_at(of_memory, j), j / of_memory.D);
      static_cast<T*>(a.output)[place.row(t, place.rank) * plan.width() + plan.H + j] = value;
      row[j] = next_anew ? T(0) : value;
    }
    place.tell_row(row, plan.reads);
  }
  // Those of the own sample among what goes round.
  __device__ __forceinline__ T* own_reads() const { return shared.round + place.rank * plan.round + plan.reads_at(); }

  // The last state, of which what goes round is in every block, and nothing beyond a sample's end.
  __device__ __forceinline__ void end() {
    place.each_item(0, [&](const Item& item) {
      if (!plan.recurrent || !item.has || place.item_lane() > 0) return;
      const int64_t to = place.sample(item.m) * plan.H + item.unit;
      static_cast<T*>(a.out_hidden)[to] = shared.round[item.m * plan.round + item.unit];
      if (plan.controller == Controller::lstm) static_cast<T*>(a.out_cell)[to] = shared.state[item.at];
    });
    if (!present) return;
    for (int j = gpu::thread(); j < plan.reads; j += gpu::threads())
      static_cast<T*>(a.out_reads)[place.sample(place.rank) * plan.reads + j] = own_reads()[j];
    memory.end();
    memory.clear_steps(a, place.sample(place.rank), length, a.output, a.state, plan.width());
  }

  __device__ __forceinline__ void run() {
    begin();
    gpu::sync();
    const Inputs in = memory.inputs(0);
    Memory::put_constants(a, of_memory, in);
    place.barrier();
    const int64_t steps = place.steps();
    for (int64_t t = 0; t < steps; ++t) {
      Asked asked;
      place.with_lanes([&](auto lanes) { asked = ask<decltype(lanes)::value>(t, place.own_at(t)); });
      gates.multiply(plan.lanes, [&](int slice, int m, int column, T sum) {
        shared.products[(slice * plan.lanes + m) * shared.gates_ld + column] = sum;
      });
      gpu::sync();
      place.with_lanes([&](auto lanes) { control<decltype(lanes)::value>(t, asked); });
      gpu::sync();
      heads.multiply(plan.lanes, [&](int, int m, int column, T sum) { shared.products[m * shared.heads_ld + column] = sum; });
      place.barrier();
      if (t < length) {
        const bool next_anew = place.begins(t + 1, place.rank, length);
        take_heads(t, in);
        tell_hidden(t);
        gpu::sync();
        memory.begin_step(in, t);
        gpu::sync();
        memory.end_step(next_anew);
        tell_reads(t, next_anew);
      } else {
        tell_hidden(t);
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

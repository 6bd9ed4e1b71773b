// least_used and lrua_write, forward and backward. lrua_scan.cu has the sequence.
#include "kernels.h"
#include "parts.cuh"

namespace mann_fast {
namespace cuda {
namespace {

// ---- least_used -----------------------------------------------------------------------------------------------------

// A slot's place in the order is the number of slots before it: no thread waits for another, whatever n is. A block takes
// as many slots of a sample as it has threads, and goes through all of the sample's.
template <class T>
__global__ void __launch_bounds__(most_threads, 1) least_used_kernel(LeastUsed a, int64_t parts) {
  using Bits = typename Order<T>::Bits;
  Bits* orders = reinterpret_cast<Bits*>(gpu::shared_memory());
  const int64_t sample = gpu::block() / parts, mine = gpu::block() % parts * gpu::threads() + gpu::thread();
  const T* usage = static_cast<const T*>(a.usage) + sample * a.N;
  const Bits own = mine < a.N ? order_of(usage[mine]) : taken<T>;
  int64_t before = 0;
  for (int64_t first = 0; first < a.N; first += gpu::threads()) {
    const int64_t slot = first + gpu::thread();
    if (first > 0) gpu::sync();
    orders[gpu::thread()] = slot < a.N ? order_of(usage[slot]) : taken<T>;
    gpu::sync();
    for (int i = 0; i < gpu::threads(); ++i) before += orders[i] < own || (orders[i] == own && first + i < mine);
  }
  if (mine < a.N && before < a.n) a.slots[sample * a.n + before] = mine;
}

template <class T>
const char* choose(const LeastUsed& a, const Queue& queue) {
  if (a.n == 0) return nullptr;
  const int threads = static_cast<int>(a.N < most_threads ? (a.N + 31) / 32 * 32 : most_threads);
  const int64_t parts = (a.N + threads - 1) / threads;
  return gpu::launch(least_used_kernel<T>, {a.B * parts, threads, 1, threads * sizeof(T), queue.stream}, a, parts);
}

// ---- lrua_write -----------------------------------------------------------------------------------------------------

// A block takes `span` slots of a sample; [R, span] write weights lie in shared memory.
template <class T>
struct Write {
  int64_t sample, first, count;
  T* weights;
  const int64_t* slots;

  template <class Arguments>
  __device__ Write(const Arguments& a, int64_t span, int64_t parts)
      : sample(gpu::block() / parts), first(gpu::block() % parts * span), count(a.N - first < span ? a.N - first : span),
        weights(reinterpret_cast<T*>(gpu::shared_memory())), slots(a.slots + sample * a.R) {}

  template <class Arguments>
  __device__ bool is_target(const Arguments& a, int64_t r, int64_t slot) const {
    if (!a.shared_target) return slots[r] == slot;
    bool any = false;
    for (int64_t i = 0; i < a.R; ++i) any |= slots[i] == slot;
    return any;
  }

  template <class Arguments>
  __device__ void weigh(const Arguments& a, int64_t span) const {
    for (int64_t i = gpu::thread(); i < a.R * count; i += gpu::threads()) {
      const int64_t r = i / count, slot = first + i % count;
      T gate, rest;
      gate_shares(load_as<T>(a.gate_logit, a.input, sample * a.R + r), gate, rest);
      const T before = static_cast<const T*>(a.read_weights)[(sample * a.R + r) * a.N + slot];
      weights[r * span + slot - first] = gate * before + (is_target(a, r, slot) ? rest : T(0));
    }
    gpu::sync();
  }
};

template <class T>
__global__ void __launch_bounds__(most_threads, 1) write_kernel(LruaWrite a, int64_t span, int64_t parts) {
  const Write<T> write(a, span, parts);
  write.weigh(a, span);
  T* out_weights = static_cast<T*>(a.write_weights);
  for (int64_t i = gpu::thread(); i < a.R * write.count; i += gpu::threads())
    out_weights[(write.sample * a.R + i / write.count) * a.N + write.first + i % write.count] =
        write.weights[i / write.count * span + i % write.count];
  const int64_t corner = (write.sample * a.N + write.first) * a.D;
  for (int64_t i = gpu::thread(); i < write.count * a.D; i += gpu::threads()) {
    const int64_t n = i / a.D, d = i % a.D;
    T m = write.first + n == write.slots[0] ? T(0) : static_cast<const T*>(a.memory)[corner + i];
    for (int64_t r = 0; r < a.R; ++r)
      m += write.weights[r * span + n] * load_as<T>(a.write_vector, a.input, (write.sample * a.R + r) * a.D + d);
    static_cast<T*>(a.out_memory)[corner + i] = m;
  }
}

// Gradients of write vectors and gates are this block's part, [parts, B, R, D] and [parts, B, R].
template <class T>
__global__ void __launch_bounds__(most_threads, 1)
    write_backward_kernel(LruaWriteBackward a, int64_t span, int64_t parts, T* of_vectors, T* of_gates) {
  const Write<T> write(a, span, parts);
  const int64_t sample = write.sample, first = write.first, part = gpu::block() % parts;
  T* grads = write.weights + a.R * span;  // of the write weights, [R, span]
  write.weigh(a, span);
  const T* grad_memory = static_cast<const T*>(a.grad_memory);
  const T* grad_weights = static_cast<const T*>(a.grad_write_weights);
  T* grad_in = static_cast<T*>(a.grad_in_memory);
  const int64_t corner = (sample * a.N + first) * a.D;
  for (int64_t i = gpu::thread(); i < write.count * a.D; i += gpu::threads())
    grad_in[corner + i] = grad_memory && first + i / a.D != write.slots[0] ? grad_memory[corner + i] : T(0);

  const int lane = gpu::thread() % 32, warp = gpu::thread() / 32, warps = gpu::threads() / 32;
  for (int64_t i = warp; i < a.R * write.count; i += warps) {  // a warp takes the dot product of a slot and a head
    const int64_t r = i % a.R, n = i / a.R;
    T sum = 0;
    if (grad_memory)
      for (int64_t d = lane; d < a.D; d += 32)
        sum += grad_memory[corner + n * a.D + d] * load_as<T>(a.write_vector, a.input, (sample * a.R + r) * a.D + d);
    sum = add_warp<1>(sum);
    if (lane == 0) grads[r * span + n] = sum + (grad_weights ? grad_weights[(sample * a.R + r) * a.N + first + n] : T(0));
  }
  gpu::sync();
  for (int64_t r = warp; r < a.R; r += warps) {
    T gate, rest, of_gate = 0;
    gate_shares(load_as<T>(a.gate_logit, a.input, sample * a.R + r), gate, rest);
    for (int64_t n = lane; n < write.count; n += 32) {
      const int64_t at = (sample * a.R + r) * a.N + first + n;
      const T target = write.is_target(a, r, first + n) ? T(1) : T(0);
      of_gate += grads[r * span + n] * (static_cast<const T*>(a.read_weights)[at] - target);
      static_cast<T*>(a.grad_read_weights)[at] = gate * grads[r * span + n];
    }
    of_gate = add_warp<1>(of_gate);
    if (lane == 0) of_gates[(part * a.B + sample) * a.R + r] = of_gate * (gate * rest);
  }
  for (int64_t i = gpu::thread(); i < a.R * a.D; i += gpu::threads()) {
    const int64_t r = i / a.D, d = i % a.D;
    T sum = 0;
    if (grad_memory)
      for (int64_t n = 0; n < write.count; ++n) sum += write.weights[r * span + n] * grad_memory[corner + n * a.D + d];
    of_vectors[((part * a.B + sample) * a.R + r) * a.D + d] = sum;
  }
}

// Slots of a block: about as many numbers of the memory as keep its threads busy for a while, and no more write weights than
// the shared memory that every kernel has.
int64_t write_span(int64_t N, int64_t D, int64_t R, size_t bytes_per_weight) {
  const int64_t wanted = (8192 + D - 1) / D, room = static_cast<int64_t>(gpu::portable_shared / bytes_per_weight) / R;
  const int64_t span = wanted < room ? wanted : room;
  return span < 1 ? 1 : span < N ? span : N;
}

constexpr const char* too_many_heads = "the kernel takes no more write weights of a slot than fit into 48 KiB";

template <class T>
const char* write(const LruaWrite& a, const Queue& queue) {
  if (a.R * sizeof(T) > gpu::portable_shared) return too_many_heads;
  if (const char* why = choose<T>({a.B, a.N, a.R, a.state, a.usage, a.slots}, queue)) return why;
  const int64_t span = write_span(a.N, a.D, a.R, sizeof(T)), parts = (a.N + span - 1) / span;
  return gpu::launch(write_kernel<T>, {a.B * parts, most_threads, 1, a.R * span * sizeof(T), queue.stream}, a, span, parts);
}

template <class T>
const char* write_backward(const LruaWriteBackward& a, const Queue& queue) {
  if (2 * a.R * sizeof(T) > gpu::portable_shared) return too_many_heads;
  const int64_t span = write_span(a.N, a.D, a.R, 2 * sizeof(T)), parts = (a.N + span - 1) / span;
  const int64_t rows = a.B * a.R;
  T* of_vectors = static_cast<T*>(queue.scratch(queue.owner, parts * rows * (a.D + 1) * sizeof(T)));
  T* of_gates = of_vectors + parts * rows * a.D;
  if (const char* why =
          gpu::launch(write_backward_kernel<T>, {a.B * parts, most_threads, 1, 2 * a.R * span * sizeof(T), queue.stream}, a,
                      span, parts, of_vectors, of_gates))
    return why;
  if (const char* why = add_parts(of_vectors, parts, rows * a.D, a.grad_write_vector, a.input, queue.stream)) return why;
  return add_parts(of_gates, parts, rows, a.grad_gate_logit, a.input, queue.stream);
}

}  // namespace

const char* usable() { return gpu::usable(least_used_kernel<float>); }

const char* least_used(const LeastUsed& a, const Queue& queue) {
  return a.state == Dtype::float64 ? choose<double>(a, queue) : choose<float>(a, queue);
}
const char* lrua_write(const LruaWrite& a, const Queue& queue) {
  return a.state == Dtype::float64 ? write<double>(a, queue) : write<float>(a, queue);
}
const char* lrua_write_backward(const LruaWriteBackward& a, const Queue& queue) {
  return a.state == Dtype::float64 ? write_backward<double>(a, queue) : write_backward<float>(a, queue);
}

}  // namespace cuda
}  // namespace mann_fast

// least_used and lrua_write, forward and backward. lrua_scan.cu has the sequence.
#include "kernels.h"
#include "parts.cuh"

namespace mann_fast {
namespace cuda {
namespace {

// ---- least_used -----------------------------------------------------------------------------------------------------

// Of few slots: a slot's place in the order is the number of slots before it, so that no thread waits for another, whatever n
// is. A block takes a sample, a thread a slot.
template <class T>
__global__ void __launch_bounds__(most_threads, 1) least_used_kernel(LeastUsed a) {
  using Bits = typename Order<T>::Bits;
  Bits* orders = reinterpret_cast<Bits*>(gpu::shared_memory());
  const int64_t sample = gpu::block(), mine = gpu::thread();
  const Bits own = mine < a.N ? order_of(static_cast<const T*>(a.usage)[sample * a.N + mine]) : taken<T>;
  orders[mine] = own;
  gpu::sync();
  int64_t before = 0;
  for (int i = 0; i < gpu::threads(); ++i) before += orders[i] < own || (orders[i] == own && i < mine);
  if (mine < a.N && before < a.n) a.slots[sample * a.n + before] = mine;
}

constexpr int chunk = 2048;  // slots that a block puts in order, in shared memory
constexpr int ways = 4;      // runs in order of which one is made at a time

// The logarithm of the least power of two that is not below x.
__device__ inline int logarithm(int64_t x) {
  int power = 0;
  while (int64_t(1) << power < x) ++power;
  return power;
}

// Where number i of a chunk lies: lanes whose numbers are 8 apart, or beside each other, meet different banks.
__device__ __forceinline__ int placed(int i) { return i + i / 8; }

// Compares numbers 2^step apart, then half as far, and so on, of which a thread does so many in registers.
template <int STEPS, class T>
__device__ __forceinline__ void compare_steps(Ranked<T>* all, int runs, int size, int gap, int step) {
  const int last = step - STEPS + 1;
  for (int i = gpu::thread(); i < runs << (size - STEPS); i += gpu::threads()) {
    const int run = i >> (size - STEPS), at = i - (run << (size - STEPS)), low = at & ((1 << last) - 1);
    const int first = (run << gap) + ((at - low) << STEPS) + low;
    Ranked<T> own[1 << STEPS];
#pragma unroll
    for (int k = 0; k < 1 << STEPS; ++k) own[k] = all[placed(first + (k << last))];
#pragma unroll
    for (int far = 1 << (STEPS - 1); far > 0; far /= 2)
#pragma unroll
      for (int k = 0; k < 1 << STEPS; ++k)
        if ((k & far) == 0) {
          const Ranked<T> x = own[k], y = own[(k + far) % (1 << STEPS)];
          const bool swap = run % 2 == 0 ? y < x : x < y;
          own[k] = swap ? y : x;
          own[(k + far) % (1 << STEPS)] = swap ? x : y;
        }
#pragma unroll
    for (int k = 0; k < 1 << STEPS; ++k) all[placed(first + (k << last))] = own[k];
  }
  gpu::sync();
}

// Puts bitonic runs of 2^size in order, every other one descending. Run j begins at j 2^gap.
template <class T>
__device__ __forceinline__ void merge_bitonic(Ranked<T>* all, int runs, int size, int gap) {
  int step = size - 1;
  for (; step >= 2; step -= 3) compare_steps<3>(all, runs, size, gap, step);
  if (step == 1) compare_steps<2>(all, runs, size, gap, step);
  if (step == 0) compare_steps<1>(all, runs, size, gap, step);
}

// The `kept` least of each chunk of a sample, in order. What there is to choose from, the usages or what an earlier call has left
// of them, is [B, count]; it comes out as [B, chunks, kept], where a chunk had fewer with numbers of no slot at the end, or, if
// `to` is null, as slots. Runs of as many as are kept are put in order. Then every two runs become one, of the lesser of one's
// first and the other's last, of its second and the other's last but one, and so on: these are the least of both.
template <class T>
__global__ void __launch_bounds__(most_threads, 2)
    least_of_chunks_kernel(LeastUsed a, const Ranked<T>* from, int64_t count, int64_t chunks, int64_t kept, Ranked<T>* to) {
  Ranked<T>* all = reinterpret_cast<Ranked<T>*>(gpu::shared_memory());
  const int64_t sample = gpu::block() / chunks, first = gpu::block() % chunks * chunk;
  const int own = static_cast<int>(count - first < chunk ? count - first : chunk);
  const int size = logarithm(kept), held = logarithm(own > kept ? own : kept);
  for (int i = gpu::thread(); i < 1 << held; i += gpu::threads()) {
    const int64_t at = sample * count + first + i;
    all[placed(i)] = i >= own ? Ranked<T>::of(taken<T>, ~0u)
                     : from   ? from[at]
                              : Ranked<T>::of(order_of(static_cast<const T*>(a.usage)[at]), static_cast<uint32_t>(first + i));
  }
  gpu::sync();
  for (int run = 1; run <= size; ++run) merge_bitonic(all, 1 << (held - run), run, run);
  for (int gap = size; gap < held; ++gap) {
    const int runs = 1 << (held - gap - 1);
    for (int i = gpu::thread(); i < runs << size; i += gpu::threads()) {
      const int at = (i >> size << (gap + 1)) + (i & ((1 << size) - 1));
      const Ranked<T> one = all[placed(at)], other = all[placed(at + (1 << gap))];
      all[placed(at)] = other < one ? other : one;
    }
    gpu::sync();
    merge_bitonic(all, runs, size, gap + 1);
  }
  for (int i = gpu::thread(); i < kept; i += gpu::threads()) {
    if (to) to[gpu::block() * kept + i] = all[placed(i)];
    else a.slots[sample * a.n + i] = all[placed(i)].slot();
  }
}

// Of runs in order, one for every `span` numbers of [B, ld] with what is left of them at its beginning, every `ways` become one,
// of which again no more than the n least are left. Where a number goes tells how many of the other runs are before it, found by
// halving. The last of these calls, for which `to` is null, gives out slots.
template <class T>
__global__ void __launch_bounds__(most_threads, 4)
    merge_runs_kernel(LeastUsed a, const Ranked<T>* from, int64_t ld, int64_t span, int64_t parts, Ranked<T>* to) {
  const int64_t kept = span < a.n ? span : a.n, sample = gpu::block() / parts;
  const int64_t i = gpu::block() % parts * gpu::threads() + gpu::thread(), run = i / kept, at = i % kept;
  const auto length = [&](int64_t run) {
    const int64_t left = a.N - run * span;
    return left <= 0 ? 0 : left < kept ? left : kept;
  };
  if (at >= length(run)) return;
  const Ranked<T>* all = from + sample * ld;
  const Ranked<T> own = all[run * span + at];
  const int64_t first = run / ways * ways;
  int64_t before[ways] = {}, lengths[ways];
#pragma unroll
  for (int w = 0; w < ways; ++w) lengths[w] = first + w == run ? 0 : length(first + w);
  for (int64_t step = int64_t(1) << logarithm(kept); step > 0; step /= 2)
#pragma unroll
    for (int w = 0; w < ways; ++w)  // whose loads wait for none of the others
      if (before[w] + step <= lengths[w] && all[(first + w) * span + before[w] + step - 1] < own) before[w] += step;
  int64_t place = at;
#pragma unroll
  for (int w = 0; w < ways; ++w) place += before[w];
  if (place >= a.n) return;
  if (to) to[sample * ld + first * span + place] = own;
  else a.slots[sample * a.n + place] = own.slot();
}

template <class T>
const char* choose(const LeastUsed& a, const Queue& queue) {
  if (a.n == 0) return nullptr;
  if (a.N <= most_threads) {
    const int threads = static_cast<int>((a.N + 31) / 32 * 32);
    return gpu::launch(least_used_kernel<T>, {a.B, threads, 1, threads * sizeof(T), queue.stream}, a);
  }
  if (a.N >= int64_t(1) << 32) return "the kernel takes no more slots than 32 bits can number";
  const auto chunks_of = [](int64_t count) { return (count + chunk - 1) / chunk; };
  const auto keep = [&](const Ranked<T>* from, int64_t count, int64_t kept, Ranked<T>* to) {
    const int64_t chunks = chunks_of(count);
    const size_t shared = sizeof(Ranked<T>) * (chunk + chunk / 8);
    return gpu::launch(least_of_chunks_kernel<T>, {a.B * chunks, most_threads, 1, shared, queue.stream}, a, from, count, chunks,
                       kept, to);
  };
  const auto scratch = [&](int64_t count) {
    return static_cast<Ranked<T>*>(queue.scratch(queue.owner, a.B * count * sizeof(Ranked<T>)));
  };
  Ranked<T>* between[2] = {};
  if (a.N <= chunk || a.n <= chunk / 4) {  // every call leaves a quarter or less
    const Ranked<T>* from = nullptr;
    int64_t count = a.N;
    for (int call = 0; chunks_of(count) > 1; ++call) {
      const int64_t left = chunks_of(count) * a.n;
      Ranked<T>*& to = between[call % 2];
      if (to == nullptr) to = scratch(left);
      if (const char* why = keep(from, count, a.n, to)) return why;
      from = to, count = left;
    }
    return keep(from, count, a.n, nullptr);
  }
  const int64_t ld = chunks_of(a.N) * chunk;
  between[0] = scratch(ld);
  if (const char* why = keep(nullptr, a.N, chunk, between[0])) return why;
  int64_t span = chunk;
  for (int call = 0; span < a.N; ++call, span *= ways) {
    const bool last = span * ways >= a.N;
    Ranked<T>*& to = between[(call + 1) % 2];
    if (to == nullptr && !last) to = scratch(ld);
    const int64_t runs = (a.N + span - 1) / span, left = runs * (span < a.n ? span : a.n);
    const int64_t parts = (left + most_threads - 1) / most_threads;
    if (const char* why = gpu::launch(merge_runs_kernel<T>, {a.B * parts, most_threads, 1, 0, queue.stream}, a,
                                      between[call % 2], ld, span, parts, last ? nullptr : to))
      return why;
  }
  return nullptr;
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

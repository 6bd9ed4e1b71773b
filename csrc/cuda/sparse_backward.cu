// sparse_read and sparse_scan, backward: a block takes a sample, from the last step to the first. It needs the rows that were
// read and no memory. The gradient of the memory lies where it comes out, and rows of it change.
#include "sparse.cuh"

namespace mann_fast {
namespace cuda {
namespace {

struct Sizes {
  int64_t N;
  int D, R, K;
  Dtype input;
  double eps;
};

template <class T>
struct Arrays {
  T *keys, *vectors, *grad_reads;           // [R, D] each
  T *weights, *of_dots, *of_rows;           // [R, K]: of what was read; factors of the key, and of the row itself
  T* squares;                               // [R]: of the keys, then their factor
  T *grads, *weights_before, *dots_before;  // [R, K] twice, [R, K + 1]
  int *slots, *slots_before, *oldest;       // [R, K] twice, [R]
  __device__ __host__ Arrays(Carver& carver, const Sizes& n)
      : keys(carver.take<T>(n.R * n.D)), vectors(carver.take<T>(n.R * n.D)), grad_reads(carver.take<T>(n.R * n.D)),
        weights(carver.take<T>(n.R * n.K)), of_dots(carver.take<T>(n.R * n.K)), of_rows(carver.take<T>(n.R * n.K)),
        squares(carver.take<T>(n.R)), grads(carver.take<T>(n.R * n.K)), weights_before(carver.take<T>(n.R * n.K)),
        dots_before(carver.take<T>(n.R * (n.K + 1))), slots(carver.take<int>(n.R * n.K)),
        slots_before(carver.take<int>(n.R * n.K)), oldest(carver.take<int>(n.R)) {}
};

template <class T>
struct Block : Arrays<T> {
  const Sizes& n;
  const int lane, warp;
  T* grad_memory;  // of the sample

  __device__ Block(Carver& carver, const Sizes& n, T* grad_memory)
      : Arrays<T>(carver, n), n(n), lane(gpu::thread() % 32), warp(gpu::thread() / 32), grad_memory(grad_memory) {}

  __device__ T* grad_row(int slot) const { return grad_memory + static_cast<int64_t>(slot) * n.D; }

  // Of one row of [B, R, D], or where that is null 0.
  __device__ void load(const void* from, int64_t row, int64_t count, T* to) const {
    for (int64_t i = gpu::thread(); i < count; i += gpu::threads())
      to[i] = from ? load_as<T>(from, n.input, row * count + i) : T(0);
  }
  // What was read in a row of [B, R, K].
  __device__ void load_reads(const int64_t* slots, const T* weights, int64_t row) const {
    for (int j = gpu::thread(); j < n.R * n.K; j += gpu::threads()) {
      this->slots[j] = static_cast<int>(slots[row * n.R * n.K + j]);
      this->weights[j] = weights[row * n.R * n.K + j];
    }
  }

  // Back through the reads: `rows` [R, K, D] are those that were read. `grads` has the gradients that come to the weights, but
  // for what comes to them by the reads; has_read: whether anything comes to these.
  __device__ void read(const T* rows, const void* sharpness, int64_t row, bool has_read, void* grad_keys,
                       void* grad_sharpness) const {
    const int D = n.D, R = n.R, K = n.K;
    for (int j = warp; j < R * K + R; j += block_warps) {  // first dot products: with the read's gradient, key, and itself
      const int r = j < R * K ? j / K : j - R * K;
      const T *key = this->keys + r * D, *grad_read = this->grad_reads + r * D;
      const T* m = j < R * K ? rows + static_cast<int64_t>(j) * D : key;
      T grad = 0, dot = 0, square = 0;
#pragma unroll 2
      for (int d = lane; d < D; d += 32) {
        grad += grad_read[d] * m[d];
        dot += key[d] * m[d];
        square += m[d] * m[d];
      }
      grad = add_warp<1>(grad), dot = add_warp<1>(dot), square = add_warp<1>(square);
      if (lane > 0) continue;
      if (j >= R * K) {
        this->squares[r] = square;
      } else {
        if (has_read) this->grads[j] += grad;
        this->of_dots[j] = dot;
        this->of_rows[j] = square;
      }
    }
    gpu::sync();
    for (int r = warp; r < R; r += block_warps) {
      const T beta = sharpness ? load_as<T>(sharpness, n.input, row * R + r) : T(1), key_square = this->squares[r];
      T mean = 0, of_square = 0, of_beta = 0;
      for (int j = r * K + lane; j < (r + 1) * K; j += 32) mean += this->weights[j] * this->grads[j];
      mean = add_warp<1>(mean);
      for (int j = r * K + lane; j < (r + 1) * K; j += 32) {
        const ScoreGradient<T> of = score_gradient(this->weights[j] * (this->grads[j] - mean), this->of_dots[j], beta,
                                                   key_square, this->of_rows[j], static_cast<T>(n.eps));
        this->of_dots[j] = of.dot;
        this->of_rows[j] = 2 * of.slot_square;
        of_square += 2 * of.key_square;
        of_beta += of.beta;
      }
      of_square = add_warp<1>(of_square), of_beta = add_warp<1>(of_beta);
      gpu::sync_warp();  // all lanes know the key's square
      if (lane > 0) continue;
      this->squares[r] = of_square;
      if (grad_sharpness) store_input(grad_sharpness, n.input, row * R + r, of_beta);
    }
    gpu::sync();
    for (int j = warp; j < R * K; j += block_warps) {  // a warp makes all of a gradient's row
      if (!is_first(this->slots, j, 0, lane)) continue;
      T* grad = grad_row(this->slots[j]);
      for (int d = lane; d < D; d += 32) {
        T sum = grad[d];
        for (int i = j; i < R * K; ++i) {
          if (this->slots[i] != this->slots[j]) continue;
          const int at = i / K * D + d;
          if (has_read) sum += this->weights[i] * this->grad_reads[at];
          sum += this->of_dots[i] * this->keys[at] + this->of_rows[i] * rows[static_cast<int64_t>(i) * D + d];
        }
        grad[d] = sum;
      }
    }
    for (int i = gpu::thread(); i < R * D; i += gpu::threads()) {
      const int r = i / D, d = i % D;
      T sum = this->squares[r] * this->keys[i];
#pragma unroll 4
      for (int j = r * K; j < (r + 1) * K; ++j) sum += this->of_dots[j] * rows[static_cast<int64_t>(j) * D + d];
      store_input(grad_keys, n.input, row * R * D + i, sum);
    }
    gpu::sync();
  }
};

// ---- sparse_read --------------------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(most_threads, 2)
    sparse_read_backward_kernel(const __grid_constant__ SparseReadBackward a, const __grid_constant__ Sizes n, Room room) {
  const int64_t b = gpu::block(), RK = a.R * a.K;
  Carver carver(room.own());
  const Block<T> block(carver, n, static_cast<T*>(a.grad_memory) + b * a.N * a.D);
  block.load(a.key, b, a.R * a.D, block.keys);
  block.load(a.grad_read, b, a.R * a.D, block.grad_reads);
  block.load_reads(a.slots, static_cast<const T*>(a.weights), b);
  for (int64_t j = gpu::thread(); j < RK; j += gpu::threads())
    block.grads[j] = a.grad_weights ? static_cast<const T*>(a.grad_weights)[b * RK + j] : T(0);
  gpu::sync();
  block.read(static_cast<const T*>(a.rows) + b * RK * a.D, a.sharpness, b, a.grad_read != nullptr, a.grad_key,
             a.grad_sharpness);
}

// ---- sparse_scan --------------------------------------------------------------------------------------------------------

template <class T>
struct Sample : Block<T> {
  using Block<T>::n;
  using Block<T>::lane;
  using Block<T>::warp;
  const SparseScanBackward& a;
  const int64_t b, length;

  __device__ Sample(Carver& carver, const SparseScanBackward& a, const Sizes& n, int64_t b)
      : Block<T>(carver, n, static_cast<T*>(a.grad_in_memory) + b * a.N * a.D), a(a), b(b), length(a.sequences.length(a.T, b)) {
  }

  __device__ bool begins(int64_t t) const { return a.sequences.begins(t, a.B, b); }

  // Where the heads read before step t, and how much.
  __device__ void load_before(int64_t t) const {
    const int64_t RK = a.R * a.K, row = t > 0 ? (t - 1) * a.B + b : b;
    const int64_t* slots = (t > 0 ? a.slot_history : a.read_slots) + row * RK;
    const T* weights = static_cast<const T*>(t > 0 ? a.weight_history : a.read_weights) + row * RK;
    const bool anew = begins(t);
    for (int j = gpu::thread(); j < n.R * n.K; j += gpu::threads()) {
      this->slots_before[j] = anew ? j % n.K : within(slots[j], a.N);
      this->weights_before[j] = !anew ? weights[j] : T(j % n.K == 0);
    }
  }

  __device__ void step(int64_t t) const {
    const int64_t row = t * a.B + b, RK = a.R * a.K;
    this->load(a.told.keys, row, a.R * a.D, this->keys);
    this->load(a.told.write_vectors, row, a.R * a.D, this->vectors);
    this->load(a.grad_reads, row, a.R * a.D, this->grad_reads);
    this->load_reads(a.slot_history, static_cast<const T*>(a.weight_history), row);
    load_before(t);
    for (int r = gpu::thread(); r < n.R; r += gpu::threads()) this->oldest[r] = static_cast<int>(a.oldest[row * a.R + r]);
    gpu::sync();
    this->read(static_cast<const T*>(a.rows) + row * RK * a.D, a.told.sharpness, row, a.grad_reads != nullptr, a.grad_told.keys,
               a.grad_told.sharpness);
    write(row);
    if (!begins(t)) return;
    for (int j = gpu::thread(); j < n.R * n.K; j += gpu::threads()) this->grads[j] = 0;
    gpu::sync();
  }

  // Back through the write: `grads` are then those of the weights of the step before.
  __device__ void write(int64_t row) const {
    const int D = n.D, R = n.R, K = n.K;
    const auto slot = [&](int r, int k) { return k < K ? this->slots_before[r * K + k] : this->oldest[r]; };
    for (int j = warp; j < R * (K + 1); j += block_warps) {
      const int r = j / (K + 1);
      const T *vector = this->vectors + r * D, *grad = this->grad_row(slot(r, j % (K + 1)));
      T dot = 0;
      for (int d = lane; d < D; d += 32) dot += vector[d] * grad[d];
      dot = add_warp<1>(dot);
      if (lane == 0) this->dots_before[j] = dot;
    }
    for (int i = gpu::thread(); i < R * D; i += gpu::threads()) {
      const int r = i / D, d = i % D;
      const WriteGates<T> gates(a.told, n.input, row * R + r);
      T sum = gates.open * gates.rest * this->grad_row(this->oldest[r])[d];
#pragma unroll 4
      for (int k = 0; k < K; ++k)
        sum += gates.open * (gates.gate * this->weights_before[r * K + k]) * this->grad_row(slot(r, k))[d];
      store_input(a.grad_told.write_vectors, n.input, row * R * D + i, sum);
    }
    gpu::sync();
    for (int r = warp; r < R; r += block_warps) {
      const WriteGates<T> gates(a.told, n.input, row * R + r);
      const T *dots = this->dots_before + r * (K + 1), of_oldest = dots[K];
      T of_reads = 0;
      for (int k = lane; k < K; k += 32) {
        of_reads += this->weights_before[r * K + k] * dots[k];
        this->grads[r * K + k] = gates.open * gates.gate * dots[k];
      }
      of_reads = add_warp<1>(of_reads);
      if (lane == 0) {
        store_input(a.grad_told.gate_logits, n.input, row * R + r,
                    gates.open * (gates.gate * gates.rest) * (of_reads - of_oldest));
        if (a.grad_told.write_gate_logits)
          store_input(a.grad_told.write_gate_logits, n.input, row * R + r,
                      gates.open * gates.closed * (gates.gate * of_reads + gates.rest * of_oldest));
      }
      T* erased = this->grad_row(this->oldest[r]);
      for (int d = lane; d < D; d += 32) erased[d] = 0;
    }
    gpu::sync();
  }

  // Of a step that this sample takes no part in.
  __device__ void clear(int64_t t) const {
    const int64_t row = t * a.B + b;
    for (void* grad : {a.grad_told.keys, a.grad_told.write_vectors}) clear_row(grad, a.input, row, a.R * a.D);
    for (void* grad : {a.grad_told.gate_logits, a.grad_told.sharpness, a.grad_told.write_gate_logits})
      clear_row(grad, a.input, row, a.R);
  }
};

// What comes to the memory before step t, at which sample b began anew, is the start's; this part of it.
template <class T>
__device__ void through_start(const SparseScanBackward& a, int64_t t, int64_t b, int64_t part, int64_t parts) {
  if (t >= a.sequences.length(a.T, b) || !a.sequences.begins(t, a.B, b)) return;
  T* grad_memory = static_cast<T*>(a.grad_in_memory) + b * a.N * a.D;
  T* grad_start = a.grad_start ? static_cast<T*>(a.grad_start) + b * a.N * a.D : nullptr;
#pragma unroll 4
  for (int64_t i = part * gpu::threads() + gpu::thread(); i < a.N * a.D; i += parts * gpu::threads()) {
    if (grad_start) grad_start[i] += grad_memory[i];
    grad_memory[i] = 0;
  }
}

// Steps [first, last], from the last one on. alone: there are all of them, and nobody else sees to what comes to the start.
template <class T>
__global__ void __launch_bounds__(most_threads, 2)
    sparse_scan_backward_kernel(const __grid_constant__ SparseScanBackward a, const __grid_constant__ Sizes n, Room room,
                                int64_t first, int64_t last, bool alone) {
  const int64_t b = gpu::block(), RK = a.R * a.K;
  Carver carver(room.own());
  const Sample<T> sample(carver, a, n, b);
  const T* given = static_cast<const T*>(last == a.T - 1 ? a.grad_read_weights : a.grad_in_read_weights);
  T* handed_on = static_cast<T*>(a.grad_in_read_weights);
  for (int64_t j = gpu::thread(); j < RK; j += gpu::threads()) sample.grads[j] = given ? given[b * RK + j] : T(0);
  gpu::sync();
  for (int64_t t = last; t >= first; --t) {
    if (t >= sample.length) {
      sample.clear(t);
      continue;
    }
    sample.step(t);
    if (alone && sample.begins(t)) {
      through_start<T>(a, t, b, 0, 1);
      gpu::sync();
    }
  }
  for (int64_t j = gpu::thread(); j < RK; j += gpu::threads()) handed_on[b * RK + j] = sample.grads[j];
}

// Of a sample that is more than one block goes through in the time of a launch: between the launches of two steps.
template <class T>
__global__ void __launch_bounds__(most_threads, 4)
    sparse_start_kernel(const __grid_constant__ SparseScanBackward a, int64_t t, int64_t parts) {
  through_start<T>(a, t, gpu::block() / parts, gpu::block() % parts, parts);
}

// ---- launches -----------------------------------------------------------------------------------------------------------

// Numbers from one array to another, or where that is null 0; and 0 to a third, where there is one.
template <class T>
__global__ void __launch_bounds__(most_threads, 4)
    sparse_copy_kernel(const T* __restrict__ from, int64_t count, T* __restrict__ to, T* __restrict__ zeros) {
  const int64_t stride = 4 * most_threads, first = gpu::block() * stride + gpu::thread();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t at = first + i * most_threads;
    if (at >= count) break;
    if (from != to) to[at] = from ? from[at] : T(0);
    if (zeros) zeros[at] = 0;
  }
}
template <class T>
const char* copy(const void* from, int64_t count, void* to, void* zeros, const Queue& queue) {
  if (from == to && zeros == nullptr) return nullptr;
  return gpu::launch(sparse_copy_kernel<T>,
                     {(count + 4 * most_threads - 1) / (4 * most_threads), most_threads, 1, 0, queue.stream},
                     static_cast<const T*>(from), count, static_cast<T*>(to), static_cast<T*>(zeros));
}

template <class T, class Arguments>
Sizes sizes_of(const Arguments& a) {
  return {a.N, static_cast<int>(a.D), static_cast<int>(a.R), static_cast<int>(a.K), a.input, a.eps};
}
template <class T>
Room make_room(const Sizes& n, int64_t B, const Queue& queue) {
  Carver carver(nullptr);
  Arrays<T>(carver, n);
  return make_room(carver, B, queue);
}

template <class T>
const char* read_backward(const SparseReadBackward& a, const Queue& queue) {
  if (const char* why = too_many_rows(a.D, a.R, a.K)) return why;
  const Sizes n = sizes_of<T>(a);
  const Room room = make_room<T>(n, a.B, queue);
  if (const char* why = copy<T>(nullptr, a.B * a.N * a.D, a.grad_memory, nullptr, queue)) return why;
  return gpu::launch(sparse_read_backward_kernel<T>, {a.B, most_threads, 1, room.shared(), queue.stream}, a, n, room);
}

template <class T>
const char* scan_backward(const SparseScanBackward& a, const Queue& queue) {
  if (const char* why = too_many_rows(a.D, a.R, a.K)) return why;
  const Sizes n = sizes_of<T>(a);
  const Room room = make_room<T>(n, a.B, queue);
  if (const char* why = copy<T>(a.grad_memory, a.B * a.N * a.D, a.grad_in_memory, a.grad_start, queue)) return why;
  const auto steps = [&](int64_t first, int64_t last, bool alone) {
    return gpu::launch(sparse_scan_backward_kernel<T>, {a.B, most_threads, 1, room.shared(), queue.stream}, a, n, room, first,
                       last, alone);
  };
  const int64_t parts = sparse_blocks(a.B, a.N, a.D);
  if (parts == 1 || a.sequences.resets == nullptr || a.T == 0) return steps(0, a.T - 1, true);
  for (int64_t t = a.T - 1; t >= 0; --t) {
    if (const char* why = steps(t, t, false)) return why;
    if (const char* why = gpu::launch(sparse_start_kernel<T>, {a.B * parts, most_threads, 1, 0, queue.stream}, a, t, parts))
      return why;
  }
  return nullptr;
}

}  // namespace

const char* sparse_read_backward(const SparseReadBackward& a, const Queue& queue) {
  return a.state == Dtype::float64 ? read_backward<double>(a, queue) : read_backward<float>(a, queue);
}
const char* sparse_scan_backward(const SparseScanBackward& a, const Queue& queue) {
  return a.state == Dtype::float64 ? scan_backward<double>(a, queue) : scan_backward<float>(a, queue);
}

}  // namespace cuda
}  // namespace mann_fast

// CUDA kernels on a processor, for tests: the second half of csrc/cuda/gpu.h. A thread is a fiber; the blocks of a cluster
// are one set of fibers, and clusters run one after the other.
//
// Between two barriers a warp, drawn at random, runs alone as far as it gets, and its lanes take turns in random order at
// every shuffle: so a value read too early or overwritten too early shows for almost every seed. Shared memory is filled with
// NaN before every block. A barrier that some threads of a block never reach, or a shuffle that some lanes do not take part
// in, ends the program with a message. AddressSanitizer is told of every switch; for ThreadSanitizer each thread is a fiber
// of its own that only barriers order, so a missing one is a data race at the line of the kernel. A shuffle orders nothing.
#pragma once
#include <sys/mman.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include "../../csrc/include/half.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define MANN_FAST_SCHEDULER __attribute__((no_sanitize("thread"), noinline))

namespace mann_fast {
namespace gpu {
namespace emulation {

constexpr size_t stack_bytes = 256 * 1024;
constexpr int most_threads = 1024, most_blocks = 16;

// What a test may set: the machine, the order of everything, and which barrier every thread leaves out, counted from the
// start of a kernel: of those of a block or cluster, and of those of a warp.
struct Settings {
  Limits limits{227 * 1024, 8, 16, 132};
  uint64_t seed = 1;
  int omitted_of_block = -1, omitted_of_warp = -1;
};

struct Context {
#if defined(__x86_64__)
  void* stack_pointer;
#else
  ucontext_t machine;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
#endif
#if defined(__SANITIZE_THREAD__)
  void* tsan = nullptr;
#endif
};

enum class Stop { running, lanes, block, cluster, end };

struct Warp {
  uint64_t values[2][warp_size];  // taken in turns, so that a fast lane does not overwrite what a slow one has yet to read
  int order_tag;                  // sync_warp orders memory: ThreadSanitizer's handle for it
};

struct Fiber {
  Context context;
  char* stack = nullptr;
  Stop stop = Stop::end;
  int thread = 0, block = 0;
  unsigned exchanges = 0;
  int met_block = 0, met_warp = 0;  // barriers so far
  bool orders = false;              // the warp-wide stop is sync_warp, not a shuffle
};

struct Machine {
  Settings settings;
  Context scheduler;
  Fiber* fibers = nullptr;  // [blocks of the cluster][threads]
  int fiber_count = 0;
  Warp* warps = nullptr;
  unsigned char* shared[most_blocks] = {};
  size_t shared_bytes = 0;
  int block_tag[most_blocks] = {}, cluster_tag = 0;
  int threads = 0, cluster = 1;
  int64_t first_block = 0;
  Fiber* current = nullptr;
  int most_met_block = 0, most_met_warp = 0;  // in any kernel so far
  const std::function<void()>* kernel = nullptr;
};

inline Machine& machine() {
  static thread_local Machine one;
  return one;
}
inline Settings& settings() { return machine().settings; }

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s\n", what);
  std::abort();
}

MANN_FAST_SCHEDULER inline uint64_t draw(uint64_t below) {
  uint64_t& x = machine().settings.seed;
  x = x * 6364136223846793005u + 1442695040888963407u;
  return (x >> 33) % below;
}

#if defined(__x86_64__)
// Saves what a call must preserve on the stack, and takes up the other stack.
__attribute__((naked, noinline, no_sanitize("thread", "address"))) inline void switch_stacks(void** /*from*/, void* /*to*/) {
  __asm__(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif

MANN_FAST_SCHEDULER inline void switch_to(Context& from, Context& to, const void* bottom, size_t size, bool ends) {
  (void)bottom, (void)size, (void)ends;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake_stack, bottom, size);
#endif
#if defined(__x86_64__)
  switch_stacks(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.machine, &to.machine);
#endif
#if defined(__SANITIZE_ADDRESS__)
  const void* came_from = nullptr;
  size_t came_size = 0;
  __sanitizer_finish_switch_fiber(from.fake_stack, &came_from, &came_size);
  if (&from != &machine().scheduler) machine().scheduler.bottom = came_from, machine().scheduler.size = came_size;
#endif
}

// Back to the scheduler, until it lets this thread go on.
MANN_FAST_SCHEDULER inline void stop_at(Stop stop) {
  Machine& m = machine();
  Fiber* self = m.current;
  self->stop = stop;
#if defined(__SANITIZE_ADDRESS__)
  switch_to(self->context, m.scheduler, m.scheduler.bottom, m.scheduler.size, stop == Stop::end);
#else
  switch_to(self->context, m.scheduler, nullptr, 0, stop == Stop::end);
#endif
}

MANN_FAST_SCHEDULER inline void begin_fiber() {
#if defined(__SANITIZE_ADDRESS__)
  Machine& m = machine();
  __sanitizer_finish_switch_fiber(nullptr, &m.scheduler.bottom, &m.scheduler.size);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&machine().cluster_tag);
#endif
  (*machine().kernel)();
#if defined(__SANITIZE_THREAD__)
  __tsan_release(&machine().cluster_tag);
#endif
  stop_at(Stop::end);
  fail("a thread went on after its end");
}

MANN_FAST_SCHEDULER inline void prepare(Fiber& fiber) {
  if (fiber.stack == nullptr) {
    void* stack = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) fail("no memory for stacks");
    fiber.stack = static_cast<char*>(stack);
#if defined(__SANITIZE_THREAD__)
    fiber.context.tsan = __tsan_create_fiber(0);
#endif
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack, stack_bytes);
  fiber.context.fake_stack = nullptr;
#endif
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(fiber.stack + stack_bytes) - 8;  // leaves the alignment that a call has
  top[6] = reinterpret_cast<void*>(&begin_fiber);
  fiber.context.stack_pointer = top;
#else
  getcontext(&fiber.context.machine);
  fiber.context.machine.uc_stack.ss_sp = fiber.stack;
  fiber.context.machine.uc_stack.ss_size = stack_bytes;
  makecontext(&fiber.context.machine, &begin_fiber, 0);
#endif
  fiber.stop = Stop::running;
  fiber.exchanges = 0;
  fiber.met_block = fiber.met_warp = 0;
}

// Lets the lanes of a warp run to their next barrier or end, in random order at every stop of the warp.
MANN_FAST_SCHEDULER inline void run_warp(Fiber* lanes, int count) {
  Machine& m = machine();
  int order[warp_size];
  for (int i = 0; i < count; ++i) order[i] = i;
  for (;;) {
    for (int i = count - 1; i > 0; --i) {
      const int j = static_cast<int>(draw(static_cast<uint64_t>(i) + 1)), chosen = order[i];
      order[i] = order[j];
      order[j] = chosen;
    }
    int waiting = 0;
    for (int i = 0; i < count; ++i) {
      Fiber& fiber = lanes[order[i]];
      if (fiber.stop == Stop::running) {
        m.current = &fiber;
        switch_to(m.scheduler, fiber.context, fiber.stack, stack_bytes, false);
      }
      waiting += fiber.stop == Stop::lanes;
    }
    if (waiting == 0) return;
    if (waiting != warp_size) fail("divergent shuffle: not all lanes of a warp take part");
    for (int i = 1; i < count; ++i)
      if (lanes[i].orders != lanes[0].orders || lanes[i].exchanges != lanes[0].exchanges)
        fail("divergent shuffle: lanes of a warp are at different ones");
    for (int i = 0; i < count; ++i) lanes[i].stop = Stop::running;
  }
}

// Opens a barrier at which every thread of [lanes, lanes + count) waits; whether it did.
MANN_FAST_SCHEDULER inline bool open_barrier(Fiber* fibers, int count, Stop stop) {
  int waiting = 0, ended = 0, elsewhere = 0;
  for (int i = 0; i < count; ++i) {
    waiting += fibers[i].stop == stop;
    ended += fibers[i].stop == Stop::end;
    elsewhere += fibers[i].stop == (stop == Stop::block ? Stop::cluster : Stop::block);
  }
  if (waiting > 0 && waiting + ended + elsewhere == count && waiting < count && (stop == Stop::block || elsewhere == 0))
    fail("divergent barrier: some threads never reach it");
  if (waiting < count) return false;
  for (int i = 0; i < count; ++i) fibers[i].stop = Stop::running;
  return true;
}

MANN_FAST_SCHEDULER inline void run_cluster() {
  Machine& m = machine();
  const int warps = (m.threads + warp_size - 1) / warp_size * m.cluster, per_block = warps / m.cluster;
  for (;;) {
    int candidates[most_threads / warp_size * most_blocks], count = 0, alive = 0;
    for (int w = 0; w < warps; ++w) {
      Fiber* lanes = m.fibers + w / per_block * m.threads + w % per_block * warp_size;
      if (lanes->stop == Stop::running) candidates[count++] = w;
      alive += lanes->stop != Stop::end;
    }
    if (count > 0) {
      const int w = candidates[draw(static_cast<uint64_t>(count))];
      const int first = w % per_block * warp_size;
      run_warp(m.fibers + w / per_block * m.threads + first, m.threads - first < warp_size ? m.threads - first : warp_size);
    } else if (alive == 0) {
      return;
    } else {
      bool opened = false;
      for (int b = 0; b < m.cluster; ++b) opened |= open_barrier(m.fibers + b * m.threads, m.threads, Stop::block);
      if (!opened && !open_barrier(m.fibers, m.threads * m.cluster, Stop::cluster)) fail("the blocks wait for each other");
    }
  }
}

MANN_FAST_SCHEDULER inline void run(const Launch& how, const std::function<void()>& kernel) {
  Machine& m = machine();
  if (how.threads < 1 || how.threads > most_threads || how.threads % warp_size) fail("threads must be whole warps");
  if (how.cluster < 1 || how.cluster > most_blocks || how.blocks % how.cluster) fail("blocks must be whole clusters");
  if (how.shared > m.settings.limits.shared) fail("more shared memory than the machine has");
  const int count = how.threads * how.cluster;
  if (count > m.fiber_count) {
    m.fibers = static_cast<Fiber*>(std::realloc(static_cast<void*>(m.fibers), sizeof(Fiber) * count));
    m.warps = static_cast<Warp*>(std::realloc(static_cast<void*>(m.warps), sizeof(Warp) * (count / warp_size)));
    for (int i = m.fiber_count; i < count; ++i) new (m.fibers + i) Fiber();
    m.fiber_count = count;
  }
#if defined(__SANITIZE_THREAD__)
  m.scheduler.tsan = __tsan_get_current_fiber();
#endif
  m.threads = how.threads;
  m.shared_bytes = how.shared;
  m.cluster = how.cluster;
  m.kernel = &kernel;
  for (int b = 0; b < how.cluster; ++b) m.shared[b] = static_cast<unsigned char*>(std::malloc(how.shared + 1));
  for (m.first_block = 0; m.first_block < how.blocks; m.first_block += how.cluster) {
    for (int b = 0; b < how.cluster; ++b) std::memset(m.shared[b], 0xff, how.shared);  // NaN in every format
    for (int i = 0; i < count; ++i) {
      prepare(m.fibers[i]);
      m.fibers[i].thread = i % how.threads;
      m.fibers[i].block = i / how.threads;
#if defined(__SANITIZE_THREAD__)
      // What the host did before the launch, and the clusters before this one, come first.
      __tsan_release(&m.cluster_tag);
#endif
    }
    run_cluster();
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(&m.cluster_tag);
#endif
  }
  for (int b = 0; b < how.cluster; ++b) std::free(m.shared[b]);
}

MANN_FAST_SCHEDULER inline void barrier(Stop stop, void* tag) {
  (void)tag;
  Machine& m = machine();
  int& met = stop == Stop::lanes ? m.current->met_warp : m.current->met_block;
  int& most = stop == Stop::lanes ? m.most_met_warp : m.most_met_block;
  const int omitted = stop == Stop::lanes ? m.settings.omitted_of_warp : m.settings.omitted_of_block;
  if (met++ == omitted) return;
  if (met > most) most = met;
#if defined(__SANITIZE_THREAD__)
  __tsan_release(tag);
#endif
  m.current->orders = true;
  stop_at(stop);
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(tag);
#endif
}

MANN_FAST_SCHEDULER inline Warp& own_warp() {
  Machine& m = machine();
  return m.warps[m.current->block * (m.threads / warp_size) + m.current->thread / warp_size];
}

MANN_FAST_SCHEDULER inline const uint64_t* exchange(uint64_t bits) {
  Fiber* self = machine().current;
  uint64_t* values = own_warp().values[self->exchanges++ % 2];
  values[self->thread % warp_size] = bits;
  self->orders = false;
  stop_at(Stop::lanes);
  return values;
}

template <class T>
MANN_FAST_SCHEDULER T exchange_with(T value, int lane) {
  static_assert(sizeof(T) <= 8, "");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(bits)[lane];
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulation

inline MANN_FAST_SCHEDULER int thread() { return emulation::machine().current->thread; }
inline MANN_FAST_SCHEDULER int threads() { return emulation::machine().threads; }
inline MANN_FAST_SCHEDULER int64_t block() { return emulation::machine().first_block + emulation::machine().current->block; }
inline MANN_FAST_SCHEDULER unsigned char* shared_memory() {
  return emulation::machine().shared[emulation::machine().current->block];
}

inline MANN_FAST_SCHEDULER void sync() {
  emulation::barrier(emulation::Stop::block, emulation::machine().block_tag + emulation::machine().current->block);
}
inline MANN_FAST_SCHEDULER void sync_cluster() {
  emulation::barrier(emulation::Stop::cluster, &emulation::machine().cluster_tag);
}
inline MANN_FAST_SCHEDULER void sync_warp() { emulation::barrier(emulation::Stop::lanes, &emulation::own_warp().order_tag); }

template <class T>
T shuffle_xor(T value, int mask) {
  return emulation::exchange_with(value, (thread() % warp_size) ^ mask);
}
template <class T>
T shuffle(T value, int lane) {
  return emulation::exchange_with(value, lane);
}
inline MANN_FAST_SCHEDULER unsigned warp_min(unsigned value) {
  const uint64_t* values = emulation::exchange(value);
  for (int i = 0; i < warp_size; ++i)
    if (values[i] < value) value = static_cast<unsigned>(values[i]);
  return value;
}

inline MANN_FAST_SCHEDULER unsigned warp_sum(unsigned value) {
  const uint64_t* values = emulation::exchange(value);
  unsigned sum = 0;
  for (int i = 0; i < warp_size; ++i) sum += static_cast<unsigned>(values[i]);
  return sum;
}

template <class T>
MANN_FAST_SCHEDULER T* of_block(T* shared, int rank) {
  const auto& m = emulation::machine();
  return reinterpret_cast<T*>(m.shared[rank] + (reinterpret_cast<unsigned char*>(shared) - m.shared[m.current->block]));
}

inline float float_of_half(uint16_t bits) { return from_float16(bits); }
inline uint16_t to_half(float x) { return to_float16(x); }
inline uint16_t to_bfloat16(float x) { return mann_fast::to_bfloat16(x); }

inline float inverse_root(float x) { return 1.0f / std::sqrt(x); }
inline double inverse_root(double x) { return 1.0 / std::sqrt(x); }
inline float reciprocal(float x) { return 1.0f / x; }
inline double reciprocal(double x) { return 1.0 / x; }

inline Limits limits() { return emulation::settings().limits; }

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), const Launch& how, Arguments... arguments) {
  if (how.blocks > 0) emulation::run(how, [&] { kernel(static_cast<Parameters>(arguments)...); });
  return nullptr;
}

template <class Kernel>
int clusters_at_once(Kernel, const Launch& how) {
  return limits().processors / how.cluster;
}

template <class Kernel>
const char* usable(Kernel) {
  return nullptr;
}

}  // namespace gpu
}  // namespace mann_fast

// For tests in Python: blocks of a cluster, warps of a block and bytes of its shared memory in this thread's last launch.
extern "C" __attribute__((visibility("default"), used)) inline void mann_fast_last_launch(int64_t* how) {
  const auto& m = mann_fast::gpu::emulation::machine();
  how[0] = m.cluster, how[1] = m.threads / mann_fast::gpu::warp_size, how[2] = static_cast<int64_t>(m.shared_bytes);
}

// The CUDA thread model on the CPU, for tests on machines without a GPU.
//
// build.py compiles a kernel's .cu with g++ and this header in front, under AddressSanitizer and
// UBSan, and the result runs as an ordinary program. Blocks run one after another; the threads of a
// block are fibers of one OS thread, and a fiber runs until it waits for others. What the hardware
// leaves undefined (a wrong mask, a barrier that some threads never reach) ends the program with a
// message; a launch outside the limits returns the hardware's error code.
//
// A missing __syncthreads is found by its effect: check_schedules() runs a launch in several orders
// and compares the outputs bit by bit. A warp runs from one __syncthreads to the next before
// another warp does, so that ascending and descending order together show every pair of conflicting
// accesses both ways round; so also for the lanes of a warp between two warp collectives, and for
// blocks.
//
// Not seen: a missing __syncwarp where a shuffle or a vote stands in its place (those order no
// memory on hardware),
// __launch_bounds__ below the launched size, waiting in a loop for another thread's store (it
// hangs), and speed.
#pragma once

#include <cstddef>

#ifdef FASTCNN_EMULATED_IN_TORCH
// Loaded into Python, which runs without AddressSanitizer: the driver programs, which launch the
// same kernels, look for accesses out of bounds.
inline void __sanitizer_start_switch_fiber(void**, const void*, std::size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, std::size_t*) {}
#elif defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
// Freed memory is held back 4 MiB long, not 256: no kernel frees any, and each block of threads has
// new shared memory, whose page faults were a third of a run.
extern "C" [[gnu::used]] inline const char* __asan_default_options() {
  return "quarantine_size_mb=4";
}
#else
#error "cuda_emu.h needs -fsanitize=address: without it, an access out of bounds would go unseen"
#endif

// The CUDA headers' own template hands the kernel to the driver as a void*, which the host cannot
// call.
#define cudaLaunchKernelEx cudaLaunchKernelEx_of_the_driver
#include <cuda_runtime.h>
#undef cudaLaunchKernelEx

#include <dlfcn.h>
#include <math.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

namespace cuda_emu {

// The limits of compute capability 9.0 (CUDA Programming Guide, "Compute Capabilities").
constexpr unsigned kMaxBlockThreads = 1024;
constexpr dim3 kMaxBlock{1024, 1024, 64};
constexpr dim3 kMaxGrid{0x7fffffff, 65535, 65535};
constexpr int kDefaultSharedBytes = 48 << 10;  // more needs cudaFuncSetAttribute
constexpr int kMaxSharedBytes = 227 << 10;
constexpr int kMultiprocessors =
    3;  // few and odd: loops over the grid turn several times, and unevenly
constexpr unsigned kLanes = 32;

// Where a thread waits. The place in the source is the identity of a barrier: a return address
// would not do, because the compiler may duplicate the call.
struct Wait {
  const char* name;  // "__syncthreads", "__shfl_xor_sync", ...
  const char* file;
  int line;
  unsigned mask;  // the lanes waited for; not used by __syncthreads

  bool same_as(const Wait& other) const {
    return line == other.line && mask == other.mask && same(name, other.name) &&
           same(file, other.file);
  }
  // A literal has one address in a source file, nearly always.
  static bool same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }
};

struct Context {
  ucontext_t registers;
  jmp_buf place;
  bool fresh;  // never ran
};

struct Thread {
  enum State { kReady, kAtBarrier, kInCollective, kExited };

  State state;
  Wait wait;
  unsigned source;    // the lane whose value a shuffle reads
  uint64_t value;     // what this lane gives to a collective,
  uint64_t received;  // and gets from it
  unsigned ballot;
  Context context;
  void* stack;       // null: never ran
  void* asan_stack;  // AddressSanitizer's record of this stack while another fiber runs
};

struct Emulator {
  Thread threads[kMaxBlockThreads];  // reused by every block: making a fiber costs more than
                                     // running it
  Thread* current;                   // null outside of kernels
  const std::function<void()>* kernel;
  unsigned block_threads;
  uint3 thread_idx, block_idx;
  dim3 block_dim, grid_dim;
  void* shared;
  unsigned schedule;
  std::mt19937 random;
  std::map<const void*, int> max_shared_bytes;  // of each kernel, where cudaFuncSetAttribute set it
  cudaError_t last_error;

  Context scheduler;
  const void* scheduler_stack;
  size_t scheduler_stack_bytes;
  void* scheduler_asan_stack;
};
inline Emulator emulator{};

[[noreturn, gnu::format(printf, 1, 2)]] inline void fail(const char* format, ...) {
  std::fflush(nullptr);
  std::fputs("cuda_emu: ", stderr);
  if (const Thread* thread = emulator.current) {
    const uint3 b = emulator.block_idx;
    const dim3 dim = emulator.block_dim;
    const unsigned i = thread - emulator.threads;
    std::fprintf(stderr, "block (%u,%u,%u) thread (%u,%u,%u): ", b.x, b.y, b.z, i % dim.x,
                 i / dim.x % dim.y, i / dim.x / dim.y);
  }
  va_list args;
  va_start(args, format);
  std::vfprintf(stderr, format, args);
  va_end(args);
  std::fputc('\n', stderr);
  std::_Exit(86);
}

// --- Fibers
// ----------------------------------------------------------------------------------------------------------

constexpr size_t kStackBytes =
    256 << 10;  // kernels need little, but AddressSanitizer prints its report on this stack
constexpr size_t kGuardBytes =
    4 << 10;  // below it: an overflow faults instead of overwriting a neighbour

// Without swapcontext's system calls, for there is no signal mask to keep. AddressSanitizer
// replaces longjmp by a version that clears the red zones of the stack: an array on that stack
// could then be overrun unseen. Call the C library's own; the annotations around the calls are all
// it needs.
inline void swap_context(Context* from, Context* to) {
  using Jump = void (*)(jmp_buf, int);
  static const auto jump =
      reinterpret_cast<Jump>(dlsym(dlopen("libc.so.6", RTLD_LAZY), "_longjmp"));
  if (_setjmp(from->place) != 0) return;
  if (!std::exchange(to->fresh, false)) jump(to->place, 1);
  setcontext(&to->registers);
}

inline void switch_to_scheduler(Thread& thread) {
  __sanitizer_start_switch_fiber(&thread.asan_stack, emulator.scheduler_stack,
                                 emulator.scheduler_stack_bytes);
  swap_context(&thread.context, &emulator.scheduler);
  __sanitizer_finish_switch_fiber(thread.asan_stack, nullptr, nullptr);
}

inline void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, &emulator.scheduler_stack,
                                  &emulator.scheduler_stack_bytes);
  for (;;) {  // one turn a block
    Thread& thread = *emulator.current;
    (*emulator.kernel)();
    thread.state = Thread::kExited;
    switch_to_scheduler(thread);
  }
}

inline void make_fiber(Thread& thread) {
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0)
    fail("no memory for a thread's stack");
  thread.stack = static_cast<char*>(memory) + kGuardBytes;
  ucontext_t& registers = thread.context.registers;
  getcontext(&registers);
  registers.uc_stack.ss_sp = thread.stack;
  registers.uc_stack.ss_size = kStackBytes;
  makecontext(&registers, fiber_main, 0);
  thread.context.fresh = true;
}

inline void resume(Thread& thread) {
  if (!thread.stack) make_fiber(thread);
  const unsigned i = &thread - emulator.threads;
  const dim3 dim = emulator.block_dim;
  emulator.thread_idx = {i % dim.x, i / dim.x % dim.y, i / dim.x / dim.y};
  emulator.current = &thread;
  __sanitizer_start_switch_fiber(&emulator.scheduler_asan_stack, thread.stack, kStackBytes);
  swap_context(&emulator.scheduler, &thread.context);
  __sanitizer_finish_switch_fiber(emulator.scheduler_asan_stack, nullptr, nullptr);
  emulator.current = nullptr;
}

// --- The scheduler
// ---------------------------------------------------------------------------------------------------

// The order of blocks, of warps and of lanes. 0: ascending, 1: descending, others: shuffled, anew
// at every barrier.
inline void set_schedule(unsigned schedule) {
  emulator.schedule = schedule;
  emulator.random.seed(schedule);
}

inline std::vector<size_t> next_order(size_t count) {
  std::vector<size_t> order(count);
  std::iota(order.begin(), order.end(), size_t{0});
  if (emulator.schedule == 1) std::reverse(order.begin(), order.end());
  if (emulator.schedule > 1) std::shuffle(order.begin(), order.end(), emulator.random);
  return order;
}

inline bool names(unsigned mask, unsigned lane) { return mask >> lane & 1; }

struct Warp {
  Thread* threads;
  unsigned lanes;  // kLanes, or fewer in the last warp of a block

  // Runs the lanes until each has exited or waits at __syncthreads. Nothing outside the warp can
  // complete a collective of its lanes, so a lane still waiting in one at the end would wait
  // forever.
  void run() {
    do {
      for (size_t lane : next_order(lanes))
        if (threads[lane].state == Thread::kReady) resume(threads[lane]);
    } while (complete_collectives());
    for (unsigned lane = 0; lane < lanes; ++lane)
      if (threads[lane].state == Thread::kInCollective) fail_stuck(threads[lane]);
  }

 private:
  // The first lane named in the thread's mask that is not there with it; kLanes: all have come.
  unsigned missing_lane(const Thread& thread) const {
    for (unsigned lane = 0; lane < kLanes; ++lane)
      if (names(thread.wait.mask, lane) &&
          (lane >= lanes || threads[lane].state != Thread::kInCollective ||
           !threads[lane].wait.same_as(thread.wait)))
        return lane;
    return kLanes;
  }

  bool complete_collectives() {
    bool completed = false;
    for (unsigned first = 0; first < lanes; ++first) {
      const Thread& thread = threads[first];
      if (thread.state != Thread::kInCollective || missing_lane(thread) != kLanes) continue;
      const unsigned mask = thread.wait.mask;
      unsigned ballot = 0;
      for (unsigned lane = 0; lane < lanes; ++lane)
        if (names(mask, lane) && threads[lane].value) ballot |= 1u << lane;
      for (unsigned lane = 0; lane < lanes; ++lane) {
        if (!names(mask, lane)) continue;
        threads[lane].received = threads[threads[lane].source].value;
        threads[lane].ballot = ballot;
        threads[lane].state = Thread::kReady;
      }
      completed = true;
    }
    return completed;
  }

  [[noreturn]] void fail_stuck(Thread& thread) {
    emulator.current = &thread;
    const Wait& at = thread.wait;
    const unsigned lane = missing_lane(thread);
    if (lane >= lanes)
      fail("%s mask 0x%08x names lane %u, which the block does not have (%s:%d)", at.name, at.mask,
           lane, at.file, at.line);
    if (threads[lane].state == Thread::kExited)
      fail("%s mask 0x%08x names lane %u, which has exited (%s:%d)", at.name, at.mask, lane,
           at.file, at.line);
    const Wait& other = threads[lane].wait;
    fail(
        "deadlock: %s mask 0x%08x (%s:%d) waits for lane %u, which waits at %s mask 0x%08x (%s:%d)",
        at.name, at.mask, at.file, at.line, lane, other.name, other.mask, other.file, other.line);
  }
};

inline void run_block() {
  Thread* const threads = emulator.threads;
  const unsigned count = emulator.block_threads;
  for (unsigned i = 0; i < count; ++i) threads[i].state = Thread::kReady;
  for (;;) {
    for (size_t warp : next_order((count + kLanes - 1) / kLanes)) {
      const unsigned begin = warp * kLanes;
      Warp{threads + begin, std::min(kLanes, count - begin)}.run();
    }
    const Thread* first = nullptr;  // an exited thread no longer counts for __syncthreads
    for (unsigned i = 0; i < count; ++i) {
      if (threads[i].state == Thread::kExited) continue;
      if (!first) first = &threads[i];
      if (!threads[i].wait.same_as(first->wait)) {
        emulator.current = &threads[i];
        fail("waits at __syncthreads (%s:%d), but others of its block at another one (%s:%d)",
             threads[i].wait.file, threads[i].wait.line, first->wait.file, first->wait.line);
      }
      threads[i].state = Thread::kReady;
    }
    if (!first) return;
  }
}

// --- What a running thread asks for
// ----------------------------------------------------------------------------------

inline void wait(Thread::State state, const Wait& where) {
  Thread& thread = *emulator.current;
  thread.wait = where;
  thread.state = state;
  switch_to_scheduler(thread);
}

inline unsigned lane_index() { return (emulator.current - emulator.threads) % kLanes; }

inline const Thread& collective(const Wait& where, uint64_t value, unsigned source) {
  Thread& thread = *emulator.current;
  const unsigned lane = lane_index();
  if (!names(where.mask, lane))
    fail("%s mask 0x%08x does not name the calling lane %u (%s:%d)", where.name, where.mask, lane,
         where.file, where.line);
  if (source >= kLanes || !names(where.mask, source))
    fail("%s mask 0x%08x does not name lane %u, whose value is read (%s:%d)", where.name,
         where.mask, source, where.file, where.line);
  thread.value = value;
  thread.source = source;
  wait(Thread::kInCollective, where);
  return thread;
}

template <class T>
T shuffle(const Wait& where, T value, unsigned source) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                "CUDA shuffles 4 or 8 byte numbers");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = collective(where, bits, source).received;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline unsigned vote(const Wait& where, int predicate) {
  return collective(where, predicate != 0, lane_index()).ballot;
}

inline void* shared_memory() {
  if (!emulator.shared)
    fail("the kernel uses shared memory, but was launched with dynamicSmemBytes = 0");
  return emulator.shared;
}

// --- Launches
// --------------------------------------------------------------------------------------------------------

inline cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) emulator.last_error = error;
  return error;
}

inline bool fits(const dim3& dim, const dim3& limit) {
  return dim.x - 1 < limit.x && dim.y - 1 < limit.y &&
         dim.z - 1 < limit.z;  // 0 wraps around and does not fit
}

// Where CUDA_EMU_LAUNCHED names a file, each launch adds a line: the kernel's place in its library,
// whose symbols know its name.
inline void note_launch(const void* kernel) {
  const char* name = std::getenv("CUDA_EMU_LAUNCHED");
  Dl_info library;
  if (name == nullptr || dladdr(kernel, &library) == 0) return;
  FILE* file = std::fopen(name, "a");
  if (file == nullptr) fail("cannot write %s", name);
  const auto* base = static_cast<const char*>(library.dli_fbase);
  std::fprintf(file, "%tx\n", static_cast<const char*>(kernel) - base);
  std::fclose(file);
}

inline cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                          const std::function<void()>& body) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttributeID id = config.attrs[i].id;
    if (id != cudaLaunchAttributePriority && id != cudaLaunchAttributeAccessPolicyWindow)
      fail(
          "launch attribute %d is not emulated (clusters and cooperative launches change what a "
          "kernel means)",
          id);
  }
  const dim3 block = config.blockDim, grid = config.gridDim;
  if (!fits(block, kMaxBlock) || !fits(grid, kMaxGrid) ||
      size_t{block.x} * block.y * block.z > kMaxBlockThreads)
    return result(cudaErrorInvalidConfiguration);
  const auto opt_in = emulator.max_shared_bytes.find(kernel);
  const size_t shared_limit =
      opt_in == emulator.max_shared_bytes.end() ? kDefaultSharedBytes : opt_in->second;
  if (config.dynamicSmemBytes > shared_limit) return result(cudaErrorInvalidValue);
  note_launch(kernel);

  emulator.kernel = &body;
  emulator.block_dim = block;
  emulator.grid_dim = grid;
  emulator.block_threads = block.x * block.y * block.z;
  for (size_t i : next_order(size_t{grid.x} * grid.y * grid.z)) {
    emulator.block_idx = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y),
                          unsigned(i / grid.x / grid.y)};
    // New memory for each block, of exactly the size asked for, and poisoned: 0xff bytes are NaN in
    // every float format.
    const auto shared = std::make_unique<unsigned char[]>(config.dynamicSmemBytes);
    std::fill_n(shared.get(), config.dynamicSmemBytes, 0xff);
    emulator.shared = config.dynamicSmemBytes ? shared.get() : nullptr;
    run_block();
  }
  return cudaSuccess;
}

// --- For drivers
// -----------------------------------------------------------------------------------------------------

struct Output {
  const char* name;
  void* data;
  size_t bytes;
};

// Calls run() under four schedules and fails unless the outputs are the same bits each time. Before
// each call they are filled with a byte of that schedule, so whatever run() updates in place it
// must itself set at its beginning.
template <class Run>
void check_schedules(const std::vector<Output>& outputs, Run run) {
  std::vector<std::vector<unsigned char>> expected;
  for (unsigned schedule = 0; schedule < 4; ++schedule) {
    set_schedule(schedule);
    for (const Output& out : outputs)
      std::fill_n(static_cast<unsigned char*>(out.data), out.bytes, 0xff - schedule);
    run();
    for (size_t i = 0; i < outputs.size(); ++i) {
      const Output& out = outputs[i];
      const auto* bytes = static_cast<const unsigned char*>(out.data);
      if (schedule == 0) expected.emplace_back(bytes, bytes + out.bytes);
      const size_t at = std::mismatch(bytes, bytes + out.bytes, expected[i].begin()).first - bytes;
      if (at == out.bytes) continue;
      if (bytes[at] == 0xff - schedule && expected[i][at] == 0xff)
        fail("byte %zu of %zu of %s was never written", at, out.bytes, out.name);
      fail(
          "byte %zu of %zu of %s is 0x%02x under schedule 0 and 0x%02x under schedule %u: the "
          "result depends on the "
          "order of the threads (a barrier is missing, or blocks depend on one another)",
          at, out.bytes, out.name, expected[i][at], bytes[at], schedule);
    }
  }
  set_schedule(0);
}

}  // namespace cuda_emu

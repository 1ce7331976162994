// The CUDA that the kernels in csrc/ use, on the CPU: the threads of a block are fibers, resumed in a random order and
// switched only where CUDA lets threads meet. A barrier that is missing shows as wrong numbers, one that not all threads
// reach ends the process, and a sanitizer sees every access. Blocks run one after the other.
#pragma once

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace shim {

enum State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state;
  dim3 thread;
  unsigned long long slot;  // what it shows its warp
  static constexpr size_t kStack = 1 << 16;
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline ucontext_t scheduler;
inline std::function<void()> kernel;
inline dim3 block_index, block_size, grid_size;
inline Fiber* running;
inline int running_number;
inline std::mt19937 order{1};

inline void wait(State state) {
  running->state = state;
  swapcontext(&running->context, &scheduler);
}

inline void start() {
  kernel();
  wait(kDone);
}

// Frees the warps, or the block, of which every living thread waits. False where nobody can go on.
inline bool release(int count) {
  bool freed = false;
  int living = 0, at_barrier = 0;
  for (int warp = 0; warp < count; warp += 32) {
    int alive = 0, waiting = 0;
    const int end = warp + 32 < count ? warp + 32 : count;
    for (int i = warp; i < end; ++i) {
      alive += fibers[i]->state != kDone;
      waiting += fibers[i]->state == kAtWarpBarrier;
      at_barrier += fibers[i]->state == kAtBlockBarrier;
    }
    living += alive;
    if (!waiting || waiting != alive) continue;
    freed = true;
    for (int i = warp; i < end; ++i)
      if (fibers[i]->state == kAtWarpBarrier) fibers[i]->state = kReady;
  }
  if (!living) return false;
  if (!freed && at_barrier == living) {
    freed = true;
    for (int i = 0; i < count; ++i)
      if (fibers[i]->state == kAtBlockBarrier) fibers[i]->state = kReady;
  }
  if (!freed) {
    std::fprintf(stderr, "shim: a barrier that not all threads reach (%d of %d are there)\n", at_barrier, living);
    std::abort();
  }
  return true;
}

inline void run_block() {
  const int count = static_cast<int>(block_size.x);
  while (static_cast<int>(fibers.size()) < count) fibers.push_back(std::make_unique<Fiber>());
  std::vector<int> turns(count);
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = *fibers[i];
    fiber.state = kReady, fiber.thread = dim3(i), turns[i] = i;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = Fiber::kStack;
    makecontext(&fiber.context, start, 0);
  }
  do {
    std::shuffle(turns.begin(), turns.end(), order);
    for (int i : turns) {
      if (fibers[i]->state != kReady) continue;
      running = fibers[i].get(), running_number = i;
      swapcontext(&scheduler, &running->context);
    }
  } while (release(count));
}

template <class F>
void launch(dim3 grid, dim3 block, F&& body) {
  kernel = body, grid_size = grid, block_size = block;
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      block_index = dim3(x, y);
      run_block();
    }
}

inline int lane() { return running_number % 32; }

template <class T>
T exchange(T mine, int from) {
  static_assert(sizeof(T) <= sizeof(Fiber::slot), "one slot a thread");
  std::memcpy(&running->slot, &mine, sizeof(T));
  wait(kAtWarpBarrier);
  const size_t source = running_number / 32 * 32 + from;
  if (from >= 0 && from < 32 && source < block_size.x) std::memcpy(&mine, &fibers[source]->slot, sizeof(T));
  wait(kAtWarpBarrier);
  return mine;
}

}  // namespace shim

#define threadIdx (shim::running->thread)
#define blockIdx (shim::block_index)
#define blockDim (shim::block_size)
#define gridDim (shim::grid_size)
#define RLHF_LAUNCH(kernel, grid, block, stream, ...) \
  shim::launch(dim3(grid), dim3(block), [=] { (void)stream, kernel(__VA_ARGS__); })
#define RLHF_LAST_ERROR() 0

inline void __syncthreads() { shim::wait(shim::kAtBlockBarrier); }
inline void __syncwarp(unsigned = ~0u) { shim::wait(shim::kAtWarpBarrier); }
inline void __threadfence() {}
template <class T> T __shfl_sync(unsigned, T x, int from) { return shim::exchange(x, from & 31); }
template <class T> T __shfl_xor_sync(unsigned, T x, int flip) { return shim::exchange(x, shim::lane() ^ flip); }
template <class T> T __shfl_up_sync(unsigned, T x, int by) { return shim::exchange(x, shim::lane() - by); }
inline unsigned __ballot_sync(unsigned, bool vote) {
  unsigned all = 0;
  for (int i = 0; i < 32; ++i) all |= static_cast<unsigned>(shim::exchange(vote, i)) << i;
  return all;
}
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
template <class T> T atomicAdd(T* at, T x) { const T before = *at; *at += x; return before; }
template <class T> T __ldcg(const T* at) { return *at; }

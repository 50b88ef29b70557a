// The threads of a CUDA block as fibers of one thread: a barrier costs nanoseconds where one among threads of the
// system costs a fraction of a millisecond, and a lane runs from barrier to barrier in an order that is the same on
// every run. To the sanitizers each fiber is a thread of its own: ThreadSanitizer is told of every switch, that it
// orders nothing, and of every barrier, so that only what a kernel orders is ordered.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

// For what switches between fibers or keeps the harness's own books: no access of the kernel's, and no frame to check.
#define HARNESS_FN __attribute__((noinline, no_sanitize("thread", "address", "undefined")))

namespace vvae {
namespace cuda {
namespace host {

constexpr int kMostLanes = 512, kLanesOfWarp = 32, kMain = kMostLanes;
constexpr size_t kStack = 256 * 1024, kMostPublished = 256;  // bytes a lane

// What happens before what, as ThreadSanitizer sees it: an acquirer comes after all who released before.
struct Order {
  char address;
#if defined(__SANITIZE_THREAD__)
  void release() { __tsan_release(&address); }
  void acquire() { __tsan_acquire(&address); }
#else
  void release() {}
  void acquire() {}
#endif
};

struct Barrier {
  int count, arrived, generation;
  size_t operation;  // of the lanes that have arrived
  Order order[2];  // in turn: who is quick to the next barrier has not come before who is slow to leave this one
  int waiting[kMostLanes];
};

// A lane's values to its warp: written to one half while neighbours still read the other, so that an exchange takes one
// barrier of the warp.
struct Exchange {
  alignas(16) char values[2][kLanesOfWarp * kMostPublished];
};

inline const char* kernel_name = "";

// For what cannot be unwound: a fiber never returns.
[[noreturn]] inline void stop(const char* why) {
  fprintf(stderr, "%s: %s\n", kernel_name, why);
  _exit(3);
}

class Block {
 public:
  // Runs body(argument) on every lane, which start in the given order; returns when all are done.
  HARNESS_FN void run(int64_t index, int64_t blocks, const int* order, int lanes, void (*body)(void*),
                      void* argument) {
    index_ = index, blocks_ = blocks, lanes_ = lanes, done_ = 0, body_ = body, argument_ = argument;
    if (!fibers_[kMain].made) make(kMain);
    reset(all_, lanes);
    for (int w = 0; w < lanes / kLanesOfWarp; ++w) reset(warp_[w], kLanesOfWarp);
    for (int i = 0; i < lanes; ++i) {
      if (!fibers_[i].made) make(i);
      fibers_[i].exchanges = 0;
      ready_[i] = order[i];
    }
    first_ready_ = 0, num_ready_ = lanes;
    begin_.release();
    leave();
    end_.acquire();
  }

  HARNESS_FN int lane() const { return current_; }
  HARNESS_FN int lanes() const { return lanes_; }
  HARNESS_FN int64_t index() const { return index_; }
  HARNESS_FN int64_t blocks() const { return blocks_; }

  HARNESS_FN void wait_for_all() { wait(all_, 0); }
  HARNESS_FN void wait_for_warp() { wait(warp_[current_ / kLanesOfWarp], 0); }

  // What the lanes of the warp publish side by side. As on a GPU this orders none of their other reads and writes.
  HARNESS_FN const void* publish(const void* values, size_t bytes) {
    const int warp = current_ / kLanesOfWarp;
    char* all = exchange_[warp].values[fibers_[current_].exchanges++ % 2];
    for (size_t i = 0; i < bytes; ++i)
      all[size_t(current_ % kLanesOfWarp) * bytes + i] = static_cast<const char*>(values)[i];
    wait(warp_[warp], bytes);
    return all;
  }

 private:
  struct Fiber {
    void* jump[5];  // __builtin_setjmp's
    ucontext_t start;
    void* of_sanitizer;
    bool made, started;
    int64_t exchanges;
  };

  HARNESS_FN void make(int lane) {
    Fiber& fiber = fibers_[lane];
    fiber.made = true;
    if (lane == kMain) fiber.started = true;
#if defined(__SANITIZE_THREAD__)
    fiber.of_sanitizer = lane == kMain ? __tsan_get_current_fiber() : __tsan_create_fiber(0);
#endif
    if (lane == kMain) return;
    void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) stop("no memory for a lane's stack");
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = stack;
    fiber.start.uc_stack.ss_size = kStack;
    makecontext(&fiber.start, live, 0);
  }

  __attribute__((no_sanitize("thread", "address", "undefined"))) static void live();

  HARNESS_FN static void jump(Fiber& to) {
    if (to.started) __builtin_longjmp(to.jump, 1);
    to.started = true;
    setcontext(&to.start);
    stop("setcontext failed");
  }

  HARNESS_FN void resume(int lane) {
    Fiber &from = fibers_[current_], &to = fibers_[lane];
    current_ = lane;
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(to.of_sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
    if (__builtin_setjmp(from.jump) == 0) jump(to);
  }

  // To the next lane that can go on.
  HARNESS_FN void leave() {
    if (num_ready_ == 0) {
      if (done_ < lanes_) stop("some lanes wait at a barrier that others never reach");
      return resume(kMain);
    }
    const int next = ready_[first_ready_];
    first_ready_ = (first_ready_ + 1) % kMostLanes;
    --num_ready_;
    if (next != current_) resume(next);
  }

  // An operation is the bytes that each lane publishes, or 0: lanes that meet in different ones have gone apart.
  HARNESS_FN void wait(Barrier& barrier, size_t operation) {
    if (barrier.arrived == 0) barrier.operation = operation;
    if (barrier.operation != operation) stop("the lanes of a warp meet in different operations");
    Order& order = barrier.order[barrier.generation % 2];
    if (operation == 0) order.release();
    if (barrier.arrived == barrier.count - 1) {
      for (int i = 0; i < barrier.arrived; ++i) ready_[(first_ready_ + num_ready_++) % kMostLanes] = barrier.waiting[i];
      barrier.arrived = 0;
      ++barrier.generation;
    } else {
      barrier.waiting[barrier.arrived++] = current_;
      leave();
    }
    if (operation == 0) order.acquire();
  }

  HARNESS_FN static void reset(Barrier& barrier, int count) {
    barrier.count = count;
    barrier.arrived = 0;
  }

  // They last over blocks and launches: a lane's stack is never another fiber's.
  Fiber fibers_[kMostLanes + 1] = {};
  Barrier all_ = {}, warp_[kMostLanes / kLanesOfWarp] = {};
  Exchange exchange_[kMostLanes / kLanesOfWarp];
  Order begin_ = {}, end_ = {};
  int current_ = kMain, lanes_ = 0, done_ = 0;
  int ready_[kMostLanes], first_ready_ = 0, num_ready_ = 0;  // a ring
  int64_t index_ = 0, blocks_ = 0;
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
};

inline Block block;

inline void Block::live() {
  for (;;) {
    block.begin_.acquire();
    block.body_(block.argument_);
    block.end_.release();
    ++block.done_;
    block.leave();
  }
}

}  // namespace host
}  // namespace cuda
}  // namespace vvae

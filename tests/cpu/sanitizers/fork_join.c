/* What ThreadSanitizer cannot see by itself: PyTorch runs its parallel regions on GNU's OpenMP, whose threads begin and
 * end a region by atomics and futexes inside a library that is not instrumented. Preloaded, this takes PyTorch's calls
 * and says what OpenMP promises: what the caller wrote before a region happens before all of the region, and all of the
 * region before what the caller does next. It says nothing of two threads inside a region, which is what races are. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

typedef void (*Body)(void *);
typedef void (*Parallel)(Body, void *, unsigned, unsigned);

/* ThreadSanitizer's own. */
void __tsan_acquire(void *);
void __tsan_release(void *);

struct Region {
  Body body;
  void *data;
  char fork, join; /* their addresses name the two events */
};

static void on_each_thread(void *at) {
  struct Region *region = at;
  __tsan_acquire(&region->fork);
  region->body(region->data);
  __tsan_release(&region->join);
}

static Parallel next;

void GOMP_parallel(Body body, void *data, unsigned threads, unsigned flags) {
  struct Region region = {body, data, 0, 0};
  Parallel parallel = __atomic_load_n(&next, __ATOMIC_RELAXED);
  if (!parallel) {
    parallel = (Parallel)dlsym(RTLD_NEXT, "GOMP_parallel");
    if (!parallel) {
      fputs("fork_join: no OpenMP library behind this one\n", stderr);
      abort();
    }
    __atomic_store_n(&next, parallel, __ATOMIC_RELAXED);
  }
  __tsan_release(&region.fork);
  parallel(on_each_thread, &region, threads, flags);
  __tsan_acquire(&region.join);
}

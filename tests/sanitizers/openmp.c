// Tells ThreadSanitizer what it can't see in GCC's OpenMP runtime, which is built without it: that
// a parallel region begins after all that came before it and ends before all that follows. Loaded
// before that runtime (scripts/sanitize.sh).
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sanitizer/tsan_interface.h>

typedef void Body(void*);
typedef void Parallel(Body*, void*, unsigned, unsigned);

typedef struct {
  Body* body;
  void* data;
} Region;

static void run(void* argument) {
  Region* region = argument;
  __tsan_acquire(region);
  region->body(region->data);
  __tsan_release(region);
}

void GOMP_parallel(Body* body, void* data, unsigned threads, unsigned flags) {
  Region region = {body, data};
  __tsan_release(&region);
  ((Parallel*)dlsym(RTLD_NEXT, "GOMP_parallel"))(run, &region, threads, flags);
  __tsan_acquire(&region);
}

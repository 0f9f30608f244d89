// Threads to run tasks on: torch's own, or the system's where those can't be had.
#pragma once

#include <ATen/Parallel.h>
#ifdef __APPLE__
#include <dispatch/dispatch.h>
#endif

#include "routing.h"

namespace capsule {

// work(thread) on at most n threads, each with a number of its own below n.
template <typename Work>
void on_threads(index n, Work work) {
#ifdef __APPLE__
  // Torch's threads are those of OpenMP, which Apple's compiler does not know.
  if (n > 1) {
    const auto call = [](void* work, size_t thread) { (*static_cast<Work*>(work))(index(thread)); };
    dispatch_apply_f(size_t(n), DISPATCH_APPLY_AUTO, &work, call);
  } else if (n == 1) {
    work(0);
  }
#else
  at::parallel_for(0, n, 1, [&](index, index) { work(at::get_thread_num()); });
#endif
}

}  // namespace capsule

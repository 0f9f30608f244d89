// Which thread runs which task. Knows nothing of torch, nor where threads come from, so that
// ThreadSanitizer can watch it on threads of its own (tests/sanitizers/threads.cpp).
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "routing.h"

namespace capsule {

// Tasks that are left of a thread's, alone in its cache line.
struct alignas(64) Share {
  std::atomic<index> next{0};
  index end = 0;
};

// body(task, thread) for every task, on at most so many threads. A thread begins with its own share
// of the tasks, whose capsules are in its caches from sweep to sweep, and goes on with what is left
// of the others': a slow core delays no one, and results do not depend on who runs what.
//
// `on_threads(n, work)` calls work(thread) on n threads, 0 <= thread < n, and returns when all are
// done. It may do with fewer of them.
template <typename Body, typename OnThreads>
void run_tasks(index tasks, index threads, Body body, OnThreads on_threads) {
  const index shares = std::min(tasks, threads);
  std::vector<Share> all(shares);
  for (index x = 0; x < shares; ++x) {
    all[x].next = x * tasks / shares;
    all[x].end = (x + 1) * tasks / shares;
  }
  on_threads(shares, [&](index thread) {
    for (index x = 0; x < shares; ++x) {
      Share& share = all[(thread + x) % shares];
      // Relaxed: tasks have nothing to tell each other, and where two touch the same memory, no
      // order made here hides it from ThreadSanitizer.
      auto next = [&] { return share.next.fetch_add(1, std::memory_order_relaxed); };
      for (index task; (task = next()) < share.end;) body(task, thread);
    }
  });
}

}  // namespace capsule

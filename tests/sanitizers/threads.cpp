// The CPU kernels and their scheduler (tasks.h) on threads that ThreadSanitizer sees: std::thread
// in place of torch's pool, whose OpenMP runtime is not instrumented. Every instruction set, both
// lane layouts, several callers at once that share their inputs; each result must have the bits
// that one thread computes.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <deque>
#include <optional>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/cpu/dispatch.h"
#include "../../csrc/cpu/driver.h"
#include "../../csrc/cpu/tasks.h"
#include "../../csrc/cpu/windows.h"

namespace capsule {
namespace {

struct Shape {
  index B, I, J, K, D, R, weight_sharing;
  // Of a grid that a window slides over: B, H, W, C, then the window's kh, kw, rows and columns of
  // a step.
  index grid[8] = {};
};

// Few samples and many, whole vectors and rests, weights of one capsule and of several (whose
// gradients are split over tasks), the paper's K and D and others, windows that overlap.
const Shape kShapes[] = {
    {1, 40, 5, 8, 16, 3, 1},
    {3, 24, 10, 6, 8, 2, 1},
    {5, 33, 3, 8, 16, 1, 1},
    {40, 48, 10, 8, 16, 3, 1},
    {130, 17, 4, 3, 7, 2, 1},
    {19, 64, 3, 8, 16, 3, 32},
    {2, 48, 3, 4, 5, 3, 24},
    {2, 66, 5, 8, 16, 3, 1, {1, 4, 2, 11, 3, 2, 1, 1}},
    {48, 18, 4, 8, 16, 3, 1, {4, 6, 7, 3, 3, 2, 1, 2}},
};

constexpr index kThreadCounts[] = {2, 3, 8};
constexpr int kCallers = 3;

// Counted without an order between threads, which could hide a race.
std::atomic<index> tasks_run{0}, tasks_taken_over{0};

struct Parallel {
  template <typename Body>
  void operator()(index tasks, index threads, Body body) const {
    const index shares = std::min(tasks, threads);
    auto counted = [&](index task, index thread) {
      const bool own = thread * tasks / shares <= task && task < (thread + 1) * tasks / shares;
      tasks_run.fetch_add(1, std::memory_order_relaxed);
      tasks_taken_over.fetch_add(!own, std::memory_order_relaxed);
      body(task, thread);
    };
    run_tasks(tasks, threads, counted, [](index n, auto work) {
      std::vector<std::thread> pool;
      for (index thread = 1; thread < n; ++thread) pool.emplace_back(work, thread);
      work(0);
      for (std::thread& thread : pool) thread.join();
    });
  }
};

template <typename T>
std::vector<T> random_values(std::mt19937& generator, index count) {
  std::normal_distribution<T> normal;
  std::vector<T> values(count);
  for (T& x : values) x = normal(generator);
  return values;
}

index size_of_u(const Shape& x) {
  const auto& g = x.grid;
  return (g[0] ? g[0] * g[1] * g[2] * g[3] : x.B * x.I) * x.K;
}

template <typename T>
struct Inputs {
  Shape shape;
  std::vector<T> u, weight, logits, bias, grad_v;

  Inputs(const Shape& x, std::mt19937& generator)
      : shape(x),
        u(random_values<T>(generator, size_of_u(x))),
        weight(random_values<T>(generator, x.I / x.weight_sharing * x.J * x.D * x.K)),
        logits(random_values<T>(generator, x.I * x.J)),
        bias(random_values<T>(generator, x.J * x.D)),
        grad_v(random_values<T>(generator, x.B * x.J * x.D)) {}
};

// Outputs and every gradient, one after another.
template <typename T>
std::vector<T> call(const Inputs<T>& x, bool full, index threads) {
  const auto [B, I, J, K, D, R, weight_sharing, g] = x.shape;
  Problem<T> problem{
      B, I, J, K, D, R, weight_sharing, true, x.u.data(), x.weight.data(), x.logits.data()};
  std::optional<Windows> windows;
  if (g[0]) windows.emplace(g[0], g[1], g[2], g[3], K, g[4], g[5], g[6], g[7]).apply_to(problem);
  std::deque<std::vector<T>> workspaces;
  auto allocate = [&](index count) { return workspaces.emplace_back(count).data(); };
  const index N = J * D,
              sizes[] = {R * B * N, B * N, B * I * J, index(x.u.size()), index(x.weight.size()),
                         I * J,     N};
  index total = 0;
  for (index size : sizes) total += size;
  std::vector<T> results(total);
  T* at[std::size(sizes)];
  total = 0;
  for (size_t n = 0; n < std::size(sizes); ++n) {
    at[n] = results.data() + total;
    total += sizes[n];
  }
  Driver<T, Parallel, decltype(allocate)> driver(problem, kernels<T>(B), threads, Parallel(),
                                                 allocate);
  driver.forward(x.bias.data(), at[0], at[1], at[2]);
  driver.backward(x.grad_v.data(), at[0], full, at[3], at[4], at[5], at[6]);
  return results;
}

// How many calls on several threads, and whether each had the bits of the call on one.
template <typename T>
index check(const Shape& shape, std::mt19937& generator, std::atomic<bool>& equal) {
  const Inputs<T> inputs(shape, generator);
  index calls = 0;
  for (bool full : {true, false}) {
    const std::vector<T> expected = call(inputs, full, 1);
    for (index threads : kThreadCounts) {
      std::vector<std::thread> callers;
      for (int caller = 0; caller < kCallers; ++caller)
        callers.emplace_back([&] {
          const std::vector<T> found = call(inputs, full, threads);
          if (std::memcmp(found.data(), expected.data(), found.size() * sizeof(T))) equal = false;
        });
      for (std::thread& caller : callers) caller.join();
      calls += kCallers;
    }
  }
  return calls;
}

// The process's exit status: bits must be equal, and some tasks taken from another's share.
int check_all() {
  std::mt19937 generator(0);
  std::atomic<bool> equal{true};
  bool taken_over = true;
  for (const std::string& name : usable_instruction_sets()) {
    set_instruction_set(name);
    tasks_run = tasks_taken_over = 0;
    index calls = 0;
    for (const Shape& shape : kShapes)
      calls += check<float>(shape, generator, equal) + check<double>(shape, generator, equal);
    std::printf(
        "threads of the CPU kernels, %s: %lld calls, %lld tasks, %lld of another's share, %s\n",
        name.c_str(), static_cast<long long>(calls), static_cast<long long>(tasks_run),
        static_cast<long long>(tasks_taken_over),
        equal ? "bits equal to one thread's" : "BITS DIFFER from one thread's");
    taken_over = taken_over && tasks_taken_over > 0;
  }
  return equal && taken_over ? 0 : 1;
}

}  // namespace
}  // namespace capsule

int main() { return capsule::check_all(); }

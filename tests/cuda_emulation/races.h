// Finds data races of emulated kernels: two accesses to the same bytes, one of them a write, that
// nothing orders, whatever the schedule was.
//
// g++ tells of each access (-fsanitize=thread, whose run-time library this stands in for), the
// execution model of what orders them. Every thread knows how far each other thread was when it
// last heard of it, by way of a barrier or of arrivals; of the collectives of a warp only
// `__syncwarp` orders memory. An access is remembered with its thread and the time there. A later
// one races with it if its thread does not know of that time.
//
// Copies of whole arrays and products of warpgroups reach memory by another way, the asynchronous
// proxy: what a thread wrote by instructions comes before them only if it has called `publish`
// since.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

namespace capsule_kernels::cuda::emulation {

enum class Proxy : std::uint32_t { kGeneric, kAsynchronous };

// Of each thread of a launch, the latest time that is known, and of its last `publish`.
struct Knowledge {
  std::vector<std::uint32_t> time, published;

  void add(const Knowledge& other);
};

struct Access {
  std::uint32_t thread : 31, proxy : 1;
  std::uint32_t time;  // 0: none
  const void* where;   // in the code that made it
};

struct Race {
  bool found = false;
  Access before;
  bool wrote;  // the one before
};

class Races {
 public:
  // What threads know of each other takes the square of their number: launches of more are not
  // watched.
  static constexpr std::size_t kMostThreads = 2048;

  explicit Races(std::size_t threads);

  // Adds what a thread knows and did until now, for those who will learn it.
  void tell(std::size_t thread, Knowledge& told);
  void learn(std::size_t thread, const Knowledge& told);
  void publish(std::size_t thread);

  // An access of a thread to `bytes` from `at` on, and whether it races with another.
  Race access(std::size_t thread, const void* at, std::size_t bytes, bool writes, Proxy proxy,
              const void* where);

 private:
  // Two bytes, the smallest scalar: the last write, and some of the reads since.
  struct Cell {
    Access write, reads[2];
  };
  static constexpr std::size_t kCellBytes = 2, kPageBytes = 1024;
  using Page = std::array<Cell, kPageBytes / kCellBytes>;

  Page& page(std::uintptr_t number);

  std::vector<Knowledge> known_;  // of each thread; empty: not watched
  std::unordered_map<std::uintptr_t, std::unique_ptr<Page>> pages_;
  std::pair<std::uintptr_t, Page*> recent_[64] = {};  // of these, found faster
  unsigned replaced_ = 0;
};

}  // namespace capsule_kernels::cuda::emulation

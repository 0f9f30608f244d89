#include "execution_model.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "emulation.h"
#include "races.h"

namespace capsule_kernels::cuda::emulation {

Dim thread_index, block_index, block_size, grid_size;
void* block_shared_memory;

namespace {

constexpr int kWarp = 32;
constexpr std::size_t kStackBytes = 128 * 1024;
constexpr std::size_t kFenceBytes = 256;
constexpr unsigned char kPoison = 0xff;  // NaN in every floating-point type

struct Copy {
  void* to;
  const void* from;  // null: zeros
  int bytes, group;
  bool arrives = false;  // whoever waits for arrivals may have it before its thread waits for it
};

struct Fiber {
  jmp_buf env;
  ucontext_t start;
  bool started = false, waits = false, done = false;
  // A counter that it waits for, to reach this much.
  const unsigned* counter = nullptr;
  unsigned expected = 0;
  std::vector<Copy> copies;
  int groups = 0;  // of copies that were ended
  std::vector<Product> products;
  int product_groups = 0;  // that were ended
};

// Of threads that wait for each other, again and again: how many have come, and what they know.
struct Meeting {
  int arrived = 0;
  unsigned turn = 0;
  Knowledge told[2];  // of this turn and the next, which some may begin before others have heard

  Knowledge& of_this_turn() { return told[turn % 2]; }
};

struct Warp {
  Fiber lanes[kWarp];
  Operands operands;
  Meeting meeting;
  Collective collective;
  unsigned priority = 0;
  bool singled_out = false;
};

struct Block {
  std::vector<unsigned char> shared;
  Meeting meeting;
};

// Of a thread, once a copy is there, or (`whole.to` is null) its copies of the groups before
// `groups`.
struct Arrival {
  Fiber* fiber;
  int groups;
  Copy whole;
  Arrivals* at;
  Knowledge told;  // what is known by whoever has waited for it
};

bool is_ready(const Fiber& f) {
  return !f.waits && !f.done && (f.counter == nullptr || *f.counter >= f.expected);
}

enum class Schedule { kRandom, kBlockAhead, kBlockBehind, kWarpBehind };

// The lane's part of a product, by products of its warp.
void multiply(const Product& product) {
  const int lane = int(thread_index.x) % kWarp, warp = int(thread_index.x) / kWarp % 4;
  const int g = lane / 4, q = lane % 4;
  const auto element = [&](const Matrix& matrix, int row, int half) {
    unsigned bits;
    std::memcpy(&bits, matrix.at + half * matrix.to_half + row * 4 + q, 4);
    return bits;
  };
  for (int n = 0; n < product.fragments; ++n) {
    float (&c)[4] = product.c[n];
    if (!product.adds) std::fill(c, c + 4, 0.0f);
    unsigned a[4];
    for (int e = 0; e < 4; ++e) {
      a[e] = product.rows != nullptr ? product.rows[e]
                                     : element(product.a, 16 * warp + g + e % 2 * 8, e / 2);
    }
    mma_tf32(c, a, {element(product.b, 8 * n + g, 0), element(product.b, 8 * n + g, 1)});
  }
}

std::mt19937 random_engine;
bool products_are_late = false;
Schedule schedule = Schedule::kRandom;
std::string call;  // "forward" or "backward"
std::string skipped_barrier;
std::vector<std::string> barriers_seen;

// Stacks are kept between launches.
char* stack_of(std::size_t fiber) {
  static std::vector<char*> stacks;
  while (stacks.size() <= fiber) {
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::runtime_error("no memory for the stack of a thread");
    stacks.push_back(static_cast<char*>(stack));
  }
  return stacks[fiber];
}

class Launch {
 public:
  static Launch* running;

  Launch(const std::function<void()>& kernel, int blocks, int threads, int shared_bytes)
      : kernel_(kernel),
        threads_(threads),
        blocks_(blocks),
        warps_(blocks * threads / kWarp),
        races_(std::size_t(blocks) * threads) {
    if (threads % kWarp != 0 || blocks < 1) throw std::runtime_error("a launch of broken warps");
    for (Block& block : blocks_) block.shared.assign(shared_bytes + kFenceBytes, kPoison);
    const std::size_t warps_per_block = threads / kWarp;
    const std::size_t block = random_engine() % blocks,
                      of_block = random_engine() % warps_per_block;
    for (std::size_t w = 0; w < warps_.size(); ++w) {
      const bool singled_out = schedule == Schedule::kWarpBehind ? w % warps_per_block == of_block
                                                                 : w / warps_per_block == block;
      warps_[w].singled_out = schedule != Schedule::kRandom && singled_out;
      warps_[w].priority = random_engine();
    }
    block_size = {unsigned(threads)};
    grid_size = {unsigned(blocks)};
  }

  // Whether a warp goes on before another.
  static bool precedes(const Warp& warp, const Warp& other) {
    if (warp.singled_out != other.singled_out) {
      return warp.singled_out == (schedule == Schedule::kBlockAhead);
    }
    return warp.priority > other.priority;
  }

  ~Launch() { running = nullptr; }

  void run() {
    running = this;
    std::size_t alive = warps_.size() * kWarp;
    while (alive > 0) {
      Warp* chosen = nullptr;
      for (Warp& warp : warps_) {
        const bool ready = std::any_of(std::begin(warp.lanes), std::end(warp.lanes), is_ready);
        if (ready && (chosen == nullptr || precedes(warp, *chosen))) chosen = &warp;
      }
      if (chosen == nullptr) {
        if (arrivals_.empty())
          throw std::runtime_error("deadlock: every thread waits at a barrier");
        for (const Arrival& arrival : std::exchange(arrivals_, {})) complete(arrival);
        continue;
      }
      if (random_engine() % 32 == 0) chosen->priority = random_engine();
      const int first = int(random_engine() % kWarp);
      for (int n = 0; n < kWarp; ++n) {
        Fiber& fiber = chosen->lanes[(first + n) % kWarp];
        if (!is_ready(fiber)) continue;
        fiber.counter = nullptr;
        resume(*chosen, (first + n) % kWarp);
        if (!failure_.empty()) throw std::runtime_error(failure_);
        if (fiber.done) --alive;
      }
    }
    for (const Block& block : blocks_) {
      const auto fence = block.shared.end() - kFenceBytes;
      if (!std::all_of(fence, block.shared.end(), [](unsigned char c) { return c == kPoison; })) {
        throw std::runtime_error("a write past the end of shared memory");
      }
    }
  }

  void join(Collective collective, float* operands, int count, void (*act)(Operands)) {
    Warp& warp = *warp_;
    Meeting& meeting = warp.meeting;
    if (meeting.arrived > 0 && warp.collective != collective) {
      fail("the lanes of a warp stand at different collectives");
    }
    const int lane = lane_;
    warp.collective = collective;
    std::copy(operands, operands + count, warp.operands[lane]);
    Knowledge& told = meeting.of_this_turn();
    if (collective == Collective::kWarpBarrier) races_.tell(thread(), told);
    if (++meeting.arrived == kWarp) {
      meeting.arrived = 0;
      ++meeting.turn;
      is_watched_ = false;
      if (act != nullptr) act(warp.operands);
      is_watched_ = true;
      for (Fiber& fiber : warp.lanes) fiber.waits = false;
    } else {
      warp.lanes[lane].waits = true;
      leave();
    }
    if (collective == Collective::kWarpBarrier) races_.learn(thread(), told);
    std::copy(warp.operands[lane], warp.operands[lane] + count, operands);
  }

  void block_barrier() {
    if (warp_->meeting.arrived > 0) fail("the lanes of a warp stand at different collectives");
    Meeting& meeting = blocks_[block()].meeting;
    Knowledge& told = meeting.of_this_turn();
    races_.tell(thread(), told);
    if (++meeting.arrived == threads_) {
      meeting.arrived = 0;
      ++meeting.turn;
      const auto first = warps_.begin() + block() * threads_ / kWarp;
      for (auto warp = first; warp < first + threads_ / kWarp; ++warp) {
        for (Fiber& fiber : warp->lanes) fiber.waits = false;
      }
    } else {
      fiber().waits = true;
      leave();
    }
    races_.learn(thread(), told);
  }

  // Once in a launch; in two halves.
  void grid_arrive() {
    races_.tell(thread(), told_[{&arrived_, 0}]);
    ++arrived_;
  }
  void grid_wait() {
    wait_for(&arrived_, unsigned(warps_.size() * kWarp));
    races_.learn(thread(), told_[{&arrived_, 0}]);
  }

  void counted_barrier(unsigned* arrived, unsigned expected, bool waits, const void* where) {
    if (waits) block_barrier();
    if (thread_index.x == 0) {
      if (waits) races_.tell(thread(), told_[{arrived, expected}]);
      ++*arrived;
    }
    if (!waits) return;
    if (thread_index.x == 0) {
      touch(arrived, sizeof *arrived, false, Proxy::kGeneric, where);  // somebody has set it to 0
      wait_for(arrived, expected);
      races_.learn(thread(), told_[{arrived, expected}]);
    }
    block_barrier();
  }

  // Counts on chip: who starts them, and who uses them.
  void start(Arrivals* at, int count, const void* where) {
    touch(at, sizeof(Arrivals), true, Proxy::kGeneric, where);
    *at = {0, unsigned(count)};
  }
  void arrive(Arrivals* at, const void* where) {
    touch(at, sizeof(Arrivals), false, Proxy::kGeneric, where);
    races_.tell(thread(), told_of(at));
    ++at->arrived;
  }
  void wait_for_arrivals(const Arrivals* at, int use, const void* where) {
    touch(at, sizeof(Arrivals), false, Proxy::kGeneric, where);
    wait_for(&at->arrived, (use + 1) * at->count);
    races_.learn(thread(), told_[{at, unsigned(use)}]);
  }

  // At once, or when nobody can go on without.
  void arrive_after_copies(Arrivals* at) {
    for (Copy& copy : fiber().copies) copy.arrives = true;
    arrive({&fiber(), ++fiber().groups, {}, at, {}});
  }
  void arrive_after_copy(Arrivals* at, const Copy& copy) { arrive({&fiber(), 0, copy, at, {}}); }

  void arrive(Arrival arrival) {
    races_.tell(thread(), arrival.told);
    if (random_engine() % 2 == 0) {
      complete(arrival);
    } else {
      arrivals_.push_back(arrival);
    }
  }

  // Makes the copies of the groups before `groups`.
  static void complete_copies(Fiber& fiber, int groups) {
    std::vector<Copy> left;
    for (const Copy& copy : fiber.copies) {
      if (copy.group >= groups) {
        left.push_back(copy);
      } else if (copy.from != nullptr) {
        std::memcpy(copy.to, copy.from, copy.bytes);
      } else {
        std::memset(copy.to, 0, copy.bytes);
      }
    }
    fiber.copies = std::move(left);
  }

  void publish() { races_.publish(thread()); }

  // A copy reads and writes from when it is begun until it is waited for.
  void touch(const Copy& copy, Proxy proxy, const void* where) {
    if (copy.from != nullptr) touch(copy.from, copy.bytes, false, proxy, where);
    touch(copy.to, copy.bytes, true, proxy, where);
  }

  // So does a product. A warp is one where it begins and awaits them: its first lane stands for it.
  void touch(const Product& product, const void* where) {
    if (lane_ != 0) return;
    const auto rows = [&](const Matrix& matrix, int first, int count) {
      for (int half = 0; half < 2; ++half) {
        touch(matrix.at + half * matrix.to_half + first * 4, count * 16, false,
              Proxy::kAsynchronous, where);
      }
    };
    if (product.rows == nullptr) rows(product.a, int(thread_index.x) / kWarp % 4 * 16, 16);
    rows(product.b, 0, 8 * product.fragments);
  }

  // An access of the thread that runs, past its own stack.
  void touch(const void* at, std::size_t bytes, bool writes, Proxy proxy, const void* where) {
    const auto on_stack = static_cast<const char*>(at) - stack_;
    if (!is_watched_ || (on_stack >= 0 && on_stack < std::ptrdiff_t(kStackBytes))) return;
    const Race race = races_.access(thread(), at, bytes, writes, proxy, where);
    if (!race.found) return;
    const auto described = [&](bool writes, std::size_t thread, const void* where) {
      Dl_info library;
      dladdr(where, &library);
      char place[32];
      std::snprintf(place, sizeof place, "%#zx",
                    std::size_t(static_cast<const char*>(where) -
                                static_cast<const char*>(library.dli_fbase)));
      return std::string(writes ? "a write" : "a read") + " by thread " +
             std::to_string(thread % threads_) + " of block " + std::to_string(thread / threads_) +
             " at " + place;
    };
    fail("a data race: " + described(writes, thread(), where) + ", and " +
         described(race.wrote, race.before.thread, race.before.where));
  }

  // Does the products of the groups before `groups`, with the other lanes of the warp.
  static void complete_products(Fiber& fiber, int groups) {
    std::vector<Product> done;
    for (const Product& product : fiber.products) {
      if (product.group < groups) done.push_back(product);
    }
    fiber.products.erase(fiber.products.begin(), fiber.products.begin() + done.size());
    for (const Product& product : done) multiply(product);
  }

  Fiber& fiber() { return warp_->lanes[lane_]; }

  [[noreturn]] void fail(const std::string& message) {
    failure_ = message;
    _longjmp(scheduler_, 1);
  }

  void wait_for(const unsigned* counter, unsigned expected) {
    fiber().counter = counter;
    fiber().expected = expected;
    if (!is_ready(fiber())) leave();
    fiber().counter = nullptr;
  }

 private:
  std::size_t block() const { return (warp_ - warps_.data()) / (threads_ / kWarp); }

  // What the next arrival tells.
  Knowledge& told_of(const Arrivals* at) { return told_[{at, at->arrived / at->count}]; }

  std::size_t thread() const { return (warp_ - warps_.data()) * kWarp + lane_; }

  void complete(const Arrival& arrival) {
    if (const Copy& whole = arrival.whole; whole.to != nullptr) {
      std::memcpy(whole.to, whole.from, whole.bytes);
    } else {
      complete_copies(*arrival.fiber, arrival.groups);
    }
    told_of(arrival.at).add(arrival.told);
    ++arrival.at->arrived;
  }

  void resume(Warp& warp, int lane) {
    const std::size_t index = &warp - warps_.data();
    const std::size_t block = index / (threads_ / kWarp);
    warp_ = &warp;
    lane_ = lane;
    stack_ = stack_of(thread());
    thread_index = {unsigned(index % (threads_ / kWarp) * kWarp + lane)};
    block_index = {unsigned(block)};
    block_shared_memory = blocks_[block].shared.data();
    Fiber& fiber = warp.lanes[lane];
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.started) _longjmp(fiber.env, 1);
    fiber.started = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = stack_;
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, &Launch::enter, 0);
    setcontext(&fiber.start);
  }

  void leave() {
    Fiber& fiber = warp_->lanes[lane_];
    if (_setjmp(fiber.env) == 0) _longjmp(scheduler_, 1);
  }

  static void enter() {
    running->kernel_();
    running->warp_->lanes[running->lane_].done = true;
    _longjmp(running->scheduler_, 1);
  }

  const std::function<void()>& kernel_;
  int threads_;
  std::vector<Block> blocks_;
  std::vector<Warp> warps_;
  std::vector<Arrival> arrivals_;  // that are late
  Races races_;
  // What those tell who count in a place, up to a number or in a use.
  std::map<std::pair<const void*, unsigned>, Knowledge> told_;
  bool is_watched_ = true;
  unsigned arrived_ = 0;
  Warp* warp_ = nullptr;
  int lane_ = 0;
  char* stack_ = nullptr;
  jmp_buf scheduler_;
  std::string failure_;
};

Launch* Launch::running = nullptr;

// Whether the barrier that stands here is left out; remembers that it was reached.
bool skipped(const char* file, int line) {
  const std::string path = file;
  const std::string site =
      path.substr(path.rfind('/') + 1) + ":" + std::to_string(line) + ":" + call;
  if (std::find(barriers_seen.begin(), barriers_seen.end(), site) == barriers_seen.end()) {
    barriers_seen.push_back(site);
  }
  return site == skipped_barrier;
}

}  // namespace

void configure(unsigned seed, const std::string& skip) {
  random_engine.seed(seed);
  schedule = Schedule(seed % 4);
  products_are_late = seed / 4 % 2 == 0;
  skipped_barrier = skip;
  barriers_seen.clear();
}

void begin_call(const std::string& name) { call = name; }

std::string barriers() {
  std::string all;
  for (const std::string& site : barriers_seen) all += site + "\n";
  return all;
}

void run(const std::function<void()>& kernel, int blocks, int threads, int shared_bytes) {
  Launch(kernel, blocks, threads, shared_bytes).run();
}

void join(Collective collective, float* operands, int count, void (*act)(Operands)) {
  Launch::running->join(collective, operands, count, act);
}

}  // namespace capsule_kernels::cuda::emulation

namespace capsule_kernels::cuda {

namespace emulation {

void begin_copy(void* shared, const void* global, int bytes, bool is_there) {
  Launch& launch = *Launch::running;
  const auto misaligned = [&](const void* x) { return std::uintptr_t(x) % bytes != 0; };
  if (misaligned(shared) || misaligned(global)) launch.fail("a copy that is not aligned");
  const Copy copy = {shared, is_there ? global : nullptr, bytes, launch.fiber().groups};
  launch.touch(copy, Proxy::kGeneric, __builtin_return_address(0));
  launch.fiber().copies.push_back(copy);
}

// Makes the copies of all but the last `groups` groups, and of none that is not ended.
void wait_for_copies_before(int groups) {
  Fiber& fiber = Launch::running->fiber();
  for (const Copy& copy : fiber.copies) {
    if (!copy.arrives && copy.group < fiber.groups - groups) {
      Launch::running->touch(copy, Proxy::kGeneric, __builtin_return_address(0));
    }
  }
  Launch::complete_copies(fiber, fiber.groups - groups);
}

void begin_product(const Product& product) {
  Launch& launch = *Launch::running;
  launch.touch(product, __builtin_return_address(0));
  if (products_are_late) {
    launch.fiber().products.push_back(product);
    launch.fiber().products.back().group = launch.fiber().product_groups;
  } else {
    multiply(product);
  }
}

void wait_for_products_before(int groups) {
  Fiber& fiber = Launch::running->fiber();
  for (const Product& product : fiber.products) {
    if (product.group < fiber.product_groups - groups) {
      Launch::running->touch(product, __builtin_return_address(0));
    }
  }
  Launch::complete_products(fiber, fiber.product_groups - groups);
}

}  // namespace emulation

void end_group_of_products() { ++emulation::Launch::running->fiber().product_groups; }

void end_group_of_copies() { ++emulation::Launch::running->fiber().groups; }

GridArrival grid_arrive(const char* file, int line) {
  if (!emulation::skipped(file, line)) emulation::Launch::running->grid_arrive();
  return 0;
}

void grid_wait(GridArrival, const char* file, int line) {
  if (!emulation::skipped(file, line)) emulation::Launch::running->grid_wait();
}

void counted_barrier(unsigned* arrived, unsigned expected, const char* file, int line) {
  // Left out, the count goes on, as later barriers expect it, but nobody waits.
  const bool waits = !emulation::skipped(file, line);
  emulation::Launch::running->counted_barrier(arrived, expected, waits,
                                              __builtin_return_address(0));
}

void publish(const char* file, int line) {
  if (!emulation::skipped(file, line)) emulation::Launch::running->publish();
}

void Arrivals::start(int expected) {
  emulation::Launch::running->start(this, expected, __builtin_return_address(0));
}

void Arrivals::arrive() { emulation::Launch::running->arrive(this, __builtin_return_address(0)); }

void Arrivals::arrive_after_copies() { emulation::Launch::running->arrive_after_copies(this); }

void Arrivals::arrive_after_copy(void* shared, const void* global, int bytes) {
  emulation::Launch& launch = *emulation::Launch::running;
  const auto misaligned = [&](const void* x) { return std::uintptr_t(x) % 16 != 0; };
  if (misaligned(shared) || misaligned(global) || bytes % 16 != 0) {
    launch.fail("a copy that is not aligned");
  }
  const emulation::Copy copy = {shared, global, bytes, 0};
  launch.touch(copy, emulation::Proxy::kAsynchronous, __builtin_return_address(0));
  launch.touch(this, sizeof *this, false, emulation::Proxy::kAsynchronous,
               __builtin_return_address(0));
  launch.arrive_after_copy(this, copy);
}

void Arrivals::wait(int use, const char* file, int line) const {
  if (emulation::skipped(file, line)) return;
  emulation::Launch::running->wait_for_arrivals(this, use, __builtin_return_address(0));
}

}  // namespace capsule_kernels::cuda

using capsule_kernels::cuda::emulation::Launch;

void __syncthreads(const char* file, int line) {
  if (!capsule_kernels::cuda::emulation::skipped(file, line)) Launch::running->block_barrier();
}

void __syncwarp(const char* file, int line) {
  if (capsule_kernels::cuda::emulation::skipped(file, line)) return;
  float none[1];
  Launch::running->join(capsule_kernels::cuda::emulation::Collective::kWarpBarrier, none, 0,
                        nullptr);
}

// What g++ calls for every access of the kernels.
namespace {
void touch(const void* at, std::size_t bytes, bool writes, const void* where) {
  const auto proxy = capsule_kernels::cuda::emulation::Proxy::kGeneric;
  if (Launch::running != nullptr) Launch::running->touch(at, bytes, writes, proxy, where);
}
}  // namespace

extern "C" {
#define CAPSULE_KERNELS_ACCESS(name, bytes, writes)        \
  void __tsan_##name##bytes(const void* at) {              \
    touch(at, bytes, writes, __builtin_return_address(0)); \
  }
#define CAPSULE_KERNELS_ACCESSES(bytes)                \
  CAPSULE_KERNELS_ACCESS(read, bytes, false)           \
  CAPSULE_KERNELS_ACCESS(write, bytes, true)           \
  CAPSULE_KERNELS_ACCESS(unaligned_read, bytes, false) \
  CAPSULE_KERNELS_ACCESS(unaligned_write, bytes, true)
CAPSULE_KERNELS_ACCESSES(1)
CAPSULE_KERNELS_ACCESSES(2)
CAPSULE_KERNELS_ACCESSES(4)
CAPSULE_KERNELS_ACCESSES(8)
CAPSULE_KERNELS_ACCESSES(16)
void __tsan_read_range(const void* at, std::size_t bytes) {
  touch(at, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(const void* at, std::size_t bytes) {
  touch(at, bytes, true, __builtin_return_address(0));
}
void __tsan_init() {}
}

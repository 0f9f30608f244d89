#include "execution_model.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "emulation.h"

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
};

struct Fiber {
  jmp_buf env;
  ucontext_t start;
  bool started = false, waits = false, done = false;
  int arrivals = 0;  // at its cluster's barrier
  std::vector<Copy> copies;
  int groups = 0;  // of copies that were ended
};

struct Warp {
  Fiber lanes[kWarp];
  Operands operands;
  int arrived = 0;
  Collective collective;
  unsigned priority = 0;
};

struct Block {
  std::vector<unsigned char> shared;
  int arrived = 0;
};

struct Cluster {
  int arrived = 0;  // threads, at a barrier that is not complete
  int complete = 0;
  std::vector<Fiber*> waiting;
};

std::mt19937 random_engine;
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

  Launch(const std::function<void()>& kernel, int blocks, int threads, int shared_bytes,
         int cluster)
      : kernel_(kernel),
        threads_(threads),
        cluster_(cluster),
        blocks_(blocks),
        clusters_(blocks / cluster),
        warps_(blocks * threads / kWarp) {
    if (threads % kWarp != 0 || blocks < 1) throw std::runtime_error("a launch of broken warps");
    if (blocks % cluster != 0) throw std::runtime_error("a launch of broken clusters");
    for (Block& block : blocks_) block.shared.assign(shared_bytes + kFenceBytes, kPoison);
    for (Warp& warp : warps_) warp.priority = random_engine();
    block_size = {unsigned(threads)};
    grid_size = {unsigned(blocks)};
  }

  void run() {
    running = this;
    std::size_t alive = warps_.size() * kWarp;
    while (alive > 0) {
      Warp* chosen = nullptr;
      for (Warp& warp : warps_) {
        const bool ready = std::any_of(std::begin(warp.lanes), std::end(warp.lanes),
                                       [](const Fiber& f) { return !f.waits && !f.done; });
        if (ready && (chosen == nullptr || warp.priority > chosen->priority)) chosen = &warp;
      }
      if (chosen == nullptr) throw std::runtime_error("deadlock: every thread waits at a barrier");
      if (random_engine() % 32 == 0) chosen->priority = random_engine();
      const int first = int(random_engine() % kWarp);
      for (int n = 0; n < kWarp; ++n) {
        Fiber& fiber = chosen->lanes[(first + n) % kWarp];
        if (fiber.waits || fiber.done) continue;
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
    if (warp.arrived > 0 && warp.collective != collective) {
      fail("the lanes of a warp stand at different collectives");
    }
    const int lane = lane_;
    warp.collective = collective;
    std::copy(operands, operands + count, warp.operands[lane]);
    if (++warp.arrived == kWarp) {
      warp.arrived = 0;
      if (act != nullptr) act(warp.operands);
      for (Fiber& fiber : warp.lanes) fiber.waits = false;
      warp.lanes[lane].waits = false;
    } else {
      warp.lanes[lane].waits = true;
      leave();
    }
    std::copy(warp.operands[lane], warp.operands[lane] + count, operands);
  }

  void block_barrier() {
    wait(blocks_[block()].arrived, threads_, block() * threads_ / kWarp, threads_ / kWarp);
  }

  void grid_barrier() { wait(arrived_, int(warps_.size()) * kWarp, 0, warps_.size()); }

  // A thread may do other things between arriving and waiting, but not arrive again.
  void cluster_arrive() {
    Cluster& cluster = clusters_[block() / cluster_];
    if (fiber().arrivals++ > cluster.complete)
      fail("a thread arrives twice at a cluster's barrier");
    if (++cluster.arrived < threads_ * cluster_) return;
    cluster.arrived = 0;
    ++cluster.complete;
    for (Fiber* waiting : std::exchange(cluster.waiting, {})) waiting->waits = false;
  }

  void cluster_wait() {
    Cluster& cluster = clusters_[block() / cluster_];
    if (fiber().arrivals <= cluster.complete) return;
    cluster.waiting.push_back(&fiber());
    fiber().waits = true;
    leave();
  }

  const void* at_block(const void* shared, int rank) {
    const std::size_t own = block();
    const auto offset = static_cast<const unsigned char*>(shared) - blocks_[own].shared.data();
    const std::size_t other = own / cluster_ * cluster_ + rank;
    // Its shared memory lasts as long as it does.
    if (warps_[other * threads_ / kWarp].lanes[0].done) fail("a block read after its end");
    return blocks_[other].shared.data() + offset;
  }

  Fiber& fiber() { return warp_->lanes[lane_]; }

  [[noreturn]] void fail(const std::string& message) {
    failure_ = message;
    _longjmp(scheduler_, 1);
  }

 private:
  std::size_t block() const { return (warp_ - warps_.data()) / (threads_ / kWarp); }

  void wait(int& arrived, int expected, std::size_t first_warp, std::size_t count) {
    if (warp_->arrived > 0) fail("the lanes of a warp stand at different collectives");
    if (++arrived == expected) {
      arrived = 0;
      for (std::size_t w = first_warp; w < first_warp + count; ++w) {
        for (Fiber& fiber : warps_[w].lanes) fiber.waits = false;
      }
      return;
    }
    warp_->lanes[lane_].waits = true;
    leave();
  }

  void resume(Warp& warp, int lane) {
    const std::size_t index = &warp - warps_.data();
    const std::size_t block = index / (threads_ / kWarp);
    warp_ = &warp;
    lane_ = lane;
    thread_index = {unsigned(index % (threads_ / kWarp) * kWarp + lane)};
    block_index = {unsigned(block)};
    block_shared_memory = blocks_[block].shared.data();
    Fiber& fiber = warp.lanes[lane];
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.started) _longjmp(fiber.env, 1);
    fiber.started = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = stack_of(index * kWarp + lane);
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
  int threads_, cluster_;
  std::vector<Block> blocks_;
  std::vector<Cluster> clusters_;
  std::vector<Warp> warps_;
  int arrived_ = 0;
  Warp* warp_ = nullptr;
  int lane_ = 0;
  jmp_buf scheduler_;
  std::string failure_;
};

Launch* Launch::running = nullptr;

// Whether the barrier that stands here is left out; remembers that it was reached.
bool skipped(const char* file, int line) {
  const std::string path = file;
  const std::string site = path.substr(path.rfind('/') + 1) + ":" + std::to_string(line);
  if (std::find(barriers_seen.begin(), barriers_seen.end(), site) == barriers_seen.end()) {
    barriers_seen.push_back(site);
  }
  return site == skipped_barrier;
}

}  // namespace

void configure(unsigned seed, const std::string& skip) {
  random_engine.seed(seed);
  skipped_barrier = skip;
}

std::string barriers() {
  std::string all;
  for (const std::string& site : barriers_seen) all += site + "\n";
  return all;
}

void run(const std::function<void()>& kernel, int blocks, int threads, int shared_bytes,
         int cluster) {
  Launch(kernel, blocks, threads, shared_bytes, cluster).run();
}

const void* at_block(const void* shared, int rank) {
  return Launch::running->at_block(shared, rank);
}

void join(Collective collective, float* operands, int count, void (*act)(Operands)) {
  Launch::running->join(collective, operands, count, act);
}

float from_float16(std::uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  float x;
  if (exponent == 31) {
    x = mantissa != 0 ? NAN : INFINITY;
  } else if (exponent == 0) {
    x = std::ldexp(float(mantissa), -24);
  } else {
    x = std::ldexp(float(1024 + mantissa), exponent - 25);
  }
  return bits >> 15 != 0 ? -x : x;
}

std::uint16_t to_float16(float x) {
  const std::uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return 0x7fff;
  // The spacing of float16 values near x; nearbyint rounds to the nearest, ties to even.
  const float size = std::fabs(x);
  const int exponent = size >= std::ldexp(1.0f, -14) ? std::ilogb(size) : -14;
  const float units = std::isinf(x) ? INFINITY : std::nearbyint(std::ldexp(size, 10 - exponent));
  const float rounded = std::ldexp(units, exponent - 10);
  if (rounded >= 65520.0f) return sign | 0x7c00;
  if (rounded < std::ldexp(1.0f, -14)) return sign | std::uint16_t(std::ldexp(rounded, 24));
  const int e = std::ilogb(rounded);
  return sign | std::uint16_t((e + 15) << 10 | (int(std::ldexp(rounded, 10 - e)) - 1024));
}

}  // namespace capsule_kernels::cuda::emulation

namespace capsule_kernels::cuda {

void mma_tf32(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  float operands[10];
  std::copy(c, c + 4, operands);
  std::memcpy(operands + 4, a, 16);
  std::memcpy(operands + 8, b, 8);
  emulation::join(emulation::Collective::kMma, operands, 10, [](emulation::Operands all) {
    // As the hardware: the low 13 bits are dropped, the sum is cut off (not rounded) to float32.
    const auto tf32 = [](float x) {
      unsigned bits;
      std::memcpy(&bits, &x, 4);
      bits &= 0xffffe000u;
      std::memcpy(&x, &bits, 4);
      return double(x);
    };
    double A[16][8], B[8][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, q = lane % 4;
      for (int n = 0; n < 4; ++n) A[g + n % 2 * 8][q + n / 2 * 4] = tf32(all[lane][4 + n]);
      for (int n = 0; n < 2; ++n) B[q + n * 4][g] = tf32(all[lane][8 + n]);
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int n = 0; n < 4; ++n) {
        const int row = lane / 4 + n / 2 * 8, column = lane % 4 * 2 + n % 2;
        double sum = all[lane][n];
        for (int k = 0; k < 8; ++k) sum += A[row][k] * B[k][column];
        float cut = float(sum);
        if (std::fabs(double(cut)) > std::fabs(sum)) cut = std::nextafter(cut, 0.0f);
        all[lane][n] = cut;
      }
    }
  });
  std::copy(operands, operands + 4, c);
}

namespace emulation {

void begin_copy(void* shared, const void* global, int bytes, bool is_there) {
  Launch& launch = *Launch::running;
  const auto misaligned = [&](const void* x) { return std::uintptr_t(x) % bytes != 0; };
  if (misaligned(shared) || misaligned(global)) launch.fail("a copy that is not aligned");
  launch.fiber().copies.push_back(
      {shared, is_there ? global : nullptr, bytes, launch.fiber().groups});
}

// Makes the copies of all but the last `groups` groups, and of none that is not ended.
void wait_for_copies_before(int groups) {
  Fiber& fiber = Launch::running->fiber();
  std::vector<Copy> left;
  for (const Copy& copy : fiber.copies) {
    if (copy.group < fiber.groups - groups) {
      if (copy.from != nullptr) {
        std::memcpy(copy.to, copy.from, copy.bytes);
      } else {
        std::memset(copy.to, 0, copy.bytes);
      }
    } else {
      left.push_back(copy);
    }
  }
  fiber.copies = std::move(left);
}

}  // namespace emulation

void end_group_of_copies() { ++emulation::Launch::running->fiber().groups; }

void wait_for_copies() {
  end_group_of_copies();
  emulation::wait_for_copies_before(0);
}

void grid_barrier(const char* file, int line) {
  if (!emulation::skipped(file, line)) emulation::Launch::running->grid_barrier();
}

void cluster_arrive(const char* file, int line) {
  if (!emulation::skipped(file, line)) emulation::Launch::running->cluster_arrive();
}

void cluster_wait(const char* file, int line) {
  if (!emulation::skipped(file, line)) emulation::Launch::running->cluster_wait();
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

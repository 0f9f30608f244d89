// A stand-in for the CUDA execution model, on the host, for tests.
//
// Every thread of every block is a fiber of its own; they switch only where they meet: at warp
// collectives, at block and grid barriers, or where they wait for arrivals. Which warp goes on is
// drawn at random (from a seed, with changing priorities, so that some warps run far ahead), and
// its threads one after another: a missing barrier is a read before the write. Every fourth seed
// leaves it at that; with the others, by their remainder, one block is as far ahead of all others
// as the barriers let it, or as far behind, or one warp of each block is behind. Shared memory
// starts as NaN and is fenced. Accesses that nothing orders fail in any schedule (races.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace capsule_kernels::cuda {

// A 16-bit float as its bits.
struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

namespace emulation {

struct Dim {
  unsigned x;
};

// Of the fiber that runs.
extern Dim thread_index, block_index, block_size, grid_size;
extern void* block_shared_memory;

enum class Collective { kShuffle, kVote, kWarpBarrier, kMma, kBlockBarrier, kGridBarrier };

// Joins the other lanes of the warp with this lane's operands; the last to come runs `act` on those
// of all 32. All threads of the group must join the same collective, or the launch fails.
using Operands = float[32][12];
void join(Collective collective, float* operands, int count, void (*act)(Operands));

void run(const std::function<void()>& kernel, int blocks, int threads, int shared_bytes);

float from_float16(std::uint16_t bits);
std::uint16_t to_float16(float x);

}  // namespace emulation

#define threadIdx ::capsule_kernels::cuda::emulation::thread_index
#define blockIdx ::capsule_kernels::cuda::emulation::block_index
#define blockDim ::capsule_kernels::cuda::emulation::block_size
#define gridDim ::capsule_kernels::cuda::emulation::grid_size

using std::fabs;
using std::max;
using std::min;

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) {
  const std::uint32_t bits = std::uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline float to_float(Float16 x) { return emulation::from_float16(x.bits); }
inline void store(float* to, float x) { *to = x; }
inline void store(BFloat16* to, float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  // To the nearest, ties to even; NaN stays NaN.
  to->bits = std::isnan(x) ? 0x7fff : std::uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void store(Float16* to, float x) { to->bits = emulation::to_float16(x); }

inline void* shared_memory() { return emulation::block_shared_memory; }
inline float exp2_approximate(float x) { return x < -126 ? 0.0f : std::exp2(x); }

inline float shuffle_xor(float x, int lane_mask) {
  float operands[2] = {x, float(lane_mask)};
  emulation::join(emulation::Collective::kShuffle, operands, 2, [](emulation::Operands all) {
    float values[32];
    for (int lane = 0; lane < 32; ++lane) values[lane] = all[lane][0];
    for (int lane = 0; lane < 32; ++lane) all[lane][0] = values[lane ^ int(all[lane][1])];
  });
  return operands[0];
}

inline float shuffle(float x, int from_lane) {
  float operands[2] = {x, float(from_lane)};
  emulation::join(emulation::Collective::kShuffle, operands, 2, [](emulation::Operands all) {
    float values[32];
    for (int lane = 0; lane < 32; ++lane) values[lane] = all[lane][0];
    for (int lane = 0; lane < 32; ++lane) all[lane][0] = values[int(all[lane][1])];
  });
  return operands[0];
}

inline bool any_lane(bool x) {
  float operands[1] = {x ? 1.0f : 0.0f};
  emulation::join(emulation::Collective::kVote, operands, 1, [](emulation::Operands all) {
    const bool any = std::any_of(all, all + 32, [](const float* lane) { return lane[0] != 0; });
    for (int lane = 0; lane < 32; ++lane) all[lane][0] = any ? 1.0f : 0.0f;
  });
  return operands[0] != 0;
}

inline float reciprocal(float x) { return 1.0f / x; }

inline void prefetch(const void*) {}
inline void forget_loads() {}
inline int here(int x) { return x; }
inline int uniform(int x) { return x; }

// Copied only when waited for, as late as can be, or (see `Arrivals`) at once.
namespace emulation {
void begin_copy(void* shared, const void* global, int bytes, bool is_there);
void wait_for_copies_before(int groups);
}  // namespace emulation
template <int kBytes>
void copy_in_background(void* shared, const void* global, bool is_there = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emulation::begin_copy(shared, global, kBytes, is_there);
}
void end_group_of_copies();
template <int kGroups>
void wait_for_all_but() {
  emulation::wait_for_copies_before(kGroups);
}

void mma_tf32(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]);
using GridArrival = unsigned;
GridArrival grid_arrive(const char* file = __builtin_FILE(), int line = __builtin_LINE());
void grid_wait(GridArrival arrival, const char* file = __builtin_FILE(),
               int line = __builtin_LINE());
void counted_barrier(unsigned* arrived, unsigned expected, const char* file = __builtin_FILE(),
                     int line = __builtin_LINE());

struct Arrivals {
  unsigned arrived, count;  // of all uses, of each
  void start(int count);
  void arrive();
  void arrive_after_copies();
  void arrive_after_copy(void* shared, const void* global, int bytes);
  void wait(int use, const char* file = __builtin_FILE(), int line = __builtin_LINE()) const;
};

// Products of warpgroups, done for each warp by itself: only when waited for, or at once, by turns
// of the schedule. What they read and add to is what is there at that moment.
#define CAPSULE_KERNELS_WARPGROUPS
void publish(const char* file = __builtin_FILE(), int line = __builtin_LINE());

struct Matrix {
  const float* at;
  int to_half;  // floats
};
inline Matrix matrix_on_chip(const void* shared, int to_half) {
  return {static_cast<const float*>(shared), to_half / 4};
}
inline Matrix further(Matrix matrix, int bytes) { return {matrix.at + bytes / 4, matrix.to_half}; }

namespace emulation {
struct Product {
  float (*c)[4];
  int fragments;
  bool adds;
  const unsigned* rows;  // of a: the lane's four, or null
  Matrix a, b;
  int group;
};
void begin_product(const Product& product);
void wait_for_products_before(int groups);
}  // namespace emulation

inline void begin_products() {}
void end_group_of_products();
template <int kGroups>
void wait_for_products() {
  emulation::wait_for_products_before(kGroups);
}
template <int kFragments>
void settle(float (&)[kFragments][4]) {}

template <bool kAdds>
void multiply_on_chip(float (&c)[4][4], Matrix a, Matrix b) {
  emulation::begin_product({c, 4, kAdds, nullptr, a, b, 0});
}
template <int kFragments>
void multiply_add_rows(float (*c)[4], const unsigned (&a)[4], Matrix b) {
  emulation::begin_product({c, kFragments, true, a, {}, b, 0});
}

struct Grid {
  int blocks, threads, shared_bytes;
  bool cooperative;
};

template <class Arguments, class Plan>
void launch(void (*kernel)(Arguments, Plan), const Grid& grid, void* /*stream*/,
            Arguments arguments, Plan plan) {
  emulation::run([=] { kernel(arguments, plan); }, grid.blocks, grid.threads, grid.shared_bytes);
}

}  // namespace capsule_kernels::cuda

// Barriers know where they stand, so that a test can leave one out and see the difference.
void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE());
void __syncwarp(const char* file = __builtin_FILE(), int line = __builtin_LINE());

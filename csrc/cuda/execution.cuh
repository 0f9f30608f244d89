// The CUDA execution model in the few words the kernels use.
//
// A kernel uses, besides what CUDA C++ gives, only what this file declares. Its tests compile the
// same sources for the host, where `execution_model.h` stands in for all of it.
#pragma once

#ifdef CAPSULE_KERNELS_EMULATION
#include "execution_model.h"
#else

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

namespace capsule_kernels::cuda {

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(Float16 x) { return __half2float(x); }
__device__ __forceinline__ void store(float* to, float x) { *to = x; }
__device__ __forceinline__ void store(BFloat16* to, float x) { *to = __float2bfloat16(x); }
__device__ __forceinline__ void store(Float16* to, float x) { *to = __float2half(x); }

__device__ __forceinline__ void* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

__device__ __forceinline__ float shuffle_xor(float x, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, x, lane_mask);
}

__device__ __forceinline__ float shuffle(float x, int from_lane) {
  return __shfl_sync(0xffffffffu, x, from_lane);
}

// x, which all lanes have: the compiler takes what is derived of it for one value of the warp.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// Whether x is true in any lane of the warp.
__device__ __forceinline__ bool any_lane(bool x) { return __any_sync(0xffffffffu, x) != 0; }

// 1 / x, to 2^-23, of normal numbers below 2^126.
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 2^x, to 2^-22; results below the smallest normal number are 0.
__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// What was loaded before is loaded anew where it is needed again, instead of taking registers.
__device__ __forceinline__ void forget_loads() { asm volatile("" : : : "memory"); }

// x; what is derived of it is computed where it is needed, instead of ahead of a loop and kept in
// registers through it.
__device__ __forceinline__ int here(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Brings what is there closer, for a load to come.
__device__ __forceinline__ void prefetch(const void* global) {
  asm volatile("prefetch.global.L1 [%0];" : : "l"(global));
}

// Copies 4, 8 or 16 bytes to shared memory in the background, or zeros where there is nothing to
// copy; they are there after `wait_for_all_but`, for other threads after a barrier behind it, or
// once `Arrivals` are complete that have waited for them.
template <int kBytes>
__device__ __forceinline__ void copy_in_background(void* shared, const void* global,
                                                   bool is_there = true) {
  const unsigned to = unsigned(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(to), "l"(global), "r"(is_there ? 16 : 0)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 :
                 : "r"(to), "l"(global), "n"(kBytes), "r"(is_there ? kBytes : 0)
                 : "memory");
  }
}

// The copies that this thread has begun since the last call are a group, empty or not.
__device__ __forceinline__ void end_group_of_copies() {
  asm volatile("cp.async.commit_group;" : : : "memory");
}

// Waits for this thread's copies but those of the last `kGroups` groups.
template <int kGroups>
__device__ __forceinline__ void wait_for_all_but() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kGroups) : "memory");
}

// All blocks of a cooperative launch, in two halves: what was written before one arrives is seen by
// those that have waited.
using GridArrival = cooperative_groups::grid_group::arrival_token;
__device__ __forceinline__ GridArrival grid_arrive() {
  return cooperative_groups::this_grid().barrier_arrive();
}
__device__ __forceinline__ void grid_wait(GridArrival arrival) {
  cooperative_groups::this_grid().barrier_wait(std::move(arrival));
}

// A barrier for the blocks, all resident, that count their arrivals in `arrived`; passed when there
// are `expected` of them. Nothing is awaited of the addition itself, so that the first look at the
// count sets off at once.
__device__ __forceinline__ void counted_barrier(unsigned* arrived, unsigned expected) {
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" : : "l"(arrived) : "memory");
    unsigned count;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(arrived) : "memory");
    } while (count < expected);
  }
  __syncthreads();
}

// Copies of whole arrays, and products of warpgroups, which are four warps and the first of them
// has a number divisible by four: only compute capability 9.0 has those products.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CAPSULE_KERNELS_WARPGROUPS
#endif

// What this thread wrote comes before copies of `Arrivals::arrive_after_copy` and products of
// warpgroups behind a barrier to come.
__device__ __forceinline__ void publish() {
#ifdef CAPSULE_KERNELS_WARPGROUPS
  asm volatile("fence.proxy.async;" : : : "memory");
#endif
}

// Counts arrivals of a block's threads on chip, `count` for each use: use 0, 1, 2, ... is complete
// when all of them have arrived, which lets the next begin.
struct Arrivals {
  unsigned long long barrier;

  __device__ __forceinline__ unsigned address() const {
    return unsigned(__cvta_generic_to_shared(this));
  }
  // By one thread; for the others it is there after a barrier.
  __device__ __forceinline__ void start(int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" : : "r"(address()), "r"(count) : "memory");
  }
  __device__ __forceinline__ void arrive() {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }"
                 :
                 : "r"(address())
                 : "memory");
  }
  // Arrives when the copies are there that this thread has begun.
  __device__ __forceinline__ void arrive_after_copies() {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" : : "r"(address()) : "memory");
  }
  // Arrives when the copy is there that this thread begins: of a multiple of 16 bytes, aligned to
  // 16. What threads have written to either place comes before it if they called `publish` behind
  // it, and there is a barrier between.
  __device__ __forceinline__ void arrive_after_copy(void* shared, const void* global, int bytes) {
#ifdef CAPSULE_KERNELS_WARPGROUPS
    asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; }"
                 :
                 : "r"(address()), "r"(bytes)
                 : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        :
        : "r"(unsigned(__cvta_generic_to_shared(shared))), "l"(global), "r"(bytes), "r"(address())
        : "memory");
#endif
  }
  // What was written before the arrivals is seen then. The use after this one must not be complete.
  __device__ __forceinline__ void wait(int use) const {
    unsigned complete;
    do {
      asm volatile(
          "{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; "
          "selp.u32 %0, 1, 0, p; }"
          : "=r"(complete)
          : "r"(address()), "r"(unsigned(use) & 1)
          : "memory");
    } while (complete == 0);
  }
};

// c [16, 8] += a [16, 8] b [8, 8]; the low 13 bits of the operands are ignored by the hardware.
// With g = lane / 4 and q = lane % 4: a holds (g, q), (g + 8, q), (g, q + 4), (g + 8, q + 4);
// b holds (q, g), (q + 4, g); c holds (g, 2q), (g, 2q + 1), (g + 8, 2q), (g + 8, 2q + 1).
__device__ __forceinline__ void mma_tf32(float (&c)[4], const unsigned (&a)[4],
                                         const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// What a product of a warpgroup reads on chip: rows of 8 elements of its contraction, in two halves
// of 16 bytes. The same half of 8 rows is 128 bytes, that of the next 8 rows lies behind it; the
// second half of a row lies `to_half` bytes behind the first.
using Matrix = unsigned long long;
__device__ __forceinline__ Matrix matrix_on_chip(const void* shared, int to_half) {
  const unsigned at = unsigned(__cvta_generic_to_shared(shared)) >> 4 | unsigned(to_half >> 4)
                                                                            << 16;
  return (128ull >> 4) << 32 | at;
}
// The matrix that lies `bytes` further.
__device__ __forceinline__ Matrix further(Matrix matrix, int bytes) {
  return matrix + (bytes >> 4);
}

// Stands before products whose registers other instructions have touched.
__device__ __forceinline__ void begin_products() {
#ifdef CAPSULE_KERNELS_WARPGROUPS
  asm volatile("wgmma.fence.sync.aligned;" : : : "memory");
#endif
}
// The products since the last call are a group.
__device__ __forceinline__ void end_group_of_products() {
#ifdef CAPSULE_KERNELS_WARPGROUPS
  asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory");
#endif
}
// Waits for all products but those of the last `kGroups` groups.
template <int kGroups>
__device__ __forceinline__ void wait_for_products() {
#ifdef CAPSULE_KERNELS_WARPGROUPS
  asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(kGroups) : "memory");
#endif
}
// Results that are there: what reads them stays behind the wait.
template <int kFragments>
__device__ __forceinline__ void settle(float (&c)[kFragments][4]) {
#pragma unroll
  for (int n = 0; n < kFragments; ++n) {
    for (float& x : c[n]) asm volatile("" : "+f"(x) : : "memory");
  }
}

#define CAPSULE_KERNELS_FRAGMENT(c) "+f"((c)[0]), "+f"((c)[1]), "+f"((c)[2]), "+f"((c)[3])

// c [64, 32] = a [64, 8] b [8, 32] or, `kAdds`, c += a b, in the background: until they are waited
// for, nothing may touch c or what they read. Rows of a are those of c, rows of b the columns of c;
// the low 13 bits are ignored. Lane (g, q) of warp w holds of fragment n of c rows 16w + g and
// 16w + g + 8 of columns 8n + 2q and 8n + 2q + 1, as `mma_tf32` has them.
template <bool kAdds>
__device__ __forceinline__ void multiply_on_chip(float (&c)[4][4], Matrix a, Matrix b) {
#ifdef CAPSULE_KERNELS_WARPGROUPS
  asm volatile(
      "{ .reg .pred adds; setp.ne.b32 adds, %18, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k8.f32.tf32.tf32 {%0, %1, %2, %3, %4, %5, %6, %7, %8, "
      "%9, %10, %11, %12, %13, %14, %15}, %16, %17, adds, 1, 1; }"
      : CAPSULE_KERNELS_FRAGMENT(c[0]), CAPSULE_KERNELS_FRAGMENT(c[1]),
        CAPSULE_KERNELS_FRAGMENT(c[2]), CAPSULE_KERNELS_FRAGMENT(c[3])
      : "l"(a), "l"(b), "n"(int(kAdds)));
#endif
}

// c [64, 8 kFragments] += a [64, 8] b [8, 8 kFragments], likewise; a lies in registers, 16 rows
// with each warp, as `mma_tf32` has them.
template <int kFragments>
__device__ __forceinline__ void multiply_add_rows(float (*c)[4], const unsigned (&a)[4], Matrix b) {
  static_assert(kFragments == 2 || kFragments == 10);
#ifdef CAPSULE_KERNELS_WARPGROUPS
  if constexpr (kFragments == 2) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n16k8.f32.tf32.tf32 {%0, %1, %2, %3, %4, %5, %6, %7}, "
        "{%8, %9, %10, %11}, %12, 1, 1, 1;"
        : CAPSULE_KERNELS_FRAGMENT(c[0]), CAPSULE_KERNELS_FRAGMENT(c[1])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n80k8.f32.tf32.tf32 {%0, %1, %2, %3, %4, %5, %6, %7, %8, "
        "%9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, "
        "%27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39}, {%40, %41, %42, %43}, "
        "%44, 1, 1, 1;"
        : CAPSULE_KERNELS_FRAGMENT(c[0]), CAPSULE_KERNELS_FRAGMENT(c[1]),
          CAPSULE_KERNELS_FRAGMENT(c[2]), CAPSULE_KERNELS_FRAGMENT(c[3]),
          CAPSULE_KERNELS_FRAGMENT(c[4]), CAPSULE_KERNELS_FRAGMENT(c[5]),
          CAPSULE_KERNELS_FRAGMENT(c[6]), CAPSULE_KERNELS_FRAGMENT(c[7]),
          CAPSULE_KERNELS_FRAGMENT(c[8]), CAPSULE_KERNELS_FRAGMENT(c[9])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
#endif
}

#undef CAPSULE_KERNELS_FRAGMENT

inline void check(cudaError_t status, const char* call) {
  if (status != cudaSuccess) {
    cudaGetLastError();  // a failed launch must not surface again in somebody else's call
    throw std::runtime_error(std::string("capsule_kernels: ") + call + " failed: " +
                             cudaGetErrorName(status) + ": " + cudaGetErrorString(status));
  }
}

// What a kernel is launched with.
struct Grid {
  int blocks, threads, shared_bytes;
  bool cooperative;
};

// How many blocks of a kernel the current device holds at a time. The device is asked once: its
// answers would cost as much as a launch.
inline int resident_blocks(const void* kernel, const Grid& grid) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int, int>, int> known;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(device, kernel, grid.threads, grid.shared_bytes);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;

  int sm_count = 0, blocks_per_sm = 0, most_shared = 0;
  check(cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute(cudaDevAttrMultiProcessorCount)");
  check(cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared),
        "cudaFuncSetAttribute(cudaFuncAttributeMaxDynamicSharedMemorySize)");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_sm, kernel, grid.threads,
                                                      grid.shared_bytes),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return known[key] = blocks_per_sm * sm_count;
}

// Launches on the current device; a cooperative grid has to be resident as a whole.
template <class Arguments, class Plan>
void launch(void (*kernel)(Arguments, Plan), const Grid& grid, void* stream, Arguments arguments,
            Plan plan) {
  void* parameters[] = {&arguments, &plan};
  const auto function = reinterpret_cast<const void*>(kernel);
  const int resident = resident_blocks(function, grid);
  if (!grid.cooperative) {
    check(cudaLaunchKernel(function, dim3(grid.blocks), dim3(grid.threads), parameters,
                           grid.shared_bytes, static_cast<cudaStream_t>(stream)),
          "cudaLaunchKernel");
    return;
  }
  if (grid.blocks > resident) {
    throw std::runtime_error(
        "capsule_kernels: a cooperative grid of " + std::to_string(grid.blocks) +
        " blocks does not fit on this device, which holds " + std::to_string(resident));
  }
  check(cudaLaunchCooperativeKernel(function, dim3(grid.blocks), dim3(grid.threads), parameters,
                                    grid.shared_bytes, static_cast<cudaStream_t>(stream)),
        "cudaLaunchCooperativeKernel");
}

}  // namespace capsule_kernels::cuda

#endif

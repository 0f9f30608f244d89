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

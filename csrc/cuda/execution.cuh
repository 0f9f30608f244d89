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

// Copies 16 bytes to shared memory in the background; they are there after `wait_for_copies`, for
// other threads after a barrier behind it.
__device__ __forceinline__ void copy_in_background(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
               :
               : "r"(unsigned(__cvta_generic_to_shared(shared))), "l"(global)
               : "memory");
}

__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" : : : "memory");
}

// All blocks of a cooperative launch; what was written before is seen after by everybody.
__device__ __forceinline__ void grid_barrier() { cooperative_groups::this_grid().sync(); }

// To the nearest TF32 value, ties away from zero; infinities and NaN stay. Volatile: the compiler
// must not hoist it out of a loop, where the rounded copies would take registers.
__device__ __forceinline__ unsigned round_to_tf32(float x) {
  unsigned bits;
  asm volatile("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

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

// How many blocks of a kernel the current device holds at a time. The device is asked once: its
// answers would cost as much as a launch.
inline int resident_blocks(const void* kernel, int threads, int shared_bytes) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int, int>, int> known;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(device, kernel, threads, shared_bytes);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;

  int sm_count = 0, most_shared = 0, blocks_per_sm = 0;
  check(cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute(cudaDevAttrMultiProcessorCount)");
  check(cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)");
  // As much as there may be, for later calls with more.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared),
        "cudaFuncSetAttribute(cudaFuncAttributeMaxDynamicSharedMemorySize)");
  check(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_sm, kernel, threads, shared_bytes),
      "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return known[key] = blocks_per_sm * sm_count;
}

// Launches on the current device; a cooperative grid has to be resident as a whole.
template <class Arguments, class Plan>
void launch(void (*kernel)(Arguments, Plan), int blocks, int threads, int shared_bytes,
            bool cooperative, void* stream, Arguments arguments, Plan plan) {
  void* parameters[] = {&arguments, &plan};
  const auto function = reinterpret_cast<const void*>(kernel);
  const int resident = resident_blocks(function, threads, shared_bytes);
  if (!cooperative) {
    check(cudaLaunchKernel(function, dim3(blocks), dim3(threads), parameters, shared_bytes,
                           static_cast<cudaStream_t>(stream)),
          "cudaLaunchKernel");
    return;
  }
  if (blocks > resident) {
    throw std::runtime_error("capsule_kernels: a cooperative grid of " + std::to_string(blocks) +
                             " blocks does not fit on this device, which holds " +
                             std::to_string(resident));
  }
  check(cudaLaunchCooperativeKernel(function, dim3(blocks), dim3(threads), parameters, shared_bytes,
                                    static_cast<cudaStream_t>(stream)),
        "cudaLaunchCooperativeKernel");
}

}  // namespace capsule_kernels::cuda

#endif

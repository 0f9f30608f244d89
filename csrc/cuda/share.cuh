// What a block of the persistent grid works on, and how it waits for those it shares it with.
#pragma once

#include "execution.cuh"
#include "plan.h"

namespace capsule_kernels::cuda {

// Of a block, and of a warp of it.
struct Share {
  const SweepPlan& plan;
  unsigned* const counters;  // [sample_groups][kCounterStride], of arrivals at barriers
  int first_capsule, last_capsule;
  int first_row;  // of W on chip
  int warp;

  __device__ __forceinline__ Share(const Shape& shape, const SweepPlan& plan, unsigned* counters)
      : plan(plan),
        counters(counters),
        first_capsule(capsule_group() * plan.capsules),
        last_capsule(min(first_capsule + plan.capsules, shape.I)),
        first_row(plan.by_weight_sharing.divide(first_capsule)),
        warp(threadIdx.x / kWarpSize) {}

  // Anew wherever they are wanted: they would be kept in registers through a sweep.
  __device__ __forceinline__ int sample_group() const {
    return plan.by_capsule_groups.divide(here(blockIdx.x));
  }
  __device__ __forceinline__ int capsule_group() const {
    return here(blockIdx.x) - sample_group() * plan.capsule_groups;
  }

  // Which of the plan's `lanes` interleaved shares of the capsules.
  __device__ __forceinline__ int lane_of_capsules() const {
    return plan.by_tiles_per_pass.divide(here(warp));
  }
  // Which tile of a pass.
  __device__ __forceinline__ int slot() const {
    return here(warp) - lane_of_capsules() * plan.tiles_per_pass;
  }

  // The barriers below count arrivals, from 0. All blocks call both of these once; what a block
  // wrote before the first is seen by all after the second.
  __device__ __forceinline__ GridArrival reset_counter() const {
    if (capsule_group() == 0 && threadIdx.x == 0) *counter() = 0;
    return grid_arrive();
  }
  __device__ __forceinline__ void wait_for_counters(GridArrival reset) const { grid_wait(reset); }

  // For those who read a partial sum, or a state, that another block wrote: of the blocks that
  // share samples, number 1, 2, 3, ... of the launch.
  __device__ __forceinline__ void barrier(int number) const {
    counted_barrier(counter(), unsigned(number * plan.capsule_groups));
  }

 private:
  __device__ __forceinline__ unsigned* counter() const {
    return counters + sample_group() * kCounterStride;
  }
};

}  // namespace capsule_kernels::cuda

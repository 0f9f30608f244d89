// What a block of the persistent grid works on, and how it waits for those it shares it with.
#pragma once

#include "execution.cuh"
#include "plan.h"

namespace capsule_kernels::cuda {

// Of a block, and of a warp of it.
struct Share {
  const SweepPlan& plan;
  unsigned* const counters;  // [sample_groups][kCounterStride], of arrivals at barriers
  int sample_group, capsule_group;
  int first_capsule, last_capsule;
  int first_row;  // of W on chip
  int warp;
  int lane_of_capsules;  // which of the `lanes` interleaved shares of the capsules
  int slot;              // which tile of a pass
  int lanes;

  __device__ __forceinline__ Share(const Shape& shape, const SweepPlan& plan, unsigned* counters)
      : plan(plan),
        counters(counters),
        sample_group(plan.by_capsule_groups.divide(blockIdx.x)),
        capsule_group(blockIdx.x - sample_group * plan.capsule_groups),
        first_capsule(capsule_group * plan.capsules),
        last_capsule(min(first_capsule + plan.capsules, shape.I)),
        first_row(plan.by_weight_sharing.divide(first_capsule)),
        warp(threadIdx.x / kWarpSize),
        lane_of_capsules(plan.by_tiles_per_pass.divide(warp)),
        slot(warp - lane_of_capsules * plan.tiles_per_pass),
        lanes(plan.by_tiles_per_pass.divide(kSweepWarps)) {}

  // `sample_group` anew, where it would be kept in a register through a sweep.
  __device__ __forceinline__ int sample_group_again() const {
    return plan.by_capsule_groups.divide(here(blockIdx.x));
  }

  // Whether the block is in a cluster; which of those that share its samples, and which of its
  // blocks.
  __device__ __forceinline__ bool clustered() const { return kHasClusters && plan.cluster > 1; }
  __device__ __forceinline__ int cluster() const { return capsule_group / kClusterBlocks; }
  __device__ __forceinline__ int rank() const { return capsule_group % kClusterBlocks; }

  // Which copy of the states is the block's; outputs are from the first.
  __device__ __forceinline__ int copy() const { return clustered() ? cluster() : 0; }

  // Whether a cluster has all of W, so that its barrier is all it takes.
  __device__ __forceinline__ bool alone() const { return clustered() && plan.sums == 1; }

  // The barriers below count arrivals, from 0. All blocks call both of these once, and have
  // something else to do meanwhile.
  __device__ __forceinline__ GridArrival reset_counter() const {
    if (alone()) return 0;
    if (capsule_group == 0 && threadIdx.x == 0) *counter() = 0;
    return grid_arrive();
  }
  __device__ __forceinline__ void wait_for_counters(GridArrival reset) const {
    if (!alone()) grid_wait(reset);
  }

  // Barriers for those who read a partial sum, or a state, that one of them wrote: the blocks that
  // share samples, or their cluster. `sums`, `states`: how many of each there were, with this one.
  __device__ __forceinline__ void sum_barrier(int sums, int states) const {
    if (alone()) {
      cluster_arrive();
      cluster_wait();
    } else {
      counted_barrier(counter(), arrivals(sums, states));
    }
  }
  __device__ __forceinline__ void state_barrier(int sums, int states) const {
    if (clustered()) {
      cluster_arrive();
      cluster_wait();
    } else {
      counted_barrier(counter(), arrivals(sums, states));
    }
  }

 private:
  __device__ __forceinline__ unsigned* counter() const {
    return counters + sample_group_again() * kCounterStride;
  }
  __device__ __forceinline__ unsigned arrivals(int sums, int states) const {
    return (sums + (clustered() ? 0 : states)) * plan.capsule_groups;
  }
};

}  // namespace capsule_kernels::cuda

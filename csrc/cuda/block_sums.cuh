// What the blocks of the persistent grid that share samples add up between two sweeps.
#pragma once

#include "share.cuh"
#include "tile.cuh"

namespace capsule_kernels::cuda {

// Of output capsules with `kD` (padded) dimensions.
template <int kD>
struct BlockSums {
  static constexpr int kCapsuleLanes = kD / 4;  // that hold an output capsule, where it is whole

  const SweepPlan& plan;
  const Share share;
  const Lane lane;
  const int tiles;               // of 8 samples
  const int fragments;           // of a tile
  const std::size_t state_size;  // of a state [tiles][tile], or of partial sums [B][J][D] (padded)
  float4* const exchange;        // on chip

  __device__ __forceinline__ BlockSums(const Shape& shape, const SweepPlan& plan,
                                       unsigned* counters, int fragments, int exchange_at)
      : plan(plan),
        share(shape, plan, counters),
        tiles(plan.tiles),
        fragments(fragments),
        state_size(plan.state_size),
        exchange(reinterpret_cast<float4*>(static_cast<char*>(shared_memory()) + exchange_at)) {}

  // Calls visit(item) for the items of the block, 32 float4s [B][J][D] of a state each, or -1 where
  // there are no more, as often in every warp; `teams` of warps take turns.
  template <class Visit>
  __device__ __forceinline__ void for_each_item(int teams, int team, Visit visit) const {
    const int width = plan.tiles_per_pass;
    for (int first = share.sample_group() * width; first < tiles;
         first += plan.sample_groups * width) {
      const int end = min(first + width, tiles) * fragments;
      for (int block = first * fragments + share.capsule_group(); block < end;
           block += plan.capsule_groups * teams) {
        const int item = block + team * plan.capsule_groups;
        visit(item < end ? item : -1);
      }
    }
  }

  // Adds the partial sums in a fixed order. `finish(sum, ahead, b, j, d)` gets each sum once, for
  // d ... d + 3, and what `load(b, j, d)` has loaded for it ahead of time; `kCapsuleLanes` lanes
  // have a capsule whole.
  template <class Load, class Finish>
  __device__ __forceinline__ void add_partial_sums(const float4* partial, Load load,
                                                   Finish finish) const {
    const int warps = plan.adders, team = share.warp / warps, warp = share.warp - team * warps;
    for_each_item(kSweepWarps / warps, team, [&](int item) {
      const int e = item * kWarpSize + here(lane.index);
      const int capsule = e / kCapsuleLanes, J = fragments * kTileRows / kD;
      const int b = capsule / J, j = capsule % J, d = e % kCapsuleLanes * 4;
      const bool finishes = warp == 0 && item >= 0;
      decltype(load(0, 0, 0)) loaded = {};
      if (finishes) loaded = load(b, j, d);
      float sum[4] = {};
      for (int n = warp; item >= 0 && n < plan.capsule_groups; n += kPartialSumsAhead * warps) {
        float4 ahead[kPartialSumsAhead];  // all on their way before the first of them is added
#pragma unroll
        for (int m = 0; m < kPartialSumsAhead; ++m) {
          const int next = n + m * warps;
          ahead[m] = next < plan.capsule_groups ? partial[next * state_size + e]
                                                : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
#pragma unroll
        for (int m = 0; m < kPartialSumsAhead; ++m) add_to(sum, ahead[m]);
      }
      if (warps > 1) {
        __syncthreads();  // `exchange` is free
        if (warp > 0) exchange[share.warp * kWarpSize + lane.index] = packed(sum);
        __syncthreads();
      }
      if (!finishes) return;
#pragma unroll
      for (int other = 1; other < kSweepWarps; ++other) {
        if (other >= warps) break;
        add_to(sum, exchange[(share.warp + other) * kWarpSize + lane.index]);
      }
      finish(sum, loaded, b, j, d);
    });
  }
};

}  // namespace capsule_kernels::cuda

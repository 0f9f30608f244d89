// The persistent grid of the forward and of the backward's inner sweeps.
//
// A block keeps the W of its input capsules in shared memory for the whole launch. A sweep goes
// over (its samples) x (its capsules), weighs each u_hat with coefficients that it computes from
// the states, and leaves the block's sum of coefficient * u_hat per sample in the workspace. The
// blocks then add the partial sums of all capsule groups, in a fixed order.
#pragma once

#include "squash.cuh"
#include "tile.cuh"

namespace capsule_kernels::cuda {

// What a block of the grid, and a warp of it, works on.
struct Share {
  int capsule_group, sample_group;
  int first_capsule, last_capsule;
  int first_row;  // of W on chip
  int warp;
  int slot;              // which tile of a pass
  int lane_of_capsules;  // which of the `lanes` interleaved shares of the capsules
  int lanes;

  __device__ __forceinline__ Share(const Shape& shape, const SweepPlan& plan)
      : capsule_group(blockIdx.x % plan.capsule_groups),
        sample_group(blockIdx.x / plan.capsule_groups),
        first_capsule(capsule_group * plan.capsules),
        last_capsule(min(first_capsule + plan.capsules, shape.I)),
        first_row(first_capsule / shape.weight_sharing),
        warp(threadIdx.x / kWarpSize),
        slot(warp % plan.tiles_per_pass),
        lane_of_capsules(warp / plan.tiles_per_pass),
        lanes(kSweepWarps / plan.tiles_per_pass) {}
};

// `count` rows of W [.., J, D, K] to chip, prepared for the products of P, D and K padded with
// zeros to multiples of 8; all of `threads` take part. They are there after a barrier.
template <class P, class T>
__device__ __forceinline__ void load_weight(T* to, const T* from, int count, const Shape& shape,
                                            const Padded& padded, int thread, int threads) {
  const int elements = count * padded.weight_elements;
  if (padded.D == shape.D && padded.K == shape.K) {
    constexpr int kCopied = 16 / sizeof(T);
    for (int e = thread * kCopied; e < elements; e += threads * kCopied) {
      copy_in_background(to + e, from + e);
    }
    wait_for_copies();
    for (int e = thread * kCopied; e < elements; e += threads * kCopied) {
      for (int n = 0; n < kCopied; ++n) to[e + n] = P::prepared(to[e + n]);
    }
    return;
  }
  for (int e = thread; e < elements; e += threads) {
    const int k = e % padded.K, jd = e / padded.K % (shape.J * padded.D);
    const int row = e / padded.weight_elements, j = jd / padded.D, d = jd % padded.D;
    const std::size_t source = ((std::size_t(row) * shape.J + j) * shape.D + d) * shape.K + k;
    if (d < shape.D && k < shape.K) {
      to[e] = P::prepared(from[source]);
    } else {
      store(to + e, 0.0f);
    }
  }
}

// Adds the sums of the warps that share a tile, in a fixed order, into those of its first warp.
// `exchange` holds a tile for half of the warps.
template <class Tile>
__device__ __forceinline__ void add_over_lanes(typename Tile::Values& sum, float4* exchange,
                                               const SweepPlan& plan, const Share& share, int J,
                                               const Lane& lane) {
  const int fragments = J * Tile::DT;
  for (int half = share.lanes / 2; half >= 1; half /= 2) {
    const int sender = share.lane_of_capsules - half;
    const int place = (sender >= 0 ? sender : share.lane_of_capsules) * plan.tiles_per_pass;
    float4* tile = exchange + (place + share.slot) * fragments * kWarpSize + lane.index;
    if (sender >= 0 && sender < half) {
#pragma unroll
      for (int n = 0; n < Tile::kFragments; ++n) {
        if (Tile::has(n / Tile::DT, J))
          tile[n * kWarpSize] = make_float4(sum[n][0], sum[n][1], sum[n][2], sum[n][3]);
      }
    }
    __syncthreads();
    if (share.lane_of_capsules < half) {
#pragma unroll
      for (int n = 0; n < Tile::kFragments; ++n) {
        if (Tile::has(n / Tile::DT, J)) {
          const float4 x = tile[n * kWarpSize];
          sum[n][0] += x.x;
          sum[n][1] += x.y;
          sum[n][2] += x.z;
          sum[n][3] += x.w;
        }
      }
    }
    __syncthreads();
  }
}

// One sweep. `add(sum, u_hat, staged, tile, i)` adds u_hat of capsule i, weighted, to the sum; the
// `state_count` state tiles of `states` [tiles][tile] lie at staged[0..] on chip. `partial` is
// [G_i][tiles][tile].
template <class P, class T, class Tile, class Add>
__device__ __forceinline__ void sweep(const Shape& shape, const SweepPlan& plan, const Share& share,
                                      const Lane& lane, const T* u, const T* weight,
                                      float4* exchange, const float4* const* states,
                                      int state_count, float4* partial, Add add) {
  const int tiles = ceil_div(shape.B, kTileSamples);
  const int tile_size = shape.J * Tile::DT * kWarpSize;  // float4s
  const int weight_elements = shape.J * Tile::DT * kTileDims * Tile::padded_K(shape.K);
  for (int first = share.sample_group * plan.tiles_per_pass; first < tiles;
       first += plan.sample_groups * plan.tiles_per_pass) {
    const int count = min(plan.tiles_per_pass, tiles - first);
    for (int state = 0; state < state_count; ++state) {
      for (int e = threadIdx.x; e < count * tile_size; e += kSweepWarps * kWarpSize) {
        exchange[state * plan.tiles_per_pass * tile_size + e] =
            states[state][std::size_t(first) * tile_size + e];
      }
    }
    __syncthreads();  // W too, in the first sweep

    typename Tile::Values sum;
#pragma unroll
    for (int n = 0; n < Tile::kFragments; ++n) {
      for (int e = 0; e < 4; ++e) sum[n][e] = 0.0f;
    }
    const int tile = first + share.slot;
    if (share.slot < count) {
      const float4* staged[2] = {
          exchange + share.slot * tile_size,
          exchange + (plan.tiles_per_pass + share.slot) * tile_size,
      };
      // u of the next capsule is loaded while this one is worked on.
      float next_u[4] = {};
      int i = share.first_capsule + share.lane_of_capsules;
      if (i < share.last_capsule) {
        InputRows<T>(u, tile, i, shape, lane).load(next_u, 0, shape.K, lane);
      }
      for (; i < share.last_capsule; i += share.lanes) {
        const float first_u[4] = {next_u[0], next_u[1], next_u[2], next_u[3]};
        if (i + share.lanes < share.last_capsule) {
          InputRows<T>(u, tile, i + share.lanes, shape, lane).load(next_u, 0, shape.K, lane);
        }
        const int row = i / shape.weight_sharing - share.first_row;
        typename Tile::Values u_hat;
        predict<P, T, Tile>(u_hat, 0, weight + row * weight_elements, first_u,
                            InputRows<T>(u, tile, i, shape, lane), shape, lane);
        add(sum, u_hat, staged, tile, i);
      }
    }
    __syncthreads();  // the staged states are read
    add_over_lanes<Tile>(sum, exchange, plan, share, shape.J, lane);
    if (share.lane_of_capsules == 0 && share.slot < count) {
      float4* to = partial + (std::size_t(share.capsule_group) * tiles + tile) * tile_size;
#pragma unroll
      for (int n = 0; n < Tile::kFragments; ++n) {
        if (Tile::has(n / Tile::DT, shape.J)) {
          to[n * kWarpSize + lane.index] = make_float4(sum[n][0], sum[n][1], sum[n][2], sum[n][3]);
        }
      }
    }
  }
}

// The sum of the partial sums of one output capsule of a tile, in a fixed order, by all warps of a
// block; its first warp gets it. `offset` is that of the capsule in a [tiles][tile] array.
template <int DT>
__device__ __forceinline__ void add_partial_sums(float (&sum)[DT][4], const float4* partial,
                                                 std::size_t offset, std::size_t group_stride,
                                                 int capsule_groups, float4* exchange,
                                                 const Lane& lane) {
  const int warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int n = 0; n < DT; ++n) {
    for (int e = 0; e < 4; ++e) sum[n][e] = 0.0f;
  }
  const auto add = [&](const float4* from) {
#pragma unroll
    for (int n = 0; n < DT; ++n) {
      const float4 x = from[n * kWarpSize + lane.index];
      sum[n][0] += x.x;
      sum[n][1] += x.y;
      sum[n][2] += x.z;
      sum[n][3] += x.w;
    }
  };
#pragma unroll 4
  for (int group = warp; group < capsule_groups; group += kSweepWarps) {
    add(partial + group * group_stride + offset);
  }
  __syncthreads();  // `exchange` is free
  if (warp > 0) {
#pragma unroll
    for (int n = 0; n < DT; ++n) {
      exchange[((warp - 1) * DT + n) * kWarpSize + lane.index] =
          make_float4(sum[n][0], sum[n][1], sum[n][2], sum[n][3]);
    }
  }
  __syncthreads();
  if (warp == 0) {
    for (int other = 0; other < kSweepWarps - 1; ++other) add(exchange + other * DT * kWarpSize);
  }
}

// Visits the elements of one output capsule j of a tile that this lane holds:
// visit(n, e, b, d) for element e of fragment n, sample b and dimension d, which may lie past the
// batch and past D.
template <int DT, class Visit>
__device__ __forceinline__ void for_each_element(int tile, const Lane& lane, Visit visit) {
#pragma unroll
  for (int n = 0; n < DT; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      visit(n, e, tile * kTileSamples + lane.g + (e < 2 ? 0 : 8),
            n * kTileDims + 2 * lane.q + e % 2);
    }
  }
}

}  // namespace capsule_kernels::cuda

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

// A lane's four values of a fragment, as they lie in memory.
__device__ __forceinline__ void add_to(float (&sum)[4], const float4& x) {
  sum[0] += x.x;
  sum[1] += x.y;
  sum[2] += x.z;
  sum[3] += x.w;
}

__device__ __forceinline__ float4 packed(const float (&x)[4]) {
  return make_float4(x[0], x[1], x[2], x[3]);
}

// A block of the persistent grid.
template <class P, class T, class Tile>
struct SweepBlock {
  static constexpr int DT = Tile::DT;
  using Values = typename Tile::Values;

  const Shape& shape;
  const SweepPlan& plan;
  const Share share;
  const Lane lane;
  const T* u;
  const int tiles;               // of 16 samples
  const int tile_size;           // of a state tile [fragments][32], in float4s, as all below
  const std::size_t state_size;  // of a state [tiles][tile]
  T* const weight;               // on chip: W of its capsules
  float4* const exchange;        // on chip

  __device__ __forceinline__ SweepBlock(const Shape& shape, const SweepPlan& plan, const void* u)
      : shape(shape),
        plan(plan),
        share(shape, plan),
        u(static_cast<const T*>(u)),
        tiles(ceil_div(shape.B, kTileSamples)),
        tile_size(shape.J * DT * kWarpSize),
        state_size(std::size_t(tiles) * tile_size),
        weight(static_cast<T*>(shared_memory())),
        exchange(
            reinterpret_cast<float4*>(static_cast<char*>(shared_memory()) + plan.weight_bytes)) {}

  // W of the block's capsules to chip; it is there for the first sweep.
  __device__ __forceinline__ void bring_weight(const void* all) const {
    const int rows = (share.last_capsule - 1) / shape.weight_sharing + 1 - share.first_row;
    const std::size_t row_size = std::size_t(shape.J) * shape.D * shape.K;
    load_weight<P>(weight, static_cast<const T*>(all) + share.first_row * row_size, rows, shape,
                   Padded(shape), threadIdx.x, blockDim.x);
  }

  // One sweep. `add(sum, predict, staged, tile, i)` adds u_hat of capsule i, weighted, to the sum;
  // `predict(x, more)` sets x to it, or adds it to x; the `state_count` state tiles of `states` lie
  // at staged[0..] on chip. `partial` is [G_i][tiles][tile].
  template <class Add>
  __device__ __forceinline__ void sweep(const float4* const* states, int state_count,
                                        float4* partial, Add add) const {
    const int weight_elements = shape.J * DT * kTileDims * Tile::padded_K(shape.K);
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

      Values sum;
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
        const InputRows<T, Tile> rows(u, tile, shape, lane);
        // u of the next capsule is loaded while this one is worked on.
        float next_u[4] = {};
        int i = share.first_capsule + share.lane_of_capsules;
        if (i < share.last_capsule) rows.load(next_u, i, 0, shape.K, lane);
        for (; i < share.last_capsule; i += share.lanes) {
          const float first_u[4] = {next_u[0], next_u[1], next_u[2], next_u[3]};
          if (i + share.lanes < share.last_capsule) {
            rows.load(next_u, i + share.lanes, 0, shape.K, lane);
          }
          // A division takes longer than a product of tensor cores.
          const int row =
              (shape.weight_sharing == 1 ? i : i / shape.weight_sharing) - share.first_row;
          const auto predict_i = [&](Values& x, bool more) {
            predict<P, T, Tile>(x, 0, weight + row * weight_elements, first_u, rows, i, shape, lane,
                                more);
          };
          add(sum, predict_i, staged, tile, i);
        }
      }
      __syncthreads();  // the staged states are read
      add_over_lanes(sum);
      if (share.lane_of_capsules == 0 && share.slot < count) {
        float4* to = partial + share.capsule_group * state_size + std::size_t(tile) * tile_size;
#pragma unroll
        for (int n = 0; n < Tile::kFragments; ++n) {
          if (Tile::has(n / DT, shape.J)) to[n * kWarpSize + lane.index] = packed(sum[n]);
        }
      }
    }
  }

  // Adds the partial sums of all capsule groups, in a fixed order; the output capsules of all tiles
  // are dealt to the blocks. `finish(sum, tile, j, offset)` gets each sum, in the first warp; the
  // capsule begins at `offset` of a state.
  template <class Finish>
  __device__ __forceinline__ void add_partial_sums(const float4* partial, Finish finish) const {
    for (int item = blockIdx.x; item < tiles * shape.J; item += gridDim.x) {
      const int tile = item / shape.J, j = item % shape.J;
      const std::size_t offset = std::size_t(tile) * tile_size + j * DT * kWarpSize;
      float sum[DT][4] = {};
      const auto add = [&](const float4* from) {
#pragma unroll
        for (int n = 0; n < DT; ++n) add_to(sum[n], from[n * kWarpSize + lane.index]);
      };
#pragma unroll 4
      for (int group = share.warp; group < plan.capsule_groups; group += kSweepWarps) {
        add(partial + group * state_size + offset);
      }
      __syncthreads();  // `exchange` is free
      if (share.warp > 0) {
#pragma unroll
        for (int n = 0; n < DT; ++n) {
          exchange[((share.warp - 1) * DT + n) * kWarpSize + lane.index] = packed(sum[n]);
        }
      }
      __syncthreads();
      if (share.warp > 0) continue;
      for (int other = 0; other < kSweepWarps - 1; ++other) add(exchange + other * DT * kWarpSize);
      finish(sum, tile, j, offset);
    }
  }

 private:
  // Adds the sums of the warps that share a tile, in a fixed order, into those of its first warp.
  // `exchange` holds a tile for half of the warps.
  __device__ __forceinline__ void add_over_lanes(Values& sum) const {
    for (int half = share.lanes / 2; half >= 1; half /= 2) {
      const int sender = share.lane_of_capsules - half;
      const int place = (sender >= 0 ? sender : share.lane_of_capsules) * plan.tiles_per_pass;
      float4* tile = exchange + (place + share.slot) * tile_size + lane.index;
      if (sender >= 0 && sender < half) {
#pragma unroll
        for (int n = 0; n < Tile::kFragments; ++n) {
          if (Tile::has(n / DT, shape.J)) tile[n * kWarpSize] = packed(sum[n]);
        }
      }
      __syncthreads();
      if (share.lane_of_capsules < half) {
#pragma unroll
        for (int n = 0; n < Tile::kFragments; ++n) {
          if (Tile::has(n / DT, shape.J)) add_to(sum[n], tile[n * kWarpSize]);
        }
      }
      __syncthreads();
    }
  }
};

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

// The persistent grid of the forward and of the backward's inner sweeps.
//
// A block keeps the W of its input capsules in shared memory for the whole launch. A sweep goes
// over (its samples) x (its capsules): a warp holds the states of a tile and its sum in registers,
// weighs each u_hat with coefficients that it computes from the states, and the block leaves its
// sum of coefficient * u_hat per sample in the workspace. The blocks then add the partial sums of
// all capsule groups, in a fixed order.
#pragma once

#include "squash.cuh"
#include "tile.cuh"

namespace capsule_kernels::cuda {

// What a block of the grid, and a warp of it, works on.
struct Share {
  int sample_group, capsule_group;
  int first_capsule, last_capsule;
  int first_row;  // of W on chip
  int warp;
  int lane_of_capsules;  // which of the `lanes` interleaved shares of the capsules
  int slot;              // which tile of a pass
  int lanes;

  __device__ __forceinline__ Share(const Shape& shape, const SweepPlan& plan)
      : sample_group(plan.by_capsule_groups.divide(blockIdx.x)),
        capsule_group(blockIdx.x - sample_group * plan.capsule_groups),
        first_capsule(capsule_group * plan.capsules),
        last_capsule(min(first_capsule + plan.capsules, shape.I)),
        first_row(plan.by_weight_sharing.divide(first_capsule)),
        warp(threadIdx.x / kWarpSize),
        lane_of_capsules(plan.by_tiles_per_pass.divide(warp)),
        slot(warp - lane_of_capsules * plan.tiles_per_pass),
        lanes(plan.by_tiles_per_pass.divide(kSweepWarps)) {}
};

// `count` rows of W [.., J, D, K] to chip in the order of the fragments, [K / 8][fragments][32]
// each, prepared for the products of P, and 0 past J, D and K; all of `threads` take part. They are
// there after a barrier.
template <class P, class Tile, class T>
__device__ __forceinline__ void load_weight(Quad<T>* to, const T* from, int count,
                                            const Shape& shape, int thread, int threads) {
  const int fragments = Tile::fragments_of(shape.J);
  const int quads = fragments * kWarpSize * (Tile::padded_K(shape.K) / kStepDims);
  const std::size_t row_size = std::size_t(shape.J) * shape.D * shape.K;
  for (int e = thread; e < quads; e += threads) {
    const int lane = e % kWarpSize, n = e / kWarpSize % fragments, g = lane / 4;
    const int k = e / kWarpSize / fragments * kStepDims + 2 * (lane % 4);
    int j = 0, d = 0;
    for_all_groups<Tile>([&](auto group) {
      constexpr int kFragments = Tile::fragments(group.value);
      const int m = n - Tile::first_fragment(group.value);
      if (m < 0 || m >= kFragments) return;
      j = Tile::first_capsule(group.value) + g / Tile::sharers(group.value);
      d = (g % Tile::sharers(group.value) * kFragments + m) * 2;
    });
    const bool has_first = j < shape.J && d < shape.D, has_second = has_first && d + 1 < shape.D;
    const T* source = from + (std::size_t(j) * shape.D + d) * shape.K + k;
    Quad<T>* target = to + e - lane + swizzled(lane);
#pragma unroll 8
    for (int row = 0; row < count; ++row) {
      const Pair<T> x = load_pair<Tile>(source, has_first, k, shape.K);
      const Pair<T> y = load_pair<Tile>(source + shape.K, has_second, k, shape.K);
      *target = {{P::prepared(x.first), P::prepared(y.first), P::prepared(x.second),
                  P::prepared(y.second)}};
      source += row_size;
      target += quads;
    }
  }
}

// A block of the persistent grid.
template <class P, class T, class Tile>
struct SweepBlock {
  using Values = typename Tile::Values;
  static constexpr int kCapsuleLanes =
      Tile::D / 4;  // that hold an output capsule, where it is whole

  const Shape& shape;
  const SweepPlan& plan;
  const Share share;
  const Lane lane;
  const T* u;
  const int tiles;               // of 8 samples
  const int fragments;           // of a tile
  const int tile_size;           // of a state tile [fragments][32], in float4s, as all below
  const std::size_t state_size;  // of a state [tiles][tile], or of partial sums [B][J][D] (padded)
  const int weight_quads;        // of W_i on chip
  Quad<T>* const weight;         // on chip: W of its capsules
  float4* const exchange;        // on chip

  __device__ __forceinline__ SweepBlock(const Shape& shape, const SweepPlan& plan, const void* u)
      : shape(shape),
        plan(plan),
        share(shape, plan),
        u(static_cast<const T*>(u)),
        tiles(plan.tiles),
        fragments(Tile::fragments_of(shape.J)),
        tile_size(fragments * kWarpSize),
        state_size(plan.state_size),
        weight_quads(tile_size * (Tile::padded_K(shape.K) / kStepDims)),
        weight(static_cast<Quad<T>*>(shared_memory())),
        exchange(
            reinterpret_cast<float4*>(static_cast<char*>(shared_memory()) + plan.weight_bytes)) {}

  // W of the block's capsules to chip.
  __device__ __forceinline__ void bring_weight(const void* all) const {
    const std::size_t row_size = std::size_t(shape.J) * shape.D * shape.K;
    load_weight<P, Tile>(weight, static_cast<const T*>(all) + share.first_row * row_size,
                         row_of(share.last_capsule - 1) + 1, shape, threadIdx.x, blockDim.x);
    __syncthreads();
  }

  // One sweep. `add(sum, predict, states, tile, i)` adds u_hat of capsule i, weighted, to the sum;
  // `predict(x)` sets x to it; `states` are the warp's tile of each of `from`. `partial` is
  // [G_i][B][J][D], padded.
  template <int kStates, class Add>
  __device__ __forceinline__ void sweep(const float4* const (&from)[kStates > 0 ? kStates : 1],
                                        float4* partial, Add add) const {
    for_each_pass([&](int first) {
      const int tile = first + share.slot;
      Values sum;
      set_zero(sum);
      if (tile < tiles) {
        Values states[kStates > 0 ? kStates : 1];
#pragma unroll
        for (int n = 0; n < kStates; ++n) {
          load_state<Tile>(states[n], from[n] + std::size_t(tile) * tile_size, shape.J, lane);
        }
        const InputRow<T, Tile> row[1] = {{u, tile, shape, lane}};
        for_each_capsule(row, share.lane_of_capsules, share.lanes,
                         [&](int i, const float (&first_u)[1][2]) {
                           const auto predict_i = [&](Values& x) {
                             predict<P, T, Tile>(x, weight_of(i), first_u, row, i, shape, lane);
                           };
                           add(sum, predict_i, states, tile, i);
                         });
      }
      add_over_lanes(sum, share.lane_of_capsules, share.lanes, share.slot);
      if (share.lane_of_capsules == 0) write_partial(partial, sum, tile);
    });
  }

  // The sweep with all coefficients 1, `kTiles` tiles a warp: they share what is read of W.
  template <int kTiles>
  __device__ __forceinline__ void sweep_alike(float4* partial) const {
    const int slots = plan.tiles_per_pass / kTiles, slot = share.warp % slots;
    const int lane_of_capsules = share.warp / slots, lanes = kSweepWarps / slots;
    for_each_pass([&](int first) {
      const int tile = first + slot * kTiles;
      Values sums[kTiles];
      InputRow<T, Tile> rows[kTiles];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        set_zero(sums[m]);
        rows[m] = {u, tile + m, shape, lane};
      }
      for_each_capsule(rows, lane_of_capsules, lanes,
                       [&](int i, const float (&first_u)[kTiles][2]) {
                         add_predictions<P>(sums, weight_of(i), first_u, rows, i, shape, lane);
                       });
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        add_over_lanes(sums[m], lane_of_capsules, lanes, slot);
        if (lane_of_capsules == 0) write_partial(partial, sums[m], tile + m);
      }
    });
  }

  // Adds the partial sums of all capsule groups, in a fixed order. `finish(sum, b, j, d)` gets each
  // sum once, for d ... d + 3; `kCapsuleLanes` lanes have a capsule whole.
  template <class Finish>
  __device__ __forceinline__ void add_partial_sums(const float4* partial, Finish finish) const {
    // Each half of the block takes 32 float4s at a time; its warps split the groups.
    constexpr int warps = kSweepWarps / 2;
    const int half = share.warp / warps, warp = share.warp % warps;
    const int items = tiles * fragments;
    for (int first = blockIdx.x; first < items; first += 2 * gridDim.x) {
      const int item = first + half * gridDim.x, e = item * kWarpSize + lane.index;
      float sum[4] = {};
      if (item < items) {
#pragma unroll 4
        for (int group = warp; group < plan.capsule_groups; group += warps) {
          add_to(sum, partial[group * state_size + e]);
        }
      }
      __syncthreads();  // `exchange` is free
      if (warp > 0) exchange[share.warp * kWarpSize + lane.index] = packed(sum);
      __syncthreads();
      if (warp > 0 || item >= items) continue;
      for (int other = 1; other < warps; ++other) {
        add_to(sum, exchange[(share.warp + other) * kWarpSize + lane.index]);
      }
      const int capsule = e / kCapsuleLanes, J = fragments * kTileRows / Tile::D;
      finish(sum, capsule / J, capsule % J, e % kCapsuleLanes * 4);
    }
  }

 private:
  // The row of W on chip of input capsule i.
  __device__ __forceinline__ int row_of(int i) const {
    return plan.by_weight_sharing.divide(i) - share.first_row;
  }

  __device__ __forceinline__ const Quad<T>* weight_of(int i) const {
    return weight + row_of(i) * weight_quads;
  }

  // Calls visit(first tile) for each pass over the samples of the block.
  template <class Visit>
  __device__ __forceinline__ void for_each_pass(Visit visit) const {
    for (int first = share.sample_group * plan.tiles_per_pass; first < tiles;
         first += plan.sample_groups * plan.tiles_per_pass) {
      visit(first);
    }
  }

  // Calls visit(i, the first elements of u_i of each row) for a warp's capsules. u of the next
  // capsule is loaded while one is worked on, once too often at the end: a load of what is there is
  // cheaper than a branch.
  template <int kTiles, class Visit>
  __device__ __forceinline__ void for_each_capsule(const InputRow<T, Tile> (&rows)[kTiles],
                                                   int lane_of_capsules, int lanes,
                                                   Visit visit) const {
    float next_u[kTiles][2] = {};
    const auto load = [&](int i) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        rows[m].load(next_u[m], min(i, shape.I - 1), 0, shape.K, lane);
      }
    };
    load(share.first_capsule + lane_of_capsules);
    for (int i = share.first_capsule + lane_of_capsules; i < share.last_capsule; i += lanes) {
      float first_u[kTiles][2];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        for (int e = 0; e < 2; ++e) first_u[m][e] = next_u[m][e];
      }
      load(i + lanes);
      visit(i, first_u);
    }
  }

  // Adds the sums of the warps that share a tile, in a fixed order, into those of its first warp.
  // `exchange` holds a tile for half of the warps.
  __device__ __forceinline__ void add_over_lanes(Values& sum, int lane_of_capsules, int lanes,
                                                 int slot) const {
    const int slots = kSweepWarps / lanes;
    for (int half = lanes / 2; half >= 1; half /= 2) {
      const int sender = lane_of_capsules - half;
      const int place = (sender >= 0 ? sender : lane_of_capsules) * slots + slot;
      float4* tile = exchange + place * tile_size + lane.index;
      __syncthreads();  // `exchange` is free
      if (sender >= 0 && sender < half) {
        for_each_fragment<Tile>(shape.J, [&](int, int n) { tile[n * kWarpSize] = packed(sum[n]); });
      }
      __syncthreads();
      if (lane_of_capsules < half) {
        for_each_fragment<Tile>(shape.J, [&](int, int n) { add_to(sum[n], tile[n * kWarpSize]); });
      }
    }
  }

  // The sum of a tile, if there is one, in its place.
  __device__ __forceinline__ void write_partial(float4* partial, const Values& sum,
                                                int tile) const {
    if (tile >= tiles) return;
    float4* const to = partial + share.capsule_group * state_size;
    const int J = fragments * kTileRows / Tile::D;
    for_each_group<Tile>(shape.J, [&](auto group) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int b = tile * kTileSamples + 2 * lane.q + e;
        const int row = b * J + lane.capsule<Tile>(group.value);
        float* capsule = reinterpret_cast<float*>(to) + std::size_t(row) * Tile::D +
                         lane.first_dim<Tile>(group.value);
        constexpr int kFirst = Tile::first_fragment(group.value);
#pragma unroll
        for (int m = 0; m < Tile::fragments(group.value); ++m) {
          const auto& x = sum[kFirst + m];
          reinterpret_cast<Pair<float>*>(capsule)[m] = {x[e], x[2 + e]};
        }
      }
    });
  }
};

}  // namespace capsule_kernels::cuda

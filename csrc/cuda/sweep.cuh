// The persistent grid of the forward and of the backward's inner sweeps.
//
// A block keeps the W of its input capsules in shared memory for the whole launch. A sweep goes
// over (its samples) x (its capsules): a warp holds the states of a tile and its sum in registers,
// weighs each u_hat with coefficients that it computes from the states, and the block leaves its
// sum of coefficient * u_hat per sample in the workspace. The blocks then add the partial sums of
// all capsule groups, in a fixed order. Where blocks form clusters, the sums of a cluster's blocks
// are added on chip first, and each cluster adds those of the others for itself.
#pragma once

#include "coefficients.cuh"
#include "share.cuh"
#include "squash.cuh"
#include "weight.cuh"

namespace capsule_kernels::cuda {

// A block of the persistent grid.
template <class P, class T, class Tile>
struct SweepBlock {
  using Values = typename Tile::Values;
  static constexpr int kCapsuleLanes =
      Tile::D / 4;  // that hold an output capsule, where it is whole
  // Capsules of a piece of W on its way to chip: as many as there are warps, so that all of them
  // stand at the same piece, however they share the capsules.
  static constexpr int kPiece = kSweepWarps;
  static constexpr int kPiecesAhead = 2;

  const Shape& shape;
  const SweepPlan& plan;
  const Share share;
  const Lane lane;
  const T* u;
  const T* all_weight;           // of all capsules
  const int tiles;               // of 8 samples
  const int fragments;           // of a tile
  const int tile_size;           // of a state tile [fragments][32], in float4s, as all below
  const std::size_t state_size;  // of a state [tiles][tile], or of partial sums [B][J][D] (padded)
  const int weight_quads;        // of W_i on chip
  Rows<T>* const weight;         // on chip: W of its capsules
  float4* const exchange;        // on chip

  __device__ __forceinline__ SweepBlock(const Shape& shape, const SweepPlan& plan, const void* u,
                                        const void* weight, unsigned* counters)
      : shape(shape),
        plan(plan),
        share(shape, plan, counters),
        u(static_cast<const T*>(u)),
        all_weight(static_cast<const T*>(weight)),
        tiles(plan.tiles),
        fragments(Tile::fragments_of(shape.J)),
        tile_size(fragments * kWarpSize),
        state_size(plan.state_size),
        weight_quads(tile_size * (Tile::padded_K(shape.K) / kStepDims)),
        weight(static_cast<Rows<T>*>(shared_memory())),
        exchange(
            reinterpret_cast<float4*>(static_cast<char*>(shared_memory()) + plan.weight_bytes)) {}

  // W of the block's capsules sets off for the chip; the first sweep, told that it `arrives`, takes
  // it piece by piece.
  __device__ __forceinline__ void send_for_weight() const {
    for (int n = 0; n < kPiecesAhead; ++n) send_for_piece(share.first_capsule + n * kPiece);
  }

  // The partial sums of sweep t, of `all`: where clusters wait for each other but once, one may
  // still read those of the last.
  __device__ __forceinline__ float4* partial_of(float4* all, int t) const {
    return share.clustered() && t % 2 == 1 ? all + here(plan.sums) * state_size : all;
  }

  // One sweep. `add(sum, predict, states, tile, i)` adds u_hat of capsule i, weighted, to the sum;
  // `predict(x)` sets x to it; `states` are the warp's tile of each of `from`. `partial` is
  // [sums][B][J][D], padded.
  template <int kStates, class Add>
  __device__ __forceinline__ void sweep(bool arrives,
                                        const float4* const (&from)[kStates > 0 ? kStates : 1],
                                        float4* partial, Add add) const {
    for_each_pass<1>(arrives, partial, [&](Values(&sums)[1], int first, bool arrives) {
      const int tile = first + share.slot;
      if (tile < tiles) {
        Values states[kStates > 0 ? kStates : 1];
#pragma unroll
        for (int n = 0; n < kStates; ++n) {
          load_state<Tile>(states[n], from[n] + std::size_t(tile) * tile_size, shape.J, lane);
        }
        const InputRow<T, Tile> row[1] = {{u, tile, shape, lane}};
        for_each_capsule(arrives, row, share.lane_of_capsules, share.lanes,
                         [&](int i, const float (&first_u)[1][2]) {
                           const auto predict_i = [&](Values& x) {
                             predict<P, T, Tile>(x, weight_of(i), first_u, row, i, shape, lane);
                           };
                           add(sums[0], predict_i, states, tile, i);
                         });
      } else if (arrives) {
        for (int i = share.first_capsule; i < share.last_capsule; i += kPiece) receive_piece(i);
      }
    });
  }

  // The sweep with all coefficients 1, `kTiles` tiles a warp: they share what is read of W.
  template <int kTiles>
  __device__ __forceinline__ void sweep_alike(bool arrives, float4* partial) const {
    const int slots = plan.tiles_per_pass / kTiles;
    const int lane_of_capsules = share.warp / slots, lanes = kSweepWarps / slots;
    for_each_pass<kTiles>(arrives, partial, [&](Values(&sums)[kTiles], int first, bool arrives) {
      InputRow<T, Tile> rows[kTiles];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        rows[m] = {u, first + share.warp % slots * kTiles + m, shape, lane};
      }
      for_each_capsule(arrives, rows, lane_of_capsules, lanes,
                       [&](int i, const float (&first_u)[kTiles][2]) {
                         add_predictions<P>(sums, weight_of(i), first_u, rows, i, shape, lane);
                       });
    });
  }

  // Calls visit(item) for the items of the block, 32 float4s [B][J][D] of a state each, or -1 where
  // there are no more, as often in every warp; `teams` of warps take turns. The blocks that share a
  // copy of the samples' states, all or those of a cluster, share its items.
  template <class Visit>
  __device__ __forceinline__ void for_each_item(int teams, int team, Visit visit) const {
    const int width = plan.tiles_per_pass;
    const int place = share.clustered() ? share.rank() : here(share.capsule_group);
    const int stride = share.clustered() ? kClusterBlocks : plan.capsule_groups;
    for (int first = share.sample_group_again() * width; first < tiles;
         first += plan.sample_groups * width) {
      const int end = min(first + width, tiles) * fragments;
      for (int block = first * fragments + place; block < end; block += stride * teams) {
        const int item = block + team * stride;
        visit(item < end ? item : -1);
      }
    }
  }

  // Adds the partial sums in a fixed order. `finish(sum, b, j, d)` gets each sum once, for
  // d ... d + 3; `kCapsuleLanes` lanes have a capsule whole.
  template <class Finish>
  __device__ __forceinline__ void add_partial_sums(const float4* partial, Finish finish) const {
    // Many sums are split among the warps of half of the block.
    const int warps = share.clustered() ? 1 : here(kSweepWarps / 2), warp = share.warp % warps;
    for_each_item(kSweepWarps / warps, share.warp / warps, [&](int item) {
      constexpr int kAhead = 12;
      const int e = item * kWarpSize + here(lane.index);
      float sum[4] = {};
      for (int n = warp; item >= 0 && n < plan.sums; n += kAhead * warps) {
        float4 ahead[kAhead];  // all on their way before the first of them is added
#pragma unroll
        for (int m = 0; m < kAhead; ++m) {
          const int next = n + m * warps;
          ahead[m] = next < plan.sums ? partial[next * state_size + e]
                                      : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
#pragma unroll
        for (int m = 0; m < kAhead; ++m) add_to(sum, ahead[m]);
      }
      if (warps > 1) {
        __syncthreads();  // `exchange` is free
        if (warp > 0) exchange[share.warp * kWarpSize + lane.index] = packed(sum);
        __syncthreads();
      }
      if (warp > 0 || item < 0) return;
      for (int other = 1; other < warps; ++other) {
        add_to(sum, exchange[(share.warp + other) * kWarpSize + lane.index]);
      }
      const int capsule = e / kCapsuleLanes, J = fragments * kTileRows / Tile::D;
      finish(sum, capsule / J, capsule % J, e % kCapsuleLanes * 4);
    });
  }

 private:
  // The row of W on chip of input capsule i.
  __device__ __forceinline__ int row_of(int i) const {
    return plan.by_weight_sharing.divide(i) - share.first_row;
  }

  __device__ __forceinline__ const Prepared<P, T>* weight_of(int i) const {
    return reinterpret_cast<const Prepared<P, T>*>(weight + row_of(i) * weight_quads);
  }

  // The rows of W on chip that the capsules before i touch.
  __device__ __forceinline__ int rows_before(int i) const {
    return i == share.first_capsule ? 0 : row_of(min(i, share.last_capsule) - 1) + 1;
  }

  // The piece of W of capsule i and those behind it sets off; a warp takes a row.
  __device__ __forceinline__ void send_for_piece(int i) const {
    const int row = rows_before(i) + here(share.warp);
    if (row < rows_before(i + kPiece)) {
      const unsigned row_size = shape.J * shape.D * shape.K;  // one row fits on chip
      copy_weight<Tile>(weight + row * weight_quads,
                        all_weight + std::size_t(share.first_row + row) * row_size, shape, lane);
    }
    end_group_of_copies();
  }

  // It is there for the whole block, and a later one sets off.
  __device__ __forceinline__ void receive_piece(int i) const {
    wait_for_all_but<kPiecesAhead - 1>();
    const int row = rows_before(i) + here(share.warp);
    if (row < rows_before(i + kPiece)) {
      prepare_weight<P, Tile>(weight + row * weight_quads, shape, lane);
    }
    __syncthreads();
    send_for_piece(i + kPiecesAhead * kPiece);
  }

  // Calls sweep(sums, first tile, whether W arrives meanwhile) for each pass over the samples of
  // the block, and leaves the sums of its warps' tiles in the workspace. W arrives in the first. A
  // cluster adds the sums of one pass after the sweep of the next.
  template <int kTiles, class Sweep>
  __device__ __forceinline__ void for_each_pass(bool arrives, float4* partial, Sweep sweep) const {
    const int slots = plan.tiles_per_pass / kTiles, slot = share.warp % slots;
    const int lane_of_capsules = share.warp / slots;
    const int start = share.sample_group * plan.tiles_per_pass;
    const int step = plan.sample_groups * plan.tiles_per_pass;
    float4* place = exchange;
    for (int first = start;; first += step) {
      Values sums[kTiles];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) set_zero(sums[m]);
      if (first < tiles) sweep(sums, first, arrives && first == start);
      if (share.clustered() && first > start) {
        cluster_wait();
        add_over_cluster<kTiles>(partial, place, first - step);
        place = place == exchange ? exchange + kSweepWarps / 2 * tile_size : exchange;
      }
      if (first >= tiles) break;
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        add_over_lanes(place, sums[m], lane_of_capsules, kSweepWarps / slots, slot);
      }
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        if (lane_of_capsules > 0) continue;
        if (share.clustered()) {
          store_tile(place + (m * slots + slot) * tile_size, sums[m]);
        } else {
          write_partial(partial, sums[m], first + slot * kTiles + m);
        }
      }
      if (share.clustered()) cluster_arrive();
    }
  }

  __device__ __forceinline__ void store_tile(float4* to, const Values& sum) const {
    for_each_fragment<Tile>(shape.J,
                            [&](int, int n) { to[n * kWarpSize + lane.index] = packed(sum[n]); });
  }

  // Adds the sums of a pass that the blocks of the cluster have at `place`; each block takes a
  // share of the fragments.
  template <int kTiles>
  __device__ __forceinline__ void add_over_cluster(float4* partial, const float4* place,
                                                   int first) const {
    const int slots = plan.tiles_per_pass / kTiles;
    for (int unit = here(share.rank()) + kClusterBlocks * share.warp;
         unit < plan.tiles_per_pass * fragments; unit += kClusterBlocks * kSweepWarps) {
      float4 of_block[kClusterBlocks];
#pragma unroll
      for (int rank = 0; rank < kClusterBlocks; ++rank) {
        of_block[rank] = load_from_block(place + unit * kWarpSize + lane.index, rank);
      }
      float sum[4] = {};
#pragma unroll
      for (int rank = 0; rank < kClusterBlocks; ++rank) add_to(sum, of_block[rank]);
      const int at = here(unit) / fragments, tile = first + at % slots * kTiles + at / slots;
      if (tile >= tiles) continue;
      for_each_group<Tile>(shape.J, [&](auto group) {
        const int m = unit % fragments - Tile::first_fragment(group.value);
        if (m < 0 || m >= Tile::fragments(group.value)) return;
        write_fragment(partial + share.cluster() * state_size, sum, tile, group, m);
      });
    }
  }

  // Calls visit(i, the first elements of u_i of each row) for a warp's capsules. u of the next
  // capsule is loaded while one is worked on, once too often at the end: a load of what is there is
  // cheaper than a branch.
  template <int kTiles, class Visit>
  __device__ __forceinline__ void for_each_capsule(bool arrives,
                                                   const InputRow<T, Tile> (&rows)[kTiles],
                                                   int lane_of_capsules, int lanes,
                                                   Visit visit) const {
    int i = share.first_capsule + lane_of_capsules, end = share.first_capsule;
    float next_u[kTiles][2] = {};
    InputRow<T, Tile> next[kTiles];  // from u of the next capsule on
    const auto load = [&](int distance) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        next[m].u += distance * shape.K;
        next[m].load(next_u[m], 0, 0, shape.K, lane);
      }
    };
#pragma unroll
    for (int m = 0; m < kTiles; ++m) next[m] = rows[m];
    load(min(i, shape.I - 1));
    do {
      if (arrives) receive_piece(end);
      end = arrives ? min(end + kPiece, share.last_capsule) : share.last_capsule;
      for (; i < end; i += lanes) {
        float first_u[kTiles][2];
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          for (int e = 0; e < 2; ++e) first_u[m][e] = next_u[m][e];
        }
        load(i + lanes < share.last_capsule ? lanes : 0);
        visit(i, first_u);
      }
    } while (end < share.last_capsule);
  }

  // Adds the sums of the warps that share a tile, in a fixed order, into those of its first warp.
  // `place` has room for a tile of half of the warps.
  __device__ __forceinline__ void add_over_lanes(float4* place, Values& sum, int lane_of_capsules,
                                                 int lanes, int slot) const {
    const int slots = kSweepWarps / lanes;
    for (int half = lanes / 2; half >= 1; half /= 2) {
      const int sender = lane_of_capsules - half;
      float4* tile = place + ((sender >= 0 ? sender : lane_of_capsules) * slots + slot) * tile_size;
      __syncthreads();  // `place` is free
      if (sender >= 0 && sender < half) store_tile(tile, sum);
      __syncthreads();
      if (lane_of_capsules < half) {
        tile += lane.index;
        for_each_fragment<Tile>(shape.J, [&](int, int n) { add_to(sum[n], tile[n * kWarpSize]); });
      }
    }
  }

  // The sum of a tile, if there is one, in its place.
  __device__ __forceinline__ void write_partial(float4* partial, const Values& sum,
                                                int tile) const {
    if (tile >= tiles) return;
    for_each_group<Tile>(shape.J, [&](auto group) {
#pragma unroll
      for (int m = 0; m < Tile::fragments(group.value); ++m) {
        write_fragment(partial + here(share.capsule_group) * state_size,
                       sum[Tile::first_fragment(group.value) + m], tile, group, m);
      }
    });
  }

  // Fragment m of a group of output capsules, in `to` [B][J][D].
  template <class Group>
  __device__ __forceinline__ void write_fragment(float4* to, const float (&x)[4], int tile,
                                                 Group group, int m) const {
    const int J = fragments * kTileRows / Tile::D;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int b = tile * kTileSamples + 2 * lane.q + e;
      const int row = b * J + lane.capsule<Tile>(group.value);
      float* capsule = reinterpret_cast<float*>(to) + std::size_t(row) * Tile::D +
                       lane.first_dim<Tile>(group.value);
      reinterpret_cast<Pair<float>*>(capsule)[m] = {x[e], x[2 + e]};
    }
  }
};

}  // namespace capsule_kernels::cuda

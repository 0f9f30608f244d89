// The persistent grid of the forward and of the backward's inner sweeps.
//
// A block keeps the W of its input capsules in shared memory for the whole launch. A sweep goes
// over (its samples) x (its capsules): a warp holds the states of a tile and its sum in registers,
// weighs each u_hat with coefficients that it computes from the states, and the block leaves its
// sum of coefficient * u_hat per sample in the workspace. The blocks then add the partial sums of
// all capsule groups, in a fixed order.
#pragma once

#include "block_sums.cuh"
#include "coefficients.cuh"
#include "squash.cuh"
#include "weight.cuh"

namespace capsule_kernels::cuda {

// A block of the persistent grid.
template <class P, class T, class Tile>
struct SweepBlock : BlockSums<Tile::D> {
  using Values = typename Tile::Values;
  using Sums = BlockSums<Tile::D>;
  using Sums::exchange;
  using Sums::fragments;
  using Sums::kCapsuleLanes;
  using Sums::lane;
  using Sums::plan;
  using Sums::share;
  using Sums::state_size;
  using Sums::tiles;
  // Capsules of a piece of W on its way to chip: as many as there are warps, so that all of them
  // stand at the same piece, however they share the capsules.
  static constexpr int kPiece = kSweepWarps;
  static constexpr int kPiecesAhead = 2;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  static constexpr int kMostAtATime = 1;  // nvcc finds too few registers for two
#else
  static constexpr int kMostAtATime = 2;
#endif

  const Shape& shape;
  const T* u;
  const T* all_weight;     // of all capsules
  const int tile_size;     // of a state tile [fragments][32], in float4s, as all below
  const int weight_quads;  // of W_i on chip
  Rows<T>* const weight;   // on chip: W of its capsules

  __device__ __forceinline__ SweepBlock(const Shape& shape, const SweepPlan& plan, const void* u,
                                        const void* weight, unsigned* counters)
      : Sums(shape, plan, counters, Tile::fragments_of(shape.J), plan.weight_bytes),
        shape(shape),
        u(static_cast<const T*>(u)),
        all_weight(static_cast<const T*>(weight)),
        tile_size(fragments * kWarpSize),
        weight_quads(tile_size * (Tile::padded_K(shape.K) / kStepDims)),
        weight(static_cast<Rows<T>*>(shared_memory())) {}

  // W of the block's capsules sets off for the chip; the first sweep, told that it `arrives`, takes
  // it piece by piece.
  __device__ __forceinline__ void send_for_weight() const {
    for (int n = 0; n < kPiecesAhead; ++n) send_for_piece(share.first_capsule + n * kPiece);
  }

  // One sweep. `add(count, sum, u_hat, states, tile, i)` adds u_hat of `count.value` capsules, i
  // and then each `plan.lanes` further, weighted, to the sum; `states` are the warp's tile of each
  // of `from`. `partial` is [G_i][B][J][D], padded.
  template <int kStates, class Add>
  __device__ __forceinline__ void sweep(bool arrives,
                                        const float4* const (&from)[kStates > 0 ? kStates : 1],
                                        float4* partial, Add add) const {
    for_each_pass<1>(arrives, partial, [&](Values(&sums)[1], int first, bool arrives) {
      // A warp without a tile goes along, past the batch, while W arrives.
      const int tile = first + share.slot();
      if (tile >= tiles && !arrives) return;
      Values states[kStates > 0 ? kStates : 1];
#pragma unroll
      for (int n = 0; n < kStates; ++n) {
        const std::size_t at = min(tile, tiles - 1);
        load_state<Tile>(states[n], from[n] + at * tile_size, shape.J, lane);
      }
      const InputRow<T, Tile> row[1] = {{u, tile, shape, lane}};
      for_each_capsule<kAtATime<kStates>>(arrives, row, share.lane_of_capsules(), plan.lanes,
                                          [&](auto count, int i, const auto& first_u) {
                                            Values u_hat[count.value];
#pragma unroll
                                            for (int n = 0; n < count.value; ++n) {
                                              const int capsule = i + n * plan.lanes;
                                              predict<P, T, Tile>(u_hat[n], weight_of(capsule),
                                                                  first_u[n], row, capsule, shape,
                                                                  lane);
                                            }
                                            add(count, sums[0], u_hat, states, tile, i);
                                          });
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
      for_each_capsule<1>(
          arrives, rows, lane_of_capsules, lanes, [&](auto, int i, const auto& first_u) {
            add_predictions<P>(sums, weight_of(i), first_u[0], rows, i, shape, lane);
          });
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
  // the block, and leaves the sums of its warps' tiles in the workspace. W arrives in the first.
  template <int kTiles, class Sweep>
  __device__ __forceinline__ void for_each_pass(bool arrives, float4* partial, Sweep sweep) const {
    const int start = share.sample_group() * plan.tiles_per_pass;
    const int step = plan.sample_groups * plan.tiles_per_pass;
    for (int first = start; first < tiles; first += step) {
      Values sums[kTiles];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) set_zero(sums[m]);
      sweep(sums, first, arrives && first == start);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) leave_sums<kTiles>(partial, sums[m], first + m);
    }
  }

  // Adds the sums of the warps that share a tile, in a fixed order, and writes them to the
  // workspace. Every warp shows its sum in the order of the fragments; all threads then collect 4
  // dimensions of 2 samples each, as a row of the workspace has them.
  template <int kTiles>
  __device__ __forceinline__ void leave_sums(float4* partial, const Values& sum, int first) const {
    const int slots = plan.tiles_per_pass / kTiles, lanes = kSweepWarps / slots;
    const int lane_of_capsules = share.warp / slots;
    float4* const shown = exchange + (share.warp % slots * lanes + lane_of_capsules) * tile_size;
    __syncthreads();  // `exchange` is free
    for_each_fragment<Tile>(shape.J, [&](int, int n) {
      shown[n * kWarpSize + collected(lane.index, n)] = packed(sum[n]);
    });
    __syncthreads();
    const int J = fragments * kTileRows / Tile::D;
    for (int unit = here(threadIdx.x); unit < slots * 4 * J * kCapsuleLanes; unit += blockDim.x) {
      const int d = unit % kCapsuleLanes * 4, j = unit / kCapsuleLanes % J;
      const int q = unit / (kCapsuleLanes * J) % 4, slot = unit / (4 * J * kCapsuleLanes);
      const int tile = first + slot * kTiles;
      if (tile >= tiles) break;
      const auto collect = [&](int d, float (&x)[4]) {
        const Place place = place_of<Tile>(j, d);
        const float4* from = exchange + (slot * lanes * fragments + place.fragment) * kWarpSize +
                             collected(place.g * 4 + q, place.fragment);
        for (int lane = 0; lane < lanes; ++lane) add_to(x, from[lane * tile_size]);
      };
      float low[4] = {}, high[4] = {};
      collect(d, low);
      collect(d + 2, high);
      float4* const to = partial + share.capsule_group() * state_size +
                         ((tile * kTileSamples + 2 * q) * J + j) * kCapsuleLanes + d / 4;
      to[0] = make_float4(low[0], low[2], high[0], high[2]);
      to[J * kCapsuleLanes] = make_float4(low[1], low[3], high[1], high[3]);
    }
  }

  // Where the value of a lane is shown: threads that collect consecutive dimensions meet other
  // banks of shared memory.
  static __device__ __forceinline__ int collected(int lane, int fragment) {
    return lane ^ fragment / 2 % 4;
  }

  // Capsules a warp works on at a time: while one waits, the other has something to do. One in the
  // first sweep, which waits for W, and where each has three products to wait for.
  template <int kStates>
  static constexpr int kAtATime =
      Tile::kKnown && kStates > 0 && P::kProducts == 1 ? kMostAtATime : 1;

  // Calls visit(count, i, the first elements of u of each capsule and row) for a warp's capsules,
  // `count.value` at a time: `kCount` of them, or one of what is left. u of the next capsules is
  // loaded while some are worked on, once too often at the end: a load of what is there is cheaper
  // than a branch. It comes from the L1, where it was asked for a turn before.
  template <int kCount, int kTiles, class Visit>
  __device__ __forceinline__ void for_each_capsule(bool arrives,
                                                   const InputRow<T, Tile> (&rows)[kTiles],
                                                   int lane_of_capsules, int lanes,
                                                   Visit visit) const {
    int i = share.first_capsule + lane_of_capsules, end = share.first_capsule;
    float next_u[kCount][kTiles][2] = {};
    InputRow<T, Tile> next[kTiles];  // from u of the next capsule on
    const int last = share.last_capsule, stride = lanes * shape.K;
    const auto load = [&](int capsule, int distance) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        next[m].u += distance;
#pragma unroll
        for (int n = 0; n < kCount; ++n) {
          InputRow<T, Tile> row = next[m];
          row.u += capsule + n * lanes < last ? n * stride : 0;
          row.load(next_u[n][m], 0, 0, shape.K, lane);
        }
      }
    };
    const auto step = [&](auto count) {
      float first_u[count.value][kTiles][2];
#pragma unroll
      for (int n = 0; n < count.value; ++n) {
        for (int m = 0; m < kTiles; ++m) {
          for (int e = 0; e < 2; ++e) first_u[n][m][e] = next_u[n][m][e];
        }
      }
      const int following = i + count.value * lanes;
      load(following, following < last ? count.value * stride : 0);
      // One more turn is asked for; further ones would not stay in what is left of the L1.
#pragma unroll
      for (int n = 0; n < kCount; ++n) {
        const int further = following + (kCount + n) * lanes < last ? (kCount + n) * stride : 0;
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          prefetch(next[m].u + further);
        }
      }
      visit(count, i, first_u);
      i = following;
    };
#pragma unroll
    for (int m = 0; m < kTiles; ++m) next[m] = rows[m];
    load(i, min(i, shape.I - 1) * shape.K);
    do {
      if (arrives) receive_piece(end);
      end = arrives ? min(end + kPiece, last) : last;
      while (i + (kCount - 1) * lanes < end) step(Constant<kCount>());
      if constexpr (kCount > 1) {
        while (i < end) step(Constant<1>());
      }
    } while (end < last);
  }
};

}  // namespace capsule_kernels::cuda

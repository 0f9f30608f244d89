// Backward, first launch: V^t, and ds^t from t = R down, a sweep and two grid barriers for each
// step. With `full_gradient` off only V and ds^R are needed, and there is no sweep.
#pragma once

#include "backward_workspace.cuh"
#include "sweep.cuh"

namespace capsule_kernels::cuda {

// s^t of one output capsule of a tile, 0 past the batch and past D.
template <int DT>
__device__ __forceinline__ void load_s(float (&s)[DT][4], const float* all_s, int t, int tile,
                                       int j, const Shape& shape, const Lane& lane) {
  const float* from = all_s + std::size_t(t - 1) * shape.B * shape.J * shape.D;
  for_each_element<DT>(tile, lane, [&](int n, int e, int b, int d) {
    s[n][e] =
        b < shape.B && d < shape.D ? from[(std::size_t(b) * shape.J + j) * shape.D + d] : 0.0f;
  });
}

template <int DT>
__device__ __forceinline__ void store_state(float4* to, const float (&x)[DT][4], const Lane& lane) {
#pragma unroll
  for (int n = 0; n < DT; ++n) to[n * kWarpSize + lane.index] = packed(x[n]);
}

template <class P, class T, class Tile>
__global__ void __launch_bounds__(kSweepWarps* kWarpSize, 1)
    routing_backward_states_kernel(BackwardArguments arguments, BackwardPlan plan) {
  constexpr int DT = Tile::DT;
  const Shape& shape = arguments.shape;
  const SweepBlock<P, T, Tile> block(shape, plan.sweep, arguments.u);
  const Lane& lane = block.lane;
  const auto grad_v = static_cast<const T*>(arguments.grad_v);
  const auto logits = static_cast<const T*>(arguments.logits);
  const BackwardWorkspace w(arguments, plan);
  const int R = shape.R;
  const bool sweeps = arguments.full_gradient && R > 1;
  if (sweeps) block.bring_weight(arguments.weight);

  // V^1..V^(R-1) and ds^R of one output capsule of a tile a warp.
  for (int item = blockIdx.x + gridDim.x * block.share.warp; item < block.tiles * shape.J;
       item += gridDim.x * kSweepWarps) {
    const int tile = item / shape.J, j = item % shape.J;
    const std::size_t offset = tile * w.tile_size + j * DT * kWarpSize;
    float s[DT][4], v[DT][4], sum[DT][4] = {};
    for (int t = 1; t < R; ++t) {
      load_s<DT>(s, arguments.s, t, tile, j, shape, lane);
      squash<DT>(v, s);
#pragma unroll
      for (int n = 0; n < DT; ++n) {
        for (int e = 0; e < 4; ++e) sum[n][e] += v[n][e];
      }
      store_state<DT>(w.V + (t - 1) * w.state_size + offset, sum, lane);
    }
    float g[DT][4];
    for_each_element<DT>(tile, lane, [&](int n, int e, int b, int d) {
      g[n][e] = b < shape.B && d < shape.D
                    ? to_float(grad_v[(std::size_t(b) * shape.J + j) * shape.D + d])
                    : 0.0f;
    });
    load_s<DT>(s, arguments.s, R, tile, j, shape, lane);
    squash_backward<DT>(g, s);
    store_state<DT>(w.ds + (R - 1) * w.state_size + offset, g, lane);
  }
  if (!sweeps) return;
  grid_barrier();

  for (int t = R; t > 1; --t) {
    const float4* const states[2] = {w.V + (t - 2) * w.state_size, w.ds + (t - 1) * w.state_size};
    const auto add_weighted = [&](bool prior) {
      return [&, prior](typename Tile::Values& sum, const auto& predict,
                        const float4* const(&staged)[2], int, int i) {
        typename Tile::Values u_hat;
        predict(u_hat, false);
        typename Tile::Row c, dl;  // dl holds dc first
        load_prior<T, Tile>(c, prior ? logits : nullptr, i, shape.J);
        add_row_dots<Tile>(c, u_hat, staged[0], shape.J, lane);
        softmax<Tile>(c, shape.J, arguments.leaky);
#pragma unroll
        for (int j = 0; j < Tile::kCapsules; ++j) dl[j] = 0.0f;
        add_row_dots<Tile>(dl, u_hat, staged[1], shape.J, lane);
        softmax_backward<Tile>(dl, c, shape.J);
        add_scaled<Tile>(sum, dl, u_hat, shape.J, lane);
      };
    };
    if (logits != nullptr) {
      block.sweep(states, 2, w.partial, add_weighted(true));
    } else {
      block.sweep(states, 2, w.partial, add_weighted(false));
    }
    grid_barrier();

    // G^(t-1) and ds^(t-1) of one output capsule of a tile.
    block.add_partial_sums(w.partial,
                           [&](float (&sum)[DT][4], int tile, int j, std::size_t offset) {
                             if (t < R) {
#pragma unroll
                               for (int n = 0; n < DT; ++n)
                                 add_to(sum[n], w.G[offset + n * kWarpSize + lane.index]);
                             }
                             store_state<DT>(w.G + offset, sum, lane);
                             float s[DT][4];
                             load_s<DT>(s, arguments.s, t - 1, tile, j, shape, lane);
                             squash_backward<DT>(sum, s);
                             store_state<DT>(w.ds + (t - 2) * w.state_size + offset, sum, lane);
                           });
    if (t > 2) grid_barrier();
  }
}

}  // namespace capsule_kernels::cuda

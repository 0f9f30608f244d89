// The whole forward in one cooperative launch: R sweeps, two grid barriers between two of them.
#pragma once

#include "routing.h"
#include "sweep.cuh"

namespace capsule_kernels::cuda {

template <class P, class T, class Tile>
__global__ void __launch_bounds__(kSweepWarps* kWarpSize, 1)
    routing_forward_kernel(ForwardArguments arguments, ForwardPlan plan) {
  constexpr int DT = Tile::DT;
  const Shape& shape = arguments.shape;
  const Share share(shape, plan.sweep);
  const Lane lane;
  const auto u = static_cast<const T*>(arguments.u);
  const auto logits = static_cast<const T*>(arguments.logits);
  const auto bias = static_cast<const T*>(arguments.bias);
  const auto weight = static_cast<T*>(shared_memory());
  const auto exchange =
      reinterpret_cast<float4*>(static_cast<char*>(shared_memory()) + plan.sweep.weight_bytes);

  const Padded padded(shape);
  const std::size_t tile_size = padded.tile_floats() / 4;  // in float4s, as all below
  const std::size_t state_size = padded.tiles * tile_size;
  const auto partial = reinterpret_cast<float4*>(arguments.workspace);  // [G_i][tiles][tile]
  float4* const V = partial + plan.sweep.capsule_groups * state_size;   // [tiles][tile]

  const int rows = (share.last_capsule - 1) / shape.weight_sharing + 1 - share.first_row;
  load_weight<P>(weight,
                 static_cast<const T*>(arguments.weight) +
                     std::size_t(share.first_row) * shape.J * shape.D * shape.K,
                 rows, shape, padded, threadIdx.x, blockDim.x);

  for (int t = 1; t <= shape.R; ++t) {
    const auto coupling = static_cast<T*>(t == shape.R ? arguments.coupling : nullptr);
    // Without a prior the first couplings are all the same: one factor for the whole sum.
    const bool uniform = t == 1 && logits == nullptr && coupling == nullptr;
    const auto add = [&](typename Tile::Values& sum, const typename Tile::Values& u_hat,
                         const float4* const(&staged)[2], int tile, int i) {
      if (uniform) {
#pragma unroll
        for (int n = 0; n < Tile::kFragments; ++n) {
          if (Tile::has(n / DT, shape.J)) {
            for (int e = 0; e < 4; ++e) sum[n][e] += u_hat[n][e];
          }
        }
        return;
      }
      typename Tile::Row c;
      load_prior<T, Tile>(c, logits, i, shape.J);
      if (t > 1) add_row_dots<Tile>(c, u_hat, staged[0], shape.J, lane);
      softmax<Tile>(c, shape.J, arguments.leaky);
      const int b = tile * kTileSamples + lane.own_row();
      if (coupling != nullptr && b < shape.B && lane.writes_own_row()) {
        T* to = coupling + (std::size_t(b) * shape.I + i) * shape.J;
#pragma unroll
        for (int j = 0; j < Tile::kCapsules; ++j) {
          if (Tile::has(j, shape.J)) store(to + j, c[j]);
        }
      }
      add_scaled<Tile>(sum, c, u_hat, shape.J, lane);
    };
    sweep<P, T, Tile>(shape, plan.sweep, share, lane, u, weight, exchange, &V, t > 1 ? 1 : 0,
                      partial, add);
    grid_barrier();

    // s^t, v^t and V^t of one output capsule of a tile a block.
    float* const s_out = arguments.s + std::size_t(t - 1) * shape.B * shape.J * shape.D;
    for (int item = blockIdx.x; item < padded.tiles * shape.J; item += gridDim.x) {
      const int tile = item / shape.J, j = item % shape.J;
      const std::size_t offset = tile * tile_size + j * DT * kWarpSize;
      float s[DT][4];
      add_partial_sums<DT>(s, partial, offset, state_size, plan.sweep.capsule_groups, exchange,
                           lane);
      if (share.warp != 0) continue;
      const auto index = [&](int b, int d) { return (std::size_t(b) * shape.J + j) * shape.D + d; };
      const float factor = uniform ? 1.0f / (shape.J + (arguments.leaky ? 1 : 0)) : 1.0f;
      for_each_element<DT>(tile, lane, [&](int n, int e, int b, int d) {
        s[n][e] *= factor;
        if (bias != nullptr && d < shape.D) s[n][e] += to_float(bias[j * shape.D + d]);
        if (b < shape.B && d < shape.D) s_out[index(b, d)] = s[n][e];
      });
      float v[DT][4];
      squash<DT>(v, s);
      if (t == shape.R) {
        for_each_element<DT>(tile, lane, [&](int n, int e, int b, int d) {
          if (b < shape.B && d < shape.D) {
            store(static_cast<T*>(arguments.v) + index(b, d), v[n][e]);
          }
        });
        continue;
      }
#pragma unroll
      for (int n = 0; n < DT; ++n) {
        float4& to = V[offset + n * kWarpSize + lane.index];
        const float4 before = t > 1 ? to : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        to = make_float4(before.x + v[n][0], before.y + v[n][1], before.z + v[n][2],
                         before.w + v[n][3]);
      }
    }
    if (t < shape.R) grid_barrier();
  }
}

}  // namespace capsule_kernels::cuda

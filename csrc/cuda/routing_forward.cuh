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
  const SweepBlock<P, T, Tile> block(shape, plan.sweep, arguments.u);
  const Lane& lane = block.lane;
  const auto logits = static_cast<const T*>(arguments.logits);
  const auto bias = static_cast<const T*>(arguments.bias);
  const auto partial = reinterpret_cast<float4*>(arguments.workspace);       // [G_i][tiles][tile]
  float4* const V = partial + plan.sweep.capsule_groups * block.state_size;  // [tiles][tile]
  block.bring_weight(arguments.weight);

  for (int t = 1; t <= shape.R; ++t) {
    const auto coupling = static_cast<T*>(t == shape.R ? arguments.coupling : nullptr);
    // Without a prior the first couplings are all the same: one factor for the whole sum.
    const bool uniform = t == 1 && logits == nullptr && coupling == nullptr;
    const auto add_all = [](typename Tile::Values& sum, const auto& predict, const auto&, int,
                            int) { predict(sum, true); };
    // `plain`: t > 1 without a prior, and without couplings to write.
    const auto add_weighted = [&](bool plain) {
      return [&, plain](typename Tile::Values& sum, const auto& predict,
                        const float4* const(&staged)[2], int tile, int i) {
        typename Tile::Values u_hat;
        predict(u_hat, false);
        typename Tile::Row c;
        load_prior<T, Tile>(c, plain ? nullptr : logits, i, shape.J);
        if (plain || t > 1) add_row_dots<Tile>(c, u_hat, staged[0], shape.J, lane);
        softmax<Tile>(c, shape.J, arguments.leaky);
        const int b = tile * kTileSamples + lane.own_row();
        if (!plain && coupling != nullptr && b < shape.B && lane.writes_own_row()) {
          T* to = coupling + (std::size_t(b) * shape.I + i) * shape.J;
#pragma unroll
          for (int j = 0; j < Tile::kCapsules; ++j) {
            if (Tile::has(j, shape.J)) store(to + j, c[j]);
          }
        }
        add_scaled<Tile>(sum, c, u_hat, shape.J, lane);
      };
    };
    if (uniform) {
      block.sweep(&V, 0, partial, add_all);
    } else if (logits == nullptr && coupling == nullptr) {
      block.sweep(&V, 1, partial, add_weighted(true));
    } else {
      block.sweep(&V, t > 1 ? 1 : 0, partial, add_weighted(false));
    }
    grid_barrier();

    // s^t, v^t and V^t of one output capsule of a tile.
    float* const s_out = arguments.s + std::size_t(t - 1) * shape.B * shape.J * shape.D;
    const float factor = uniform ? arguments.uniform_coupling : 1.0f;
    block.add_partial_sums(partial, [&](float (&s)[DT][4], int tile, int j, std::size_t offset) {
      const auto index = [&](int b, int d) { return (std::size_t(b) * shape.J + j) * shape.D + d; };
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
        return;
      }
#pragma unroll
      for (int n = 0; n < DT; ++n) {
        float4& to = V[offset + n * kWarpSize + lane.index];
        if (t > 1) add_to(v[n], to);
        to = packed(v[n]);
      }
    });
    if (t < shape.R) grid_barrier();
  }
}

}  // namespace capsule_kernels::cuda

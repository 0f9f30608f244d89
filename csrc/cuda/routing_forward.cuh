// The whole forward in one cooperative launch: R sweeps, between two of them two barriers of the
// blocks that share samples, or one and two of the clusters.
#pragma once

#include "routing.h"
#include "sweep.cuh"

namespace capsule_kernels::cuda {

template <class P, class T, class Tile>
__global__ void __launch_bounds__(kSweepWarps* kWarpSize, 1)
    routing_forward_kernel(ForwardArguments arguments, ForwardPlan plan) {
  const Shape& shape = arguments.shape;
  const SweepBlock<P, T, Tile> block(shape, plan.sweep, arguments.u, arguments.weight,
                                     reinterpret_cast<unsigned*>(arguments.workspace));
  constexpr int kCapsuleLanes = Tile::D / 4;
  const Lane& lane = block.lane;
  const auto logits = static_cast<const T*>(arguments.logits);
  const auto bias = static_cast<const T*>(arguments.bias);
  // [partials][B][J][D], and [tiles][tile].
  const auto partials = reinterpret_cast<float4*>(arguments.workspace + plan.sweep.counter_floats);
  float4* const V = partials + (plan.sweep.partials + block.share.copy()) * block.state_size;
  // Without a prior the first couplings are all the same: one factor for the whole sum.
  const bool uniform = logits == nullptr && (shape.R > 1 || arguments.coupling == nullptr);
  const GridArrival reset = block.share.reset_counter();
  block.send_for_weight();
  block.share.wait_for_counters(reset);

  for (int t = 1; t <= shape.R; ++t) {
    float4* const partial = block.partial_of(partials, t);
    const auto coupling = static_cast<T*>(t == shape.R ? arguments.coupling : nullptr);
    // `plain`: t > 1 without a prior, and without couplings to write.
    const auto add_weighted = [&](bool plain, bool first) {
      return [&, plain, first](typename Tile::Values& sum, const auto& predict, const auto& states,
                               int tile, int i) {
        typename Tile::Values u_hat;
        predict(u_hat);
        typename Tile::Row c;
        if (first) {
          set_zero(c);
        } else {
          dots<Tile>(c, u_hat, states[0], shape.J);
        }
        if (!plain) add_prior<T, Tile>(c, logits, i, shape.J, lane);
        softmax<Tile>(c, shape.J, arguments.leaky, lane);
        if (!plain && coupling != nullptr) {
          for_each_group<Tile>(shape.J, [&](auto group) {
            const int j = lane.capsule<Tile>(group.value);
            for (int e = 0; e < 2; ++e) {
              const int b = tile * kTileSamples + 2 * lane.q + e;
              if (b < shape.B && j < shape.J && lane.first_dim<Tile>(group.value) == 0) {
                store(coupling + (std::size_t(b) * shape.I + i) * shape.J + j, c[group.value][e]);
              }
            }
          });
        }
        add_scaled<Tile>(sum, c, u_hat, shape.J);
      };
    };
    if (t == 1 && uniform) {
      if (plan.sweep.tiles_per_pass > 1) {
        block.template sweep_alike<2>(true, partial);
      } else {
        block.template sweep_alike<1>(true, partial);
      }
    } else if (t == 1) {
      block.template sweep<0>(true, {V}, partial, add_weighted(false, true));
    } else if (logits == nullptr && coupling == nullptr) {
      block.template sweep<1>(false, {V}, partial, add_weighted(true, false));
    } else {
      block.template sweep<1>(false, {V}, partial, add_weighted(false, false));
    }
    block.share.sum_barrier(t, t - 1);

    // s^t, v^t and V^t.
    float* const s_out = arguments.s + std::size_t(t - 1) * shape.B * shape.J * shape.D;
    const float factor = uniform && t == 1 ? arguments.uniform_coupling : 1.0f;
    block.add_partial_sums(partial, [&](float (&s)[4], int b, int j, int d) {
      const std::size_t index = (std::size_t(b) * shape.J + j) * shape.D + d;
      for (int e = 0; e < 4; ++e) {
        const bool inside = j < shape.J && d + e < shape.D;
        s[e] *= factor;
        if (bias != nullptr && inside) s[e] += to_float(bias[j * shape.D + d + e]);
        if (b < shape.B && inside && block.share.copy() == 0) s_out[index + e] = s[e];
      }
      float v[4];
      squash<kCapsuleLanes>(v, s);
      for (int e = 0; e < 4; ++e) {
        if (t == shape.R) {
          if (b < shape.B && j < shape.J && d + e < shape.D && block.share.copy() == 0) {
            store(static_cast<T*>(arguments.v) + index + e, v[e]);
          }
        } else {
          float& to = reinterpret_cast<float*>(V)[state_offset<Tile>(b, j, d + e, block.fragments)];
          to = t > 1 ? to + v[e] : v[e];
        }
      }
    });
    if (t < shape.R) block.share.state_barrier(t, t);
  }
}

}  // namespace capsule_kernels::cuda

// The whole forward in one cooperative launch: R sweeps, between two of them two barriers of the
// blocks that share samples.
#pragma once

#include "routing.h"
#include "sweep.cuh"

namespace capsule_kernels::cuda {

// s^t, v^t and V^t of the partial sums of a sweep, which are to be scaled where its couplings were
// all alike. `V_at(b, j, d)` is where V lies, with `unit` for 1.
template <class T, class Sums, class At>
__device__ __forceinline__ void finish_iteration(const Sums& block,
                                                 const ForwardArguments& arguments, int t,
                                                 bool alike, const float4* partial, At V_at,
                                                 float unit = 1.0f) {
  const Shape& shape = arguments.shape;
  const auto bias = static_cast<const T*>(arguments.bias);
  const auto load_V = [&](int b, int j, int d) {
    float4 before = {};
    if (t > 1 && t < shape.R) {
      before =
          make_float4(*V_at(b, j, d), *V_at(b, j, d + 1), *V_at(b, j, d + 2), *V_at(b, j, d + 3));
    }
    return before;
  };
  float* const s_out = arguments.s + std::size_t(t - 1) * shape.B * shape.J * shape.D;
  const float factor = alike ? arguments.uniform_coupling : 1.0f;
  const auto finish = [&](float (&s)[4], const float4& before, int b, int j, int d) {
    const std::size_t index = (std::size_t(b) * shape.J + j) * shape.D + d;
    for (int e = 0; e < 4; ++e) {
      const bool inside = j < shape.J && d + e < shape.D;
      s[e] *= factor;
      if (bias != nullptr && inside) s[e] += to_float(bias[j * shape.D + d + e]);
      if (b < shape.B && inside) s_out[index + e] = s[e];
    }
    float v[4];
    squash<Sums::kCapsuleLanes>(v, s);
    const bool last = t == shape.R;
    if (!last) {
      for (float& x : v) x *= unit;
      add_to(v, before);
    }
    for (int e = 0; e < 4; ++e) {
      if (!last) {
        *V_at(b, j, d + e) = v[e];
      } else if (b < shape.B && j < shape.J && d + e < shape.D) {
        store(static_cast<T*>(arguments.v) + index + e, v[e]);
      }
    }
  };
  block.add_partial_sums(partial, load_V, finish);
}

template <class P, class T, class Tile>
__global__ void __launch_bounds__(kSweepWarps* kWarpSize, 1)
    routing_forward_kernel(ForwardArguments arguments, ForwardPlan plan) {
  const Shape& shape = arguments.shape;
  const SweepBlock<P, T, Tile> block(shape, plan.sweep, arguments.u, arguments.weight,
                                     reinterpret_cast<unsigned*>(arguments.workspace));
  const Lane& lane = block.lane;
  const auto logits = static_cast<const T*>(arguments.logits);
  // [G_i][B][J][D], and [tiles][tile].
  const auto partial = reinterpret_cast<float4*>(arguments.workspace + plan.sweep.counter_floats);
  float4* const V = reinterpret_cast<float4*>(arguments.workspace) + plan.first_state;
  // Without a prior the first couplings are all the same: one factor for the whole sum.
  const bool uniform = logits == nullptr && (shape.R > 1 || arguments.coupling == nullptr);
  const GridArrival reset = block.share.reset_counter();
  block.send_for_weight();

  // What iteration t adds of some input capsules. `first`: t = 1. `plain`: a later one, without a
  // prior, and without couplings to write.
  const auto add_weighted = [&](int t, bool first, bool plain) {
    const auto coupling = static_cast<T*>(t == shape.R ? arguments.coupling : nullptr);
    return [&, first, plain, coupling](auto count, typename Tile::Values& sum, const auto& u_hat,
                                       const auto& states, int tile, int first_i) {
      typename Tile::Row c[count.value];
#pragma unroll
      for (int n = 0; n < count.value; ++n) {
        if (first) {
          set_zero(c[n]);
        } else {
          dots<Tile>(c[n], u_hat[n], states[0], shape.J);
        }
        if (!plain) {
          add_prior<T, Tile>(c[n], logits, first_i + n * plan.sweep.lanes, shape.J, lane);
        }
      }
      softmax<Tile>(c, shape.J, arguments.leaky, lane);
#pragma unroll
      for (int n = 0; n < count.value; ++n) {
        if (!plain && coupling != nullptr) {
          const int i = first_i + n * plan.sweep.lanes;
          for_each_group<Tile>(shape.J, [&](auto group) {
            const int j = lane.capsule<Tile>(group.value);
            for (int e = 0; e < 2; ++e) {
              const int b = tile * kTileSamples + 2 * lane.q + e;
              if (b < shape.B && j < shape.J && lane.first_dim<Tile>(group.value) == 0) {
                store(coupling + (std::size_t(b) * shape.I + i) * shape.J + j,
                      c[n][group.value][e]);
              }
            }
          });
        }
        add_scaled<Tile>(sum, c[n], u_hat[n], shape.J);
      }
    };
  };

  if (!uniform) {
    block.template sweep<0>(true, {V}, partial, add_weighted(1, true, false));
  } else if (plan.sweep.tiles_per_pass > 1) {
    block.template sweep_alike<2>(true, partial);
  } else {
    block.template sweep_alike<1>(true, partial);
  }
  block.share.wait_for_counters(reset);

  for (int t = 1;; ++t) {
    block.share.barrier(2 * t - 1);

    finish_iteration<T>(block, arguments, t, uniform && t == 1, partial, [&](int b, int j, int d) {
      return reinterpret_cast<float*>(V) + state_offset<Tile>(b, j, d, block.fragments);
    });
    if (t == shape.R) break;

    block.share.barrier(2 * t);
    if (logits == nullptr && (t + 1 < shape.R || arguments.coupling == nullptr)) {
      block.template sweep<1>(false, {V}, partial, add_weighted(t + 1, false, true));
    } else {
      block.template sweep<1>(false, {V}, partial, add_weighted(t + 1, false, false));
    }
  }
}

}  // namespace capsule_kernels::cuda

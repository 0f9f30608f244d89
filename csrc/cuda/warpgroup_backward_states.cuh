// Backward of large batches, first launch: V^t, and ds^t from t = R down.
#pragma once

#include "routing_backward_states.cuh"
#include "warpgroup_sweep.cuh"

namespace capsule_kernels::cuda {

template <class T, int kJ>
__global__ void __launch_bounds__(kSweepWarps* kWarpSize, 1)
    warpgroup_backward_states_kernel(BackwardArguments arguments, BackwardPlan plan) {
#ifdef CAPSULE_KERNELS_WARPGROUPS
  using Tile = TileOf<kTileRows, kJ>;
  const int R = arguments.shape.R;
  const BackwardWorkspace w(arguments, plan);
  // As its own sweeps read them: V^1..V^(R-1), and ds of an iteration.
  float* const V = arguments.workspace + 4 * plan.wide_states;
  const std::size_t state_floats = 4 * w.state_size;
  float* const ds = V + (R - 1) * state_floats;
  float* const images = arguments.workspace + 4 * plan.weight_images;
  WarpgroupSweep<T, kJ, 2> block(arguments.shape, plan.sweep, arguments.u, images,
                                 reinterpret_cast<unsigned*>(arguments.workspace), 0, R - 1);
  make_images<T, kJ>(images, static_cast<const T*>(arguments.weight), arguments.shape);

  const auto store_wide = [&](float* state, const float (&x)[4], float unit, int b, int j, int d) {
    float scaled[4];
    for (int e = 0; e < 4; ++e) scaled[e] = x[e] * unit;
    *reinterpret_cast<float4*>(state + wide_state_offset<kJ>(b, j, d)) = packed(scaled);
  };
  const auto store_V = [&](int t, const float (&x)[4], int b, int j, int d) {
    store_state<Tile>(w.V + (t - 1) * w.state_size, x, b, j, d, block.fragments);
    store_wide(V + (t - 1) * state_floats, x, Tf32::nearly_rounded(kLog2E), b, j, d);
  };
  const auto store_ds = [&](int t, const float (&x)[4], int b, int j, int d) {
    store_state<Tile>(w.ds + (t - 1) * w.state_size, x, b, j, d, block.fragments);
    store_wide(ds, x, Tf32::nearly_rounded(1.0f), b, j, d);
  };
  begin_states<T>(block, arguments, store_V, store_ds);
  publish();
  block.share.wait_for_counters(block.share.reset_counter());
  block.send_images();

  for (int t = R; t > 1; --t) {
    block.sweep({V + (t - 2) * state_floats, ds}, w.partial, [&](PairsOf<kJ>(&x)[2]) {
      PairsOf<kJ>&c = x[0], &dc = x[1];
      softmax_of_pairs<kJ>(c, arguments.leaky);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float mean = 0.0f;
#pragma unroll
        for (int j = 0; j < kJ; ++j) mean += c[j][e] * dc[j][e];
#pragma unroll
        for (int j = 0; j < kJ; ++j) c[j][e] *= dc[j][e] - mean;
      }
    });
    block.share.barrier(2 * (R - t) + 1);
    finish_states(block, arguments, w, t, store_ds);
    publish();
    if (t > 2) block.share.barrier(2 * (R - t) + 2);
  }
#endif
}

}  // namespace capsule_kernels::cuda

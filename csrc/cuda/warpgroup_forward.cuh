// The whole forward of large batches in one cooperative launch.
#pragma once

#include "routing_forward.cuh"
#include "warpgroup_sweep.cuh"

namespace capsule_kernels::cuda {

template <class T, int kJ>
__global__ void __launch_bounds__(kSweepWarps* kWarpSize, 1)
    warpgroup_forward_kernel(ForwardArguments arguments, ForwardPlan plan) {
#ifdef CAPSULE_KERNELS_WARPGROUPS
  const int R = arguments.shape.R;
  const auto partial = reinterpret_cast<float4*>(arguments.workspace + plan.sweep.counter_floats);
  float* const V = arguments.workspace + 4 * plan.first_state;
  float* const images = V + 4 * plan.sweep.state_size;
  WarpgroupSweep<T, kJ, 1> block(arguments.shape, plan.sweep, arguments.u, images,
                                 reinterpret_cast<unsigned*>(arguments.workspace), 1, R - 1);
  make_images<T, kJ>(images, static_cast<const T*>(arguments.weight), arguments.shape);
  publish();
  block.share.wait_for_counters(block.share.reset_counter());
  block.send_images();

  block.sweep_alike(partial);
  for (int t = 1;; ++t) {
    block.share.barrier(2 * t - 1);
    finish_iteration<T>(
        block, arguments, t, t == 1, partial,
        [&](int b, int j, int d) { return V + wide_state_offset<kJ>(b, j, d); },
        Tf32::nearly_rounded(kLog2E));
    if (t == R) break;
    publish();
    block.share.barrier(2 * t);
    block.sweep({V}, partial,
                [&](PairsOf<kJ>(&logits)[1]) { softmax_of_pairs<kJ>(logits[0], arguments.leaky); });
  }
#endif
}

}  // namespace capsule_kernels::cuda

// The arrays of the backward's workspace, padded, counted in float4s; tiles as in tile.cuh. Of the
// states there may be several copies.
#pragma once

#include "execution.cuh"
#include "routing.h"

namespace capsule_kernels::cuda {

struct BackwardWorkspace {
  std::size_t tile_size, state_size;
  float4* partial;        // [partials][B][J][D], sums of a group of capsules
  float4* G;              // [B][J][D], dL/dV of the iterations done
  float4* V;              // [R - 1][tiles][tile], V^1..V^(R-1)
  float4* ds;             // [R][tiles][tile], ds^1..ds^R
  float* partial_weight;  // [splits, I, J, D, K]
  float* partial_logits;  // [splits, I, J]

  __device__ __forceinline__ BackwardWorkspace(const BackwardArguments& arguments,
                                               const BackwardPlan& plan, int copy = 0) {
    const Shape& shape = arguments.shape;
    const Padded padded(shape);
    tile_size = padded.tile_floats() / 4;
    state_size = padded.tiles * tile_size;
    // The sweeps' counters lie before all of them.
    partial = reinterpret_cast<float4*>(arguments.workspace + plan.sweep.counter_floats);
    float4* const copies = partial + plan.sweep.partials * state_size;
    const std::size_t copy_size = 2 * shape.R * state_size;
    G = copies + copy * copy_size;
    V = G + state_size;
    ds = V + (shape.R - 1) * state_size;
    partial_weight = reinterpret_cast<float*>(copies + plan.sweep.copies * copy_size);
    partial_logits =
        partial_weight + std::size_t(plan.gradients.splits) * shape.I * shape.J * shape.D * shape.K;
  }
};

}  // namespace capsule_kernels::cuda

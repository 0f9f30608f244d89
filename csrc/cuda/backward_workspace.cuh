// The arrays of the backward's workspace, padded, counted in float4s; tiles as in tile.cuh.
#pragma once

#include "execution.cuh"
#include "routing.h"

namespace capsule_kernels::cuda {

struct BackwardWorkspace {
  std::size_t state_size;
  float4* partial;        // [partials][B][J][D], sums of a group of capsules
  float4* G;              // [B][J][D], dL/dV of the iterations done
  float4* V;              // [R - 1][tiles][tile], V^1..V^(R-1)
  float4* ds;             // [R][tiles][tile], ds^1..ds^R
  float* partial_weight;  // [parts, I, J, D, K]
  float* partial_logits;  // [parts, I, J]

  __device__ __forceinline__ BackwardWorkspace(const BackwardArguments& arguments,
                                               const BackwardPlan& plan) {
    const Shape& shape = arguments.shape;
    state_size = plan.sweep.state_size;
    // The sweeps' counters lie before all of them.
    partial = reinterpret_cast<float4*>(arguments.workspace + plan.sweep.counter_floats);
    V = reinterpret_cast<float4*>(arguments.workspace) + plan.first_state;
    G = V - state_size;
    ds = V + (shape.R - 1) * state_size;
    partial_weight = arguments.workspace + 4 * plan.partial_gradients;
    partial_logits =
        partial_weight + std::size_t(plan.parts) * shape.I * shape.J * shape.D * shape.K;
  }
};

}  // namespace capsule_kernels::cuda

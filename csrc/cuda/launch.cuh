// From the sizes of a call to an instance of the kernels; one translation unit a scalar type.
#pragma once

#include "instances.h"
#include "routing_backward_gradients.cuh"
#include "routing_backward_outputs.cuh"
#include "routing_backward_states.cuh"
#include "routing_forward.cuh"
#include "warpgroup_backward_states.cuh"
#include "warpgroup_forward.cuh"

namespace capsule_kernels::cuda {

inline Grid sweep_grid(const SweepPlan& plan) {
  return {plan.blocks, kSweepWarps * kWarpSize, plan.shared_bytes, /*cooperative=*/true};
}

// Whether there are kernels by warpgroups of an instance.
template <class P, class Tile>
constexpr bool kByWarpgroups = P::kProducts == 1 && Tile::kKnown && Tile::D == kTileRows;

template <class P, class T, class Tile>
void launch_forward(const ForwardArguments& arguments, const ForwardPlan& plan, void* stream) {
  if constexpr (kByWarpgroups<P, Tile>) {
    if (plan.sweep.slots > 0) {
      return launch(warpgroup_forward_kernel<T, Tile::kFragments>, sweep_grid(plan.sweep), stream,
                    arguments, plan);
    }
  }
  launch(routing_forward_kernel<P, T, Tile>, sweep_grid(plan.sweep), stream, arguments, plan);
}

template <class P, class T, class Tile>
void launch_states(const BackwardArguments& arguments, const BackwardPlan& plan, void* stream) {
  if constexpr (kByWarpgroups<P, Tile>) {
    if (plan.sweep.slots > 0) {
      return launch(warpgroup_backward_states_kernel<T, Tile::kFragments>, sweep_grid(plan.sweep),
                    stream, arguments, plan);
    }
  }
  launch(routing_backward_states_kernel<P, T, Tile>, sweep_grid(plan.sweep), stream, arguments,
         plan);
}

template <class P, class T, class Tile>
void launch_backward(const BackwardArguments& arguments, const BackwardPlan& plan, void* stream) {
  launch_states<P, T, Tile>(arguments, plan, stream);
  if (plan.outputs.blocks == 0) {
    const GradientPlan& gradients = plan.gradients;
    const int groups = ceil_div(arguments.shape.I, gradients.capsules);
    launch(routing_backward_gradients_kernel<P, T, Tile>,
           Grid{groups * gradients.splits, gradients.warps * kWarpSize, gradients.shared_bytes,
                /*cooperative=*/false},
           stream, arguments, plan);
  } else if constexpr (P::kProducts == 1 && Tile::D == kTileRows) {
    const Grid grid{plan.outputs.blocks, arguments.shape.J * kWarpSize, plan.outputs.shared_bytes,
                    /*cooperative=*/false};
    if (arguments.shape.R == 2) {
      launch(routing_backward_outputs_kernel<P, T, Tile, 2>, grid, stream, arguments, plan);
    } else {
      launch(routing_backward_outputs_kernel<P, T, Tile, 3>, grid, stream, arguments, plan);
    }
  }
  if (plan.partial_sums && (arguments.grad_weight != nullptr || arguments.grad_logits != nullptr)) {
    launch(routing_backward_sums_kernel<T>,
           Grid{kSumBlocks * plan.sweep.blocks, kSweepWarps * kWarpSize, 0, /*cooperative=*/false},
           stream, arguments, plan);
  }
}

// Calls run(TileOf<...>()) of `choose_tile`.
template <class Run>
void with_tile(const Shape& shape, Run run) {
  const TileChoice tile = choose_tile(shape);
  if (tile.D == 8) return tile.J == 10 ? run(TileOf<8, 10>()) : run(TileOf<8>());
  if (tile.D == 32) return run(TileOf<32>());
  if (tile.J == 10) return run(TileOf<16, 10>());
  if (tile.J == 5) return run(TileOf<16, 5>());
  return run(TileOf<16>());
}

template <class P, class T>
void forward_of(const ForwardArguments& arguments, const ForwardPlan& plan, void* stream) {
  with_tile(arguments.shape,
            [&](auto tile) { launch_forward<P, T, decltype(tile)>(arguments, plan, stream); });
}

template <class P, class T>
void backward_of(const BackwardArguments& arguments, const BackwardPlan& plan, void* stream) {
  with_tile(arguments.shape,
            [&](auto tile) { launch_backward<P, T, decltype(tile)>(arguments, plan, stream); });
}

}  // namespace capsule_kernels::cuda

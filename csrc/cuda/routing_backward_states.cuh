// Backward, first launch: V^t, and ds^t from t = R down, a sweep and two barriers of the blocks
// that share samples for each step. With `full_gradient` off only V and ds^R are needed, and there
// is no sweep.
#pragma once

#include "backward_workspace.cuh"
#include "sweep.cuh"

namespace capsule_kernels::cuda {

// x_d ... x_(d + 3) of output capsule j of sample b of an array [B, J, D]; 0 past all of them.
template <class T>
__device__ __forceinline__ void load_output(float (&x)[4], const T* from, const Shape& shape, int b,
                                            int j, int d) {
  for (int e = 0; e < 4; ++e) {
    x[e] = b < shape.B && j < shape.J && d + e < shape.D
               ? to_float(from[(std::size_t(b) * shape.J + j) * shape.D + d + e])
               : 0.0f;
  }
}

// s^t likewise.
__device__ __forceinline__ void load_s(float (&x)[4], const BackwardArguments& arguments, int t,
                                       int b, int j, int d) {
  const Shape& shape = arguments.shape;
  const float* const s = arguments.s + std::size_t(t - 1) * shape.B * shape.J * shape.D;
  load_output(x, s, shape, b, j, d);
}

// V^1..V^(R-1) and ds^R, given to store_V(t, x, b, j, d) and store_ds(...), for d ... d + 3.
template <class T, class Sums, class StoreV, class StoreDs>
__device__ __forceinline__ void begin_states(const Sums& block, const BackwardArguments& arguments,
                                             StoreV store_V, StoreDs store_ds) {
  constexpr int kCapsuleLanes = Sums::kCapsuleLanes;
  const Shape& shape = arguments.shape;
  const int R = shape.R;
  block.for_each_item(kSweepWarps, block.share.warp, [&](int item) {
    if (item < 0) return;
    const int e = item * kWarpSize + block.lane.index, capsule = e / kCapsuleLanes;
    const int J = block.fragments * 4 / kCapsuleLanes;
    const int b = capsule / J, j = capsule % J, d = e % kCapsuleLanes * 4;
    float g[4], s[4], v[4], sum[4] = {};
    load_output(g, static_cast<const T*>(arguments.grad_v), shape, b, j, d);
    load_s(s, arguments, 1, b, j, d);
    for (int t = 1; t < R; ++t) {
      float next[4];  // on its way meanwhile
      load_s(next, arguments, t + 1, b, j, d);
      squash<kCapsuleLanes>(v, s);
      for (int n = 0; n < 4; ++n) sum[n] += v[n];
      store_V(t, sum, b, j, d);
      for (int n = 0; n < 4; ++n) s[n] = next[n];
    }
    squash_backward<kCapsuleLanes>(g, s);
    store_ds(R, g, b, j, d);
  });
}

// G^(t-1), and ds^(t-1), of the partial sums of iteration t.
template <class Sums, class StoreDs>
__device__ __forceinline__ void finish_states(const Sums& block, const BackwardArguments& arguments,
                                              const BackwardWorkspace& w, int t, StoreDs store_ds) {
  constexpr int kCapsuleLanes = Sums::kCapsuleLanes;
  const int R = arguments.shape.R;
  struct Ahead {
    float4 G;
    float s[4];
  };
  // G is read and written by the same lanes, in the order of the sums.
  const auto G_at = [&](int b, int j, int d) -> float4& {
    const int J = block.fragments * 4 / kCapsuleLanes;
    return w.G[(std::size_t(b) * J + j) * kCapsuleLanes + d / 4];
  };
  const auto load_ahead = [&](int b, int j, int d) {
    Ahead ahead = {};
    if (t < R) ahead.G = G_at(b, j, d);
    load_s(ahead.s, arguments, t - 1, b, j, d);
    return ahead;
  };
  const auto finish = [&](float (&sum)[4], const Ahead& ahead, int b, int j, int d) {
    add_to(sum, ahead.G);
    if (t > 2) G_at(b, j, d) = packed(sum);
    squash_backward<kCapsuleLanes>(sum, ahead.s);
    store_ds(t - 1, sum, b, j, d);
  };
  block.add_partial_sums(w.partial, load_ahead, finish);
}

// To a state [tiles][tile].
template <class Tile>
__device__ __forceinline__ void store_state(float4* state, const float (&x)[4], int b, int j, int d,
                                            int fragments) {
  for (int e = 0; e < 4; ++e) {
    reinterpret_cast<float*>(state)[state_offset<Tile>(b, j, d + e, fragments)] = x[e];
  }
}

template <class P, class T, class Tile>
__global__ void __launch_bounds__(kSweepWarps* kWarpSize, 1)
    routing_backward_states_kernel(BackwardArguments arguments, BackwardPlan plan) {
  const Shape& shape = arguments.shape;
  const SweepBlock<P, T, Tile> block(shape, plan.sweep, arguments.u, arguments.weight,
                                     reinterpret_cast<unsigned*>(arguments.workspace));
  const Lane& lane = block.lane;
  const auto logits = static_cast<const T*>(arguments.logits);
  const BackwardWorkspace w(arguments, plan);
  const int R = shape.R;
  const bool sweeps = arguments.full_gradient && R > 1;
  if (sweeps) block.send_for_weight();

  const auto store_V = [&](int t, const float (&x)[4], int b, int j, int d) {
    store_state<Tile>(w.V + (t - 1) * w.state_size, x, b, j, d, block.fragments);
  };
  const auto store_ds = [&](int t, const float (&x)[4], int b, int j, int d) {
    store_state<Tile>(w.ds + (t - 1) * w.state_size, x, b, j, d, block.fragments);
  };
  begin_states<T>(block, arguments, store_V, store_ds);
  if (!sweeps) return;
  // All states are there then, too.
  block.share.wait_for_counters(block.share.reset_counter());

  for (int t = R; t > 1; --t) {
    const float4* const states[2] = {w.V + (t - 2) * w.state_size, w.ds + (t - 1) * w.state_size};
    block.template sweep<2>(
        t == R, states, w.partial,
        [&](auto count, typename Tile::Values& sum, const auto& u_hat, const auto& tile_states, int,
            int first_i) {
          typename Tile::Row c[count.value], dl[count.value];  // dl holds dc first
#pragma unroll
          for (int n = 0; n < count.value; ++n) {
            dots<Tile>(c[n], u_hat[n], tile_states[0], shape.J);
            add_prior<T, Tile>(c[n], logits, first_i + n * plan.sweep.lanes, shape.J, lane);
          }
          softmax<Tile>(c, shape.J, arguments.leaky, lane);
#pragma unroll
          for (int n = 0; n < count.value; ++n) {
            dots<Tile>(dl[n], u_hat[n], tile_states[1], shape.J);
            softmax_backward<Tile>(dl[n], c[n], shape.J);
            add_scaled<Tile>(sum, dl[n], u_hat[n], shape.J);
          }
        });
    block.share.barrier(2 * (R - t) + 1);
    finish_states(block, arguments, w, t, store_ds);
    if (t > 2) block.share.barrier(2 * (R - t) + 2);
  }
}

}  // namespace capsule_kernels::cuda

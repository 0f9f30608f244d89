// Backward, second launch: the last sweep, all iterations together. A warp owns an input capsule
// and a share of the samples; nothing is exchanged but, where capsules share a weight or the
// samples are split, partial sums of dW and dprior, which a third small launch adds in a fixed
// order.
#pragma once

#include "backward_workspace.cuh"
#include "sweep.cuh"

namespace capsule_kernels::cuda {

// What one warp keeps on chip, `capsule_store_bytes` in all.
template <class T>
struct CapsuleStore {
  float4* du_hat;   // [fragments][32], of one tile
  float4* dW;       // [K / 8][fragments][32], where K may be larger than 8
  Quad<T>* weight;  // W_i, the same sizes
  int size_of_dW;

  __device__ __forceinline__ CapsuleStore(void* memory, const Shape& shape, const Padded& padded)
      : du_hat(static_cast<float4*>(memory)),
        dW(du_hat + padded.fragments * kWarpSize),
        weight(reinterpret_cast<Quad<T>*>(reinterpret_cast<char*>(dW) +
                                          stored_grad_weight_bytes(shape, padded))),
        size_of_dW(int(stored_grad_weight_bytes(shape, padded) / sizeof(float4))) {}
};

// du_i = sum_jd du_hat W for the 8 samples of a tile. The contraction runs over (j, d), so that
// du_hat, which lies on chip, is read across lanes: lane (g, q) needs of each fragment the rows of
// lanes 8q + g / 2 and 8q + 4 + g / 2 (g of them: 2q and 2q + 1) for sample g, and the same of W for
// element g of K.
template <class P, class T, class Tile>
__device__ __forceinline__ void write_grad_u(T* grad_u, const CapsuleStore<T>& own, int tile, int i,
                                             const Shape& shape, const Lane& lane) {
  const int fragments = Tile::fragments_of(shape.J);
  const int first = 2 * swizzled(8 * lane.q + lane.g / 2) + lane.g % 2;
  const int second = 2 * swizzled(8 * lane.q + 4 + lane.g / 2) + lane.g % 2;
  for (int k0 = 0; k0 < Tile::padded_K(shape.K); k0 += kStepDims) {
    const Quad<T>* weight = own.weight + k0 / kStepDims * fragments * kWarpSize;
    float du[4] = {};
    for_each_fragment<Tile>(shape.J, [&](int, int n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int place = n * 2 * kWarpSize + (half == 0 ? first : second);
        const auto x = reinterpret_cast<const Pair<float>*>(own.du_hat)[place];
        const auto w = reinterpret_cast<const Pair<T>*>(weight)[place];
        const float a[4] = {x.first, 0.0f, x.second, 0.0f};
        const float b[2] = {to_float(w.first), to_float(w.second)};
        P::multiply_add(du, P::template prepared_operand<float>(a),
                        P::template prepared_operand<T>(b));
      }
    });
    const int b = tile * kTileSamples + lane.g, k = k0 + 2 * lane.q;
    T* to = grad_u + (std::size_t(b) * shape.I + i) * shape.K + k;
    if (b < shape.B && (Tile::kKnown || shape.K % 2 == 0)) {
      if (k < shape.K) {
        Pair<T> pair;
        store(&pair.first, du[0]);
        store(&pair.second, du[1]);
        *reinterpret_cast<Pair<T>*>(to) = pair;
      }
    } else if (b < shape.B) {
      if (k < shape.K) store(to, du[0]);
      if (k + 1 < shape.K) store(to + 1, du[1]);
    }
  }
}

// dW_i += sum_b du_hat u^T over the samples of a tile: a fragment of du_hat is the left side of the
// product as it is, columns 2q and 2q + 1 in slots q and q + 4 of the contraction.
template <class P, class T, class Tile>
__device__ __forceinline__ void add_grad_weight(typename Tile::Values& dW,
                                                const CapsuleStore<T>& own,
                                                const typename Tile::Values& du_hat, const T* u,
                                                int tile, int i, const Shape& shape,
                                                const Lane& lane) {
  const int fragments = Tile::fragments_of(shape.J);
  for (int k0 = 0; k0 < Tile::padded_K(shape.K); k0 += kStepDims) {
    const int b = tile * kTileSamples + 2 * lane.q, k = k0 + lane.g;
    float x[2];
    for (int e = 0; e < 2; ++e) {
      x[e] = b + e < shape.B && k < shape.K
                 ? to_float(u[(std::size_t(b + e) * shape.I + i) * shape.K + k])
                 : 0.0f;
    }
    const auto u_pair = P::template operand<T>(x);
    for_each_fragment<Tile>(shape.J, [&](int, int n) {
      const float a[4] = {du_hat[n][0], du_hat[n][2], du_hat[n][1], du_hat[n][3]};
      const auto rows = P::template prepared_operand<float>(a);
      if constexpr (Tile::kKnown) {
        P::multiply_add(dW[n], rows, u_pair);
      } else {
        float4& stored = own.dW[(k0 / kStepDims * fragments + n) * kWarpSize + lane.index];
        float sum[4] = {stored.x, stored.y, stored.z, stored.w};
        P::multiply_add(sum, rows, u_pair);
        stored = packed(sum);
      }
    });
  }
}

// The sums of a capsule, `to` [J, D, K], out of the order of the fragments.
template <class Tile, class U, class T>
__device__ __forceinline__ void write_grad_weight(U* to, const typename Tile::Values& dW,
                                                  const CapsuleStore<T>& own, const Shape& shape,
                                                  const Lane& lane) {
  const int fragments = Tile::fragments_of(shape.J);
  for (int k0 = 0; k0 < Tile::padded_K(shape.K); k0 += kStepDims) {
    for_each_fragment<Tile>(shape.J, [&](int group, int n) {
      float sum[4] = {};
      if constexpr (Tile::kKnown) {
        for (int e = 0; e < 4; ++e) sum[e] = dW[n][e];
      } else {
        add_to(sum, own.dW[(k0 / kStepDims * fragments + n) * kWarpSize + lane.index]);
      }
      const int j = lane.capsule<Tile>(group);
      for (int e = 0; e < 4; ++e) {
        const int d = lane.first_dim<Tile>(group) + 2 * (n - Tile::first_fragment(group)) + e / 2;
        const int k = k0 + 2 * lane.q + e % 2;
        if (j < shape.J && d < shape.D && k < shape.K) {
          store(to + (std::size_t(j) * shape.D + d) * shape.K + k, sum[e]);
        }
      }
    });
  }
}

// dbias_j = sum over b and t of ds^t_j; a block takes whole columns (j, d), its threads the
// samples.
template <class T, class Tile>
__device__ __forceinline__ void write_grad_bias(T* grad_bias, const BackwardWorkspace& w,
                                                const Shape& shape, int first_t, float* sums) {
  for (int column = blockIdx.x; column < shape.J * shape.D; column += gridDim.x) {
    const int j = column / shape.D, d = column % shape.D;
    float sum = 0;
    for (int b = threadIdx.x; b < shape.B; b += blockDim.x) {
      const std::size_t offset = state_offset<Tile>(b, j, d, Tile::fragments_of(shape.J));
      for (int t = first_t; t <= shape.R; ++t) {
        sum += reinterpret_cast<const float*>(w.ds + (t - 1) * w.state_size)[offset];
      }
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int thread = 1; thread < int(blockDim.x); ++thread) sum += sums[thread];
      store(grad_bias + column, sum);
    }
    __syncthreads();
  }
}

template <class P, class T, class Tile>
__global__ void __launch_bounds__(kGradientWarps* kWarpSize, 1)
    routing_backward_gradients_kernel(BackwardArguments arguments, BackwardPlan plan) {
  using Values = typename Tile::Values;
  const Shape& shape = arguments.shape;
  const Padded padded(shape);
  const BackwardWorkspace w(arguments, plan);
  const Lane lane;
  const int warps = blockDim.x / kWarpSize, warp = threadIdx.x / kWarpSize;
  const int groups = ceil_div(shape.I, warps);
  const int i = blockIdx.x % groups * warps + warp, split = blockIdx.x / groups;
  const bool active = i < shape.I;  // the last block may have warps to spare
  const auto u = static_cast<const T*>(arguments.u);
  const auto logits = static_cast<const T*>(arguments.logits);
  const int tile_size = Tile::fragments_of(shape.J) * kWarpSize;
  const int first_t = arguments.full_gradient ? 1 : shape.R;

  const auto staged = static_cast<float4*>(shared_memory());  // [2][V, ds][tile]
  const std::size_t store_bytes = capsule_store_bytes(shape, padded, sizeof(T));
  const CapsuleStore<T> own(reinterpret_cast<char*>(staged + 4 * tile_size) + warp * store_bytes,
                            shape, padded);

  if (arguments.grad_bias != nullptr) {
    write_grad_bias<T, Tile>(static_cast<T*>(arguments.grad_bias), w, shape, first_t,
                             reinterpret_cast<float*>(staged));
  }
  if (arguments.grad_u == nullptr && arguments.grad_weight == nullptr &&
      arguments.grad_logits == nullptr) {
    return;
  }

  if (active) {
    load_weight<P, Tile>(own.weight,
                         static_cast<const T*>(arguments.weight) +
                             std::size_t(i / shape.weight_sharing) * shape.J * shape.D * shape.K,
                         1, shape, lane.index, kWarpSize);
    for (int e = lane.index; e < own.size_of_dW; e += kWarpSize) {
      own.dW[e] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    __syncwarp();  // W is there
  }

  // Steps: t = first_t..R of each tile. The states of the next step come while one is worked on.
  const int steps_of_tile = shape.R - first_t + 1;
  const int splits = plan.gradients.splits;
  const int steps = (padded.tiles - split + splits - 1) / splits * steps_of_tile;
  const auto stage = [&](int step) {
    const int tile = split + step / steps_of_tile * splits, t = first_t + step % steps_of_tile;
    const std::size_t from = std::size_t(tile) * tile_size;
    float4* to = staged + step % 2 * 2 * tile_size;
    for (int e = threadIdx.x; e < tile_size; e += blockDim.x) {
      if (t > 1) copy_in_background(to + e, w.V + (t - 2) * w.state_size + from + e);
      copy_in_background(to + tile_size + e, w.ds + (t - 1) * w.state_size + from + e);
    }
  };

  Values dW;  // where K is at most 8
  set_zero<Tile>(dW);
  typename Tile::Row dprior = {};
  int step = 0;
  stage(0);
  for (int tile = split; tile < padded.tiles; tile += splits) {
    Values u_hat, du_hat;
    set_zero<Tile>(du_hat);
    if (active) {
      const InputRow<T, Tile> row(u, tile, shape, lane);
      float first_u[2];
      row.load(first_u, i, 0, shape.K, lane);
      predict<P, T, Tile>(u_hat, own.weight, first_u, row, i, shape, lane);
    }
    for (int t = first_t; t <= shape.R; ++t, ++step) {
      wait_for_copies();
      __syncthreads();  // all see this step's states, and none reads those of the last
      if (step + 1 < steps) stage(step + 1);
      if (!active) continue;

      const float4* const states = staged + step % 2 * 2 * tile_size;
      Values V, ds;
      typename Tile::Row c, dl = {};  // dl holds dc first
      load_prior<T, Tile>(c, logits, i, shape.J, lane);
      if (t > 1) {
        load_state<Tile>(V, states, shape.J, lane);
        add_dots<Tile>(c, u_hat, V, shape.J);
      }
      load_state<Tile>(ds, states + tile_size, shape.J, lane);
      add_dots<Tile>(dl, u_hat, ds, shape.J);
      softmax<Tile>(c, shape.J, arguments.leaky, lane);
      softmax_backward<Tile>(dl, c, shape.J);
#pragma unroll
      for (int group = 0; group < Tile::kGroups; ++group) {
        for (int e = 0; e < 2; ++e) dprior[group][e] += dl[group][e];
      }
      add_scaled<Tile>(du_hat, c, ds, shape.J);
      if (arguments.full_gradient && t > 1) add_scaled<Tile>(du_hat, dl, V, shape.J);
    }
    if (!active) continue;

    // What enters both products is rounded once.
    for_each_fragment<Tile>(shape.J, [&](int, int n) {
      for (int e = 0; e < 4; ++e) du_hat[n][e] = P::prepared(du_hat[n][e]);
    });
    if (arguments.grad_weight != nullptr) {
      add_grad_weight<P, T, Tile>(dW, own, du_hat, u, tile, i, shape, lane);
    }
    if (arguments.grad_u != nullptr) {
      for_each_fragment<Tile>(shape.J, [&](int, int n) {
        own.du_hat[n * kWarpSize + swizzled(lane.index)] =
            make_float4(du_hat[n][0], du_hat[n][2], du_hat[n][1], du_hat[n][3]);
      });
      __syncwarp();  // du_hat is there for the other lanes
      write_grad_u<P, T, Tile>(static_cast<T*>(arguments.grad_u), own, tile, i, shape, lane);
    }
  }
  if (!active) return;

  const std::size_t partial = std::size_t(split) * shape.I + i;
  const std::size_t size = std::size_t(shape.J) * shape.D * shape.K;
  if (arguments.grad_weight != nullptr) {
    if (plan.gradients.partial_sums) {
      write_grad_weight<Tile>(w.partial_weight + partial * size, dW, own, shape, lane);
    } else {
      write_grad_weight<Tile>(static_cast<T*>(arguments.grad_weight) + i * size, dW, own, shape,
                              lane);
    }
  }
  if (arguments.grad_logits != nullptr) {
    for_each_group<Tile>(shape.J, [&](auto group) {
      float sum = dprior[group.value][0] + dprior[group.value][1];
      sum += shuffle_xor(sum, 1);  // the other samples
      sum += shuffle_xor(sum, 2);
      const int j = lane.capsule<Tile>(group.value);
      if (lane.q > 0 || lane.first_dim<Tile>(group.value) > 0 || j >= shape.J) return;
      if (plan.gradients.partial_sums) {
        w.partial_logits[partial * shape.J + j] = sum;
      } else {
        store(static_cast<T*>(arguments.grad_logits) + std::size_t(i) * shape.J + j, sum);
      }
    });
  }
}

// Third launch, where there are partial sums: dW over the splits and the capsules of a weight, and
// dprior over the splits.
template <class T>
__global__ void routing_backward_sums_kernel(BackwardArguments arguments, BackwardPlan plan) {
  const Shape& shape = arguments.shape;
  const BackwardWorkspace w(arguments, plan);
  const std::size_t thread = std::size_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const std::size_t threads = std::size_t(gridDim.x) * blockDim.x;
  if (arguments.grad_weight != nullptr) {
    const std::size_t size = std::size_t(shape.J) * shape.D * shape.K;
    const std::size_t rows = shape.I / shape.weight_sharing;
    for (std::size_t e = thread; e < rows * size; e += threads) {
      float sum = 0;
      for (int split = 0; split < plan.gradients.splits; ++split) {
        for (int member = 0; member < shape.weight_sharing; ++member) {
          const std::size_t i = e / size * shape.weight_sharing + member;
          sum += w.partial_weight[(std::size_t(split) * shape.I + i) * size + e % size];
        }
      }
      store(static_cast<T*>(arguments.grad_weight) + e, sum);
    }
  }
  if (arguments.grad_logits != nullptr) {
    const std::size_t size = std::size_t(shape.I) * shape.J;
    for (std::size_t e = thread; e < size; e += threads) {
      float sum = 0;
      for (int split = 0; split < plan.gradients.splits; ++split) {
        sum += w.partial_logits[split * size + e];
      }
      store(static_cast<T*>(arguments.grad_logits) + e, sum);
    }
  }
}

}  // namespace capsule_kernels::cuda

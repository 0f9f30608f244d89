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
  float4* dW;  // [fragments / 2][K / 8][32], results of mma [16, 8] over (j, d) and k
  int size_of_dW;
  float* dprior;      // [J][32], each lane's sum over the samples of its row
  float* transposed;  // [2][16][8], two fragments of du_hat
  T* weight;          // W_i [J, D, K], padded

  __device__ __forceinline__ CapsuleStore(void* memory, const Shape& shape, const Padded& padded)
      : dW(static_cast<float4*>(memory)),
        size_of_dW((padded.fragments + 1) / 2 * (padded.K / kTileDims) * kWarpSize),
        dprior(reinterpret_cast<float*>(dW + size_of_dW)),
        transposed(dprior + shape.J * kWarpSize),
        weight(reinterpret_cast<T*>(transposed + 2 * kTileSamples * kTileDims)) {}
};

// du_i = sum_jd du_hat W: the fragments of du_hat enter as they are, columns 2q and 2q + 1 in slots
// q and q + 4 of the contraction, and W follows that order.
template <class P, class T, class Tile>
__device__ __forceinline__ void write_grad_u(T* grad_u, const typename Tile::Values& du_hat,
                                             const T* weight, int tile, int i, const Shape& shape,
                                             const Lane& lane) {
  const int padded_K = Tile::padded_K(shape.K);
  for (int k0 = 0; k0 < padded_K; k0 += kTileDims) {
    float du[4] = {};
#pragma unroll
    for (int n = 0; n < Tile::kFragments; ++n) {
      if (Tile::has(n / Tile::DT, shape.J)) {
        const float a[4] = {du_hat[n][0], du_hat[n][2], du_hat[n][1], du_hat[n][3]};
        const T* w = weight + (n * kTileDims + 2 * lane.q) * padded_K + k0 + lane.g;
        const float b[2] = {to_float(w[0]), to_float(w[padded_K])};
        P::multiply_add(du, P::template operand<float>(a), P::template prepared_operand<T>(b));
      }
    }
    for (int e = 0; e < 4; ++e) {
      const int b = tile * kTileSamples + lane.g + (e < 2 ? 0 : 8);
      const int k = k0 + 2 * lane.q + e % 2;
      if (b < shape.B && k < shape.K) {
        store(grad_u + (std::size_t(b) * shape.I + i) * shape.K + k, du[e]);
      }
    }
  }
}

// dW_i += sum_b du_hat u^T over the samples of a tile. The contraction runs over samples, so that
// du_hat has to be transposed between lanes: two fragments, 16 rows of dW, at a time.
template <class P, class T, class Tile>
__device__ __forceinline__ void add_grad_weight(const CapsuleStore<T>& own,
                                                const typename Tile::Values& du_hat, const T* u,
                                                int tile, int i, const Shape& shape,
                                                const Lane& lane) {
  constexpr int kHalf = kTileSamples * kTileDims;  // of `transposed`
  const int padded_K = Tile::padded_K(shape.K);
  for (int k0 = 0; k0 < padded_K; k0 += kTileDims) {
    typename P::template Operand<2> u_pairs[2];  // of samples 0..7 and 8..15
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float x[2];
      for (int e = 0; e < 2; ++e) {
        const int b = tile * kTileSamples + half * 8 + lane.q + 4 * e, k = k0 + lane.g;
        x[e] = b < shape.B && k < shape.K
                   ? to_float(u[(std::size_t(b) * shape.I + i) * shape.K + k])
                   : 0.0f;
      }
      u_pairs[half] = P::template operand<T>(x);
    }
#pragma unroll
    for (int pair = 0; pair < Tile::kFragments / 2; ++pair) {
      if (Tile::has(2 * pair / Tile::DT, shape.J)) {
        __syncwarp();  // the previous pair is read
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const auto& x = du_hat[2 * pair + half];
          const bool inside = Tile::has((2 * pair + half) / Tile::DT, shape.J);
          float* to = own.transposed + half * kHalf + lane.g * kTileDims;
          for (int e = 0; e < 4; ++e) {
            to[(e < 2 ? 0 : 8 * kTileDims) + 2 * lane.q + e % 2] = inside ? x[e] : 0.0f;
          }
        }
        __syncwarp();
        float dW[4] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float* x = own.transposed + (half * 8 + lane.q) * kTileDims + lane.g;
          const float a[4] = {x[0], x[kHalf], x[4 * kTileDims], x[kHalf + 4 * kTileDims]};
          P::multiply_add(dW, P::template operand<float>(a), u_pairs[half]);
        }
        float4& total =
            own.dW[(pair * (padded_K / kTileDims) + k0 / kTileDims) * kWarpSize + lane.index];
        total = make_float4(total.x + dW[0], total.y + dW[1], total.z + dW[2], total.w + dW[3]);
      }
    }
  }
}

// Copies the sums of a capsule, `to` [J, D, K], out of the order of the fragments.
template <int DT, class U, class T>
__device__ __forceinline__ void write_grad_weight(U* to, const CapsuleStore<T>& own,
                                                  const Shape& shape, const Padded& padded,
                                                  const Lane& lane) {
  const int k_tiles = padded.K / kTileDims;
  for (int f = 0; f < (padded.fragments + 1) / 2 * k_tiles; ++f) {
    const float4 x = own.dW[f * kWarpSize + lane.index];
    const float values[4] = {x.x, x.y, x.z, x.w};
    for (int e = 0; e < 4; ++e) {
      const int fragment = f / k_tiles * 2 + (e < 2 ? 0 : 1);
      const int j = fragment / DT, d = fragment % DT * kTileDims + lane.g;
      const int k = f % k_tiles * kTileDims + 2 * lane.q + e % 2;
      if (j < shape.J && d < shape.D && k < shape.K) {
        store(to + (std::size_t(j) * shape.D + d) * shape.K + k, values[e]);
      }
    }
  }
}

// dbias_j = sum over b and t of ds^t_j; a block takes whole columns (j, d), its threads the
// samples.
template <class T, int DT>
__device__ __forceinline__ void write_grad_bias(T* grad_bias, const BackwardWorkspace& w,
                                                const Shape& shape, int first_t, float* sums) {
  for (int column = blockIdx.x; column < shape.J * shape.D; column += gridDim.x) {
    const int j = column / shape.D, d = column % shape.D;
    const int fragment = j * DT + d / kTileDims;
    float sum = 0;
    for (int b = threadIdx.x; b < shape.B; b += blockDim.x) {
      const int row = b % kTileSamples;
      const int lane = row % 8 * 4 + d % kTileDims / 2, e = row / 8 * 2 + d % 2;
      for (int t = first_t; t <= shape.R; ++t) {
        const float4* tile = w.ds + (t - 1) * w.state_size + b / kTileSamples * w.tile_size;
        sum += reinterpret_cast<const float*>(tile + fragment * kWarpSize + lane)[e];
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
  constexpr int DT = Tile::DT;
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
  const int tile_size = int(w.tile_size);
  const int first_t = arguments.full_gradient ? 1 : shape.R;

  const auto staged = static_cast<float4*>(shared_memory());  // [2][V, ds][tile]
  const std::size_t store_bytes = capsule_store_bytes(shape, padded, sizeof(T));
  const CapsuleStore<T> own(reinterpret_cast<char*>(staged + 4 * tile_size) + warp * store_bytes,
                            shape, padded);

  if (arguments.grad_bias != nullptr) {
    write_grad_bias<T, DT>(static_cast<T*>(arguments.grad_bias), w, shape, first_t,
                           reinterpret_cast<float*>(staged));
  }
  if (arguments.grad_u == nullptr && arguments.grad_weight == nullptr &&
      arguments.grad_logits == nullptr) {
    return;
  }

  if (active) {
    load_weight<P>(own.weight,
                   static_cast<const T*>(arguments.weight) +
                       std::size_t(i / shape.weight_sharing) * shape.J * shape.D * shape.K,
                   1, shape, padded, lane.index, kWarpSize);
    for (int e = lane.index; e < own.size_of_dW; e += kWarpSize) {
      own.dW[e] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    for (int j = 0; j < shape.J; ++j) own.dprior[j * kWarpSize + lane.index] = 0.0f;
  }

  // Steps: t = first_t..R of each tile. The states of the next step come while one is worked on.
  const int steps_of_tile = shape.R - first_t + 1;
  const int splits = plan.gradients.splits;
  const int steps = (padded.tiles - split + splits - 1) / splits * steps_of_tile;
  const auto tile_of = [&](int step) { return split + step / steps_of_tile * splits; };
  const auto t_of = [&](int step) { return first_t + step % steps_of_tile; };
  const auto stage = [&](int step) {
    const std::size_t from = std::size_t(tile_of(step)) * tile_size;
    const int t = t_of(step);
    float4* to = staged + step % 2 * 2 * tile_size;
    for (int e = threadIdx.x; e < tile_size; e += blockDim.x) {
      if (t > 1) copy_in_background(to + e, w.V + (t - 2) * w.state_size + from + e);
      copy_in_background(to + tile_size + e, w.ds + (t - 1) * w.state_size + from + e);
    }
  };

  typename Tile::Values du_hat;
  float first_u[4], next_u[4] = {};
  stage(0);
  if (active) {
    InputRows<T, Tile>(u, tile_of(0), shape, lane).load(next_u, i, 0, shape.K, lane);
  }
  for (int step = 0; step < steps; ++step) {
    const int tile = tile_of(step), t = t_of(step);
    wait_for_copies();
    __syncthreads();  // all see this step's states, and none reads those of the last
    if (step + 1 < steps) stage(step + 1);
    if (!active) continue;

    const InputRows<T, Tile> rows(u, tile, shape, lane);
    if (t == first_t) {
#pragma unroll
      for (int n = 0; n < Tile::kFragments; ++n) {
        for (int e = 0; e < 4; ++e) du_hat[n][e] = 0.0f;
      }
      for (int e = 0; e < 4; ++e) first_u[e] = next_u[e];
      if (tile + splits < padded.tiles) {
        InputRows<T, Tile>(u, tile + splits, shape, lane).load(next_u, i, 0, shape.K, lane);
      }
    }
    const float4* V = staged + step % 2 * 2 * tile_size;
    const float4* ds = V + tile_size;
    typename Tile::Row c, dl;  // dl holds dc first
    load_prior<T, Tile>(c, logits, i, shape.J);
#pragma unroll
    for (int j0 = 0; j0 < Tile::kCapsules; j0 += 2) {
      // u_hat is computed anew for each t: cheaper than the registers to keep it. Two output
      // capsules at a time, so that the latencies of one are filled by the other.
      float u_hat[2 * DT][4];
      predict<P, T, Tile>(u_hat, j0 * DT, own.weight, first_u, rows, i, shape, lane);
#pragma unroll
      for (int j = j0; j < j0 + 2 && j < Tile::kCapsules; ++j) {
        if (Tile::has(j, shape.J)) {
          const auto* x = u_hat + (j - j0) * DT;
          if (t > 1) c[j] += row_dot<DT>(x, V + j * DT * kWarpSize, lane);
          dl[j] = row_dot<DT>(x, ds + j * DT * kWarpSize, lane);
        } else {
          dl[j] = 0.0f;
        }
      }
    }
    softmax<Tile>(c, shape.J, arguments.leaky);
    softmax_backward<Tile>(dl, c, shape.J);
    if (arguments.grad_logits != nullptr) {
#pragma unroll
      for (int j = 0; j < Tile::kCapsules; ++j) {
        if (Tile::has(j, shape.J)) own.dprior[j * kWarpSize + lane.index] += dl[j];
      }
    }
    add_scaled_state<Tile>(du_hat, c, ds, shape.J, lane);
    if (arguments.full_gradient && t > 1) add_scaled_state<Tile>(du_hat, dl, V, shape.J, lane);

    if (t < shape.R) continue;
    if (arguments.grad_u != nullptr) {
      write_grad_u<P, T, Tile>(static_cast<T*>(arguments.grad_u), du_hat, own.weight, tile, i,
                               shape, lane);
    }
    if (arguments.grad_weight != nullptr) {
      add_grad_weight<P, T, Tile>(own, du_hat, u, tile, i, shape, lane);
    }
  }
  if (!active) return;

  const std::size_t partial = std::size_t(split) * shape.I + i;
  const std::size_t size = std::size_t(shape.J) * shape.D * shape.K;
  if (arguments.grad_weight != nullptr) {
    if (plan.gradients.partial_sums) {
      write_grad_weight<DT>(w.partial_weight + partial * size, own, shape, padded, lane);
    } else {
      write_grad_weight<DT>(static_cast<T*>(arguments.grad_weight) + i * size, own, shape, padded,
                            lane);
    }
  }
  if (arguments.grad_logits != nullptr) {
    for (int j = 0; j < shape.J; ++j) {
      float sum = own.dprior[j * kWarpSize + lane.index];
      sum += shuffle_xor(sum, 1);  // both rows of a quad, then the 8 quads
      for (int step = 4; step < kWarpSize; step *= 2) sum += shuffle_xor(sum, step);
      if (lane.index == 0) {
        if (plan.gradients.partial_sums) {
          w.partial_logits[partial * shape.J + j] = sum;
        } else {
          store(static_cast<T*>(arguments.grad_logits) + std::size_t(i) * shape.J + j, sum);
        }
      }
    }
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

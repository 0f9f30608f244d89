// Backward, second launch: the last sweep, all iterations together. A block owns input capsules and
// a share of the samples; nothing is exchanged but, where capsules share a weight or the samples
// are split, partial sums of dW and dprior, which a third small launch adds in a fixed order.
#pragma once

#include "backward_workspace.cuh"
#include "sweep.cuh"

namespace capsule_kernels::cuda {

// What a block keeps on chip, `gradient_bytes` in all.
template <class T>
struct GradientStore {
  const int tile_size;       // of a state tile [fragments][32], in float4s
  const int weight_quads;    // of W_i [K / 8][fragments][32]
  Arrivals* const arrived;   // [buffers], of states
  Arrivals* const finished;  // [buffers], of threads that are through with them
  float4* const states;      // [buffers][V^1..V^(R-1), ds^1..ds^R][tile]
  float4* const du_hat;      // [warps][tile]
  float4* const dW;          // [stored capsules][W_i]
  float* const dprior;       // [capsules][J][32], each lane's sum over its samples
  Columns<T>* const weight;  // [capsules][W_i]

  __device__ __forceinline__ GradientStore(const Shape& shape, const Padded& padded,
                                           const GradientPlan& plan)
      : tile_size(padded.fragments * kWarpSize),
        weight_quads(tile_size * (padded.K / kStepDims)),
        arrived(static_cast<Arrivals*>(shared_memory())),
        finished(arrived + plan.buffers),
        states(reinterpret_cast<float4*>(finished + plan.buffers)),
        du_hat(states + plan.buffers * gradient_states(shape) * tile_size),
        dW(du_hat + plan.warps * tile_size),
        dprior(reinterpret_cast<float*>(dW + stored_capsules(shape, plan.capsules, plan.warps) *
                                                 weight_quads)),
        weight(reinterpret_cast<Columns<T>*>(dprior + plan.capsules * padded.J * kWarpSize)) {}
};

// To an address aligned to both.
template <class T>
__device__ __forceinline__ void store_pair(T* to, float first, float second) {
  Pair<T> pair;
  store(&pair.first, first);
  store(&pair.second, second);
  *reinterpret_cast<Pair<T>*>(to) = pair;
}

// du_i = sum_jd du_hat W for the 8 samples of a tile. The contraction runs over (j, d), so that
// du_hat, which lies on chip, is read across lanes: lane (g, q) takes of each fragment what lanes
// (2q, g / 2) and (2q + 1, g / 2) have of sample g, rows g' and g' + 8 of each, and the same of W
// for element g of K. There are two products, rows g' and rows g' + 8; half of each is of no use,
// since the left side has room for 16 samples.
template <class P, class T, class Tile>
__device__ __forceinline__ void write_grad_u(T* grad_u, const T* u, const float4* du_hat,
                                             const Columns<T>* all_weight,
                                             const InputRow<T, Tile>& row, int i,
                                             const Shape& shape, const Lane& lane) {
  const int fragments = Tile::fragments_of(shape.J);
  const int first = 2 * swizzled(8 * lane.q + lane.g / 2) + lane.g % 2;
  const int second = 2 * swizzled(8 * lane.q + 4 + lane.g / 2) + lane.g % 2;
  for (int k0 = 0; k0 < Tile::padded_K(shape.K); k0 += kStepDims) {
    const auto x = reinterpret_cast<const Pair<float>*>(du_hat);
    const auto w = reinterpret_cast<const T*>(all_weight + k0 / kStepDims * fragments * kWarpSize);
    float low[4] = {}, high[4] = {};
    for_each_fragment<Tile>(shape.J, [&](int, int n) {
      const int place = n * 2 * kWarpSize;
      const Pair<float> x0 = x[place + first], x1 = x[place + second];
      const float a[4] = {x0.first, x0.second, x1.first, x1.second};
      const auto rows = P::template prepared_operand<float>(a);
      const T* const w0 = w + 2 * (place + first);
      const T* const w1 = w + 2 * (place + second);
      const float b_low[2] = {to_float(w0[0]), to_float(w1[0])};
      const float b_high[2] = {to_float(w0[1]), to_float(w1[1])};
      P::multiply_add(low, rows, P::template prepared_operand<T>(b_low));
      P::multiply_add(high, rows, P::template prepared_operand<T>(b_high));
    });
    const float du[2] = {low[0] + high[2], low[1] + high[3]};
    const int k = k0 + 2 * lane.q;
    if (!row.inside || k >= shape.K) continue;
    T* const to = grad_u + (row.u - u) + (i * shape.K + k0);
    if (Tile::kKnown || shape.K % 2 == 0) {
      store_pair(to, du[0], du[1]);
    } else {
      store(to, du[0]);
      if (k + 1 < shape.K) store(to + 1, du[1]);
    }
  }
}

// dW_i += sum_b du_hat u^T over the samples of a tile: a fragment of du_hat is the left side of the
// product as it is, columns 2q and 2q + 1 in slots q and q + 4 of the contraction. The sum is in
// registers, or on chip where `stored` is not null. `first_u`: as for `predict`.
template <class P, class T, class Tile>
__device__ __forceinline__ void add_grad_weight(typename Tile::Values& dW, float4* stored,
                                                const typename Tile::Values& du_hat,
                                                const float (&first_u)[1][2],
                                                const InputRow<T, Tile> (&row)[1], int i,
                                                const Shape& shape, const Lane& lane) {
  const int fragments = Tile::fragments_of(shape.J);
  for (int k0 = 0; k0 < Tile::padded_K(shape.K); k0 += kStepDims) {
    float pair[2] = {first_u[0][0], first_u[0][1]}, x[2];
    if (k0 > 0) row[0].load(pair, i, k0, shape.K, lane);
    // From elements 2q and 2q + 1 of sample g to element g of samples 2q and 2q + 1.
    for (int e = 0; e < 2; ++e) {
      const int from = (2 * lane.q + e) * 4 + lane.g / 2;
      const float even = shuffle(pair[0], from), odd = shuffle(pair[1], from);
      x[e] = lane.g % 2 == 0 ? even : odd;
    }
    const auto u_pair = P::template operand<T>(x);
    const auto add_product = [&](float (&sum)[4], int n) {
      const float a[4] = {du_hat[n][0], du_hat[n][2], du_hat[n][1], du_hat[n][3]};
      P::multiply_add(sum, P::template prepared_operand<float>(a), u_pair);
    };
    if (Tile::kKnown && stored == nullptr) {
      for_each_fragment<Tile>(shape.J, [&](int, int n) { add_product(dW[n], n); });
    } else {
      for_each_fragment<Tile>(shape.J, [&](int, int n) {
        float4& to = stored[(k0 / kStepDims * fragments + n) * kWarpSize + lane.index];
        float sum[4] = {to.x, to.y, to.z, to.w};
        add_product(sum, n);
        to = packed(sum);
      });
    }
  }
}

// The sums of a capsule, `to` [J, D, K], out of the order of the fragments.
template <class Tile, class U>
__device__ __forceinline__ void write_grad_weight(U* to, const typename Tile::Values& dW,
                                                  const float4* stored, const Shape& shape,
                                                  const Lane& lane) {
  const int fragments = Tile::fragments_of(shape.J);
  for (int k0 = 0; k0 < Tile::padded_K(shape.K); k0 += kStepDims) {
    for_each_fragment<Tile>(shape.J, [&](int group, int n) {
      float sum[4] = {};
      if (Tile::kKnown && stored == nullptr) {
        for (int e = 0; e < 4; ++e) sum[e] = dW[n][e];
      } else {
        add_to(sum, stored[(k0 / kStepDims * fragments + n) * kWarpSize + lane.index]);
      }
      const int j = lane.capsule<Tile>(group), k = k0 + 2 * lane.q;
      for (int e = 0; e < 2; ++e) {
        const int d = lane.first_dim<Tile>(group) + 2 * (n - Tile::first_fragment(group)) + e;
        if (j >= shape.J || d >= shape.D || k >= shape.K) continue;
        U* const pair = to + (std::size_t(j) * shape.D + d) * shape.K + k;
        if (Tile::kKnown) {
          store_pair(pair, sum[2 * e], sum[2 * e + 1]);
        } else {
          store(pair, sum[2 * e]);
          if (k + 1 < shape.K) store(pair + 1, sum[2 * e + 1]);
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
  using Row = typename Tile::Row;
  const Shape& shape = arguments.shape;
  const Padded padded(shape);
  const BackwardWorkspace w(arguments, plan);
  const GradientPlan& gradients = plan.gradients;
  const GradientStore<T> store_of(shape, padded, gradients);
  const Lane lane;
  const int warps = gradients.warps, warp = threadIdx.x / kWarpSize, splits = gradients.splits;
  const int groups = ceil_div(shape.I, gradients.capsules);
  const int first_i = blockIdx.x % groups * gradients.capsules, split = blockIdx.x / groups;
  const int capsules = min(gradients.capsules, shape.I - first_i);
  const auto u = static_cast<const T*>(arguments.u);
  const auto logits = static_cast<const T*>(arguments.logits);
  const int R = shape.R, first_t = arguments.full_gradient ? 1 : R;
  const int tile_size = store_of.tile_size;

  if (arguments.grad_bias != nullptr) {
    write_grad_bias<T, Tile>(static_cast<T*>(arguments.grad_bias), w, shape, first_t,
                             reinterpret_cast<float*>(store_of.states));
  }
  if (arguments.grad_u == nullptr && arguments.grad_weight == nullptr &&
      arguments.grad_logits == nullptr) {
    return;
  }

  // The states of every `splits`th tile come to chip in turn, each into the next buffer.
  const int buffers = gradients.buffers;
  const auto use_of = [&](int round) { return gradients.by_buffers.divide(round); };
  const auto buffer_of = [&](int round) { return round - use_of(round) * buffers; };
  // In the order V^1..V^(R-1), ds^1..ds^R, as in the workspace.
  const auto send_for_states = [&](int tile, int round) {
    if (tile >= padded.tiles) return;
    if (round >= buffers) store_of.finished[buffer_of(round)].wait(use_of(round) - 1);
    float4* const to = store_of.states + buffer_of(round) * gradient_states(shape) * tile_size;
    // Without the full gradient only V^(R-1) and ds^R.
    const int step = arguments.full_gradient ? 1 : R;
    for (int state = arguments.full_gradient ? 0 : max(R - 2, 0); state < gradient_states(shape);
         state += step) {
      const float4* from = reinterpret_cast<const float4*>(arguments.workspace) + plan.first_state +
                           state * plan.sweep.state_size + std::size_t(tile) * tile_size;
      for (int e = threadIdx.x; e < tile_size; e += blockDim.x) {
        copy_in_background<16>(to + state * tile_size + e, from + e);
      }
    }
    store_of.arrived[buffer_of(round)].arrive_after_copies();
  };

  // Where the dW of a capsule of the block is stored; null: in the registers of its warp.
  const auto stored_grad_weight = [&](int capsule) -> float4* {
    const int stored = Tile::kKnown ? capsule - warps : capsule;
    return stored < 0 ? nullptr : store_of.dW + stored * store_of.weight_quads;
  };
  const auto rows_of = [&](int capsule) {
    return reinterpret_cast<Rows<T>*>(store_of.weight + capsule * store_of.weight_quads);
  };
  if (threadIdx.x == 0) {
    for (int buffer = 0; buffer < buffers; ++buffer) {
      store_of.arrived[buffer].start(blockDim.x);
      store_of.finished[buffer].start(blockDim.x);
    }
  }
  // The first warp takes the first capsule, and the one after all have one, and so on.
  for (int capsule = warp; capsule < capsules; capsule += warps) {
    const int i = first_i + capsule;
    copy_weight<Tile>(rows_of(capsule),
                      static_cast<const T*>(arguments.weight) +
                          std::size_t(i / shape.weight_sharing) * shape.J * shape.D * shape.K,
                      shape, lane);
    if (float4* const dW = stored_grad_weight(capsule)) {
      for (int e = lane.index; e < store_of.weight_quads; e += kWarpSize) {
        dW[e] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      }
    }
    for (int j = 0; j < padded.J; ++j) {
      store_of.dprior[(capsule * padded.J + j) * kWarpSize + lane.index] = 0.0f;
    }
  }
  end_group_of_copies();
  __syncthreads();  // arrivals can be counted
  // With four buffers nobody waits for those who are not yet through with the last tile.
  for (int round = 0; round < buffers / 2; ++round) send_for_states(split + round * splits, round);

  Values own_dW;  // where it is not stored
  set_zero(own_dW);
  // u of the warp's own capsule for the next tile.
  float next_u[2] = {};
  const auto load_u = [&](float (&x)[2], int tile, int capsule) {
    InputRow<T, Tile>(u, tile, shape, lane).load(x, first_i + capsule, 0, shape.K, lane);
  };
  if (warp < capsules) load_u(next_u, split, warp);

  // Other lanes read W behind the barrier of du_hat, other warps when all are through with the
  // first tile.
  wait_for_all_but<0>();
  for (int capsule = warp; capsule < capsules; capsule += warps) {
    rows_to_columns<P, Tile>(rows_of(capsule), shape, lane);
  }

  for (int tile = split, round = 0; tile < padded.tiles; tile += splits, ++round) {
    send_for_states(tile + buffers / 2 * splits, here(round) + buffers / 2);
    const float4* const states =
        store_of.states + buffer_of(round) * gradient_states(shape) * tile_size;
    store_of.arrived[buffer_of(round)].wait(use_of(round));

    // The warp's own capsule, then those left over, each in a warp of its own.
    for (int capsule = warp, turn = 0; turn <= capsules - warps || turn == 0; ++turn) {
      if (turn > 0) {
        capsule = warps + turn - 1;
        if ((capsule + round) % warps != warp) continue;
        // Its last warp is through with it.
        const int before = here(round) - 1;
        if (before >= 0) store_of.finished[buffer_of(before)].wait(use_of(before));
      }
      if (capsule >= capsules) continue;
      const int i = first_i + capsule;
      const Columns<T>* const weight = store_of.weight + capsule * store_of.weight_quads;
      float first_u[1][2] = {{next_u[0], next_u[1]}};
      if (turn > 0) {
        load_u(first_u[0], tile, capsule);
      } else if (tile + splits < padded.tiles) {
        load_u(next_u, tile + splits, capsule);
      }
      Values u_hat, du_hat;
      const InputRow<T, Tile> row[1] = {{u, tile, shape, lane}};
      predict<P, T, Tile>(u_hat, weight, first_u, row, i, shape, lane);
      set_zero(du_hat);
      for (int t = first_t; t <= R; ++t) {
        Values V, ds;
        Row of_c[1], dl;  // dl holds dc first
        Row& c = of_c[0];
        load_state<Tile>(ds, states + (R - 1 + t - 1) * tile_size, shape.J, lane);
        if (t == 1 && logits == nullptr && arguments.grad_logits == nullptr) {
          // The couplings are all the same, and nothing came before that dl could flow into.
          for (auto& x : c) x[0] = x[1] = arguments.uniform_coupling;
          add_scaled<Tile>(du_hat, c, ds, shape.J);
          continue;
        }
        if (t > 1) {
          load_state<Tile>(V, states + (t - 2) * tile_size, shape.J, lane);
          dots<Tile>(c, u_hat, V, shape.J);
        } else {
          set_zero(c);
        }
        dots<Tile>(dl, u_hat, ds, shape.J);
        add_prior<T, Tile>(c, logits, i, shape.J, lane);
        softmax<Tile>(of_c, shape.J, arguments.leaky, lane);
        softmax_backward<Tile>(dl, c, shape.J);
        if (arguments.grad_logits != nullptr) {
          for_each_group<Tile>(shape.J, [&](auto group) {
            store_of.dprior[(capsule * padded.J + group.value) * kWarpSize + lane.index] +=
                dl[group.value][0] + dl[group.value][1];
          });
        }
        add_scaled<Tile>(du_hat, c, ds, shape.J);
        if (arguments.full_gradient && t > 1) {
          forget_loads();  // for all of V there is no room beside what the softmax needs
          load_state<Tile>(V, states + (t - 2) * tile_size, shape.J, lane, 1);
          add_scaled<Tile>(du_hat, dl, V, shape.J);
        }
      }

      for_each_fragment<Tile>(shape.J, [&](int, int n) {
        for (float& x : du_hat[n]) x = P::nearly_rounded(x);
      });
      if (arguments.grad_weight != nullptr) {
        add_grad_weight<P, T, Tile>(own_dW, stored_grad_weight(capsule), du_hat, first_u, row, i,
                                    shape, lane);
      }
      if (arguments.grad_u != nullptr) {
        float4* const shown = store_of.du_hat + warp * tile_size;
        __syncwarp();  // the du_hat of another capsule is read
        for_each_fragment<Tile>(shape.J, [&](int, int n) {
          shown[n * kWarpSize + swizzled(lane.index)] =
              make_float4(du_hat[n][0], du_hat[n][2], du_hat[n][1], du_hat[n][3]);
        });
        __syncwarp();  // du_hat is there for the other lanes
        write_grad_u<P, T, Tile>(static_cast<T*>(arguments.grad_u), u, shown, weight, row[0], i,
                                 shape, lane);
      }
    }
    store_of.finished[buffer_of(here(round))].arrive();
  }
  __syncthreads();  // what is stored of dW and dprior is whole

  const std::size_t size = std::size_t(shape.J) * shape.D * shape.K;
  for (int capsule = warp; capsule < capsules; capsule += warps) {
    const std::size_t i = first_i + capsule, partial = std::size_t(split) * shape.I + i;
    if (arguments.grad_weight != nullptr) {
      const float4* const stored = stored_grad_weight(capsule);
      if (plan.partial_sums) {
        write_grad_weight<Tile>(w.partial_weight + partial * size, own_dW, stored, shape, lane);
      } else {
        write_grad_weight<Tile>(static_cast<T*>(arguments.grad_weight) + i * size, own_dW, stored,
                                shape, lane);
      }
    }
    if (arguments.grad_logits == nullptr) continue;
    for_each_group<Tile>(shape.J, [&](auto group) {
      float sum = store_of.dprior[(capsule * padded.J + group.value) * kWarpSize + lane.index];
      sum += shuffle_xor(sum, 1);  // the other samples
      sum += shuffle_xor(sum, 2);
      const int j = lane.capsule<Tile>(group.value);
      if (lane.q > 0 || lane.first_dim<Tile>(group.value) > 0 || j >= shape.J) return;
      if (plan.partial_sums) {
        w.partial_logits[partial * shape.J + j] = sum;
      } else {
        store(static_cast<T*>(arguments.grad_logits) + i * shape.J + j, sum);
      }
    });
  }
}

// Elements of a row that are loaded and stored at once.
template <class T, int kCount>
struct alignas(kCount * sizeof(T)) Elements {
  T values[kCount];
};

// dW over the parts and the capsules of a weight; a block takes a piece of a row of W at a time.
template <int kCount, class T>
__device__ __forceinline__ void add_partial_weights(T* grad_weight, const float* partial_weight,
                                                    const Shape& shape, const BackwardPlan& plan) {
  const int size = shape.J * shape.D * shape.K / kCount;  // of a row
  const int pieces = ceil_div(size, int(blockDim.x));
  const int work = shape.I / shape.weight_sharing * pieces;
  const auto from = reinterpret_cast<const Elements<float, kCount>*>(partial_weight);
  for (int item = blockIdx.x; item < work; item += gridDim.x) {
    const int row = item / pieces, e = item % pieces * int(blockDim.x) + int(threadIdx.x);
    if (e >= size) continue;
    float sum[kCount] = {};
    for (int member = 0; member < shape.weight_sharing; ++member) {
      const int i = row * shape.weight_sharing + member;
      const int parts = plan.outputs.blocks > 0 ? plan.outputs.parts_of(i) : plan.parts;
#pragma unroll 4
      for (int part = 0; part < parts; ++part) {
        const auto x = from[(std::size_t(part) * shape.I + i) * size + e];
        for (int n = 0; n < kCount; ++n) sum[n] += x.values[n];
      }
    }
    Elements<T, kCount> total;
    for (int n = 0; n < kCount; ++n) store(total.values + n, sum[n]);
    reinterpret_cast<Elements<T, kCount>*>(grad_weight)[std::size_t(row) * size + e] = total;
  }
}

// Third launch, where there are partial sums: dW, and dprior over the parts.
template <class T>
__global__ void routing_backward_sums_kernel(BackwardArguments arguments, BackwardPlan plan) {
  const Shape& shape = arguments.shape;
  const BackwardWorkspace w(arguments, plan);
  if (arguments.grad_weight != nullptr) {
    const auto grad_weight = static_cast<T*>(arguments.grad_weight);
    if (shape.J * shape.D * shape.K % 4 == 0) {
      add_partial_weights<4>(grad_weight, w.partial_weight, shape, plan);
    } else {
      add_partial_weights<1>(grad_weight, w.partial_weight, shape, plan);
    }
  }
  if (arguments.grad_logits != nullptr) {
    const std::size_t size = std::size_t(shape.I) * shape.J;
    const std::size_t threads = std::size_t(gridDim.x) * blockDim.x;
    for (std::size_t e = std::size_t(blockIdx.x) * blockDim.x + threadIdx.x; e < size;
         e += threads) {
      float sum = 0;
      for (int part = 0; part < plan.parts; ++part) sum += w.partial_logits[part * size + e];
      store(static_cast<T*>(arguments.grad_logits) + e, sum);
    }
  }
}

}  // namespace capsule_kernels::cuda

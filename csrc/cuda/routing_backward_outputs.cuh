// Backward, second launch, of plain calls in TF32 and 16 bits: the last sweep by output capsules.
//
// A block works on 16 input capsules and 8 samples at a time, a unit, and a warp of it on one
// output capsule j. The products have the states on their right side,
//
//   P^x_bik = sum_d W_ijdk x_bjd,   x one of V^1..V^(R-1), ds^1..ds^R,
//
// so that u_hat is never formed: u . P^V is a logit, u . P^ds the gradient of a coupling, and
// du_bi = sum_jt c^t P^ds + dl^t P^V. The rows of a product are the input capsules at one k, its
// columns the samples: a lane holds all k of two input capsules and two samples, and all of these
// sums are its own. dW is a product over the samples, whose right side, c u or dl u, is the lane's
// own as well.
//
// Only softmax and the sum of du over j cross warps. Both go through shared memory, where a thread
// takes a pair (sample, input capsule); the logits of the next unit are computed meanwhile.
//
// The four pairs of a lane: n = 0..3 is sample 2q + n % 2 and input capsule g + n / 2 * 8.
#pragma once

#include "backward_workspace.cuh"
#include "routing_backward_gradients.cuh"

namespace capsule_kernels::cuda {

template <class T>
using Quad = Elements<T, 4>;  // k to k + 3 of a row of u or W

// What a block keeps on chip, `plan_outputs` has the bytes. A warp's states and W are read by
// itself alone.
template <class T>
struct OutputStore {
  float4* const states;        // [2][J][2 R - 1][32]
  float4* const coefficients;  // [2][R - 1][l and c, dc and dl][J][32]
  float4* const du;            // [J][quad_place], of each output capsule
  Quad<T>* const u;            // [3][quad_place]
  T* const weight;             // [J][k][d / 8][32][4]

  __device__ __forceinline__ OutputStore(int J, int R)
      : states(static_cast<float4*>(shared_memory())),
        coefficients(states + kStateBuffers * J * (2 * R - 1) * kWarpSize),
        du(coefficients + kStateBuffers * 2 * (R - 1) * J * kWarpSize),
        u(reinterpret_cast<Quad<T>*>(du + J * kInputQuads)),
        weight(reinterpret_cast<T*>(u + kInputBuffers * kInputQuads)) {}
};

// Where elements 4 half to 4 half + 3 of a lane's nth pair lie. Lanes are mixed so that neither
// those of a warp nor threads with neighbouring elements in memory meet in a bank.
__device__ __forceinline__ int quad_place(int half, int n, int lane) {
  return (half * 4 + n) * kWarpSize + (lane ^ (lane / 8 % 2) ^ (2 * half));
}

// W_ij of 16 input capsules to chip, 0 past I, as the left sides of products: input capsules g and
// g + 8 at one k, and in slots q and q + 4 of the contraction two neighbouring d; which of them
// comes first changes at q = 2, so that the states are read without bank conflicts. The lanes of
// the two halves of d are mixed for the same reason.
__device__ __forceinline__ int weight_place(int k, int half, int lane) {
  return ((k * 2 + half) * kWarpSize + (lane ^ (half * 4))) * 4;
}

template <class P, class T>
__device__ __forceinline__ void load_output_weight(T* to, const T* weight, int first_i, int j,
                                                   int J, const Shape& shape,
                                                   const Divisor& by_weight_sharing,
                                                   const Lane& lane) {
  const int d = lane.index / 2, k0 = lane.index % 2 * 4;
  const int q = d / 2 % 4, slot = d % 2 == q / 2 ? 0 : 1;
  const auto load = [&](int i) {
    Quad<T> quad;
    for (T& x : quad.values) store(&x, 0.0f);
    if (i < shape.I) {
      const std::size_t row = std::size_t(by_weight_sharing.divide(i)) * J + j;
      quad = *reinterpret_cast<const Quad<T>*>(weight + (row * kTileRows + d) * kStepDims + k0);
    }
    return quad;
  };
#pragma unroll 4
  for (int g = 0; g < kOutputInputs / 2; ++g) {
    const Quad<T> x = load(first_i + g), y = load(first_i + g + kOutputInputs / 2);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      *reinterpret_cast<Pair<T>*>(to + weight_place(k0 + k, d / 8, g * 4 + q) + slot * 2) = {
          P::prepared(x.values[k]), P::prepared(y.values[k])};
    }
  }
}

// Softmax over j and its gradient, of one pair (sample, input capsule) a thread: from l and dc, in
// place.
__device__ __forceinline__ void softmax_and_gradient(float4* coefficients, int steps, int J,
                                                     bool leaky) {
  constexpr int kPairs = kOutputInputs * kTileSamples;
#pragma unroll 1
  for (int e = threadIdx.x; e < steps * kPairs; e += J * kWarpSize) {
    float* const first =
        reinterpret_cast<float*>(coefficients) + e / kPairs * (2 * J * kPairs) + e % kPairs;
    float c[kMostOutputs], dc[kMostOutputs];
    float largest = leaky ? 0.0f : -INFINITY;
#pragma unroll
    for (int j = 0; j < kMostOutputs; ++j) {
      if (j >= J) break;
      c[j] = first[j * kPairs];
      dc[j] = first[(J + j) * kPairs];
      largest = fmaxf(largest, c[j]);
    }
    const float shift = largest * kLog2E;
    float total = leaky ? exp2_approximate(-shift) : 0.0f, mean = 0.0f;
#pragma unroll
    for (int j = 0; j < kMostOutputs; ++j) {
      if (j >= J) break;
      c[j] = exp2_approximate(c[j] * kLog2E - shift);
      total += c[j];
      mean += c[j] * dc[j];
    }
    const float inverse = reciprocal(total);
    mean *= inverse;
#pragma unroll
    for (int j = 0; j < kMostOutputs; ++j) {
      if (j >= J) break;
      c[j] *= inverse;
      first[j * kPairs] = c[j];
      first[(J + j) * kPairs] = c[j] * (dc[j] - mean);
    }
  }
}

template <class P, class T, class Tile, int kR>
__global__ void __launch_bounds__(kMostOutputs* kWarpSize, 1)
    routing_backward_outputs_kernel(BackwardArguments arguments, BackwardPlan plan) {
  constexpr int kStates = 2 * kR - 1, kSteps = kR - 1;  // iterations with a softmax
  constexpr int kFirstDs = kSteps;                      // ds^1, behind V^1..V^(R-1)
  using Right = typename P::template Operand<2>;
  using Left = typename P::template Operand<4>;
  const Shape& shape = arguments.shape;
  const OutputPlan& outputs = plan.outputs;
  const int J = Tile::outputs(shape.J);
  const OutputStore<T> store_of(J, kR);
  const Lane lane;
  const int j = threadIdx.x / kWarpSize;
  const float uniform = P::nearly_rounded(arguments.uniform_coupling);

  if (arguments.grad_bias != nullptr) {
    write_grad_bias<T, Tile>(static_cast<T*>(arguments.grad_bias),
                             BackwardWorkspace(arguments, plan), shape, 1,
                             reinterpret_cast<float*>(store_of.states));
  }
  if (arguments.grad_u == nullptr && arguments.grad_weight == nullptr) return;

  const auto states_of = [&](int tile) {
    return store_of.states + (tile % kStateBuffers * J + here(j)) * (kStates * kWarpSize);
  };
  const auto inputs_of = [&](int tile) { return store_of.u + tile % kInputBuffers * kInputQuads; };
  const auto coefficients_of = [&](int tile) {
    return store_of.coefficients + tile % kStateBuffers * (2 * kSteps * J * kWarpSize);
  };

  // Calls visit(place, element, inside) for each of the thread's quads of u or du of a unit:
  // neighbouring threads have neighbouring elements.
  const auto for_each_quad = [&](int group, int tile, auto visit) {
#pragma unroll 1
    for (int e = threadIdx.x; e < kInputQuads; e += J * kWarpSize) {
      const int half = e % 2, g = e / 2 % 8, q = e / 16 % 4, n = e / 64;
      const int b = tile * kTileSamples + 2 * q + n % 2, i = group * kOutputInputs + g + n / 2 * 8;
      visit(quad_place(half, n, g * 4 + q), (std::size_t(b) * shape.I + i) * kStepDims + half * 4,
            b < shape.B && i < shape.I);
    }
  };
  // For the whole block.
  const auto send_for_inputs = [&](int group, int tile) {
    const auto u = static_cast<const T*>(arguments.u);
    for_each_quad(group, tile, [&](int place, std::size_t element, bool inside) {
      copy_in_background<4 * sizeof(T)>(inputs_of(tile) + place, u + (inside ? element : 0),
                                        inside);
    });
  };
  // For the warp: of a state tile the lane takes dimensions 2g and 2g + 1 of samples 2q and 2q + 1.
  const auto send_for_states = [&](int tile) {
    const Place place = place_of<Tile>(here(j), 2 * lane.g);
    float4* const to = states_of(tile) + lane.index;
    const float4* const from = reinterpret_cast<const float4*>(arguments.workspace) +
                               plan.first_state +
                               tile * std::size_t(Tile::fragments_of(J) * kWarpSize) +
                               place.fragment * kWarpSize + place.g * 4 + lane.q;
#pragma unroll
    for (int state = 0; state < kStates; ++state) {
      copy_in_background<16>(to + state * kWarpSize, from + state * plan.sweep.state_size);
    }
  };
  // du of a unit, summed over j.
  const auto write_grad_u = [&](int group, int tile) {
    for_each_quad(group, tile, [&](int place, std::size_t element, bool inside) {
      float sum[4] = {};
#pragma unroll 2
      for (int output = 0; output < J; ++output) {
        add_to(sum, store_of.du[output * kInputQuads + place]);
      }
      Quad<T> du;
      for (int k = 0; k < 4; ++k) store(du.values + k, sum[k] * P::kUnrounded);
      if (inside) *reinterpret_cast<Quad<T>*>(static_cast<T*>(arguments.grad_u) + element) = du;
    });
  };

  // A state as the right side of products over d: of sample g, as `load_output_weight` has W.
  const auto load_over_d = [&](Right(&x)[2], int tile, int state) {
    const auto values = reinterpret_cast<const float*>(states_of(tile) + state * kWarpSize);
    const int first = lane.q / 2 * 2;
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const int place = ((lane.q + 4 * step) * 4 + lane.g / 2) * 4 + lane.g % 2;
      const float pair[2] = {values[place + first], values[place + 2 - first]};
      x[step] = P::template operand<float>(pair);
    }
  };
  // The same as the left side of a product over samples: its rows are d.
  const auto over_samples = [&](int tile, int state) {
    const float4 x = states_of(tile)[state * kWarpSize + lane.index];
    const float values[4] = {x.x, x.z, x.y, x.w};
    return P::template operand<float>(values);
  };
  T* const weight = store_of.weight + j * kOutputWeight;
  struct Weight {
    Left steps[2];
  };
  const auto weight_at = [&](int k) {
    Weight result;
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const auto w = *reinterpret_cast<const Quad<T>*>(weight + weight_place(k, step, lane.index));
      float values[4];
      for (int e = 0; e < 4; ++e) values[e] = to_float(w.values[e]);
      result.steps[step] = P::template prepared_operand<T>(values);
    }
    return result;
  };
  // sum += factors P^x at one k, for the four pairs.
  const auto add_product = [&](float (&sum)[4], const float (&factors)[4], const Weight& w,
                               const Right(&x)[2]) {
    float product[4];
    P::multiply(product, w.steps[0], x[0]);
    P::multiply_add(product, w.steps[1], x[1]);
#pragma unroll
    for (int n = 0; n < 4; ++n) sum[n] += factors[n] * product[n];
  };
  const auto load_inputs = [&](float (&x)[4][4], int tile, int half) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const Quad<T> quad = inputs_of(tile)[quad_place(half, n, lane.index)];
      for (int k = 0; k < 4; ++k) x[k][n] = to_float(quad.values[k]);
    }
  };
  const auto coefficients_at = [&](int tile, int t, int which) -> float4& {
    return coefficients_of(tile)[((2 * t + which) * J + here(j)) * kWarpSize + lane.index];
  };

  // The logits of a unit, and the gradients of its couplings.
  const auto write_logits = [&](int tile) {
    float logits[kSteps][4] = {}, dc[kSteps][4] = {};
    Right V[kSteps][2], ds[kSteps][2];
#pragma unroll
    for (int t = 0; t < kSteps; ++t) {
      load_over_d(V[t], tile, t);
      load_over_d(ds[t], tile, kFirstDs + 1 + t);
    }
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      float x[4][4];
      load_inputs(x, tile, half);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const Weight w = weight_at(half * 4 + k);
#pragma unroll
        for (int t = 0; t < kSteps; ++t) {
          add_product(logits[t], x[k], w, V[t]);
          add_product(dc[t], x[k], w, ds[t]);
        }
      }
    }
#pragma unroll
    for (int t = 0; t < kSteps; ++t) {
      coefficients_at(tile, t, 0) = packed(logits[t]);
      coefficients_at(tile, t, 1) = packed(dc[t]);
    }
  };

  float dW[kStepDims][2][4];  // [k][half of the input capsules]; rows d = 2g and 2g + 1
  const auto write_grad_weight = [&](auto* grad_weight, int group) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = group * kOutputInputs + half * 8 + 2 * lane.q + e % 2, d = 2 * lane.g + e / 2;
        if (i >= shape.I) continue;
        auto* const to = grad_weight + ((std::size_t(i) * J + j) * kTileRows + d) * kStepDims;
        using U = std::remove_reference_t<decltype(*to)>;
#pragma unroll
        for (int k0 = 0; k0 < kStepDims; k0 += 4) {
          Quad<U> quad;
          for (int k = 0; k < 4; ++k) store(quad.values + k, dW[k0 + k][half][e]);
          *reinterpret_cast<Quad<U>*>(to + k0) = quad;
        }
      }
    }
  };

  const float alike[4] = {uniform, uniform, uniform, uniform};
  const auto write_du = [&](int tile, const float (&c)[kSteps][4], const float (&dl)[kSteps][4]) {
    Right states[kStates][2];
#pragma unroll
    for (int state = 0; state < kStates; ++state) load_over_d(states[state], tile, state);
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      float du[4][4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const Weight w = weight_at(half * 4 + k);
        for (int n = 0; n < 4; ++n) du[k][n] = 0.0f;
        add_product(du[k], alike, w, states[kFirstDs]);
#pragma unroll
        for (int t = 0; t < kSteps; ++t) {
          add_product(du[k], dl[t], w, states[t]);
          add_product(du[k], c[t], w, states[kFirstDs + 1 + t]);
        }
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        store_of.du[here(j) * kInputQuads + quad_place(half, n, lane.index)] =
            make_float4(du[0][n], du[1][n], du[2][n], du[3][n]);
      }
    }
  };
  const auto add_grad_weight = [&](int tile, const float (&c)[kSteps][4],
                                   const float (&dl)[kSteps][4]) {
    Left states[kStates];
#pragma unroll
    for (int state = 0; state < kStates; ++state) states[state] = over_samples(tile, state);
#pragma unroll
    for (int quarter = 0; quarter < 2; ++quarter) {
      float x[4][4];
      load_inputs(x, tile, quarter);
      // One state after the other, so that no product waits for the one before.
      const auto add = [&](int state, const float (&factors)[4]) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float pair[2] = {factors[2 * half] * x[k][2 * half],
                                   factors[2 * half + 1] * x[k][2 * half + 1]};
            P::multiply_add(dW[quarter * 4 + k][half], states[state],
                            P::template prepared_operand<float>(pair));
          }
        }
      };
      add(kFirstDs, alike);
#pragma unroll
      for (int t = 0; t < kSteps; ++t) {
        add(t, dl[t]);
        add(kFirstDs + 1 + t, c[t]);
      }
    }
  };

  // The units of the block, a group of input capsules at a time.
  for (int unit = outputs.first_unit(blockIdx.x);;) {
    const int units = outputs.first_unit(here(blockIdx.x) + 1) - unit;
    if (units <= 0) break;
    // Anew wherever it is wanted: it would be kept in a register.
    const auto group = [&] { return outputs.by_tiles.divide(here(unit)); };
    const int first_tile = unit - group() * outputs.tiles;
    const int last_tile = min(first_tile + units, outputs.tiles);
    for (int tile = first_tile; tile < min(first_tile + 2, last_tile); ++tile) {
      send_for_inputs(group(), tile);
      send_for_states(tile);
    }
    end_group_of_copies();
    load_output_weight<P>(weight, static_cast<const T*>(arguments.weight), group() * kOutputInputs,
                          j, J, shape, plan.sweep.by_weight_sharing, lane);
    for (auto& of_k : dW) set_zero(of_k);
    wait_for_all_but<0>();
    __syncthreads();  // u of two units is there, and for the warp their states and W
    // Before the first unit there are only its logits to compute, after the last only its du to
    // add.
    for (int tile = first_tile - 1; tile <= last_tile; ++tile) {
      const bool is_unit = tile >= first_tile && tile < last_tile;
      if (is_unit && tile + 2 < last_tile) send_for_inputs(group(), tile + 2);
      end_group_of_copies();
      if (is_unit) softmax_and_gradient(coefficients_of(tile), kSteps, J, arguments.leaky);
      if (arguments.grad_u != nullptr && tile > first_tile) write_grad_u(group(), tile - 1);
      if (tile == last_tile) break;
      if (tile + 1 < last_tile) {
        wait_for_all_but<1>();
        __syncwarp();  // the states of the next unit are there
        write_logits(tile + 1);
      }
      __syncthreads();  // all coefficients are there, and du of the unit before is written
      if (tile < first_tile) continue;

      float c[kSteps][4], dl[kSteps][4];
#pragma unroll
      for (int t = 0; t < kSteps; ++t) {
        const float4 x = coefficients_at(tile, t, 0), y = coefficients_at(tile, t, 1);
        const float xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
        for (int n = 0; n < 4; ++n) {
          // So that their products with u are rounded where the tensor cores cut them off.
          c[t][n] = P::nearly_rounded(xs[n]);
          dl[t][n] = P::nearly_rounded(ys[n]);
        }
      }
      if (arguments.grad_u != nullptr) write_du(tile, c, dl);
      if (arguments.grad_weight != nullptr) add_grad_weight(tile, c, dl);
      wait_for_all_but<0>();
      __syncwarp();  // the states of this unit are read
      if (tile + 2 < last_tile) send_for_states(tile + 2);
      end_group_of_copies();
      __syncthreads();  // du and the logits of the next unit are there, and u of the one after
    }
    if (arguments.grad_weight != nullptr) {
      if (plan.partial_sums) {
        const int part = int(blockIdx.x) - outputs.block_of(group() * outputs.tiles);
        write_grad_weight(BackwardWorkspace(arguments, plan).partial_weight +
                              std::size_t(part) * shape.I * J * kTileRows * kStepDims,
                          group());
      } else {
        write_grad_weight(static_cast<T*>(arguments.grad_weight), group());
      }
    }
    unit += last_tile - first_tile;
  }
}

}  // namespace capsule_kernels::cuda

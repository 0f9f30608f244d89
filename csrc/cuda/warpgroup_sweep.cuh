// The sweeps of large batches: a warpgroup takes 64 samples through the input capsules of its
// block, four at a time, and W comes to chip, image by image, while others are used.
#pragma once

#include "block_sums.cuh"
#include "squash.cuh"
#include "warpgroup_images.cuh"

namespace capsule_kernels::cuda {

// A value for each output capsule, and each of the lane's two samples.
template <int kJ>
using PairsOf = float[kJ][2];

// Softmax over j in place; x is in units of log 2, for exp2, `leaky` puts one more logit, fixed at
// 0, beside them.
template <int kJ>
__device__ __forceinline__ void softmax_of_pairs(PairsOf<kJ>& x, bool leaky) {
  constexpr float kFar = 64.0f * kLog2E;  // beyond it, and for NaN, 2^x nears the end of the range
  bool far = false;
#pragma unroll
  for (int j = 0; j < kJ; ++j) far = far | !(fabsf(x[j][0]) < kFar) | !(fabsf(x[j][1]) < kFar);
  float rest[2] = {leaky ? 1.0f : 0.0f, leaky ? 1.0f : 0.0f};  // 2^ of the leaky logit
  if (any_lane(far)) {
    for (int e = 0; e < 2; ++e) {
      float largest = leaky ? 0.0f : -INFINITY;
      bool is_far = false;  // the sample with such logits is shifted, others stay as they are
#pragma unroll
      for (int j = 0; j < kJ; ++j) {
        largest = fmaxf(largest, x[j][e]);
        is_far = is_far | !(fabsf(x[j][e]) < kFar);
      }
      if (!is_far) continue;
      if (leaky) rest[e] = exp2_approximate(-largest);
#pragma unroll
      for (int j = 0; j < kJ; ++j) x[j][e] -= largest;
    }
  }
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    float total = rest[e];
#pragma unroll
    for (int j = 0; j < kJ; ++j) total += x[j][e] = exp2_approximate(x[j][e]);
    const float inverse = reciprocal(total);
#pragma unroll
    for (int j = 0; j < kJ; ++j) x[j][e] *= inverse;
  }
}

// A block of the persistent grid, whose sweeps read `kStates` states.
template <class T, int kJ, int kStates>
struct WarpgroupSweep : BlockSums<kTileRows> {
  using Sums = BlockSums<kTileRows>;
  using Values = float[2 * kJ][4];  // of 64 samples, with the lanes as results of products are
  static constexpr int kImage = image_floats(kJ), kState = wide_state_floats(kJ);
  static constexpr int kColumns = kQuad * kStepDims;        // of an image of logits: (i, k)
  static constexpr int kStep = kJ * kTileRows * kQuad * 4;  // bytes of one k in one of sums

  const Shape& shape;
  const T* const u;
  const float* const images;  // both of each four of the block's capsules, one behind the other
  const int quads;
  // Whether its warpgroups share the samples of a pass, and take turns at four input capsules each;
  // otherwise they have 64 samples each, and share the images.
  const bool shares_samples;
  const int num_slots;
  float* const states;             // on chip [1 or kWarpgroups][kStates][kState]
  float* const slots;              // on chip [num_slots][kImage]
  Arrivals* const arrived;         // [num_slots]
  Arrivals* const finished;        // [num_slots], by all warps that use an image
  Arrivals* const states_arrived;  // of the warpgroup
  // The next image: its number, its slot, and which use of the slot it is.
  int number = 0, slot = 0, use = 0;
  int state_use = 0;
  // Of the thread that sends images: those that it has sent, and all; of these, first, those of
  // sweeps that need no logits; the next, its slot and use.
  int sent = 0, to_send, to_send_for_sums, next, send_slot = 0, send_use = 0;

  // `sweeps_of_sums` come first, and need no logits.
  __device__ __forceinline__ WarpgroupSweep(const Shape& shape, const SweepPlan& plan,
                                            const void* u, const float* all_images,
                                            unsigned* counters, int sweeps_of_sums, int sweeps)
      : Sums(shape, plan, counters, kJ, 4 * (plan.wide_states * kState + plan.slots * kImage)),
        shape(shape),
        u(static_cast<const T*>(u)),
        images(all_images + std::size_t(share.first_capsule / kQuad) * (2 * kImage)),
        quads(ceil_div(share.last_capsule - share.first_capsule, kQuad)),
        shares_samples(plan.wide_states == kStates),
        num_slots(plan.slots),
        states(static_cast<float*>(shared_memory())),
        slots(states + plan.wide_states * kState),
        arrived(reinterpret_cast<Arrivals*>(exchange + kSweepWarps * kWarpSize)),
        finished(arrived + num_slots),
        states_arrived(finished + num_slots + (shares_samples ? 0 : warpgroup())) {
    const int passes =
        ceil_div(ceil_div(tiles, plan.tiles_per_pass) - share.sample_group(), plan.sample_groups);
    to_send_for_sums = sweeps_of_sums * passes * quads;
    to_send = to_send_for_sums + sweeps * passes * 2 * quads;
    next = to_send_for_sums > 0 ? 1 : 0;
    if (threadIdx.x == 0) {
      for (int n = 0; n < num_slots; ++n) {
        arrived[n].start(1);
        finished[n].start(shares_samples ? kSweepWarps / kWarpgroups : kSweepWarps);
      }
      for (int n = 0; n < kWarpgroups; ++n) finished[num_slots + n].start(kStates);
    }
  }

  // Sends images, as far ahead as no slot is awaited in which one may be that this thread has not
  // yet given back. First behind a barrier of all blocks: images are there, and counts of arrivals
  // have started.
  __device__ __forceinline__ void send_images() {
    if (threadIdx.x != 0) return;
    const int ahead = num_slots - (shares_samples ? 4 : 2);
    for (const int end = min(to_send, number + ahead + 1); sent < end; ++sent) {
      if (send_use > 0) finished[send_slot].wait(send_use - 1);
      arrived[send_slot].arrive_after_copy(slots + send_slot * kImage, images + next * kImage,
                                           4 * kImage);
      send_slot = send_slot + 1 < num_slots ? send_slot + 1 : 0;
      if (send_slot == 0) ++send_use;
      if (sent + 1 < to_send_for_sums) {
        next = next + 2 < 2 * quads ? next + 2 : 1;
      } else {
        next = sent + 1 > to_send_for_sums && next + 1 < 2 * quads ? next + 1 : 0;
      }
    }
  }

  // The sweep with all coefficients 1. `partial` is [G_i][B][J][D], padded.
  __device__ __forceinline__ void sweep_alike(float4* partial) {
    for_each_pass(partial, [&](Values& sums, int, const Inputs& inputs) {
      constexpr float kReady = sizeof(T) > 2 ? Tf32::nearly_rounded(1.0f) : 1.0f;
      float next_u[2][kStepDims];
      inputs.load(next_u, first_quad());
      for_each_quad(1, [&](int quad) {
        unsigned a[4][4];
        rows_of(a, next_u, {kReady, kReady});
        inputs.load(next_u, quad + quad_step());
        const int taken = take_image();
        const Matrix weight = image(taken, kStep);
        begin_products();
#pragma unroll
        for (int j = 0; j < kJ; j += 5) add_rows<5>(sums, a, weight, j);
        end_group_of_products();
        wait_for_products<0>();
        give_back(taken);
      });
    });
  }

  // A sweep with y of y(dots), `dots` the products of u_hat with each of the states.
  template <class Coefficients>
  __device__ __forceinline__ void sweep(const float* const (&from)[kStates], float4* partial,
                                        Coefficients coefficients) {
    for_each_pass(partial, [&](Values& sums, int tile, const Inputs& inputs) {
      bring_states(from, tile);
      float next_u[2][kStepDims];
      inputs.load(next_u, first_quad());
      unsigned a[2][4][4];
      int summed = -1;  // the image of sums that products may still read
      for_each_quad(2, [&](int quad) {
        float u[2][kStepDims];
        for (int e = 0; e < 2; ++e) {
          for (int k = 0; k < kStepDims; ++k) u[e][k] = next_u[e][k];
        }
        inputs.load(next_u, quad + quad_step());
        PairsOf<kJ> dots[kStates];
        const int of_logits = take_image();
        multiply_states(dots, u, image(of_logits, 16 * kColumns), [&] {
          if (summed >= 0) give_back(summed);
        });
        give_back(of_logits);
        coefficients(dots);
        summed = take_image();
        const Matrix weight = image(summed, kStep);
#pragma unroll
        for (int j = 0; j < kJ; ++j) {
          if (j >= 2) wait_for_products<1>();  // for a
          rows_of(a[j % 2], u,
                  {Tf32::nearly_rounded(dots[0][j][0]), Tf32::nearly_rounded(dots[0][j][1])});
          begin_products();
          add_rows<1>(sums, a[j % 2], weight, j);
          end_group_of_products();
        }
      });
      wait_for_products<0>();
      if (summed >= 0) give_back(summed);
    });
  }

 private:
  // u of the lane's input capsule of each four, of its two samples.
  struct Inputs {
    const T* rows[2];
    int first, last;  // capsule of the lane, and of all

    __device__ __forceinline__ void load(float (&u)[2][kStepDims], int quad) const {
      const int i = min(first + quad * kQuad, last);  // W is 0 past the last
#pragma unroll
      for (int e = 0; e < 2; ++e) load_eight(u[e], rows[e] + i * kStepDims);
    }
  };

  static __device__ __forceinline__ int warpgroup() {
    return uniform(here(threadIdx.x) / (kWarpSize * kSweepWarps / kWarpgroups));
  }
  // The lane's first sample of 64; the other is 8 further.
  __device__ __forceinline__ int sample() const { return share.warp % 4 * 16 + lane.g; }

  __device__ __forceinline__ int own_states() const {
    return shares_samples ? 0 : warpgroup() * (kStates * kState);
  }

  // An image, as operand b of products.
  __device__ __forceinline__ Matrix image(int slot, int to_half) const {
    const int at = uniform(4 * (plan.wide_states * kState + slot * kImage));
    return further(matrix_on_chip(shared_memory(), to_half), at);
  }

  // Which of the fours of input capsules the warpgroup begins with, and how far the next is.
  __device__ __forceinline__ int first_quad() const { return shares_samples ? warpgroup() : 0; }
  __device__ __forceinline__ int quad_step() const { return shares_samples ? kWarpgroups : 1; }

  // Calls visit(quad), which takes as many images as there are `of_each`, and passes by others.
  template <class Visit>
  __device__ __forceinline__ void for_each_quad(int of_each, Visit visit) {
    for (int quad = 0; quad < quads; ++quad) {
      if (shares_samples && quad % kWarpgroups != warpgroup()) {
        pass_by(of_each);
      } else {
        visit(quad);
      }
    }
  }

  __device__ __forceinline__ void pass_by(int images) {
    number += images;
    slot += images;
    if (slot >= num_slots) {
      slot -= num_slots;
      ++use;
    }
  }

  __device__ __forceinline__ int take_image() {
    send_images();
    const int taken = uniform(slot);
    arrived[taken].wait(use);
    pass_by(1);
    return taken;
  }

  __device__ __forceinline__ void give_back(int slot) const {
    if (lane.index == 0) finished[slot].arrive();
  }

  __device__ __forceinline__ void bring_states(const float* const (&from)[kStates], int tile) {
    float* const to = states + own_states();
    if (shares_samples ? threadIdx.x == 0
                       : threadIdx.x % (kWarpSize * kSweepWarps / kWarpgroups) == 0) {
#pragma unroll
      for (int n = 0; n < kStates; ++n) {
        states_arrived->arrive_after_copy(to + n * kState, from[n] + std::size_t(tile) * kState,
                                          4 * kState);
      }
    }
    states_arrived->wait(state_use++);
  }

  // dots = u . (states W), in the background as far as can be; `begun` is called when all products
  // of before are done.
  template <class Begun>
  __device__ __forceinline__ void multiply_states(PairsOf<kJ> (&dots)[kStates],
                                                  const float (&u)[2][kStepDims], Matrix image,
                                                  Begun begun) const {
    constexpr int kCount = kJ * kStates, kRows = 16 * kWarpgroupSamples, kQuads = 16 * kColumns;
    const Matrix a = further(matrix_on_chip(shared_memory(), kRows), 4 * uniform(own_states()));
    float products[2][4][4];
    const auto begin = [&](int n) {
      const int j = n / kStates;
      const Matrix state = further(a, n % kStates * (4 * kState) + j * 4 * kRows);
      const Matrix weight = further(image, j * 4 * kQuads);
      begin_products();
      multiply_on_chip<false>(products[n % 2], state, weight);
      multiply_on_chip<true>(products[n % 2], further(state, 2 * kRows),
                             further(weight, 2 * kQuads));
      end_group_of_products();
    };
    begin(0);
    begin(1);
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      if (n + 1 < kCount) {
        wait_for_products<1>();
      } else {
        wait_for_products<0>();
      }
      if (n == 0) begun();
      settle(products[n % 2]);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float even = 0.0f, odd = 0.0f;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          even += products[n % 2][k][2 * e] * u[e][2 * k];
          odd += products[n % 2][k][2 * e + 1] * u[e][2 * k + 1];
        }
        dots[n % kStates][n / kStates][e] = even + odd;
      }
      if (n + 2 < kCount) begin(n + 2);
    }
  }

  // y u as the left side of products, four steps of its contraction.
  static __device__ __forceinline__ void rows_of(unsigned (&a)[4][4],
                                                 const float (&u)[2][kStepDims],
                                                 const float (&y)[2]) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) a[n][e] = bits_of(y[e % 2] * u[e % 2][2 * n + e / 2]);
    }
  }

  // sums += a W_j, of `kOutputs` output capsules from j on.
  template <int kOutputs>
  static __device__ __forceinline__ void add_rows(Values& sums, const unsigned (&a)[4][4],
                                                  Matrix image, int j) {
    const Matrix b = further(image, j * (kTileRows * kQuad * 4));
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      multiply_add_rows<2 * kOutputs>(&sums[2 * j], a[n], further(b, n * 2 * kStep));
    }
  }

  // Calls sweep(sums, the warpgroup's 64 samples, their u) for each pass over the samples of the
  // block, and leaves the sums in the workspace.
  template <class Sweep>
  __device__ __forceinline__ void for_each_pass(float4* partial, Sweep sweep) {
    constexpr int kTiles = kWarpgroupSamples / kTileSamples;
    for (int first = share.sample_group() * plan.tiles_per_pass; first < tiles;
         first += plan.sample_groups * plan.tiles_per_pass) {
      // A warpgroup without samples goes along.
      const int mine = first / kTiles + (shares_samples ? 0 : warpgroup());
      const int tile = min(mine, tiles / kTiles - 1);
      Inputs inputs = {{}, share.first_capsule + lane.q, shape.I - 1};
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int b = min(tile * kWarpgroupSamples + sample() + 8 * e, shape.B - 1);
        inputs.rows[e] = u + std::size_t(b) * shape.I * kStepDims;
      }
      Values sums;
      set_zero(sums);
      __syncthreads();  // the states of the pass before are no longer read
      sweep(sums, tile, inputs);
      settle(sums);
      if (shares_samples) add_sums_of_second(sums);
      if (mine == tile && (!shares_samples || warpgroup() == 0)) leave_sums(partial, sums, tile);
    }
  }

  // Adds the sums of the second warpgroup to those of the first, where the states were.
  __device__ __forceinline__ void add_sums_of_second(Values& sums) const {
    constexpr int kThreads = kWarpSize * kSweepWarps / kWarpgroups;
    float4* const shown = reinterpret_cast<float4*>(states) + threadIdx.x % kThreads;
    __syncthreads();  // the states are no longer read
    if (warpgroup() > 0) {
#pragma unroll
      for (int n = 0; n < 2 * kJ; ++n) shown[n * kThreads] = packed(sums[n]);
      publish();  // states come there again
    }
    __syncthreads();
    if (warpgroup() > 0) return;
#pragma unroll
    for (int n = 0; n < 2 * kJ; ++n) add_to(sums[n], shown[n * kThreads]);
  }

  __device__ __forceinline__ void leave_sums(float4* partial, const Values& sums, int tile) const {
    const std::size_t row = std::size_t(tile) * kWarpgroupSamples + sample();
    float* const to = reinterpret_cast<float*>(partial + share.capsule_group() * state_size) +
                      row * (kJ * kTileRows) + 2 * lane.q;
#pragma unroll
    for (int n = 0; n < 2 * kJ; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float (&x)[4] = sums[n];
        *reinterpret_cast<Pair<float>*>(to + e * (8 * kJ * kTileRows) + 8 * n) = {x[2 * e],
                                                                                  x[2 * e + 1]};
      }
    }
  }
};

}  // namespace capsule_kernels::cuda

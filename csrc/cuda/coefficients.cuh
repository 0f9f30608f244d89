// Logits and couplings of one input capsule, and their gradients: numbers of a pair (i, j), one for
// each sample of a tile.
//
// They come from dot products of u_hat with a state, and weigh u_hat or a state in a sum. All of
// them stay in the registers of a warp; the lanes that share an output capsule have the same.
#pragma once

#include "tile.cuh"

namespace capsule_kernels::cuda {

// own_j = x_j . y_j over d.
template <class Tile>
__device__ __forceinline__ void dots(typename Tile::Row& own, const typename Tile::Values& x,
                                     const typename Tile::Values& y, int J) {
  // A known J has groups of many fragments: two sums of half the length are sooner there.
  constexpr int kSums = Tile::kKnown ? 2 : 1;
  typename Tile::Row sums[kSums];
  for (auto& sum : sums) set_zero(sum);
  for_each_fragment<Tile>(J, [&](int group, int n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[e / 2 % kSums][group][e % 2] += x[n][e] * y[n][e];
  });
  for_each_group<Tile>(J, [&](auto group) {
    for (int e = 0; e < 2; ++e) {
      own[group.value][e] = sums[0][group.value][e];
      if (kSums > 1) own[group.value][e] += sums[kSums - 1][group.value][e];
    }
#pragma unroll
    for (int step = 1; step < Tile::sharers(group.value); step *= 2) {
      for (float& dot : own[group.value]) dot += shuffle_xor(dot, 4 * step);
    }
  });
}

// sum_j += own_j x_j.
template <class Tile>
__device__ __forceinline__ void add_scaled(typename Tile::Values& sum,
                                           const typename Tile::Row& own,
                                           const typename Tile::Values& x, int J) {
  for_each_fragment<Tile>(J, [&](int group, int n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[n][e] += own[group][e % 2] * x[n][e];
  });
}

// b += log priors of input capsule i, where there are any.
template <class T, class Tile>
__device__ __forceinline__ void add_prior(typename Tile::Row& b, const T* logits, int i, int J,
                                          const Lane& lane) {
  if (logits == nullptr) return;
  for_each_group<Tile>(J, [&](auto group) {
    const int j = lane.capsule<Tile>(group.value);
    const float prior = Tile::kKnown || j < J ? to_float(logits[std::size_t(i) * J + j]) : 0.0f;
    for (float& x : b[group.value]) x += prior;
  });
}

// sum_j x_j for each sample.
template <class Tile>
__device__ __forceinline__ void sum_over_capsules(float (&sum)[2], const typename Tile::Row& x,
                                                  int J) {
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    sum[e] = 0.0f;
    for_each_group<Tile>(J, [&](auto group) {
      constexpr float kShare = 1.0f / float(Tile::sharers(group.value));
      sum[e] += x[group.value][e] * kShare;
    });
#pragma unroll
    for (int step = 4; step < kWarpSize; step *= 2) sum[e] += shuffle_xor(sum[e], step);
  }
}

// Softmax over j in place, of some input capsules; `leaky` puts one more logit, fixed at 0, beside
// those of each.
template <class Tile, int kCapsules>
__device__ __forceinline__ void softmax(typename Tile::Row (&b)[kCapsules], int J, bool leaky,
                                        const Lane& lane) {
  constexpr float kFar = 64.0f;  // beyond it, and for NaN, exp(b) comes near the ends of the range
  bool far = false;
  for_each_group<Tile>(J, [&](auto group) {
    for (int m = 0; m < kCapsules; ++m) {
      for (const float x : b[m][group.value]) far = far | !(fabsf(x) < kFar);
    }
  });
  float rest[kCapsules][2];  // exp of the leaky logit
  for (auto& x : rest) x[0] = x[1] = leaky ? 1.0f : 0.0f;
  if (any_lane(far)) {
#pragma unroll
    for (int m = 0; m < kCapsules; ++m) {
      // The samples with such logits are shifted by their largest; the others stay as they are.
      for (int e = 0; e < 2; ++e) {
        float largest = leaky ? 0.0f : -INFINITY, is_far = 0.0f;
        for_each_group<Tile>(J, [&](auto group) {
          const float x = b[m][group.value][e];
          if (Tile::kKnown || lane.capsule<Tile>(group.value) < J) {
            largest = fmaxf(largest, x);
            if (!(fabsf(x) < kFar)) is_far = 1.0f;
          }
        });
        for (int step = 4; step < kWarpSize; step *= 2) {
          largest = fmaxf(largest, shuffle_xor(largest, step));
          is_far = fmaxf(is_far, shuffle_xor(is_far, step));
        }
        if (is_far > 0) {
          if (leaky) rest[m][e] = exp2_approximate(-largest * kLog2E);
          for_each_group<Tile>(J, [&](auto group) { b[m][group.value][e] -= largest; });
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kCapsules; ++m) {
    for_all_groups<Tile>([&](auto group) {
      const bool inside = Tile::kKnown || lane.capsule<Tile>(group.value) < J;
      for (float& x : b[m][group.value]) x = inside ? exp2_approximate(x * kLog2E) : 0.0f;
    });
    float total[2];
    sum_over_capsules<Tile>(total, b[m], J);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float inverse = reciprocal(total[e] + rest[m][e]);
      for_each_group<Tile>(J, [&](auto group) { b[m][group.value][e] *= inverse; });
    }
  }
}

// dl_j = c_j (dc_j - sum_k c_k dc_k), from dc, in place: softmax backwards.
template <class Tile>
__device__ __forceinline__ void softmax_backward(typename Tile::Row& dc,
                                                 const typename Tile::Row& c, int J) {
  typename Tile::Row products;
  for_each_group<Tile>(J, [&](auto group) {
    for (int e = 0; e < 2; ++e) products[group.value][e] = c[group.value][e] * dc[group.value][e];
  });
  float mean[2];
  sum_over_capsules<Tile>(mean, products, J);
  for_each_group<Tile>(J, [&](auto group) {
    for (int e = 0; e < 2; ++e) {
      dc[group.value][e] = c[group.value][e] * (dc[group.value][e] - mean[e]);
    }
  });
}

}  // namespace capsule_kernels::cuda

// squash(s) = n / (1 + n^2) s, n = |s|, and its transposed Jacobian, for capsules spread over
// quads.
//
// A tile of 16 samples lies in registers as results of mma: of output capsule j, lane (g, q) of a
// warp holds columns 8 f + 2 q and 8 f + 2 q + 1 of row g (elements 0, 1 of fragment f) and of row
// g + 8 (elements 2, 3). The four lanes of a quad hold the rows whole.
#pragma once

#include "execution.cuh"

namespace capsule_kernels::cuda {

__device__ __forceinline__ float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// The factors of squash at one capsule: v = f s. J^T scales what is across s by f, and what is
// along s by f times `along`; kept apart, the two do not cancel where n is large.
struct Squash {
  float f;       // n / (1 + n^2); 0 at s = 0, where v and its gradient vanish
  float along;   // 2 / (1 + n^2)
  float length;  // n; 1 at s = 0
};

// Of row `half` (0: g, 1: g + 8) of one capsule, s[DT][4]. No square of a length is formed before
// it is scaled, so that any finite s gives a finite v, and f has a form for each end of the range.
template <int DT>
__device__ __forceinline__ Squash squash_of(const float (&s)[DT][4], int half) {
  float scale = 0;
#pragma unroll
  for (int n = 0; n < DT; ++n) {
    for (int e = 2 * half; e < 2 * half + 2; ++e) {
      const float x = fabsf(s[n][e]);
      scale = x > scale || x != x ? x : scale;  // fmaxf would lose a NaN
    }
  }
  for (int step = 1; step < 4; step *= 2) {
    const float x = shuffle_xor(scale, step);
    scale = x > scale || x != x ? x : scale;
  }
  const bool nonzero = scale > 0;
  const float unit = nonzero ? scale : 1.0f;
  float sum = 0;
#pragma unroll
  for (int n = 0; n < DT; ++n) {
    for (int e = 2 * half; e < 2 * half + 2; ++e) {
      const float x = s[n][e] / unit;
      sum += x * x;
    }
  }
  const float length = unit * sqrtf(quad_sum(sum));
  if (!nonzero) return {0.0f, 0.0f, 1.0f};
  const float along = 2.0f / (1.0f + length * length);
  return {length < 1 ? 0.5f * length * along : 1.0f / (length + 1.0f / length), along, length};
}

// v = squash(s), both rows.
template <int DT>
__device__ __forceinline__ void squash(float (&v)[DT][4], const float (&s)[DT][4]) {
  for (int half = 0; half < 2; ++half) {
    const float f = squash_of(s, half).f;
#pragma unroll
    for (int n = 0; n < DT; ++n) {
      for (int e = 2 * half; e < 2 * half + 2; ++e) v[n][e] = f * s[n][e];
    }
  }
}

// x = J_squash(s)^T x in place, both rows.
template <int DT>
__device__ __forceinline__ void squash_backward(float (&x)[DT][4], const float (&s)[DT][4]) {
  for (int half = 0; half < 2; ++half) {
    const Squash factors = squash_of(s, half);
    float unit[DT][2];  // s / n
    float dot = 0;
#pragma unroll
    for (int n = 0; n < DT; ++n) {
      for (int e = 0; e < 2; ++e) {
        unit[n][e] = s[n][2 * half + e] / factors.length;
        dot += unit[n][e] * x[n][2 * half + e];
      }
    }
    dot = quad_sum(dot);
#pragma unroll
    for (int n = 0; n < DT; ++n) {
      for (int e = 0; e < 2; ++e) {
        const float parallel = dot * unit[n][e];
        float& value = x[n][2 * half + e];
        value = factors.f * ((value - parallel) + factors.along * parallel);
      }
    }
  }
}

}  // namespace capsule_kernels::cuda

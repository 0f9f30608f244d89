// squash(s) = n / (1 + n^2) s, n = |s|, and its transposed Jacobian, for capsules spread over
// lanes.
//
// `kLanes` consecutive lanes of a warp hold an output capsule, four dimensions each.
#pragma once

#include "execution.cuh"

namespace capsule_kernels::cuda {

template <int kLanes>
__device__ __forceinline__ float sum_over_lanes(float x) {
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) x += shuffle_xor(x, step);
  return x;
}

// The factors of squash at one capsule: v = f s. J^T scales what is across s by f, and what is
// along s by f times `along`; kept apart, the two do not cancel where n is large.
struct Squash {
  float f;       // n / (1 + n^2); 0 at s = 0, where v and its gradient vanish
  float along;   // 2 / (1 + n^2)
  float length;  // n; 1 at s = 0
};

// No square of a length is formed before it is scaled, so that any finite s gives a finite v, and f
// has a form for each end of the range.
template <int kLanes>
__device__ __forceinline__ Squash squash_of(const float (&s)[4]) {
  const auto larger = [](float x, float than) {
    return x > than || x != x ? x : than;  // fmaxf would lose a NaN
  };
  float scale = 0;
#pragma unroll
  for (int e = 0; e < 4; ++e) scale = larger(fabsf(s[e]), scale);
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) scale = larger(shuffle_xor(scale, step), scale);
  const bool nonzero = scale != 0;  // NaN is no silence
  const float unit = nonzero ? scale : 1.0f;
  float sum = 0;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const float x = s[e] / unit;
    sum += x * x;
  }
  const float length = unit * sqrtf(sum_over_lanes<kLanes>(sum));
  if (!nonzero) return {0.0f, 0.0f, 1.0f};
  const float along = 2.0f / (1.0f + length * length);
  return {length < 1 ? 0.5f * length * along : 1.0f / (length + 1.0f / length), along, length};
}

// v = squash(s).
template <int kLanes>
__device__ __forceinline__ void squash(float (&v)[4], const float (&s)[4]) {
  const float f = squash_of<kLanes>(s).f;
#pragma unroll
  for (int e = 0; e < 4; ++e) v[e] = f * s[e];
}

// x = J_squash(s)^T x in place.
template <int kLanes>
__device__ __forceinline__ void squash_backward(float (&x)[4], const float (&s)[4]) {
  const Squash factors = squash_of<kLanes>(s);
  float unit[4];  // s / n
  float dot = 0;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    unit[e] = s[e] / factors.length;
    dot += unit[e] * x[e];
  }
  dot = sum_over_lanes<kLanes>(dot);
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const float parallel = dot * unit[e];
    x[e] = factors.f * ((x[e] - parallel) + factors.along * parallel);
  }
}

}  // namespace capsule_kernels::cuda

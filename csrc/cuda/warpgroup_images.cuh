// W and the states as the products of warpgroups read them.
//
// A sweep takes four input capsules at a time and contracts W with what is small (the other form
// of docs/kernels.md): for each output capsule
//   [64 samples, 16 d] x [16 d, 32 (i, k)], of which u makes logits, and
//   [64 samples, 32 (i, k)] x [32 (i, k), 16 d], c u times W.
// A result leaves columns 2q and 2q + 1 of every eight with lane q of four, and an operand wants
// columns q and q + 4 of every eight there. In the orders below both are elements of input capsule
// q: a lane has all k of one input capsule of two samples, so nothing crosses lanes.
#pragma once

#include "precision.cuh"
#include "tile.cuh"

namespace capsule_kernels::cuda {

// Where element d of output capsule j of sample b lies in a state [B / 64][J][D / 4][64][4].
template <int kJ>
__device__ __forceinline__ std::size_t wide_state_offset(int b, int j, int d) {
  const int inside = (d / 4 * kWarpgroupSamples + b % kWarpgroupSamples) * 4 + d % 4;
  return std::size_t(b / kWarpgroupSamples) * wide_state_floats(kJ) +
         j * (kWarpgroupSamples * kTileRows) + inside;
}

template <class T>
struct alignas(16) Eight {
  T values[8];
};

// All k of an input capsule, or of a row of W.
template <class T>
__device__ __forceinline__ void load_eight(float (&x)[8], const T* from) {
  const auto values = *reinterpret_cast<const Eight<T>*>(from);
#pragma unroll
  for (int k = 0; k < 8; ++k) x[k] = to_float(values.values[k]);
}

// Both images of all W, [I / 4][2]: for logits [J][D / 4][(k / 2, i, k % 2)][4], for sums
// [k][J][D][i]; 0 past I. All blocks have a share of it.
template <class T, int kJ>
__device__ __forceinline__ void make_images(float* images, const T* weight, const Shape& shape) {
  constexpr int kFours = kTileRows / 4, kImage = image_floats(kJ);
  const int quads = ceil_div(shape.I, kQuad);
  for (int n = blockIdx.x * blockDim.x + threadIdx.x; n < quads * kJ * kFours * kQuad;
       n += gridDim.x * blockDim.x) {
    const int i = n % kQuad, four = n / kQuad % kFours, j = n / (kQuad * kFours) % kJ;
    const int quad = n / (kQuad * kFours * kJ), capsule = quad * kQuad + i;
    float w[4][kStepDims] = {};
    if (capsule < shape.I) {
      const T* const from =
          weight + ((std::size_t(capsule) * kJ + j) * kTileRows + 4 * four) * kStepDims;
#pragma unroll
      for (int d = 0; d < 4; ++d) load_eight(w[d], from + d * kStepDims);
    }
    float* const logits = images + std::size_t(2 * quad) * kImage;
    float* const sums = logits + kImage;
#pragma unroll
    for (int k = 0; k < kStepDims; ++k) {
      float x[4];
#pragma unroll
      for (int d = 0; d < 4; ++d) {
        x[d] = sizeof(T) > 2 ? Tf32::nearly_rounded(w[d][k]) : w[d][k];
        sums[((k * kJ + j) * kTileRows + 4 * four + d) * kQuad + i] = x[d];
      }
      const int column = k / 2 * 2 * kQuad + i * 2 + k % 2;
      reinterpret_cast<float4*>(logits)[(j * kFours + four) * kQuad * kStepDims + column] =
          packed(x);
    }
  }
}

}  // namespace capsule_kernels::cuda

// Matrix products on tensor cores, by how much accuracy their operands keep.
//
// A policy turns float operands into what the tensor cores take and multiplies them: `multiply`
// sets c = a b, `multiply_add` c += a b. The shapes and the lanes that hold each element are those
// of `mma_tf32`.
#pragma once

#include "execution.cuh"

namespace capsule_kernels::cuda {

// exp(x) = 2^(x kLog2E).
constexpr float kLog2E = 1.4426950408889634f;

__device__ __forceinline__ unsigned bits_of(float x) {
  union {
    float value;
    unsigned bits;
  } u{x};
  return u.bits;
}

__device__ __forceinline__ float float_of(unsigned bits) {
  union {
    unsigned bits;
    float value;
  } u{bits};
  return u.value;
}

// One product of operands rounded to TF32 (11 significant bits).
struct Tf32 {
  static constexpr int kProducts = 1;

  template <int N>
  struct Operand {
    unsigned bits[N];
  };

  // Rounding in one instruction: the tensor cores cut the result off 0.64 units of its last place
  // from x at most (rounded to nearest: 0.5), as often below as above; TF32 values stay what they
  // are.
  static __device__ __forceinline__ constexpr float nearly_rounded(float x) {
    return x * 1.000352f;
  }
  static constexpr float kUnrounded = 1.0f / 1.000352f;  // takes it back

  // `T`: the type the values were stored in; 16-bit values are TF32 values already.
  template <class T, int N>
  static __device__ __forceinline__ Operand<N> operand(const float (&x)[N]) {
    Operand<N> result;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      result.bits[n] = bits_of(sizeof(T) > 2 ? nearly_rounded(x[n]) : x[n]);
    }
    return result;
  }

  // What W is stored as on chip, and an operand of such values: rounded once, not at every use.
  template <class T>
  static constexpr bool kPrepares = sizeof(T) > 2;

  template <class T>
  static __device__ __forceinline__ T prepared(T x) {
    if constexpr (kPrepares<T>) return nearly_rounded(x);
    return x;
  }

  template <class T, int N>
  static __device__ __forceinline__ Operand<N> prepared_operand(const float (&x)[N]) {
    Operand<N> result;
#pragma unroll
    for (int n = 0; n < N; ++n) result.bits[n] = bits_of(x[n]);
    return result;
  }

  static __device__ __forceinline__ void multiply(float (&c)[4], const Operand<4>& a,
                                                  const Operand<2>& b) {
    for (int n = 0; n < 4; ++n) c[n] = 0.0f;
    mma_tf32(c, a.bits, b.bits);
  }

  static __device__ __forceinline__ void multiply_add(float (&c)[4], const Operand<4>& a,
                                                      const Operand<2>& b) {
    mma_tf32(c, a.bits, b.bits);
  }
  static __device__ __forceinline__ void multiply_add_closely(float (&c)[4], const Operand<4>& a,
                                                              const Operand<2>& b) {
    multiply_add(c, a, b);
  }
};

// Float32 accuracy from three products: x = high + low with both of them TF32 values, up to
// 2^-23 |x|; the product low * low, 2^-24 of the whole, is left out.
struct SplitTf32 {
  static constexpr int kProducts = 3;

  template <int N>
  struct Operand {
    unsigned high[N], low[N];
  };

  template <class T, int N>
  static __device__ __forceinline__ Operand<N> operand(const float (&x)[N]) {
    Operand<N> result;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      // A NaN may be lost in the rounding of `high`, but not in `low`.
      result.high[n] = (bits_of(x[n]) + 0x1000u) & 0xffffe000u;
      result.low[n] = bits_of(x[n] - float_of(result.high[n]));
    }
    return result;
  }

  template <class T>
  static constexpr bool kPrepares = false;

  template <class T>
  static __device__ __forceinline__ T prepared(T x) {
    return x;
  }

  template <class T, int N>
  static __device__ __forceinline__ Operand<N> prepared_operand(const float (&x)[N]) {
    return operand<T>(x);
  }

  static __device__ __forceinline__ constexpr float nearly_rounded(float x) { return x; }

  static __device__ __forceinline__ void multiply(float (&c)[4], const Operand<4>& a,
                                                  const Operand<2>& b) {
    // Small terms first: they would be lost beside the large one.
    multiply_small(c, a, b);
    mma_tf32(c, a.high, b.high);
  }

  // Tensor cores cut their sums off; over a long sum that adds up, so it is taken outside of them.
  static __device__ __forceinline__ void multiply_add(float (&c)[4], const Operand<4>& a,
                                                      const Operand<2>& b) {
    float product[4];
    multiply(product, a, b);
    for (int n = 0; n < 4; ++n) c[n] += product[n];
  }

  // Closer: beside the large terms tensor cores cut the small ones off, so they meet outside, too.
  static __device__ __forceinline__ void multiply_add_closely(float (&c)[4], const Operand<4>& a,
                                                              const Operand<2>& b) {
    float small[4], large[4] = {};
    multiply_small(small, a, b);
    mma_tf32(large, a.high, b.high);
    for (int n = 0; n < 4; ++n) c[n] += large[n] + small[n];
  }

 private:
  static __device__ __forceinline__ void multiply_small(float (&c)[4], const Operand<4>& a,
                                                        const Operand<2>& b) {
    for (int n = 0; n < 4; ++n) c[n] = 0.0f;
    mma_tf32(c, a.low, b.high);
    mma_tf32(c, a.high, b.low);
  }
};

}  // namespace capsule_kernels::cuda

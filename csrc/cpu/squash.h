// Between sweeps: add the partial sums in order, squash, and differentiate the squash.
#pragma once

#include <limits>

#include "routing.h"
#include "vec.h"

namespace capsule::CAPSULE_ISA {

// Samples of one block side by side: `Value` is a vector of samples, or one scalar.
template <typename T, typename Value>
struct SquashBlock {
  static constexpr index lanes = sizeof(Value) / sizeof(T);

  static CAPSULE_INLINE Value get(const T* p) {
    Value x;
    __builtin_memcpy(&x, p, sizeof(x));
    return x;
  }

  static CAPSULE_INLINE Value root(Value x) {
    if constexpr (lanes == 1)
      return __builtin_sqrt(x);
    else
      return square_root<T>(x);
  }

  // With n = |s|: squash(s) = f s, f = 1 / (n + 1 / n). Lengths are taken of s / max|s|, so that no
  // square overflows or vanishes; f = 0 and inverse = 0 at s = 0.
  struct Length {
    Value n, f, inverse;
    CAPSULE_INLINE Length(const T* s, index D, index stride) {
      const Value zero{}, one = zero + T(1);
      Value scale = zero;
      for (index d = 0; d < D; ++d) {
        const Value x = get(s + d * stride), size = x < zero ? -x : x;
        scale = size > scale ? size : scale;
      }
      // Denormal lengths count as zero, since 1 / scale may overflow: their squares are 0.
      scale = scale < std::numeric_limits<T>::min() ? one : scale;
      const Value shrink = one / scale;
      Value sum = zero;
      for (index d = 0; d < D; ++d) {
        const Value x = get(s + d * stride) * shrink;
        sum += x * x;
      }
      n = scale * root(sum);
      const Value reciprocal = one / n;
      f = sum == zero ? zero : one / (n + reciprocal);
      inverse = sum == zero ? zero : reciprocal;
    }
  };

  // `width` is the block's row length, `first` the sample of lane 0.
  static void run(const Problem<T>& p, const Partition& part, const SquashForward<T>& q,
                  index block, index width, index first, T* scratch) {
    const index J = p.J, D = p.D, N = p.N(), blocked_size = part.padded * N;
    for (index j = 0; j < J; ++j) {
      for (index n = j * D; n < (j + 1) * D; ++n) {
        Value s = get(q.partial + block + n * width);
        for (index slot = 1; slot < part.slots; ++slot)
          s += get(q.partial + slot * blocked_size + block + n * width);
        if (q.bias) s += q.bias[n];
        __builtin_memcpy(scratch + n * lanes, &s, sizeof(s));
      }
      const Length length(scratch + j * D * lanes, D, lanes);
      for (index n = j * D; n < (j + 1) * D; ++n) {
        const Value s = get(scratch + n * lanes), v = length.f * s;
        for (index l = 0; l < lanes && first + l < p.B; ++l) {
          const index o = (first + l) * N + n;
          q.s[o] = scratch[n * lanes + l];
          if (q.v) q.v[o] = lane(v, l);
        }
        if (q.V) {
          const index o = block + n * width;
          const Value sum = q.V_previous ? get(q.V_previous + o) + v : v;
          __builtin_memcpy(q.V + o, &sum, sizeof(sum));
        }
      }
    }
  }

  // J^T x = f (x + h (s^ . x) s^), s^ = s / n, h = (1 - n^2) / (1 + n^2). Where q.V is given, it is
  // rebuilt from s on the way: V^t = V^(t-1) + f s.
  static void run(const Problem<T>& p, const Partition& part, const SquashBackward<T>& q,
                  index block, index width, index first, T* scratch) {
    const index J = p.J, D = p.D, N = p.N(), blocked_size = part.padded * N;
    for (index j = 0; j < J; ++j) {
      for (index n = j * D; n < (j + 1) * D; ++n)
        for (index l = 0; l < lanes; ++l)
          scratch[n * lanes + l] = first + l < p.B ? q.s[(first + l) * N + n] : T(0);
      const Length length(scratch + j * D * lanes, D, lanes);
      if (q.V)
        for (index n = j * D; n < (j + 1) * D; ++n) {
          const index o = block + n * width;
          const Value v = length.f * get(scratch + n * lanes);
          const Value sum = q.V_previous ? get(q.V_previous + o) + v : v;
          __builtin_memcpy(q.V + o, &sum, sizeof(sum));
        }
      if (!q.ds) continue;
      Value along{};
      for (index n = j * D; n < (j + 1) * D; ++n) {
        const index o = block + n * width;
        Value G = get(q.G + o);
        if (q.partial)
          for (index slot = 0; slot < part.slots; ++slot)
            G += get(q.partial + slot * blocked_size + o);
        __builtin_memcpy(q.G + o, &G, sizeof(G));
        along += get(scratch + n * lanes) * length.inverse * G;
      }
      const Value h = T(2) / (length.n * length.n + T(1)) - T(1);
      for (index n = j * D; n < (j + 1) * D; ++n) {
        const index o = block + n * width;
        const Value unit = get(scratch + n * lanes) * length.inverse;
        const Value ds = length.f * (get(q.G + o) + h * along * unit);
        __builtin_memcpy(q.ds + o, &ds, sizeof(ds));
      }
    }
  }

  static CAPSULE_INLINE T lane(const Value& x, index l) {
    T values[lanes];
    __builtin_memcpy(values, &x, sizeof(x));
    return values[l];
  }
};

}  // namespace capsule::CAPSULE_ISA

// One input capsule of a tile of 16 samples, in the registers of a warp.
//
// u_hat [16, J * D] of a tile is `Tile::kFragments` results of mma, DT of them an output
// capsule. Lane (g, q) = (lane / 4, lane % 4) holds rows g and g + 8 of columns 2q and 2q + 1 of
// each. Coefficients (logits, couplings, ...) of an input capsule need one value a row and j: a
// lane owns row g + 8 (q % 2), and so do two lanes together each row.
//
// A state tile (V or ds of a tile, [16, J * D]) is stored in the same order, a float4 a lane and
// fragment: loads are coalesced and need no index arithmetic.
#pragma once

#include "plan.h"
#include "precision.cuh"

namespace capsule_kernels::cuda {

// Output capsules of `kDT` fragments each: exactly kJ of them and an even K <= 8, or any J that
// fits and any K (kJ = 0). With known sizes no branches stand between output capsules, so that
// their instructions overlap, and addresses are constants.
template <int kDT, int kJ = 0>
struct TileOf {
  static constexpr int DT = kDT;
  static constexpr int kCapsules = kJ > 0 ? kJ : kMaxFragments / DT;  // of J, at most
  static constexpr int kFragments = kCapsules * DT;
  static constexpr bool kEvenK = kJ > 0;
  using Values = float[kFragments][4];
  using Row = float[kCapsules];  // of the row this lane owns

  // Whether there is a j-th output capsule.
  static __device__ __forceinline__ bool has(int j, int J) {
    return j < kCapsules && (kJ > 0 || j < J);
  }

  static __device__ __forceinline__ int padded_K(int K) {
    return kJ > 0 ? kTileDims : round_up(K, kTileDims);
  }

  static_assert(kFragments <= kMaxFragments && kFragments % 2 == 0);
};

// Where a thread is in its warp.
struct Lane {
  int index;   // in the warp
  int g, q;    // index / 4, index % 4
  bool upper;  // owns row g + 8 rather than g

  __device__ __forceinline__ Lane()
      : index(threadIdx.x % kWarpSize), g(index / 4), q(index % 4), upper(q % 2 == 1) {}
  __device__ __forceinline__ int own_row() const { return g + (upper ? 8 : 0); }
  __device__ __forceinline__ bool writes_own_row() const { return q < 2; }
};

// The sums over a quad of `low` (row g) and `high` (row g + 8): the one of the row this lane owns.
__device__ __forceinline__ float quad_row_sum(float low, float high, const Lane& lane) {
  const float sum = (lane.upper ? high : low) + shuffle_xor(lane.upper ? low : high, 1);
  return sum + shuffle_xor(sum, 2);
}

// The inverse: from the value of the own row, those of both rows.
__device__ __forceinline__ void quad_rows(float own, float& low, float& high, const Lane& lane) {
  const float other = shuffle_xor(own, 1);
  low = lane.upper ? other : own;
  high = lane.upper ? own : other;
}

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T first, second;
};

// u for rows g and g + 8 of a tile; null past the batch.
template <class T, class Tile>
struct InputRows {
  const T* low;  // [I, K]
  const T* high;

  __device__ __forceinline__ InputRows(const T* u, int tile, const Shape& shape, const Lane& lane) {
    const int b = tile * kTileSamples + lane.g;
    const std::size_t size = std::size_t(shape.I) * shape.K;
    low = b < shape.B ? u + b * size : nullptr;
    high = b + 8 < shape.B ? u + (b + 8) * size : nullptr;
  }

  // The lane's elements k0 + 2q and k0 + 2q + 1 of both rows of input capsule i, as the left side
  // of a product: in its contraction, slots q and q + 4 of lane q are elements 2q and 2q + 1, so
  // that a pair is one load.
  __device__ __forceinline__ void load(float (&a)[4], int i, int k0, int K,
                                       const Lane& lane) const {
    const int k = k0 + 2 * lane.q;
    const std::size_t offset = std::size_t(i) * K + k;
    load_pair(low, offset, k, K, a[0], a[2]);
    load_pair(high, offset, k, K, a[1], a[3]);
  }

 private:
  // x[offset] and x[offset + 1], elements k and k + 1 of K; 0 past K and where x is null.
  static __device__ __forceinline__ void load_pair(const T* x, std::size_t offset, int k, int K,
                                                   float& first, float& second) {
    first = second = 0.0f;
    if (x == nullptr || k >= K) return;
    if (Tile::kEvenK || K % 2 == 0) {  // then rows are aligned to pairs
      const auto pair = *reinterpret_cast<const Pair<T>*>(x + offset);
      first = to_float(pair.first);
      second = to_float(pair.second);
    } else {
      first = to_float(x[offset]);
      if (k + 1 < K) second = to_float(x[offset + 1]);
    }
  }
};

// u_hat = W_i u_i for 16 samples (`add`: u_hat += W_i u_i): the N fragments from `first` on, as far
// as there are any.
// `weight` is W_i on chip, [J, D, K] padded to multiples of 8; `first_u` are the first 8 elements
// of u_i, which the caller has loaded ahead of time.
template <class P, class T, class Tile, int N>
__device__ __forceinline__ void predict(float (&u_hat)[N][4], int first, const T* weight,
                                        const float (&first_u)[4], const InputRows<T, Tile>& rows,
                                        int i, const Shape& shape, const Lane& lane,
                                        bool add = false) {
  using A = typename P::template Operand<4>;
  using B = typename P::template Operand<2>;
  const int padded_K = Tile::padded_K(shape.K);
  const auto step = [&](const A& a, int k0, auto multiply) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if (Tile::has((first + n) / Tile::DT, shape.J)) {
        const auto pair = *reinterpret_cast<const Pair<T>*>(
            weight + ((first + n) * kTileDims + lane.g) * padded_K + k0 + 2 * lane.q);
        const float b[2] = {to_float(pair.first), to_float(pair.second)};
        multiply(u_hat[n], a, P::template prepared_operand<T>(b));
      }
    }
  };
  step(P::template operand<T>(first_u), 0, [add](float (&c)[4], const A& a, const B& b) {
    add ? P::multiply_add(c, a, b) : P::multiply(c, a, b);
  });
  for (int k0 = kTileDims; k0 < padded_K; k0 += kTileDims) {
    float a[4];
    rows.load(a, i, k0, shape.K, lane);
    step(P::template operand<T>(a), k0,
         [](float (&c)[4], const A& a, const B& b) { P::multiply_add(c, a, b); });
  }
}

// x_j . y_j over d of one output capsule, for the row this lane owns; y on chip.
template <int DT>
__device__ __forceinline__ float row_dot(const float (*x)[4], const float4* y, const Lane& lane) {
  float low = 0, high = 0;
#pragma unroll
  for (int n = 0; n < DT; ++n) {
    const float4 other = y[n * kWarpSize + lane.index];
    low += x[n][0] * other.x;
    low += x[n][1] * other.y;
    high += x[n][2] * other.z;
    high += x[n][3] * other.w;
  }
  return quad_row_sum(low, high, lane);
}

// own_j += x_j . state_j over d, for the row this lane owns; `state` is a state tile on chip.
template <class Tile>
__device__ __forceinline__ void add_row_dots(typename Tile::Row& own,
                                             const typename Tile::Values& x, const float4* state,
                                             int J, const Lane& lane) {
#pragma unroll
  for (int j = 0; j < Tile::kCapsules; ++j) {
    if (Tile::has(j, J))
      own[j] += row_dot<Tile::DT>(x + j * Tile::DT, state + j * Tile::DT * kWarpSize, lane);
  }
}

// sum_ij += coefficient_ij x_ij, coefficients given by the rows' owners.
template <class Tile>
__device__ __forceinline__ void add_scaled(typename Tile::Values& sum,
                                           const typename Tile::Row& own,
                                           const typename Tile::Values& x, int J,
                                           const Lane& lane) {
#pragma unroll
  for (int j = 0; j < Tile::kCapsules; ++j) {
    if (Tile::has(j, J)) {
      float low, high;
      quad_rows(own[j], low, high, lane);
#pragma unroll
      for (int n = j * Tile::DT; n < (j + 1) * Tile::DT; ++n) {
        sum[n][0] += low * x[n][0];
        sum[n][1] += low * x[n][1];
        sum[n][2] += high * x[n][2];
        sum[n][3] += high * x[n][3];
      }
    }
  }
}

// The same with x a state tile on chip.
template <class Tile>
__device__ __forceinline__ void add_scaled_state(typename Tile::Values& sum,
                                                 const typename Tile::Row& own, const float4* state,
                                                 int J, const Lane& lane) {
#pragma unroll
  for (int j = 0; j < Tile::kCapsules; ++j) {
    if (Tile::has(j, J)) {
      float low, high;
      quad_rows(own[j], low, high, lane);
#pragma unroll
      for (int n = j * Tile::DT; n < (j + 1) * Tile::DT; ++n) {
        const float4 y = state[n * kWarpSize + lane.index];
        sum[n][0] += low * y.x;
        sum[n][1] += low * y.y;
        sum[n][2] += high * y.z;
        sum[n][3] += high * y.w;
      }
    }
  }
}

// b = log priors of input capsule i; 0 without a prior.
template <class T, class Tile>
__device__ __forceinline__ void load_prior(typename Tile::Row& b, const T* logits, int i, int J) {
#pragma unroll
  for (int j = 0; j < Tile::kCapsules; ++j) {
    b[j] = logits != nullptr && Tile::has(j, J) ? to_float(logits[std::size_t(i) * J + j]) : 0.0f;
  }
}

// Softmax over j in place; `leaky` puts one more logit, fixed at 0, beside them.
template <class Tile>
__device__ __forceinline__ void softmax(typename Tile::Row& b, int J, bool leaky) {
  constexpr float kLog2E = 1.4426950408889634f;
  float largest = leaky ? 0.0f : -INFINITY;
#pragma unroll
  for (int j = 0; j < Tile::kCapsules; ++j) {
    if (Tile::has(j, J)) largest = fmaxf(largest, b[j]);
  }
  float total = leaky ? exp2_approximate(-largest * kLog2E) : 0.0f;
#pragma unroll
  for (int j = 0; j < Tile::kCapsules; ++j) {
    if (Tile::has(j, J)) {
      b[j] = exp2_approximate((b[j] - largest) * kLog2E);
      total += b[j];
    }
  }
  const float inverse = 1.0f / total;
#pragma unroll
  for (int j = 0; j < Tile::kCapsules; ++j) b[j] *= inverse;
}

// dl_j = c_j (dc_j - sum_k c_k dc_k), from dc, in place: softmax backwards.
template <class Tile>
__device__ __forceinline__ void softmax_backward(typename Tile::Row& dc,
                                                 const typename Tile::Row& c, int J) {
  float mean = 0;
#pragma unroll
  for (int j = 0; j < Tile::kCapsules; ++j) {
    if (Tile::has(j, J)) mean += c[j] * dc[j];
  }
#pragma unroll
  for (int j = 0; j < Tile::kCapsules; ++j) {
    if (Tile::has(j, J)) dc[j] = c[j] * (dc[j] - mean);
  }
}

}  // namespace capsule_kernels::cuda

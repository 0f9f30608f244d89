// One input capsule of a tile of 8 samples, in the registers of a warp.
//
// u_hat^T [J * D, 8] of a tile is `Tile::kFragments` results of mma, 16 pairs (j, d) each. Lane
// (g, q) = (lane / 4, lane % 4) holds rows g and g + 8 of columns (samples) 2q and 2q + 1 of each.
// Which (j, d) is row g of a fragment is ours to choose: the output capsules form groups of 8, 4, 2
// or 1, and 1, 2, 4 or 8 of the lanes with the same q share a capsule of the group, consecutive d
// each. So a lane holds all d of an output capsule, or as many as there are, and u_hat . V and
// c u_hat take no exchange between lanes, or little.
//
// A state tile (V or ds of a tile) and W_i on chip are stored in the order of the fragments, a
// float4 (of W: four values) a lane: loads need no index arithmetic.
#pragma once

#include <utility>

#include "plan.h"
#include "precision.cuh"

namespace capsule_kernels::cuda {

// Output capsules of `kD` (padded) dimensions: exactly kJ of them and an even K <= 8, or any J that
// fits and any K (kJ = 0). With known sizes no branches stand between output capsules, so that
// their instructions overlap, and addresses are constants.
template <int kD, int kJ = 0>
struct TileOf {
  static constexpr int D = kD;
  static constexpr bool kKnown = kJ > 0;

  // A known J is the sum of powers of two, largest first; an unknown one fills groups of two
  // fragments.
  static CAPSULE_KERNELS_BOTH constexpr int capsules(int group) {
    if (!kKnown) return capsules_of_two_fragments(kD);
    int left = kJ, capsules = 0;
    for (; group >= 0; --group) {
      for (capsules = 8; capsules > left; capsules /= 2) {
      }
      left -= capsules;
    }
    return capsules;
  }
  static CAPSULE_KERNELS_BOTH constexpr int first_capsule(int group) {
    int first = 0;
    for (int before = 0; before < group; ++before) first += capsules(before);
    return first;
  }
  static CAPSULE_KERNELS_BOTH constexpr int fragments(int group) {
    return capsules(group) * kD / kTileRows;
  }
  static CAPSULE_KERNELS_BOTH constexpr int first_fragment(int group) {
    return first_capsule(group) * kD / kTileRows;
  }
  // Lanes that share an output capsule.
  static CAPSULE_KERNELS_BOTH constexpr int sharers(int group) { return 8 / capsules(group); }

  static CAPSULE_KERNELS_BOTH constexpr int count_groups() {
    if (!kKnown) return kMaxFragments / 2;
    int groups = 0;
    while (first_capsule(groups) < kJ) ++groups;
    return groups;
  }
  static constexpr int kGroups = count_groups();
  static constexpr int kFragments = kKnown ? kJ * kD / kTileRows : kMaxFragments;

  using Values = float[kFragments][4];  // of both rows and samples: (row, sample) 00, 01, 10, 11
  using Row = float[kGroups][2];        // a value for each sample of the lane's output capsule

  // J, a constant where it is known.
  static __device__ __forceinline__ int outputs(int J) { return kKnown ? kJ : J; }
  // Whether there are output capsules in the group.
  static __device__ __forceinline__ bool has(int group, int J) {
    return kKnown || first_capsule(group) < J;
  }
  static __device__ __forceinline__ int fragments_of(int J) {
    return kKnown ? kFragments : ceil_div(J, capsules(0)) * 2;
  }
  static __device__ __forceinline__ int padded_K(int K) {
    return kKnown ? kStepDims : round_up(K, kStepDims);
  }

  static_assert(kFragments <= kMaxFragments && kFragments * kTileRows >= kJ * kD);
};

// A number as a type, so that what depends on it is a constant.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

template <class Visit, int... kNumbers>
__device__ __forceinline__ void for_each_of(Visit visit, std::integer_sequence<int, kNumbers...>) {
  (visit(Constant<kNumbers>()), ...);
}

// Calls visit(Constant<group>()) for every group of output capsules, and for every one that there
// is.
template <class Tile, class Visit>
__device__ __forceinline__ void for_all_groups(Visit visit) {
  for_each_of(visit, std::make_integer_sequence<int, Tile::kGroups>());
}

template <class Tile, class Visit>
__device__ __forceinline__ void for_each_group(int J, Visit visit) {
  for_all_groups<Tile>([&](auto group) {
    if (Tile::has(group.value, J)) visit(group);
  });
}

// Calls visit(group, n) for every fragment n that there is.
template <class Tile, class Visit>
__device__ __forceinline__ void for_each_fragment(int J, Visit visit) {
  for_each_group<Tile>(J, [&](auto group) {
    constexpr int kFirst = Tile::first_fragment(group.value);
    constexpr int kLast = kFirst + Tile::fragments(group.value);
#pragma unroll
    for (int n = kFirst; n < kLast; ++n) visit(group.value, n);
  });
}

// Where a thread is in its warp.
struct Lane {
  int index;  // in the warp
  int g, q;   // index / 4, index % 4

  __device__ __forceinline__ Lane() : index(threadIdx.x % kWarpSize), g(index / 4), q(index % 4) {}

  template <class Tile>
  __device__ __forceinline__ int capsule(int group) const {
    return Tile::first_capsule(group) + g / Tile::sharers(group);
  }
  // The first of the lane's dimensions in the group; row g of its fragment m is this + 2m, row
  // g + 8 this + 2m + 1.
  template <class Tile>
  __device__ __forceinline__ int first_dim(int group) const {
    return g % Tile::sharers(group) * 2 * Tile::fragments(group);
  }
};

// The fragment that has element d of output capsule j, and the row of its lanes, their g.
struct Place {
  int fragment, g;
};

template <class Tile>
__device__ __forceinline__ Place place_of(int j, int d) {
  Place place = {};
  for_each_group<Tile>(j + 1, [&](auto group) {
    constexpr int kFirst = Tile::first_capsule(group.value);
    constexpr int kPairs = Tile::fragments(group.value), kSharers = Tile::sharers(group.value);
    if (j < kFirst || j >= kFirst + Tile::capsules(group.value)) return;
    place = {Tile::first_fragment(group.value) + d / 2 % kPairs,
             (j - kFirst) * kSharers + d / (2 * kPairs)};
  });
  return place;
}

// Where element d of output capsule j of sample b lies in a state [tiles][fragments][32][4].
template <class Tile>
__device__ __forceinline__ std::size_t state_offset(int b, int j, int d, int fragments) {
  const Place place = place_of<Tile>(j, d);
  const int lane = place.g * 4 + b % kTileSamples / 2;
  return ((std::size_t(b / kTileSamples) * fragments + place.fragment) * kWarpSize + lane) * 4 +
         d % 2 * 2 + b % 2;
}

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T first, second;
};

// A lane's values of a fragment of W_i: rows g and g + 8, columns 2q and 2q + 1. The first column
// before the second, as du reads it, or the first row before the second, as memory has them.
template <class T>
struct alignas(4 * sizeof(T)) Columns {
  Pair<T> columns[2];
};
template <class T>
struct alignas(4 * sizeof(T)) Rows {
  Pair<T> rows[2];
};

// A fragment's values are read by lane, and, where the fragment is to be transposed, two at a time
// by other lanes: in this order of the lanes neither meets the same bank of shared memory twice.
__device__ __forceinline__ int swizzled(int lane) { return lane ^ (lane / 8 * 2); }

// x[0] and x[1], elements k and k + 1 of a row of K, as far as the row reaches; 0 where there is no
// such row.
template <class Tile, class T>
__device__ __forceinline__ Pair<T> load_pair(const T* x, bool is_row, int k, int K) {
  Pair<T> pair;
  store(&pair.first, 0.0f);
  store(&pair.second, 0.0f);
  if (!is_row || k >= K) return pair;
  if (Tile::kKnown || K % 2 == 0) {  // then rows are aligned to pairs
    pair = *reinterpret_cast<const Pair<T>*>(x);
  } else {
    pair.first = x[0];
    if (k + 1 < K) pair.second = x[1];
  }
  return pair;
}

// u of sample g of a tile.
template <class T, class Tile>
struct InputRow {
  const T* u;   // the lane's first element of the sample, or of one that is there
  bool inside;  // the batch, and K where it is known

  InputRow() = default;
  __device__ __forceinline__ InputRow(const T* u, int tile, const Shape& shape, const Lane& lane) {
    const int b = tile * kTileSamples + lane.g, k = 2 * lane.q;
    inside = b < shape.B && (!Tile::kKnown || k < shape.K);
    this->u = u + std::size_t(min(b, shape.B - 1)) * shape.I * shape.K + (inside ? k : 0);
  }

  // Elements k0 + 2q and k0 + 2q + 1 of input capsule i, as the right side of a product: in its
  // contraction, slots q and q + 4 of lane q are elements 2q and 2q + 1, so that a pair is one
  // load. 32 bits count the elements of a sample (`sample_is_counted`).
  __device__ __forceinline__ void load(float (&x)[2], int i, int k0, int K,
                                       const Lane& lane) const {
    const T* const from = u + (i * K + k0);
    if constexpr (Tile::kKnown) {  // no branch: it would keep apart what overlaps
      const auto pair = *reinterpret_cast<const Pair<T>*>(from);
      x[0] = inside ? to_float(pair.first) : 0.0f;
      x[1] = inside ? to_float(pair.second) : 0.0f;
    } else {
      const auto pair = load_pair<Tile>(from, inside, k0 + 2 * lane.q, K);
      x[0] = to_float(pair.first);
      x[1] = to_float(pair.second);
    }
  }
};

// The lane's values of a fragment of W on chip.
template <class P, class T>
__device__ __forceinline__ typename P::template Operand<4> weight_operand(
    const Columns<T>* fragment, int swizzled_lane) {
  const Columns<T> w = fragment[swizzled_lane];
  const float a[4] = {to_float(w.columns[0].first), to_float(w.columns[0].second),
                      to_float(w.columns[1].first), to_float(w.columns[1].second)};
  return P::template prepared_operand<T>(a);
}

template <class P, class T>
__device__ __forceinline__ typename P::template Operand<4> weight_operand(const Rows<T>* fragment,
                                                                          int swizzled_lane) {
  const Rows<T> w = fragment[swizzled_lane];
  const float a[4] = {to_float(w.rows[0].first), to_float(w.rows[1].first),
                      to_float(w.rows[0].second), to_float(w.rows[1].second)};
  return P::template prepared_operand<T>(a);
}

// For Values and Row.
template <int kCount, int kSize>
__device__ __forceinline__ void set_zero(float (&x)[kCount][kSize]) {
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
    for (int e = 0; e < kSize; ++e) x[n][e] = 0.0f;
  }
}

// Calls visit(n, operand of fragment n of W_i, operands of u_i) for every fragment and 8 elements
// of K. `weight` is W_i on chip [K / 8][fragments][32], Rows or Columns; `first_u` are the first
// elements of u_i of some tiles, which the caller has loaded ahead of time.
template <class P, class T, class Tile, int kTiles, class Order, class Visit>
__device__ __forceinline__ void for_each_product(const Order* weight,
                                                 const float (&first_u)[kTiles][2],
                                                 const InputRow<T, Tile> (&rows)[kTiles], int i,
                                                 const Shape& shape, const Lane& lane,
                                                 Visit visit) {
  const int fragments = Tile::fragments_of(shape.J), place = swizzled(lane.index);
  for (int k0 = 0; k0 < Tile::padded_K(shape.K); k0 += kStepDims) {
    typename P::template Operand<2> b[kTiles];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      float x[2] = {first_u[m][0], first_u[m][1]};
      if (k0 > 0) rows[m].load(x, i, k0, shape.K, lane);
      b[m] = P::template operand<T>(x);
    }
#pragma unroll
    for (int n = 0; n < Tile::kFragments; ++n) {
      if (!Tile::kKnown && n >= fragments) continue;
      visit(n, weight_operand<P>(weight + n * kWarpSize, place), b);
    }
    weight += fragments * kWarpSize;
  }
}

// u_hat = W_i u_i for 8 samples. Where J is a constant there are no registers for closer products.
template <class P, class T, class Tile, class Order>
__device__ __forceinline__ void predict(typename Tile::Values& u_hat, const Order* weight,
                                        const float (&first_u)[1][2],
                                        const InputRow<T, Tile> (&row)[1], int i,
                                        const Shape& shape, const Lane& lane) {
  if (!Tile::kKnown) set_zero(u_hat);
  for_each_product<P>(weight, first_u, row, i, shape, lane,
                      [&](int n, const auto& a, const auto& b) {
                        if (Tile::kKnown) {
                          P::multiply(u_hat[n], a, b[0]);
                        } else {
                          P::multiply_add_closely(u_hat[n], a, b[0]);
                        }
                      });
}

// sums += W_i u_i for some tiles at once: W_i is read once for them.
template <class P, class T, class Tile, int kTiles, class Order>
__device__ __forceinline__ void add_predictions(typename Tile::Values (&sums)[kTiles],
                                                const Order* weight,
                                                const float (&first_u)[kTiles][2],
                                                const InputRow<T, Tile> (&rows)[kTiles], int i,
                                                const Shape& shape, const Lane& lane) {
  for_each_product<P>(weight, first_u, rows, i, shape, lane,
                      [&](int n, const auto& a, const auto& b) {
#pragma unroll
                        for (int m = 0; m < kTiles; ++m) P::multiply_add(sums[m][n], a, b[m]);
                      });
}

// A lane's four values of a fragment, as they lie in memory.
__device__ __forceinline__ void add_to(float (&sum)[4], const float4& x) {
  sum[0] += x.x;
  sum[1] += x.y;
  sum[2] += x.z;
  sum[3] += x.w;
}

__device__ __forceinline__ float4 packed(const float (&x)[4]) {
  return make_float4(x[0], x[1], x[2], x[3]);
}

// A state tile to registers, from group `first` of the output capsules on.
template <class Tile>
__device__ __forceinline__ void load_state(typename Tile::Values& x, const float4* tile, int J,
                                           const Lane& lane, int first = 0) {
  for_each_fragment<Tile>(J, [&](int group, int n) {
    if (group < first) return;
    const float4 y = tile[n * kWarpSize + lane.index];
    x[n][0] = y.x;
    x[n][1] = y.y;
    x[n][2] = y.z;
    x[n][3] = y.w;
  });
}

}  // namespace capsule_kernels::cuda

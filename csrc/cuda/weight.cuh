// W_i on its way to chip, [K / 8][fragments][32], by one warp.
#pragma once

#include <type_traits>

#include "tile.cuh"

namespace capsule_kernels::cuda {

// Whether each of the rows of a pair is there.
struct PairOfRows {
  bool first, second;
};

// Calls visit(place, source, K, k, inside) for each lane's pair of rows of every fragment of W_i
// [J, D, K] and 8 elements of K: where the lane's values lie on chip, the first of them in memory,
// its k, and whether each of the two rows is within J and D.
template <class Tile, class T, class Visit>
__device__ __forceinline__ void for_each_pair_of_rows(const T* weight, const Shape& shape,
                                                      const Lane& lane, Visit visit) {
  int place = swizzled(lane.index);
  if (Tile::kKnown && shape.D == Tile::D && shape.K == kStepDims) {
    // Nothing is padded, and addresses are constants apart.
    for_each_group<Tile>(shape.J, [&](auto group) {
      const int row = lane.capsule<Tile>(group.value) * Tile::D + lane.first_dim<Tile>(group.value);
      const T* const rows = weight + (row * kStepDims + 2 * lane.q);
#pragma unroll
      for (int m = 0; m < Tile::fragments(group.value); ++m) {
        visit(place + (Tile::first_fragment(group.value) + m) * kWarpSize, rows + 2 * m * kStepDims,
              kStepDims, 0, PairOfRows{true, true});
      }
    });
    return;
  }
  for (int k0 = 0; k0 < Tile::padded_K(shape.K); k0 += kStepDims) {
    const int k = k0 + 2 * lane.q;
    for_each_fragment<Tile>(shape.J, [&](int group, int n) {
      const int j = lane.capsule<Tile>(group);
      const int d = lane.first_dim<Tile>(group) + 2 * (n - Tile::first_fragment(group));
      visit(place + n * kWarpSize, weight + ((j * shape.D + d) * shape.K + k), shape.K, k,
            PairOfRows{j < shape.J && d < shape.D, j < shape.J && d + 1 < shape.D});
    });
    place += Tile::fragments_of(shape.J) * kWarpSize;
  }
}

// W_i to chip in the background, as Rows, 0 past J, D and K. What prepares it for the products of P
// comes behind, by the same lanes and after they have waited for their copies; for other lanes it
// is there after a barrier.
template <class Tile, class T>
__device__ __forceinline__ void copy_weight(Rows<T>* to, const T* from, const Shape& shape,
                                            const Lane& lane) {
  for_each_pair_of_rows<Tile>(
      from, shape, lane, [&](int place, const T* source, int K, int k, const PairOfRows& inside) {
        const auto copy = [&](Pair<T>& to, const T* row, bool inside) {
          if (Tile::kKnown || K % 2 == 0) {
            const bool is_there = inside && k < K;
            copy_in_background<2 * sizeof(T)>(&to, is_there ? row : from, is_there);
          } else {  // rows are not aligned to pairs
            to = load_pair<Tile>(row, inside, k, K);
          }
        };
        copy(to[place].rows[0], source, inside.first);
        copy(to[place].rows[1], source + K, inside.second);
      });
}

// Prepared, and as Columns.
template <class P, class Tile, class T>
__device__ __forceinline__ void rows_to_columns(Rows<T>* weight, const Shape& shape,
                                                const Lane& lane) {
  int place = swizzled(lane.index);
  for (int k0 = 0; k0 < Tile::padded_K(shape.K); k0 += kStepDims) {
    for_each_fragment<Tile>(shape.J, [&](int, int n) {
      Rows<T>& w = weight[place + n * kWarpSize];
      const Pair<T> x = w.rows[0], y = w.rows[1];
      reinterpret_cast<Columns<T>&>(w) = {{{P::prepared(x.first), P::prepared(y.first)},
                                           {P::prepared(x.second), P::prepared(y.second)}}};
    });
    place += Tile::fragments_of(shape.J) * kWarpSize;
  }
}

// How W_i lies on chip in the sweeps. An operand of Columns is four registers as they are loaded;
// where every value is taken apart or converted after it is loaded, Rows cost no more.
template <class P, class T>
using Prepared = std::conditional_t<P::template kPrepares<T>, Columns<T>, Rows<T>>;

template <class P, class Tile, class T>
__device__ __forceinline__ void prepare_weight(Rows<T>* weight, const Shape& shape,
                                               const Lane& lane) {
  if constexpr (P::template kPrepares<T>) rows_to_columns<P, Tile>(weight, shape, lane);
}

}  // namespace capsule_kernels::cuda

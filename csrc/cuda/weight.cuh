// W_i on its way to chip, [K / 8][fragments][32], by one warp.
#pragma once

#include <type_traits>

#include "tile.cuh"

namespace capsule_kernels::cuda {

// Calls visit(place, source, k, inside) for each lane's pair of rows of every fragment of W_i
// [J, D, K] and 8 elements of K: where the lane's values lie on chip, the first of them in memory,
// its k, and whether each of the two rows is within J and D.
template <class Tile, class T, class Visit>
__device__ __forceinline__ void for_each_pair_of_rows(const T* weight, const Shape& shape,
                                                      const Lane& lane, Visit visit) {
  int place = swizzled(lane.index);
  for (int k0 = 0; k0 < Tile::padded_K(shape.K); k0 += kStepDims) {
    const int k = k0 + 2 * lane.q;
    for_each_fragment<Tile>(shape.J, [&](int group, int n) {
      const int j = lane.capsule<Tile>(group);
      const int d = lane.first_dim<Tile>(group) + 2 * (n - Tile::first_fragment(group));
      const bool inside[2] = {j < shape.J && d < shape.D, j < shape.J && d + 1 < shape.D};
      visit(place + n * kWarpSize, weight + ((j * shape.D + d) * shape.K + k), k, inside);
    });
    place += Tile::fragments_of(shape.J) * kWarpSize;
  }
}

// W_i to chip, prepared for the products of P, and 0 past J, D and K. For the other lanes it is
// there after a barrier.
template <class P, class Tile, class T>
__device__ __forceinline__ void load_weight(Columns<T>* to, const T* from, const Shape& shape,
                                            const Lane& lane) {
  for_each_pair_of_rows<Tile>(
      from, shape, lane, [&](int place, const T* source, int k, const bool (&inside)[2]) {
        const Pair<T> x = load_pair<Tile>(source, inside[0], k, shape.K);
        const Pair<T> y = load_pair<Tile>(source + shape.K, inside[1], k, shape.K);
        to[place] = {{{P::prepared(x.first), P::prepared(y.first)},
                      {P::prepared(x.second), P::prepared(y.second)}}};
      });
}

// The same in the background, but not prepared: `prepare_weight` does that, by the same lanes and
// after they have waited for their copies.
template <class Tile, class T>
__device__ __forceinline__ void copy_weight(Rows<T>* to, const T* from, const Shape& shape,
                                            const Lane& lane) {
  for_each_pair_of_rows<Tile>(
      from, shape, lane, [&](int place, const T* source, int k, const bool (&inside)[2]) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const T* row = source + e * shape.K;
          if (Tile::kKnown || shape.K % 2 == 0) {
            const bool is_there = inside[e] && k < shape.K;
            copy_in_background<2 * sizeof(T)>(&to[place].rows[e], is_there ? row : from, is_there);
          } else {  // rows are not aligned to pairs
            to[place].rows[e] = load_pair<Tile>(row, inside[e], k, shape.K);
          }
        }
      });
}

// How W_i lies on chip then. An operand of Columns is four registers as they are loaded; where
// every value is taken apart or converted after it is loaded, Rows cost no more.
template <class P, class T>
using Prepared = std::conditional_t<P::template kPrepares<T>, Columns<T>, Rows<T>>;

template <class P, class Tile, class T>
__device__ __forceinline__ void prepare_weight(Rows<T>* weight, const Shape& shape,
                                               const Lane& lane) {
  if constexpr (P::template kPrepares<T>) {
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
}

}  // namespace capsule_kernels::cuda

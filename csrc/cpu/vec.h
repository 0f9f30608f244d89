// SIMD vectors as the compiler's own vector extension (GCC, Clang): one source for every
// instruction set. The width comes from the build: CAPSULE_VECTOR_BYTES.
//
// Everything here lives in a namespace named after the instruction set, so that the same templates
// compiled with different flags never meet at link time.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#ifndef CAPSULE_ISA
#error "compile with -DCAPSULE_ISA=<name> -DCAPSULE_VECTOR_BYTES=<16|32|64>"
#endif

#define CAPSULE_INLINE inline __attribute__((always_inline))

namespace capsule::CAPSULE_ISA {

using index = int64_t;

CAPSULE_INLINE index larger(index a, index b) { return a > b ? a : b; }

inline constexpr long double kLn2 = 0.693147180559945309417232121458176568L;

template <typename T, int lanes>
struct VecOf {
  typedef T type __attribute__((vector_size(lanes * sizeof(T))));
};

template <typename T>
inline constexpr int kLanes = CAPSULE_VECTOR_BYTES / sizeof(T);

template <typename T, int lanes = kLanes<T>>
using Vec = typename VecOf<T, lanes>::type;

template <typename T>
struct SignedOf;
template <>
struct SignedOf<float> {
  using type = int32_t;
};
template <>
struct SignedOf<double> {
  using type = int64_t;
};

template <typename T, int lanes = kLanes<T>>
CAPSULE_INLINE Vec<T, lanes> load(const T* p) {
  Vec<T, lanes> x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}

template <typename T, typename V>
CAPSULE_INLINE void store(T* p, const V& x) {
  __builtin_memcpy(p, &x, sizeof(x));
}

template <typename T>
CAPSULE_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

// p[0], ..., p[count - 1], over and over.
template <int count, typename T>
CAPSULE_INLINE Vec<T> broadcast_group(const T* p) {
  if constexpr (count == 1) {
    return broadcast(*p);
  } else {
    static_assert(count * sizeof(T) == 8);
    int64_t bits;
    __builtin_memcpy(&bits, p, sizeof(bits));
    return reinterpret_cast<Vec<T>>(bits + Vec<int64_t>{});
  }
}

template <typename V>
CAPSULE_INLINE V max(V a, V b) {
  return a > b ? a : b;
}

template <typename T>
CAPSULE_INLINE T sum_lanes(Vec<T> x) {
  T total = 0;
  for (int l = 0; l < kLanes<T>; ++l) total += x[l];
  return total;
}

template <typename T>
CAPSULE_INLINE Vec<T> square_root(Vec<T> x) {
  for (int l = 0; l < kLanes<T>; ++l) x[l] = __builtin_sqrt(x[l]);
  return x;
}

// A shuffle of two vectors: lane l of the result is lane from(l) of a and b, side by side.
template <typename T, typename From, int... l>
CAPSULE_INLINE Vec<T> shuffle(Vec<T> a, Vec<T> b, From from, std::integer_sequence<int, l...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, from(l)...);
#else
  using Int = typename SignedOf<T>::type;
  return __builtin_shuffle(a, b, Vec<Int, kLanes<T>>{from(l)...});
#endif
}

template <typename T, typename From>
CAPSULE_INLINE Vec<T> shuffle(Vec<T> a, Vec<T> b, From from) {
  return shuffle<T>(a, b, from, std::make_integer_sequence<int, kLanes<T>>{});
}

// Lane l of the result is lane from[l] of x, modulo their number.
template <typename T>
CAPSULE_INLINE Vec<T> select_lanes(Vec<T> x, Vec<typename SignedOf<T>::type, kLanes<T>> from) {
#ifdef __clang__
  Vec<T> selected;
  for (int l = 0; l < kLanes<T>; ++l) selected[l] = x[from[l] & (kLanes<T> - 1)];
  return selected;
#else
  return __builtin_shuffle(x, from);
#endif
}

// 2^(l / roots) for l = 0, ..., roots - 1, over and over.
template <typename T, int roots>
struct Roots {
  T of[kLanes<T>];
  constexpr Roots() : of{} {
    for (int l = 0; l < kLanes<T>; ++l) {
      const long double x = kLn2 * (l % roots) / roots;
      long double sum = 0, term = 1;
      for (int k = 1; k < 30; ++k) {
        sum += term;
        term *= x / k;
      }
      of[l] = T(sum);
    }
  }
};

// The Taylor series of exp(r), up to the term behind which less than a quarter of `precision` is
// missing for |r| <= ln 2 / (2 roots).
template <typename T, int roots>
struct ExponentialSeries {
  T of[16];
  int terms;
  constexpr ExponentialSeries(double precision) : of{1}, terms(0) {
    long double coefficient = 1, rest = 1;
    for (int k = 1; k < 16; ++k) {
      coefficient /= k;
      of[k] = T(coefficient);
      rest *= kLn2 / (2 * roots) / k;
      if (terms == 0 && rest * kLn2 / (2 * roots) / (k + 1) < precision / 4) terms = k;
    }
  }
};

// exp(x) for x <= 0, to about one unit in the last place; below the smallest normal number exactly
// 0, so that a log prior of -inf decouples; NaN stays NaN.
//
// exp(x) = 2^n 2^(l / roots) exp(r) with whole n and l, |r| <= ln 2 / (2 roots): the middle one
// from a vector, where one instruction selects lanes, the last one by its series.
template <typename T>
CAPSULE_INLINE Vec<T> exp_nonpositive(Vec<T> x) {
  using Int = typename SignedOf<T>::type;
  using Ints = Vec<Int, kLanes<T>>;
  using Bit = std::make_unsigned_t<Int>;  // wraps around
  using Bits = Vec<Bit, kLanes<T>>;
  constexpr bool is_float = sizeof(T) == 4;
  constexpr int roots = CAPSULE_VECTOR_BYTES >= 32 ? kLanes<T> : 1;
  constexpr int mantissa_bits = is_float ? 23 : 52;
  constexpr T lowest = is_float ? T(-87.3) : T(-708.3);
  constexpr T log2_e = T(1 / kLn2);
  // ln 2 in two parts. The first, of 12 or 32 bits, times n + l / roots, of 11 or 13, is exact even
  // where the product is rounded before it is subtracted. The second is written down: where
  // long double is double, as Apple has it, kLn2 has no digits for it.
  constexpr T ln2_high = is_float ? T(0x1.62ep-1) : T(0x1.62e42feep-1);
  constexpr T ln2_low = is_float ? T(kLn2 - 0x1.62ep-1) : T(0x1.a39ef35793c76p-33);
  // Adding 1.5 * 2^(mantissa bits) / roots rounds to a multiple of 1 / roots, n + l / roots, and
  // leaves n roots + l in the low mantissa bits.
  constexpr T rounder = T(3 * (Int(1) << (mantissa_bits - 1))) / roots;
  const Vec<T> shifted = x * log2_e + rounder;
  const Vec<T> rounded = shifted - rounder;
  const Vec<T> r = (x - rounded * ln2_high) - rounded * ln2_low;
  constexpr ExponentialSeries<T, roots> series(is_float ? 0x1p-23 : 0x1p-52);
  Vec<T> power = broadcast(series.of[series.terms]);
#pragma GCC unroll 16
  for (int k = series.terms - 1; k > 0; --k) power = power * r + series.of[k];
  power *= r;

  // 2^(n + l / roots): n goes to the exponent of the root, which does without what l adds there.
  static constexpr Roots<T, roots> table;
  constexpr Bit root_bits = (Bit(1) << mantissa_bits) / roots;
  Bits lane;
  for (int l = 0; l < kLanes<T>; ++l) lane[l] = l % roots;
  const Bits exponents = reinterpret_cast<Bits>(shifted);
  Bits bits = reinterpret_cast<Bits>(load(table.of)) - lane * root_bits;
  if constexpr (roots > 1)
    bits = reinterpret_cast<Bits>(
        select_lanes<T>(reinterpret_cast<Vec<T>>(bits), reinterpret_cast<Ints>(shifted)));
  const Vec<T> scale = reinterpret_cast<Vec<T>>(bits + exponents * root_bits);
  return x < lowest ? Vec<T>{} : scale * power + scale;
}

// Swaps the off-diagonal blocks of `stage` x `stage` in rows that lie `stage` apart.
template <typename T, int stage>
CAPSULE_INLINE void swap_blocks(Vec<T>& a, Vec<T>& b) {
  constexpr int lanes = kLanes<T>;
  const Vec<T> low =
      shuffle<T>(a, b, [](int l) constexpr { return l & stage ? lanes + l - stage : l; });
  b = shuffle<T>(a, b, [](int l) constexpr { return l & stage ? lanes + l : l + stage; });
  a = low;
}

template <typename T, int stage>
CAPSULE_INLINE void transpose_stages(Vec<T> (&rows)[kLanes<T>]) {
  if constexpr (stage < kLanes<T>) {
#pragma GCC unroll 16
    for (int r = 0; r < kLanes<T>; ++r)
      if (!(r & stage)) swap_blocks<T, stage>(rows[r], rows[r + stage]);
    transpose_stages<T, 2 * stage>(rows);
  }
}

// Rows become columns: rows[r][l] -> rows[l][r], in log2(lanes) stages that swap blocks. The first
// two stages of 4-byte elements go through interleaved pairs, one instruction a row instead of two.
template <typename T>
CAPSULE_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  constexpr int lanes = kLanes<T>;
  if constexpr (sizeof(T) == 4 && lanes >= 4) {
#pragma GCC unroll 16
    for (int r = 0; r < lanes; r += 4) {
      // Of every four lanes: {a0 b0 a1 b1} and {a2 b2 a3 b3}.
      auto even = [](int l) constexpr { return (l & ~3) + (l & 3) / 2 + (l & 1 ? lanes : 0); };
      auto odd = [](int l) constexpr { return (l & ~3) + 2 + (l & 3) / 2 + (l & 1 ? lanes : 0); };
      Vec<T> a = shuffle<T>(rows[r], rows[r + 1], even),
             b = shuffle<T>(rows[r + 2], rows[r + 3], even);
      Vec<T> c = shuffle<T>(rows[r], rows[r + 1], odd),
             d = shuffle<T>(rows[r + 2], rows[r + 3], odd);
      swap_blocks<T, 2>(a, b);
      swap_blocks<T, 2>(c, d);
      rows[r] = a;
      rows[r + 1] = b;
      rows[r + 2] = c;
      rows[r + 3] = d;
    }
    transpose_stages<T, 4>(rows);
  } else {
    transpose_stages<T, 1>(rows);
  }
}

// out[f][r] = rows[r][f] for f < count, r < lanes: lanes rows of memory become lane vectors.
// `row_of(r)` is the address of row r; `stride` is the distance of two results, in elements.
template <typename T, typename RowOf>
CAPSULE_INLINE void gather_rows(RowOf row_of, index count, T* out, index stride) {
  constexpr int lanes = kLanes<T>;
  const T* rows[lanes];
  for (int r = 0; r < lanes; ++r) rows[r] = row_of(r);
  index f = 0;
  for (; f + lanes <= count; f += lanes) {
    Vec<T> block[lanes];
#pragma GCC unroll 16
    for (int r = 0; r < lanes; ++r) block[r] = load(rows[r] + f);
    transpose<T>(block);
#pragma GCC unroll 16
    for (int r = 0; r < lanes; ++r) store(out + (f + r) * stride, block[r]);
  }
  for (; f < count; ++f)
    for (int r = 0; r < lanes; ++r) out[f * stride + r] = rows[r][f];
}

// The way back, to the first `valid` rows: rows[r][f] = in[f][r].
template <typename T, typename RowOf>
CAPSULE_INLINE void scatter_rows(const T* in, index stride, index count, index valid,
                                 RowOf row_of) {
  constexpr int lanes = kLanes<T>;
  const int used = valid < lanes ? int(valid) : lanes;
  T* rows[lanes];
  for (int r = 0; r < used; ++r) rows[r] = row_of(r);
  index f = 0;
  for (; f + lanes <= count; f += lanes) {
    Vec<T> block[lanes];
#pragma GCC unroll 16
    for (int r = 0; r < lanes; ++r) block[r] = load(in + (f + r) * stride);
    transpose<T>(block);
    for (int r = 0; r < used; ++r) store(rows[r] + f, block[r]);
  }
  for (; f < count; ++f)
    for (int r = 0; r < used; ++r) rows[r][f] = in[f * stride + r];
}

// f(std::integral_constant<int, n>, start) over [0, count) in tiles of `most`, then of 8, 4, 2
// and 1.
template <int most, typename F>
CAPSULE_INLINE void for_tiles(index count, F f, index start = 0) {
  for (; start + most <= count; start += most) f(std::integral_constant<int, most>{}, start);
  if constexpr (most > 1) {
    constexpr int next = most > 8 ? 8 : most > 4 ? 4 : most / 2;
    if (start < count) for_tiles<next>(count, f, start);
  }
}

}  // namespace capsule::CAPSULE_ISA

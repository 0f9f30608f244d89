// Routing sweeps over blocks of samples: the first iteration, a matrix product, and the later ones.
#pragma once

#include "sample_block.h"

namespace capsule::CAPSULE_ISA {

template <typename T, int vectors>
struct SampleSweep : SampleBlock<T, vectors> {
  using Block = SampleBlock<T, vectors>;
  using typename Block::V;
  template <int n>
  using Tile = typename Block::template Tile<n>;
  using Block::lanes, Block::width, Block::tile;
  static constexpr int product_tile = (Block::many_registers ? 16 : 12) / vectors;
  // How many capsules before it is used a later iteration asks for W: N K elements from one to the
  // next are too far to be guessed.
  static constexpr index capsules_ahead = 2;

  // Samples from `first_sample` on and input capsules [i0, i1) of a sweep, and whose u comes next.
  struct Part {
    index first_sample, i0, i1;
    index next_sample, next_i0;
  };

  // First iteration: couplings are those of the prior, the same for every sample. So s is a matrix
  // product over (i, k), with u scaled by c_ij where there is a prior.
  template <int fixed_K, int fixed_D>
  static void linear_part(const Problem<T>& p, const Part& part, const T* packed, T* out,
                          T* scratch) {
    const index K = fixed_K ? fixed_K : p.K, D = fixed_D ? fixed_D : p.D, J = p.J, N = J * D;
    const index i0 = part.i0, i1 = part.i1, count = p.logits ? i1 - i0 : 1;
    T* c = scratch;  // [count][J]
    for (index x = 0; x < count; ++x)
      prior_softmax(c + x * J, J, p.logits ? p.logits + (i0 + x) * J : nullptr, p.leaky,
                    c + count * J);
    T* scaled = c + count * J;  // [K][width]
    typename Block::NextBlock next{part.next_sample, part.next_i0, i1 - i0, J};
    for (index j = 0; j < J; ++j) {
      next.step(p);
      for_tiles<product_tile>(D, [&](auto size, index d) {
        constexpr int n = size;
        const T* W = p.weight + (j * D + d) * K;
        Tile<n> acc{};
        for (index i = i0; i < i1; ++i) {
          const T* u = packed + (i - i0) * K * width;
          if (p.logits) {
            for (index x = 0; x < K * width; x += lanes)
              store(scaled + x, c[(i - i0) * J + j] * load(u + x));
            u = scaled;
          }
          const T* W_i = W + p.row(i) * N * K;
          Block::prefetch(W_i + n * K, n * K);  // of the next tile
          Block::template add_prediction<n>(W_i, K, u, acc);
        }
        const T scale = p.logits ? T(1) : c[j];
        T* s = out + (j * D + d) * width;
        Tile<n> sum;
        Block::template load_tile<n>(s, sum);
#pragma GCC unroll 16
        for (int m = 0; m < n; ++m)
#pragma GCC unroll 16
          for (int q = 0; q < vectors; ++q) sum[m][q] += scale * acc[m][q];
        Block::template store_tile<n>(sum, s);
      });
    }
  }

  // Scratch of a later iteration: u_hat of a batch of capsules, logits and couplings of two, see
  // routing_part.
  struct RoutingScratch {
    T *u_hat, *c, *dl, *end;
    RoutingScratch(const Problem<T>& p, T* scratch) {
      const index batch = capsules_at_once(p), pairs = batch * p.J * width;
      u_hat = scratch;                    // [J][vectors][batch][D][lanes]
      c = u_hat + batch * p.N() * width;  // [2][batch][J][width], logits first
      dl = c + 2 * pairs;                 // [2][batch][J][width], dc first; backward only
      end = dl + 2 * pairs;
    }
  };

  // Later iterations, forward (coefficient c) and backward (coefficient dl), a batch of capsules at
  // a time: V_j, ds_j and the sum of one j are read once for all of them.
  //
  // u_hat of a batch, all j, is more than the first-level cache holds, so it waits in the second
  // level for its couplings. j by j the weighted sum of one batch goes before the predictions of
  // the next, which are written where the sum has just read: into lines that are in the first
  // level.
  template <int fixed_K, int fixed_D, bool is_backward>
  static void routing_part(const Problem<T>& p, const Sweep<T>& sweep, const Part& part,
                           const T* packed, T* out, T* memory) {
    const index K = fixed_K ? fixed_K : p.K, D = fixed_D ? fixed_D : p.D, J = p.J, N = J * D;
    const index first_sample = part.first_sample, batch = capsules_at_once(p);
    const T* V_block = sweep.V + first_sample * N;
    const T* ds_block = is_backward ? sweep.ds + first_sample * N : nullptr;
    const RoutingScratch scratch(p, memory);
    const index of_j = vectors * batch * D * lanes, of_batch = batch * J * width;

    index before = 0;  // capsules of the batch before
    for (index i = part.i0, turn = 0; before || i < part.i1; i += batch, turn = 1 - turn) {
      const index left = part.i1 - i, count = left < 0 ? 0 : left < batch ? left : batch;
      T* c = scratch.c + turn * of_batch;
      T* dl = scratch.dl + turn * of_batch;
      typename Block::NextBlock next{part.next_sample, part.next_i0 + i - part.i0, count,
                                     J * count};
      const T* coefficient = (is_backward ? scratch.dl : scratch.c) + (1 - turn) * of_batch;
      for (index j = 0; j < J; ++j) {
        T* u_hat = scratch.u_hat + j * of_j;
        if (before)
          weighted_sum(u_hat, coefficient + j * width, J * width, before, batch, D,
                       out + j * D * width);
        for (index x = 0; x < count; ++x) {
          next.step(p);
          const T* W = p.weight + (p.row(i + x) * N + j * D) * K;
          const index later = i + x + capsules_ahead;
          if (later < p.I) Block::prefetch(p.weight + (p.row(later) * N + j * D) * K, D * K);
          const T* u = packed + (i + x - part.i0) * K * width;
          V logit[vectors]{}, dc[vectors]{};
          for_tiles<tile>(D, [&](auto size, index d) {
            constexpr int n = size;
            Tile<n> acc;
            if (j + 1 < J) prefetch_tile<n>(u_hat + of_j + (x * D + d) * lanes, batch * D * lanes);
            Block::template predict<n>(W + d * K, K, u, acc);
#pragma GCC unroll 16
            for (int m = 0; m < n; ++m)
#pragma GCC unroll 16
              for (int q = 0; q < vectors; ++q) {
                const index o = (j * D + d + m) * width + q * lanes;
                store(u_hat + ((q * batch + x) * D + d + m) * lanes, acc[m][q]);
                logit[q] += acc[m][q] * load(V_block + o);
                if constexpr (is_backward) dc[q] += acc[m][q] * load(ds_block + o);
              }
          });
#pragma GCC unroll 16
          for (int q = 0; q < vectors; ++q) {
            const index o = (x * J + j) * width + q * lanes;
            store(c + o, logit[q]);
            if constexpr (is_backward) store(dl + o, dc[q]);
          }
        }
      }
      for (index x = 0; x < count; ++x) {
        const T* prior = p.logits ? p.logits + (i + x) * J : nullptr;
#pragma GCC unroll 2
        for (int q = 0; q < vectors; ++q) {
          const index o = x * J * width + q * lanes;
          if constexpr (is_backward)
            softmax_and_gradient<false>(c + o, dl + o, J, width, prior, p.leaky);
          else
            softmax(c + o, J, width, prior, p.leaky);
        }
        if (sweep.coupling)
          Block::write_coupling(p, c + x * J * width, first_sample, i + x, sweep.coupling);
      }
      before = count;
    }
  }

  // s += sum over `count` capsules of factor u_hat, one j. u_hat is [vectors][batch][D][lanes], the
  // factors of two capsules lie `stride` apart.
  static CAPSULE_INLINE void weighted_sum(const T* u_hat, const T* factors, index stride,
                                          index count, index batch, index D, T* s) {
    for (int q = 0; q < vectors; ++q)
      for_tiles<Block::sum_tile>(D, [&](auto size, index d) {
        constexpr int n = size;
        V sum[n];
#pragma GCC unroll 16
        for (int m = 0; m < n; ++m) sum[m] = load(s + (d + m) * width + q * lanes);
        const T* x = u_hat + (q * batch * D + d) * lanes;
        const T* factor = factors + q * lanes;
        for (index k = 0; k < count; ++k, x += D * lanes, factor += stride) {
          const V scale = load(factor);
#pragma GCC unroll 16
          for (int m = 0; m < n; ++m) sum[m] += scale * load(x + m * lanes);
        }
#pragma GCC unroll 16
        for (int m = 0; m < n; ++m) store(s + (d + m) * width + q * lanes, sum[m]);
      });
  }

  // Asks for what the weighted sum of the next j reads and its predictions overwrite.
  template <int n>
  static CAPSULE_INLINE void prefetch_tile(const T* u_hat, index stride) {
#pragma GCC unroll 16
    for (int q = 0; q < vectors; ++q)
#pragma GCC unroll 16
      for (int m = 0; m < n; m += 64 / sizeof(V))
        __builtin_prefetch(u_hat + q * stride + m * lanes, 1);
  }

  // Capsules whose u_hat is in scratch together: what is prefetched and written of one j must fit
  // into half of the first-level cache. As many in a narrow block as in a wide one, so that what is
  // scratch enough for one is enough for the other.
  static CAPSULE_INLINE index capsules_at_once(const Problem<T>& p) {
    const index fit = (12 << 10) / (p.D * 2 * lanes * index(sizeof(T)));
    return fit < 1 ? 1 : fit > 16 ? 16 : fit;
  }

  static index sweep_scratch(const Problem<T>& p, index chunk) {
    const index linear = p.K * width + p.J * (lanes + chunk);
    const index routing = RoutingScratch(p, nullptr).end - static_cast<T*>(nullptr);
    return chunk * p.K * width + Block::gathered_size(p, chunk) + larger(linear, routing);
  }

  template <bool is_backward>
  static void sweep_part(const Problem<T>& p, const Sweep<T>& sweep, const Part& part, T* out,
                         T* scratch) {
    const index count = part.i1 - part.i0;
    T* packed = scratch;
    T* gathered = packed + count * p.K * width;
    T* rest = gathered + Block::gathered_size(p, count);
    // What is used first of W is on its way while u is packed.
    const index ahead = sweep.V && capsules_ahead < count ? capsules_ahead : count;
    for (index x = 0; x < ahead; ++x)
      Block::prefetch(p.weight + p.row(part.i0 + x) * p.N() * p.K, product_tile * p.K);
    Block::pack(p, part.first_sample, part.i0, count, packed, gathered);
    const bool paper_sizes = p.K == 8 && p.D == 16;
    if (!sweep.V)
      paper_sizes ? linear_part<8, 16>(p, part, packed, out, rest)
                  : linear_part<0, 0>(p, part, packed, out, rest);
    else
      paper_sizes ? routing_part<8, 16, is_backward>(p, sweep, part, packed, out, rest)
                  : routing_part<0, 0, is_backward>(p, sweep, part, packed, out, rest);
  }
};

}  // namespace capsule::CAPSULE_ISA

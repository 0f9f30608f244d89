// Capsules that share a weight, over blocks of samples. What is small is contracted with W, once
// for all of them:
//
//   u_hat_ij . x_j = u_i . P_j   with   P_j = W_j^T x_j
//   sum_i y_ij u_hat_ij = W_j sum_i y_ij u_i
//
// and so for the gradients, with x each of V^(t-1) and ds^t. Neither u_hat nor its gradient is
// formed, and in place of K D multiply-adds a pair (i, j) takes K.
#pragma once

#include "sample_final.h"

namespace capsule::CAPSULE_ISA {

template <typename T, int vectors>
struct SampleShared : SampleBlock<T, vectors> {
  using Block = SampleBlock<T, vectors>;
  using typename Block::V;
  template <int n>
  using Tile = typename Block::template Tile<n>;
  using Block::lanes, Block::width, Block::tile, Block::together;
  // Capsules whose coefficients are in scratch at a time, and elements k in registers.
  static constexpr index batch = 8;
  static constexpr int k_tile = 8;

  static CAPSULE_INLINE void clear(T* x, index count) {
    for (index o = 0; o < count * lanes; o += lanes) store(x + o, V{});
  }

  // P[j][k] = sum_d W[j][d][k] x[j][d]
  template <int fixed_K>
  static void contract(const Problem<T>& p, const T* W, const T* x, T* P) {
    const index K = fixed_K ? fixed_K : p.K;
    clear(P, p.J * K * vectors);
    for (index j = 0; j < p.J; ++j)
      Block::template add_transposed<fixed_K>(W + j * p.D * K, p.D, K, x + j * p.D * width,
                                              P + j * K * width);
  }

  // s[j][d] += sum_k W[j][d][k] y[j][k]; the y of two j lie `stride` apart.
  template <int fixed_K>
  static void expand(const Problem<T>& p, const T* W, const T* y, index stride, T* s) {
    const index K = fixed_K ? fixed_K : p.K;
    for (index j = 0; j < p.J; ++j)
      for_tiles<tile>(p.D, [&](auto size, index d) {
        constexpr int n = size;
        Tile<n> acc;
        Block::template load_tile<n>(s + (j * p.D + d) * width, acc);
        Block::template add_prediction<n>(W + (j * p.D + d) * K, K, y + j * stride, acc);
        Block::template store_tile<n>(acc, s + (j * p.D + d) * width);
      });
  }

  // out[x] = sum_k u[x][k] P[k] for `count` capsules, whose results lie `stride` apart.
  static CAPSULE_INLINE void dots(const T* u, const T* P, index K, index count, T* out,
                                  index stride) {
    for (int q = 0; q < width; q += lanes)
      for_tiles<k_tile>(K, [&](auto size, index k) {
        constexpr int n = size;
        V factor[n];
#pragma GCC unroll 16
        for (int m = 0; m < n; ++m) factor[m] = load(P + (k + m) * width + q);
        for (index x = 0; x < count; ++x) {
          T* to = out + x * stride + q;
          V sum = k > 0 ? load(to) : V{};
#pragma GCC unroll 16
          for (int m = 0; m < n; ++m) sum += factor[m] * load(u + (x * K + k + m) * width + q);
          store(to, sum);
        }
      });
  }

  // y[k] += sum of coefficients[x] u[x][k] over `count` capsules.
  static CAPSULE_INLINE void add_weighted(const T* u, const T* coefficients, index stride, index K,
                                          index count, T* y) {
    for (int q = 0; q < width; q += lanes)
      for_tiles<k_tile>(K, [&](auto size, index k) {
        constexpr int n = size;
        V sum[n];
#pragma GCC unroll 16
        for (int m = 0; m < n; ++m) sum[m] = load(y + (k + m) * width + q);
        for (index x = 0; x < count; ++x) {
          const V factor = load(coefficients + x * stride + q);
#pragma GCC unroll 16
          for (int m = 0; m < n; ++m) sum[m] += factor * load(u + (x * K + k + m) * width + q);
        }
#pragma GCC unroll 16
        for (int m = 0; m < n; ++m) store(y + (k + m) * width + q, sum[m]);
      });
  }

  struct SweepScratch {
    T *P, *Q, *y, *c, *dl, *end;
    SweepScratch(const Problem<T>& p, T* scratch) {
      const index size = p.J * p.K * width;
      P = scratch;                   // [J][K][width], of V
      Q = P + size;                  // of ds
      y = Q + size;                  // [J][K][width]
      c = y + size;                  // [batch][J][width], logits first
      dl = c + batch * p.J * width;  // [batch][J][width], dc first
      end = dl + batch * p.J * width;
    }
  };

  static index sweep_scratch(const Problem<T>& p, index chunk) {
    return chunk * p.K * width + Block::gathered_size(p, chunk) +
           (SweepScratch(p, nullptr).end - static_cast<T*>(nullptr));
  }

  // Samples from `first_sample` on and input capsules [i0, i1) of a sweep.
  template <bool is_backward>
  static void sweep_part(const Problem<T>& p, const Sweep<T>& sweep, index first_sample, index i0,
                         index i1, T* out, T* memory) {
    T* packed = memory;
    T* gathered = packed + (i1 - i0) * p.K * width;
    const SweepScratch scratch(p, gathered + Block::gathered_size(p, i1 - i0));
    Block::pack(p, first_sample, i0, i1 - i0, packed, gathered);
    for (index i = i0, end; i < i1; i = end) {
      end = (p.row(i) + 1) * p.weight_sharing < i1 ? (p.row(i) + 1) * p.weight_sharing : i1;
      const T* u = packed + (i - i0) * p.K * width;
      p.K == 8 ? sweep_capsules<8, is_backward>(p, sweep, first_sample, i, end, u, scratch, out)
               : sweep_capsules<0, is_backward>(p, sweep, first_sample, i, end, u, scratch, out);
    }
  }

  // Capsules [i0, i1) of one weight.
  template <int fixed_K, bool is_backward>
  static void sweep_capsules(const Problem<T>& p, const Sweep<T>& sweep, index first_sample,
                             index i0, index i1, const T* u, const SweepScratch& scratch, T* out) {
    const index K = fixed_K ? fixed_K : p.K, J = p.J, N = p.N();
    const T* W = p.weight + p.row(i0) * N * K;
    if (!sweep.V && !p.logits) {  // one coupling for all
      clear(scratch.y, K * vectors);
      for (index x = 0; x < width; ++x) scratch.c[x] = T(1) / T(J + p.leaky);
      add_weighted(u, scratch.c, 0, K, i1 - i0, scratch.y);
      expand<fixed_K>(p, W, scratch.y, 0, out);
      return;
    }
    if (sweep.V) contract<fixed_K>(p, W, sweep.V + first_sample * N, scratch.P);
    if constexpr (is_backward) contract<fixed_K>(p, W, sweep.ds + first_sample * N, scratch.Q);
    clear(scratch.y, J * K * vectors);
    for (index i = i0; i < i1; i += batch, u += batch * K * width) {
      const index count = i1 - i < batch ? i1 - i : batch;
      for (index j = 0; j < J; ++j) {
        const index of_j = j * K * width;
        if (sweep.V) dots(u, scratch.P + of_j, K, count, scratch.c + j * width, J * width);
        if constexpr (is_backward)
          dots(u, scratch.Q + of_j, K, count, scratch.dl + j * width, J * width);
      }
      for (index x = 0; x < count; ++x) {
        T* c = scratch.c + x * J * width;
        const T* prior = p.logits ? p.logits + (i + x) * J : nullptr;
        if (!sweep.V) {
          Block::broadcast_prior(p, prior, c, scratch.dl);
          continue;
        }
        for (int q = 0; q < width; q += lanes) {
          if constexpr (is_backward)
            softmax_and_gradient<false>(c + q, scratch.dl + x * J * width + q, J, width, prior,
                                        p.leaky);
          else
            softmax(c + q, J, width, prior, p.leaky);
        }
        if (sweep.coupling) Block::write_coupling(p, c, first_sample, i + x, sweep.coupling);
      }
      for (index j = 0; j < J; ++j)
        add_weighted(u, (is_backward ? scratch.dl : scratch.c) + j * width, J * width, K, count,
                     scratch.y + j * K * width);
    }
    expand<fixed_K>(p, W, scratch.y, K * width, out);
  }

  // Scratch of the last sweep. Sums over samples come first, as in SampleFinal.
  struct Final {
    T *dW, *dlogits, *packed, *P, *y, *c, *dl, *du, *base, *scalars, *gathered, *end;
    Final(const Problem<T>& p, index capsules, T* scratch) {
      const index size = p.J * p.K * width, pairs = batch * p.R * p.J * width;
      dW = scratch;                               // [N][K][lanes]
      dlogits = dW + p.N() * p.K * lanes;         // [capsules][J][lanes]
      packed = dlogits + capsules * p.J * lanes;  // [capsules][K][width]
      P = packed + capsules * p.K * width;        // [R][V^(t-1), ds^t][J][K][width]
      y = P + 2 * p.R * size;                     // likewise
      c = y + 2 * p.R * size;                     // [batch][R][J][width]
      dl = c + pairs;                             // [batch][R][J][width]
      du = dl + pairs;                            // [capsules][K][width]
      base = du + capsules * p.K * width;         // [K][width]
      scalars = base + p.K * width;               // [J] and [J][lanes]
      gathered = scalars + p.J * (lanes + 1);
      end = gathered + Block::gathered_size(p, capsules);
    }
  };

  static index final_scratch(const Problem<T>& p, index capsules) {
    return Final(p, capsules, nullptr).end - static_cast<T*>(nullptr);
  }

  // One block of samples and the capsules [i0, i1) of one weight: adds to dW and dlogits in
  // scratch, writes du.
  template <int fixed_K>
  static void final_block(const Problem<T>& p, const FinalSweep<T>& sweep, index first_sample,
                          index i0, index i1, const Final& scratch) {
    const index K = fixed_K ? fixed_K : p.K, J = p.J, D = p.D, N = p.N(), R = p.R;
    const index size = J * K * width, first_t = sweep.first_coupled(R), of_capsule = R * J * width;
    const index block = first_sample * N;  // where it begins in a state
    const T* W = p.weight + p.row(i0) * N * K;
    const T* uniform = sweep.uniform_term ? sweep.uniform_term + block : nullptr;
    // Of V^(t-1) and, `size` further, of ds^t.
    const auto of = [&](T* x, index t) { return x + 2 * (t - 1) * size; };

    Block::pack(p, first_sample, i0, i1 - i0, scratch.packed, scratch.gathered);
    for (index t = first_t; t <= R; ++t) {
      if (t > 1) contract<fixed_K>(p, W, sweep.V_before(t) + block, of(scratch.P, t));
      contract<fixed_K>(p, W, sweep.ds_of(t) + block, of(scratch.P, t) + size);
    }
    clear(scratch.base, K * vectors);
    clear(scratch.y, 2 * R * J * K * vectors);
    T* uniform_y = scratch.y;  // in the place of V^0
    if (uniform) {
      Block::template add_transposed<fixed_K>(W, N, K, uniform, scratch.base);
      for (index x = 0; x < width; ++x) scratch.c[x] = 1;
      add_weighted(scratch.packed, scratch.c, 0, K, i1 - i0, uniform_y);
    }

    for (index i = i0; i < i1; i += batch) {
      const index count = i1 - i < batch ? i1 - i : batch;
      const T* u = scratch.packed + (i - i0) * K * width;
      for (index t = first_t; t <= R; ++t)
        for (index j = 0; j < J; ++j) {
          const index at = ((t - 1) * J + j) * width;
          const T* P = of(scratch.P, t) + j * K * width;
          if (t > 1) dots(u, P, K, count, scratch.c + at, of_capsule);
          if (sweep.needs_dl(t)) dots(u, P + size, K, count, scratch.dl + at, of_capsule);
        }
      for (index x = 0; x < count; ++x)
        SampleFinal<T, vectors>::couple(
            p, sweep, i + x, scratch.c + x * of_capsule, scratch.dl + x * of_capsule,
            scratch.dlogits + (i - i0 + x) * J * lanes, scratch.scalars);
      if (sweep.grad_weight)
        for (index t = first_t; t <= R; ++t)
          for (index j = 0; j < J; ++j) {
            const index at = ((t - 1) * J + j) * width;
            T* y = of(scratch.y, t) + j * K * width;
            add_weighted(u, scratch.c + at, of_capsule, K, count, y + size);
            if (sweep.full && t > 1) add_weighted(u, scratch.dl + at, of_capsule, K, count, y);
          }
      if (sweep.grad_u)
        for_tiles<together>(count, [&](auto capsules, index x) {
          input_gradients<capsules, fixed_K>(p, sweep, scratch, x,
                                             scratch.du + (i - i0 + x) * K * width);
        });
    }

    if (sweep.grad_weight)
      for (index n = 0; n < N; ++n)
        for_tiles<k_tile>(K, [&](auto tile_size, index k) {
          constexpr int m_count = tile_size;
          T* dW = scratch.dW + (n * K + k) * lanes;
          V sum[m_count];
#pragma GCC unroll 16
          for (int m = 0; m < m_count; ++m) sum[m] = load(dW + m * lanes);
          const auto add = [&](const T* x, const T* y) {
            for (int q = 0; q < width; q += lanes) {
              const V factor = load(x + n * width + q);
#pragma GCC unroll 16
              for (int m = 0; m < m_count; ++m) sum[m] += factor * load(y + (k + m) * width + q);
            }
          };
          if (uniform) add(uniform, uniform_y);
          for (index t = first_t; t <= R; ++t) {
            const T* y = of(scratch.y, t) + n / D * K * width;
            add(sweep.ds_of(t) + block, y + size);
            if (sweep.full && t > 1) add(sweep.V_before(t) + block, y);
          }
#pragma GCC unroll 16
          for (int m = 0; m < m_count; ++m) store(dW + m * lanes, sum[m]);
        });
    if (sweep.grad_u)
      Block::unpack_gradient(p, first_sample, i0, i1 - i0, scratch.du, sweep.grad_u,
                             scratch.gathered);
  }

  // du[k] = base[k] + sum over t and j of c^t_j W_j^T ds^t_j + dl^t_j W_j^T V^(t-1)_j, of some
  // capsules of the batch from x on, which read the products together.
  template <int capsules, int fixed_K>
  static CAPSULE_INLINE void input_gradients(const Problem<T>& p, const FinalSweep<T>& sweep,
                                             const Final& scratch, index x, T* du) {
    const index K = fixed_K ? fixed_K : p.K, J = p.J, R = p.R, size = J * K * width;
    for (int q = 0; q < width; q += lanes)
      for_tiles<4>(K, [&](auto tile_size, index k) {
        constexpr int n = tile_size;
        V sum[n][capsules];
#pragma GCC unroll 16
        for (int m = 0; m < n; ++m)
#pragma GCC unroll 16
          for (int c = 0; c < capsules; ++c) sum[m][c] = load(scratch.base + (k + m) * width + q);
        const auto add = [&](const T* coefficients, const T* P) {
          for (index j = 0; j < J; ++j) {
            V factor[capsules];
#pragma GCC unroll 16
            for (int c = 0; c < capsules; ++c)
              factor[c] = load(coefficients + (c * R * J + j) * width + q);
#pragma GCC unroll 16
            for (int m = 0; m < n; ++m) {
              const V product = load(P + (j * K + k + m) * width + q);
#pragma GCC unroll 16
              for (int c = 0; c < capsules; ++c) sum[m][c] += factor[c] * product;
            }
          }
        };
        for (index t = sweep.first_coupled(R); t <= R; ++t) {
          const index at = (x * R + t - 1) * J * width;
          const T* P = scratch.P + 2 * (t - 1) * size;
          add(scratch.c + at, P + size);
          if (sweep.full && t > 1) add(scratch.dl + at, P);
        }
#pragma GCC unroll 16
        for (int m = 0; m < n; ++m)
#pragma GCC unroll 16
          for (int c = 0; c < capsules; ++c) store(du + (c * K + k + m) * width + q, sum[m][c]);
      });
  }

  // dW, lanes added up.
  static void write_weights(const T* dW, index count, T* out) {
    index o = 0;
    for (; o + lanes <= count; o += lanes) {
      V rows[lanes];
      for (int r = 0; r < lanes; ++r) rows[r] = load(dW + (o + r) * lanes);
      transpose<T>(rows);
      V sum = rows[0];
      for (int r = 1; r < lanes; ++r) sum += rows[r];
      store(out + o, sum);
    }
    for (; o < count; ++o) out[o] = sum_lanes<T>(load(dW + o * lanes));
  }
};

}  // namespace capsule::CAPSULE_ISA

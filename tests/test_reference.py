"""The oracle against the paper's formulas, written out with loops."""

import math

import torch

from capsule_kernels import reference_routing, squash


def test_routing_is_procedure_1_written_with_loops():
    generator = torch.Generator().manual_seed(0)
    B, I, J, K, D, R = 2, 3, 4, 2, 3, 3
    u = torch.randn(B, I, K, generator=generator, dtype=torch.float64)
    W = torch.randn(I, J, D, K, generator=generator, dtype=torch.float64)
    v = reference_routing(u, W, R)
    for n in range(B):
        b = [[0.0] * J for _ in range(I)]
        u_hat = [[W[i, j] @ u[n, i] for j in range(J)] for i in range(I)]
        for _ in range(R):
            c = [[math.exp(b[i][j]) / sum(map(math.exp, b[i])) for j in range(J)] for i in range(I)]
            s = [sum(c[i][j] * u_hat[i][j] for i in range(I)) for j in range(J)]
            lengths = [float(x.norm()) for x in s]
            expected = [m**2 / (1 + m**2) * x / m for x, m in zip(s, lengths, strict=True)]
            for i in range(I):
                for j in range(J):
                    b[i][j] += float(u_hat[i][j] @ expected[j])
        torch.testing.assert_close(v[n], torch.stack(expected), rtol=1e-13, atol=1e-14)


def test_squash_at_zero_is_zero_with_zero_gradient():
    s = torch.zeros(2, 3, 4, dtype=torch.float64, requires_grad=True)
    v = squash(s)
    (gradient,) = torch.autograd.grad(v.sum(), s)
    assert torch.equal(v, torch.zeros_like(v))
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_squash_of_huge_and_tiny_vectors_is_finite():
    s = torch.tensor([[3e30, 4e30], [3e-30, 4e-30]])
    torch.testing.assert_close(squash(s)[0], torch.tensor([0.6, 0.8]))
    assert squash(s)[1].isfinite().all()


def test_squash_gradient():
    s = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s.requires_grad_()
    assert torch.autograd.gradcheck(squash, s)
    assert torch.autograd.gradgradcheck(squash, s)

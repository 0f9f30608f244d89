"""The one tolerance rule of all tests.

A result may be at most twice as far from the float64 oracle as the oracle run in the result's own
dtype, plus one rounding of the largest value:

    max|x - x64| <= 2 * (max|x_ref - x64| + eps * max|x64|)

The factor 2: another order of summation has an independent error of the same size. Gradients are
also compared as vectors (relative L2 and cosine), which a few lucky or unlucky elements can't hide.
"""

import torch
from torch import Tensor


def assert_as_good_as_reference(name: str, x: Tensor, x_ref: Tensor, x64: Tensor) -> None:
    """``x`` [any shape] against the oracle in the same dtype (``x_ref``) and in float64 (``x64``)."""
    assert x.shape == x64.shape, f"{name}: shape {tuple(x.shape)}, expected {tuple(x64.shape)}"
    assert x.dtype == x_ref.dtype, f"{name}: dtype {x.dtype}, expected {x_ref.dtype}"
    x, x_ref, x64, eps = x.double().cpu(), x_ref.double().cpu(), x64.cpu(), torch.finfo(x.dtype).eps
    assert x64.isfinite().all(), f"{name}: the float64 oracle itself is not finite"
    assert x.isfinite().all(), f"{name}: {int((~x.isfinite()).sum())} of {x.numel()} not finite"
    if x.numel() == 0:
        return
    error = (x - x64).abs()
    bound = 2 * ((x_ref - x64).abs().max() + eps * x64.abs().max())
    worst = int(error.argmax())
    assert error.max() <= bound, (
        f"{name}: error {error.max():.3e} > {bound:.3e} at flat index {worst} of {tuple(x.shape)}: "
        f"got {x.flatten()[worst]:.9e}, float64 oracle {x64.flatten()[worst]:.9e}"
    )
    norm = x64.norm()
    bound_l2 = 2 * ((x_ref - x64).norm() + eps * norm)
    assert (x - x64).norm() <= bound_l2, (
        f"{name}: L2 error {(x - x64).norm():.3e} > {bound_l2:.3e}, norm {norm:.3e}"
    )
    if norm > 0:
        cosine = (x * x64).sum() / (x.norm() * norm).clamp_min(torch.finfo(torch.float64).tiny)
        lost = 2 * (bound_l2 / norm) ** 2 + torch.finfo(torch.float64).eps * x.numel()
        assert 1 - cosine <= lost, f"{name}: 1 - cosine {1 - cosine:.3e} > {lost:.3e}"

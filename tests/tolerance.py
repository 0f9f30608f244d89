"""The one tolerance rule of all tests.

A result may be at most twice as far from the float64 oracle as the oracle run in the result's own
dtype, plus one rounding of the largest value:

    max|x - x64| <= 2 * (max|x_ref - x64| + eps * max|x64|)

The factor 2: another order of summation has an independent error of the same size. One run of the
oracle may be lucky, so its error is the largest of some runs that differ in nothing but rounding
(the order of capsules and of dimensions, a factor moved between u and W: ``cases.reordered``).
For float64 results there is no wider oracle: the error of the oracle in float64 is estimated as
that of the oracle in float32, scaled by the ratio of the two roundings. Results are also compared
as vectors (L2), which a few lucky or unlucky elements can't hide. The angle between them needs no
bound of its own: with a relative error of r, 1 - cos is at most 2 r^2.
"""

import torch
from torch import Tensor


def reference_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype the oracle runs in to tell how large an error is to be expected of ``dtype``."""
    return torch.float32 if dtype == torch.float64 else dtype


def assert_as_good_as_reference(
    name: str, x: Tensor, x_ref: Tensor | list[Tensor], x64: Tensor
) -> None:
    """``x`` [any shape] against the oracle in float64 and, one or several runs ``x_ref``, in
    :func:`reference_dtype`."""
    references = x_ref if isinstance(x_ref, list) else [x_ref]
    assert x.shape == x64.shape, f"{name}: shape {tuple(x.shape)}, expected {tuple(x64.shape)}"
    for reference in references:
        expected = reference_dtype(x.dtype)
        assert reference.dtype == expected, f"{name}: {x.dtype}, oracle in {reference.dtype}"
    eps = torch.finfo(x.dtype).eps
    shrink = eps / torch.finfo(reference_dtype(x.dtype)).eps
    x, x64 = x.double().cpu(), x64.cpu()
    reference_errors = [shrink * (reference.double().cpu() - x64) for reference in references]
    assert x64.isfinite().all(), f"{name}: the float64 oracle itself is not finite"
    assert x.isfinite().all(), f"{name}: {int((~x.isfinite()).sum())} of {x.numel()} not finite"
    if x.numel() == 0:
        return
    error = (x - x64).abs()
    bound = 2 * (max(float(e.abs().max()) for e in reference_errors) + eps * x64.abs().max())
    worst = int(error.argmax())
    assert error.max() <= bound, (
        f"{name}: error {error.max():.3e} > {bound:.3e} at flat index {worst} of {tuple(x.shape)}: "
        f"got {x.flatten()[worst]:.9e}, float64 oracle {x64.flatten()[worst]:.9e}"
    )
    norm = x64.norm()
    bound_l2 = 2 * (max(float(e.norm()) for e in reference_errors) + eps * norm)
    assert (x - x64).norm() <= bound_l2, (
        f"{name}: L2 error {(x - x64).norm():.3e} > {bound_l2:.3e}, norm {norm:.3e}"
    )

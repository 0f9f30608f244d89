"""The windows of a grid of capsules, copied for what does not find its way in the grid itself.

A ``window`` as in :data:`capsule_kernels.ops.FORWARD_SCHEMA`; without one u stays as it is.
"""

from collections.abc import Sequence

from torch import Tensor


def capsules(u: Tensor, window: Sequence[int] | None) -> Tensor:
    """Input capsules [B, I, K]: u itself, or a copy of its windows."""
    return view(u, window).flatten(0, 2).flatten(1, 3) if window else u


def sizes(u: Tensor, window: Sequence[int] | None) -> tuple[int, int]:
    """Samples and input capsules of a sample: B and I."""
    if not window:
        return u.shape[0], u.shape[1]
    B, H, W, C, _ = u.shape
    kh, kw, down, right = window
    return B * ((H - kh) // down + 1) * ((W - kw) // right + 1), C * kh * kw


def view(u: Tensor, window: Sequence[int]) -> Tensor:
    """All windows [B, H', W', C, kh, kw, K], in the memory of the grid."""
    kh, kw, down, right = window
    return u.unfold(1, kh, down).unfold(2, kw, right).permute(0, 1, 2, 3, 5, 6, 4)

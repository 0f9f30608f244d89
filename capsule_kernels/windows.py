"""The windows of a grid of capsules, copied for what does not find its way in the grid itself.

A ``window`` as in :data:`capsule_kernels.ops.FORWARD_SCHEMA`; without one u stays as it is.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def places(u: Tensor, window: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of the places that a window takes, H' and W'.

    As one quotient each: with 1 behind it, torch.export can't tell that sizes divide each other.
    """
    _, H, W, _, _ = u.shape
    kh, kw, down, right = window
    return (H - kh + down) // down, (W - kw + right) // right


def cells(u: Tensor, window: Sequence[int]) -> list[Tensor]:
    """The views [B, H', W', C, K] of the first, second, ... cell of every place's window.

    By slices: where Inductor (torch 2.13) compiles the backward of ``Tensor.unfold``, it writes
    past its memory.
    """
    kh, kw, down, right = window
    rows, columns = places(u, window)
    return [
        u[:, y : y + down * (rows - 1) + 1 : down, x : x + right * (columns - 1) + 1 : right]
        for y in range(kh)
        for x in range(kw)
    ]


def capsules(u: Tensor, window: Sequence[int] | None) -> Tensor:
    """Input capsules [B, I, K]: u itself, or a copy of its windows."""
    if not window:
        return u
    return torch.stack(cells(u, window), 4).flatten(0, 2).flatten(1, 2)


def sizes(u: Tensor, window: Sequence[int] | None) -> tuple[int, int]:
    """Samples and input capsules of a sample: B and I."""
    if not window:
        return u.shape[0], u.shape[1]
    rows, columns = places(u, window)
    kh, kw, *_ = window
    return u.shape[0] * rows * columns, u.shape[3] * kh * kw

"""Windows onto images: the one way in which images are shifted, cropped, placed and overlaid."""

import torch
from torch import Tensor


def window(images: Tensor, index: Tensor, top: Tensor, left: Tensor, size: int) -> Tensor:
    """Square windows onto some of the images; what lies outside an image is 0.

    Args:
        images: [N, C, H, W].
        index: which of them, [B].
        top, left: where the window begins in its image, in pixels, may be negative, [B].
        size: side of the windows.

    Returns:
        [B, C, size, size]: ``out[b, c, y, x] = images[index[b], c, top[b] + y, left[b] + x]``.
    """
    _, C, H, W = images.shape
    steps = torch.arange(size, device=images.device)
    y, x = top[:, None] + steps, left[:, None] + steps  # [B, size]
    inside = ((y >= 0) & (y < H))[:, None, :, None] & ((x >= 0) & (x < W))[:, None, None, :]
    cut = images[
        index[:, None, None, None],
        torch.arange(C, device=images.device)[None, :, None, None],
        y.clamp(0, H - 1)[:, None, :, None],
        x.clamp(0, W - 1)[:, None, None, :],
    ]
    return cut * inside

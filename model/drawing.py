"""Pictures of tensors as PNG files."""

import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .capsnet import CapsNet
from .losses import lengths
from .outputs import write_atomically
from .views import Batch, overlaid

GAP = 2
"""Pixels between the images of a grid."""


def grid(rows: list[Tensor]) -> np.ndarray:
    """Rows of images [N, C, H, W] in 0..1, none longer than the first, with gaps between: uint8
    [rows * H, N * W, 3].

    One channel is grey; of two or more than three, the first is shown.
    """
    N, C, H, W = rows[0].shape
    canvas = torch.full((3, len(rows) * (H + GAP) - GAP, N * (W + GAP) - GAP), 0.35)
    for row, images in enumerate(rows):
        for column, image in enumerate(images.detach().float().cpu().clamp(0, 1)):
            y, x = row * (H + GAP), column * (W + GAP)
            canvas[:, y : y + H, x : x + W] = image if C == 3 else image[:1]
    return (canvas * 255).round().byte().permute(1, 2, 0).numpy()


@torch.no_grad()
def reconstruction_rows(model: CapsNet, batch: Batch, columns: int = 10) -> np.ndarray:
    """Rows of inputs, each above its reconstructions from the capsules found longest."""
    model.eval()
    capsules = model.capsules(batch.images)
    found = lengths(capsules).topk(batch.labels.shape[1]).indices
    drawn = overlaid(model.reconstruct(capsules, found))
    originals = overlaid(batch.originals)
    pairs = zip(originals.split(columns), drawn.split(columns), strict=True)
    return grid([images for pair in pairs for images in pair])


def save_png(path: Path, pixels: np.ndarray, zoom: int = 3) -> None:
    """Write uint8 pixels [H, W, 3], each ``zoom`` pixels large."""
    from PIL import Image

    buffer = io.BytesIO()
    large = pixels.repeat(zoom, axis=0).repeat(zoom, axis=1)
    Image.fromarray(large).save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())

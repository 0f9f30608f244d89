"""Training on MNIST, tested on affNIST: MNIST digits under affine transformations, 40 x 40.

affNIST's file ``test.mat`` (T. Tieleman) is a MATLAB structure ``affNISTdata`` with ``image`` uint8
[1600, N], a column an image, row by row, and ``label_int`` [1, N]. Where it is missing, affine
digits made by its recipe take its place, under a name of their own.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import UserError
from ..windows import window
from . import idx
from .files import Source, find, read_mat
from .splits import Dataset, Split

SIZE = 40
OFFICIAL, OWN = "affNIST test", "affine digits (own, by affNIST's recipe)"

ROTATION = 20.0
"""Degrees, to either side."""
SHEAR = 0.2
SCALE = (0.8, 1.2)
"""Of height and width, independently."""
SEED = 0


def read(path: Path) -> Split:
    """The images [N, 1, 40, 40] and labels of the publisher's file."""
    variables = read_mat(path)
    try:
        data = variables["affNISTdata"][0, 0]
        image, label = data["image"], data["label_int"]
    except (KeyError, ValueError, IndexError):
        raise UserError(
            f"{path}: must have a structure affNISTdata with image and label_int"
        ) from None
    if image.dtype != "uint8" or image.ndim != 2 or image.shape[0] != SIZE**2:
        raise UserError(
            f"{path}: image must be uint8 [{SIZE**2}, N], got {image.dtype} {list(image.shape)}"
        )
    images = torch.from_numpy(image.T.copy()).reshape(-1, 1, SIZE, SIZE)
    return Split(images, torch.from_numpy(label.astype("int64")).flatten()).check(str(path), 10)


def affine_digits(digits: Split, seed: int = SEED) -> Split:
    """Each digit once, [N, 1, 40, 40], transformed as affNIST's were.

    Rotation, shear, vertical and horizontal scale are uniform in the ranges above; then the digit
    is placed uniformly among the whole-pixel translations that cut none of it off.
    """
    N = len(digits)
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(N, generator=generator)

    angle = uniform(-ROTATION, ROTATION).deg2rad()
    shear, scale_y, scale_x = uniform(-SHEAR, SHEAR), uniform(*SCALE), uniform(*SCALE)
    zero, one = torch.zeros(N), torch.ones(N)
    rotate = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).view(N, 2, 2)
    slant = torch.stack([one, shear, zero, one], -1).view(N, 2, 2)
    stretch = torch.stack([scale_x, zero, zero, scale_y], -1).view(N, 2, 2)
    # Where a pixel of the result comes from; coordinates are -1..1 over the canvas.
    back = torch.linalg.inv(rotate @ slant @ stretch)
    canvas = digits.images.shape[-1] * 2  # room enough for any of them
    place = torch.full((N,), -canvas // 4)
    roomy = window(digits.images, torch.arange(N), place, place, canvas).float()
    sampling = F.affine_grid(
        torch.cat([back, zero.view(N, 1, 1).expand(N, 2, 1)], -1),
        [N, 1, canvas, canvas],
        align_corners=False,
    )
    moved = F.grid_sample(roomy, sampling, align_corners=False).round().byte()
    top = start_within(moved.amax((1, 3)), uniform(0, 1))
    left = start_within(moved.amax((1, 2)), uniform(0, 1))
    return Split(window(moved, torch.arange(N), top, left, SIZE), digits.labels)


def start_within(profile: Tensor, share: Tensor) -> Tensor:
    """Where a window of 40 begins so that all that is not 0 in ``profile`` [N, S] lies in it.

    ``share`` [N] in 0..1 chooses among the places. A digit wider than the window is centred.
    """
    ink = profile > 0
    first = ink.int().argmax(-1)
    last = profile.shape[-1] - 1 - ink.flip(-1).int().argmax(-1)
    low, high = last - SIZE + 1, first
    chosen = low + (share * (high - low + 1)).floor().long().minimum(high - low)
    return torch.where(low <= high, chosen, (first + last + 1 - SIZE) // 2)


def load(source: Source) -> Dataset:
    """MNIST to train on and, placed at random on 40 x 40, to stop by; affNIST as a further test."""
    mnist = idx.load("mnist", source)
    path = find(source, "affnist", "test.mat")
    name, further = (OWN, affine_digits(mnist.test)) if path is None else (OFFICIAL, read(path))
    return Dataset(
        mnist.train, mnist.test, mnist.classes, test_name="shifted MNIST test",
        further_tests={name: further},
    )  # fmt: skip

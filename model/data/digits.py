"""The 1,797 handwritten digits that ship inside scikit-learn: real data without a download.

They are 8 x 8 images with 17 grey levels, the test part of UCI's "Optical Recognition of
Handwritten Digits" (E. Alpaydin, C. Kaynak), drawn by 13 writers.
"""

import torch
from torch.nn import functional as F

from ..errors import UserError
from .files import Source
from .splits import Dataset, Split

HELD_OUT = 0.2
IMAGE_SIZE = 28


def load(_source: Source | None = None) -> Dataset:
    """1,437 digits to train on and 360 held out, resized to [1, 28, 28].

    The same digits are held out whatever a run's seed: a fifth of each class, drawn once.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise UserError("--dataset digits needs scikit-learn: pip install scikit-learn") from None
    digits = load_digits()
    small = torch.from_numpy(digits.images).float().unsqueeze(1) / 16  # [N, 1, 8, 8] in 0..1
    large = F.interpolate(small, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")
    images = (large * 255).round().to(torch.uint8)
    labels = torch.from_numpy(digits.target).long()
    train, test = train_test_split(
        range(len(labels)), test_size=HELD_OUT, stratify=digits.target, random_state=0
    )
    return Dataset(
        Split(images[train], labels[train]),
        Split(images[test], labels[test]),
        tuple("0123456789"),
        test_name="held-out digits",
    )

"""The form every data set takes in memory."""

import zlib
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from ..errors import UserError


@dataclass(frozen=True)
class Split:
    """``images`` uint8 [N, C, H, W] and ``labels`` int64 [N], on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.labels.shape[0]

    @cached_property
    def class_blocks(self) -> tuple[Tensor, Tensor, Tensor]:
        """Images in order of class [N], where each class begins and how many it has [classes]."""
        count = self.labels.bincount()
        return self.labels.argsort(stable=True), count.cumsum(0) - count, count

    @cached_property
    def fingerprint(self) -> tuple[int, int]:
        """How many images, and a checksum of the labels in their order.

        Not of pixels: what another version of a library resizes or decodes may differ by one grey
        level, and still is the same data.
        """
        return len(self), zlib.crc32(self.labels.cpu().numpy().tobytes())

    def to(self, device: torch.device | str) -> Self:
        return type(self)(self.images.to(device), self.labels.to(device))

    def check(self, name: str, classes: int) -> Self:
        """Raise UserError, beginning with ``name``, unless images and labels fit together, and the
        images are square."""
        if len(self.images) != len(self.labels):
            raise UserError(
                f"{name}: must have as many images as labels, got {len(self.images)} and "
                f"{len(self.labels)}"
            )
        if len(self) == 0:
            raise UserError(f"{name}: no images in it")
        height, width = self.images.shape[-2:]
        if not height == width >= 1:
            raise UserError(
                f"{name}: images must be square, of 1 pixel or more, got {height} x {width}"
            )
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= classes:
            raise UserError(f"{name}: labels must be 0 to {classes - 1}, got {low} to {high}")
        return self


def class_name(folder: str) -> str:
    """A folder's name as text: bytes of it that are no UTF-8, which nothing draws or prints, as
    \\xff."""
    return folder.encode(errors="surrogateescape").decode(errors="backslashreplace")


@dataclass(frozen=True)
class Dataset:
    """What a run trains and is tested on."""

    train: Split
    test: Split
    classes: tuple[str, ...]
    test_name: str = "test"
    """What ``test`` is, where it is not the publisher's test set."""
    further_tests: dict[str, Split] = field(default_factory=dict)
    """Other test sets by name, evaluated at the end of a run."""

    def fingerprint(self) -> dict[str, list[int]]:
        """What a run that is resumed must find again; JSON gives it back as it is."""
        return {"train": list(self.train.fingerprint), "test": list(self.test.fingerprint)}

    def to(self, device: torch.device | str) -> Self:
        further = {name: split.to(device) for name, split in self.further_tests.items()}
        train, test = self.train.to(device), self.test.to(device)
        return replace(self, train=train, test=test, further_tests=further)

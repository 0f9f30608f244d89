"""smallNORB in its publisher's binary matrix format (in spite of their names no MATLAB files).

A file: a little-endian 32-bit magic number for the type, the number of dimensions, each dimension
(at least three numbers, unused ones are 1), then the values, last dimension fastest.
"""

import math
import struct
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from ..errors import UserError
from .files import Remote, Source, obtain, read_bytes
from .splits import Dataset, Split

CLASSES = ("animal", "human", "airplane", "truck", "car")
TYPES: dict[int, str] = {0x1E3D4C55: "u1", 0x1E3D4C54: "<i4"}
SIZE = 48
"""The paper trains on images of this size."""

FILES = {
    "train": (
        "smallnorb-5x46789x9x18x6x2x96x96-training-dat.mat.gz",
        "smallnorb-5x46789x9x18x6x2x96x96-training-cat.mat.gz",
    ),
    "test": (
        "smallnorb-5x01235x9x18x6x2x96x96-testing-dat.mat.gz",
        "smallnorb-5x01235x9x18x6x2x96x96-testing-cat.mat.gz",
    ),
}
URL = "https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/"
MD5 = {
    "smallnorb-5x46789x9x18x6x2x96x96-training-dat.mat.gz": "66054832f9accfe74a0f4c36a75bc0a2",
    "smallnorb-5x46789x9x18x6x2x96x96-training-cat.mat.gz": "23c8b86101fbf0904a000b43d3ed2fd9",
    "smallnorb-5x01235x9x18x6x2x96x96-testing-dat.mat.gz": "e4ad715691ed5a3a5f138751a4ceb071",
    "smallnorb-5x01235x9x18x6x2x96x96-testing-cat.mat.gz": "5aa791cd7e6016cf957ce9bdb93b8603",
}


def read_matrix(path: Path) -> np.ndarray:
    """The array in one file; UserError unless it is exactly one."""
    content = read_bytes(path)
    magic = int.from_bytes(content[:4], "little")
    if len(content) < 20 or magic not in TYPES:
        raise UserError(
            f"{path}: not a NORB matrix of bytes or integers: it must begin with "
            f"{' or '.join(f'{m:#x}' for m in TYPES)}, got {magic:#x}"
        )
    dimensions = int.from_bytes(content[4:8], "little")
    header = 8 + 4 * max(dimensions, 3)
    if dimensions > 4 or len(content) < header:
        raise UserError(
            f"{path}: truncated or damaged: must announce at most 4 dimensions, "
            f"got {dimensions} in a file of {len(content)} bytes"
        )
    shape = struct.unpack_from(f"<{dimensions}I", content, 8)
    dtype = np.dtype(TYPES[magic])
    expected = math.prod(shape) * dtype.itemsize
    if len(content) - header != expected:
        raise UserError(
            f"{path}: truncated or damaged: {list(shape)} announces {expected} bytes, "
            f"got {len(content) - header}"
        )
    return np.frombuffer(content, dtype, offset=header).reshape(shape)


def shrink(images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, C, 96, 96] to [N, C, 48, 48], each pixel the mean of four."""
    chunks = (F.avg_pool2d(part.float(), images.shape[-1] // SIZE) for part in images.split(1000))
    return torch.cat([part.round().byte() for part in chunks])


def read(images_path: Path, labels_path: Path) -> Split:
    """Stereo pairs [N, 2, 48, 48] and their classes."""
    images, labels = read_matrix(images_path), read_matrix(labels_path)
    if images.dtype != np.uint8 or images.shape[1:] != (2, 96, 96):
        raise UserError(
            f"{images_path}: must be bytes [N, 2, 96, 96], got {images.dtype} {list(images.shape)}"
        )
    pixels = shrink(torch.from_numpy(images.copy()))
    classes = torch.from_numpy(labels.astype(np.int64)).flatten()
    return Split(pixels, classes).check(str(images_path), len(CLASSES))


def load(source: Source) -> Dataset:
    """24,300 stereo pairs to train on and as many, of other toys, to test."""
    splits = {}
    for part, files in FILES.items():
        images, labels = (
            obtain(source, "smallnorb", file, Remote(URL + file, "md5:" + MD5[file]))
            for file in files
        )
        splits[part] = read(images, labels)
    return Dataset(splits["train"], splits["test"], CLASSES)

"""MNIST and Fashion-MNIST in their publishers' IDX format.

An IDX file: two zero bytes, one for the type (8: unsigned bytes), one for the number of
dimensions, each dimension as a big-endian 32-bit integer, then the bytes, last dimension fastest.
"""

import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .files import Remote, Source, obtain, read_bytes
from .splits import Dataset, Split

DIGITS = tuple("0123456789")
CLOTHES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}

URLS = {
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "fashion-mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
}
MD5 = {
    "mnist": {
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    },
    "fashion-mnist": {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    },
}

CRC32 = {
    "mnist": {0xF3639B56, 0xBA07E8EF, 0xE4CA5F57, 0xEE8604D9},
    "fashion-mnist": {0xAE65DCCD, 0x2ED6E46A, 0x12728439, 0x242BC73F},
}
"""Of what the publishers' files hold behind their headers, however they are packed. Nothing else
tells the two data sets apart, whose files have the same names."""


def read_idx(path: Path, dimensions: int) -> Tensor:
    """The uint8 array [d1, ..., dn] in an IDX file; UserError unless it is exactly one."""
    content = read_bytes(path)
    header = 4 + 4 * dimensions
    expected = bytes([0, 0, 8, dimensions])
    if len(content) < header or content[:4] != expected:
        raise UserError(
            f"{path}: not an IDX file of {dimensions}-dimensional bytes: it must begin with "
            f"{expected.hex(' ')}, got {content[:4].hex(' ') or 'nothing'}"
        )
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    if len(content) - header != math.prod(shape):
        raise UserError(
            f"{path}: truncated or damaged: it announces {' x '.join(map(str, shape))} = "
            f"{math.prod(shape)} bytes, got {len(content) - header}"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy())


def read_own(dataset: str, path: Path, dimensions: int) -> Tensor:
    """The same; UserError if the file is the other data set's."""
    values = read_idx(path, dimensions)
    checksum = zlib.crc32(values.numpy().data)
    for other, checksums in CRC32.items():
        if other != dataset and checksum in checksums:
            raise UserError(
                f"{path}: must be a file of {dataset}, got that of {other}, which has the same "
                "name; --data-dir names the folder of the data"
            )
    return values


def load(dataset: str, source: Source) -> Dataset:
    """MNIST or Fashion-MNIST: 60,000 and 10,000 images [1, 28, 28]."""
    splits: dict[str, Split] = {}
    for name, files in FILES.items():
        images, labels = (
            obtain(source, dataset, file, Remote(URLS[dataset] + file, "md5:" + MD5[dataset][file]))
            for file in files
        )
        pixels, classes = read_own(dataset, images, 3), read_own(dataset, labels, 1)
        split = Split(pixels.unsqueeze(1), classes.long())
        splits[name] = split.check(str(images), 10)
        size, expected = (s.images.shape[-1] for s in (split, splits["train"]))
        if size != expected:
            raise UserError(
                f"{images}: must have images of {expected} x {expected} pixels, as those to train "
                f"on, got {size} x {size}"
            )
    return Dataset(splits["train"], splits["test"], CLOTHES if "fashion" in dataset else DIGITS)

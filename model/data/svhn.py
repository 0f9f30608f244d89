"""Street View House Numbers, cropped digits, in the publisher's MATLAB files.

``X`` uint8 [32, 32, 3, N] (row, column, colour, image) and ``y`` [N, 1], 1 to 10, where 10 is the
digit 0.
"""

from pathlib import Path

import torch

from ..errors import UserError
from .files import Remote, Source, obtain, read_mat
from .splits import Dataset, Split

FILES = {"train": "train_32x32.mat", "test": "test_32x32.mat"}
URL = "http://ufldl.stanford.edu/housenumbers/"
MD5 = {
    "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
    "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
}


def read(path: Path) -> Split:
    """The images [N, 3, 32, 32] and labels 0 to 9 of one file."""
    variables = read_mat(path)
    if "X" not in variables or "y" not in variables:
        names = ", ".join(name for name in variables if not name.startswith("__"))
        raise UserError(f"{path}: must have variables X and y, got {names or 'none'}")
    X, y = variables["X"], variables["y"]
    if X.dtype != "uint8" or X.ndim != 4 or X.shape[:3] != (32, 32, 3):
        raise UserError(f"{path}: X must be uint8 [32, 32, 3, N], got {X.dtype} {list(X.shape)}")
    images = torch.from_numpy(X).permute(3, 2, 0, 1).contiguous()
    labels = torch.from_numpy(y.astype("int64")).flatten()
    return Split(images, labels.where(labels != 10, 0)).check(str(path), 10)


def load(source: Source) -> Dataset:
    """73,257 images to train on (the paper leaves out the "extra" ones) and 26,032 to test."""
    splits = {
        name: read(obtain(source, "svhn", file, Remote(URL + file, "md5:" + MD5[file])))
        for name, file in FILES.items()
    }
    return Dataset(splits["train"], splits["test"], tuple("0123456789"))

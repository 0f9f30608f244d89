"""Data sets by name: read from their publishers' own files, kept as uint8.

One module a file format; :func:`load_dataset` is the only door.
"""

from collections.abc import Callable
from functools import partial

from ..errors import UserError
from . import affnist, cifar10, digits, folder, idx, smallnorb, svhn
from .files import Source
from .splits import Dataset, Split, class_name

__all__ = [
    "DATASETS", "NATIVE_SIZES", "Dataset", "Source", "Split", "class_name", "load_dataset",
]  # fmt: skip

DATASETS: dict[str, Callable[[Source], Dataset]] = {
    "digits": digits.load,
    "mnist": partial(idx.load, "mnist"),
    "fashion-mnist": partial(idx.load, "fashion-mnist"),
    "affnist": affnist.load,
    "cifar10": cifar10.load,
    "smallnorb": smallnorb.load,
    "svhn": svhn.load,
    "folder": folder.load,
}

NATIVE_SIZES = {
    "digits": digits.IMAGE_SIZE,
    "mnist": 28,
    "fashion-mnist": 28,
    "affnist": 28,  # what is trained on: MNIST
    "cifar10": 32,
    "smallnorb": smallnorb.SIZE,
    "svhn": 32,
}
"""Side of the images of a data set, before a network's window is cut or its canvas placed under
them. Pictures of the data set "folder" come in the size the network sees."""


def load_dataset(name: str, source: Source) -> Dataset:
    """A data set by name, on the CPU, its files in ``data_dir/name`` or ``data_dir``.

    With ``source.download``, files that are missing are fetched there, checksums compared. Raises
    UserError, naming the file, where one is missing, damaged or of another format.
    """
    if name not in DATASETS:
        raise UserError(f"dataset must be one of {', '.join(DATASETS)}, got {name!r}")
    return DATASETS[name](source)

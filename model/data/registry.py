"""Every data set's name and how it is loaded."""

from collections.abc import Callable
from functools import partial

from ..errors import UserError
from . import affnist, cifar10, digits, folder, idx, smallnorb, svhn
from .source import Source
from .splits import Dataset

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


def load_dataset(name: str, source: Source) -> Dataset:
    """A data set by name, on the CPU, its files in ``data_dir/name`` or ``data_dir``.

    With ``source.download``, files that are missing are fetched there, checksums compared. Raises
    UserError, naming the file, where one is missing, damaged or of another format.
    """
    if name not in DATASETS:
        raise UserError(f"dataset must be one of {', '.join(DATASETS)}, got {name!r}")
    return DATASETS[name](source)

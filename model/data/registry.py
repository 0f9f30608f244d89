"""Every data set's name and how it is loaded."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from . import digits, idx
from .splits import Dataset

DATASETS: dict[str, Callable[[Path, bool], Dataset]] = {
    "digits": lambda data_dir, download: digits.load(),
    "mnist": partial(idx.load, "mnist"),
    "fashion-mnist": partial(idx.load, "fashion-mnist"),
}


def load_dataset(name: str, data_dir: Path, download: bool = False) -> Dataset:
    """A data set by name, its files taken from ``data_dir/name`` or ``data_dir``, on the CPU.

    With ``download``, files that are missing are fetched there, checksums compared. Raises
    UserError, naming the file, where one is missing, damaged or of another format.
    """
    return DATASETS[name](data_dir, download)

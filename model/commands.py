"""What the commands have in common: flags, the data they name, where tables and lines go."""

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from capsule_kernels import backends

from .config import Config
from .data import Dataset, Source, load_dataset
from .errors import UserError

Flags = argparse.ArgumentParser | argparse._ArgumentGroup


def add_data_flags(flags: Flags) -> None:
    """``--data-dir`` and ``--download``: see :func:`open_dataset`."""
    flags.add_argument(
        "--data-dir", type=Path, default=Path("data"), metavar="DIR",
        help="folder of the data's files (default: data)",
    )  # fmt: skip
    flags.add_argument(
        "--download", action="store_true", default=False, help="fetch files that are missing"
    )


def add_device_flags(flags: Flags, backend: str = "auto") -> None:
    """``--device`` and ``--backend``: where a network runs, and what its routing is done by.

    ``backend`` is the default of the latter.
    """
    flags.add_argument("--device", help='"cpu", "cuda", "cuda:1" (default: cuda if there is one)')
    flags.add_argument(
        "--backend", choices=("auto", *backends()), default=backend, help="of the routing"
    )


def open_dataset(config: Config, arguments: argparse.Namespace) -> Dataset:
    """The data of a configuration, from where :func:`add_data_flags` says, on the CPU.

    UserError if it has no two images of different classes to lay over each other.
    """
    a = config.architecture
    source = Source(arguments.data_dir, arguments.download, a.image_size, a.in_channels)
    dataset = load_dataset(config.dataset, source)
    for name, split in (("train", dataset.train), ("test", dataset.test)):
        if config.pairs and len(split.labels.unique()) == 1:
            raise UserError(
                f"--data-dir {arguments.data_dir}: overlapping pairs need {name} images of at "
                f"least 2 classes, got {len(split)} of one class"
            )
    return dataset


def plain_console(**options: Any) -> Console:
    """A console that shows names of files and classes as they are: ``[a]``, ``:star:``, numbers."""
    return Console(highlight=False, markup=False, emoji=False, **options)


def table_console() -> Console:
    """For tables on stdout; piped into a file or grep, a row stays a line, however long."""
    return plain_console(width=None if sys.stdout.isatty() else 100_000)

"""The data set "folder": anybody's pictures, a folder of them for each class."""

import hashlib
from pathlib import Path

import torch

from ..errors import UserError
from .files import Source
from .pictures import SUFFIXES, read_picture
from .splits import Dataset, Split, class_name

HELD_OUT = 0.2
"""Of the pictures, where there is no folder "test"."""


FORMS = "--data-dir must hold CLASS/*.png, or train/CLASS/*.png and test/CLASS/*.png"


def class_folders(folder: Path) -> list[Path]:
    """Its subfolders in alphabetical order, but for those that systems and archives leave."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not there; {FORMS}")
    return sorted(
        p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__MACOSX"))
    )


def pictures_in(folder: Path) -> list[Path]:
    """Its picture files in alphabetical order; UserError if there is none."""
    found = sorted(
        p
        for p in folder.iterdir()
        if p.suffix.lower() in SUFFIXES and p.is_file() and not p.name.startswith(".")
    )
    if not found:
        raise UserError(f"{folder}: no pictures in it, a class must have at least one; {FORMS}")
    return found


def lot(path: Path) -> float:
    """A number in 0..1 that a file's name has drawn once and for all."""
    digest = hashlib.sha256(path.name.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def divided(paths: list[Path]) -> tuple[list[Path], list[Path]]:
    """A class's pictures to train on and to hold out, each in the order they came in.

    Those whose lot is below HELD_OUT are held out: the name alone decides, so that pictures that
    come or go move no other. Only where all or none would be, one is taken out: of none held out
    that of the lowest lot, of none to train on that of the highest.
    """
    by_lot = sorted(paths, key=lot)
    count = sum(lot(p) < HELD_OUT for p in paths)
    held_out = set(by_lot[: min(max(count, 1), len(paths) - 1)])
    return [p for p in paths if p not in held_out], [p for p in paths if p in held_out]


def read_classes(classes: list[list[Path]], source: Source) -> Split:
    """One list of pictures for each class."""
    images = [
        read_picture(p, source.channels, source.image_size) for paths in classes for p in paths
    ]
    labels = [label for label, paths in enumerate(classes) for _ in paths]
    return Split(torch.stack(images), torch.tensor(labels))


def load(source: Source) -> Dataset:
    """``data_dir/train/CLASS/*`` and ``data_dir/test/CLASS/*``, or ``data_dir/CLASS/*`` alone.

    In the second form about a fifth of each class is held out for the test: see :func:`divided`;
    there, "train" is a class like others.
    """
    if (source.data_dir / "train").is_dir() and class_folders(source.data_dir / "train"):
        train, test = (class_folders(source.data_dir / part) for part in ("train", "test"))
        names, test_names = ([class_name(p.name) for p in part] for part in (train, test))
        if names != test_names:
            odd = sorted(set(names) ^ set(test_names))
            raise UserError(
                f"{source.data_dir}: train and test must have the same classes, "
                f"only one has {', '.join(odd)}"
            )
        parts = [[pictures_in(folder) for folder in folders] for folders in (train, test)]
        test_name = "test"
    else:
        folders = class_folders(source.data_dir)
        names = [class_name(p.name) for p in folders]
        pictures = [pictures_in(folder) for folder in folders]
        for folder, paths in zip(folders, pictures, strict=True):
            if len(paths) < 2:
                raise UserError(
                    f"{folder}: must have at least 2 pictures, one to train on and one to hold "
                    "out, got 1"
                )
        parts = [list(part) for part in zip(*map(divided, pictures), strict=True)] or [[], []]
        test_name = "held-out fifth"
    if len(names) < 2:
        raise UserError(
            f"{source.data_dir}: must have at least 2 classes, got {len(names)}; {FORMS}"
        )
    train_split, test_split = (read_classes(part, source) for part in parts)
    return Dataset(train_split, test_split, tuple(names), test_name)

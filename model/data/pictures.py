"""Anybody's picture files: one picture for prediction, or a folder of them for each class."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .source import Source
from .splits import Dataset, Split

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm"}
HELD_OUT = 5
"""Without a folder "test", every fifth picture of a class is held out."""


def read_picture(path: Path, channels: int, size: int) -> Tensor:
    """A picture of any size and mode as uint8 [channels, size, size]; 1 channel is grey, 3 colour.

    Transparent parts become black, 16-bit values are scaled down, palettes and other colour spaces
    are resolved; then the picture is turned as its camera noted (EXIF), resized, its proportions
    kept, and centred on black.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from None
    except Exception:  # Pillow raises many kinds for a damaged file
        raise UserError(f"{path}: not a whole picture in a format known here") from None
    if picture.mode.startswith("I") or picture.mode == "F":
        picture = eight_bits(np.asarray(picture), path)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        black = Image.new("RGBA", picture.size, (0, 0, 0, 255))
        picture = Image.alpha_composite(black, picture)
    picture = picture.convert("L" if channels == 1 else "RGB")
    picture = ImageOps.pad(picture, (size, size), Image.Resampling.BILINEAR, color=0)
    pixels = torch.from_numpy(np.asarray(picture).copy()).view(size, size, -1)
    return pixels.permute(2, 0, 1).contiguous()


def eight_bits(values: np.ndarray, path: Path) -> "Image.Image":
    """A picture of 16- or 32-bit values as one of 8: 65535, or 1.0 for fractions, is white."""
    from PIL import Image

    if values.dtype.kind == "f":
        white = 1.0 if np.nanmax(values, initial=0) <= 1 else 255.0
    else:
        white = 255.0 if values.max(initial=0) <= 255 else 65535.0
    if not np.isfinite(values).all() or values.min(initial=0) < 0 or values.max(initial=0) > white:
        raise UserError(f"{path}: its values must be 0 to {white:g}")
    return Image.fromarray((values.astype(np.float64) * (255 / white)).round().astype(np.uint8))


def class_folders(folder: Path) -> list[Path]:
    """Its subfolders in alphabetical order."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not there; --data-dir must hold a folder of pictures a class")
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def pictures_in(folder: Path) -> list[Path]:
    """Its picture files in alphabetical order; UserError if there is none."""
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise UserError(f"{folder}: no pictures in it; a class must have at least one")
    return found


def read_classes(folders: list[list[Path]], source: Source) -> Split:
    """One list of pictures for each class."""
    images = [
        read_picture(p, source.channels, source.image_size) for paths in folders for p in paths
    ]
    labels = [label for label, paths in enumerate(folders) for _ in paths]
    return Split(torch.stack(images), torch.tensor(labels))


def load(source: Source) -> Dataset:
    """``data_dir/train/CLASS/*`` and ``data_dir/test/CLASS/*``, or ``data_dir/CLASS/*`` alone.

    In the second form every fifth picture of each class (at least one) is held out for the test.
    """
    if (source.data_dir / "train").is_dir():
        train, test = (class_folders(source.data_dir / part) for part in ("train", "test"))
        names, test_names = ([p.name for p in folders] for folders in (train, test))
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
        names = [p.name for p in folders]
        pictures = [pictures_in(folder) for folder in folders]
        for folder, paths in zip(folders, pictures, strict=True):
            if len(paths) < 2:
                raise UserError(f"{folder}: must have at least 2 pictures, one to train on, got 1")
        parts = [
            [[p for n, p in enumerate(paths) if n % HELD_OUT != 1] for paths in pictures],
            [[p for n, p in enumerate(paths) if n % HELD_OUT == 1] for paths in pictures],
        ]
        test_name = "held-out fifth"
    if len(names) < 2:
        raise UserError(f"{source.data_dir}: must have at least 2 classes, got {len(names)}")
    train_split, test_split = (read_classes(part, source) for part in parts)
    return Dataset(train_split, test_split, tuple(names), test_name)

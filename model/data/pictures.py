"""Anybody's picture files, one at a time: for prediction, and for the data set "folder"."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm"}


def read_picture(path: Path, channels: int, size: int, invert: bool = False) -> Tensor:
    """A picture of any size and mode as uint8 [channels, size, size]; 1 channel is grey, 3 colour.

    16-bit values are scaled down, palettes and other colour spaces are resolved, and the picture is
    turned as its camera noted (EXIF); with ``invert``, bright and dark change places. Then it is
    resized, its proportions kept, and centred on black. Transparent parts end black either way.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            sixteen_bits = opened.mode.startswith("I;16") or opened.format in ("PNG", "PPM")
            picture = ImageOps.exif_transpose(opened)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from None
    except Image.DecompressionBombError as error:
        what = str(error).split(",")[0]  # "Image size (N pixels) exceeds limit of M pixels"
        raise UserError(f"{path}: too large: {what}") from None
    except Exception:  # Pillow raises many kinds for a damaged file
        raise UserError(f"{path}: not a whole picture in a format known here") from None
    width, height = picture.size
    if min(width, height) * size < max(width, height):
        raise UserError(
            f"{path}: too narrow: of {width} x {height} pixels less than one would be left of a "
            f"side when the other becomes {size}"
        )
    if picture.mode.startswith("I") or picture.mode == "F":
        picture = eight_bits(np.asarray(picture), sixteen_bits, path)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        paper = Image.new("RGBA", picture.size, "white" if invert else "black")
        picture = Image.alpha_composite(paper, picture)
    picture = picture.convert("RGB")  # Lab has no direct way to grey
    if channels == 1:
        picture = picture.convert("L")
    if invert:  # before there are margins, which stay black
        picture = ImageOps.invert(picture)
    picture = ImageOps.pad(picture, (size, size), Image.Resampling.BILINEAR, color=0)
    pixels = torch.from_numpy(np.asarray(picture).copy()).view(size, size, -1)
    return pixels.permute(2, 0, 1).contiguous()


def eight_bits(values: np.ndarray, sixteen_bits: bool, path: Path) -> "Image.Image":
    """A picture of 16- or 32-bit values as one of 8.

    With ``sixteen_bits``, white is 65535 however dark the picture is. Files of 32-bit values don't
    say what white is, so their range must: whole numbers up to 255 are of 8 bits, others of 16;
    fractions up to 1 have white at 1, others at 255.
    """
    from PIL import Image

    if values.dtype.kind == "f":
        white = 1.0 if np.nanmax(values, initial=0) <= 1 else 255.0
    else:
        white = 65535.0 if sixteen_bits or values.max(initial=0) > 255 else 255.0
    if not np.isfinite(values).all() or values.min(initial=0) < 0 or values.max(initial=0) > white:
        raise UserError(f"{path}: its values must be 0 to {white:g}")
    return Image.fromarray((values.astype(np.float64) * (255 / white)).round().astype(np.uint8))

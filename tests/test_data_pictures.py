"""Anybody's pictures: every size and mode becomes what a network was trained on, or is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from model.data.pictures import read_picture
from model.errors import UserError


def save(path: Path, array: np.ndarray, mode: str | None = None) -> Path:
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path)
    return path


def ramp(size: int = 28) -> np.ndarray:
    return np.linspace(0, 255, size * size).reshape(size, size).round().astype(np.uint8)


@pytest.mark.parametrize("mode", [None, "RGB", "P", "RGBA", "LA"])
def test_every_mode_gives_the_same_grey(mode: str | None, tmp_path: Path) -> None:
    picture = read_picture(save(tmp_path / "x.png", ramp(), mode), 1, 28)
    assert picture.shape == (1, 28, 28)
    assert picture.dtype == torch.uint8
    np.testing.assert_allclose(picture[0].numpy().astype(int), ramp().astype(int), atol=1)


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    deep = ramp().astype(np.uint16) * 257
    picture = read_picture(save(tmp_path / "x.png", deep), 1, 28)
    np.testing.assert_array_equal(picture[0].numpy(), ramp())
    picture = read_picture(save(tmp_path / "x.tiff", ramp().astype(np.float32) / 255), 1, 28)
    np.testing.assert_array_equal(picture[0].numpy(), ramp())
    with pytest.raises(UserError, match=r"x\.tiff: its values must be 0 to 1"):
        read_picture(save(tmp_path / "x.tiff", ramp().astype(np.float32) / 255 - 1), 1, 28)


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_the_bits_of_a_file_count_not_its_brightest_pixel(suffix: str, tmp_path: Path) -> None:
    """A dark frame of 16 bits stays dark, and is not brighter than one with a bright pixel."""
    dark = np.full((28, 28), 255, np.uint16)
    picture = read_picture(save(tmp_path / f"x.{suffix}", dark), 1, 28)
    assert picture.unique().tolist() == [1]


def test_thirty_two_bits_are_judged_by_their_range(tmp_path: Path) -> None:
    whole = ramp().astype(np.int32)
    for values in (whole, whole * 257):
        picture = read_picture(save(tmp_path / "x.tiff", values), 1, 28)
        np.testing.assert_array_equal(picture[0].numpy(), ramp())
    with pytest.raises(UserError, match=r"x\.tiff: its values must be 0 to 65535"):
        read_picture(save(tmp_path / "x.tiff", whole * 1000), 1, 28)


@pytest.mark.parametrize("channels", [1, 3])
def test_lab(channels: int, tmp_path: Path) -> None:
    pixels = np.full((28, 28, 3), 128, np.uint8)  # a and b at 0, as TIFF's signed bytes
    pixels[..., 1:] = 0
    Image.frombytes("LAB", (28, 28), pixels.tobytes()).save(tmp_path / "x.tiff")
    picture = read_picture(tmp_path / "x.tiff", channels, 28)
    assert picture.shape == (channels, 28, 28)


@pytest.mark.parametrize("invert", [False, True])
def test_margins_and_transparent_parts_are_black(invert: bool, tmp_path: Path) -> None:
    array = np.full((28, 14, 4), 50 if invert else 205, np.uint8)
    array[:14, :, 3], array[14:, :, 3] = 0, 255
    picture = read_picture(save(tmp_path / "x.png", array), 1, 28, invert)
    assert (picture[0, 14:, 7:21] == 205).all()
    picture[0, 14:, 7:21] = 0
    assert (picture == 0).all()


def test_pictures_that_are_too_large_or_too_narrow(tmp_path: Path) -> None:
    blank = Image.new("1", (20_000, 10_000))
    blank.save(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"x\.png: too large: .*200000000 pixels.* limit of \d+"):
        read_picture(tmp_path / "x.png", 1, 28)
    Image.new("L", (280, 10), 255).save(tmp_path / "x.png")
    assert read_picture(tmp_path / "x.png", 1, 28).amax() == 255
    for size in ((300, 10), (1, 100)):
        Image.new("L", size, 255).save(tmp_path / "x.png")
        with pytest.raises(UserError, match=r"x\.png: too narrow: of {} x {} pixels".format(*size)):
            read_picture(tmp_path / "x.png", 1, 28)


def test_other_sizes_keep_their_proportions(tmp_path: Path) -> None:
    picture = read_picture(save(tmp_path / "x.png", np.full((100, 50), 200, np.uint8)), 1, 28)
    assert (picture[0, :, 7:21] == 200).all()
    assert (picture[0, :, :7] == 0).all()
    assert (picture[0, :, 21:] == 0).all()


@pytest.mark.parametrize("deep", [False, True])
def test_pictures_are_turned_as_the_camera_noted(deep: bool, tmp_path: Path) -> None:
    upright = ramp()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned by a quarter to the right
    lying = np.rot90(upright).astype(np.uint16 if deep else np.uint8) * (257 if deep else 1)
    Image.fromarray(lying).save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(read_picture(tmp_path / "x.png", 1, 28)[0].numpy(), upright)


def test_colour(tmp_path: Path) -> None:
    array = np.zeros((24, 24, 3), np.uint8)
    array[..., 0], array[..., 2] = 10, 250
    picture = read_picture(save(tmp_path / "x.png", array), 3, 24)
    assert picture.flatten(1)[:, 0].tolist() == [10, 0, 250]


def test_what_is_no_picture(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    whole = save(path, ramp(200)).read_bytes()
    header = bytearray(whole)
    header[8:12] = (5).to_bytes(4, "big")  # of a chunk of 13 bytes
    for content in (b"", b"hello", whole[: len(whole) // 2], bytes(header)):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"x\.png: not a whole picture") as caught:
            read_picture(path, 1, 28)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"nowhere\.png: can't be read: No such file"):
        read_picture(tmp_path / "nowhere.png", 1, 28)
    with pytest.raises(UserError, match="can't be read: Is a directory"):
        read_picture(tmp_path, 1, 28)

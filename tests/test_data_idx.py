"""MNIST's own file format, read exactly; damaged files refused in one line that names them."""

import gzip
import hashlib
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from model.data import Source, load_dataset
from model.data import idx as formats
from model.data.idx import CRC32, FILES, read_idx
from model.errors import UserError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
TRAIN_IMAGES, TRAIN_LABELS = FILES["train"]
PIXELS = {
    part: np.random.default_rng(count).integers(0, 256, (count, 28, 28))
    for part, count in (("train", 20), ("test", 10))
}


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A small MNIST: 20 training images, 10 to test, packed as the publisher's."""
    folder = tmp_path / "mnist"
    folder.mkdir()
    for part, (images, labels) in FILES.items():
        count = len(PIXELS[part])
        (folder / images).write_bytes(gzip.compress(idx(PIXELS[part])))
        (folder / labels).write_bytes(gzip.compress(idx(np.arange(count) % 10)))
    return tmp_path


def test_reads_every_pixel(data_dir: Path) -> None:
    dataset = load_dataset("mnist", Source(data_dir))
    assert dataset.train.images.dtype == torch.uint8
    np.testing.assert_array_equal(dataset.train.images[:, 0], PIXELS["train"])
    np.testing.assert_array_equal(dataset.test.images[:, 0], PIXELS["test"])
    assert dataset.test.labels.tolist() == list(range(10))
    # The folder of the files themselves serves as well, and files that were unpacked.
    packed = data_dir / "mnist" / TRAIN_IMAGES
    (data_dir / "mnist" / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    again = load_dataset("mnist", Source(data_dir / "mnist"))
    assert torch.equal(again.train.images, dataset.train.images)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_the_publishers_own_files(name: str) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip(f"the original files of {name} are not here")
    dataset = load_dataset(name, Source(SHARED))
    assert dataset.train.images.shape == (60_000, 1, 28, 28)
    assert dataset.test.images.shape == (10_000, 1, 28, 28)
    content = gzip.decompress((SHARED / name / FILES["test"][0]).read_bytes())
    digest = hashlib.sha256(dataset.test.images.numpy().tobytes()).digest()
    assert digest == hashlib.sha256(content[16:]).digest()
    assert dataset.train.labels.bincount().min() > 5000
    values = [
        (part.images if "images" in file else part.labels.byte()).numpy()
        for part, files in ((dataset.train, FILES["train"]), (dataset.test, FILES["test"]))
        for file in files
    ]
    assert {zlib.crc32(array) for array in values} == CRC32[name]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("place", range(4))
def test_a_file_of_the_other_data_set(
    place: int, packed: bool, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the same name. A file that its user changed is nobody's."""
    path = data_dir / "mnist" / (*FILES["train"], *FILES["test"])[place]
    content = gzip.decompress(path.read_bytes())
    if not packed:
        path.unlink()
        path = path.with_suffix("")
        path.write_bytes(content)
    header = 4 + 4 * content[3]
    monkeypatch.setattr(formats, "CRC32", {"mnist": {zlib.crc32(content[header:])}})
    assert len(load_dataset("mnist", Source(data_dir)).train) == 20
    with pytest.raises(UserError) as caught:
        load_dataset("fashion-mnist", Source(data_dir / "mnist"))
    expected = f"{path}: must be a file of fashion-mnist, got that of mnist, which has the same "
    assert str(caught.value).startswith(expected)
    changed = content[:-1] + bytes([content[-1] ^ 1])
    path.write_bytes(gzip.compress(changed) if packed else changed)
    assert len(load_dataset("fashion-mnist", Source(data_dir / "mnist")).train) == 20


WHOLE = gzip.compress(idx(PIXELS["train"]))
FLIPPED = bytearray(WHOLE)
FLIPPED[len(WHOLE) // 2] ^= 0x10
DAMAGED: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "is not there"),
    "truncated": (WHOLE[:-20], "not a whole gz file"),
    "a bit": (bytes(FLIPPED), "not a whole gz file"),
    "not packed": (b"<html>not found</html>", "not a whole gz file"),
    "empty": (gzip.compress(b""), "got nothing"),
    "another format": (gzip.compress(b"PNG and more bytes than a header"), "not an IDX file"),
    "dimensions": (
        gzip.compress(idx(np.zeros((20, 784)))), "not an IDX file of 3-dimensional bytes"
    ),
    "short": (
        gzip.compress(idx(PIXELS["train"])[:-5]),
        "truncated or damaged: it announces 20 x 28 x 28 = 15680 bytes, got 15675",
    ),
    "count": (
        gzip.compress(idx(np.zeros((19, 28, 28)))), "as many images as labels, got 19 and 20"
    ),
    "no pixels": (
        gzip.compress(idx(np.zeros((20, 0, 0)))),
        "images must be square, of 1 pixel or more, got 0 x 0",
    ),
    "not square": (
        gzip.compress(idx(np.zeros((20, 28, 20)))),
        "images must be square, of 1 pixel or more, got 28 x 20",
    ),
}  # fmt: skip
"""Training images that are refused, None for no file, and what the message says."""


@pytest.mark.parametrize("damage", DAMAGED)
def test_bad_files_are_named_in_one_line(data_dir: Path, damage: str) -> None:
    path = data_dir / "mnist" / TRAIN_IMAGES
    content, expected = DAMAGED[damage]
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_dataset("mnist", Source(data_dir))
    message = str(caught.value)
    assert expected in message
    assert str(path) in message
    assert "\n" not in message


def test_images_to_test_are_as_large_as_those_to_train_on(data_dir: Path) -> None:
    path = data_dir / "mnist" / FILES["test"][0]
    path.write_bytes(gzip.compress(idx(np.zeros((10, 20, 20)))))
    with pytest.raises(UserError) as caught:
        load_dataset("mnist", Source(data_dir))
    expected = "must have images of 28 x 28 pixels, as those to train on, got 20 x 20"
    assert str(caught.value) == f"{path}: {expected}"


def test_labels_must_be_digits(data_dir: Path) -> None:
    path = data_dir / "mnist" / TRAIN_LABELS
    path.write_bytes(gzip.compress(idx(np.arange(20))))
    with pytest.raises(UserError, match=r"labels must be 0 to 9, got 0 to 19"):
        load_dataset("mnist", Source(data_dir))


def test_read_idx_of_other_rank(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(idx(np.arange(24).reshape(2, 3, 4)))
    assert read_idx(tmp_path / "x", 3).flatten().tolist() == list(range(24))

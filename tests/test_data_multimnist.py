"""MultiMNIST on the fly, against its definition and the fixtures of the authors' code."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.data import Source, Split, load_dataset
from model.experiments import EXPERIMENTS
from model.views import Views, evaluation_views, other_class, random_views, show
from model.windows import window

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
FIXTURES = SHARED / "capsnet-testdata" / "mnist"
CONFIG = EXPERIMENTS["multimnist"].config

needs_fixtures = pytest.mark.skipif(
    not FIXTURES.is_dir() or not (SHARED / "mnist").is_dir(),
    reason="the published MultiMNIST fixtures and MNIST are not here",
)


def random_split(count: int = 300, classes: int = 10) -> Split:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 1, 28, 28), generator=generator, dtype=torch.uint8)
    return Split(images, torch.randint(0, classes, (count,), generator=generator))


def test_partners_are_uniform_over_other_classes() -> None:
    split = Split(torch.zeros(7, 1, 2, 2, dtype=torch.uint8), torch.tensor([2, 0, 1, 0, 2, 2, 0]))
    for first in range(7):
        index = torch.full((4000,), first)
        found = other_class(split, index, torch.Generator().manual_seed(first))
        counts = found.bincount(minlength=7)
        allowed = split.labels != split.labels[first]
        assert (counts[~allowed] == 0).all()
        expected = 4000 / int(allowed.sum())
        # Five standard deviations of a binomial count.
        assert ((counts[allowed] - expected).abs() < 5 * expected**0.5).all()


def test_two_different_classes_overlaid_and_clipped() -> None:
    split = random_split()
    index = torch.arange(300)
    views = random_views(CONFIG, split, index, torch.Generator().manual_seed(1), 4)
    batch = show(CONFIG, split, views)
    assert batch.images.shape == (300, 1, 36, 36)
    assert batch.originals.shape == (300, 2, 1, 36, 36)
    assert torch.equal(batch.labels[:, 0], split.labels)
    assert (batch.labels[:, 0] != batch.labels[:, 1]).all()
    torch.testing.assert_close(batch.images, batch.originals.sum(1).clamp(max=1))
    assert batch.images.max() == 1
    # Both move, independently, by -4..4 from the middle of the canvas, and nothing is cut off.
    for start in (views.top, views.left):
        assert set(start.flatten().tolist()) == set(range(-8, 1))
        assert not torch.equal(start[:, 0], start[:, 1])
    sums = split.images.sum((1, 2, 3)) / 255
    torch.testing.assert_close(batch.originals.sum((2, 3, 4)), sums[views.index])


def test_the_test_set_is_always_the_same_and_as_large_as_asked() -> None:
    split = random_split(50)
    views = evaluation_views(CONFIG, split, repeats=3)
    assert len(views) == 150
    again = evaluation_views(CONFIG, split, repeats=3)
    assert torch.equal(views.index, again.index)
    assert torch.equal(views.top, again.top)
    assert views.index[:, 0].tolist() == list(range(50)) * 3


def records(path: Path) -> Iterator[bytes]:
    """The records of a TFRecord file: length (8), its checksum (4), data, checksum (4)."""
    content, at = path.read_bytes(), 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        yield content[at + 12 : at + 12 + length]
        at += length + 16


def number(content: bytes, at: int) -> tuple[int, int]:
    """A protocol-buffer varint, and where it ends."""
    value = shift = 0
    while True:
        byte = content[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


def fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol-buffer message that are numbers or bytes."""
    at = 0
    while at < len(content):
        tag, at = number(content, at)
        value, at = number(content, at)
        if tag & 7 == 2:
            yield tag >> 3, content[at : at + value]
            at += value
        else:
            yield tag >> 3, value


def example(record: bytes) -> dict[str, Any]:
    """The features of a tf.train.Example, the first value of each."""
    features = {}
    for _, message in fields(record):
        for _, entry in fields(message):
            (_, name), (_, feature) = fields(entry)
            ((_, values),) = fields(feature)
            ((_, value),) = fields(values)
            features[name.decode()] = number(value, 0)[0] if len(value) < 10 else value
    return features


def image(features: dict[str, Any], name: str) -> Tensor:
    size = (features["depth"], features["height"], features["width"])
    return torch.frombuffer(bytearray(features[name]), dtype=torch.uint8).view(size)


def place(split: Split, label: int, shifted: Tensor) -> tuple[int, int, int]:
    """Which MNIST image, and the start of the window that shows it as ``shifted`` [1, 36, 36].

    The authors' code shifts by up to 6 pixels from the middle, where the paper's text says 4; a
    little of a digit may leave the canvas.
    """
    same_label = (split.labels == label).nonzero()[:, 0]
    ink, ink_left = split.images[same_label].sum((1, 2, 3)), shifted.sum()
    hits: list[tuple[int, int, int]] = []
    for most in (1.0, 1.05):
        alike = same_label[(ink >= ink_left) & (ink <= most * ink_left)]
        for top in range(-10, 3) if not hits else ():
            for left in range(-10, 3):
                start = (torch.full_like(alike, x) for x in (top, left))
                same = (window(split.images, alike, *start, 36) == shifted).flatten(1).all(1)
                hits += [(int(n), top, left) for n in alike[same]]
    (hit,) = hits
    return hit


@needs_fixtures
@pytest.mark.parametrize("part", ["train", "test"])
def test_the_published_pairs_come_out_pixel_by_pixel(part: str) -> None:
    mnist = load_dataset("mnist", Source(SHARED))
    split = getattr(mnist, part)
    paths = sorted(FIXTURES.glob(f"multi{part}_4shifted_mnist.tfrecords-*"))
    pairs = [example(record) for path in paths for record in records(path)]
    assert len(pairs) == (6 if part == "train" else 4)
    for features in pairs:
        shifted = [image(features, f"image_raw_{n}") for n in (1, 2)]
        labels = [features[f"label_{n}"] for n in (1, 2)]
        placed = torch.tensor([place(split, *one) for one in zip(labels, shifted, strict=True)])
        views = Views(*placed.T.unsqueeze(1))
        batch = show(CONFIG, split, views)
        assert batch.labels.tolist() == [labels]
        assert torch.equal((batch.originals[0] * 255).round().byte(), torch.stack(shifted))
        merged = (batch.images[0] * 255).round().byte()
        assert torch.equal(merged, image(features, "merged_raw"))


@needs_fixtures
def test_published_shifted_digits_are_windows_onto_mnist() -> None:
    mnist = load_dataset("mnist", Source(SHARED))
    for name, split in (("train_2", mnist.train), ("test_0", mnist.test)):
        for record in records(FIXTURES / f"{name}shifted_mnist.tfrecords"):
            features = example(record)
            expected = image(features, "image_raw")
            found = [
                (top, left)
                for top in range(-2, 3)
                for left in range(-2, 3)
                if torch.equal(
                    window(split.images, *torch.tensor([[0], [top], [left]]), 28)[0], expected
                )
            ]
            assert len(found) == 1
            assert features["label"] == split.labels[0]

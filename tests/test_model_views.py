"""Windows onto images, and where random ones lie."""

import pytest
import torch

from model.config import Architecture, Config
from model.data import Split
from model.views import evaluation_batch, random_starts, training_batch, window


def split(count: int = 6, size: int = 10, channels: int = 2) -> Split:
    generator = torch.Generator().manual_seed(0)
    shape = (count, channels, size, size)
    images = torch.randint(1, 256, shape, generator=generator, dtype=torch.uint8)
    return Split(images, torch.arange(count))


def test_window_pixel_by_pixel() -> None:
    images = split().images
    index, top, left = torch.tensor([3, 0, 3]), torch.tensor([-2, 4, 0]), torch.tensor([1, -30, 7])
    cut = window(images, index, top, left, 8)
    assert cut.shape == (3, 2, 8, 8)
    for b in range(3):
        for y in range(8):
            for x in range(8):
                at = (int(top[b]) + y, int(left[b]) + x)
                inside = all(0 <= p < 10 for p in at)
                expected = images[index[b], :, at[0], at[1]] if inside else torch.zeros(2)
                assert cut[b, :, y, x].tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("native", "size", "shift", "expected"),
    [
        (28, 28, 2, {-2, -1, 0, 1, 2}),  # shifted
        (28, 31, 0, {-3, -2, -1, 0}),  # placed on a larger canvas
        (32, 30, 0, {0, 1, 2}),  # cropped
        (32, 30, 1, {-1, 0, 1, 2, 3}),
    ],
)
def test_random_starts_reach_every_place(
    native: int, size: int, shift: int, expected: set[int]
) -> None:
    top, left = random_starts(500, native, size, shift, torch.Generator().manual_seed(0))
    assert set(top.tolist()) == expected
    assert set(left.tolist()) == expected
    assert not torch.equal(top, left)


def test_training_batch_follows_from_the_generator() -> None:
    config = Config(architecture=Architecture(image_size=10), shift_pixels=2)
    index = torch.tensor([5, 0, 1, 1])

    def draw(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        batch = training_batch(config, split(), index, generator)
        assert batch.labels.tolist() == [[5], [0], [1], [1]]
        assert torch.equal(batch.images, batch.originals[:, 0])
        assert 0 <= batch.images.min() <= batch.images.max() <= 1
        return batch.images

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("size", [8, 10, 12])
def test_test_batch_is_central(size: int) -> None:
    images = split().images
    config = Config(architecture=Architecture(image_size=size))
    batch = evaluation_batch(config, split(), torch.tensor([4]))
    edge = abs(10 - size) // 2
    if size <= 10:
        expected = images[4, :, edge : edge + size, edge : edge + size] / 255
        torch.testing.assert_close(batch.images[0], expected)
    else:
        torch.testing.assert_close(batch.images[0, :, edge:-edge, edge:-edge], images[4] / 255)
        assert batch.images.sum() == pytest.approx(float(images[4].sum() / 255), rel=1e-5)

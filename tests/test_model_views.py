"""Windows onto images, where random ones lie, and what networks are trained and tested on."""

import pytest
import torch

from model.augment import flip_some, jitter, standardize
from model.config import Architecture, Config
from model.data import Split
from model.experiments import EXPERIMENTS
from model.views import central_views, evaluation_views, random_views, show, training_batch
from model.windows import window


def split(count: int = 6, size: int = 10, channels: int = 2) -> Split:
    generator = torch.Generator().manual_seed(0)
    shape = (count, channels, size, size)
    images = torch.randint(1, 256, shape, generator=generator, dtype=torch.uint8)
    return Split(images, torch.arange(count))


def seen(size: int, **changes: object) -> Config:
    return Config(architecture=Architecture(image_size=size), **changes)  # type: ignore[arg-type]


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
def test_random_views_reach_every_place(
    native: int, size: int, shift: int, expected: set[int]
) -> None:
    data = split(1, native)
    index = torch.zeros(500, dtype=torch.long)
    views = random_views(seen(size), data, index, torch.Generator().manual_seed(0), shift)
    assert views.index.shape == (500, 1)
    assert set(views.top.flatten().tolist()) == expected
    assert set(views.left.flatten().tolist()) == expected
    assert not torch.equal(views.top, views.left)


def test_training_batch_follows_from_the_generator() -> None:
    index = torch.tensor([5, 0, 1, 1])

    def draw(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        batch = training_batch(seen(10, shift_pixels=2), split(), index, generator)
        assert batch.labels.tolist() == [[5], [0], [1], [1]]
        assert torch.equal(batch.images, batch.originals[:, 0])
        assert 0 <= batch.images.min() <= batch.images.max() <= 1
        return batch.images

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("size", [8, 10])
def test_evaluation_is_central(size: int) -> None:
    data, edge = split(), (10 - size) // 2
    batch = show(seen(size), data, evaluation_views(seen(size), data))
    expected = data.images[..., edge : edge + size, edge : edge + size] / 255
    torch.testing.assert_close(batch.images, expected)
    assert batch.labels.flatten().tolist() == list(range(6))


def test_evaluation_places_small_images_once_and_for_all() -> None:
    data = split(200)
    first, again = (evaluation_views(seen(13), data) for _ in range(2))
    assert torch.equal(first.top, again.top)
    assert set(first.top.flatten().tolist()) == {-3, -2, -1, 0}
    batch = show(seen(13), data, first)
    torch.testing.assert_close(batch.images.sum((1, 2, 3)), data.images.sum((1, 2, 3)) / 255)


@pytest.mark.parametrize("size", [8, 10])
def test_one_central_view_is_enough(size: int) -> None:
    data = split()
    views = evaluation_views(seen(size), data, repeats=3)
    assert views.index.flatten().tolist() == list(range(6))
    assert len(evaluation_views(seen(13), data, repeats=3)) == 18


def test_central_views_reach_around_small_images() -> None:
    data = split()
    batch = show(seen(14), data, central_views(seen(14), data))
    torch.testing.assert_close(batch.images[..., 2:12, 2:12], data.images / 255)
    torch.testing.assert_close(batch.images.sum((1, 2, 3)), data.images.sum((1, 2, 3)) / 255)


def test_flips_mirror_about_half() -> None:
    images = split(400).images / 255
    flipped = flip_some(images, torch.Generator().manual_seed(0))
    same = (flipped == images).flatten(1).all(1)
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 150 < int(same.sum()) < 250


def test_jitter_moves_brightness_and_contrast_within_range() -> None:
    images = 0.4 + 0.2 * torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    changed = jitter(images, torch.Generator().manual_seed(1))
    assert changed.min() >= 0
    assert changed.max() <= 1
    shift = (changed.mean((1, 2, 3)) - images.mean((1, 2, 3))).abs()
    assert 0.2 < shift.max() <= 0.2501
    ratio = changed.std((1, 2, 3)) / images.std((1, 2, 3))
    assert 0.49 < ratio.min() < 0.55
    assert 1.45 < ratio.max() < 1.51


def test_standardized_images() -> None:
    images = standardize(torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(images.mean((1, 2, 3)), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(images.std((1, 2, 3), correction=0), torch.ones(3))
    assert (standardize(torch.full((1, 1, 8, 8), 0.7)).abs() < 1e-5).all()


def test_only_the_input_is_standardized() -> None:
    config, data = seen(10, standardize=True), split()
    batch = show(config, data, evaluation_views(config, data))
    torch.testing.assert_close(batch.originals[:, 0], data.images / 255)
    torch.testing.assert_close(batch.images, standardize(data.images / 255))


def test_training_flips_and_jitters() -> None:
    data, index = split(60), torch.arange(60)

    def images(**changes: object) -> torch.Tensor:
        config, generator = seen(10, shift_pixels=0, **changes), torch.Generator().manual_seed(0)
        return training_batch(config, data, index, generator).images

    plain = images()
    assert not torch.equal(plain, images(flip=True))
    assert not torch.equal(plain, images(jitter=True))


def test_jitter_moves_all_channels_alike() -> None:
    """Contrast is about the mean of the image, not of a channel, which would take its colour."""
    x = torch.full((50, 3, 4, 4), 0.5)
    x[:, 0] += 0.1
    y = jitter(x, torch.Generator().manual_seed(0))
    difference = (y[:, 0] - y[:, 1]).mean((1, 2))
    assert 0.04 < difference.min() < 0.07
    assert 0.13 < difference.max() < 0.16


def test_pairs_are_tested_shifted_and_always_the_same() -> None:
    config = EXPERIMENTS["multimnist"].config
    assert set(evaluation_views(config, split(200, 28, 1)).top.flatten().tolist()) == {
        *range(-8, 1)
    }
    pairs = evaluation_views(config, split(6, 28, 1)).index.tolist()
    assert pairs == [[0, 5], [1, 2], [2, 0], [3, 2], [4, 2], [5, 4]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
@pytest.mark.parametrize("pairs", [False, True])
def test_a_gpu_tests_the_same_views(pairs: bool) -> None:
    config, data = seen(13, pairs=pairs), split(200)
    ours, theirs = evaluation_views(config, data), evaluation_views(config, data.to("cuda"))
    for name, expected in vars(ours).items():
        assert torch.equal(getattr(theirs, name).cpu(), expected)
        assert getattr(theirs, name).is_cuda

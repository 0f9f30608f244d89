"""scikit-learn's digits as 28 x 28 images."""

import torch
from torch.nn import functional as F

from model.data.digits import load


def test_digits_are_split_evenly_and_always_alike() -> None:
    dataset = load()
    assert dataset.train.images.shape == (1437, 1, 28, 28)
    assert dataset.test.images.shape == (360, 1, 28, 28)
    assert dataset.train.images.dtype == torch.uint8
    assert dataset.test.labels.bincount().tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    again = load()
    assert torch.equal(again.test.images, dataset.test.images)


def test_no_digit_is_in_both_parts() -> None:
    dataset = load()
    train = {image.numpy().tobytes() for image in dataset.train.images}
    test = {image.numpy().tobytes() for image in dataset.test.images}
    assert not train & test


def test_resizing_keeps_the_image() -> None:
    from sklearn.datasets import load_digits

    original = torch.from_numpy(load_digits().images).float() / 16
    images = load().test.images.float() / 255
    small = F.interpolate(images, size=(8, 8), mode="area")[:, 0]
    distances = torch.cdist(small.flatten(1), original.flatten(1))
    # Every held-out image is a blurred copy of one original, far from being equal to any other.
    assert distances.amin(1).max() < 1.5
    assert distances.median() > 2.5

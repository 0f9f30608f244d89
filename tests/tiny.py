"""An experiment small enough for tests of everything around it.

``python -m tests.tiny FLAGS`` is ``python -m model.train`` with the experiment "tiny" added.
"""

import pytest

from model.capsnet import CapsNet
from model.config import Architecture, Config
from model.data import DATASETS, Dataset, Source, Split
from model.data.digits import load
from model.errors import run_command
from model.experiments import EXPERIMENTS, Experiment
from model.train import main

ARCHITECTURE = Architecture(
    image_size=28, conv_channels=4, capsule_types=2, capsule_dim=4, class_dim=6
)
CONFIG = Config("tiny", ARCHITECTURE, epochs=2, batch_size=64, lr=3e-3)
STEPS_PER_EPOCH = 4


def load_tiny(source: Source) -> Dataset:
    """Some of scikit-learn's digits."""
    digits = load()
    train, test = (
        Split(split.images[:count], split.labels[:count])
        for split, count in ((digits.train, 64 * STEPS_PER_EPOCH + 9), (digits.test, 50))
    )
    return Dataset(train, test, digits.classes)


def add_tiny(patch: pytest.MonkeyPatch) -> None:
    """Put "tiny" among the data sets and experiments."""
    patch.setitem(DATASETS, "tiny", load_tiny)
    patch.setitem(EXPERIMENTS, "tiny", Experiment(CONFIG, "for tests"))


def tiny_capsnet(**changes: object) -> CapsNet:
    return CapsNet(Architecture(**{**ARCHITECTURE.__dict__, **changes}))


if __name__ == "__main__":
    add_tiny(pytest.MonkeyPatch())
    run_command(main)

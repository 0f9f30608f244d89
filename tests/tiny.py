"""An experiment small enough for tests of everything around it: "tiny", which importing this adds.

``python -m tests.tiny FLAGS`` is ``python -m model.train`` with it.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

from model.capsnet import CapsNet
from model.checkpoint import CHECKPOINT, save
from model.checkpoint import load as load_checkpoint
from model.config import Architecture, Config
from model.data import DATASETS, Dataset, Source, Split
from model.data.digits import load
from model.environment import ROOT
from model.errors import run_command
from model.experiments import EXPERIMENTS, Experiment
from model.train import main

ARCHITECTURE = Architecture(
    image_size=28, conv_channels=4, capsule_types=2, capsule_dim=4, class_dim=6
)
CONFIG = Config("tiny", ARCHITECTURE, epochs=2, batch_size=64, lr=3e-3)
STEPS_PER_EPOCH = 4


def load_tiny(_source: Source | None = None) -> Dataset:
    """Some of scikit-learn's digits."""
    digits = load()
    train, test = (
        Split(split.images[:count], split.labels[:count])
        for split, count in ((digits.train, 64 * STEPS_PER_EPOCH + 9), (digits.test, 50))
    )
    return Dataset(train, test, digits.classes)


DATASETS["tiny"] = load_tiny
EXPERIMENTS["tiny"] = Experiment(CONFIG, "for tests")


def train_tiny(directory: Path, *flags: str) -> int:
    """The exit code of a run in a directory."""
    return main(["--experiment", "tiny", "--save-dir", str(directory), *flags])


def variant(run: Path, directory: Path, **changes: object) -> Path:
    """The same weights under another configuration."""
    state = load_checkpoint(run)
    state.config = state.config.replaced(changes)
    directory.mkdir()
    save(directory / CHECKPOINT, state)
    return directory


def processes_together(
    *flags: list[str], program: tuple[str, str] = ("-m", "tests.tiny")
) -> list[subprocess.Popen[str]]:
    """One for each list of flags. Without torchrun's agent, which ends the others if one dies."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    size = len(flags)
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, *program, "--experiment", "tiny", *own],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, own in enumerate(flags)
    ]  # fmt: skip


def tiny_capsnet(**changes: object) -> CapsNet:
    return CapsNet(Architecture(**{**ARCHITECTURE.__dict__, **changes}))


if __name__ == "__main__":
    run_command(main)

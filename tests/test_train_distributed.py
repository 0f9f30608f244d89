"""Two processes under torchrun train the network that one process trains on the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import train
from model.checkpoint import CHECKPOINT, load
from model.distributed import join
from model.errors import UserError
from model.metrics import read_metrics

from .tiny import add_tiny

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["--experiment", "tiny", "--shift-pixels", "0"]  # every process draws shifts of its own


def test_two_processes_train_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_tiny(monkeypatch)
    for name in ("together", "alone"):
        stop = ["--max-minutes", "0"] if name == "together" else []
        assert train.main([*FLAGS, "--save-dir", str(tmp_path / name), *stop]) == 0
    assert load(tmp_path / "together").counters["step"] == 0
    # Begun by one process, which had no time, and gone on with by two.
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "tests.tiny", "--resume", str(tmp_path / "together")],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("test error") == 2, "one process prints, once an epoch"

    a, b = (load(tmp_path / name / CHECKPOINT) for name in ("together", "alone"))
    for name, tensor in b.part("model").items():
        torch.testing.assert_close(a.tensors[f"model.{name}"], tensor, rtol=1e-3, atol=1e-4)
    logs = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("together", "alone"))
    epochs = ([line for line in log if line["kind"] == "epoch"] for log in logs)
    for two, one in zip(*epochs, strict=True):
        assert two["train_accuracy"] == pytest.approx(one["train_accuracy"])
        assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-3)


def test_a_batch_that_cannot_be_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"--batch-size must be a multiple of 3 processes times"):
        join("cpu", batch_size=64, accumulate=2)

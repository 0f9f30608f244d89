"""Two processes under torchrun train the network that one process trains on the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import distributed, train
from model.arguments import parse
from model.checkpoint import CHECKPOINT, load
from model.distributed import World
from model.environment import ROOT
from model.errors import UserError
from model.metrics import read_metrics

from .tiny import processes_together, train_tiny

FLAGS = ["--shift-pixels", "0"]  # every process draws shifts of its own


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    assert train_tiny(tmp_path / "together", *FLAGS, "--max-minutes", "0") == 0
    assert train_tiny(tmp_path / "alone", *FLAGS) == 0
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


def test_a_batch_that_cannot_be_shared_out() -> None:
    flags = parse(["--batch-size", "64", "--accumulate", "2"])
    expected = "--batch-size must be a multiple of 3 processes times --accumulate 2, got 64"
    with pytest.raises(UserError, match=expected):
        train.prepare(flags, World(0, 3))


def test_one_gpu_for_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number was ignored without a word."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "choose_device", torch.device)  # as if it were there
    with pytest.raises(UserError, match=r"^--device cuda:1 can't be given to 2 processes: each"):
        distributed.join("cuda:1")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert distributed.join("cuda:1").device == torch.device("cuda:1")


def outputs(processes: list[subprocess.Popen[str]]) -> list[tuple[str, str]]:
    """What each printed, on stdout and on stderr, until its end."""
    try:
        return [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize("refusing", [0, 1])
def test_what_one_process_cannot_do_ends_both(refusing: int, tmp_path: Path) -> None:
    """It says so in a line, the other one nothing."""
    (tmp_path / "file").touch()
    if refusing == 0:  # the one that writes
        directory, weights = tmp_path / "file" / "run", []
        expected = f"--save-dir {directory} can't be written: Not a directory"
    else:
        directory, weights = tmp_path / "run", ["--weights", "nowhere"]
        expected = "nowhere is not there; expected a checkpoint or a run's directory"
    common = [*FLAGS, "--save-dir", str(directory)]
    processes = processes_together(common, [*common, *weights])
    lines = [error for _, error in outputs(processes)]
    assert [process.returncode for process in processes] == [2, 2], lines
    assert lines.pop(refusing) == f"error: {expected}\n"
    assert lines == [""]
    assert not directory.exists()


SHOWS_THREADS = """
import atexit, os
from pathlib import Path

@atexit.register  # first, so that it is called last
def show_threads():
    for comm in Path("/proc/self/task").glob("*/comm"):
        print(comm.read_text(), end="")

from tests import tiny
tiny.run_command(tiny.main)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
@pytest.mark.parametrize("flags", [["--epochs", "1"], ["--epochs", "1", "--lr", "1e30"]])
def test_no_thread_of_gloo_outlives_python(flags: list[str], tmp_path: Path) -> None:
    """It would abort the process when it lets go of a tensor: exit code -6, once in a while."""
    common = [*FLAGS, "--save-dir", str(tmp_path / "run"), *flags]
    processes = processes_together(common, common, program=("-c", SHOWS_THREADS))
    shown = outputs(processes)
    assert [process.returncode for process in processes] == [2 * ("--lr" in flags)] * 2, shown
    for threads, _ in shown:
        assert threads
        assert "gloo" not in threads

"""Training under faults: killed at any moment, no room on the disk, torn files, a process lost."""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from model import train
from model.checkpoint import CHECKPOINT, load
from model.environment import ROOT
from model.errors import UserError
from model.metrics import METRICS, read_metrics

from .tiny import STEPS_PER_EPOCH, processes_together, train_tiny

KILLS = 8
EPOCHS = 7
SECONDS_TO_END = 60  # that a process has after the other one died

Figure = Callable[[str, str], None]


def tiny_run(directory: Path) -> None:
    """Train, or go on; in a process of its own."""
    torch.set_num_threads(1)
    begun = (directory / CHECKPOINT).exists()
    new = ["--experiment", "tiny", "--epochs", str(EPOCHS), "--save-dir", str(directory)]
    start = ["--resume", str(directory)] if begun else new
    sys.exit(train.main([*start, "--checkpoint-minutes", "0"]))


def without_times(directory: Path) -> list[dict[str, object]]:
    lines = read_metrics(directory / METRICS)
    times = ("seconds", "images_per_second", "command")
    return [{k: v for k, v in line.items() if k not in times} for line in lines]


def assert_same_tensors(a: Path, b: Path) -> int:
    """Equal bits in all that two runs saved; how many."""
    first, second = load(a).tensors, load(b).tensors
    assert first.keys() == second.keys()
    assert any(name.startswith("optimizer.") for name in first)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    return sum(8 * x.element_size() * x.numel() for x in first.values())


def wait_for_a_save(directory: Path, process: BaseProcess) -> None:
    """Until the next checkpoint takes the place of the last, or the process has ended."""

    def which() -> int:
        path = directory / CHECKPOINT
        return path.stat().st_ino if path.exists() else 0

    before = which()
    while which() == before and process.is_alive():
        time.sleep(0.001)


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path, figure: Figure) -> None:
    # Children are forked from a process that has imported everything: moments are spread over the
    # run, not over the start of Python.
    context = multiprocessing.get_context("forkserver")
    imported = ["model.train", "tests.tiny", "sklearn.datasets", "torch.utils.tensorboard"]
    context.set_forkserver_preload([__name__, *imported])
    ready = context.Process(target=int)
    ready.start()
    ready.join()
    rng = random.Random(0)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    begun = time.monotonic()
    undisturbed = context.Process(target=tiny_run, args=(whole,))
    undisturbed.start()
    undisturbed.join()
    assert undisturbed.exitcode == 0
    a_step = (time.monotonic() - begun) / (EPOCHS * STEPS_PER_EPOCH)

    reached, unfinished = [], 0
    while len(reached) < KILLS:
        process = context.Process(target=tiny_run, args=(killed,))
        process.start()
        # Some saves, then up to a step more: spread over the run, however busy the machine is.
        for _ in range(rng.randrange(5)):
            wait_for_a_save(killed, process)
        process.join(rng.uniform(0, a_step))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode == 0:  # it was quicker: the whole run once more
            shutil.rmtree(killed)
            continue
        unfinished += any(killed.glob("*.unfinished"))
        begun_well = (killed / CHECKPOINT).exists()
        reached.append(load(killed).counters["step"] if begun_well else 0)
    last = context.Process(target=tiny_run, args=(killed,))
    last.start()
    last.join()
    assert last.exitcode == 0

    # Moments at which something was there to lose.
    assert len(set(reached) - {0, EPOCHS * STEPS_PER_EPOCH}) >= 3, reached
    bits = assert_same_tensors(killed, whole)
    assert without_times(killed) == without_times(whole)
    assert not any(killed.glob("*.unfinished"))
    figure(
        "killed while training",
        f"{KILLS} times, after steps {reached} of {EPOCHS * STEPS_PER_EPOCH}, {unfinished} times "
        f"while it wrote; {bits} bits equal to the undisturbed run's",
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run with an optimizer's state in its checkpoint."""
    directory = tmp_path_factory.mktemp("saved") / "run"
    assert train_tiny(directory, "--epochs", "1") == 0
    return directory


def test_a_checkpoint_cut_at_every_kibibyte(saved: Path, tmp_path: Path, figure: Figure) -> None:
    path = tmp_path / CHECKPOINT
    shutil.copy(saved / CHECKPOINT, path)
    size = path.stat().st_size
    lengths = range((size - 1) // 1024 * 1024, -1, -1024)
    for length in (*lengths[:-1], 100, 5, 0):
        os.truncate(path, length)
        with pytest.raises(UserError, match=f"{path}: not a whole safetensors file") as caught:
            load(path)
        assert "\n" not in str(caught.value)
    figure("checkpoints cut at every KiB", f"{len(lengths)} of {len(lengths)} refused")


NAMESPACE = ["unshare", "--mount", "--map-root-user"]
"""A process with mounts of its own, for which nobody needs to be root."""


def with_mounts(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a shell script that may mount file systems."""
    return subprocess.run(
        [*NAMESPACE, "bash", "-euc", script, "bash", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def _namespaces() -> None:
    if shutil.which("unshare") is None or with_mounts("mount -t tmpfs x /mnt").returncode:
        pytest.skip("no file systems can be mounted here (unshare --map-root-user)")


@pytest.mark.usefixtures("_namespaces")
def test_a_full_disk_while_training(saved: Path, tmp_path: Path, figure: Figure) -> None:
    """The checkpoint before stays, whole, and the run goes on from it where there is room."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    kept.mkdir()
    size = (saved / CHECKPOINT).stat().st_size
    # Room for a checkpoint, and for half of the next one beside it.
    done = with_mounts(
        'mount -t tmpfs -o size="$1" tmpfs "$2"; mkdir "$2/run"; cp "$3"/* "$2/run"; code=0;'
        '"$5" -m tests.tiny --resume "$2/run" --epochs 2 || code=$?;'
        'cp "$2/run/checkpoint.safetensors" "$4"; exit $code',
        size * 3 // 2, disk, saved, kept, sys.executable,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "can't be written: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert (kept / CHECKPOINT).read_bytes() == (saved / CHECKPOINT).read_bytes()
    figure("a full disk", f"one line of error, {size} bytes of the checkpoint before are whole")


@pytest.mark.usefixtures("_namespaces")
def test_a_read_only_disk(tmp_path: Path, figure: Figure) -> None:
    done = with_mounts(
        'mount -t tmpfs -o ro tmpfs "$1";'
        '"$2" -m tests.tiny --experiment tiny --save-dir "$1/run" --max-minutes 0',
        tmp_path, sys.executable,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == (
        f"error: --save-dir {tmp_path}/run can't be written: Read-only file system\n"
    )
    figure("a read-only disk", "refused before the first step, in one line")


def wait_for_the_first_step(directory: Path, processes: Sequence[subprocess.Popen[str]]) -> None:
    """Until it is saved: the first checkpoint is older than the bond between the processes."""
    while not (directory / CHECKPOINT).exists() or load(directory).counters["step"] < 1:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)


def children(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            # PID (COMMAND) STATE PARENT ...
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(stat.parent.name))
    return sorted(found)


def assert_one_process_goes_on(directory: Path) -> None:
    """The checkpoint is whole, and a run can begin with it."""
    assert load(directory).counters["step"] >= 0
    assert train.main(["--resume", str(directory), "--max-minutes", "0"]) == 0


@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_processes_dies(victim: int, tmp_path: Path, figure: Figure) -> None:
    """Without torchrun's agent, which would end the other one: as on two machines."""
    directory = tmp_path / "run"
    flags = ["--epochs", "10000", "--save-dir", str(directory), "--checkpoint-minutes", "0"]
    processes = processes_together(flags, flags)
    try:
        wait_for_the_first_step(directory, processes)
        processes[victim].kill()
        begun = time.monotonic()
        _, message = processes[1 - victim].communicate(timeout=SECONDS_TO_END)
        seconds = time.monotonic() - begun
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert processes[1 - victim].returncode not in (0, -signal.SIGKILL)
    assert "gloo/transport" in message, message  # torch's own error, of a peer that is gone
    assert_one_process_goes_on(directory)
    figure(
        f"process {victim} of two dies",
        f"the other ends with an error after {seconds:.1f} s, the checkpoint is whole",
    )


def test_torchrun_ends_when_one_of_two_dies(tmp_path: Path, figure: Figure) -> None:
    directory = tmp_path / "run"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = ["--experiment", "tiny", "--epochs", "10000", "--save-dir", str(directory)]
    with subprocess.Popen(
        [sys.executable, *launcher, "-m", "tests.tiny", *flags, "--checkpoint-minutes", "0"],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as torchrun:  # fmt: skip
        try:
            wait_for_the_first_step(directory, [torchrun])
            ranks = children(torchrun.pid)
            assert len(ranks) == 2
            os.kill(ranks[1], signal.SIGKILL)
            begun = time.monotonic()
            _, message = torchrun.communicate(timeout=SECONDS_TO_END)
            seconds = time.monotonic() - begun
        except BaseException:
            for pid in (torchrun.pid, *children(torchrun.pid)):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            raise
    assert torchrun.returncode not in (0, -signal.SIGKILL)
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    assert "SIGKILL" in message, message
    assert_one_process_goes_on(directory)
    figure(
        "one of two processes under torchrun dies",
        f"all end with an error after {seconds:.1f} s, the checkpoint is whole",
    )

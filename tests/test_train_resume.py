"""A run that was interrupted, and resumed, ends with the bits of one that was not."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model import fit, train
from model.checkpoint import CHECKPOINT, load, save
from model.data import DATASETS, Dataset, Source, Split
from model.environment import description
from model.errors import UserError
from model.interrupt import Interrupted, Interruption
from model.metrics import METRICS, MetricsLog, read_metrics
from model.trainer import Trainer

from .tiny import CONFIG, STEPS_PER_EPOCH, load_tiny, train_tiny


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of two epochs."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    assert train_tiny(directory) == 0
    return directory


@pytest.mark.parametrize(("least_seconds", "saves"), [(0.0, [1, 2]), (600.0, [2])])
def test_epochs_that_take_no_time_share_a_checkpoint(
    least_seconds: float, saves: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs: list[int] = []
    monkeypatch.setattr(Trainer, "save", lambda trainer: epochs.append(trainer.progress.epoch))
    monkeypatch.setattr(fit, "LEAST_SECONDS", least_seconds)
    assert train_tiny(tmp_path / "run") == 0
    assert epochs == saves


TIMES = ("seconds", "images_per_second")


def assert_same_run(directory: Path, other: Path) -> None:
    """Equal bits in every tensor, equal lines in the metrics but for the times."""
    a, b = load(directory / CHECKPOINT), load(other / CHECKPOINT)
    assert a.tensors.keys() == b.tensors.keys()
    assert any(name.startswith("optimizer.") for name in a.tensors)
    for name, tensor in a.tensors.items():
        assert torch.equal(tensor, b.tensors[name]), name
    assert a.counters["step"] == b.counters["step"] == 2 * STEPS_PER_EPOCH
    lines = [
        [
            {k: v for k, v in line.items() if k not in TIMES}
            for line in read_metrics(d / "metrics.jsonl")
            if line["kind"] != "run"
        ]
        for d in (directory, other)
    ]
    assert lines[0] == lines[1]
    assert [line["kind"] for line in lines[0]] == ["epoch", "epoch", "final"]


def test_interrupted_as_it_begins(
    tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It left files that were neither resumed nor begun afresh."""

    def interrupted(device: torch.device) -> dict[str, object]:
        os.kill(os.getpid(), signal.SIGINT)
        return description(device)

    with monkeypatch.context() as patch:
        patch.setattr(train, "description", interrupted)
        assert train_tiny(tmp_path / "run") == 130
    assert load(tmp_path / "run").counters["step"] == 0
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize("at", [1, 3, 4, 6])
def test_interrupted_between_any_two_steps(
    at: int, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.step

    def interrupted_step(self: Trainer) -> None:
        step(self)
        if self.progress.step == at:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted_step)
        code = train_tiny(tmp_path / "run")
    assert code == 130
    # At 4 the epoch is over, but its test was interrupted: it is done after resuming.
    assert load(tmp_path / "run").counters["epoch"] == (1 if at > STEPS_PER_EPOCH else 0)
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert_same_run(tmp_path / "run", uninterrupted)


def test_out_of_time_and_resumed(tmp_path: Path, uninterrupted: Path) -> None:
    directory = tmp_path / "run"
    assert train_tiny(directory, "--max-minutes", "0") == 0
    assert read_metrics(directory / "metrics.jsonl")[-1]["outcome"] == "out of time"
    assert train.main(["--resume", str(directory)]) == 0
    assert_same_run(directory, uninterrupted)


@pytest.mark.parametrize("written", [True, False])
def test_tensorboard_has_every_epoch_once(
    written: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped behind an epoch, or killed when its test was written down but not yet saved."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def terminated(self: Interruption) -> None:
        raise Interrupted(signal.SIGTERM)

    def keep_events(number: int) -> None:
        """Under a name before those to come: in one second, writer 10's is before writer 9's."""
        (path,) = directory.glob("events.out.tfevents.[1-9]*")
        path.rename(directory / f"events.out.tfevents.0.{number}")

    directory = tmp_path / "run"
    with monkeypatch.context() as patch:
        if not written:
            patch.setattr(Interruption, "check", terminated)
        train_tiny(directory, "--epochs", "1")
    keep_events(1)
    if not written:
        lost = MetricsLog(directory, load(directory).counters["metrics_size"])
        lost.write("epoch", STEPS_PER_EPOCH, {"test_error": 99.0})
        lost.close()
        keep_events(2)
    assert train.main(["--resume", str(directory), "--epochs", "2"]) == 0
    events = EventAccumulator(str(directory)).Reload().Scalars("test_error")
    lines = [line for line in read_metrics(directory / METRICS) if line["kind"] == "epoch"]
    assert [event.step for event in events] == [STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH]
    assert [e.value for e in events] == pytest.approx([line["test_error"] for line in lines])


def test_a_signal_during_the_test_of_an_epoch(
    tmp_path: Path,
    uninterrupted: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def terminated(self: Interruption) -> None:
        raise Interrupted(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Interruption, "check", terminated)
        assert train_tiny(tmp_path / "run") == 143
    state = load(tmp_path / "run")
    assert (state.counters["step"], state.counters["epoch"]) == (STEPS_PER_EPOCH, 0)
    capsys.readouterr()
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    # How fast the first epoch was trained, nobody knows any more.
    _, first, second, _ = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert first["images_per_second"] is None
    assert second["images_per_second"] > 0
    epochs = [line for line in capsys.readouterr().err.splitlines() if "test error" in line]
    assert [line.endswith(" images/s") for line in epochs] == [False, True]
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize(("flags", "steps"), [([], 2 * STEPS_PER_EPOCH), (["--max-minutes=0"], 0)])
def test_a_signal_during_the_report(
    flags: list[str],
    steps: int,
    tmp_path: Path,
    uninterrupted: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The last tests can take minutes. It said nothing of how to go on."""
    test = Trainer.test
    dataset = load_tiny()

    def interrupted_test(self: Trainer, split: Split, *more: object) -> object:
        if (split is self.dataset.test) == bool(flags):
            os.kill(os.getpid(), signal.SIGINT)
        return test(self, split, *more)

    with monkeypatch.context() as patch:
        further = replace(dataset, further_tests={"again": dataset.test.to("cpu")})
        patch.setitem(DATASETS, "tiny", lambda source: further)
        patch.setattr(Trainer, "test", interrupted_test)
        assert train_tiny(tmp_path / "run", *flags) == 130
    assert load(tmp_path / "run").counters["step"] == steps
    assert "final" not in (tmp_path / "run" / METRICS).read_text()
    shown = capsys.readouterr().err
    assert f"interrupted, saved; go on: python -m model.train --resume {tmp_path}/run" in shown
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert_same_run(tmp_path / "run", uninterrupted)


def test_metrics_are_json_lines_with_all_that_judges_them(uninterrupted: Path) -> None:
    lines = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").open()]
    assert [line["kind"] for line in lines] == ["run", "epoch", "epoch", "final"]
    assert lines[0]["config"] == CONFIG.to_dict()
    assert lines[0].keys() >= {"command", "device", "threads", "torch", "commit", "parameters"}
    assert lines[2]["epoch"] == 2
    assert lines[2]["train_loss"] < lines[1]["train_loss"]
    assert lines[3]["tests"]["test"]["count"] == 50


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one epoch."""
    directory = tmp_path_factory.mktemp("one") / "run"
    assert train_tiny(directory, "--epochs", "1") == 0
    return directory


@pytest.mark.parametrize(("part", "left"), [("train", 64), ("train", 264), ("test", 49)])
@pytest.mark.parametrize("older", [False, True])
def test_other_data_than_the_run_began_with_is_refused(
    part: str,
    left: int,
    older: bool,
    one_epoch: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its epochs would not end where the data's do. Files of older versions only tell by that."""
    directory = shutil.copytree(one_epoch, tmp_path / "run")
    if older:
        state = load(directory)
        state.data = {}
        save(directory / CHECKPOINT, state)

    def load_less(source: Source) -> Dataset:
        dataset = load_tiny()
        split = getattr(dataset, part)
        return replace(dataset, **{part: Split(split.images[:left], split.labels[:left])})

    monkeypatch.setitem(DATASETS, "tiny", load_less)
    before = {p: p.read_bytes() for p in directory.iterdir()}
    resume = ["--resume", str(directory), "--epochs", "2"]
    if older and left != 64:  # as many steps an epoch
        assert train.main(resume) == 0
        return
    expected = rf"the run's {part} images are not .* must be \[\d+, \d+\], got \[{left},"
    if older:
        expected = "step 4 must be in or at the end of epoch 2 of 1 steps"
    with pytest.raises(UserError, match=expected):
        train.main(resume)
    assert before == {p: p.read_bytes() for p in directory.iterdir()}


def test_other_labels_of_as_many_images_are_other_data() -> None:
    dataset = load_tiny()
    assert dataset.fingerprint() == json.loads(json.dumps(dataset.fingerprint()))
    other = replace(dataset, train=Split(dataset.train.images, dataset.train.labels.flip(0)))
    assert other.fingerprint()["train"] != dataset.fingerprint()["train"]
    assert other.fingerprint()["test"] == dataset.fingerprint()["test"]

"""``python -m model.train`` as a user meets it: flags, what it leaves, what it refuses."""

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from model import evaluation, train
from model.arguments import new_config, parse, resumed_config
from model.checkpoint import load
from model.data import DATASETS, Dataset, Source
from model.directory import held
from model.environment import ROOT
from model.errors import UserError
from model.experiments import EXPERIMENTS
from model.metrics import read_metrics
from model.networks import build
from model.trainer import Trainer

from .tiny import STEPS_PER_EPOCH, load_tiny, train_tiny


def run(directory: Path, *flags: str) -> int:
    return train_tiny(directory, "--epochs", "1", *flags)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that had no time."""
    directory = tmp_path_factory.mktemp("stopped") / "run"
    assert run(directory, "--max-minutes", "0") == 0
    return directory


def test_flags_reach_the_configuration() -> None:
    flags = """--experiment mnist --epochs 7 --batch-size 100 --lr 0.002 --lr-decay 0.95
        --routings 2 --lam-recon 0.001 --shift-pixels 3 --seed 5 --backend reference --amp
        --accumulate 4 --margin authors --lr-schedule steps --lr-decay-steps 99
        --warmup-steps 8"""
    config = new_config(parse(flags.split()))
    assert config.architecture.routings == 2
    assert config.architecture.reconstruction
    values = config.to_dict()
    assert {k: v for k, v in values.items() if k != "architecture"} == {
        "dataset": "mnist", "epochs": 7, "batch_size": 100, "lr": 0.002, "lr_decay": 0.95,
        "lam_recon": 0.001, "shift_pixels": 3, "seed": 5, "backend": "reference", "amp": True,
        "accumulate": 4, "margin": "authors", "lr_schedule": "steps", "lr_decay_steps": 99,
        "compile": False, "stop_accuracy": None, "pairs": False, "flip": False, "jitter": False,
        "standardize": False, "tf32": False, "warmup_steps": 8,
    }  # fmt: skip
    assert not new_config(parse(["--lam-recon", "0"])).architecture.reconstruction


@pytest.mark.parametrize(
    ("name", "size"),
    [("mnist", 17), ("cifar10", 1), ("baseline-mnist", 1), ("baseline-multimnist", 4)],
)
def test_the_smallest_images(name: str, size: int) -> None:
    flags = ["--experiment", name, "--shift-pixels", "0", "--image-size"]
    config = new_config(parse([*flags, str(size)]))
    a = replace(config.architecture, conv_channels=4, capsule_types=2, hidden=4)
    assert build(a)(torch.rand(1, a.in_channels, size, size)).scores.isfinite().all()
    with pytest.raises(UserError, match="--image-size must be at least"):
        new_config(parse([*flags, str(size - 1)]))


def test_a_run_leaves_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "deep" / "run"
    assert run(directory) == 0
    names = {p.name for p in directory.iterdir() if not p.name.startswith("events.")}
    assert names == {
        "checkpoint.safetensors", "metrics.jsonl", "reconstructions.png", "weights.safetensors",
    }  # fmt: skip
    with Image.open(directory / "reconstructions.png") as picture:
        assert picture.size == (3 * (10 * 30 - 2), 3 * (4 * 30 - 2))
    shown = capsys.readouterr().err
    assert "test: error" in shown
    assert "of 50 wrong" in shown
    # The directory is taken now.
    with pytest.raises(UserError, match="holds a run already"):
        run(directory)


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "weights.safetensors", "events.out.tfevents.1700000000.here.9.0"]
)
def test_what_is_left_of_a_run_is_not_written_over(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("precious")
    with pytest.raises(UserError, match=f"--save-dir .* holds {name} of a run already"):
        run(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "precious"


def test_runs_of_the_same_second_get_a_directory_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    strftime = time.strftime
    monkeypatch.setattr("time.strftime", lambda form: strftime(form, time.gmtime(0)))
    for seed in "012":
        flags = ["--experiment", "tiny", "--max-minutes", "0", "--seed", seed]
        assert train.main(flags) == 0
    for seed, number in enumerate(("", "-2", "-3")):
        directory = tmp_path / "runs" / f"tiny-19700101-000000{number}"
        assert load(directory).config.seed == seed


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    """By a new run and a resumed one; once it is left, neither."""
    directory = tmp_path / "run"
    in_use = r" .*/run is in use by a run in"
    with held(directory, fresh=True), pytest.raises(UserError, match="^--save-dir" + in_use):
        run(directory)
    assert not list(directory.iterdir())
    assert run(directory, "--max-minutes", "0") == 0
    before = {p: p.read_bytes() for p in directory.iterdir()}
    with held(directory, fresh=False), pytest.raises(UserError, match="^--resume" + in_use):
        train.main(["--resume", str(directory)])
    assert before == {p: p.read_bytes() for p in directory.iterdir()}
    assert train.main(["--resume", str(directory)]) == 0


def test_a_file_system_without_locks_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EBADF, "as NFS says")

    monkeypatch.setattr("fcntl.flock", refused)
    with held(tmp_path / "run", fresh=True):
        assert (tmp_path / "run").is_dir()


@pytest.mark.parametrize("flags", [[], ["--tf32"]])
def test_what_a_cpu_does_not_have_is_said(
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)  # of all tests
    assert run(tmp_path / "run", "--device", "cpu", "--max-minutes", "0", *flags) == 0
    assert ("--tf32 is for GPUs" in capsys.readouterr().err) == bool(flags)


def test_paths_are_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not as markup, and so that a shell takes the command."""
    directory = tmp_path / "a [red] :star:"
    assert run(directory, "--max-minutes", "0") == 0
    shown = capsys.readouterr().err
    assert f" in {directory}\n" in shown
    assert f"weights: {directory}/weights.safetensors\n" in shown
    command = shlex.split(shown.rpartition("go on: ")[2])
    assert command[:3] == ["python", "-m", "model.train"]
    assert train.main(command[3:]) == 0


@pytest.mark.parametrize(
    ("flags", "processes", "expected"),
    [
        ("", 1, "python -m model.train --resume run --data-dir data"),
        ("", 2, "torchrun --nproc-per-node 2 -m model.train --resume run --data-dir data"),
        (
            "--data-dir x --cuda-graph --device cuda:1",
            1,
            "python -m model.train --resume run --data-dir x --device cuda:1 --cuda-graph",
        ),
    ],
)
def test_a_run_goes_on_as_it_ran(flags: str, processes: int, expected: str) -> None:
    assert train.go_on_command(parse(flags.split()), Path("run"), processes) == expected


@pytest.mark.parametrize(("flags", "tests"), [("--epochs 2", 2), ("--epochs 0", 1)])
def test_weights_are_tested_once(
    flags: str, tests: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tested = []
    test = Trainer.test
    monkeypatch.setattr(Trainer, "test", lambda *args: tested.append(args) or test(*args))
    assert run(tmp_path / "run", *flags.split()) == 0
    assert len(tested) == tests
    *_, before, final = read_metrics(tmp_path / "run" / "metrics.jsonl")
    (result,) = final["tests"].values()
    assert before["kind"] == "run" or before["test_error"] == result["error"]


def test_weights_are_where_a_run_starts(tmp_path: Path) -> None:
    run(tmp_path / "a")
    weights = tmp_path / "a" / "weights.safetensors"
    assert load(weights).data == load_tiny().fingerprint()
    with pytest.raises(UserError, match="nowhere is not there"):
        train.main(["--resume", "nowhere"])
    with pytest.raises(UserError, match="weights alone; --weights starts a new run"):
        train.main(["--resume", str(weights)])
    assert run(tmp_path / "b", "--epochs", "0", "--weights", str(weights)) == 0
    a, b = load(weights), load(tmp_path / "b" / "weights.safetensors")
    assert all(torch.equal(t, b.tensors[name]) for name, t in a.tensors.items())
    begun = [read_metrics(tmp_path / name / "metrics.jsonl")[0] for name in "ab"]
    assert [line["weights"] for line in begun] == [None, "a/weights.safetensors"]
    with pytest.raises(UserError, match="weights of another architecture"):
        run(tmp_path / "c", "--weights", str(weights), "--lam-recon", "0")


def test_the_seed_decides(tmp_path: Path) -> None:
    results = {}
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        run(tmp_path / name, "--seed", seed)
        results[name] = load(tmp_path / name).tensors["model.digits.weight"]
    assert torch.equal(results["a"], results["b"])
    assert not torch.equal(results["a"], results["c"])


def test_accumulation_is_the_same_step_in_parts(tmp_path: Path) -> None:
    run(tmp_path / "a")
    run(tmp_path / "b", "--accumulate", "4")
    a, b = (load(tmp_path / name).part("optimizer") for name in "ab")
    for name, expected in a.items():
        # Of a tensor's largest value the sums' other order changes up to 1e-5; many are below 1e-9.
        most = 1e-4 * float(expected.abs().max())
        assert most > 0, name
        torch.testing.assert_close(b[name], expected, rtol=0, atol=most)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--batch-size 0", "--batch-size must be at least 1, got 0"),
        ("--epochs -1", "--epochs must be at least 0, got -1"),
        ("--lr 0", "--lr must be above 0 and below 1e38, got 0.0"),
        ("--lr nan", "--lr must be above 0 and below 1e38, got nan"),
        ("--lr 1e39", "--lr must be above 0 and below 1e38, got 1e+39"),
        ("--lr-decay 0", "--lr-decay must be above 0, at most 1, got 0.0"),
        ("--lr-decay 1.1", "--lr-decay must be above 0, at most 1, got 1.1"),
        ("--lr-decay nan", "--lr-decay must be above 0, at most 1, got nan"),
        (f"--seed {2**64}", f"--seed must be below 2**63, got {2**64}"),
        ("--lam-recon nan", "--lam-recon must be at least 0 and finite, got nan"),
        ("--lam-recon inf", "--lam-recon must be at least 0 and finite, got inf"),
        ("--stop-accuracy 99", "--stop-accuracy must be above 0, at most 1, got 99.0"),
        ("--max-minutes nan", "--max-minutes must be at least 0, got nan"),
        ("--image-size 12", "--image-size must be at least 17 for this capsnet, got 12"),
        ("--experiment cifar10 --image-size 0", "--image-size must be at least 1 for this capsnet"),
        ("--experiment baseline-mnist --image-size -3", "must be at least 1 for this cnn, got -3"),
        ("--experiment baseline-mnist --image-size 0", "must be at least 1 for this cnn, got 0"),
        (
            "--experiment baseline-multimnist --image-size 3",
            "at least 4 for this pooled-cnn, got 3",
        ),
        ("--image-size 1025", "--image-size must be at most 1024, got 1025"),
        ("--shift-pixels -1", "--shift-pixels must be at least 0, got -1"),
        ("--lr-schedule steps --lr-decay-steps 0", "--lr-decay-steps must be at least 1"),
        ("--warmup-steps -1", "--warmup-steps must be at least 0"),
        ("--shift-pixels 29", "--shift-pixels must be at most the image's 28 pixels, got 29"),
        (f"--shift-pixels {10**20}", "--shift-pixels must be at most the image's 28 pixels, got 1"),
        (f"--routings {10**20}", "--routings must be at most 1000, got 1"),
        ("--backend triton", "--backend triton can't be used on cpu: "),
        ("--backend cuda", "--backend cuda can't be used on cpu: "),
        ("--in-channels 3", "--in-channels would do nothing here: the images of tiny have their"),
        ("--lr-decay-steps 9", "--lr-decay-steps would do nothing here: it is for --lr-schedule s"),
        (
            "--lr-schedule linear --lr-decay 0.5",
            "--lr-decay would do nothing here: with the linear --lr-schedule",
        ),
        ("--cuda-graph", "--cuda-graph needs one process on one GPU"),
        ("--routings 0", "--routings must be at least 1, got 0"),
        ("--accumulate 3", "--accumulate must divide --batch-size = 64, got 3"),
        ("--dataset mnist --data-dir nowhere", "nowhere/mnist/train-images-idx3-ubyte.gz is not"),
        ("--device tpu:7", "--device tpu:7 can't be used"),
        ("--device meta", "--device must be cpu, cuda or one GPU, such as cuda:1, got meta"),
        ("--device cuda:99", "--device cuda:99 can't be used"),
        ("--weights nowhere.safetensors", "nowhere.safetensors is not there"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    flags: str, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        run(tmp_path / "run", "--device", "cpu", *flags.split())
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["baseline-mnist", "baseline-multimnist"])
@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--routings 3", "it has no routing"),
        ("--backend reference", "it has no routing"),
        ("--no-bias", "it has no class capsules"),
        ("--margin paper", "it has no margin loss"),
        ("--lam-recon 0", "it has no decoder"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(name: str, flags: str, reason: str) -> None:
    """Of the network; a resumed run says it too."""
    flag = flags.split()[0].replace("no-", "")
    expected = f"{flag} would do nothing here: the network is a .*cnn"
    with pytest.raises(UserError, match=f"{expected}: {reason}"):
        new_config(parse(["--experiment", name, *flags.split()]))
    stored = new_config(parse(["--experiment", name]))
    with pytest.raises(UserError, match=f"{expected}: {reason}"):
        resumed_config(parse(["--resume", "run", *flags.split()]), stored)


def test_an_unwritable_directory_is_found_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(self: Trainer) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(Trainer, "step", never)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"--save-dir .*file/run can't be written: Not a directory"):
        run(tmp_path / "file" / "run")
    with pytest.raises(UserError, match=r"--save-dir /proc/run can't be written"):
        run(Path("/proc/run"))
    with (
        pytest.raises(UserError, match=r"--resume /proc/run can't be written"),
        held(Path("/proc/run"), fresh=False),
    ):
        pass


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--lr 0.5", "--lr 0.5 differs from the configuration of the run saved in"),
        ("--dataset mnist", "--dataset mnist differs"),
        ("--routings 1", "--routings 1 differs"),
        ("--lam-recon 0", "--lam-recon 0.0 differs"),
        ("--experiment mnist", "--experiment mnist is not the run saved in"),
        ("--save-dir elsewhere", "--save-dir can't be given with --resume"),
        ("--weights x.safetensors", "--weights can't be given with --resume"),
    ],
)
def test_resume_into_another_configuration_is_refused(
    flags: str, expected: str, stopped: Path
) -> None:
    before = {p: p.read_bytes() for p in stopped.iterdir()}
    with pytest.raises(UserError) as caught:
        train.main(["--resume", str(stopped), *flags.split()])
    assert expected in str(caught.value)
    assert before == {p: p.read_bytes() for p in stopped.iterdir()}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--experiment multimnist", "its image_size is 36, that of the run 28"),
        ("--experiment baseline-mnist", "its network is cnn, that of the run capsnet"),
        ("--experiment mnist-r1", "its routings is 1, that of the run 3"),
        ("--experiment mnist-1-epoch", "its batch_size is 64, that of the run 128"),
        ("--experiment mnist", "its lr is 0.001, that of the run 0.002"),
    ],
)
def test_resuming_another_experiment_is_refused(flags: str, expected: str) -> None:
    stored = new_config(parse(["--experiment", "mnist", "--lr", "0.002"]))
    with pytest.raises(UserError) as caught:
        resumed_config(parse(["--resume", "run", *flags.split()]), stored)
    assert str(caught.value).startswith(f"{flags} is not the run saved in run: {expected}")


def test_resuming_with_what_the_run_was_begun_with() -> None:
    """Its own flags once more, more epochs; classes and channels are the data's."""
    flags = ["--experiment=folder", "--lr=0.002", "--lr-schedule=epoch", "--backend=reference"]
    stored = new_config(parse(flags))
    stored = replace(
        stored, architecture=replace(stored.architecture, classes=3, in_channels=3), backend="auto"
    )
    wanted = resumed_config(parse(["--resume", "run", *flags, "--epochs", "99"]), stored)
    assert wanted == replace(stored, epochs=99, backend="reference")


def test_resume_for_more_epochs(tmp_path: Path) -> None:
    run(tmp_path / "run")
    assert train.main(["--resume", str(tmp_path / "run"), "--epochs", "2", "--lr", "3e-3"]) == 0
    assert load(tmp_path / "run").counters["epoch"] == 2


def test_resume_for_fewer_epochs_than_were_trained(tmp_path: Path) -> None:
    """It would end in the middle of an epoch, and its error be that of the fewer epochs."""
    run(tmp_path / "run", "--epochs", "2")
    resume = ["--resume", str(tmp_path / "run"), "--epochs"]
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"--epochs 1 can't be .*: the run is in epoch 3 already"):
        train.main([*resume, "1"])
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert train.main([*resume, "2"]) == 0


def test_resume_where_the_metrics_were_lost(tmp_path: Path) -> None:
    run(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert train.main(["--resume", str(tmp_path / "run"), "--epochs", "2"]) == 0
    kinds = [line["kind"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert kinds == ["epoch", "final"]


@pytest.mark.parametrize(("cut", "added", "kept"), [(-9, "", 1), (None, "{}\n", 2)])
def test_resume_where_the_metrics_were_torn_or_edited(
    cut: int | None, added: str, kept: int, tmp_path: Path
) -> None:
    """What is written next begins a line."""
    directory = tmp_path / "run"
    run(directory)
    path = directory / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(added + "".join(lines[:-1])[:cut])
    assert train.main(["--resume", str(directory), "--epochs", "2"]) == 0
    found = path.read_text().splitlines()
    assert [json.loads(line)["kind"] for line in found[kept:]] == ["epoch", "final"]


def test_a_loss_that_explodes_ends_the_run(tmp_path: Path) -> None:
    diverged = r"^the loss \(nan\) or the weights are not finite after step 4, in epoch 1: [^;]*$"
    with pytest.raises(UserError, match=diverged):  # no checkpoint, so none is named
        run(tmp_path / "run", "--lr", "1e30")


@pytest.mark.parametrize(("lr", "step"), [("1e30", 1), ("9e37", 0)])
def test_a_diverged_state_never_replaces_a_checkpoint(lr: str, step: int, tmp_path: Path) -> None:
    """The loss shows it a step late: with --lr 9e37 the first step's weights are infinite."""
    with pytest.raises(UserError, match=r"are not finite .*; the last checkpoint before that is"):
        run(tmp_path / "run", "--lr", lr, "--checkpoint-minutes", "0")
    state = load(tmp_path / "run")
    assert state.counters["step"] == step
    assert all(t.isfinite().all() for t in state.tensors.values())


def test_a_diverged_state_is_not_saved_when_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.step

    def interrupted_step(self: Trainer) -> None:
        step(self)
        if self.progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "step", interrupted_step)
    with pytest.raises(UserError, match="not finite after step 3"):
        run(tmp_path / "run", "--lr", "1e30")
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_the_wanted_accuracy_ends_the_run(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    assert run(directory, "--epochs", "9", "--stop-accuracy", "0.001") == 0
    last = read_metrics(directory / "metrics.jsonl")[-1]
    assert (last["outcome"], last["step"]) == ("accuracy reached", STEPS_PER_EPOCH)
    assert train.main(["--resume", str(directory)]) == 0
    assert load(directory).counters["step"] == STEPS_PER_EPOCH


@pytest.mark.parametrize(("wrong", "outcome"), [(10, "accuracy reached"), (11, "finished")])
def test_the_wanted_accuracy_itself_is_enough(
    wrong: int, outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 * (1 - 0.8) is less than 20."""
    result = evaluation.TestResult(0.5, wrong, 50, wrong, 50)
    monkeypatch.setattr(Trainer, "test", lambda *_: result)
    assert run(tmp_path / "run", "--stop-accuracy", "0.8") == 0
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["outcome"] == outcome


def test_one_line_and_exit_code_2_in_a_fresh_process(tmp_path: Path) -> None:
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "train-images-idx3-ubyte.gz").write_bytes(b"no")
    flags = ["--dataset", "mnist", "--data-dir", str(tmp_path), "--save-dir", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "model.train", *flags],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "train-images-idx3-ubyte.gz" in done.stderr or "labels" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_list_shows_every_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, experiment in EXPERIMENTS.items():
        (line,) = [line for line in lines if line.startswith(name + " ")]
        assert experiment.about in line
        assert experiment.paper in line


def test_every_data_set_has_an_experiment_of_its_name() -> None:
    assert DATASETS.keys() <= EXPERIMENTS.keys()


def test_what_the_metrics_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(source: Source) -> Dataset:
        tiny = load_tiny(source)
        return replace(tiny, test_name="held out", further_tests={"again": tiny.test})

    monkeypatch.setitem(DATASETS, "tiny", load)
    directory = tmp_path / "run"
    assert train_tiny(directory) == 0
    run, *epochs, final = read_metrics(directory / "metrics.jsonl")
    network = build(EXPERIMENTS["tiny"].config.architecture)
    assert run["processes"] == 1
    assert run["parameters"] == sum(p.numel() for p in network.parameters())
    assert [epoch["lr"] for epoch in epochs] == pytest.approx([3e-3, 3e-3 * 0.9])
    assert final["tests"].keys() == {"held out", "again"}
    assert final["tests"]["again"] == final["tests"]["held out"]

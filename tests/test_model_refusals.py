"""What a user of ``model/`` can get wrong: one sentence that names it, before anything is done."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model import arguments as command_line
from model import checkpoint as checkpoints
from model import commands, environment, errors, evaluate, networks, predict, train
from model.checkpoint import Checkpoint
from model.config import Config
from model.data import DATASETS, Dataset, Source, Split, digits, files
from model.errors import UserError
from model.figures.__main__ import main as draw_figures
from model.metrics import MetricsLog, read_metrics
from model.networks import build

from .tiny import ARCHITECTURE, CONFIG, load_tiny

CLASSES = tuple("0123456789")


def saved(path: Path, config: Config = CONFIG, classes: tuple[str, ...] = CLASSES) -> Path:
    """A checkpoint of untrained weights."""
    tensors = checkpoints.model_tensors(build(config.architecture, "reference"))
    checkpoints.save(path, Checkpoint(config, classes, tensors))
    return path


def with_architecture(**changes: Any) -> Config:
    return replace(CONFIG, architecture=replace(CONFIG.architecture, **changes))


def test_packages_that_are_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("sklearn.datasets", "pooch", "scipy.io", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)  # as Python has it: no such module
    with pytest.raises(UserError, match="--dataset digits needs scikit-learn"):
        digits.load()
    remote = files.Remote("https://example.org/x", "md5:0")
    with pytest.raises(UserError, match="--download needs two packages: pip install pooch tqdm"):
        files.fetch(remote, tmp_path / "x")
    with pytest.raises(UserError, match=r"reading \.mat files needs scipy"):
        files.read_mat(tmp_path / "x.mat")
    log = MetricsLog(tmp_path)  # TensorBoard is left out
    log.write("epoch", 1, {"loss": 0.5})
    log.image("picture", torch.zeros(2, 2, 3), 1)
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"kind": "epoch", "step": 1, "loss": 0.5}]


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl: can't be written: Is a directory"):
        MetricsLog(tmp_path)
    with pytest.raises(UserError, match=r"metrics\.jsonl: can't be read: .*Is a directory"):
        read_metrics(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match="can't be read: Is a directory"):
        files.read_bytes(tmp_path)
    log = MetricsLog(None)
    log.path = tmp_path  # as if it had become a directory while the run went on
    with pytest.raises(UserError, match="can't be written: Is a directory"):
        log.write("epoch", 1, {})
    log.close()


def test_resuming_with_what_would_be_another_run(tmp_path: Path) -> None:
    linear = replace(CONFIG, lr_schedule="linear")
    arguments = command_line.parse(["--resume", str(tmp_path), "--epochs", "3"])
    with pytest.raises(UserError, match="learning rate of the run falls to 0 over its 2 epochs"):
        command_line.resumed_config(arguments, linear)
    path = saved(tmp_path / "checkpoint.safetensors", classes=("a", "b"))
    state = checkpoints.load(path)
    state.tensors["progress.sums"] = torch.zeros(3)
    checkpoints.save(path, state)
    with pytest.raises(UserError, match="trained on the classes a, b; the data has 0, 1"):
        train.main(["--resume", str(path), "--device", "cpu"])


def test_evaluating_what_does_not_go_together(tmp_path: Path) -> None:
    run = saved(tmp_path / "a.safetensors")
    small = saved(tmp_path / "b.safetensors", with_architecture(image_size=32))
    with pytest.raises(UserError, match="--repeats must be at least 1, got 0"):
        evaluate.main([str(run), "--repeats", "0"])
    with pytest.raises(UserError, match=r"its image_size is 32, that of .* is 28"):
        evaluate.main([str(run), str(small)])


def test_networks_trained_on_other_classes_or_channels(tmp_path: Path) -> None:
    """Each of several, by evaluation and by figures."""
    run = saved(tmp_path / "a.safetensors")
    for config, classes, message in (
        (CONFIG, CLASSES[::-1], "b.safetensors: trained on the classes 9, 8.*; the data has 0, 1"),
        (with_architecture(classes=3), CLASSES[:3], "trained on the classes 0, 1, 2; the data has"),
        (with_architecture(in_channels=3), CLASSES, "trained on images of 3 channels; the data"),
    ):
        other = saved(tmp_path / "b.safetensors", config, classes)
        for command in (evaluate.main, draw_figures):
            with pytest.raises(UserError, match=message):
                command([str(run), str(other)])


def test_pictures_for_a_network_that_cannot_take_them(tmp_path: Path) -> None:
    two = saved(tmp_path / "two.safetensors", with_architecture(in_channels=2))
    with pytest.raises(UserError, match="sees images of 2 channels; pictures have 1 or 3"):
        predict.main(["x.png", "--weights", str(two)])


def test_a_plain_network_has_neither_decoder_nor_figures(tmp_path: Path, capsys) -> None:
    picture = tmp_path / "x.png"
    pytest.importorskip("PIL.Image").new("L", (28, 28)).save(picture)
    config = with_architecture(network="cnn", image_size=8, reconstruction=False)
    plain = saved(tmp_path / "cnn.safetensors", config)
    with pytest.raises(UserError, match=r"--reconstructions: the network in .* has no decoder"):
        predict.main([str(picture), "--weights", str(plain), "--reconstructions", "y.png"])
    with pytest.raises(UserError, match="figures need a capsule network, this is a cnn"):
        draw_figures([str(plain)])
    assert predict.main([str(picture), "--weights", str(plain)]) == 0  # probabilities
    assert "x.png" in capsys.readouterr().out


def test_a_backend_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the routing's own words, which is asked about the network's sizes."""
    cpu = torch.device("cpu")
    for name in ("auto", "reference"):
        networks.check_backend(name, cpu, ARCHITECTURE)
    with pytest.raises(UserError, match=r"^--backend cuda can't be used on cpu: [^:]") as caught:
        networks.check_backend("cuda", cpu, ARCHITECTURE)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"--backend magic can't be used on cpu: .* got 'magic'"):
        networks.check_backend("magic", cpu, ARCHITECTURE)

    def too_large(u: torch.Tensor, weight: torch.Tensor, R: int, backend: str) -> None:
        assert (u.shape, weight.shape, R) == ((0, 72, 4), (72, 10, 6, 4), 3)
        raise RuntimeError("fused_routing: backend 'auto' can't be used: 72 is too many")

    monkeypatch.setattr(networks, "fused_routing", too_large)
    with pytest.raises(UserError, match=r"^--backend auto can't be used on cpu: 72 is too many$"):
        networks.restored(Checkpoint(CONFIG, CLASSES, {}), Path(), cpu, "auto")
    networks.check_backend("auto", cpu, replace(ARCHITECTURE, network="cnn"))  # it has no routing


def test_a_split_without_images() -> None:
    empty = Split(torch.zeros(0, 1, 28, 28, dtype=torch.uint8), torch.zeros(0, dtype=torch.long))
    with pytest.raises(UserError, match="train: no images in it"):
        empty.check("train", 10)


@pytest.mark.parametrize("part", ["train", "test"])
def test_pairs_need_two_classes(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_fours(source: Source) -> Dataset:
        dataset = load_tiny()
        split = getattr(dataset, part)
        fours = split.labels == 4
        return replace(dataset, **{part: Split(split.images[fours], split.labels[fours])})

    monkeypatch.setitem(DATASETS, "tiny", load_fours)
    arguments = command_line.parse(["--data-dir", "here"])
    assert len(getattr(commands.open_dataset(CONFIG, arguments), part)) > 0
    expected = rf"^--data-dir here: overlapping pairs need {part} images .*, got \d+ of one class$"
    with pytest.raises(UserError, match=expected):
        commands.open_dataset(replace(CONFIG, pairs=True), arguments)


def test_interrupting_a_command_ends_it_with_130(capsys) -> None:
    def main() -> int:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit_info:
        errors.run_command(main)
    assert exit_info.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("main", "flags"),
    [
        (train.main, ["--resume"]),
        (train.main, ["--weights"]),
        (train.main, ["--dataset", "folder", "--data-dir"]),
        (train.main, ["--dataset", "mnist", "--data-dir"]),
        (evaluate.main, ["nowhere", "--json"]),
        (draw_figures, []),
    ],
)
def test_a_path_that_the_system_refuses(main: Any, flags: list[str], capsys) -> None:
    """Too long a name here; one in a folder that the user may not enter is refused alike."""
    name = "a" * 300
    with pytest.raises(SystemExit) as exit_info:
        errors.run_command(lambda: main([*flags, name]))
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert name in line
    assert line.endswith(": File name too long")


def test_an_error_of_no_file_keeps_its_traceback() -> None:
    def main() -> int:
        raise ConnectionError("of the program itself")

    with pytest.raises(ConnectionError):
        errors.run_command(main)


def test_names_that_the_locale_cannot_print() -> None:
    code = "from model.errors import run_command; run_command(lambda: print('\\u65e5 caf\\udce9'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=environment.ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii:strict"}, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "\\u65e5 caf\\udce9\n"), done.stderr


def test_a_machine_that_does_not_say_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise OSError

    monkeypatch.setattr(Path, "read_text", refused)
    monkeypatch.setattr(subprocess, "run", refused)
    assert environment.device_name(torch.device("cpu"))
    assert environment.commit() is None
    with pytest.raises(UserError, match="--device nonsense can't be used"):
        environment.choose_device("nonsense")


def test_a_commit_is_dirty_with_its_sources_and_not_with_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report that is gone on with changes files of its own."""

    def git(*arguments: str) -> str:
        names = ["-c", "user.name=n", "-c", "user.email=e"]
        command = ["git", *names, *arguments]
        done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    source, report = tmp_path / "source.py", tmp_path / "bench" / "results" / "report.json"
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    assert environment.commit() is None
    git("init", "--quiet")
    report.parent.mkdir(parents=True)
    for file in (source, report):
        file.write_text("first")
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    clean = git("rev-parse", "--short=12", "HEAD")
    assert environment.commit() == clean
    report.write_text("second")
    assert environment.commit() == clean
    source.write_text("second")
    assert environment.commit() == f"{clean}-dirty"

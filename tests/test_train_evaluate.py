"""``python -m model.evaluate`` and ``model.predict`` on a small trained network."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model import evaluate, predict, train
from model.checkpoint import CHECKPOINT, load, save
from model.data import DATASETS
from model.errors import UserError
from model.evaluation import confusion
from model.metrics import read_metrics

from .tiny import add_tiny, load_tiny


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    add_tiny(monkeypatch)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two short runs of different seeds."""
    directory = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        add_tiny(patch)
        for seed in ("0", "1"):
            flags = ["--epochs", "2", "--lr", "0.01", "--seed", seed]
            train.main(["--experiment", "tiny", "--save-dir", str(directory / seed), *flags])
    return [directory / "0", directory / "1"]


def final_errors(runs: list[Path]) -> list[float]:
    lines = [read_metrics(run / "metrics.jsonl")[-1] for run in runs]
    return [line["tests"]["test"]["error"] for line in lines]


def test_the_error_is_the_one_training_reported(runs: list[Path], tmp_path: Path) -> None:
    arguments = [*map(str, runs), "--ensemble", "--confusion", "--json", str(tmp_path / "x.json")]
    assert evaluate.main([str(runs[0]), *arguments]) == 0  # named twice, it counts once
    found = json.loads((tmp_path / "x.json").read_text())["tests"]["test"]
    errors = final_errors(runs)
    assert [found["runs"][str(run)]["error"] for run in runs] == errors
    assert found["mean"] == pytest.approx(np.mean(errors))
    assert found["std"] == pytest.approx(np.std(errors, ddof=1))
    assert found["runs"]["ensemble of 2"]["count"] == 50
    table = np.array(found["confusion"])
    assert table.sum() == 50
    wrong = table.sum() - table.trace()
    assert wrong == found["runs"]["ensemble of 2"]["wrong"]


def test_confusion_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.1, 0], [0.9, 0.1, 0], [0, 0.1, 0.9], [0, 0.9, 0]])
    labels = torch.tensor([[0], [1], [1], [1]])
    assert confusion(scores, labels).tolist() == [[1, 0, 0], [1, 1, 1], [0, 0, 0]]


def test_multimnist_counts_pairs_and_labels(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = load(runs[0])
    state.config = state.config.replaced({"pairs": True})
    save(tmp_path / CHECKPOINT, state)
    output = tmp_path / "x.json"
    assert evaluate.main([str(tmp_path), "--repeats", "3", "--json", str(output)]) == 0
    (found,) = json.loads(output.read_text())["tests"]["test"]["runs"].values()
    assert (found["count"], found["labels"]) == (150, 300)
    # A pair is wrong if one or both of its labels are missed.
    assert found["wrong"] <= found["labels_missed"] <= 2 * found["wrong"]
    first, *_ = pictures(tmp_path)
    capsys.readouterr()
    assert predict.main([first, "--weights", str(tmp_path)]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["image", "classes"]
    assert " and " in row
    with pytest.raises(UserError, match=r"its pairs is False, that of .* is True"):
        evaluate.main([str(tmp_path), str(runs[0])])


@pytest.mark.parametrize("flag", ["--ensemble", "--confusion"])
def test_scores_that_are_not_comparable_are_not_averaged(
    flag: str, runs: list[Path], tmp_path: Path
) -> None:
    state = load(runs[0])
    architecture = replace(state.config.architecture, network="cnn")
    state.config = replace(state.config, architecture=architecture)
    save(tmp_path / CHECKPOINT, state)
    with pytest.raises(UserError, match="the runs are of capsnet and cnn"):
        evaluate.main([str(runs[0]), str(tmp_path), flag])


def test_other_classes_are_refused(runs: list[Path], tmp_path: Path) -> None:
    state = load(runs[0])
    state.classes = tuple("abcdefghij")
    save(tmp_path / CHECKPOINT, state)
    with pytest.raises(UserError, match="trained on the classes a, b, c"):
        evaluate.main([str(tmp_path)])


def pictures(folder: Path) -> list[str]:
    """Some test images as picture files: as they are, inverted in colour, larger."""
    from model.data import Source

    images = load_tiny(Source(folder)).test.images[:3, 0].numpy()
    Image.fromarray(images[0]).save(folder / "0.png")
    Image.fromarray(images[1]).convert("RGB").resize((84, 84), 0).save(folder / "1.png")
    Image.fromarray(255 - images[0]).save(folder / "inverted.png")
    return [str(folder / name) for name in ("0.png", "1.png", "inverted.png")]


def test_predictions(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, inverted = pictures(tmp_path)
    weights = ["--weights", str(runs[0])]
    picture = tmp_path / "drawn.png"
    assert predict.main([first, second, *weights, "--reconstructions", str(picture)]) == 0
    shown = capsys.readouterr().out
    assert shown.split()[:2] == ["image", "class"]
    assert first in shown
    assert picture.exists()
    assert predict.main([first, *weights, "--json"]) == 0
    assert predict.main([inverted, *weights, "--json", "--invert"]) == 0
    a, b = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert a["classes"] == b["classes"]
    assert a["scores"] == b["scores"]
    assert len(a["scores"]) == 3
    assert a["classes"][0] == max(a["scores"], key=a["scores"].get)


def test_what_predict_refuses(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("not a picture")
    with pytest.raises(UserError, match=r"x\.png: not a whole picture"):
        predict.main([str(tmp_path / "x.png"), "--weights", str(runs[0])])
    first, *_ = pictures(tmp_path)
    with pytest.raises(UserError, match="nowhere is not there"):
        predict.main([first, "--weights", str(tmp_path / "nowhere")])


def test_names_are_shown_as_they_are(
    runs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """To rich ``[a]`` would be a style, ``[/a]`` the end of one, ``:star:`` a picture."""
    classes = (*(f"[{c}]:star:" for c in "abcdefghi"), "[/j]")
    odd = replace(load_tiny(None), classes=classes, test_name="held [out]")
    monkeypatch.setitem(DATASETS, "tiny", lambda source: odd)
    folder = tmp_path / "x["
    folder.mkdir()
    state = load(runs[0])
    state.classes = classes
    save(folder / "a].safetensors", state)
    assert evaluate.main([f"{folder}/a].safetensors", "--confusion"]) == 0
    shown = capsys.readouterr().out
    for name in (*classes, "held [out]", "x[/a].safetensors"):
        assert name in shown
    picture = Path(pictures(folder)[0]).rename(folder / "a].png")
    assert predict.main([str(picture), "--weights", f"{folder}/a].safetensors"]) == 0
    _, row = capsys.readouterr().out.splitlines()
    assert "x[/a].png" in row
    found, *best = [name for name in row.replace(",", "").split() if name in classes]
    assert len(best) == 3
    assert best[0] == found

"""``python -m model.evaluate`` and ``model.predict`` on a small trained network."""

import json
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from string import ascii_lowercase

import numpy as np
import pytest
import torch
from PIL import Image

from model import evaluate, predict
from model.checkpoint import CHECKPOINT, WEIGHTS, Checkpoint, load, model_tensors, save
from model.commands import plain_console
from model.data import DATASETS, NATIVE_SIZES, digits
from model.drawing import GAP, reconstruction_rows
from model.errors import UserError
from model.evaluation import confusion
from model.figures.__main__ import main as draw_figures
from model.metrics import read_metrics
from model.networks import build
from model.views import central_views, show

from .tiny import CONFIG, load_tiny, tiny_capsnet, train_tiny, variant


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two short runs of different seeds."""
    directory = tmp_path_factory.mktemp("runs")
    for seed in ("0", "1"):
        assert train_tiny(directory / seed, "--epochs", "2", "--lr", "0.01", "--seed", seed) == 0
    return [directory / "0", directory / "1"]


def final_errors(runs: list[Path]) -> list[float]:
    lines = [read_metrics(run / "metrics.jsonl")[-1] for run in runs]
    return [line["tests"]["test"]["error"] for line in lines]


def test_the_error_is_the_one_training_reported(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(runs[0])
    # By whatever name, a run counts once.
    again = [str(tmp_path / "link"), str(runs[0] / WEIGHTS), str(runs[1] / CHECKPOINT)]
    arguments = ["--ensemble", "--confusion", "--json", str(tmp_path / "x.json")]
    assert evaluate.main([*map(str, runs), *again, *arguments]) == 0
    found = json.loads((tmp_path / "x.json").read_text())["tests"]["test"]
    errors = final_errors(runs)
    assert [found["runs"][str(run)]["error"] for run in runs] == errors
    assert found["mean"] == pytest.approx(np.mean(errors))
    assert found["std"] == pytest.approx(np.std(errors, ddof=1))
    assert found["runs"]["ensemble of 2"]["count"] == 50
    assert capsys.readouterr().out.count("ensemble of 2") == 2  # the row, and above the confusion
    table = np.array(found["confusion"])
    assert table.sum() == 50
    wrong = table.sum() - table.trace()
    assert wrong == found["runs"]["ensemble of 2"]["wrong"]


def test_confusion_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.1, 0], [0.9, 0.1, 0], [0, 0.1, 0.9], [0, 0.9, 0]])
    labels = torch.tensor([[0], [1], [1], [1]])
    assert confusion(scores, labels).tolist() == [[1, 0, 0], [1, 1, 1], [0, 0, 0]]


@pytest.mark.parametrize("width", [80, 100_000])
def test_numbers_of_many_classes_stay_whole(width: int) -> None:
    """A terminal may be too narrow for 26 classes, but no 1,000 may become a 1."""
    names = tuple(f"letter-{letter}" for letter in ascii_lowercase)
    table = torch.arange(26 * 26).view(26, 26) + 1000
    console = plain_console(width=width)
    with console.capture() as shown:
        evaluate.show_confusion(console, replace(load_tiny(), classes=names), table)
    rows = shown.get().splitlines()[-26:]
    assert [row.split()[-26:] for row in rows] == [[str(n) for n in row] for row in table.tolist()]


def test_piped_rows_stay_lines(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = tmp_path / ("long " * 40).strip()
    copytree(runs[0], long)
    assert evaluate.main([str(long)]) == 0
    assert str(long) in capsys.readouterr().out


def test_multimnist_counts_pairs_and_labels(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = variant(runs[0], tmp_path / "run", pairs=True)
    output = tmp_path / "x.json"
    assert evaluate.main([str(run), "--repeats", "3", "--json", str(output)]) == 0
    (found,) = json.loads(output.read_text())["tests"]["test"]["runs"].values()
    assert (found["count"], found["labels"]) == (150, 300)
    # A pair is wrong if one or both of its labels are missed.
    assert found["wrong"] <= found["labels_missed"] <= 2 * found["wrong"]
    first, *_ = pictures(tmp_path)
    capsys.readouterr()
    assert predict.main([first, "--weights", str(run)]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["image", "classes"]
    assert " and " in row
    with pytest.raises(UserError, match=r"its pairs is False, that of .* is True"):
        evaluate.main([str(run), str(runs[0])])
    other = variant(run, tmp_path / "other", shift_pixels=6)
    with pytest.raises(UserError, match=r"other: its shift_pixels is 6, that of .* is 2"):
        evaluate.main([str(run), str(other)])


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


def pictures(folder: Path) -> list[str]:
    """Some test images as picture files: as they are, inverted in colour, larger."""
    images = load_tiny().test.images[:3, 0].numpy()
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


@pytest.mark.parametrize("count", [3, 10, 13])
def test_inputs_lie_above_their_reconstructions(count: int) -> None:
    network, data = tiny_capsnet(), load_tiny().test
    batch = show(CONFIG, data, central_views(CONFIG, data)[:count])
    capsules = network.capsules(batch.images)
    drawn = network.reconstruct(capsules, capsules.norm(dim=-1).argmax(-1, keepdim=True))[:, 0]
    picture = torch.from_numpy(reconstruction_rows(network, batch)).permute(2, 0, 1)
    size, step = 28, 28 + GAP
    assert picture.shape == (3, -(-count // 10) * 2 * step - GAP, min(count, 10) * step - GAP)
    for n in range(count):
        y, x = n // 10 * 2 * step, n % 10 * step
        for image, top in ((batch.images[n], y), (drawn[n], y + step)):
            found = picture[:, top : top + size, x : x + size]
            assert torch.equal(found, (image * 255).round().byte().expand(3, -1, -1))


def saved_scores(output: str) -> list[dict[str, float]]:
    """What ``predict --json`` said of each picture."""
    return [json.loads(line)["scores"] for line in output.splitlines()]


def of_size(size: int, folder: Path) -> Path:
    """A network for scikit-learn's digits seen through windows of another size, hardly trained."""
    flags = ["--image-size", str(size), "--epochs", "1", "--lr", "0.01"]
    assert train_tiny(folder / "run", *flags) == 0
    return variant(folder / "run", folder / "of digits", dataset="digits")


def test_pictures_are_seen_like_the_test_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training and test cut 20 x 20 windows out of 28 x 28 digits; so must prediction."""
    run = of_size(20, tmp_path)
    assert evaluate.main([str(run), "--json", str(tmp_path / "x.json")]) == 0
    (tested,) = json.loads((tmp_path / "x.json").read_text())["tests"].values()
    test = digits.load().test
    paths = [str(tmp_path / f"{n}.png") for n in range(len(test))]
    for path, image in zip(paths, test.images[:, 0].numpy(), strict=True):
        Image.fromarray(image).save(path)
    capsys.readouterr()
    assert predict.main([*paths, "--weights", str(run), "--json"]) == 0
    found = [json.loads(line)["classes"][0] for line in capsys.readouterr().out.splitlines()]
    wrong = sum(int(name) != label for name, label in zip(found, test.labels.tolist(), strict=True))
    assert wrong == tested["runs"][str(run)]["wrong"]


def test_a_picture_on_a_canvas_does_not_depend_on_its_neighbours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = of_size(36, tmp_path)
    first, second, _ = pictures(tmp_path)
    capsys.readouterr()
    assert predict.main([first, second, "--weights", str(run), "--json"]) == 0
    assert predict.main([second, "--weights", str(run), "--json"]) == 0
    _, among_others, alone = saved_scores(capsys.readouterr().out)
    assert alone == pytest.approx(among_others)


def test_every_data_set_says_the_size_of_its_images() -> None:
    assert set(NATIVE_SIZES) == set(DATASETS) - {"folder", "tiny"}


def test_what_is_inverted_is_the_picture_not_its_margins(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dark = load_tiny().test.images[0, 0, :, 8:20].numpy()
    Image.fromarray(dark).save(tmp_path / "dark.png")
    Image.fromarray(255 - dark).save(tmp_path / "bright.png")
    weights = ["--weights", str(runs[0]), "--json"]
    assert predict.main([str(tmp_path / "dark.png"), *weights]) == 0
    assert predict.main([str(tmp_path / "bright.png"), *weights, "--invert"]) == 0
    expected, inverted = saved_scores(capsys.readouterr().out)
    assert inverted == expected


@pytest.mark.parametrize(
    ("flags", "pairs", "reason"),
    [
        (["--confusion"], True, "an image shows a pair of classes"),
        (["--repeats", "3"], False, "each test image is seen in one way"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(
    flags: list[str], pairs: bool, reason: str, runs: list[Path], tmp_path: Path
) -> None:
    run = variant(runs[0], tmp_path / "run", pairs=pairs)
    with pytest.raises(UserError, match=f"^{flags[0]} would do nothing here: {reason}"):
        evaluate.main([str(run), *flags])


@pytest.mark.parametrize("pairs", [False, True])
def test_probabilities_are_those_of_the_loss(
    pairs: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained with a sigmoid for each class, two classes of a pair can both be certain."""
    architecture = replace(CONFIG.architecture, network="cnn", image_size=8)
    network = build(architecture)
    weights = {name: torch.zeros_like(t) for name, t in model_tensors(network).items()}
    bias = [name for name in weights if name.endswith("bias")][-1]
    weights[bias][:2] = 9
    config = replace(CONFIG, architecture=architecture, pairs=pairs)
    save(tmp_path / CHECKPOINT, Checkpoint(config, tuple("0123456789"), weights))
    assert predict.main([pictures(tmp_path)[0], "--weights", str(tmp_path), "--json"]) == 0
    (scores,) = saved_scores(capsys.readouterr().out)
    assert [scores["0"], scores["1"]] == pytest.approx([1, 1] if pairs else [0.5, 0.5], abs=1e-3)


def test_files_that_cannot_be_written_are_noticed_before_the_work(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")  # reading this run would be the first of the work
    weights = ["x.png", "--weights", nowhere]
    with pytest.raises(
        UserError, match=r"--json .*/gone/x\.json can't be written: .*gone is no fo"
    ):
        evaluate.main([nowhere, "--json", str(tmp_path / "gone" / "x.json")])
    with pytest.raises(UserError, match=r"--json .* can't be written: it is a folder, expected"):
        evaluate.main([nowhere, "--json", str(tmp_path)])
    with pytest.raises(UserError, match=r"--reconstructions .* can't be written: it is a folder"):
        predict.main([*weights, "--reconstructions", str(tmp_path)])
    with pytest.raises(UserError, match=r"--reconstructions .*: no file can be made in /proc: No"):
        predict.main([*weights, "--reconstructions", "/proc/x.png"])


def test_a_backend_that_cannot_be_used_here(runs: list[Path], tmp_path: Path) -> None:
    here = ["--device", "cpu", "--backend", "cuda"]
    commands = {
        evaluate.main: [str(runs[0])],
        predict.main: [pictures(tmp_path)[0], "--weights", str(runs[0])],
        draw_figures: [str(runs[0])],
    }
    for main, arguments in commands.items():
        with pytest.raises(UserError, match="--backend cuda can't be used on cpu: ") as caught:
            main([*arguments, *here])
        assert "\n" not in str(caught.value)


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
    odd = replace(load_tiny(), classes=classes, test_name="held [out]")
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

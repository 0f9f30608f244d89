"""``python -m model.figures``: every figure is drawn, and shows what it says."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from model.checkpoint import CHECKPOINT, Checkpoint, load, model_tensors, save
from model.config import Config
from model.data import DATASETS
from model.errors import UserError
from model.figures.__main__ import main
from model.figures.decoded import reconstructions
from model.figures.equivariance import rotated, shifted, thickened
from model.figures.routing import couplings, span
from model.figures.trained import Trained
from model.networks import build

from .tiny import ARCHITECTURE, CONFIG, load_tiny, tiny_capsnet, train_tiny, variant


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("figures") / "run"
    assert train_tiny(directory, "--epochs", "1") == 0
    return directory


def test_figures_of_one_object_and_of_pairs(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run)]) == 0
    single = {path.stem for path in run.glob("figure-*.png")}
    assert single == {
        f"figure-{name}"
        for name in ("reconstructions", "perturbations", "couplings", "equivariance", "iterations")
    }
    pairs = variant(run, tmp_path / "[pairs]", pairs=True)
    capsys.readouterr()
    assert main([str(pairs), "--only", "segmentations"]) == 0
    assert capsys.readouterr().out == f"{pairs}/figure-segmentations.png\n"
    with Image.open(pairs / "figure-segmentations.png") as picture:
        red, green, _ = picture.convert("RGB").split()
        assert red.tobytes() != green.tobytes()


def test_figures_of_a_few_own_pictures(tmp_path: Path) -> None:
    """Two classes of two pictures: one of each is held out."""
    for name, value in (("a", 80), ("b", 160)):
        (tmp_path / name).mkdir()
        for n in range(2):
            Image.new("L", (28, 28), value + n).save(tmp_path / name / f"{n}.png")
    run = tmp_path / "run.safetensors"
    config = replace(CONFIG, dataset="folder", architecture=replace(ARCHITECTURE, classes=2))
    save(run, Checkpoint(config, ("a", "b"), model_tensors(build(config.architecture))))
    assert main([str(run), "--data-dir", str(tmp_path)]) == 0
    assert len(list(tmp_path.glob("figure-*.png"))) == 5


def test_names_are_shown_as_they_are(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To matplotlib ``$a_$`` would be a formula, and a wrong one."""
    classes = tuple(f"${c}_$b" for c in "abcdefghij")
    monkeypatch.setitem(DATASETS, "tiny", lambda _: replace(load_tiny(), classes=classes))
    state = load(run)
    state.classes = classes
    folder = tmp_path / "$x_$"
    folder.mkdir()
    save(folder / CHECKPOINT, state)
    assert main([str(folder), "--only", "reconstructions", "iterations"]) == 0
    assert len(list(folder.glob("figure-*.png"))) == 2


def test_what_figures_refuse(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"segmentations can't be drawn of [^/]+/run: it shows"):
        main([str(run), "--only", "segmentations"])
    with pytest.raises(UserError, match="nowhere is not there"):
        main([str(tmp_path / "nowhere")])


def trained(config: Config = CONFIG) -> Trained:
    torch.manual_seed(0)
    data = load_tiny()
    return Trained("x", config, tiny_capsnet().eval(), data.test, data.classes)


def test_the_batch_shows_every_class() -> None:
    assert trained().batch(10).labels.flatten().tolist() == list(range(10))


@torch.no_grad()
def test_couplings_are_those_of_the_layer() -> None:
    one = trained()
    images = one.batch(2).images
    u = one.network.primary_capsules(images)
    c = couplings(one, u)
    grid = one.network.architecture.capsule_grid
    assert c.shape == (2, 2, grid, grid, 10)
    torch.testing.assert_close(c.sum(-1), torch.ones(2, 2, grid, grid))
    # The class capsules are the votes summed with these coefficients.
    votes = torch.einsum("ijdk,bik->bijd", one.network.digits.weight, u)
    s = torch.einsum("bij,bijd->bjd", c.flatten(1, 3), votes)
    n = s.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(n / (1 + n * n) * s, one.network.capsules(images))


@pytest.mark.parametrize("same_padding", [False, True])
def test_maps_of_couplings_lie_where_the_capsules_look(same_padding: bool) -> None:
    """The pixels that a capsule's gradient reaches: its patch."""
    network = tiny_capsnet(image_size=36, same_padding=same_padding)
    begin, end = span(network.architecture)
    grid = network.architecture.capsule_grid
    place = grid // 2
    image = torch.rand(1, 1, 36, 36, requires_grad=True)
    network.primary_capsules(image)[0, place * grid + place].sum().backward()
    rows = image.grad[0, 0].abs().sum(1).nonzero()
    assert len(rows) == 17
    assert rows.double().mean() == begin + (end - begin) / grid * (place + 0.5)


def test_titles_of_pairs_name_both_classes() -> None:
    """Else a pair would look wrong, or right, by one of its classes."""
    figure = reconstructions(trained(replace(CONFIG, pairs=True)))
    titles = [axes.get_title() for axes in figure.axes]
    assert all(re.fullmatch(r"(label|drawn as|found) \d, \d", title) for title in titles)
    columns = len(titles) // 3
    right = [
        set(label[-4:].split(", ")) == set(found[-4:].split(", "))
        for label, found in zip(titles[:columns], titles[-columns:], strict=True)
    ]
    assert right[0] < right[-1]
    assert right == sorted(right)  # the wrong ones come first


def test_the_legend_tells_runs_apart(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []

    def note(runs: list[Trained]) -> Figure:
        names.extend(one.name for one in runs)
        return Figure()

    monkeypatch.setattr("model.figures.__main__.error_by_iterations", note)
    monkeypatch.chdir(run)
    assert main([".", "weights.safetensors", "--only", "iterations"]) == 0
    assert names == [f"{run.parent.name}/run", "run/weights.safetensors"]


def test_changes_do_what_they_say() -> None:
    image = torch.zeros(1, 9, 9)
    image[0, 2, 3] = 1
    assert shifted(image, 2)[0, 2, 5] == 1
    assert shifted(image, -4).sum() == 0
    # A quarter turn about the middle (4, 4) takes what is above to the side.
    turned = rotated(image, 90)
    assert turned.sum() == pytest.approx(1, abs=1e-4)
    assert turned[0, 3, 6] + turned[0, 5, 2] == pytest.approx(1, abs=1e-4)
    assert thickened(image, 1).sum() == 9
    assert thickened(image, -1).sum() == 0
    assert torch.equal(thickened(image, 0), image)

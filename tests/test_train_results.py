"""docs/results.md says what the kept metrics say, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest

from model import results
from model.environment import without_paths
from model.errors import UserError
from model.experiments import EXPERIMENTS


def write_run(
    path: Path,
    seed: int,
    error: float,
    experiment: str = "mnist",
    outcome: str = "finished",
    epochs_trained: int = 1,
    test: str = "test",
    weights: str | None = None,
    **changes: Any,
) -> None:
    config = EXPERIMENTS[experiment].config.replaced(changes).to_dict() | {"seed": seed}
    if seed == 0:
        del config["warmup_steps"]  # an older version's, and no "weights" below
    about = {
        "kind": "run", "step": 0, "experiment": experiment, "config": config,
        "device": "abacus", "commit": "c0ffee", "command": f"python -m model.train --seed {seed}",
    }  # fmt: skip
    if seed > 0:
        about["weights"] = weights
    tests = {test: {"error": error, "wrong": 1, "count": 100}}
    final = {
        "kind": "final", "step": 9, "outcome": outcome, "tests": tests, "seconds": 3725.0 + seed
    }  # fmt: skip
    lines = [about, *[{"kind": "epoch", "step": 9}] * epochs_trained, final]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(results, "DOCS", tmp_path)
    (tmp_path / "results").mkdir()
    return tmp_path


def test_seeds_share_a_row(docs: Path) -> None:
    for seed, error in enumerate((0.25, 0.27, 0.29)):
        write_run(docs / "results" / f"{seed}.jsonl", seed, error)
    write_run(docs / "results" / "other.jsonl", 5, 0.4, "mnist-r1")
    assert results.main([]) == 0
    rows = (docs / "results.md").read_text().splitlines()[-2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert cells[0] == [
        "mnist", "0.25 +- 0.005 % (table 1)", "0.28 %", "test: 0.27 +- 0.02 %", "1", "0, 1, 2",
        "abacus", "1 h 2 min", "c0ffee", "`python -m model.train --seed 0`",
    ]  # fmt: skip
    assert cells[1][:4] == ["mnist-r1", "0.29 +- 0.011 % (table 1)", "-", "test: 0.4 %"]
    assert results.main(["--check"]) == 0
    write_run(docs / "results" / "0.jsonl", 0, 0.5)
    with pytest.raises(UserError, match="is not what docs/results/ gives"):
        results.main(["--check"])


def test_unfinished_runs_are_refused(docs: Path) -> None:
    path = docs / "results" / "x.jsonl"
    write_run(path, 0, 0.1)
    path.write_text("".join(path.open().readlines()[:-1]))
    with pytest.raises(UserError, match=r"x\.jsonl: not the metrics of a finished run"):
        results.main([])
    write_run(path, 0, 0.1, outcome="out of time")
    with pytest.raises(UserError, match=r"x\.jsonl: the run was out of time before its last"):
        results.main([])
    path.write_text("{torn")
    with pytest.raises(UserError, match=r"x\.jsonl: line 1 is not a JSON object"):
        results.main([])


def written(docs: Path) -> list[list[str]]:
    assert results.main([]) == 0
    lines = (docs / "results.md").read_text().splitlines()
    rows = lines[lines.index("|" + " --- |" * 10) + 1 :]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_figures_of_the_paper_stand_beside_their_own_experiment_only(docs: Path) -> None:
    for number, changes in enumerate(
        ({"dataset": "fashion-mnist", "routings": 1}, {"lam_recon": 0.0}, {"epochs": 3}, {})
    ):
        epochs = changes.get("epochs", 1)
        path = docs / "results" / f"{number}.jsonl"
        write_run(path, 1, 0.4, epochs_trained=epochs, **changes)
    for shift in (3, 6):
        for name in ("mnist-r1", "multimnist"):
            path = docs / "results" / f"{name}-{shift}.jsonl"
            write_run(path, shift, 0.4, name, shift_pixels=shift)
    rows = written(docs)
    # Other pairs make another test, whereas single digits are tested where they are.
    assert [row[0] for row in rows[-4:]] == [
        "mnist-r1", "mnist-r1", "multimnist with shift_pixels 3", "multimnist with shift_pixels 6",
    ]  # fmt: skip
    del rows[-4:]
    assert sorted(row[0] for row in rows[:2]) == ["mnist", "mnist"]
    assert {row[1] for row in rows[:2]} == {"0.25 +- 0.005 % (table 1)"}
    assert [row[:4] for row in rows[2:]] == [
        ["mnist with dataset fashion-mnist, routings 1", "-", "-", "test: 0.4 %"],
        ["mnist with reconstruction False", "-", "-", "test: 0.4 %"],
    ]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"test": "held-out"}, "mnist"),
        ({"epochs_trained": 2}, "mnist"),
        ({"weights": "a/weights.safetensors"}, "mnist with weights a/weights.safetensors"),
    ],
)
def test_runs_that_differ_in_more_than_the_seed(
    docs: Path, changes: dict[str, Any], name: str
) -> None:
    write_run(docs / "results" / "a.jsonl", 1, 0.4)
    write_run(docs / "results" / "b.jsonl", 2, 0.6, **changes)
    rows = written(docs)
    assert [row[0] for row in rows] == ["mnist", name]
    assert [row[3].split()[-2] for row in rows] == ["0.4", "0.6"]


def test_how_long_an_accuracy_took_is_no_difference(docs: Path) -> None:
    for seed, epochs in ((1, 9), (2, 8)):
        write_run(docs / "results" / f"{seed}.jsonl", seed, 0.4, "affnist", epochs_trained=epochs)
    (row,) = written(docs)
    assert row[4:6] == ["8, 9", "1, 2"]


def test_a_run_that_was_resumed_for_more_epochs_is_no_other(docs: Path) -> None:
    for seed, begun_for in ((1, 1), (2, 3)):
        path = docs / "results" / f"{seed}.jsonl"
        write_run(path, seed, 0.4, epochs_trained=3, epochs=begun_for)
    (row,) = written(docs)
    assert row[4:6] == ["3", "1, 2"]


def test_a_run_counts_once(docs: Path) -> None:
    for name in ("a", "b"):
        write_run(docs / "results" / f"{name}.jsonl", 3, 0.4)
    with pytest.raises(UserError, match=r"b\.jsonl: .* as .*a\.jsonl: its seed must be another, g"):
        results.main([])


def test_what_is_not_the_metrics_of_a_run(docs: Path) -> None:
    path = docs / "results" / "x.jsonl"

    def refused(expected: str) -> None:
        with pytest.raises(UserError, match=rf"x\.jsonl: {expected}") as caught:
            results.main([])
        assert "\n" not in str(caught.value)

    path.write_text("3\n")
    refused("line 1 is not a JSON object")
    write_run(path, 1, 0.4)
    whole = path.read_text()
    path.write_text(whole.replace('"experiment": "mnist"', '"experiment": "mnits"'))
    refused("experiment must be one of .*, got 'mnits'")
    path.write_text(whole.replace('"device"', '"gadget"'))
    refused("not the metrics of a run: 'device' is missing")
    path.write_text(whole.replace('"epochs": 50', '"epochs": "fifty"'))
    refused("not the metrics of a run: epochs must be of type int, got 'fifty'")
    path.write_text(whole.replace('"tests": {"test": ', '"tests": {"test": 3, "other": '))
    refused("not the metrics of a run: ")


def test_the_committed_table_is_up_to_date() -> None:
    if not (results.DOCS / "results.md").exists():
        pytest.skip("no results yet")
    assert results.main(["--check"]) == 0


def test_commands_are_kept_without_paths() -> None:
    line = "--experiment mnist --data-dir /somewhere --save-dir=/else --seed 1"
    assert without_paths(line.split()) == ["--experiment", "mnist", "--seed", "1"]

"""docs/results.md says what the kept metrics say, and nothing else."""

import json
from pathlib import Path

import pytest

from model import results
from model.environment import without_paths
from model.errors import UserError
from model.experiments import EXPERIMENTS


def write_run(
    path: Path, seed: int, error: float, experiment: str = "mnist", outcome: str = "finished"
) -> None:
    config = EXPERIMENTS[experiment].config.to_dict() | {"seed": seed}
    if seed == 0:
        del config["warmup_steps"]  # an older version's
    about = {
        "kind": "run", "step": 0, "experiment": experiment, "config": config,
        "device": "abacus", "commit": "c0ffee", "command": f"python -m model.train --seed {seed}",
    }  # fmt: skip
    tests = {"test": {"error": error, "wrong": 1, "count": 100}}
    final = {
        "kind": "final", "step": 9, "outcome": outcome, "tests": tests, "seconds": 3725.0 + seed
    }  # fmt: skip
    lines = [about, {"kind": "epoch", "step": 9}, final]
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


def test_the_committed_table_is_up_to_date() -> None:
    if not (results.DOCS / "results.md").exists():
        pytest.skip("no results yet")
    assert results.main(["--check"]) == 0


def test_commands_are_kept_without_paths() -> None:
    line = "--experiment mnist --data-dir /somewhere --save-dir=/else --seed 1"
    assert without_paths(line.split()) == ["--experiment", "mnist", "--seed", "1"]

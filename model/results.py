"""``python -m model.results``: docs/results.md, from the metrics of runs kept in docs/results/.

A file docs/results/NAME.jsonl is the ``metrics.jsonl`` of one finished run. Runs that differ in
nothing but their seed share a row.
"""

import argparse
import json
import statistics
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .checkpoint import write_atomically
from .config import Config
from .errors import UserError, run_command
from .experiments import EXPERIMENTS
from .metrics import read_metrics

DOCS = Path(__file__).resolve().parents[1] / "docs"

HEAD = """# Results

Made by `python -m model.results` from the metrics in `docs/results/`; do not edit. "Paper" is
Sabour, Frosst, Hinton 2017 (arXiv 1710.09829v2), "independent" the best published figure of another
implementation. Errors are of the last epoch, never of the best one; +- is the standard deviation
over seeds. Durations are of whole runs, with whatever ran beside them (three seeds at once, tests).

"""


@dataclass(frozen=True)
class Run:
    """One finished run: the line it began with, and the one it ended with."""

    about: dict[str, Any]
    final: dict[str, Any]
    epochs: int

    def kind(self) -> str:
        """Equal for runs that differ only in their seed.

        An option that a run's version did not have yet counts as its default.
        """
        config = replace(Config.from_dict(self.about["config"]), seed=0).to_dict()
        return json.dumps([self.about["experiment"], config, self.about["device"]], sort_keys=True)


def read_run(path: Path) -> Run:
    """UserError unless the file holds one run from its beginning to its end."""
    lines = read_metrics(path)
    kinds = [line.get("kind") for line in lines]
    if not lines or kinds[0] != "run" or kinds[-1] != "final":
        raise UserError(f"{path}: not the metrics of a finished run")
    if lines[-1].get("outcome") == "out of time":
        raise UserError(f"{path}: the run was out of time before its last epoch was over")
    return Run(lines[0], lines[-1], kinds.count("epoch"))


def spread(values: list[float]) -> str:
    """Mean, and standard deviation of more than one."""
    mean = statistics.fmean(values)
    return (
        f"{mean:.3g} %" if len(values) == 1 else f"{mean:.3g} +- {statistics.stdev(values):.2g} %"
    )


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def rows(runs: list[Run]) -> list[str]:
    """The table's rows, experiments in their declared order."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.kind()].append(run)
    order = list(EXPERIMENTS)
    written = []
    for group in sorted(groups.values(), key=lambda g: order.index(g[0].about["experiment"])):
        first = group[0]
        experiment = EXPERIMENTS[first.about["experiment"]]
        seeds = ", ".join(str(run.about["config"]["seed"]) for run in group)
        errors = [
            f"{name}: {spread([run.final['tests'][name]['error'] for run in group])}"
            for name in first.final["tests"]
        ]
        seconds = statistics.fmean(run.final["seconds"] for run in group)
        commits = ", ".join(sorted({str(run.about["commit"]) for run in group}))
        cells = [
            first.about["experiment"], experiment.paper, experiment.independent,
            "<br>".join(errors), f"{first.epochs}", seeds, first.about["device"],
            duration(seconds), commits, f"`{first.about['command']}`",
        ]  # fmt: skip
        written.append("| " + " | ".join(cells) + " |")
    return written


def document(runs: list[Run]) -> str:
    """The whole of docs/results.md."""
    names = [
        "experiment", "paper", "independent", "ours (test error)", "epochs", "seeds", "device",
        "duration", "commit", "command of the first",
    ]  # fmt: skip
    table = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names), *rows(runs)]
    return HEAD + "\n".join(table) + "\n"


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m model.results", description=__doc__)
    p.add_argument("--check", action="store_true", help="only see whether it is up to date")
    arguments = p.parse_args(argv)
    text = document([read_run(path) for path in sorted((DOCS / "results").glob("*.jsonl"))])
    path = DOCS / "results.md"
    if arguments.check:
        if not path.exists() or path.read_text() != text:
            raise UserError(f"{path} is not what docs/results/ gives: run python -m model.results")
        return 0
    write_atomically(path, text.encode())
    return 0


if __name__ == "__main__":
    run_command(main)

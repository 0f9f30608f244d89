"""``python -m model.results``: docs/results.md, from the metrics of runs kept in docs/results/.

A file docs/results/NAME.jsonl is the ``metrics.jsonl`` of one finished run. Runs that differ in
nothing but their seed share a row.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from .arguments import OF_THE_DATA
from .config import Config
from .environment import ROOT
from .errors import UserError, run_command
from .experiments import EXPERIMENTS
from .metrics import read_metrics
from .outputs import write_atomically

DOCS = ROOT / "docs"

HEAD = """# Results

Made by `python -m model.results` from the metrics in `docs/results/`; do not edit. "Paper" is
Sabour, Frosst, Hinton 2017 (arXiv 1710.09829v2), "independent" the best published figure of another
implementation. Errors are of the last epoch, never of the best one; +- is the standard deviation
over seeds. Durations are of whole runs, with whatever ran beside them (three seeds at once, tests).

"""


@dataclass(frozen=True)
class Run:
    """One finished run: what its first and its last line say."""

    path: Path
    experiment: str
    config: Config
    device: str
    commit: str | None
    weights: str | None
    """What the run started from, if not from chance. Older versions did not write it down."""
    command: str
    epochs: int
    seconds: float
    errors: dict[str, float]
    """Percent, by test set."""

    @classmethod
    def of(cls, path: Path, lines: list[dict[str, Any]]) -> Self:
        """From the lines of its metrics; UserError if what is needed of them is not there.

        An option that a run's version did not have yet counts as its default.
        """
        about, final = lines[0], lines[-1]
        try:
            weights = about.get("weights")
            return cls(
                path, str(about["experiment"]), Config.from_dict(about["config"]),
                str(about["device"]), about["commit"],
                None if weights is None else str(weights), str(about["command"]),
                sum(line.get("kind") == "epoch" for line in lines), float(final["seconds"]),
                {name: float(test["error"]) for name, test in final["tests"].items()},
            )  # fmt: skip
        except KeyError as error:
            raise UserError(f"{path}: not the metrics of a run: {error} is missing") from None
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(f"{path}: not the metrics of a run: {error}") from None

    def kind(self) -> Hashable:
        """Equal for runs that differ only in their seed.

        The epochs that count are those a run was trained for: resumed, it may have got others than
        it was begun for. But where an accuracy ends runs, how many it took them is a result.
        """
        epochs = self.epochs if self.config.stop_accuracy is None else self.config.epochs
        config = replace(self.config, seed=0, epochs=epochs)
        return self.experiment, config, self.device, self.weights, tuple(self.errors)

    def changes(self) -> list[str]:
        """What makes it another experiment than the one it is named for: data, network, start.

        Overlapping pairs are tested shifted as they are trained.

        Classes and channels follow from the data.
        """
        declared = EXPERIMENTS[self.experiment].config
        changes = []
        if self.config.dataset != declared.dataset:
            changes.append(f"dataset {self.config.dataset}")
        if self.config.pairs and self.config.shift_pixels != declared.shift_pixels:
            changes.append(f"shift_pixels {self.config.shift_pixels}")
        theirs = asdict(declared.architecture)
        for name, value in asdict(self.config.architecture).items():
            if value != theirs[name] and name not in OF_THE_DATA:
                changes.append(f"{name} {value}")
        if self.weights is not None:
            changes.append(f"weights {self.weights}")
        return changes


def read_run(path: Path) -> Run:
    """UserError unless the file holds one run from its beginning to its end."""
    lines = read_metrics(path)
    kinds = [line.get("kind") for line in lines]
    if not lines or kinds[0] != "run" or kinds[-1] != "final":
        raise UserError(f"{path}: not the metrics of a finished run")
    if lines[-1].get("outcome") == "out of time":
        raise UserError(f"{path}: the run was out of time before its last epoch was over")
    run = Run.of(path, lines)
    if run.experiment not in EXPERIMENTS:
        raise UserError(
            f"{path}: experiment must be one of python -m model.train --list, got "
            f"{run.experiment!r}"
        )
    return run


def grouped(runs: list[Run]) -> list[list[Run]]:
    """Runs that differ only in their seed together, experiments in their declared order, and those
    that were changed behind; UserError for two runs of one seed."""
    groups: dict[Hashable, list[Run]] = defaultdict(list)
    for run in runs:
        group = groups[run.kind()]
        for other in group:
            if other.config.seed == run.config.seed:
                raise UserError(
                    f"{run.path}: the same configuration and device as {other.path}: its seed must "
                    f"be another, got {run.config.seed} in both"
                )
        group.append(run)
    order = list(EXPERIMENTS)
    return sorted(
        groups.values(), key=lambda g: (order.index(g[0].experiment), bool(g[0].changes()))
    )


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
    """The table's rows. A figure of the paper stands only beside what it is for."""
    written = []
    for group in grouped(runs):
        first = group[0]
        name, experiment = first.experiment, EXPERIMENTS[first.experiment]
        paper, independent = experiment.paper, experiment.independent
        if changes := first.changes():
            name, paper, independent = f"{name} with {', '.join(changes)}", "-", "-"
        errors = [f"{test}: {spread([run.errors[test] for run in group])}" for test in first.errors]
        cells = [
            name, paper, independent, "<br>".join(errors),
            ", ".join(map(str, sorted({run.epochs for run in group}))),
            ", ".join(str(run.config.seed) for run in group), first.device,
            duration(statistics.fmean(run.seconds for run in group)),
            ", ".join(sorted({str(run.commit) for run in group})), f"`{first.command}`",
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

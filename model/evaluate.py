"""``python -m model.evaluate RUN...``: test errors of trained networks, and their spread."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from torch import Tensor

from . import checkpoint as checkpoints
from .checkpoint import Checkpoint
from .commands import add_data_flags, add_device_flags, open_dataset, table_console
from .config import Config
from .data import Dataset, Split
from .environment import choose_device
from .errors import UserError, require, run_command
from .evaluation import TestResult, confusion, scores_of
from .networks import restored
from .outputs import check_writable, write_atomically
from .views import evaluation_views, random_in_tests

States = list[tuple[Path, Checkpoint]]
"""Where each run is, and what was read there."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m model.evaluate", description=__doc__)
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories or weights")
    add_data_flags(p)
    p.add_argument("--ensemble", action="store_true", help="also average the networks' scores")
    p.add_argument(
        "--repeats", type=int, default=1, help="views of each test image where they are random"
    )
    p.add_argument(
        "--confusion",
        action="store_true",
        help="show which classes are confused (of several runs: by their average)",
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="write everything there too")
    add_device_flags(p)
    return p


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    require(arguments.repeats >= 1, "--repeats", "be at least 1", arguments.repeats)
    check_writable("--json", arguments.json)
    device = choose_device(arguments.device)
    states = [(run, checkpoints.load(run)) for run in each_once(arguments.runs)]
    config = same_data(states)
    if arguments.confusion and config.pairs:
        raise UserError("--confusion would do nothing here: an image shows a pair of classes")
    if arguments.ensemble or arguments.confusion:
        check_comparable(states)
    dataset = open_dataset(config, arguments).to(device)
    for run, state in states:
        checkpoints.check_data(state, dataset, run)
    tests = {dataset.test_name: dataset.test, **dataset.further_tests}
    if arguments.repeats > 1 and not any(random_in_tests(config, s) for s in tests.values()):
        raise UserError(
            "--repeats would do nothing here: each test image is seen in one way, from its middle"
        )
    console, together = table_console(), f"ensemble of {len(states)}"
    written: dict[str, Any] = {"dataset": config.dataset, "tests": {}}
    for name, split in tests.items():
        scores, labels = scores_of_runs(states, split, device, arguments)
        results = {
            str(run): TestResult.of(own, labels, state.config)
            for (run, state), own in zip(states, scores, strict=True)
        }
        if arguments.ensemble:
            results[together] = TestResult.of(scores.mean(0), labels, config)
        written["tests"][name] = show_results(console, name, results, len(states))
        if arguments.confusion:
            table = confusion(scores.mean(0), labels)
            written["tests"][name]["confusion"] = table.tolist()
            show_confusion(console, dataset, table, together if len(states) > 1 else None)
    if arguments.json is not None:
        write_atomically(arguments.json, json.dumps(written, indent=1).encode() + b"\n")
    return 0


def each_once(runs: list[Path]) -> list[Path]:
    """Runs without those that were named before, be it by another path or a file in them."""
    first: dict[Path, Path] = {}
    for run in runs:
        path = run.resolve()
        ours = path.name in (checkpoints.CHECKPOINT, checkpoints.WEIGHTS)
        first.setdefault(path.parent if ours else path, run)
    return list(first.values())


def same_data(states: States) -> Config:
    """The configuration of the first run; UserError unless all saw the same kind of images."""
    run, first = states[0]
    # Pairs are tested shifted as they are trained: another shift makes another test.
    names = ["dataset", "pairs", "image_size", *["shift_pixels"] * first.config.pairs]
    for other, state in states[1:]:
        ours, theirs = (vars(c.architecture) | vars(c) for c in (first.config, state.config))
        for name in names:
            a, b = ours[name], theirs[name]
            if a != b:
                raise UserError(f"{other}: its {name} is {b}, that of {run} is {a}")
    return first.config


def check_comparable(states: States) -> None:
    """UserError unless the networks' scores can be averaged."""
    kinds = {state.config.architecture.network for _, state in states}
    if "capsnet" in kinds and len(kinds) > 1:
        raise UserError(
            "--ensemble and --confusion average scores, and capsules' lengths are not comparable "
            f"with those of another network: the runs are of {' and '.join(sorted(kinds))}"
        )


def scores_of_runs(
    states: States, split: Split, device: torch.device, arguments: argparse.Namespace
) -> tuple[Tensor, Tensor]:
    """Scores [runs, M, J] of every network, one after another, and the labels [M, T] of all."""
    scores = []
    for run, state in states:
        network = restored(state, run, device, arguments.backend)
        views = evaluation_views(state.config, split, arguments.repeats)
        own, labels = scores_of(network, state.config, split, views)
        scores.append(own)
    return torch.stack(scores), labels


def show_results(
    console: Console, name: str, results: dict[str, TestResult], runs: int
) -> dict[str, Any]:
    """A table on the screen; the same as a dictionary."""
    pairs = any(r.labels > r.count for r in results.values())
    table = Table("run", "test error", "wrong", *["labels missed"] * pairs, title=name, box=None)
    for run, r in results.items():
        missed = [f"{100 * r.labels_missed / r.labels:.2f} %"] * pairs
        table.add_row(run, f"{r.error:.3f} %", f"{r.wrong:,} of {r.count:,}", *missed)
    errors = torch.tensor([r.error for r in results.values()][:runs], dtype=torch.float64)
    written: dict[str, Any] = {
        "runs": {run: vars(r) | {"error": r.error} for run, r in results.items()}
    }
    if runs > 1:
        written |= {"mean": float(errors.mean()), "std": float(errors.std())}
        table.add_row("mean +- std", f"{written['mean']:.3f} +- {written['std']:.3f} %", "")
    console.print(table)
    return written


def show_confusion(
    console: Console, dataset: Dataset, table: Tensor, title: str | None = None
) -> None:
    """Rows are true classes, columns what was found. Numbers stay whole where names are cut."""
    digits = len(str(int(table.max())))
    names = ("true \\ found", *dataset.classes)
    grid = Table(*(Column(name, min_width=digits) for name in names), title=title, box=None)
    for i, row in enumerate(table.tolist()):
        cells = [Text(str(n), "bold") if i == j else str(n or ".") for j, n in enumerate(row)]
        grid.add_row(dataset.classes[i], *cells)
    console.print(grid, crop=False)


if __name__ == "__main__":
    run_command(main)

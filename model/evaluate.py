"""``python -m model.evaluate RUN...``: test errors of trained networks, and their spread."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from capsule_kernels import backends

from . import checkpoint as checkpoints
from .checkpoint import Checkpoint, write_atomically
from .config import Config
from .data import Dataset, Source, load_dataset
from .environment import choose_device, table_console
from .errors import UserError, run_command
from .evaluation import TestResult, confusion, scores_of
from .networks import build


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m model.evaluate", description=__doc__)
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories or weights")
    p.add_argument("--data-dir", type=Path, default=Path("data"), metavar="DIR")
    p.add_argument("--download", action="store_true", help="fetch files that are missing")
    p.add_argument("--ensemble", action="store_true", help="also average the networks' scores")
    p.add_argument(
        "--repeats", type=int, default=1, help="views of each test image where they are random"
    )
    p.add_argument("--confusion", action="store_true", help="show which classes are confused")
    p.add_argument("--json", type=Path, metavar="FILE", help="write everything there too")
    p.add_argument("--backend", choices=("auto", *backends()), default="auto")
    p.add_argument("--device")
    return p


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.repeats < 1:
        raise UserError(f"--repeats must be at least 1, got {arguments.repeats}")
    device = choose_device(arguments.device)
    states = [(run, checkpoints.load(run)) for run in arguments.runs]
    config = same_data(states)
    kinds = {state.config.architecture.network for _, state in states}
    if "capsnet" in kinds and len(kinds) > 1 and (arguments.ensemble or arguments.confusion):
        raise UserError(
            "--ensemble and --confusion average scores, and capsules' lengths are not comparable "
            f"with those of another network: the runs are of {' and '.join(sorted(kinds))}"
        )
    a = config.architecture
    source = Source(arguments.data_dir, arguments.download, a.image_size, a.in_channels)
    dataset = load_dataset(config.dataset, source).to(device)
    for run, state in states:
        checkpoints.check_data(state, dataset, run)
    console = table_console()
    written: dict[str, Any] = {"dataset": config.dataset, "tests": {}}
    tests = {dataset.test_name: dataset.test, **dataset.further_tests}
    for name, split in tests.items():
        per_run = []
        for run, state in states:
            network = build(state.config.architecture, arguments.backend).to(device).eval()
            checkpoints.restore_model(network, state, run)
            per_run.append(scores_of(network, state.config, split, arguments.repeats))
        labels = per_run[0][1]
        results = {
            str(run): TestResult.of(scores, labels, state.config)
            for (run, state), (scores, _) in zip(states, per_run, strict=True)
        }
        mean_scores = torch.stack([scores for scores, _ in per_run]).mean(0)
        if arguments.ensemble:
            results[f"ensemble of {len(states)}"] = TestResult.of(mean_scores, labels, config)
        written["tests"][name] = show_results(console, name, results, len(states))
        if arguments.confusion and labels.shape[1] == 1:
            table = confusion(mean_scores, labels)
            written["tests"][name]["confusion"] = table.tolist()
            show_confusion(console, dataset, table)
    if arguments.json is not None:
        write_atomically(arguments.json, json.dumps(written, indent=1).encode() + b"\n")
    return 0


def same_data(states: list[tuple[Path, Checkpoint]]) -> Config:
    """The configuration of the first run; UserError unless all saw the same kind of images."""
    run, first = states[0]
    for other, state in states[1:]:
        for what in ("dataset", "pairs"):
            a, b = getattr(first.config, what), getattr(state.config, what)
            if a != b:
                raise UserError(f"{other}: its {what} is {b}, that of {run} is {a}")
        sizes = [s.config.architecture.image_size for s in (first, state)]
        if sizes[0] != sizes[1]:
            raise UserError(f"{other}: sees {sizes[1]} pixels, {run} sees {sizes[0]}")
    return first.config


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


def show_confusion(console: Console, dataset: Dataset, table: Tensor) -> None:
    """Rows are true classes, columns what was found."""
    grid = Table("true \\ found", *dataset.classes, box=None)
    for i, row in enumerate(table.tolist()):
        cells = [f"[bold]{n}[/]" if i == j else str(n or ".") for j, n in enumerate(row)]
        grid.add_row(dataset.classes[i], *cells)
    console.print(grid)


if __name__ == "__main__":
    run_command(main)

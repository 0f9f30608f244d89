"""Plots of recorded measurements: a roofline, time against batch, memory against batch."""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .records import Record, groups, select
from .routing import PASSES

matplotlib.use("agg")

STYLES: dict[str, dict[str, Any]] = {
    "ours": {"lw": 2.2, "marker": "o"},
    "compiled": {"ls": "--", "marker": "s"},
    "eager": {"ls": ":", "marker": "^"},
}


def draw(records: list[Record], ceilings: Record, folder: Path) -> list[Path]:
    """Write every plot that the records fill; returns the files."""
    timed = [r for r in select(records, table="routing", case="MNIST") if "seconds" in r]
    measured = [
        r for r in select(records, table="memory", case="MNIST") if r.get("extra_bytes", 0) > 0
    ]
    figures = {
        "roofline": roofline(timed, ceilings) if timed else None,
        "time": time_against_batch(timed) if timed else None,
        "memory": memory_against_batch(measured) if measured else None,
    }
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            folder.mkdir(exist_ok=True)
            paths.append(folder / f"{name}.svg")
            # Neither a date nor random ids: the same figures give the same file.
            with matplotlib.rc_context({"svg.hashsalt": name}):
                figure.savefig(paths[-1], metadata={"Date": None})
    return paths


def series(records: list[Record]) -> Iterator[tuple[str, dict[str, Any], list[Record]]]:
    """Label, style and records of each implementation in each precision."""
    for key, group in groups(records, "implementation", "family", "precision"):
        precision = "" if key["precision"] == "ieee" else f", {key['precision']}"
        yield key["implementation"] + precision, STYLES[key["family"]], group


def lines(axes: Axes, records: list[Record], field: str, scale: float) -> None:
    """One line an implementation, over the batch."""
    for label, style, group in series(records):
        group = sorted(group, key=lambda record: record["B"])
        axes.loglog(
            [record["B"] for record in group],
            [record[field] * scale for record in group],
            label=label,
            markersize=4,
            **style,
        )
    batches = sorted({record["B"] for record in records})
    axes.set_xticks(batches, [str(B) for B in batches], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("batch B")
    axes.grid(alpha=0.3)


def panels() -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, name in zip((left, right), PASSES, strict=True):
        axes.set_title(name)
    return figure, [left, right]


def add_legend(figure: Figure, axes: Axes) -> None:
    """One legend beside the panels: it must not hide a point."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)


def time_against_batch(timed: list[Record]) -> Figure:
    figure, both = panels()
    for axes, name in zip(both, PASSES, strict=True):
        lines(axes, select(timed, **{"pass": name}), "seconds", 1e3)
    both[0].set_ylabel("median time [ms]")
    add_legend(figure, both[1])
    figure.suptitle("Routing layer at the MNIST shape")
    return figure


def memory_against_batch(measured: list[Record]) -> Figure:
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    lines(axes, measured, "extra_bytes", 2**-20)
    axes.set_ylabel("extra memory of forward+backward [MiB]")
    add_legend(figure, axes)
    axes.set_title("Beyond inputs, outputs and gradients, at the MNIST shape")
    return figure


def roofline(timed: list[Record], ceilings: Record) -> Figure:
    """Useful operations a second against operations a byte, below the machine's measured limits."""
    figure, both = panels()
    for axes, name in zip(both, PASSES, strict=True):
        records = select(timed, **{"pass": name})
        intensity = [r["operations"] / r["bytes"] for r in records] or [1.0]
        span = [min(intensity) / 2, max(intensity) * 2]
        for _, group in groups(records, "precision"):
            peak = statistics.median(record["product_rate"] for record in group)
            knee = peak / ceilings["copy"]
            x = sorted({*span, min(max(knee, span[0]), span[1])})
            axes.loglog(x, [min(peak, v * ceilings["copy"]) / 1e9 for v in x], color="0.4")
        for label, style, group in series(records):
            axes.loglog(
                [r["operations"] / r["bytes"] for r in group],
                [r["operations"] / r["seconds"] / 1e9 for r in group],
                ls="none",
                marker=style["marker"],
                markersize=5,
                label=label,
            )
        axes.set_xlabel("operations a byte (both as the fused op needs them)")
        axes.grid(alpha=0.3, which="both")
    both[0].set_ylabel("GFLOP/s")
    add_legend(figure, both[1])
    figure.suptitle("Roofline: measured matrix product and copy, MNIST shape, B growing rightwards")
    return figure

"""How the time of the fused op grows: against B, I, J, R and threads, with fitted exponents.

Sizes start where the fixed cost of a call no longer counts. On a CPU the sizes of an axis are
measured in turns, several times round: a slow spell of the machine hits all of them. The sizes
differ tenfold in how long a call takes, so that each turn of a size counts as one mean.
"""

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import replace

import torch

from .fits import LINEAR, exponents, straight_line
from .machine import processors
from .options import (
    USUAL_ITERATIONS,
    add_iterations,
    add_peers_arguments,
    add_precision,
    add_rounds,
)
from .peers import Implementation, chosen_peers, ours
from .records import Record, groups, select, share_of_product
from .routing import Settings, measure_routing
from .shapes import Shape
from .timing import Timing

BASE = Shape("scaling", I=1152, J=10)
BASE_B = {"cpu": 64, "cuda": 512}
RANGES: dict[str, dict[str, tuple[int, ...]]] = {
    "cpu": {"B": (32, 64, 128, 320), "I": (288, 576, 1152, 2880), "J": (4, 10, 20, 40)},
    "cuda": {"B": (256, 512, 1024, 2560), "I": (576, 1152, 2304, 5760), "J": (4, 10, 20, 40)},
}
"""A decade of each size."""
TURNS_OF_A_ROUND = 2
"""On a CPU: what a round is for other measurements is too little for an exponent's last digits."""
ITERATIONS = (1, 3, 6, 12, 30)
FIRST_OF_DECADE = 3
"""The first iteration has nothing to agree with and is cheaper: from R = 1 on, equal costs of all
others would still look like an exponent above 1. It belongs to the straight line alone."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--axis", action="append", choices=("B", "I", "J", "R", "threads"), help="only this axis"
    )
    add_peers_arguments(parser, default="none")
    add_iterations(parser)
    add_precision(parser)
    add_rounds(parser)


def reason_against(options: argparse.Namespace) -> str | None:
    """Why these axes can't be measured so, or None: an axis has its own sizes."""
    axes = set(options.axis or ())
    if axes == {"R"} and options.iterations != USUAL_ITERATIONS:
        return "--iterations: axis R has its own"
    if axes == {"threads"} and options.threads:
        return "--threads: axis threads has its own"
    if "threads" in axes and options.device != "cpu":
        return "--axis threads: it is of a CPU"
    return None


def measure(options: argparse.Namespace, settings: Settings, _ceilings: Record) -> Iterator[Record]:
    """A record for each point of each axis, and pass."""
    settings = replace(settings, threads=settings.threads or torch.get_num_threads(), means=True)
    everyone = [*ours(settings.device), *chosen_peers(options)]
    axes = options.axis or ["B", "I", "J", "R", *(["threads"] if settings.device == "cpu" else [])]
    for axis in axes:
        yield from measure_axis(axis, everyone, settings)


def sizes_of(axis: str, device: str) -> tuple[int, ...]:
    if axis == "R":
        return ITERATIONS
    if axis == "threads":
        return tuple(n for n in (1, 2, 4, 8, 16, 32, 64) if n <= processors())
    return RANGES[device][axis]


def measure_axis(axis: str, everyone: list[Implementation], settings: Settings) -> Iterator[Record]:
    """Every size of the axis; interrupted or failed, what has been measured."""
    # A GPU is ours alone, and its inputs take seconds to make.
    on_cpu = settings.device == "cpu"
    turns = TURNS_OF_A_ROUND * settings.rounds if on_cpu else 1
    settings = replace(settings, rounds=1 if on_cpu else settings.rounds)
    measured: list[Record] = []
    try:
        for _ in range(turns):
            for size in sizes_of(axis, settings.device):
                measured += measure_point(axis, size, everyone, settings)
    except (KeyboardInterrupt, Exception):
        yield from merged(measured)
        raise
    yield from merged(measured)


def merged(turns: list[Record]) -> Iterator[Record]:
    """The turns of each point as one record; if one has failed, its record."""
    for _, group in groups(turns, "size", "pass", "implementation"):
        failed = [record for record in group if "seconds" not in record]
        if failed or len(group) == 1:
            yield (failed or group)[0]
            continue
        samples, rates = ([r[name] for r in group] for name in ("seconds", "product_rate"))
        timing = Timing.of(samples, group[0]["timed_by"])
        yield group[0] | timing.fields() | {"product_rate": statistics.median(rates)}


def point(axis: str, size: int, settings: Settings) -> tuple[Shape, int, Settings]:
    """Shape, batch and settings at a size of an axis."""
    B = size if axis == "B" else BASE_B[settings.device]
    shape = replace(BASE, I=size if axis == "I" else BASE.I, J=size if axis == "J" else BASE.J)
    chosen = replace(
        settings,
        R=size if axis == "R" else settings.R,
        threads=size if axis == "threads" else settings.threads,
    )
    return shape, B, chosen


def measure_point(
    axis: str, size: int, everyone: list[Implementation], settings: Settings
) -> Iterator[Record]:
    shape, B, chosen = point(axis, size, settings)
    for record in measure_routing(shape, B, everyone, chosen):
        yield record | {"table": "scaling", "axis": axis, "size": size}


def conclude(records: list[Record], _device: str) -> list[Record]:
    """The exponent of each implementation, axis and pass; of all but threads a straight line, and
    the share of the product's rate at the ends."""
    points = [point for point in select(records, table="scaling") if "seconds" in point]
    decade = [p for p in points if p["axis"] != "R" or p["size"] >= FIRST_OF_DECADE]
    found = exponents(decade, "seconds", LINEAR)
    for record in found:
        if record["axis"] == "threads":
            continue
        line = select(points, **{key: record[key] for key in ("implementation", "axis", "pass")})
        record |= straight_line([p["size"] for p in line], [p["seconds"] for p in line])
        if ones := select(line, size=1):
            record["first"] = ones[0]["seconds"]
        ends = [p for p in line if p["size"] in (record["from"], record["to"])]
        record["share_from"], record["share_to"] = map(share_of_product, ends)
    return found

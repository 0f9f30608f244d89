"""How the time of the fused op grows: against B, I, J, R and threads, with fitted exponents.

Sizes start where the fixed cost of a call no longer counts.
"""

import argparse
import os
from collections.abc import Iterator
from dataclasses import replace

import torch

from .fits import LINEAR, exponents
from .peers import Implementation, ours
from .records import Record, select
from .routing import Settings, measure_routing
from .shapes import Shape

BASE = Shape("scaling", I=1152, J=10)
BASE_B = {"cpu": 64, "cuda": 512}
RANGES: dict[str, dict[str, tuple[int, ...]]] = {
    "cpu": {"B": (32, 64, 128, 320), "I": (288, 576, 1152, 2880), "J": (4, 10, 20, 40)},
    "cuda": {"B": (256, 512, 1024, 2560), "I": (576, 1152, 2304, 5760), "J": (4, 10, 20, 40)},
}
"""A decade of each size."""
ITERATIONS = (3, 6, 12, 30)
"""The first iteration has nothing to agree with and is cheaper: from R = 1 on, equal costs of all
others would still look like an exponent above 1."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--axis", action="append", choices=("B", "I", "J", "R", "threads"), help="only this axis"
    )


def measure(options: argparse.Namespace, settings: Settings, _ceilings: Record) -> Iterator[Record]:
    """A record for each point of each axis, and pass."""
    settings = replace(settings, threads=settings.threads or torch.get_num_threads())
    fused = ours(settings.device)
    axes = options.axis or ["B", "I", "J", "R", *(["threads"] if settings.device == "cpu" else [])]
    for axis in axes:
        for size in sizes_of(axis, settings.device):
            yield from measure_point(axis, size, fused, settings)


def sizes_of(axis: str, device: str) -> tuple[int, ...]:
    if axis == "R":
        return ITERATIONS
    if axis == "threads":
        processors = len(os.sched_getaffinity(0))
        return tuple(n for n in (1, 2, 4, 8, 16, 32, 64) if n <= processors)
    return RANGES[device][axis]


def measure_point(
    axis: str, size: int, fused: list[Implementation], settings: Settings
) -> Iterator[Record]:
    B = size if axis == "B" else BASE_B[settings.device]
    shape = replace(BASE, I=size if axis == "I" else BASE.I, J=size if axis == "J" else BASE.J)
    chosen = replace(
        settings,
        R=size if axis == "R" else settings.R,
        threads=size if axis == "threads" else settings.threads,
    )
    for record in measure_routing(shape, B, fused, chosen):
        yield record | {"table": "scaling", "axis": axis, "size": size}


def conclude(records: list[Record], _device: str, _ceilings: Record) -> list[Record]:
    """The exponent of each implementation, axis and pass."""
    return exponents(select(records, table="scaling"), "seconds", LINEAR)

"""How a cost grows with a size, fitted to measurements: an exponent, and a straight line."""

import math
import statistics
from collections.abc import Iterable, Sequence

import torch

from .records import Record, groups

LINEAR = 1.05
"""An exponent up to here is "grows linearly"."""
CONSTANT = 0.1
"""An exponent up to here is "does not grow": the resident set is exact to some pages only."""


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Least-squares slope of log cost against log size."""
    x, y = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    return statistics.linear_regression(x, y).slope


def straight_line(sizes: Sequence[float], costs: Sequence[float]) -> Record:
    """The line ``fixed + each * size`` with the least squares of relative differences.

    A cost that grows by the same amount with every further unit lies on it. Its exponent is 1 only
    where nothing is fixed; below 0, because the first units are cheaper, it is above 1.
    ``off_line`` is the largest relative difference.
    """
    size, cost = torch.tensor([sizes, costs], dtype=torch.float64)
    rows = torch.stack([1 / cost, size / cost], dim=1)  # over the cost a line should be 1
    line = torch.linalg.lstsq(rows, torch.ones_like(cost)[:, None]).solution
    fixed, each = line.flatten().tolist()
    return {"fixed": fixed, "each": each, "off_line": (rows @ line - 1).abs().max().item()}


def exponents(points: Iterable[Record], cost: str, most: float) -> list[Record]:
    """One record for each implementation, axis and pass with more than one point.

    Points hold ``axis``, ``size`` and, if they were measured, a figure in the field ``cost``.
    ``most`` is the goal; thread counts, which should shrink the cost, have none.
    """
    measured = [point for point in points if point.get(cost, 0) > 0]
    fitted = []
    for key, line in groups(measured, "implementation", "axis", "pass"):
        if len(line) < 2:
            continue
        found = exponent([point["size"] for point in line], [point[cost] for point in line])
        record = {
            "table": "exponents",
            **key,
            "from": line[0]["size"],
            "to": line[-1]["size"],
            "exponent": found,
            "status": "ok",
        }
        if key["axis"] != "threads":
            record |= {"most": most, "verdict": "yes" if found <= most else "no"}
        fitted.append(record)
    return fitted

"""How a cost grows with a size, fitted to measurements: an exponent, and a straight line."""

import math
from collections.abc import Iterable, Sequence

from .records import Record, groups

LINEAR = 1.05
"""An exponent up to here is "grows linearly"."""
CONSTANT = 0.1
"""An exponent up to here is "does not grow": the resident set is exact to some pages only."""


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Least-squares slope of log cost against log size."""
    x, y = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - x_mean) ** 2 for a in x)


def straight_line(sizes: Sequence[float], costs: Sequence[float]) -> Record:
    """The line ``fixed + each * size`` with the least squares of relative differences.

    A cost that grows by the same amount with every further unit lies on it. Its exponent is 1 only
    where nothing is fixed; below 0, because the first units are cheaper, it is above 1.
    ``off_line`` is the largest relative difference.
    """
    # The line over the cost should be 1 everywhere: fixed * x + each * y = 1 in least squares.
    rows = [(1 / cost, size / cost) for size, cost in zip(sizes, costs, strict=True)]
    xx, xy, yy = (sum(row[m] * row[n] for row in rows) for m, n in ((0, 0), (0, 1), (1, 1)))
    x, y = (sum(row[m] for row in rows) for m in (0, 1))
    determinant = xx * yy - xy * xy
    fixed, each = (x * yy - y * xy) / determinant, (y * xx - x * xy) / determinant
    off_line = max(abs(fixed * x + each * y - 1) for x, y in rows)
    return {"fixed": fixed, "each": each, "off_line": off_line}


def exponents(points: Iterable[Record], cost: str, most: float | None) -> list[Record]:
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
        if most is not None and key["axis"] != "threads":
            record |= {"most": most, "verdict": "yes" if found <= most else "no"}
        fitted.append(record)
    return fitted

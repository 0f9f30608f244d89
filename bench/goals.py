"""How good it must be: each goal, what was measured for it, and whether it is met.

Goals are judged by pure functions of records. A goal whose measurement is missing is not met, and
says what is missing.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from . import memory, training
from .peers import Implementation, ours, peers
from .records import Record, select
from .routing import Settings, measure_routing
from .shapes import MANY_CLASSES, MNIST, SHAPES
from .tables import fastest, percent, rate_of_products, ratio, size

Measure = Callable[[list[Record], Record], float]
"""A value from records and ceilings."""
FORWARD, BOTH = "forward", "forward+backward"


class NotMeasuredError(LookupError):
    """There is no record for a goal; the message says which one."""


@dataclass(frozen=True)
class Goal:
    """``measure`` finds the value, ``text`` writes it; ``least`` or ``most`` bounds it."""

    what: str
    measure: Measure
    text: Callable[[float], str]
    least: float | None = None
    most: float | None = None

    def judge(self, records: list[Record], ceilings: Record) -> Record:
        """The goal as a record: text, measured value, and "yes", "no" or "not measured"."""
        bound = self.least if self.most is None else self.most
        assert bound is not None
        row = {
            "table": "goals",
            "what": self.what,
            "goal": ("<= " if self.least is None else ">= ") + self.text(bound),
        }
        try:
            value = self.measure(records, ceilings)
        except NotMeasuredError as error:
            return row | {"measured": str(error), "verdict": "not measured"}
        met = value >= bound if self.most is None else value <= bound
        return row | {
            "value": value,
            "measured": self.text(value),
            "verdict": "yes" if met else "no",
        }


def found(records: list[Record], **fields: object) -> Record:
    """The fastest record with these fields, which must have a time."""
    record = fastest(records, **fields)
    if record is None:
        statuses = {r["status"] for r in select(records, **fields)}
        names = ", ".join(str(value) for name, value in fields.items() if name != "table")
        raise NotMeasuredError(f"{names}: {'; '.join(sorted(statuses)) or 'no record'}")
    return record


def speedup(family: str, direction: str, B: int, case: str = "MNIST") -> Measure:
    """Time of the fastest peer of a family over ours."""

    def measure(records: list[Record], _ceilings: Record) -> float:
        where = {"table": "routing", "case": case, "B": B, "pass": direction}
        ours, peer = (found(records, family=f, **where) for f in ("ours", family))
        return peer["seconds"] / ours["seconds"]

    return measure


def share_of_gemm(direction: str, B: int) -> Measure:
    """Our rate of operations over that of the machine's own matrix product."""

    def measure(records: list[Record], ceilings: Record) -> float:
        ours = found(
            records, table="routing", case="MNIST", B=B, family="ours", **{"pass": direction}
        )
        return ours["operations"] / ours["seconds"] / rate_of_products(ours, ceilings)

    return measure


def least_speedup(direction: str, B: int) -> Measure:
    """The smallest speed-up over the fastest compiled peer among all shapes."""

    def measure(records: list[Record], ceilings: Record) -> float:
        return min(
            speedup("compiled", direction, B, shape.name)(records, ceilings) for shape in SHAPES
        )

    return measure


def extra_bytes(family: str, case: str, B: int) -> Measure:
    """Extra memory of forward+backward: the leanest implementation of the family."""

    def measure(records: list[Record], _ceilings: Record) -> float:
        where = {"table": "memory", "family": family, "case": case, "B": B}
        values = [r["extra_bytes"] for r in select(records, **where) if "extra_bytes" in r]
        if not values:
            raise NotMeasuredError(f"memory of {family}, {case}, B = {B}: no record")
        return min(values)

    return measure


def memory_ratio(case: str, B: int) -> Measure:
    def measure(records: list[Record], ceilings: Record) -> float:
        eager, ours = (extra_bytes(f, case, B)(records, ceilings) for f in ("eager", "ours"))
        return eager / max(ours, 1)

    return measure


def step_speedup(model: str, B: int) -> Measure:
    """Time of a training step of another model over that of ours."""

    def measure(records: list[Record], _ceilings: Record) -> float:
        where = {"table": "training", "part": "whole step", "B": B}
        other, ours = (found(records, implementation=name, **where) for name in (model, "fused"))
        return other["seconds"] / ours["seconds"]

    return measure


CPU_GOALS = (
    Goal("forward, B = 128, of eager", speedup("eager", FORWARD, 128), ratio, 30),
    Goal("forward, B = 128, of compiled", speedup("compiled", FORWARD, 128), ratio, 10),
    Goal("forward+backward, B = 128, of eager", speedup("eager", BOTH, 128), ratio, 30),
    Goal("forward+backward, B = 128, of compiled", speedup("compiled", BOTH, 128), ratio, 8),
    Goal("forward, B = 128, share of sgemm", share_of_gemm(FORWARD, 128), percent, 0.80),
    Goal("forward+backward, B = 128, share of sgemm", share_of_gemm(BOTH, 128), percent, 0.75),
    Goal("forward, B = 16, of compiled", speedup("compiled", FORWARD, 16), ratio, 4),
    Goal("forward+backward, B = 16, of compiled", speedup("compiled", BOTH, 16), ratio, 3),
    Goal("forward, B = 1, of compiled", speedup("compiled", FORWARD, 1), ratio, 1.5),
    Goal("forward+backward, B = 1, of compiled", speedup("compiled", BOTH, 1), ratio, 2),
    Goal("extra memory, B = 128, eager's over ours", memory_ratio("MNIST", 128), ratio, 50),
    Goal("seven shapes, B = 32, forward, of compiled", least_speedup(FORWARD, 32), ratio, 1),
    Goal(
        "seven shapes, B = 32, forward+backward, of compiled",
        least_speedup(BOTH, 32),
        ratio,
        1,
    ),
    Goal(
        "many classes, B = 32, extra memory",
        extra_bytes("ours", "many classes", 32),
        size,
        most=2**30,
    ),
    Goal("training step, B = 128, of the oracle's", step_speedup("oracle", 128), ratio, 1.4),
    Goal("training step, B = 128, of a popular one", step_speedup("popular", 128), ratio, 2.5),
)
"""Speed-ups are times of the fastest peer of that kind over ours."""


def judge(records: list[Record], ceilings: Record) -> list[Record]:
    """All goals, as records."""
    return [goal.judge(records, ceilings) for goal in CPU_GOALS]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only",
        choices=("batches", "shapes", "memory", "training"),
        help="measure only a part: MNIST at B = 1, 16, 128; seven shapes at B = 32; ...",
    )


def measure(options: argparse.Namespace, settings: Settings, ceilings: Record) -> Iterator[Record]:
    """What the goals need, then the goals."""
    records: list[Record] = []
    parts: dict[str, Callable[[], Iterator[Record]]] = {
        "batches": lambda: batches(settings),
        "shapes": lambda: shapes(settings, options.quick),
        "memory": lambda: memories(settings),
        "training": lambda: training.measure_steps(128, settings, (training.FUSED,)),
    }
    for name, part in parts.items():
        if options.only in (None, name):
            for record in part():
                records.append(record)
                yield record
    for verdict in judge(records, ceilings):
        if options.only is None or "value" in verdict:
            yield verdict


def batches(settings: Settings) -> Iterator[Record]:
    for B in (1, 16, 128):
        yield from measure_routing(MNIST, B, [*ours(settings.device), *strong_peers()], settings)


def shapes(settings: Settings, quick: bool) -> Iterator[Record]:
    compiled = [peer for peer in strong_peers() if peer.family == "compiled"]
    for shape in SHAPES[:1] if quick else SHAPES:
        yield from measure_routing(shape, 32, [*ours(settings.device), *compiled], settings)


def memories(settings: Settings) -> Iterator[Record]:
    eager = [peer for peer in strong_peers() if peer.family == "eager"]
    yield from memory.measure_memory(MNIST, 128, [*ours(settings.device), *eager], settings)
    yield from memory.measure_memory(MANY_CLASSES, 32, ours(settings.device), settings)


def strong_peers() -> list[Implementation]:
    return [peer for peer in peers() if "tiled" not in peer.name]

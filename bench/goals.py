"""How good it must be: each goal, what was measured for it, and whether it is met.

Goals are judged by pure functions of records. A goal whose measurement is missing is not met, and
says what is missing.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from . import memory, training
from .options import add_quick, add_rounds
from .peers import Implementation, ours, peers
from .precompile import GOALS_BATCHES, SMALL_BATCHES
from .records import Record, load, select, share_of_product
from .routing import BOTH, FORWARD, Settings, measure_routing
from .shapes import MANY_CLASSES, MNIST, SHAPES
from .tables import duration, percent, ratio, size

Measure = Callable[[list[Record]], float]
"""A value from records."""
OURS, EAGER, COMPILED = ({"family": family} for family in ("ours", "eager", "compiled"))
STEP_B = 128
"""Samples of a training step."""
AUTOTUNED = "autotuned"


class NotMeasuredError(LookupError):
    """A goal can't be judged; the message is the reason why its measurement failed, if it did."""


@dataclass(frozen=True)
class Goal:
    """``measure`` finds the value, ``text`` writes it; ``least`` or ``most`` bounds it."""

    what: str
    measure: Measure
    text: Callable[[float], str]
    least: float | None = None
    most: float | None = None

    def judge(self, records: list[Record]) -> Record:
        """The goal as a record: text, measured value, and "yes", "no" or "not measured"."""
        bound = self.least if self.most is None else self.most
        assert bound is not None
        row = {
            "table": "goals",
            "what": self.what,
            "goal": ("<= " if self.least is None else ">= ") + self.text(bound),
        }
        try:
            value = self.measure(records)
        except NotMeasuredError as error:
            return row | {"reason": str(error), "verdict": "not measured"}
        met = value >= bound if self.most is None else value <= bound
        return row | {
            "value": value,
            "measured": self.text(value),
            "verdict": "yes" if met else "no",
        }


def layer(
    direction: str,
    B: int,
    precision: str = "ieee",
    case: str = MNIST.name,
    beside: str | None = None,
) -> Record:
    """Which records are of a pass of the routing layer; ``beside``: measured in turn with these."""
    where = {"table": "routing", "case": case, "B": B, "pass": direction, "precision": precision}
    return where | {"beside": beside}


def layer_memory(case: str, B: int) -> Record:
    return {"table": "memory", "case": case, "B": B}


def step(model: str) -> Record:
    return {"table": "training", "part": training.WHOLE, "B": STEP_B, "implementation": model}


def with_figure(figure: str, records: list[Record], which: Record) -> list[Record]:
    """The records that have these values; each must have the figure, "seconds" or "extra_bytes":
    a peer that has failed may be the fastest."""
    found = select(records, **which)
    missing = [record for record in found if figure not in record]
    if missing or not found:
        reasons = {str(record.get("memory_status", record["status"])) for record in missing}
        raise NotMeasuredError("; ".join(sorted(reasons)))
    return found


def lowest(figure: str, which: Record) -> Measure:
    return lambda records: min(r[figure] for r in with_figure(figure, records, which))


def times_ours(figure: str, theirs: Record, own: Record) -> Measure:
    """Their lowest figure over our own; no bytes count as one."""
    other, fused = lowest(figure, theirs), lowest(figure, own)
    return lambda records: other(records) / (fused(records) or 1)


def speedup(peer: Record, where: Record, who: Record = OURS) -> Measure:
    """Time of the fastest peer of that kind over ours, of a pass of the layer."""
    return times_ours("seconds", peer | where, who | where)


def smallest(measures: Iterable[Measure]) -> Measure:
    each = list(measures)
    return lambda records: min(measure(records) for measure in each)


def least_speedup(direction: str, B: int) -> Measure:
    """The smallest speed-up over the fastest compiled peer among all shapes."""
    return smallest(speedup(COMPILED, layer(direction, B, case=shape.name)) for shape in SHAPES)


def share(where: Record) -> Measure:
    """Our rate of operations over that of the machine's own matrix product."""
    which = OURS | where
    return lambda records: share_of_product(
        min(with_figure("seconds", records, which), key=lambda record: record["seconds"])
    )


def memory_ratio(who: Record = OURS) -> Measure:
    """Extra memory of forward and backward at B = 128: the leanest eager peer's over ours."""
    where = layer_memory(MNIST.name, 128)
    return times_ours("extra_bytes", EAGER | where, who | where)


def cpu_goals() -> Iterator[Goal]:
    for direction, of_eager, of_compiled in ((FORWARD, 30, 10), (BOTH, 30, 8)):
        at, where = f"{direction}, B = 128, ", layer(direction, 128)
        yield Goal(f"{at}of eager", speedup(EAGER, where), ratio, of_eager)
        yield Goal(f"{at}of compiled", speedup(COMPILED, where), ratio, of_compiled)
    for direction, least in ((FORWARD, 0.80), (BOTH, 0.75)):
        what = f"{direction}, B = 128, share of sgemm"
        yield Goal(what, share(layer(direction, 128)), percent, least)
    for B, direction, least in ((16, FORWARD, 4), (16, BOTH, 3), (1, FORWARD, 1.5), (1, BOTH, 2)):
        what = f"{direction}, B = {B}, of compiled"
        yield Goal(what, speedup(COMPILED, layer(direction, B)), ratio, least)
    yield Goal("extra memory, B = 128, eager's over ours", memory_ratio(), ratio, 50)
    for direction in (FORWARD, BOTH):
        what = f"slowest of seven shapes, {direction}, B = 32, of compiled"
        yield Goal(what, least_speedup(direction, 32), ratio, 1)
    many = lowest("extra_bytes", OURS | layer_memory(MANY_CLASSES.name, 32))
    yield Goal("many classes, B = 32, extra memory", many, size, most=2**30)
    fused, oracle, popular = map(step, (training.FUSED, training.ORACLE, training.POPULAR))
    for what, figure, other, least in (
        ("training step, of the oracle's", "seconds", oracle, 1.4),
        ("training step, of a popular one", "seconds", popular, 2.5),
        ("training step, extra memory, the oracle's over ours", "extra_bytes", oracle, 2),
    ):
        yield Goal(what, times_ours(figure, other, fused), ratio, least)


H200_FLOORS = {
    ("ieee", FORWARD): 20e-6,
    ("tf32", FORWARD): 6e-6,
    ("ieee", BOTH): 59e-6,
    ("tf32", BOTH): 20e-6,
}
"""Counted for an H200 at the MNIST shape and B = 128 [s]; they grow with B."""


def of_floor(who: Record, direction: str, B: int, precision: str) -> Measure:
    """The H200's floor over our time."""
    floor = H200_FLOORS[precision, direction] * B / 128
    seconds = lowest("seconds", who | layer(direction, B, precision))
    return lambda records: floor / seconds(records)


@dataclass(frozen=True)
class GpuTargets:
    """Goals of a GPU backend at the MNIST shape on an H200."""

    times: dict[tuple[str, str], float]
    of_einsum: float
    of_max_autotune: float
    share_of_floor: float


def autotuned_peers() -> list[Implementation]:
    return [peer for peer in peers(("max-autotune",)) if peer.family == "compiled"]


GPU_TARGETS = {
    "triton": GpuTargets({("tf32", FORWARD): 40e-6, ("tf32", BOTH): 120e-6}, 15, 5, 0.4),
    "cuda": GpuTargets(
        {("tf32", FORWARD): 15e-6, ("ieee", FORWARD): 35e-6, ("tf32", BOTH): 50e-6}, 30, 10, 0.5
    ),
}


def gpu_goals() -> Iterator[Goal]:
    einsum = {"implementation": "eager einsum"}
    autotuned = [{"implementation": peer.name} for peer in autotuned_peers()]
    for backend, targets in GPU_TARGETS.items():
        who = {"implementation": f"ours ({backend})"}
        for (precision, direction), most in targets.times.items():
            what = f"{backend}: {direction}, B = 128, {precision}"
            measure = lowest("seconds", who | layer(direction, 128, precision))
            yield Goal(what, measure, duration, most=most)
        for direction in (FORWARD, BOTH):
            where, at = layer(direction, 128, "tf32"), f"{backend}: {direction}, B = 128, tf32, "
            of_eager = speedup(einsum, where, who)
            yield Goal(f"{at}of eager einsum", of_eager, ratio, targets.of_einsum)
            beside = layer(direction, 128, "tf32", beside=AUTOTUNED)
            of_fastest = smallest(speedup(peer, beside, who) for peer in autotuned)
            yield Goal(f"{at}of compiled, max-autotune", of_fastest, ratio, targets.of_max_autotune)
            what = f"{backend}: {direction}, B = 1024, tf32, share of the H200's floor"
            measure = of_floor(who, direction, 1024, "tf32")
            yield Goal(what, measure, percent, targets.share_of_floor)
        what = f"{backend}: extra memory, B = 128, eager's over ours"
        yield Goal(what, memory_ratio(who), ratio, 50)


GOALS = {"cpu": tuple(cpu_goals()), "cuda": tuple(gpu_goals())}
"""Speed-ups are times of the fastest peer of that kind over ours."""


def conclude(records: list[Record], device: str) -> list[Record]:
    """Every goal of the device, as records."""
    return [goal.judge(records) for goal in GOALS[device]]


PARTS = {
    "cpu": ("batches", "shapes", "memory", "training"),
    "cuda": ("batches", "memory", "training", "small batches", AUTOTUNED),
}
"""What is measured on a device, the most wanted first."""
MORE_ROUNDS = 4
"""Times as many rounds where most goals of a CPU are judged: processors that others share have slow
spells, and in five rounds the slowest peers are called five times. No round starts after
``timing.PATIENCE``, though: forward and backward at B = 128 had five of these twenty."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only",
        action="append",
        choices=sorted({part for parts in PARTS.values() for part in parts}),
        help="measure only a part (repeatable): MNIST at several batches (on a GPU at 128 and "
        "1024, the small ones are another part); the seven shapes at B = 32; memory; a training "
        "step; against torch.compile(mode='max-autotune')",
    )
    parser.add_argument(
        "--with",
        dest="earlier",
        type=Path,
        metavar="FILE",
        help="judge with what an earlier run wrote by --json, too, and keep it",
    )
    add_rounds(parser)
    add_quick(parser, "shapes and rounds")


def reason_against(options: argparse.Namespace) -> str | None:
    """Why the parts asked for can't be measured or drawn, or None."""
    known = PARTS[options.device]
    if unknown := [part for part in options.only or () if part not in known]:
        device = {"cpu": "CPU", "cuda": "GPU"}[options.device]
        return f"--only {unknown[0]!r}: of a {device} there are {', '.join(known)}"
    if options.plots and set(options.only or ()) == {"training"}:
        return "--plots: they are of the routing layer, which --only leaves out"
    if options.earlier:
        try:
            load(options.earlier)
        except (OSError, ValueError) as error:
            return f"--with: {error}"
    return None


def measure(options: argparse.Namespace, settings: Settings, _ceilings: Record) -> Iterator[Record]:
    """What the goals are judged by."""
    parts: dict[str, Callable[[], Iterator[Record]]] = {
        "batches": lambda: batches(settings),
        "shapes": lambda: shapes(settings, options.quick),
        "memory": lambda: memories(settings),
        "training": lambda: training.measure_steps(
            STEP_B, settings, (training.FUSED, training.ORACLE, training.POPULAR), (training.FUSED,)
        ),
        AUTOTUNED: lambda: autotuned(settings),
        "small batches": lambda: small_batches(settings),
    }
    if options.earlier:
        _, _, records = load(options.earlier)
        yield from (record for record in records if record["table"] != "goals")
    for name in options.only or PARTS[settings.device]:
        yield from parts[name]()


def batches(settings: Settings) -> Iterator[Record]:
    """MNIST at the batches of the goals; on a GPU with TF32, too.

    There the goals at the large batch are about ours alone, and no peer is compiled for it.
    """
    everyone = [*ours(settings.device), *strong_peers()]
    if settings.device == "cpu":
        patient = replace(settings, rounds=MORE_ROUNDS * settings.rounds)
        for B in (1, 16, 128):
            yield from measure_routing(MNIST, B, everyone, patient)
        return
    eager = [one for one in everyone if one.family != "compiled"]
    for B, measured in zip(GOALS_BATCHES, (everyone, eager), strict=True):
        for precision in ("tf32", "ieee"):
            yield from measure_routing(MNIST, B, measured, replace(settings, precision=precision))


def small_batches(settings: Settings) -> Iterator[Record]:
    """MNIST at batches that no goal of a GPU is about."""
    everyone = [*ours(settings.device), *strong_peers()]
    for B in SMALL_BATCHES:
        yield from measure_routing(MNIST, B, everyone, replace(settings, precision="ieee"))


def autotuned(settings: Settings) -> Iterator[Record]:
    """MNIST at B = 128 with TF32 against the peers that Inductor tunes for minutes."""
    everyone = [*ours(settings.device), *autotuned_peers()]
    for record in measure_routing(MNIST, 128, everyone, replace(settings, precision="tf32")):
        yield record | {"beside": AUTOTUNED}


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

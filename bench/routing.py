"""Time of the routing layer: forward and forward+backward, ours and the peers', interleaved."""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from .machine import product
from .options import (
    add_iterations,
    add_peers_arguments,
    add_precision,
    add_quick,
    add_rounds,
    positive,
)
from .peers import (
    ORACLE_STORED,
    Implementation,
    Routing,
    check_equal,
    chosen_peers,
    oracle,
    ours,
    outputs_and_gradients,
    reason_it_does_not_fit,
)
from .records import CannotRunError, Record, reason_of
from .shapes import CONVOLUTION, MNIST, SHAPES, SHARED, Inputs, Shape, make_inputs
from .timing import Timing, interleave, make_timer

FORWARD, BOTH = PASSES = ("forward", "forward+backward")
SLICE_SECONDS = {"cpu": 0.05, "cuda": 0.02}
"""Of a variant in its turn. A GPU is nobody else's, and its calls are short."""
MAX_INPUT_SETS = 64
CHECKED_SAMPLES = 8
PRODUCT = "the machine's own matrix product"
"""Timed among the variants, so that shares of its rate are taken under the same conditions."""


@dataclass(frozen=True)
class Settings:
    """What all measurements of a run have in common."""

    device: str = "cpu"
    precision: str = "ieee"  # or "tf32": what torch's float32 matmul precision was set to
    dtype: torch.dtype = torch.float32
    R: int = 3
    rounds: int = 5
    slice_seconds: float = 0.05
    threads: int | None = None  # torch's choice
    means: bool = False  # of each turn, instead of its samples: see timing.interleave

    def apply(self) -> None:
        """Set torch's threads, and its precision of float32 products."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        torch.set_float32_matmul_precision("high" if self.precision == "tf32" else "highest")


def run_forward(routing: Routing, inputs: Inputs, R: int) -> object:
    with torch.no_grad():
        return routing(inputs.u, inputs.weight, R)


RUN: dict[str, Callable[[Routing, Inputs, int], object]] = {
    FORWARD: run_forward,
    BOTH: outputs_and_gradients,
}


def input_sets(shape: Shape, B: int, settings: Settings) -> list[Inputs]:
    """On a GPU so many that together they exceed twice the L2; one on a CPU."""
    count = 1
    if settings.device == "cuda":  # needs a GPU
        L2 = torch.cuda.get_device_properties(0).L2_cache_size
        bytes_of_one = shape.bytes(B, False, settings.dtype.itemsize)
        count = min(MAX_INPUT_SETS, 1 + 2 * L2 // bytes_of_one)
    return [make_inputs(shape, B, settings.device, settings.dtype, seed) for seed in range(count)]


def inputs_to_check(
    shape: Shape,
    B: int,
    implementations: Sequence[Implementation],
    settings: Settings,
    inputs: Inputs,
) -> Inputs:
    """The inputs that will be measured; fewer samples where only the oracle would need them all."""
    needed = ORACLE_STORED * shape.prediction_bytes(B, settings.dtype.itemsize)
    fits = reason_it_does_not_fit(needed, settings.device) is None
    if fits and any(implementation.family != "ours" for implementation in implementations):
        return inputs
    return make_inputs(shape, min(B, CHECKED_SAMPLES), settings.device, settings.dtype)


def measure_routing(
    shape: Shape,
    B: int,
    implementations: Sequence[Implementation],
    settings: Settings,
    passes: Sequence[str] = PASSES,
) -> Iterator[Record]:
    """One record for each implementation and pass; a failure is its record's status."""
    torch._dynamo.reset()  # each shape compiles anew, and no recompile limit is ever met
    settings.apply()
    sets = input_sets(shape, B, settings)
    failures: dict[str, str] = {}
    routings: dict[str, Routing] = {}
    checked = inputs_to_check(shape, B, implementations, settings, sets[0])
    expected = outputs_and_gradients(oracle(shape), checked, settings.R)
    for implementation in implementations:
        try:
            if reason := implementation.reason_to_skip(shape, B, settings.device):
                raise CannotRunError(reason)
            routing = implementation.make(shape)
            check_equal(outputs_and_gradients(routing, checked, settings.R), expected, settings.R)
            routings[implementation.name] = routing
        except Exception as error:
            failures[implementation.name] = reason_of(error)
    for direction in passes:
        timings, product_rate = time_pass(direction, routings, sets, settings, failures)
        for implementation in implementations:
            name = implementation.name
            yield {
                "table": "routing",
                "case": shape.name,
                "B": B,
                "I": shape.I,
                "J": shape.J,
                "K": shape.K,
                "D": shape.D,
                "weight_sharing": shape.weight_sharing,
                "R": settings.R,
                "dtype": str(settings.dtype).removeprefix("torch."),
                "precision": settings.precision,
                "pass": direction,
                "implementation": name,
                "family": implementation.family,
                "operations": shape.operations(B, settings.R, direction == BOTH),
                "bytes": shape.bytes(B, direction == BOTH, settings.dtype.itemsize),
                "product_rate": product_rate,
                "status": failures.get(name, "ok"),
            } | (timings[name].fields() if name in timings else {})


def time_pass(
    direction: str,
    routings: Mapping[str, Routing],
    sets: Sequence[Inputs],
    settings: Settings,
    failures: dict[str, str],
) -> tuple[dict[str, Timing], float]:
    """Times of all that have not failed yet, and the rate of the product [FLOP/s] among them.

    Whoever fails now is added to ``failures``.
    """
    timer = make_timer(settings.device)
    multiply, operations = product(settings.device)
    samplers = {PRODUCT: timer.sampler([multiply])}
    for name in [name for name in routings if name not in failures]:
        calls = [partial(RUN[direction], routings[name], x, settings.R) for x in sets]
        try:
            calls[0]()  # compiles
            samplers[name] = timer.sampler(calls)
        except Exception as error:
            failures[name] = reason_of(error)
    timings = interleave(
        samplers, timer.how, settings.rounds, settings.slice_seconds, settings.means
    )
    return timings, operations / timings.pop(PRODUCT).median


BATCHES = (1, 4, 8, 16, 64, 128, 512, 2048)
QUICK_BATCHES = (1, 16, 128)
EVERY_SHAPE = (*SHAPES, SHARED, CONVOLUTION)
FEW_BATCHES = (32, 128)
"""For the shapes other than MNIST, whose peers take seconds a call on a CPU."""
CONVOLUTION_BATCHES = (4, 32)
"""Grids: each has 36 windows, samples of the routing."""
LARGEST_PEER_BATCH = {"cpu": 512, "cuda": 2048}
"""Beyond it a peer takes minutes a row; a larger batch that is asked for is measured."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape",
        action="append",
        choices=[shape.name for shape in EVERY_SHAPE],
        metavar="NAME",
        help="only this shape (repeatable): " + ", ".join(shape.name for shape in EVERY_SHAPE),
    )
    parser.add_argument(
        "--batch",
        action="append",
        type=positive,
        metavar="B",
        help="only this batch (may be repeated)",
    )
    parser.add_argument(
        "--dtype", choices=("float64", "float32", "bfloat16", "float16"), default="float32"
    )
    add_peers_arguments(parser)
    add_iterations(parser)
    add_precision(parser)
    add_rounds(parser)
    add_quick(parser, "shapes, batches and rounds")


def batches_of(shape: Shape, quick: bool) -> tuple[int, ...]:
    if shape == CONVOLUTION:
        return CONVOLUTION_BATCHES
    if quick:
        return QUICK_BATCHES
    return BATCHES if shape == MNIST else FEW_BATCHES


def measure(options: argparse.Namespace, settings: Settings, _ceilings: Record) -> Iterator[Record]:
    """MNIST at every batch, the other shapes at a few; what the options ask for instead."""
    settings = replace(settings, dtype=getattr(torch, options.dtype))
    fused, others = ours(settings.device), chosen_peers(options)
    if options.shape:
        shapes = [shape for shape in EVERY_SHAPE if shape.name in options.shape]
    else:
        shapes = [MNIST] if options.quick else list(EVERY_SHAPE)
    for shape in shapes:
        for B in options.batch or batches_of(shape, options.quick):
            too_large = LARGEST_PEER_BATCH[settings.device] < B and not options.batch
            everyone = fused if too_large else [*fused, *others]
            yield from measure_routing(shape, B, everyone, settings)

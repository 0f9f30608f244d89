"""``python -m bench.precompile``: compile what the benchmarks measure on a GPU, in many processes.

Triton compiles the kernels of a call when it is first made, a second each, and keeps them on disk:
what is compiled here, beside other work, the benchmarks find. Of peers nothing is compiled.
"""

import itertools
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import torch

from . import accuracy, memory, routing, scaling
from .machine import processors
from .peers import fused, outputs_and_gradients
from .routing import Settings
from .shapes import CONVOLUTION, MANY_CLASSES, MNIST, SHAPES, Shape, make_inputs

Point = tuple[Shape, int, Settings]
GOALS_BATCHES = (128, 1024)
"""What the goals of a GPU are about."""
BFLOAT16_BATCHES = (1, 16, 128, 1024)


def points() -> Iterator[Point]:
    """Every call of our own that a report measures, the most wanted first."""
    ieee, tf32 = (Settings("cuda", precision=precision) for precision in ("ieee", "tf32"))
    for B, settings in itertools.product((*GOALS_BATCHES, *routing.BATCHES), (tf32, ieee)):
        yield MNIST, B, settings
    for B in BFLOAT16_BATCHES:
        yield MNIST, min(B, routing.CHECKED_SAMPLES), replace(ieee, dtype=torch.bfloat16)
        yield MNIST, B, replace(ieee, dtype=torch.bfloat16)
    for times in memory.TIMES_I:
        yield replace(MNIST, I=times * MNIST.I), memory.GROWTH_B, ieee
    yield MANY_CLASSES, memory.GROWTH_B, ieee
    for B in (*routing.CONVOLUTION_BATCHES, memory.CONVOLUTION_B):
        yield CONVOLUTION, B, ieee
    for dtype in accuracy.DTYPES:
        yield MNIST, accuracy.SAMPLES, replace(ieee, dtype=dtype)
    without_peers = [(shape, B, tf32) for shape in SHAPES for B in routing.FEW_BATCHES]
    for axis in ("B", "I", "J", "R"):
        without_peers += [scaling.point(axis, n, ieee) for n in scaling.sizes_of(axis, "cuda")]
    for shape, B, settings in without_peers:
        yield shape, min(B, routing.CHECKED_SAMPLES), settings  # what is checked before
        yield shape, B, settings


def compile_point(point: Point) -> str:
    """Compile one; says which, or why not."""
    shape, B, settings = point
    settings.apply()
    what = f"{shape.name} I={shape.I} J={shape.J} B={B} R={settings.R} {settings.dtype}"
    try:
        inputs = make_inputs(shape, B, settings.device, settings.dtype)
        outputs_and_gradients(fused("triton", shape), inputs, settings.R)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{what}: {error}"
    return f"{what}, {settings.precision}: done"


def main() -> None:
    processes = max(1, processors() // 3)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        for line in pool.map(compile_point, dict.fromkeys(points())):
            print(line, flush=True)


if __name__ == "__main__":
    main()

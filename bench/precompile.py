"""``python -m bench.precompile``: compile what the benchmarks measure on a GPU, in many processes.

Triton and Inductor compile the kernels of a call when it is first made, for seconds, and keep them
on disk: what is compiled here, beside other work, the benchmarks find. What Inductor chooses by
times it does not keep from here, where many processes share the GPU.
"""

import itertools
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import torch
import torch._inductor.config

from . import accuracy, memory, routing, scaling
from .machine import processors
from .peers import ours, peers
from .routing import RUN, Settings
from .shapes import CONVOLUTION, MANY_CLASSES, MNIST, Shape, make_inputs

Point = tuple[str, Shape, int, Settings]
"""Whose call, and which."""
TRITON = "ours (triton)"
GOALS_BATCHES, SMALL_BATCHES = (128, 1024), (16, 1)
"""What the goals of a GPU are about, and what is measured beside them."""
BFLOAT16_BATCHES = (1, 16, 128, 1024)
TF32_BATCH = 128


def points() -> Iterator[Point]:
    """What a report calls: compiled peers, each of which takes long, and all that is ours."""
    ieee, tf32 = (Settings("cuda", precision=precision) for precision in ("ieee", "tf32"))
    small, _ = GOALS_BATCHES  # no peer is compiled for the large one
    calls = [(small, tf32), *((B, ieee) for B in (small, *SMALL_BATCHES))]
    for (B, settings), peer in itertools.product(calls, peers()):
        if peer.family == "compiled":
            yield peer.name, MNIST, B, settings
    yield from ((TRITON, *call) for call in own_calls(ieee, tf32))


def own_calls(ieee: Settings, tf32: Settings) -> Iterator[tuple[Shape, int, Settings]]:
    """The most wanted first."""
    for B, settings in itertools.product(GOALS_BATCHES, (tf32, ieee)):
        yield MNIST, B, settings
    for B in routing.BATCHES:
        yield MNIST, B, ieee
    for B in BFLOAT16_BATCHES:
        yield MNIST, min(B, routing.CHECKED_SAMPLES), replace(ieee, dtype=torch.bfloat16)
        yield MNIST, B, replace(ieee, dtype=torch.bfloat16)
    for times in memory.TIMES_I:
        yield replace(MNIST, I=times * MNIST.I), memory.GROWTH_B, ieee
    yield MANY_CLASSES, memory.GROWTH_B, ieee
    for dtype in accuracy.DTYPES:
        yield MNIST, accuracy.SAMPLES, replace(ieee, dtype=dtype)
    without_peers = [(shape, TF32_BATCH, tf32) for shape in routing.EVERY_SHAPE]
    for axis in ("B", "I", "J", "R"):
        without_peers += [scaling.point(axis, n, ieee) for n in scaling.sizes_of(axis, "cuda")]
    for shape, B, settings in without_peers:
        yield shape, min(B, routing.CHECKED_SAMPLES), settings  # what is checked before
        yield shape, B, settings
    for B in routing.CONVOLUTION_BATCHES:
        yield CONVOLUTION, B, ieee


def compile_point(point: Point) -> str:
    """Compile one, forward and backward; says which, or why not."""
    name, shape, B, settings = point
    settings.apply()
    what = f"{name} {shape.name} I={shape.I} J={shape.J} B={B} R={settings.R} {settings.dtype}"
    try:
        (found,) = (one for one in [*ours(settings.device), *peers()] if one.name == name)
        if found.family == "compiled":
            torch._dynamo.reset()  # each shape compiles anew, as where it is measured
        call = found.make(shape)
        inputs = make_inputs(shape, B, settings.device, settings.dtype)
        for run in RUN.values():
            run(call, inputs, settings.R)
        if settings.device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        return f"{what}: {error}"
    return f"{what}, {settings.precision}: done"


def main() -> None:
    torch._inductor.config.autotune_local_cache = False
    # Nothing has touched the GPU here. What a spawned process compiles, Inductor files under
    # another name than the benchmarks look for.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processors(), mp_context=context) as pool:
        for line in pool.map(compile_point, dict.fromkeys(points())):
            print(line, flush=True)


if __name__ == "__main__":
    main()

"""Extra memory of forward+backward: the peak beyond inputs, outputs and gradients.

On a CPU it is the peak resident set of a fresh process (Linux ``VmHWM``) above the resident set
before the call: it sees every allocation that is touched, whoever makes it, and is exact to some
pages. On a GPU it is torch's peak of allocated bytes, in which the fused backends' workspaces are,
too.

It can be less than what is saved for the backward: outputs and gradients are taken off the peak
whole, also where some of them come only after it, in the place of what was saved.
"""

import argparse
import ctypes
import multiprocessing
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .fits import CONSTANT, exponents
from .options import add_iterations, add_peers_arguments, add_precision, add_quick
from .peers import Implementation, Routing, chosen_peers, ours, outputs_and_gradients
from .records import CannotRunError, Record, reason_of, select
from .routing import Settings
from .shapes import CONVOLUTION, MANY_CLASSES, MNIST, Inputs, Shape, make_inputs

Result = TypeVar("Result")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measure_memory(
    shape: Shape, B: int, implementations: Iterable[Implementation], settings: Settings
) -> Iterator[Record]:
    """One record for each implementation; a failure is its record's status."""
    for implementation in implementations:
        record: Record = {
            "table": "memory",
            "case": shape.name,
            "B": B,
            "I": shape.I,
            "R": settings.R,
            "precision": settings.precision,
            "implementation": implementation.name,
            "family": implementation.family,
            "prediction_bytes": shape.prediction_bytes(B),
        }
        try:
            if reason := implementation.reason_to_skip(shape, B, settings.device):
                raise CannotRunError(reason)
            where = measured_in(settings.device)
            extra, saved = where(probe, implementation, shape, B, settings)
            record |= {"extra_bytes": extra, "saved_bytes": saved, "status": "ok"}
        except Exception as error:
            record |= {"status": reason_of(error)}
        yield record


def measured_in(device: str) -> Callable[..., Any]:
    """What calls a function where its memory can be measured, on any device."""
    return in_fresh_process if device == "cpu" else call_here


def in_fresh_process(function: Callable[..., Result], *arguments: object) -> Result:
    # Blocks of 64 KiB and more go straight back to the system when freed: nothing is hidden in
    # blocks that an earlier call left in the allocator.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    try:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as executor:
            try:
                return executor.submit(function, *arguments).result()
            except KeyboardInterrupt:
                for process in multiprocessing.active_children():
                    process.kill()  # the executor waits for what it is at: minutes of compilation
                raise
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]


def call_here(function: Callable[..., Result], *arguments: object) -> Result:  # needs a GPU
    torch._dynamo.reset()
    return function(*arguments)


def probe(
    implementation: Implementation, shape: Shape, B: int, settings: Settings
) -> tuple[int, int]:
    """Extra bytes at the peak of forward+backward, and bytes saved between the two."""
    settings.apply()
    routing = implementation.make(shape)
    inputs = make_inputs(shape, B, settings.device, settings.dtype)
    outputs_and_gradients(routing, inputs, settings.R)  # compiles, starts threads
    extra = extra_bytes(lambda: outputs_and_gradients(routing, inputs, settings.R), settings.device)
    return extra, saved_bytes(routing, inputs, settings.R)


def extra_bytes(call: Callable[[], Iterable[Tensor]], device: str) -> int:
    """Peak memory of a call beyond what was there before and what it returns."""
    if device == "cuda":  # needs a GPU
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        returned = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        if not CLEAR.exists():
            raise OSError("the peak resident set needs Linux's /proc")
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR.write_text("5")  # resets VmHWM
        before = resident("VmRSS")
        returned = call()
        peak = resident("VmHWM")
    return max(0, peak - before - sum(x.nbytes for x in returned))


def resident(field: str) -> int:
    """A field of ``/proc/self/status`` in bytes."""
    match = re.search(rf"^{field}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"{STATUS} has no field {field}")
    return int(match[1]) * 1024


def saved_bytes(routing: Routing, inputs: Inputs, R: int) -> int:
    """Bytes that autograd keeps from the forward to the backward, the inputs left out."""
    seen = {inputs.u.untyped_storage().data_ptr(), inputs.weight.untyped_storage().data_ptr()}
    total = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal total
        storage = x.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        routing(inputs.u, inputs.weight, R)
    return total


BATCHES = (1, 4, 16, 64, 128, 256)
QUICK_BATCHES = (16, 128)
CONVOLUTION_B = 16
GROWTH_B = 32
TIMES_I = (1, 2, 4, 8)
"""Multiples of MNIST's I: the extra memory of a fused implementation should not follow them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_peers_arguments(parser)
    add_iterations(parser)
    add_precision(parser)
    add_quick(parser, "batches, no convolution")


def measure(options: argparse.Namespace, settings: Settings, _ceilings: Record) -> Iterator[Record]:
    """MNIST over the batch, and a convolution; the fused backends over I, and at the shape with
    many classes."""
    fused, others = ours(settings.device), chosen_peers(options)
    for B in QUICK_BATCHES if options.quick else BATCHES:
        yield from measure_memory(MNIST, B, [*fused, *others], settings)
    if not options.quick:
        yield from measure_memory(CONVOLUTION, CONVOLUTION_B, [*fused, *others], settings)
    for times in TIMES_I:
        shape = replace(MNIST, name=f"MNIST, I = {times * MNIST.I}", I=times * MNIST.I)
        for record in measure_memory(shape, GROWTH_B, fused, settings):
            yield record | {"axis": "I", "size": shape.I, "pass": "extra memory"}
    yield from measure_memory(MANY_CLASSES, GROWTH_B, fused, settings)


def conclude(records: list[Record], _device: str) -> list[Record]:
    """How the fused backends' extra memory grows with I."""
    return exponents(select(records, table="memory", axis="I"), "extra_bytes", CONSTANT)

"""The same input gives the same bits: every time, on any number of threads, under load."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from capsule_kernels import fused_routing

from .cases import Case, make_inputs, run
from .targets import KERNELS, TARGETS, Target

REPEATS = 100

EVERYTHING = Case(I=24, J=5, K=8, D=16, logits=True, bias=True, leaky=True)
CASES = [
    # Few samples and many, whole vectors and rests, weights of one capsule and of several.
    replace(EVERYTHING, B=2, I=40),
    replace(EVERYTHING, B=21),
    replace(EVERYTHING, B=3, weight_sharing=12),
    replace(EVERYTHING, B=70, weight_sharing=24),
    replace(EVERYTHING, B=19, routing_gradient="last"),
]


@pytest.fixture
def load() -> Iterator[None]:
    """Processes that keep the other cores busy."""
    with ExitStack() as stack:
        for _ in range(max(1, (os.cpu_count() or 1) - 1)):
            busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.enter_context(busy)
            stack.callback(busy.kill)
        yield


@pytest.fixture
def thread_count() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def routed(target: Target, case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    return run(fused_routing, case, make_inputs(case, dtype, target.device), backend=target.backend)


def bits(results: dict[str, Tensor]) -> int:
    return sum(8 * x.element_size() * x.numel() for x in results.values())


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in expected:
        same = found[name].view(torch.uint8) == expected[name].view(torch.uint8)
        assert same.all(), f"{name}: {int((~same).sum())} of {same.numel()} bytes differ"


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize("case", CASES[:3], ids=str)
@pytest.mark.usefixtures("load", "thread_count")
def test_repeats_under_load(target, case, figure):
    torch.set_num_threads(2)
    first = routed(target, case, torch.float32)
    for _ in range(REPEATS):
        assert_same_bits(routed(target, case, torch.float32), first)
    compared = REPEATS * bits(first)
    figure(f"repeats under load, {target}, {case}", f"{REPEATS} calls, {compared} bits equal")


@pytest.mark.parametrize("target", [t for t in TARGETS if t.backend == "cpu"], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("thread_count")
def test_any_number_of_threads(target, case, figure):
    torch.set_num_threads(1)
    alone = routed(target, case, torch.float32)
    counts = (2, 3, 4, 7, 16, 64)
    for count in counts:
        torch.set_num_threads(count)
        assert torch.get_num_threads() == count
        assert_same_bits(routed(target, case, torch.float32), alone)
    compared = len(counts) * bits(alone)
    figure(f"threads 1 against {counts}, {case}", f"{compared} bits equal")


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_memory_held_before_does_not_matter(target, case):
    """Tensors that are left empty start as NaN: what is read before it is written shows."""
    clean = routed(target, case, torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1, device=target.device).isnan().all()
        poisoned = routed(target, case, torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(poisoned, clean)

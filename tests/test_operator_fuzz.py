"""Malformed calls of the raw operators, in a process of their own: none crashes it."""

import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from capsule_kernels import backends
from capsule_kernels.backends import cuda, extension, triton

from . import operator_fuzz
from .interpreted import environment

CALLS = int(os.environ.get("CAPSULE_FUZZ_CALLS", "3000"))
INTERPRETED_CALLS = 60


def fuzz(calls: int, *flags: str, environment: dict[str, str] | None = None) -> str:
    """What the fuzz printed, once it has reached both sides of the checks."""
    finished = subprocess.run(
        [sys.executable, "-m", "tests.operator_fuzz", "--calls", str(calls), "--seed", "1", *flags],
        cwd=Path(__file__).parent.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, f"exit {finished.returncode}: {finished.stderr[-3000:]}"
    outcomes = {name: int(n) for n, name in re.findall(r"(\d+) (\w[\w ]*)", finished.stdout)}
    assert outcomes["calls"] == calls
    assert outcomes["accepted"] > calls / 10
    assert outcomes["ValueError"] > calls / 10
    return finished.stdout.strip()


@pytest.mark.skipif(not backends()["cpu"].usable, reason=backends()["cpu"].reason)
def test_no_call_crashes(figure):
    figure("fuzz of the raw operators", fuzz(CALLS))


@pytest.mark.skipif(not backends()["cpu"].usable, reason=backends()["cpu"].reason)
@pytest.mark.parametrize("of", ["forward_shapes", "backward_shapes"])
@pytest.mark.parametrize(
    "wrong",
    [lambda x: x.new_empty(*x.shape, 2), lambda x: x.to(torch.int8)],
    ids=["shape", "dtype"],
)
def test_a_broken_promise_is_noticed(
    of: str, wrong: Callable[[Tensor], Tensor], monkeypatch
) -> None:
    now, promised = extension.module.instruction_set(), getattr(operator_fuzz, of)
    monkeypatch.setattr(operator_fuzz, "instruction_sets", lambda: [now])
    monkeypatch.setattr(operator_fuzz, "spoil", lambda rng, value: value)

    def calls() -> set[str]:  # some of them forward, some backward
        return {operator_fuzz.try_call(random.Random(seed), "cpu") for seed in range(8)}

    assert calls() == {"accepted"}
    monkeypatch.setattr(operator_fuzz, of, lambda *given: [wrong(x) for x in promised(*given)])
    with pytest.raises(AssertionError, match="promised"):
        calls()


@pytest.mark.interpreter
@pytest.mark.slow
@pytest.mark.skipif(not triton.INSTALLED, reason="Triton is not installed")
def test_no_call_of_the_triton_operators_crashes(figure):
    printed = fuzz(INTERPRETED_CALLS, "--backend", "triton", environment=environment())
    figure("fuzz of the raw Triton operators", printed)


@pytest.mark.gpu
@pytest.mark.skipif(cuda.unavailable() is not None, reason=f"backend cuda: {cuda.unavailable()}")
def test_no_call_of_the_cuda_operators_crashes(figure):
    # CUDA reserves more addresses than the limit of the other calls allows.
    printed = fuzz(CALLS, "--backend", "cuda", "--memory-gib", "0")
    figure("fuzz of the raw CUDA operators", printed)

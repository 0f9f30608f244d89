"""The op from many Python threads at once, as inference servers call it."""

import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import Tensor

from capsule_kernels import backends, fused_routing, fused_routing_conv

from . import conv_cases
from .cases import Case, make_inputs
from .conv_cases import Conv

THREADS = 12
CALLS = 8
CASES = [
    Case(), Case(B=20, I=36, J=10, leaky=True), Case(B=1, I=64), Case(K=3, D=7, logits=True),
    Conv(), Conv(B=1, H=3, W=3, stride=(2, 1)),
]  # fmt: skip


def forward_and_backward(case: Case | Conv, seed: int, dtype: torch.dtype) -> list[Tensor]:
    if isinstance(case, Conv):
        inputs = conv_cases.make_inputs(case, dtype)
        u, weight = (seed * inputs[name].requires_grad_() for name in ("u", "weight"))
        v = fused_routing_conv(u, weight, stride=case.stride)
    else:
        inputs = make_inputs(case, dtype, seed=seed)
        u, weight = inputs["u"], inputs["weight"]
        v = fused_routing(u, weight, case.R, logits=inputs["logits"], leaky=case.leaky)
    return [v.detach(), *torch.autograd.grad(v.square().sum(), [u, weight])]


@pytest.mark.parametrize("intra_op_threads", [1, 2])
def test_the_same_bits_as_alone(intra_op_threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(intra_op_threads)
    try:
        jobs = [
            (CASES[n % len(CASES)], n, torch.float64 if n % 3 else torch.float32)
            for n in range(THREADS)
        ]
        expected = [forward_and_backward(*job) for job in jobs]
        start = Barrier(THREADS)

        def work(n: int) -> None:
            start.wait()
            for _ in range(CALLS):
                found = forward_and_backward(*jobs[n])
                assert all(torch.equal(a, b) for a, b in zip(found, expected[n], strict=True))

        with ThreadPoolExecutor(THREADS) as pool:
            for done in [pool.submit(work, n) for n in range(THREADS)]:
                done.result()
    finally:
        torch.set_num_threads(before)


def test_modes_of_one_thread_are_not_those_of_another() -> None:
    """Autocast and no_grad are a thread's own; one layer serves all."""
    inputs = make_inputs(CASES[0], torch.float32)
    u, weight = inputs["u"], inputs["weight"]
    # Torch may stand still where threads share a leaf: one holds the lock of its node of the graph
    # and waits for Python's, for a node that is new or that Python knows, the other the other way
    # round. So the nodes are there before, held by a graph of which Python knows the tensors alone.
    held = [x.view_as(x) for x in (u, weight)]
    start = Barrier(3)

    def plain() -> Tensor:
        start.wait()
        return fused_routing(u, weight)

    def cast() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            start.wait()
            return fused_routing(u, weight)

    def frozen() -> Tensor:
        with torch.no_grad():
            start.wait()
            return fused_routing(u, weight)

    with ThreadPoolExecutor(3) as pool:
        a, b, c = (job.result() for job in [pool.submit(f) for f in (plain, cast, frozen)])
    assert (a.dtype, b.dtype, c.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    assert a.requires_grad
    assert b.requires_grad
    assert not c.requires_grad
    assert len(held) == 2  # alive until here


WITHOUT_LOCK = """
import sys
import torch
assert not sys._is_gil_enabled(), "torch needs the lock"
import capsule_kernels
assert not sys._is_gil_enabled(), "capsule_kernels needs the lock"
from tests.test_threads import test_the_same_bits_as_alone
for threads in (1, 2):
    test_the_same_bits_as_alone(threads)
assert not sys._is_gil_enabled(), "routing needs the lock"
"""


@pytest.mark.skipif(
    not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="not a free-threaded Python"
)
@pytest.mark.skipif(not backends()["cpu"].usable, reason="there is no extension to import")
def test_python_stays_without_its_lock() -> None:
    """A fresh process, as other tests' imports may take the lock; Python warns where one does."""
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", WITHOUT_LOCK],
        capture_output=True, text=True, check=False, timeout=300,
        env={name: value for name, value in os.environ.items() if name != "PYTHON_GIL"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

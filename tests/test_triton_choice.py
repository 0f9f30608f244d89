"""Which calls the Triton backend takes, what it says of the others, and when Triton is imported."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from capsule_kernels import dispatch, fused_routing
from capsule_kernels.backends import triton as backend
from capsule_kernels.backends.triton import config
from capsule_kernels.dispatch import RoutingShape

from .triton_calls import MNIST, SIZES, launches, needs_triton

ROOT = Path(__file__).parent.parent

SHAPE = RoutingShape(*MNIST, 3, 1)


def test_cpu_tensors_without_the_interpreter_are_refused(monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETED", False)
    reason = backend.unsupported(torch.device("cpu"), torch.float32, SHAPE)
    assert "got tensors on cpu" in reason
    assert "TRITON_INTERPRET=1" in reason


def test_old_gpus_are_refused_by_name(monkeypatch):
    properties = SimpleNamespace(major=7, minor=5, name="T4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    reason = backend.unsupported(torch.device("cuda", 0), torch.float32, SHAPE)
    assert (
        reason == "it needs compute capability 8.0 or higher, T4 has 7.5; use backend='reference'"
    )
    properties.major, properties.minor = 8, 0
    properties.multi_processor_count = 108
    assert backend.unsupported(torch.device("cuda", 0), torch.float32, SHAPE) is None


SMALL = SimpleNamespace(
    major=8, minor=9, name="L4", multi_processor_count=58, shared_memory_per_block_optin=99 << 10
)
TOO_LARGE = (16, 4, 16, 256)
"""(I, J, K, D): in float64 W, states and all that is exchanged take 140 KiB at least."""


def test_float64_that_does_not_fit_into_shared_memory_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SMALL)
    device, shape = torch.device("cuda", 0), RoutingShape(*TOO_LARGE, 3, 1)
    reason = backend.unsupported(device, torch.float64, shape)
    assert reason == (
        "J = 4, K = 16, D = 256 in torch.float64 needs 143360 bytes of shared memory for a step of "
        "the smallest program, and this device has 101376; use another dtype or backend='reference'"
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert backend.unsupported(device, dtype, shape) is None
    monkeypatch.setattr(backend, "unavailable", lambda: None)
    assert dispatch.reason_against("triton", device, torch.float64, shape) == reason
    monkeypatch.setattr(dispatch.cuda, "is_preferred", lambda *call: False)
    u, weight = (
        SimpleNamespace(device=device, dtype=torch.float64, shape=torch.Size(sizes))
        for sizes in ((2, 16, 16), (16, 4, 256, 16))
    )
    assert dispatch.select_backend("fused_routing", "auto", u, weight, 3, 1) == "reference"
    with pytest.raises(RuntimeError, match="this device has 101376"):
        dispatch.select_backend("fused_routing", "triton", u, weight, 3, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_choice_of_a_backend_can_be_traced(dtype, monkeypatch):
    """In one graph for all sizes, on a GPU too, of which nothing but its description is here."""
    describe = torch.compiler.assume_constant_result(lambda device: SMALL)  # as of torch's own
    monkeypatch.setattr(torch.cuda, "get_device_properties", describe)
    torch._dynamo.reset()

    def supported(u, weight):
        rows, J, D, K = weight.shape
        shape = RoutingShape(rows, J, K, D, 3, 1)
        return 2 * u if backend.unsupported(torch.device("cuda", 0), dtype, shape) is None else u

    whole = torch.compile(supported, fullgraph=True, dynamic=True, backend="eager")
    for J in (10, 4):
        assert whole(torch.ones(3), torch.ones(6, J, 256, 16)).sum() == 6


@needs_triton
def test_what_does_not_fit_is_refused_past_the_checks_before_any_launch():
    launched = []
    gpu = config.Gpu(processors=58, hip=False, shared_bytes=99 << 10)
    with pytest.raises(RuntimeError, match=r"routing_forward: J = 4, .* this device has 101376"):
        launches(2, *TOO_LARGE, 3, gpu=gpu, dtype=torch.float64, launched=launched)
    assert not launched


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(64, 10, 8, 16), (64, 33, 16, 16), (64, 10, 64, 64)], ids=str)
def test_hip_programs_fit_into_64_KiB(shape, dtype):
    """A step of W and u, which is what their compiler keeps there (``bench aot``)."""
    launched = []
    launches(
        64, *shape, 3, gpu=config.Gpu(processors=304, hip=True), dtype=dtype, launched=launched
    )
    names = [field.name for field in fields(config.Warps)]
    held = [
        (kernel, config.Warps(*(arguments.get(name, 1) for name in names)))
        for kernel, _, arguments in launched
        if "WARPS_J" in arguments
    ]
    assert {"routing_forward_kernel", "routing_gradients_kernel"} <= {kernel for kernel, _ in held}
    for kernel, warps in held:
        columns = warps.STEP_I * warps.BLOCK_K
        W = warps.number * warps.UNROLL_J * warps.BLOCK_D * columns
        u = warps.WARPS_I * warps.BLOCK_B * columns
        needed = W if kernel == "routing_gradients_kernel" else W + u
        assert dtype.itemsize * needed <= 64 << 10, kernel


def test_a_gpu_whose_shared_memory_torch_does_not_tell_has_what_all_of_them_have(monkeypatch):
    from capsule_kernels.backends.triton.device import gpu_of

    properties = SimpleNamespace(multi_processor_count=108)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert gpu_of(torch.device("cuda", 0)).shared_bytes == 99 << 10


def test_any_size_is_taken_up_to_the_largest_tile_of_triton(monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETED", True)

    def reason(K, D):
        return backend.unsupported(torch.device("cpu"), torch.float32, (16, 10, K, D, 3))

    for K, D in ((8, 16), (72, 64), (130, 33), (5, 300), (1 << 22, 1), (1, 1 << 20)):
        assert reason(K, D) is None
    assert f"D = {(1 << 20) + 1}" in reason(1, (1 << 20) + 1)


def test_only_large_weights_take_the_path_of_blocks():
    assert not any(config.is_wide(K, D) for _, _, K, D in SIZES)
    assert not config.is_wide(64, 64)
    for K, D in ((72, 64), (130, 33), (5, 300), (300, 1)):
        assert config.is_wide(K, D)
        blocks = config.blocks_of(K, D)
        assert blocks.BLOCK_D <= config.WIDE_BLOCK
        assert min(blocks.BLOCK_D, blocks.BLOCK_K) >= config.MATRIX_ROWS


def test_a_named_backend_raises_its_reason(monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="backend 'triton' can't be used"):
        fused_routing(torch.randn(2, 3, 4), torch.randn(3, 5, 6, 4), backend="triton")


@pytest.mark.parametrize("blocked", [False, True])
def test_importing_the_package_does_not_import_triton(blocked):
    lines = [
        "import importlib.util, sys",
        "find = importlib.util.find_spec",
        f"hide = lambda name, *rest: None if {blocked} and name == 'triton' else find(name, *rest)",
        "importlib.util.find_spec = hide",
        "import capsule_kernels, torch",
        "status = capsule_kernels.backends()['triton']",
        "capsule_kernels.fused_routing(torch.randn(2, 3, 4), torch.randn(3, 5, 6, 4))",
        "print('triton' in sys.modules, status.usable, status.reason)",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    imported, _, reason = done.stdout.strip().split(maxsplit=2)
    assert imported == "False"
    if blocked:
        assert "Triton is not installed" in reason

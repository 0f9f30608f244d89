"""The machine at hand: what it is, what software runs on it, and how fast it is at best."""

import datetime
import os
import platform
from collections.abc import Callable
from typing import Any

import torch

from model import environment
from model.environment import device_name

from .timing import interleave, make_timer


def processors() -> int:
    """How many processors this process may use; where the system does not say, all of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def commit() -> str:
    """The commit that is checked out, "-dirty" after it if tracked files differ from it.

    CAPSULE_KERNELS_COMMIT, where it is set, knows better: of a copy without its history, or with
    only a part of it.
    """
    return os.environ.get("CAPSULE_KERNELS_COMMIT") or environment.commit() or "unknown"


def triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def describe(device: str) -> dict[str, Any]:
    """Machine, versions, commit and settings that decide about speed."""
    return {
        "device": device,
        "name": device_name(torch.device(device)),
        "processor": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton_version(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
    }


def product(device: str) -> tuple[Callable[[], object], int]:
    """A large float32 matrix product on the device, in the precision torch is set to, and its
    operations."""
    n = 8192 if device == "cuda" else 2048
    a, b, out = (torch.randn(n, n, device=device) for _ in range(3))
    return lambda: torch.mm(a, b, out=out), 2 * n**3


def ceilings(device: str) -> dict[str, float]:
    """Measured limits: float32 matrix product [FLOP/s] (TF32 too on GPUs) and copy [bytes/s]."""
    timer = make_timer(device)
    multiply, operations = product(device)
    # A copy must not fit into any cache.
    source = torch.randn(2**28 if device == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)

    def seconds(call: Callable[[], object], precision: str = "highest") -> float:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            return interleave({"": timer.sampler([call])}, timer.how)[""].median
        finally:
            torch.set_float32_matmul_precision(before)

    found = {
        "gemm": operations / seconds(multiply),
        "copy": 2 * source.nbytes / seconds(lambda: target.copy_(source)),
    }
    if device == "cuda":  # needs a GPU
        found["tf32"] = operations / seconds(multiply, "high")
    return found


def line(machine: dict[str, Any]) -> str:
    """Machine, versions and commit in one line."""
    versions = ", ".join(
        f"{name} {machine[name]}"
        for name in ("python", "torch", "cuda", "triton")
        if machine[name] is not None
    )
    return (
        f"{machine['name']}, {machine['threads']} threads, {machine['instructions']}; {versions}; "
        f"commit {machine['commit']}; {machine['date']} UTC"
    )


def ceilings_line(ceilings: dict[str, float]) -> str:
    """The measured limits in one line."""
    products = [f"float32 matrix product {ceilings['gemm'] / 1e9:.0f} GFLOP/s"]
    if "tf32" in ceilings:
        products.append(f"TF32 {ceilings['tf32'] / 1e9:.0f} GFLOP/s")
    return ", ".join([*products, f"copy {ceilings['copy'] / 1e9:.1f} GB/s (read + written)"])

"""Which backend runs: decided here and nowhere else.

A backend is a module of ``capsule_kernels.backends`` with these, free of side effects:

``SERVES``
    What it is for, in a line of ``backends()``.
``unavailable() -> str | None``
    Why it can't be used on this machine at all; None where it can.
``unsupported(device, dtype, shape) -> str | None``
    Why it can't run this call; None where it can.

"auto" also asks the cuda backend which calls it ``is_preferred`` for.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .backends import cpu, cuda, triton
from .validation import check_choice

KERNELS = {"cpu": cpu, "triton": triton, "cuda": cuda}
BACKENDS = ("reference", *KERNELS)
CHOICES = ("auto", *BACKENDS)


class BackendStatus(NamedTuple):
    """Whether a backend can be used on this machine, and why not (or what it serves)."""

    usable: bool
    reason: str


class RoutingShape(NamedTuple):
    """The sizes of a call, the paper's letters.

    B is left out: no choice depends on the batch, so that another one compiles nothing anew.
    """

    I: int
    J: int
    K: int
    D: int
    R: int
    weight_sharing: int


def backends() -> dict[str, BackendStatus]:
    """Every backend by name: whether it can be used on this machine, and what it serves or why not.

    Example::

        for name, (usable, reason) in backends().items():
            print(name, usable, reason)
    """
    statuses = {"reference": BackendStatus(True, "plain PyTorch on any device; stores u_hat")}
    for name, module in KERNELS.items():
        reason = module.unavailable()
        statuses[name] = BackendStatus(reason is None, reason or module.SERVES)
    return statuses


def select_backend(
    caller: str, backend: str, u: Tensor, weight: Tensor, num_iterations: int, weight_sharing: int
) -> str:
    """The backend that will run this call; a backend asked for by name runs or raises.

    Raises ``ValueError`` for an unknown name, ``RuntimeError`` with the reason for a backend
    that is not usable here or can't run this call, both in the name of ``caller``.
    """
    check_choice("backend", backend, CHOICES, caller)
    if backend == "reference":
        return backend
    rows, J, D, K = weight.shape
    shape = RoutingShape(rows * weight_sharing, J, K, D, num_iterations, weight_sharing)
    if backend == "auto":
        if in_onnx_export():
            return "reference"
        for name in automatic_order(u.device, u.dtype, shape):
            if reason_against(name, u.device, u.dtype, shape) is None:
                return name
        return "reference"
    reason = reason_against(backend, u.device, u.dtype, shape)
    if reason is not None:
        raise RuntimeError(f"{caller}: backend '{backend}' can't be used: {reason}")
    return backend


def in_onnx_export() -> bool:
    """Whether ``torch.onnx.export`` records this call, for a runtime without our kernels."""
    recorded = torch.compiler.is_exporting() or torch.jit.is_tracing()
    return recorded and torch.onnx.is_in_onnx_export()  # the latter alone takes microseconds


def automatic_order(
    device: torch.device, dtype: torch.dtype, shape: RoutingShape
) -> tuple[str, ...]:
    """Backends that ``backend="auto"`` tries for a call, best first; the oracle comes last."""
    if device.type == "cuda":
        # Fake tensors are on a device that need not be there to be asked.
        preferred = cuda.unavailable() is None and cuda.is_preferred(device, dtype, shape)
        return ("cuda", "triton") if preferred else ("triton", "cuda")
    return ("cpu",) if device.type == "cpu" else ()


def reason_against(
    name: str, device: torch.device, dtype: torch.dtype, shape: RoutingShape
) -> str | None:
    """Why the kernels of backend ``name`` can't run this call, or None."""
    module = KERNELS[name]
    return module.unavailable() or module.unsupported(device, dtype, shape)

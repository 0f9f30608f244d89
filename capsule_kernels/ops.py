"""The operators beneath :class:`FusedRouting`: schemas, shapes, and where their kernels live.

Two operators, one overload for each backend: ``capsule_kernels::routing_forward.<backend>`` and
``capsule_kernels::routing_backward.<backend>``. An overload names its backend, so a backend that
was chosen is the one that runs, in eager mode and in a captured graph alike.

The kernels of ``cpu`` and ``cuda`` are registered by the C++ extension (``TORCH_LIBRARY_IMPL`` in
``csrc/``), those of ``triton`` here: Triton is imported when they are first called. All operators
accept any strides and return new contiguous tensors.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import extension, triton
from .windows import sizes

FORWARD_SCHEMA = (
    "(Tensor u, Tensor weight, Tensor? logits, Tensor? bias, int num_iterations, bool leaky, "
    "int weight_sharing, bool return_coupling, SymInt[]? window=None, bool full_gradient=True) "
    "-> (Tensor v, Tensor s, Tensor coupling)"
)
"""``v`` [B, J, D] in the dtype of u; ``s`` [R, B, J, D], the total inputs of every iteration, bias
included, in float32 (float64 for float64); ``coupling`` [B, I, J] in the dtype of u, or [0].

u is [B, I, K], or with a ``window`` (kh, kw, rows of a step, columns of a step) a grid
[B, H, W, C, K] that it slides over. Every position (b, y, x) of the window is then a sample, every
(c, dy, dx) an input capsule, in these orders: ``u[b, y * rows + dy, x * columns + dx, c]``. So B
stands for B H' W' in all other shapes, I for C kh kw, and ``weight_sharing`` must be 1.

``full_gradient`` is ``routing_gradient == "full"``. It makes no difference to the forward: where a
graph holds this operator, its derivative follows it."""

BACKWARD_SCHEMA = (
    "(Tensor grad_v, Tensor u, Tensor weight, Tensor? logits, Tensor s, bool leaky, "
    "int weight_sharing, bool full_gradient, bool[4] output_mask, SymInt[]? window=None) "
    "-> (Tensor grad_u, Tensor grad_weight, Tensor grad_logits, Tensor grad_bias)"
)
"""Gradients in the shapes and the dtype of u (with a window: of the grid), weight, logits [I, J],
bias [J, D]; [0] where ``output_mask`` is false. ``full_gradient`` as in the forward."""

KERNEL_BACKENDS = ("cpu", "triton", "cuda")

library = torch.library.Library("capsule_kernels", "DEF")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype kernels compute in and ``s`` is stored in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def forward_shapes(
    u: Tensor,
    weight: Tensor,
    logits: Tensor | None,
    bias: Tensor | None,
    num_iterations: int,
    leaky: bool,
    weight_sharing: int,
    return_coupling: bool,
    window: Sequence[int] | None = None,
    full_gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty outputs of ``routing_forward``: its fake implementation, and what backends fill."""
    B, I = sizes(u, window)
    _, J, D, _ = weight.shape
    return (
        u.new_empty(B, J, D),
        u.new_empty(num_iterations, B, J, D, dtype=accumulation_dtype(u.dtype)),
        u.new_empty((B, I, J) if return_coupling else (0,)),
    )


def backward_shapes(
    grad_v: Tensor,
    u: Tensor,
    weight: Tensor,
    logits: Tensor | None,
    s: Tensor,
    leaky: bool,
    weight_sharing: int,
    full_gradient: bool,
    output_mask: list[bool],
    window: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty outputs of ``routing_backward``: its fake implementation, and what backends fill."""
    _, I = sizes(u, window)
    _, J, D, _ = weight.shape
    shapes = (u.shape, weight.shape, (I, J), (J, D))
    grad_u, grad_weight, grad_logits, grad_bias = (
        u.new_empty(shape if wanted else (0,))
        for shape, wanted in zip(shapes, output_mask, strict=True)
    )
    return grad_u, grad_weight, grad_logits, grad_bias


def one_device(shapes: Callable[..., Any]) -> Callable[..., Any]:
    """``shapes`` as a fake implementation.

    A call with a tensor on the meta device reaches it too: beside tensors of another device it
    would return memory that no kernel fills.
    """

    @functools.wraps(shapes)
    def fake(*arguments: Any) -> Any:
        devices = {str(x.device) for x in arguments if isinstance(x, Tensor)}
        if len(devices) > 1:
            raise ValueError(f"all tensors must be on one device, got {', '.join(sorted(devices))}")
        return shapes(*arguments)

    return fake


def define(operator: str) -> None:
    """Define an operator, behind which the compiled extension may have registered a kernel.

    It has been loaded before: here a kernel that does not fit raises. Loaded afterwards, it would
    end the process.
    """
    try:
        library.define(operator)
    except RuntimeError as error:
        if extension.module is None:
            raise
        raise ImportError(
            f"capsule_kernels: the compiled extension {extension.module.__file__} was built for "
            "other operators than this version has; build it anew, as by "
            "`pip install --no-build-isolation .`"
        ) from error


for _backend in KERNEL_BACKENDS:
    define(f"routing_forward.{_backend}{FORWARD_SCHEMA}")
    define(f"routing_backward.{_backend}{BACKWARD_SCHEMA}")
    torch.library.register_fake(
        f"capsule_kernels::routing_forward.{_backend}", one_device(forward_shapes)
    )
    torch.library.register_fake(
        f"capsule_kernels::routing_backward.{_backend}", one_device(backward_shapes)
    )

for _key in ("CPU", "CUDA"):  # CPU tensors run under Triton's interpreter
    library.impl("routing_forward.triton", triton.routing_forward, _key)
    library.impl("routing_backward.triton", triton.routing_backward, _key)


class Operators(NamedTuple):
    forward: torch._ops.OpOverload
    backward: torch._ops.OpOverload


OPERATORS = {
    backend: Operators(
        getattr(torch.ops.capsule_kernels.routing_forward, backend),
        getattr(torch.ops.capsule_kernels.routing_backward, backend),
    )
    for backend in KERNEL_BACKENDS
}

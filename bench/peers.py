"""What the fused op is compared with: the ways others write routing, and ``torch.compile`` of them.

Each is written here for the comparison and checked against the oracle before it is measured. All
but the contracted one store the predictions ``u_hat`` [B, I, J, D].
"""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from capsule_kernels import backends, fused_routing, fused_routing_conv

from .shapes import GIB, Convolution, Inputs, Shape

Routing = Callable[[Tensor, Tensor, int], Tensor]
"""u, weight, num_iterations -> v, in the sizes of a shape: mostly u [B, I, K],
weight [I // weight_sharing, J, D, K], v [B, J, D]."""


def squash(s: Tensor) -> Tensor:
    """The squashing of the paper in its cheapest form (no care for zero or huge lengths)."""
    squared_length = s.square().sum(-1, keepdim=True)
    return s * (squared_length.sqrt() / (1 + squared_length))


def predictions(u: Tensor, weight: Tensor) -> Tensor:
    """u_hat [B, I, J, D] by one einsum, whether capsules share weights or not."""
    if weight.shape[0] == u.shape[1]:
        return torch.einsum("ijdk,bik->bijd", weight, u)
    by_weight = u.unflatten(1, (weight.shape[0], -1))
    return torch.einsum("wjdk,bwmk->bwmjd", weight, by_weight).flatten(1, 2)


def einsum_routing(u: Tensor, weight: Tensor, num_iterations: int) -> Tensor:
    """A clean einsum implementation: u_hat, s and the agreement by ``torch.einsum``."""
    u_hat = predictions(u, weight)
    b = u_hat.new_zeros(u_hat.shape[:3])
    for _ in range(num_iterations - 1):
        v = squash(torch.einsum("bij,bijd->bjd", b.softmax(-1), u_hat))
        b = b + torch.einsum("bijd,bjd->bij", u_hat, v)
    return squash(torch.einsum("bij,bijd->bjd", b.softmax(-1), u_hat))


def multiply_sum_routing(u: Tensor, weight: Tensor, num_iterations: int) -> Tensor:
    """s and the agreement by a broadcast product and a sum, which compilers fuse best."""
    u_hat = predictions(u, weight)
    b = u_hat.new_zeros(u_hat.shape[:3])
    for _ in range(num_iterations - 1):
        v = squash((b.softmax(-1)[..., None] * u_hat).sum(1))
        b = b + (u_hat * v[:, None]).sum(-1)
    return squash((b.softmax(-1)[..., None] * u_hat).sum(1))


def matmul_routing(u: Tensor, weight: Tensor, num_iterations: int) -> Tensor:
    """s and the agreement by batched ``matmul``, for which u_hat lies as [B, J, I, D]."""
    u_hat = predictions(u, weight).transpose(1, 2).contiguous()
    b = u_hat.new_zeros(*u_hat.shape[:2], 1, u_hat.shape[2])  # [B, J, 1, I]
    for _ in range(num_iterations - 1):
        v = squash(b.softmax(1) @ u_hat)
        b = b + (u_hat @ v.mT).mT
    return squash(b.softmax(1) @ u_hat).squeeze(2)


def contracted_routing(u: Tensor, weight: Tensor, num_iterations: int) -> Tensor:
    """Without u_hat: the logits are u . (V W) for V = v^1 + v^2 + ..., and s is (c u) W."""
    B, I, K = u.shape
    J, D = weight.shape[1:3]
    W = weight.repeat_interleave(I // weight.shape[0], 0)
    W = W.permute(1, 0, 3, 2).reshape(J, I * K, D)
    s = u.reshape(B, I * K) @ W / J  # [J, B, D]
    V = torch.zeros_like(s)
    for _ in range(num_iterations - 1):
        V = V + squash(s)
        logits = ((V @ W.mT).view(J, B, I, K) * u).sum(-1)
        s = (logits.softmax(0)[..., None] * u).view(J, B, I * K) @ W
    return squash(s).transpose(0, 1)


def tiled_routing(u: Tensor, weight: Tensor, num_iterations: int) -> Tensor:
    """The form popular repositories use: W and u tiled over batch and capsules, then ``matmul``."""
    B, I, _ = u.shape
    J = weight.shape[1]
    W = weight.repeat_interleave(I // weight.shape[0], 0)
    W_tiled = W[None].repeat(B, 1, 1, 1, 1)  # [B, I, J, D, K]
    u_tiled = u[:, :, None, :, None].repeat(1, 1, J, 1, 1)  # [B, I, J, K, 1]
    u_hat = (W_tiled @ u_tiled).squeeze(-1)
    b = u_hat.new_zeros(B, I, J)
    for _ in range(num_iterations - 1):
        v = squash((b.softmax(-1)[..., None] * u_hat).sum(1, keepdim=True))
        b = b + (u_hat * v).sum(-1)
    return squash((b.softmax(-1)[..., None] * u_hat).sum(1))


@dataclass(frozen=True)
class Implementation:
    """A way to compute routing: ours, or a peer's. ``make`` has the one for a shape.

    ``family`` is "ours", "eager" or "compiled". ``stored`` says roughly how many buffers of the
    size of ``u_hat`` forward and backward hold at their peak: only to skip what would run the
    machine out of memory. ``missing`` is the reason why it can't be used here at all.
    """

    name: str
    family: str
    make: Callable[[Shape], Routing]
    stored: float = 0.0
    missing: str | None = None

    def reason_to_skip(self, shape: Shape, B: int, device: str) -> str | None:
        """Why this can't run here now, or None."""
        if self.missing:
            return self.missing
        return reason_it_does_not_fit(self.stored * shape.prediction_bytes(B), device)


def reason_it_does_not_fit(needed: float, device: str) -> str | None:
    """Why so many bytes should not be asked for now, or None."""
    free = free_memory(device)
    if needed <= 0.8 * free:
        return None
    return f"too little memory: needs about {needed / GIB:.0f} of {free / GIB:.0f} GiB free"


def fused(backend: str, shape: Shape) -> Routing:
    if isinstance(shape, Convolution):
        stride = shape.stride
        return lambda u, weight, R: fused_routing_conv(u, weight, R, stride=stride, backend=backend)
    return lambda u, weight, R: fused_routing(
        u, weight, R, weight_sharing=u.shape[1] // weight.shape[0], backend=backend
    )


def eager(routing: Routing, shape: Shape) -> Routing:
    """A peer, which knows nothing of windows: they are copied for it."""
    if not isinstance(shape, Convolution):
        return routing

    def over_windows(u: Tensor, weight: Tensor, num_iterations: int) -> Tensor:
        v = routing(shape.windows(u), weight.flatten(0, 2), num_iterations)
        return shape.on_grid(v)

    return over_windows


def compiled(routing: Routing, mode: str, shape: Shape) -> Routing:
    """Compiled for one shape; CUDA graphs are left to the timer, which replays every peer."""
    return torch.compile(
        eager(routing, shape),
        dynamic=False,
        mode=mode.replace("max-autotune", "max-autotune-no-cudagraphs"),
    )


ORACLE_STORED = 8.0
"""Buffers of the size of u_hat that the oracle holds at its peak, roughly."""
BACKENDS = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
"""The fused backends that run on a device."""
EAGER: dict[str, tuple[Routing, float]] = {
    "einsum": (einsum_routing, 6.0),
    "multiply-sum": (multiply_sum_routing, 8.0),
    "matmul": (matmul_routing, 6.0),
    "contracted": (contracted_routing, 6.0),
    "tiled W": (tiled_routing, 24.0),  # W tiled and its gradient hold K buffers each
}
COMPILED = ("einsum", "multiply-sum", "contracted")


def ours(device: str) -> list[Implementation]:
    """Every fused backend of the device."""
    statuses = backends()
    return [
        Implementation(
            f"ours ({name})",
            "ours",
            partial(fused, name),
            missing=None if statuses[name].usable else statuses[name].reason,
        )
        for name in BACKENDS[device]
    ]


def peers(modes: Iterable[str] = ("default",), which: str = "all") -> list[Implementation]:
    """Eager peers, then ``torch.compile`` of the stronger ones in each mode.

    ``which``: "all", "eager" or "none" of them.
    """
    if which == "none":
        return []
    uncompiled = [
        Implementation(f"eager {name}", "eager", partial(eager, routing), stored)
        for name, (routing, stored) in EAGER.items()
    ]
    if which == "eager":
        return uncompiled
    return uncompiled + [
        Implementation(
            f"compiled {name}" + ("" if mode == "default" else f" ({mode})"),
            "compiled",
            partial(compiled, EAGER[name][0], mode),
            EAGER[name][1],
        )
        for mode in modes
        for name in COMPILED
    ]


def chosen_peers(options: argparse.Namespace) -> list[Implementation]:
    """What ``options.add_peers_arguments`` asks for."""
    on_gpu = options.device == "cuda"
    autotune = on_gpu if options.max_autotune is None else options.max_autotune
    return peers(("default", "max-autotune") if autotune else ("default",), options.peers)


def oracle(shape: Shape) -> Routing:
    return fused("reference", shape)


def check_equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], R: int) -> None:
    """Raise ``ValueError`` unless v and its gradients agree with the oracle's (``expected``).

    A guard against comparing different functions, not a test of accuracy: it allows a hundred
    times the rounding of the dtype (TF32's, where that is allowed), relative to the largest value,
    for three iterations, and more in proportion: each rounds what the one before has rounded.
    """
    eps = torch.finfo(expected[0].dtype).eps
    if expected[0].is_cuda and torch.get_float32_matmul_precision() != "highest":  # needs a GPU
        eps = max(eps, 2**-11)
    for name, x, reference in zip(("v", "grad_u", "grad_weight"), found, expected, strict=True):
        error = float((x - reference).abs().max() / reference.abs().max())
        if not error <= 100 * eps * max(1, R / 3):
            raise ValueError(
                f"{name} {list(x.shape)} is off the oracle's by {error:.1e} of its largest value"
            )


def outputs_and_gradients(routing: Routing, inputs: Inputs, R: int) -> tuple[Tensor, ...]:
    v = routing(inputs.u, inputs.weight, R)
    return v.detach(), *torch.autograd.grad(v, (inputs.u, inputs.weight), inputs.grad_v)


def free_memory(device: str) -> int:
    """Bytes that can still be allocated on the device."""
    if device == "cuda":  # needs a GPU
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + unused
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":") for line in file)
    except OSError:  # no Linux: nothing is skipped
        return 2**62
    return int(fields["MemAvailable"].split()[0]) * 1024

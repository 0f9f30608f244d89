"""Convolutional layers for tests: sizes, inputs, and a backend's results against the oracle's."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from capsule_kernels import fused_routing_conv

from .tolerance import assert_as_good_as_reference, reference_dtype


@dataclass(frozen=True)
class Conv:
    """Sizes and options of a convolutional layer."""

    B: int = 2
    C: int = 3
    K: int = 8
    H: int = 5
    W: int = 6
    J: int = 3
    D: int = 16
    window: tuple[int, int] = (3, 2)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    routing_gradient: str = "full"

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.C, self.J, self.D, self.K


CASES = [
    Conv(),
    Conv(B=3, stride=(1, 2), padding=(1, 0), routing_gradient="last"),
    Conv(B=7, K=3, D=5, J=4, C=5, stride=(2, 1), padding=(1, 1)),
    # Steps no smaller than the window: no capsule is in two windows.
    Conv(B=9, window=(2, 3), stride=(2, 3)),
    Conv(B=6, window=(1, 2), stride=(3, 2), C=9),
    # Few samples, lanes are capsules: in one window, and in several.
    Conv(B=1, H=3, W=2, C=11),
    Conv(B=1, H=4, W=2, C=11),
    Conv(B=1, H=3, W=3, K=3, C=5, padding=(1, 0)),
    # The weights of a type are too large to be in the cache together.
    Conv(B=5, J=33, C=2, window=(3, 3)),
    Conv(B=1, H=4, W=3, J=33, C=2, window=(3, 3)),
    # More types than tasks, and one.
    Conv(B=2, J=1, D=1, K=1, C=70),
    Conv(B=8, C=1, K=16, D=8, window=(5, 5)),
]


def make_inputs(case: Conv, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "u": (case.B, case.C, case.K, case.H, case.W),
        "weight": (case.C, *case.window, case.J, case.D, case.K),
        "logits": (case.C, *case.window, case.J),
        "bias": (case.J, case.D),
    }
    scale = {"weight": (case.K * case.D) ** -0.5 * 2}
    return {
        name: (scale.get(name, 1.0) * torch.randn(shape, generator=generator)).to(device, dtype)
        for name, shape in shapes.items()
    }


def run(
    case: Conv,
    inputs: dict[str, Tensor],
    backend: str,
    order: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """v, c and the gradients of a random loss of v, whose output types and dimensions are in an
    ``order``."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    v, coupling = fused_routing_conv(
        **leaves, stride=case.stride, padding=case.padding, leaky=True, return_coupling=True,
        routing_gradient=case.routing_gradient, backend=backend, **options,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    grad_v = torch.randn(v.shape, generator=generator).bfloat16().to(v.device, v.dtype)
    if order is not None:
        j, d = order
        grad_v = grad_v[:, j][:, :, d]
    gradients = torch.autograd.grad(v, list(leaves.values()), grad_v)
    named = {f"grad_{name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {"v": v.detach(), "coupling": coupling} | named


def oracle(case: Conv, inputs: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The oracle over types and dimensions in another order: it differs by rounding alone."""
    generator = torch.Generator().manual_seed(seed)
    c, j, d, k = (
        torch.randperm(size, generator=generator).to(inputs["u"].device) for size in case.sizes
    )
    moved = {
        "u": inputs["u"][:, c][:, :, k],
        "weight": inputs["weight"][c][..., j, :, :][..., d, :][..., k],
        "logits": inputs["logits"][c][..., j],
        "bias": inputs["bias"][j][:, d],
    }
    found = run(case, moved, "reference", (j, d))
    c, j, d, k = (order.argsort() for order in (c, j, d, k))
    return {
        "v": found["v"][:, j][:, :, d],
        "coupling": found["coupling"][:, c][:, :, :, :, j],
        "grad_u": found["grad_u"][:, c][:, :, k],
        "grad_weight": found["grad_weight"][c][..., j, :, :][..., d, :][..., k],
        "grad_logits": found["grad_logits"][c][..., j],
        "grad_bias": found["grad_bias"][j][:, d],
    }


def check(case: Conv, dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    """Outputs, couplings and every gradient of a backend, by the tolerance rule."""
    inputs = make_inputs(case, dtype, device)
    found = run(case, inputs, backend)
    exact = run(case, {name: x.double() for name, x in inputs.items()}, "reference")
    assert found.keys() == exact.keys(), f"{case}: {[*found]}, the oracle: {[*exact]}"
    same = {name: x.to(reference_dtype(dtype)) for name, x in inputs.items()}
    references = [oracle(case, same, seed) for seed in range(8)]
    for name in exact:
        assert_as_good_as_reference(
            f"{case}: {name}", found[name], [r[name] for r in references], exact[name]
        )

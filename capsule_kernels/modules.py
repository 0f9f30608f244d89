"""Layers of capsules as ``torch.nn.Module``."""

import torch
from torch import Tensor, nn

from .api import fused_routing
from .dispatch import CHOICES
from .validation import ROUTING_GRADIENTS, check_bool, check_choice, check_int


class CapsuleLinear(nn.Module):
    """A fully connected layer of capsules with dynamic routing (Sabour et al. 2017, DigitCaps).

    Maps u [B, in_capsules, in_dim] to v [B, out_capsules, out_dim].

    Args:
        in_capsules: input capsules I.
        in_dim: their dimension K.
        out_capsules: output capsules J.
        out_dim: their dimension D.
        num_iterations: routing iterations R.
        bias: learn a bias [J, D], added to s in every iteration, initially 0.1 as in the authors'
            code; the paper has none.
        learn_logits: learn the log priors [I, J], initially 0 (the paper mentions it, section 2).
        leaky, weight_sharing, routing_gradient, backend: as in :func:`fused_routing`.
        device, dtype: of the parameters.

    Parameters: ``weight`` [I // weight_sharing, J, D, K], ``bias`` [J, D] or None, ``logits``
    [I, J] or None. Weights start normal with a standard deviation of 0.1, the authors' choice.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    logits: nn.Parameter | None

    def __init__(
        self,
        in_capsules: int,
        in_dim: int,
        out_capsules: int,
        out_dim: int,
        num_iterations: int = 3,
        bias: bool = False,
        *,
        learn_logits: bool = False,
        leaky: bool = False,
        weight_sharing: int = 1,
        routing_gradient: str = "full",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("in_capsules", in_capsules),
            ("in_dim", in_dim),
            ("out_capsules", out_capsules),
            ("out_dim", out_dim),
            ("num_iterations", num_iterations),
            ("weight_sharing", weight_sharing),
        ):
            check_int(name, value, "CapsuleLinear")
        for name, value in (("bias", bias), ("learn_logits", learn_logits), ("leaky", leaky)):
            check_bool(name, value, "CapsuleLinear")
        check_choice("routing_gradient", routing_gradient, ROUTING_GRADIENTS, "CapsuleLinear")
        check_choice("backend", backend, CHOICES, "CapsuleLinear")
        if in_capsules % weight_sharing != 0:
            raise ValueError(
                f"CapsuleLinear: weight_sharing must divide in_capsules = {in_capsules}, "
                f"got {weight_sharing}"
            )
        self.in_capsules = in_capsules
        self.in_dim = in_dim
        self.out_capsules = out_capsules
        self.out_dim = out_dim
        self.num_iterations = num_iterations
        self.leaky = leaky
        self.weight_sharing = weight_sharing
        self.routing_gradient = routing_gradient
        self.backend = backend

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight = parameter(in_capsules // weight_sharing, out_capsules, out_dim, in_dim)
        self.bias = parameter(out_capsules, out_dim) if bias else None
        self.logits = parameter(in_capsules, out_capsules) if learn_logits else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.1)
        if self.bias is not None:
            nn.init.constant_(self.bias, 0.1)
        if self.logits is not None:
            nn.init.zeros_(self.logits)

    def forward(self, u: Tensor) -> Tensor:
        """Output capsules [B, out_capsules, out_dim] for inputs u [B, in_capsules, in_dim]."""
        return fused_routing(
            u,
            self.weight,
            self.num_iterations,
            logits=self.logits,
            bias=self.bias,
            leaky=self.leaky,
            weight_sharing=self.weight_sharing,
            routing_gradient=self.routing_gradient,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        parts = [
            f"in_capsules={self.in_capsules}, in_dim={self.in_dim}",
            f"out_capsules={self.out_capsules}, out_dim={self.out_dim}",
            f"num_iterations={self.num_iterations}, bias={self.bias is not None}",
        ]
        defaults = {
            "leaky": False,
            "weight_sharing": 1,
            "routing_gradient": "full",
            "backend": "auto",
        }
        if self.logits is not None:
            parts.append("learn_logits=True")
        parts += [
            f"{name}={getattr(self, name)!r}"
            for name, default in defaults.items()
            if getattr(self, name) != default
        ]
        return ", ".join(parts)

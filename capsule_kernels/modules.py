"""Layers of capsules as ``torch.nn.Module``."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .api import fused_routing, under_autocast
from .conv import fused_routing_conv
from .dispatch import CHOICES
from .validation import (
    check_choice,
    check_dtype,
    check_int,
    check_layer_input,
    check_options,
    check_pair,
)


class CapsuleLayer(nn.Module):
    """What layers of capsules share: their parameters, how these start, and the options of routing.

    Parameters: ``weight`` [..., J, D, K], ``bias`` [J, D] or None, ``logits`` [..., J] or None.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    logits: nn.Parameter | None

    SIZES: ClassVar[tuple[str, ...]]
    """Arguments that the representation always shows."""
    OPTIONS: ClassVar[dict[str, Any]] = {
        "leaky": False,
        "routing_gradient": "full",
        "backend": "auto",
    }
    """Arguments that it shows where they are not as here."""

    def __init__(
        self,
        weight_shape: tuple[int, ...],
        logits_shape: tuple[int, ...],
        num_iterations: int,
        bias: bool,
        learn_logits: bool,
        leaky: bool,
        routing_gradient: str,
        backend: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        caller = type(self).__name__
        check_options(
            num_iterations, leaky, routing_gradient, caller, bias=bias, learn_logits=learn_logits
        )
        check_choice("backend", backend, CHOICES, caller)
        if dtype is not None:
            check_dtype("dtype", dtype, caller)
        self.num_iterations = num_iterations
        self.leaky = leaky
        self.routing_gradient = routing_gradient
        self.backend = backend

        def parameter(shape: tuple[int, ...]) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight = parameter(weight_shape)
        self.bias = parameter(weight_shape[-3:-1]) if bias else None
        self.logits = parameter(logits_shape) if learn_logits else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights normal with a standard deviation of 0.1, bias 0.1, logits 0."""
        nn.init.normal_(self.weight, std=0.1)
        if self.bias is not None:
            nn.init.constant_(self.bias, 0.1)
        if self.logits is not None:
            nn.init.zeros_(self.logits)

    def check_input(self, u: Tensor, weight: Tensor, shape: str, *sizes: int | None) -> None:
        """Raise where u [``shape``] does not fit this layer, whose weight is ``weight``."""
        check_layer_input(u, shape, sizes, weight, under_autocast(u), type(self).__name__)

    def extra_repr(self) -> str:
        """The arguments that make this layer anew."""
        shown = {name: getattr(self, name) for name in self.SIZES}
        shown["bias"] = self.bias is not None
        if self.logits is not None:
            shown["learn_logits"] = True
        for name, default in self.OPTIONS.items():
            if getattr(self, name) != default:
                shown[name] = getattr(self, name)
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


class CapsuleLinear(CapsuleLayer):
    """A fully connected layer of capsules with dynamic routing (Sabour et al. 2017, DigitCaps).

    Maps u [B, in_capsules, in_dim] to v [B, out_capsules, out_dim]; see :func:`fused_routing`.
    u has the device of the layer and, unless ``torch.autocast`` casts it, the dtype.

    Args:
        in_capsules: number of input capsules, I.
        in_dim: their dimension K.
        out_capsules: number of output capsules, J.
        out_dim: their dimension D.
        num_iterations: routing iterations R >= 1.
        bias: learn a bias [J, D], added to s in every iteration, initially 0.1 as in the authors'
            code; the paper has none.
        learn_logits: learn the log priors [I, J], initially 0 (the paper mentions it, section 2).
        leaky, weight_sharing, routing_gradient, backend: as in :func:`fused_routing`.
        device, dtype: of the parameters.

    Parameters: ``weight`` [I // weight_sharing, J, D, K], ``bias`` [J, D] or None, ``logits``
    [I, J] or None. Weights start normal with a standard deviation of 0.1, the authors' choice.

    Raises ``ValueError`` or ``TypeError`` where an argument does not fit; the message names it.

    Example::

        digit_caps = CapsuleLinear(1152, 8, 10, 16)
        v = digit_caps(torch.randn(128, 1152, 8))  # [128, 10, 16]
    """

    SIZES = ("in_capsules", "in_dim", "out_capsules", "out_dim", "num_iterations")
    OPTIONS = CapsuleLayer.OPTIONS | {"weight_sharing": 1}

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
        caller = type(self).__name__
        for name, value in (
            ("in_capsules", in_capsules),
            ("in_dim", in_dim),
            ("out_capsules", out_capsules),
            ("out_dim", out_dim),
            ("weight_sharing", weight_sharing),
        ):
            check_int(name, value, caller)
        if in_capsules % weight_sharing != 0:
            raise ValueError(
                f"{caller}: weight_sharing must divide in_capsules = {in_capsules}, "
                f"got {weight_sharing}"
            )
        super().__init__(
            (in_capsules // weight_sharing, out_capsules, out_dim, in_dim),
            (in_capsules, out_capsules),
            num_iterations,
            bias,
            learn_logits,
            leaky,
            routing_gradient,
            backend,
            device,
            dtype,
        )
        self.in_capsules = in_capsules
        self.in_dim = in_dim
        self.out_capsules = out_capsules
        self.out_dim = out_dim
        self.weight_sharing = weight_sharing

    def forward(self, u: Tensor) -> Tensor:
        """Output capsules [B, out_capsules, out_dim] for inputs u [B, in_capsules, in_dim]."""
        weight = self.weight  # once: it may be parametrized
        self.check_input(u, weight, "[B, in_capsules, in_dim]", None, self.in_capsules, self.in_dim)
        return fused_routing(
            u,
            weight,
            self.num_iterations,
            logits=self.logits,
            bias=self.bias,
            leaky=self.leaky,
            weight_sharing=self.weight_sharing,
            routing_gradient=self.routing_gradient,
            backend=self.backend,
        )


class CapsuleConv2d(CapsuleLayer):
    """A convolutional layer of capsules with dynamic routing in every window.

    Maps u [B, in_types, in_dim, H, W] to v [B, out_types, out_dim, H', W'], with H' = (H +
    2 padding - kernel_size) // stride + 1 and W' likewise; see :func:`fused_routing_conv`. u has
    the device of the layer and, unless ``torch.autocast`` casts it, the dtype.

    Args:
        in_types: number of types of input capsules, C; each is on the whole grid.
        in_dim: their dimension K.
        out_types: number of types of output capsules, J.
        out_dim: their dimension D.
        kernel_size: sides of the window; one number for both, or (rows, columns).
        stride, padding: of the window, one number or two likewise.
        num_iterations: routing iterations R >= 1.
        bias: learn a bias [J, D], added to s in every iteration, initially 0.1.
        learn_logits: learn the log priors [C, kh, kw, J], initially 0.
        leaky, routing_gradient, backend: as in :func:`fused_routing`.
        device, dtype: of the parameters.

    Parameters: ``weight`` [C, kh, kw, J, D, K], initially normal with a standard deviation of 0.1,
    ``bias`` [J, D] or None, and ``logits`` [C, kh, kw, J] or None.

    Raises ``ValueError`` or ``TypeError`` where an argument does not fit; the message names it.

    Example::

        caps = CapsuleConv2d(8, 4, 6, 5, kernel_size=3, stride=2)
        v = caps(torch.randn(16, 8, 4, 12, 12))  # [16, 6, 5, 5, 5]
    """

    SIZES = (
        "in_types", "in_dim", "out_types", "out_dim", "kernel_size", "stride", "padding",
        "num_iterations",
    )  # fmt: skip

    def __init__(
        self,
        in_types: int,
        in_dim: int,
        out_types: int,
        out_dim: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        num_iterations: int = 3,
        bias: bool = False,
        *,
        learn_logits: bool = False,
        leaky: bool = False,
        routing_gradient: str = "full",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        caller = type(self).__name__
        for name, value in (
            ("in_types", in_types),
            ("in_dim", in_dim),
            ("out_types", out_types),
            ("out_dim", out_dim),
        ):
            check_int(name, value, caller)
        window = check_pair("kernel_size", kernel_size, caller)
        check_pair("stride", stride, caller)
        check_pair("padding", padding, caller, least=0)
        super().__init__(
            (in_types, *window, out_types, out_dim, in_dim),
            (in_types, *window, out_types),
            num_iterations,
            bias,
            learn_logits,
            leaky,
            routing_gradient,
            backend,
            device,
            dtype,
        )
        self.in_types = in_types
        self.in_dim = in_dim
        self.out_types = out_types
        self.out_dim = out_dim
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding

    def forward(self, u: Tensor) -> Tensor:
        """Output capsules [B, out_types, out_dim, H', W'] for u [B, in_types, in_dim, H, W]."""
        weight, sizes = self.weight, (None, self.in_types, self.in_dim, None, None)
        self.check_input(u, weight, "[B, in_types, in_dim, H, W]", *sizes)
        return fused_routing_conv(
            u,
            weight,
            self.num_iterations,
            stride=self.stride,
            padding=self.padding,
            logits=self.logits,
            bias=self.bias,
            leaky=self.leaky,
            routing_gradient=self.routing_gradient,
            backend=self.backend,
        )

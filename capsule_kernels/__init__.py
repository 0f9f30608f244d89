"""Fused dynamic routing between capsules (Sabour, Frosst, Hinton 2017) for PyTorch.

Functions: :func:`fused_routing`, and :func:`fused_routing_conv` in windows of a grid. The same as
layers: :class:`CapsuleLinear`, :class:`CapsuleConv2d`. :func:`backends` says what can run here,
:func:`rearrange_weight` takes weights of other implementations, and :func:`reference_routing` and
:func:`squash` are the mathematics in plain PyTorch.
"""

from .api import fused_routing
from .autograd import FusedRouting
from .conv import fused_routing_conv
from .dispatch import BackendStatus, backends
from .layouts import rearrange_weight
from .modules import CapsuleConv2d, CapsuleLinear
from .reference import reference_routing, squash
from .version import __version__

__all__ = [
    "BackendStatus",
    "CapsuleConv2d",
    "CapsuleLinear",
    "FusedRouting",
    "__version__",
    "backends",
    "fused_routing",
    "fused_routing_conv",
    "rearrange_weight",
    "reference_routing",
    "squash",
]

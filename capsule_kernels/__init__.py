"""Fused dynamic routing between capsules (Sabour, Frosst, Hinton 2017) for PyTorch."""

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

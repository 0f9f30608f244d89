"""Fused dynamic routing between capsules (Sabour, Frosst, Hinton 2017) for PyTorch."""

from .api import fused_routing
from .autograd import FusedRouting
from .dispatch import BackendStatus, backends
from .modules import CapsuleLinear
from .reference import reference_routing, squash
from .version import __version__

__all__ = [
    "BackendStatus",
    "CapsuleLinear",
    "FusedRouting",
    "__version__",
    "backends",
    "fused_routing",
    "reference_routing",
    "squash",
]

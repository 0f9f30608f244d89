"""A network from its architecture."""

from .capsnet import CapsNet
from .config import Architecture

Network = CapsNet


def build(architecture: Architecture, backend: str = "auto") -> Network:
    """The network an architecture describes, freshly initialised."""
    return CapsNet(architecture, backend)

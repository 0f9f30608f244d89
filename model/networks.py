"""A network from its architecture."""

from .baseline import CNN, PooledCNN
from .capsnet import CapsNet
from .config import Architecture

Network = CapsNet | CNN | PooledCNN


def build(architecture: Architecture, backend: str = "auto") -> Network:
    """The network an architecture describes, freshly initialised; ``backend`` is the routing's."""
    if architecture.network == "cnn":
        return CNN(architecture)
    if architecture.network == "pooled-cnn":
        return PooledCNN(architecture)
    return CapsNet(architecture, backend)

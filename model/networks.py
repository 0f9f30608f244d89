"""A network from its architecture, or from a checkpoint."""

from pathlib import Path

import torch

from .baseline import CNN, PooledCNN
from .capsnet import CapsNet
from .checkpoint import Checkpoint, restore_model
from .commands import usable_backend
from .config import Architecture

Network = CapsNet | CNN | PooledCNN


def build(architecture: Architecture, backend: str = "auto") -> Network:
    """The network an architecture describes, freshly initialised; ``backend`` is the routing's."""
    if architecture.network == "cnn":
        return CNN(architecture)
    if architecture.network == "pooled-cnn":
        return PooledCNN(architecture)
    return CapsNet(architecture, backend)


def restored(state: Checkpoint, source: Path, device: torch.device, backend: str) -> Network:
    """The trained network of a checkpoint read from ``source``, on a device, ready for tests.

    UserError for a backend that can't be used on this device.
    """
    usable_backend(backend, device)
    network = build(state.config.architecture, backend).to(device).eval()
    restore_model(network, state, source)
    return network

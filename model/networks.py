"""A network from its architecture, or from a checkpoint."""

from pathlib import Path

import torch

from capsule_kernels import fused_routing

from .baseline import CNN, PooledCNN
from .capsnet import CapsNet
from .checkpoint import Checkpoint, restore_model
from .config import Architecture
from .errors import UserError

Network = CapsNet | CNN | PooledCNN


def build(architecture: Architecture, backend: str = "auto") -> Network:
    """The network an architecture describes, freshly initialised; ``backend`` is the routing's."""
    if architecture.network == "cnn":
        return CNN(architecture)
    if architecture.network == "pooled-cnn":
        return PooledCNN(architecture)
    return CapsNet(architecture, backend)


def check_backend(name: str, device: torch.device, architecture: Architecture) -> None:
    """UserError, with the routing's own reason, if a network's can't run by it on this device."""
    a = architecture
    if a.network != "capsnet":
        return
    I, J, D, K = a.capsule_types * a.capsule_grid**2, a.classes, a.class_dim, a.capsule_dim
    # Of no sample, so that it is chosen and checked but has nothing to do.
    u = torch.empty(0, I, K, device=device)
    weight = torch.empty(1, device=device).expand(I, J, D, K)
    try:
        with torch.no_grad():
            fused_routing(u, weight, a.routings, backend=name)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0].rpartition("can't be used: ")[2]
        raise UserError(f"--backend {name} can't be used on {device}: {reason}") from None


def restored(state: Checkpoint, source: Path, device: torch.device, backend: str) -> Network:
    """The trained network of a checkpoint read from ``source``, on a device, ready for tests.

    UserError for a backend that can't be used for it on this device.
    """
    check_backend(backend, device, state.config.architecture)
    network = build(state.config.architecture, backend).to(device).eval()
    restore_model(network, state, source)
    return network

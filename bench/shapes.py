"""The shapes that are measured, their inputs, and the operations and bytes that they need."""

from dataclasses import dataclass

import torch
from torch import Tensor

GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """Sizes of a routing layer: I input capsules [K], J output capsules [D].

    Operations are those of the form that takes the fewest: predictions of every capsule, or, where
    ``weight_sharing`` capsules share a weight, products of the weight with the states
    (docs/kernels-cpu.md counts both).
    """

    name: str
    I: int
    J: int
    K: int = 8
    D: int = 16
    weight_sharing: int = 1

    @property
    def weights(self) -> int:
        return self.I // self.weight_sharing

    def forward_operations(self, B: int, R: int = 3) -> int:
        """Floating-point operations of the fused forward, two a multiply-add."""
        N, K = self.J * self.D, self.K
        predicting = self.I * (R * N * K + 2 * (R - 1) * N)
        contracting = self.weights * (2 * R - 1) * N * K + self.I * K * (1 + 2 * (R - 1) * self.J)
        return 2 * B * min(predicting, contracting)

    def backward_operations(self, B: int, R: int = 3) -> int:
        """Floating-point operations of the fused backward through all iterations."""
        N, K = self.J * self.D, self.K
        sweeps = (R - 1) * (N * K + 3 * N)
        last_sweep = 3 * N * K + (4 * R - 3) * N
        contracted_sweeps = (R - 1) * (self.weights * 3 * N * K + self.I * 3 * K * self.J)
        contracted_last = self.weights * (4 * R - 2) * N * K
        contracted_last += self.I * K * (1 + 6 * (R - 1) * self.J)
        return 2 * B * min(self.I * (sweeps + last_sweep), contracted_sweeps + contracted_last)

    def operations(self, B: int, R: int, backward: bool) -> int:
        """Floating-point operations of a forward, or of forward and backward together."""
        return self.forward_operations(B, R) + backward * self.backward_operations(B, R)

    def bytes(self, B: int, backward: bool, itemsize: int = 4) -> int:
        """Bytes that must cross the memory bus at least once: inputs, outputs, gradients."""
        inputs = B * self.I * self.K + self.weights * self.J * self.D * self.K
        outputs = B * self.J * self.D
        return itemsize * (inputs + outputs + backward * (2 * inputs + outputs))

    def prediction_bytes(self, B: int, itemsize: int = 4) -> int:
        """Size of ``u_hat`` [B, I, J, D], which a fused implementation never stores."""
        return itemsize * B * self.I * self.J * self.D


MNIST = Shape("MNIST", 1152, 10)
MANY_CLASSES = Shape("many classes", 3872, 196)
SHAPES = (
    MNIST,
    Shape("MultiMNIST 36x36", 3200, 10),
    Shape("affNIST 40x40", 4608, 10),
    Shape("smallNORB 32x32", 2048, 5),
    Shape("CIFAR-10 24x24", 9216, 10),
    Shape("SVHN (reduced)", 1024, 10, K=6, D=8),
    MANY_CLASSES,
)
"""Routing layers of the paper's networks, and the one of a published out-of-memory report."""
SHARED = Shape("MNIST, a weight a type", 1152, 10, weight_sharing=36)
"""The 36 capsules of each of the 32 types share a weight, as many networks have it."""


@dataclass(frozen=True)
class Inputs:
    """Leaves u [B, I, K] and weight [I // weight_sharing, J, D, K], and the gradient of v."""

    u: Tensor
    weight: Tensor
    grad_v: Tensor


def make_inputs(
    shape: Shape, B: int, device: str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Inputs:
    """Random inputs of about the size that training shows: |u| below 1, weights of 0.1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(device, dtype)

    return Inputs(
        (normal(B, shape.I, shape.K) * shape.K**-0.5).requires_grad_(),
        (normal(shape.weights, shape.J, shape.D, shape.K) * 0.1).requires_grad_(),
        normal(B, shape.J, shape.D),
    )

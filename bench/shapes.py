"""The shapes that are measured, their inputs, and the operations and bytes that they need."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from capsule_kernels.windows import capsules

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

    def samples(self, B: int) -> int:
        """How often a batch is routed: once for each of its samples."""
        return B

    def sizes(self, B: int) -> tuple[tuple[int, ...], ...]:
        """Of u, of the weights and of v."""
        I, J, K, D = self.I, self.J, self.K, self.D
        return (B, I, K), (self.weights, J, D, K), (B, J, D)

    def forward_operations(self, B: int, R: int = 3) -> int:
        """Floating-point operations of the fused forward, two a multiply-add."""
        N, K = self.J * self.D, self.K
        predicting = self.I * (R * N * K + 2 * (R - 1) * N)
        contracting = self.weights * (2 * R - 1) * N * K + self.I * K * (1 + 2 * (R - 1) * self.J)
        return 2 * self.samples(B) * min(predicting, contracting)

    def backward_operations(self, B: int, R: int = 3) -> int:
        """Floating-point operations of the fused backward through all iterations."""
        N, K = self.J * self.D, self.K
        sweeps = (R - 1) * (N * K + 3 * N)
        last_sweep = 3 * N * K + (4 * R - 3) * N
        contracted_sweeps = (R - 1) * (self.weights * 3 * N * K + self.I * 3 * K * self.J)
        contracted_last = self.weights * (4 * R - 2) * N * K
        contracted_last += self.I * K * (1 + 6 * (R - 1) * self.J)
        predicting, contracting = (
            self.I * (sweeps + last_sweep),
            contracted_sweeps + contracted_last,
        )
        return 2 * self.samples(B) * min(predicting, contracting)

    def operations(self, B: int, R: int, backward: bool) -> int:
        """Floating-point operations of a forward, or of forward and backward together."""
        return self.forward_operations(B, R) + backward * self.backward_operations(B, R)

    def bytes(self, B: int, backward: bool, itemsize: int = 4) -> int:
        """Bytes that must cross the memory bus at least once: inputs, outputs, gradients."""
        u, weight, v = map(math.prod, self.sizes(B))
        inputs, outputs = u + weight, v
        return itemsize * (inputs + outputs + backward * (2 * inputs + outputs))

    def prediction_bytes(self, B: int, itemsize: int = 4) -> int:
        """Size of ``u_hat`` [B, I, J, D], which a fused implementation never stores."""
        return itemsize * self.samples(B) * self.I * self.J * self.D


@dataclass(frozen=True)
class Convolution(Shape):
    """Convolutional capsules: I = C kh kw capsules under a square ``window`` that takes ``stride``
    steps over a square ``grid``. Every place of the window is routed; B counts grids."""

    grid: int = 14
    window: int = 3
    stride: int = 2

    @property
    def types(self) -> int:
        return self.I // self.window**2

    @property
    def places(self) -> int:
        """Of the window, along a side."""
        return (self.grid - self.window) // self.stride + 1

    def samples(self, B: int) -> int:
        return B * self.places**2

    def sizes(self, B: int) -> tuple[tuple[int, ...], ...]:
        C, J, K, D, window = self.types, self.J, self.K, self.D, self.window
        u, weight = (B, C, K, self.grid, self.grid), (C, window, window, J, D, K)
        return u, weight, (B, J, D, self.places, self.places)

    def windows(self, u: Tensor) -> Tensor:
        """A copy of each place's capsules, [samples, I, K]: of the grid [B, C, K, H, W]."""
        return capsules(u.permute(0, 3, 4, 1, 2), [self.window] * 2 + [self.stride] * 2)

    def on_grid(self, v: Tensor) -> Tensor:
        """[samples, J, D] as [B, J, D, H', W']."""
        return v.unflatten(0, (-1, self.places, self.places)).permute(0, 3, 4, 1, 2)


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
CONVOLUTION = Convolution("3x3 windows, stride 2", 32 * 3**2, 16)
"""32 types of capsules on 14 x 14 to 16 types on 6 x 6."""


@dataclass(frozen=True)
class Inputs:
    """Leaves u and weight, and the gradient of v, in the sizes of a shape."""

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

    u, weight, v = shape.sizes(B)
    return Inputs(
        (normal(*u) * shape.K**-0.5).requires_grad_(),
        (normal(*weight) * 0.1).requires_grad_(),
        normal(*v),
    )

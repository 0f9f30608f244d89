"""A CapsNet as popular PyTorch repositories write it, for comparison: same layers, same losses.

Contiguous convolutions, primary capsules reshaped from the channels without a permutation, and
predictions by a broadcast ``matmul``, detached in all but the last iteration. Written here after
their common structure; nothing is copied.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def squash(x: Tensor) -> Tensor:
    length = x.norm(dim=-1, keepdim=True)
    return length**2 / (1 + length**2) / (length + 1e-8) * x


class PopularCapsules(nn.Module):
    """u [B, I, K] to v [B, J, D], with weight [J, I, D, K]."""

    def __init__(self, I: int, K: int, J: int, D: int, num_iterations: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.01 * torch.randn(J, I, D, K))
        self.num_iterations = num_iterations

    def forward(self, u: Tensor) -> Tensor:
        u_hat = (self.weight @ u[:, None, :, :, None]).squeeze(-1)  # [B, J, I, D]
        u_hat_detached = u_hat.detach()
        b = u_hat.new_zeros(u_hat.shape[:3])  # [B, J, I]
        for _ in range(self.num_iterations - 1):
            c = b.softmax(dim=1)
            v = squash((c[..., None] * u_hat_detached).sum(dim=2, keepdim=True))
            b = b + (v * u_hat_detached).sum(dim=-1)
        return squash((b.softmax(dim=1)[..., None] * u_hat).sum(dim=2))


class PopularCapsNet(nn.Module):
    """The MNIST network; lengths [B, 10] and reconstructions [B, 784] of [B, 1, 28, 28]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 256, 9)
        self.primary = nn.Conv2d(256, 32 * 8, 9, stride=2)
        self.digits = PopularCapsules(1152, 8, 10, 16)
        self.decoder = nn.Sequential(
            nn.Linear(160, 512),
            nn.ReLU(),
            nn.Linear(512, 1024),
            nn.ReLU(),
            nn.Linear(1024, 784),
            nn.Sigmoid(),
        )

    def primary_capsules(self, images: Tensor) -> Tensor:
        x = self.primary(F.relu(self.conv1(images)))
        return squash(x.view(x.shape[0], -1, 8))

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """``labels`` [B, 1]: the class whose capsule is decoded."""
        v = self.digits(self.primary_capsules(images))
        mask = F.one_hot(labels[:, 0], 10).to(v.dtype)
        return v.norm(dim=-1), self.decoder((v * mask[..., None]).flatten(1))

"""The capsule network of the paper: Conv1, PrimaryCapsules, DigitCaps and the decoder."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capsule_kernels import CapsuleLinear, squash

from .config import Architecture
from .losses import Output, lengths
from .spectral import SpectralConv2d

KERNEL = 9
"""Side of both convolutions' kernels, in pixels."""


class PrimaryCapsules(nn.Module):
    """A convolution whose channels are the components of capsules (Sabour et al. 2017, section 4).

    Maps [B, in_channels, H, W] to u [B, types * H' * W', dim], each capsule squashed.

    Channel ``type * dim + d`` of the convolution is component d of the capsules of one type, so a
    capsule gathers ``dim`` channels at one position. Capsules are ordered by type, then by row and
    column: capsule ``(type * H' + y) * W' + x``. The ``H' * W'`` consecutive capsules of one type
    could thus share one weight (``weight_sharing`` of :class:`CapsuleLinear`).
    """

    def __init__(self, in_channels: int, types: int, dim: int, padding: int = 0) -> None:
        super().__init__()
        self.types, self.dim = types, dim
        self.convolution = SpectralConv2d(in_channels, types * dim, KERNEL, 2, padding)

    def forward(self, features: Tensor) -> Tensor:
        x = self.convolution(features)  # [B, types * dim, H', W']
        x = x.unflatten(1, (self.types, self.dim)).flatten(3)  # [B, types, dim, H' * W']
        return squash(x.transpose(2, 3).flatten(1, 2))  # [B, types * H' * W', dim]


class Decoder(nn.Sequential):
    """Three fully connected layers from the masked capsules to pixels (Sabour et al. 2017, 4.1)."""

    def __init__(self, inputs: int, pixels: int) -> None:
        super().__init__(
            nn.Linear(inputs, 512),
            nn.ReLU(),
            nn.Linear(512, 1024),
            nn.ReLU(),
            nn.Linear(1024, pixels),
            nn.Sigmoid(),
        )


class CapsNet(nn.Module):
    """The network of Sabour et al. 2017, figures 1 and 2.

    Args:
        architecture: sizes and options; see :class:`model.config.Architecture`.
        backend: of the routing: "auto", or one by name; "reference" is the oracle, which stores
            the prediction vectors.
    """

    def __init__(self, architecture: Architecture, backend: str = "auto") -> None:
        super().__init__()
        a = self.architecture = architecture
        padding = KERNEL // 2 if a.same_padding else 0
        self.conv1 = nn.Conv2d(a.in_channels, a.conv_channels, KERNEL, padding=padding)
        self.primary = PrimaryCapsules(a.conv_channels, a.capsule_types, a.capsule_dim, padding)
        self.digits = CapsuleLinear(
            a.capsule_types * a.capsule_grid**2,
            a.capsule_dim,
            a.classes,
            a.class_dim,
            num_iterations=a.routings,
            bias=a.bias,
            leaky=a.leaky,
            backend=backend,
        )
        self.decoder = (
            Decoder(a.classes * a.class_dim, a.in_channels * a.image_size**2)
            if a.reconstruction
            else None
        )
        # Convolutions on CPUs and tensor cores are fastest with the channels innermost.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def primary_capsules(self, images: Tensor) -> Tensor:
        """Input capsules u [B, I, K] of images [B, C, H, W] in 0..1."""
        images = images.contiguous(memory_format=torch.channels_last)
        return self.primary(F.relu(self.conv1(images), inplace=True))

    def capsules(self, images: Tensor) -> Tensor:
        """Class capsules v [B, J, D] of images [B, C, H, W] in 0..1."""
        return self.digits(self.primary_capsules(images))

    def reconstruct(self, capsules: Tensor, labels: Tensor) -> Tensor:
        """Images [B, T, C, H, W], each decoded from one of the capsules [B, J, D] alone.

        ``labels`` [B, T]: whose capsule is kept; all others are masked with zeros.
        """
        if self.decoder is None:
            raise ValueError("CapsNet: this network has no decoder (reconstruction=False)")
        a = self.architecture
        mask = F.one_hot(labels, a.classes).to(capsules.dtype)  # [B, T, J]
        masked = mask.unsqueeze(-1) * capsules.unsqueeze(1)  # [B, T, J, D]
        pixels = self.decoder(masked.flatten(2))
        return pixels.unflatten(-1, (a.in_channels, a.image_size, a.image_size))

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Output:
        """Lengths of the class capsules of images [B, C, H, W].

        With ``labels`` [B, T] also reconstructions, where the network has a decoder.
        """
        capsules = self.capsules(images)
        scores = lengths(capsules.float())
        if labels is None or self.decoder is None:
            return Output(scores)
        return Output(scores, self.reconstruct(capsules, labels))

"""Equivariance: as a digit moves, turns or thickens, its capsule stays long, its pose moves."""

from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from ..augment import standardize
from ..losses import lengths
from ..windows import window
from .decoded import picture
from .trained import Trained

STEPS = 9


def shifted(image: Tensor, amount: float) -> Tensor:
    """[C, H, W] moved to the right by whole pixels."""
    one = torch.zeros(1, dtype=torch.long, device=image.device)
    return window(image.unsqueeze(0), one, one, one - round(amount), image.shape[-1])[0]


def rotated(image: Tensor, degrees: float) -> Tensor:
    """[C, H, W] turned about its middle."""
    pixels = image.cpu().numpy()
    turned = ndimage.rotate(pixels, degrees, (1, 2), reshape=False, order=1, mode="grid-constant")
    return torch.from_numpy(turned).to(image.device)


def thickened(image: Tensor, pixels: float) -> Tensor:
    """[C, H, W] with strokes wider (or, if negative, thinner) by up to one pixel on each side."""
    wide = F.max_pool2d(image.unsqueeze(0), 3, 1, 1)[0]
    thin = -F.max_pool2d(-image.unsqueeze(0), 3, 1, 1)[0]
    return torch.lerp(image, wide if pixels > 0 else thin, abs(pixels))


CHANGES: dict[str, tuple[Callable[[Tensor, float], Tensor], float]] = {
    "shifted (pixels)": (shifted, 4),
    "rotated (degrees)": (rotated, 40),
    "thickened (pixels)": (thickened, 1),
}
"""Each from minus to plus the number."""


def equivariance(trained: Trained) -> Figure:
    """One image under three changes: its capsule's length, the other capsules', and its pose."""
    batch = trained.batch(4)
    image, label = batch.originals[-1, 0], int(batch.labels[-1, 0])
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    columns = figure.subfigures(1, len(CHANGES), squeeze=False)[0]
    for column, (name, (change, most)) in zip(columns, CHANGES.items(), strict=True):
        amounts = torch.linspace(-most, most, STEPS).tolist()
        images = torch.stack([change(image, x) for x in amounts])
        seen = standardize(images) if trained.config.standardize else images
        capsules = trained.network.capsules(seen).float()
        own = capsules[:, label].cpu()  # [STEPS, D]
        length = lengths(capsules).cpu()
        others = length.clone()
        others[:, label] = 0
        strip, above, below = column.subplots(3, 1, height_ratios=(0.45, 1, 1.5))
        strip.imshow(picture(torch.cat(list(images), -1)), cmap="gray", vmin=0, vmax=1)
        strip.set_axis_off()
        strip.set_title(f"{trained.classes[label]} {name}", fontsize=9)
        above.plot(amounts, length[:, label].numpy(), "o-", ms=3, label="its capsule")
        above.plot(
            amounts, others.amax(1).numpy(), "x--", ms=3, color="gray", label="longest other"
        )
        above.set_ylim(0, 1)
        above.set_ylabel("length |v|")
        above.legend(fontsize=7)
        below.plot(amounts, own.numpy(), lw=1)
        below.set_ylabel(f"the {own.shape[1]} components of v")
        below.set_xlabel(name)
    return figure

"""Figures of what the decoder draws: reconstructions, perturbed dimensions, segmentations."""

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..losses import correct, lengths
from ..views import overlaid
from .trained import Trained

PERTURBATIONS = [round(-0.25 + 0.05 * n, 2) for n in range(11)]
"""The paper's, figure 4."""


def picture(image: Tensor) -> np.ndarray:
    """[C, H, W] in 0..1 as matplotlib shows it, on the CPU: [H, W], or [H, W, 3] for colour."""
    image = image.detach().float().cpu()
    return (image.permute(1, 2, 0) if image.shape[0] == 3 else image[0]).numpy()


def tiles(rows: list[list[Tensor]], titles: list[list[str]], figure: Figure) -> None:
    """A grid of images [C, H, W], a title above each."""
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for y, (images, names) in enumerate(zip(rows, titles, strict=True)):
        for x, (image, name) in enumerate(zip(images, names, strict=True)):
            axes[y, x].imshow(picture(image), cmap="gray", vmin=0, vmax=1)
            axes[y, x].set_title(name, fontsize=7, pad=2)
            axes[y, x].set_axis_off()


def named(word: str, labels: Tensor, trained: Trained) -> list[str]:
    """A title for each image of the classes ``labels`` [n, T]."""
    return [f"{word} " + ", ".join(trained.classes[j] for j in some) for some in labels.tolist()]


def reconstructions(trained: Trained, columns: int = 10) -> Figure:
    """Test images above what their own class's and the found class's capsules draw.

    Like the paper's figure 3 (label, prediction, reconstruction target); images that are wrongly
    classified come first, as far as there are any, in up to half of the columns. Of overlapping
    pairs, two classes each.
    """
    batch = trained.batch(500)
    capsules = trained.network.capsules(batch.images)
    scores = lengths(capsules)
    right = correct(scores, batch.labels)
    wrong_ones = (~right).nonzero()[: columns // 2, 0]
    right_ones = right.nonzero()[: columns - len(wrong_ones), 0]
    chosen = torch.cat([wrong_ones, right_ones])
    true = batch.labels[chosen]
    found = scores[chosen].topk(true.shape[1]).indices
    rows, titles = [list(overlaid(batch.originals)[chosen])], [named("label", true, trained)]
    for which, word in ((true, "drawn as"), (found, "found")):
        rows.append(list(overlaid(trained.network.reconstruct(capsules[chosen], which))))
        titles.append(named(word, which, trained))
    figure = Figure(figsize=(1.05 * len(chosen), 3.6), layout="constrained")
    tiles(rows, titles, figure)
    return figure


def perturbations(trained: Trained, images: int = 3) -> Figure:
    """Each dimension of a class capsule moved over [-0.25, 0.25], decoded (the paper's figure 4).

    One block for each image, a row for each of the D dimensions.
    """
    batch = trained.batch(images)
    capsules = trained.network.capsules(batch.images)  # [n, J, D]
    n, _, D = capsules.shape
    steps = torch.tensor(PERTURBATIONS, device=capsules.device)
    figure = Figure(figsize=(3.4 * n, 0.3 * D + 0.6), layout="constrained")
    axes = figure.subplots(1, n, squeeze=False)
    for sample in range(n):
        label = batch.labels[sample, 0]
        moved = capsules[sample].repeat(D, len(steps), 1, 1)  # [D, steps, J, D]
        for d in range(D):
            moved[d, :, label, d] += steps
        which = label.expand(D * len(steps), 1)
        drawn = trained.network.reconstruct(moved.flatten(0, 1), which)[:, 0]
        sheet = torch.cat([torch.cat(list(row), -1) for row in drawn.split(len(steps))], -2)
        ax = axes[0, sample]
        ax.imshow(picture(sheet), cmap="gray", vmin=0, vmax=1, aspect="equal")
        size = drawn.shape[-1]
        ax.set_yticks([size * (d + 0.5) for d in range(D)], [str(d) for d in range(D)], fontsize=6)
        ends = [size * 0.5, size * 5.5, size * 10.5]
        ax.set_xticks(ends, ["-0.25", "0", "+0.25"], fontsize=6)
        ax.set_title(f"{trained.classes[int(label)]}: one dimension of v a row", fontsize=8)
    return figure


def segmentations(trained: Trained, columns: int = 8) -> Figure:
    """Overlapping digits, and each drawn from its capsule alone, one red, one green (figure 5).

    Below the inputs: the two true digits; then the two that were found.
    """
    batch = trained.batch(columns)
    capsules = trained.network.capsules(batch.images)
    found = lengths(capsules).topk(2).indices
    rows = [list(overlaid(batch.originals))]
    titles = [[" and ".join(trained.classes[j] for j in pair) for pair in batch.labels.tolist()]]
    for which, word in ((batch.labels, "true"), (found, "found")):
        drawn = trained.network.reconstruct(capsules, which)[:, :, 0]  # [n, 2, H, W]
        rows.append([torch.stack([a, b, torch.zeros_like(a)]) for a, b in drawn])
        titles.append(named(word, which, trained))
    figure = Figure(figsize=(1.2 * columns, 4), layout="constrained")
    tiles(rows, titles, figure)
    return figure

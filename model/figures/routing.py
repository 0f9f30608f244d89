"""Figures of the routing: where an image's parts send their votes, and how iterations matter."""

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from capsule_kernels import fused_routing

from ..capsnet import KERNEL
from ..config import Architecture
from ..views import overlaid
from .decoded import picture
from .trained import Trained

ITERATIONS = (1, 2, 3, 4, 5, 7, 10)


def couplings(trained: Trained, u: Tensor) -> Tensor:
    """Coupling coefficients c of the last iteration [B, types, grid, grid, J].

    ``u`` [B, I, K]: the primary capsules.
    """
    layer, a = trained.network.digits, trained.network.architecture
    _, c = fused_routing(
        u,
        layer.weight,
        layer.num_iterations,
        bias=layer.bias,
        leaky=layer.leaky,
        return_coupling=True,
        backend=layer.backend,
    )
    return c.float().unflatten(1, (a.capsule_types, a.capsule_grid, a.capsule_grid))


def span(architecture: Architecture) -> tuple[int, int]:
    """Where on an image the grid of capsules begins and ends, in pixels.

    Each lies in the middle of the patch that it sees, 2 pixels from the next; pixel n lies at n.
    """
    first = 0 if architecture.same_padding else KERNEL - 1
    return first - 1, first - 1 + 2 * architecture.capsule_grid


def coupling_maps(trained: Trained, images: int = 6) -> Figure:
    """To which class the capsules at each place of an image couple.

    A row for each image, as far as there are so many: the image, then for every class the coupling
    coefficients, averaged over the capsule types of a place weighted by how active they are, and
    the image's outline. White is no preference, or no capsule; red is more, blue is less.
    """
    batch = trained.batch(images)
    a, rows = trained.network.architecture, len(batch.labels)
    u = trained.network.primary_capsules(batch.images)
    c = couplings(trained, u)
    activity = u.float().norm(dim=-1).unflatten(1, c.shape[1:4]).unsqueeze(-1)
    maps = (c * activity).sum(1) / activity.sum(1).clamp_min(1e-12)  # [B, grid, grid, J]
    maps = maps.permute(0, 3, 1, 2).cpu()
    (begin, end), size = span(a), a.image_size
    even = 1 / (a.classes + a.leaky)
    spread = max(float((maps - even).abs().max()), 1e-6)
    figure = Figure(figsize=(0.95 * (a.classes + 1) + 0.8, 1.15 * rows), layout="constrained")
    axes = figure.subplots(rows, a.classes + 1, squeeze=False)
    for row, shown_image in enumerate(overlaid(batch.originals)):
        image = picture(shown_image)
        labels = batch.labels[row].tolist()
        axes[row, 0].imshow(image, cmap="gray", vmin=0, vmax=1)
        axes[row, 0].set_title(", ".join(trained.classes[j] for j in labels), fontsize=7, pad=2)
        outline = image if image.ndim == 2 else image.mean(-1)
        for j in range(a.classes):
            ax = axes[row, j + 1]
            scale = {"vmin": even - spread, "vmax": even + spread}
            place = {"extent": (begin, end, end, begin), "interpolation": "bilinear"}
            shown = ax.imshow(maps[row, j].numpy(), cmap="RdBu_r", **scale, **place)
            ax.contour(outline, levels=[0.5], colors="black", linewidths=0.5)
            ax.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))
            weight = "bold" if j in labels else "normal"
            ax.set_title(trained.classes[j], fontsize=7, pad=2, fontweight=weight)
    for ax in axes.flat:
        ax.set_axis_off()
    figure.colorbar(shown, ax=axes, shrink=0.6, label="coupling coefficient c")
    return figure


def error_by_iterations(runs: list[Trained]) -> Figure:
    """Test error of each trained network when it routes for another number of iterations."""
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    ax = figure.subplots()
    for trained in runs:
        layer = trained.network.digits
        own = layer.num_iterations
        errors = []
        for iterations in ITERATIONS:
            layer.num_iterations = iterations
            errors.append(trained.error())
        layer.num_iterations = own
        label = f"{trained.name}, trained with R = {own}"
        (line,) = ax.plot(ITERATIONS, errors, "o-", ms=3, label=label)
        if own in ITERATIONS:
            at = errors[ITERATIONS.index(own)]
            ax.plot([own], [at], "o", ms=9, mfc="none", color=line.get_color())
    ax.set_xlabel("routing iterations R in the test")
    ax.set_ylabel("test error (%)")
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(fontsize=7)
    return figure

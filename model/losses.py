"""What is minimised, and what is counted as correct."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .config import Config, MarginForm
from .views import Batch


class Output(NamedTuple):
    """What every network returns.

    ``scores`` float32 [B, J]: lengths of the class capsules, or logits. ``reconstructions``
    [B, T, C, H, W] in 0..1, or None.
    """

    scores: Tensor
    reconstructions: Tensor | None = None


def total_loss(output: Output, batch: Batch, config: Config) -> Tensor:
    """What training minimises, a scalar: margin and reconstruction, or cross entropy for CNNs.

    The cross entropy is of a softmax, or where images show pairs, as in the paper's section 6.1, of
    a sigmoid for each class.
    """
    targets = multi_hot(batch.labels, output.scores.shape[1])
    if config.architecture.network != "capsnet":
        cross_entropy = sigmoid_loss if config.pairs else softmax_loss
        return cross_entropy(output.scores, targets)
    loss = margin_loss(output.scores, targets, config.margin)
    if output.reconstructions is None:
        return loss
    error = reconstruction_loss(output.reconstructions.float(), batch.originals)
    return loss + config.lam_recon * error


def lengths(capsules: Tensor) -> Tensor:
    """Lengths |v| [B, J] of capsules [B, J, D]; the gradient at 0 is 0."""
    return torch.linalg.vector_norm(capsules, dim=-1)


def multi_hot(labels: Tensor, classes: int) -> Tensor:
    """T [B, J]: 1 for each class in ``labels`` [B, T], 0 elsewhere."""
    return F.one_hot(labels, classes).amax(dim=1).float()


def margin_loss(lengths: Tensor, targets: Tensor, form: MarginForm = "paper") -> Tensor:
    """Margin loss (Sabour et al. 2017, equation 4) of capsule lengths [B, J], a scalar.

        L_j = T_j max(0, 0.9 - |v_j|)^2 + 0.5 (1 - T_j) max(0, |v_j| - 0.1)^2

    Args:
        lengths: [B, J].
        targets: T, 1 where the class is present, [B, J].
        form: "paper" sums over classes and averages over the batch; "authors", as their code does,
            averages over both and takes half, so that for 10 classes a reconstruction loss weighs
            20 times more beside it.
    """
    present = targets * F.relu(0.9 - lengths).square()
    absent = 0.5 * (1 - targets) * F.relu(lengths - 0.1).square()
    loss = present + absent
    return loss.sum(-1).mean() if form == "paper" else 0.5 * loss.mean()


def reconstruction_loss(reconstructions: Tensor, originals: Tensor) -> Tensor:
    """Squared error summed over the pixels of a sample [B, ...], averaged over the batch."""
    return (reconstructions - originals).square().flatten(1).sum(-1).mean()


def softmax_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of logits [B, J] with the one class present in ``targets`` [B, J]."""
    return F.cross_entropy(logits, targets)


def sigmoid_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross entropies of logits [B, J] with which classes are present in ``targets``.

    Like the margin loss, it is summed over classes and averaged over the batch.
    """
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(logits)


def correct(scores: Tensor, labels: Tensor) -> Tensor:
    """Whether the T highest of the scores [B, J] are exactly the T labels [B, T]: bool [B]."""
    predicted = scores.topk(labels.shape[1]).indices
    return (predicted.sort(-1).values == labels.sort(-1).values).all(-1)

"""Scores of a network on a test set, and what is counted from them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from .config import Config
from .data import Split
from .losses import Output, correct, total_loss
from .views import Batch, Views, evaluation_views, show

BATCH = 250
"""Images at once: no result depends on it."""


@torch.no_grad()
def scores_of(
    network: Callable[[Tensor], Output],
    config: Config,
    split: Split,
    views: Views | None = None,
    between: Callable[[], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores [M, J] and labels [M, T] of M views of a split, by default those of a test.

    ``between`` is called after each batch.
    """
    if views is None:
        views = evaluation_views(config, split)
    scores = []
    for start in range(0, len(views), BATCH):
        batch = show(config, split, views[start : start + BATCH])
        with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=config.amp):
            scores.append(network(batch.images).scores.float())
        if between is not None:
            between()
    return torch.cat(scores), split.labels[views.index]


@dataclass(frozen=True)
class TestResult:
    """Of one test set: mean loss without reconstruction, how many are wrong, of how many.

    An image of T objects is right if the T highest scores are exactly its T labels;
    ``labels_missed`` of the ``T * count`` labels are not among them.
    """

    loss: float
    wrong: int
    count: int
    labels_missed: int
    labels: int

    @property
    def error(self) -> float:
        """Percent."""
        return 100 * self.wrong / self.count

    @classmethod
    def of(cls, scores: Tensor, labels: Tensor, config: Config) -> Self:
        """From scores [M, J] and labels [M, T]."""
        nothing = scores.new_empty(0)
        loss = total_loss(Output(scores), Batch(nothing, labels, nothing), config)
        found = scores.topk(labels.shape[1]).indices
        missed = (labels.unsqueeze(-1) != found.unsqueeze(-2)).all(-1).sum()
        wrong = (~correct(scores, labels)).sum()
        return cls(float(loss), int(wrong), len(labels), int(missed), labels.numel())


def confusion(scores: Tensor, labels: Tensor) -> Tensor:
    """How often class j was found where i is true: int64 [J, J], for images of one object."""
    J = scores.shape[1]
    place = labels[:, 0] * J + scores.argmax(-1)
    return place.bincount(minlength=J * J).view(J, J)

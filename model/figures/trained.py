"""A trained capsule network with its data, as every figure needs it."""

from dataclasses import dataclass

import torch

from ..capsnet import CapsNet
from ..config import Config
from ..data import Split
from ..evaluation import TestResult, scores_of
from ..views import Batch, evaluation_views, show


@dataclass
class Trained:
    """``name`` says where the network came from; ``split`` is its test set, on its device."""

    name: str
    config: Config
    network: CapsNet
    split: Split
    classes: tuple[str, ...]

    def batch(self, count: int) -> Batch:
        """The first test images, one of each class in turn as far as the classes reach."""
        by_class, start, _ = self.split.class_blocks
        place = torch.arange(len(by_class), device=by_class.device)
        place -= start[self.split.labels[by_class]]  # within its class
        order = by_class[place.argsort(stable=True)][:count]
        views = evaluation_views(self.config, self.split)
        return show(self.config, self.split, views[order])

    def error(self) -> float:
        """Test error in percent."""
        return TestResult.of(*scores_of(self.network, self.config, self.split), self.config).error

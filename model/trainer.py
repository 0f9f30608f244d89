"""The training loop: steps, epochs, tests, checkpoints.

All randomness of step n follows from (seed, n, process), that of an epoch's order from
(seed, epoch): a resumed run needs no generator's state to go on with the same bits.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import checkpoint as checkpoints
from .checkpoint import Checkpoint
from .config import Config, check_types
from .cuda_graph import GraphedStep
from .data import Dataset, Split
from .distributed import ALONE, World
from .errors import UserError
from .evaluation import TestResult, scores_of
from .losses import correct, total_loss
from .networks import Network
from .views import Batch, evaluation_views, show, training_batch

TRAINING, ORDER = range(2)
"""Purposes of a seed: streams of different purposes never meet."""


def derived_seed(*key: int) -> int:
    """A well mixed 64-bit seed from a few numbers."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


@dataclass
class Progress:
    """How far a run is; all of it stands in its checkpoints."""

    step: int = 0
    epoch: int = 0
    """Epochs trained, tested and written down."""
    seconds: float = 0.0
    """Spent so far, by all the processes the run was continued in."""
    metrics_size: int = 0
    accuracy_reached: bool = False
    """``stop_accuracy`` was."""


class Trainer:
    """A run in its directory: a network, its optimizer, its data, its progress.

    Args:
        config: what is trained.
        model: freshly built; moved to the world's device.
        dataset: already there.
        directory: where checkpoints and metrics go.
        world: the processes that train together, each on its share of every batch.
        cuda_graph: replay a captured step instead of launching its kernels one by one.
    """

    def __init__(
        self,
        config: Config,
        model: Network,
        dataset: Dataset,
        directory: Path,
        world: World = ALONE,
        cuda_graph: bool = False,
    ) -> None:
        self.config, self.dataset, self.directory, self.world = config, dataset, directory, world
        device = world.device
        self.model = model.to(device)
        self.lr = torch.tensor(config.lr, device=device)
        self.optimizer = torch.optim.Adam(
            model.parameters(), lr=self.lr, fused=True, capturable=device.type == "cuda"
        )
        self.progress = Progress()
        self.generator = torch.Generator(device)
        images = len(dataset.train)
        if images < world.size:
            raise UserError(
                f"torchrun must start at most {images} processes, one for each image to train on, "
                f"got {world.size}"
            )
        self.batch_size = min(config.batch_size, images // world.size * world.size)
        self.steps_per_epoch = images // self.batch_size
        self.total_steps = config.epochs * self.steps_per_epoch
        # Sums over the epoch so far: loss, correct, seen. On the device, so that no step waits.
        self.sums = torch.zeros(3, device=device, dtype=torch.float64)
        self.order = torch.empty(0)
        self.order_epoch = -1
        self.update: Callable[[Batch], None] = (
            GraphedStep(self.update_weights) if cuda_graph else self.update_weights
        )

    @cached_property
    def forward(self) -> Callable[..., Any]:
        """The network as steps use it. Made by the first one: all processes have to make it."""
        parallel = self.world.parallel(self.model)
        return torch.compile(parallel) if self.config.compile else parallel

    def learning_rate(self, step: int) -> float:
        """Of the step that follows ``step`` steps."""
        warmth = min(1, (step + 1) / max(self.config.warmup_steps, 1))
        return warmth * self.scheduled_rate(step)

    def scheduled_rate(self, step: int) -> float:
        """The same without a warm-up."""
        c = self.config
        if c.lr_schedule == "linear":
            return c.lr * (1 - step / self.total_steps)
        if c.lr_schedule == "steps":
            return c.lr * c.lr_decay ** (step / c.lr_decay_steps)
        return c.lr * c.lr_decay ** (step // self.steps_per_epoch)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss of a training batch, a scalar, and which of its samples are right, bool [B]."""
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.config.amp):
            output = self.forward(batch.images, batch.labels)
        return total_loss(output, batch, self.config), correct(output.scores, batch.labels)

    def batch_index(self, step: int) -> Tensor:
        """Which training images this process uses in step ``step``: every epoch another order."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self.order_epoch:
            self.generator.manual_seed(derived_seed(self.config.seed, ORDER, epoch))
            self.order = torch.randperm(
                len(self.dataset.train), generator=self.generator, device=self.world.device
            )
            self.order_epoch = epoch
        batch = self.order[place * self.batch_size : (place + 1) * self.batch_size]
        return batch[self.world.rank :: self.world.size]

    def step(self) -> None:
        """One optimizer step."""
        step = self.progress.step
        index = self.batch_index(step)
        seed = derived_seed(self.config.seed, TRAINING, step, self.world.rank)
        self.generator.manual_seed(seed)
        torch.manual_seed(seed)  # dropout
        self.lr.fill_(self.learning_rate(step))
        self.model.train()
        self.update(training_batch(self.config, self.dataset.train, index, self.generator))
        self.progress.step += 1

    def update_weights(self, batch: Batch) -> None:
        """Forward, backward and optimizer step; adds to ``sums``. All in place, none waits."""
        self.optimizer.zero_grad(set_to_none=True)
        count = len(batch.labels)
        parts = zip(*(x.chunk(self.config.accumulate) for x in batch), strict=True)
        for part in parts:
            loss, right = self.loss(Batch(*part))
            (loss * (len(right) / count)).backward()
            seen = torch.ones_like(right).sum()
            self.sums += torch.stack([loss.detach() * seen, right.sum(), seen])
        self.optimizer.step()

    def running_means(self, sums: Tensor | None = None) -> tuple[float, float]:
        """Loss and accuracy over the epoch so far, of this process or of the ``sums`` given."""
        loss_sum, right, seen = (self.sums if sums is None else sums).tolist()
        return loss_sum / max(seen, 1), right / max(seen, 1)

    def test(self, split: Split, between: Callable[[], None] | None = None) -> TestResult:
        """Loss (without reconstruction) and errors on a split."""
        self.model.eval()
        scores, labels = scores_of(self.model, self.config, split, between=between)
        return TestResult.of(scores, labels, self.config)

    def test_batch(self, count: int) -> Batch:
        """The first images of the test."""
        split = self.dataset.test
        return show(self.config, split, evaluation_views(self.config, split)[:count])

    def save(self) -> None:
        """The whole state, atomically; all processes call it and the main one writes."""
        sums = self.world.total(self.sums)
        if not self.world.is_main:
            return
        tensors = checkpoints.model_tensors(self.model)
        tensors |= checkpoints.optimizer_tensors(self.model, self.optimizer)
        tensors["progress.sums"] = sums
        state = Checkpoint(
            self.config, self.dataset.classes, tensors, asdict(self.progress),
            self.dataset.fingerprint(),
        )  # fmt: skip
        checkpoints.save(self.directory / checkpoints.CHECKPOINT, state)

    def save_weights(self) -> Path:
        """The network alone, for evaluation and prediction."""
        path = self.directory / checkpoints.WEIGHTS
        tensors = checkpoints.model_tensors(self.model)
        state = Checkpoint(
            self.config, self.dataset.classes, tensors, data=self.dataset.fingerprint()
        )
        checkpoints.save(path, state)
        return path

    def restore(self, state: Checkpoint, source: Path) -> None:
        """Go on where a checkpoint was made; UserError if no run of this data can be there."""
        try:
            progress = Progress(**state.counters)
            check_types(progress)
        except TypeError as error:
            raise UserError(f"{source}: its counters can't be read: {error}") from None
        # Its epoch's test may be still to come.
        steps = progress.step - progress.epoch * self.steps_per_epoch
        if progress.epoch < 0 or not 0 <= steps <= self.steps_per_epoch:
            raise UserError(
                f"{source}: step {progress.step} must be in or at the end of epoch "
                f"{progress.epoch + 1} of {self.steps_per_epoch} steps: the run had another number "
                "of images to train on"
            )
        if progress.step > self.total_steps:
            raise UserError(
                f"--epochs {self.config.epochs} can't be given with this --resume: the run is in "
                f"epoch {progress.step // self.steps_per_epoch + 1} already"
            )
        checkpoints.restore_model(self.model, state, source)
        checkpoints.restore_optimizer(self.model, self.optimizer, state)
        self.progress = progress
        if self.world.is_main:
            self.sums.copy_(state.tensors["progress.sums"])

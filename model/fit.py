"""A run from where it stands to its end: epochs, tests, checkpoints, progress bar."""

import math
import time
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from . import checkpoint as checkpoints
from .data import Split
from .errors import UserError
from .evaluation import TestResult
from .interrupt import Interrupted, Interruption
from .metrics import MetricsLog
from .trainer import Trainer

REFRESH_SECONDS = 0.5
"""How often the bar reads the running loss, for which a GPU has to finish its work."""
LEAST_SECONDS = 10
"""Between a checkpoint and that of an epoch's end: on a GPU an epoch takes no longer than it."""
AGREE_EVERY = 16
"""Steps between the points where several processes agree on what to do: each makes a GPU wait."""

Outcome = Literal["finished", "accuracy reached", "out of time"]

# What may be wished between two steps; of several wishes the largest is granted.
GO_ON, SAVE, OUT_OF_TIME, INTERRUPTED = 0, 1, 2, 100


class Fit:
    """Drives a trainer; see :meth:`run`."""

    def __init__(
        self,
        trainer: Trainer,
        log: MetricsLog,
        console: Console,
        interruption: Interruption,
        max_minutes: float | None,
        checkpoint_minutes: float,
    ) -> None:
        self.trainer, self.log, self.console = trainer, log, console
        self.interruption = interruption
        self.checkpoint_seconds = 60 * checkpoint_minutes
        self.start = self.saved = self.epoch_start = time.monotonic()
        self.deadline = math.inf if max_minutes is None else self.start + 60 * max_minutes
        self.seconds_before = trainer.progress.seconds
        self.first_step = trainer.progress.step
        self.shown = -math.inf
        self.tested: TestResult | None = None
        """Of the weights as they are: None from the first step of an epoch to its end."""

    def run(self) -> Outcome:
        """Train to the end, or as long as there is time.

        Raises Interrupted only where the state is whole and :meth:`save` keeps it.
        """
        trainer, progress = self.trainer, self.trainer.progress
        columns = (
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task("", total=trainer.steps_per_epoch, epoch="", status="")
            while True:
                if progress.step == (progress.epoch + 1) * trainer.steps_per_epoch:
                    self.end_epoch()
                if progress.accuracy_reached:
                    return "accuracy reached"
                if progress.step >= trainer.total_steps:
                    return "finished"
                wish = self.agreed_wish()
                if wish > INTERRUPTED:
                    raise Interrupted(wish - INTERRUPTED)
                if wish == OUT_OF_TIME:
                    return "out of time"
                if wish == SAVE:
                    self.save()
                trainer.step()
                self.tested = None
                if time.monotonic() - self.shown > REFRESH_SECONDS:
                    self.show(bar, task)

    def agreed_wish(self) -> int:
        """What is to be done before the next step, the same in all processes."""
        world = self.trainer.world
        if world.size > 1 and self.trainer.progress.step % AGREE_EVERY:
            return GO_ON
        now, wish = time.monotonic(), GO_ON
        if self.interruption.number is not None:
            wish = INTERRUPTED + self.interruption.number
        elif now > self.deadline:
            wish = OUT_OF_TIME
        elif now - self.saved > self.checkpoint_seconds:
            wish = SAVE
        return world.largest(wish)

    def show(self, bar: Progress, task: TaskID) -> None:
        """Bring the progress bar up to date."""
        trainer, progress = self.trainer, self.trainer.progress
        loss, accuracy = trainer.running_means()
        speed = self.images_per_second()
        bar.update(
            task,
            completed=progress.step - progress.epoch * trainer.steps_per_epoch,
            epoch=f"{progress.epoch + 1}/{trainer.config.epochs}",
            status=f"loss {loss:.4f}  accuracy {accuracy:.2%}  {speed:,.0f} images/s",
        )
        self.shown = time.monotonic()

    def images_per_second(self) -> float:
        """Trained since the epoch began, or since the run was resumed within it."""
        steps = self.trainer.progress.step - self.first_step
        return steps * self.trainer.batch_size / max(time.monotonic() - self.epoch_start, 1e-9)

    def end_epoch(self) -> None:
        """Test, write the epoch down, save, unless that was done a moment ago."""
        trainer, progress = self.trainer, self.trainer.progress
        loss, accuracy = self.finite_means()
        # Nothing was trained here if the run was resumed for the epoch's test alone.
        speed = self.images_per_second() if progress.step > self.first_step else None
        self.tested = result = self.test(trainer.dataset.test)
        progress.epoch += 1
        trainer.sums.zero_()
        wanted = trainer.config.stop_accuracy
        # Of counts: 100 * (1 - 0.8), say, is a little less than the 20 % wrong that are meant.
        accuracy_now = (result.count - result.wrong) / result.count
        reached = wanted is not None and accuracy_now >= wanted
        # Tests of one network on several GPUs may differ by roundings; all must end alike.
        progress.accuracy_reached = bool(trainer.world.largest(reached))
        values = {
            "epoch": progress.epoch,
            "lr": trainer.learning_rate(progress.step - 1),
            "train_loss": loss,
            "train_accuracy": accuracy,
            "test_loss": result.loss,
            "test_error": result.error,
            "images_per_second": speed,
            "seconds": self.seconds(),
        }
        with trainer.world.together():
            self.log.write("epoch", progress.step, values)
        self.console.print(
            f"epoch {progress.epoch}/{trainer.config.epochs}: loss {loss:.4f}, "
            f"accuracy {accuracy:.2%}, test error {result.error:.2f} %"
            + ("" if speed is None else f", {speed:,.0f} images/s")
        )
        over = progress.accuracy_reached or progress.step >= trainer.total_steps
        late = time.monotonic() - self.saved > LEAST_SECONDS
        if trainer.world.largest(over or late):
            self.save()
        self.first_step, self.epoch_start = progress.step, time.monotonic()

    def test(self, split: Split) -> TestResult:
        """Raises Interrupted if a signal comes, but not in one of several processes: it must not
        leave a test that the others finish or wait for."""
        alone = self.trainer.world.size == 1
        return self.trainer.test(split, self.interruption.check if alone else None)

    def finite_means(self) -> tuple[float, float]:
        """Loss and accuracy of the epoch so far, of all processes; UserError in all of them alike
        if the loss, or the weights, which are a step ahead of it, are not finite."""
        trainer, progress = self.trainer, self.trainer.progress
        loss, accuracy = trainer.running_means(trainer.world.total(trainer.sums))
        weights = trainer.model.parameters()
        if math.isfinite(loss) and all(bool(w.isfinite().all()) for w in weights):
            return loss, accuracy
        path = trainer.directory / checkpoints.CHECKPOINT
        before = f"; the last checkpoint before that is {path}" if path.exists() else ""
        raise UserError(
            f"the loss ({loss:.4g}) or the weights are not finite after step {progress.step}, in "
            f"epoch {progress.epoch + 1}: a smaller --lr may help{before}"
        )

    def seconds(self) -> float:
        """Spent on the run so far, in this process and those before."""
        return self.seconds_before + time.monotonic() - self.start

    def save(self) -> None:
        """A checkpoint of this very moment; UserError, and the previous one stays, if the run
        diverged."""
        self.finite_means()
        progress = self.trainer.progress
        progress.seconds, progress.metrics_size = self.seconds(), self.log.size
        with self.trainer.world.together():
            self.trainer.save()
        self.saved = time.monotonic()

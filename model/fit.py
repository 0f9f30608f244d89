"""A run from where it stands to its end: epochs, tests, checkpoints, progress bar."""

import math
import time
from collections.abc import Callable
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from .errors import UserError
from .metrics import MetricsLog
from .trainer import Trainer

REFRESH_SECONDS = 0.5
"""How often the bar reads the running loss, for which a GPU has to finish its work."""

Outcome = Literal["finished", "accuracy reached", "out of time"]


class Fit:
    """Drives a trainer; see :meth:`run`."""

    def __init__(
        self,
        trainer: Trainer,
        log: MetricsLog,
        console: Console,
        check: Callable[[], None],
        max_minutes: float | None,
        checkpoint_minutes: float,
    ) -> None:
        self.trainer, self.log, self.console, self.check = trainer, log, console, check
        self.checkpoint_seconds = 60 * checkpoint_minutes
        self.start = self.saved = time.monotonic()
        self.deadline = math.inf if max_minutes is None else self.start + 60 * max_minutes
        self.seconds_before = trainer.progress.seconds
        self.training_seconds, self.training_images = 0.0, 0

    def run(self) -> Outcome:
        """Train to the end, or as long as there is time.

        ``check`` is called between steps and may raise; the state is whole then, and :meth:`save`
        keeps it.
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
                self.check()
                if time.monotonic() > self.deadline:
                    return "out of time"
                self.step(bar, task)

    def step(self, bar: Progress, task: TaskID) -> None:
        trainer, before = self.trainer, time.monotonic()
        trainer.step()
        now = time.monotonic()
        self.training_seconds += now - before
        self.training_images += trainer.batch_size
        if bar.get_time() - (bar.tasks[task].fields.get("shown") or -math.inf) > REFRESH_SECONDS:
            loss, accuracy = trainer.running_means()
            speed = self.training_images / self.training_seconds
            bar.update(
                task,
                completed=trainer.progress.step - trainer.progress.epoch * trainer.steps_per_epoch,
                epoch=f"{trainer.progress.epoch + 1}/{trainer.config.epochs}",
                status=f"loss {loss:.4f}  accuracy {accuracy:.2%}  {speed:,.0f} images/s",
                shown=bar.get_time(),
            )
        if now - self.saved > self.checkpoint_seconds:
            self.save()

    def end_epoch(self) -> None:
        """Test, write the epoch down, save."""
        trainer, progress = self.trainer, self.trainer.progress
        loss, accuracy = trainer.running_means()
        if not math.isfinite(loss):
            raise UserError(
                f"the loss of epoch {progress.epoch + 1} is {loss}: a smaller --lr may help; "
                f"the last good state is in {trainer.directory}"
            )
        images_per_second = self.training_images / max(self.training_seconds, 1e-9)
        result = trainer.test(trainer.dataset.test, self.check)
        progress.epoch += 1
        trainer.sums.zero_()
        wanted = trainer.config.stop_accuracy
        progress.accuracy_reached = wanted is not None and result.error <= 100 * (1 - wanted)
        self.log.write(
            "epoch",
            progress.step,
            {
                "epoch": progress.epoch,
                "lr": trainer.learning_rate(progress.step - 1),
                "train_loss": loss,
                "train_accuracy": accuracy,
                "test_loss": result.loss,
                "test_error": result.error,
                "images_per_second": images_per_second,
                "seconds": self.seconds(),
            },
        )
        self.console.print(
            f"epoch {progress.epoch}/{trainer.config.epochs}: loss {loss:.4f}, "
            f"accuracy {accuracy:.2%}, test error {result.error:.2f} %, "
            f"{images_per_second:,.0f} images/s"
        )
        self.training_seconds, self.training_images = 0.0, 0
        self.save()

    def seconds(self) -> float:
        """Spent on the run so far, in this process and those before."""
        return self.seconds_before + time.monotonic() - self.start

    def save(self) -> None:
        """A checkpoint of this very moment."""
        progress = self.trainer.progress
        progress.seconds, progress.metrics_size = self.seconds(), self.log.size
        self.trainer.save()
        self.saved = time.monotonic()

"""Commands of a report: each with a time limit and a log, and some of them side by side."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .sources import ROOT

GRACE_SECONDS = 20
"""What a step gets to write what it has after it was interrupted, unless it says otherwise."""
LEAST_SECONDS = 5
"""A step that would have less time is not begun."""
NOT_RUN = "not run"
EXIT_CODE = "exit code"


@dataclass
class Step:
    """A command with a time limit; ``outcome`` is "ok", or what went wrong."""

    name: str
    command: list[str]
    minutes: float
    environment: dict[str, str] = field(default_factory=dict)
    grace: float = GRACE_SECONDS
    outcome: str = NOT_RUN
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether it ended by itself and not well: a step without the time is no failure."""
        return self.outcome.startswith(EXIT_CODE)


class Running:
    """A step that was begun: its process, which ends with all that it started."""

    def __init__(self, step: Step, log: Path, seconds_left: float) -> None:
        self.step = step
        self.limit = min(60 * step.minutes, seconds_left)
        self.stopped: str | None = None
        self.patience = 0.0
        self.started = time.monotonic()
        with log.open("w") as output:
            self.process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env=os.environ | step.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop(self, why: str) -> None:
        """Ask the process to stop, like by Ctrl-C, so that it writes what it has."""
        self.process.send_signal(signal.SIGINT)
        self.stopped, self.patience = why, time.monotonic() + self.step.grace

    def is_late(self) -> bool:
        return time.monotonic() > self.started + self.limit

    def is_over(self) -> bool:
        """Whether it has ended; stops it at its limit, and ends it where it does not stop."""
        code = self.process.poll()
        if code is None and self.stopped is None and self.is_late():
            self.stop(f"after {self.limit:.0f} s")
        if code is None and (self.stopped is None or time.monotonic() < self.patience):
            return False
        if self.stopped is None:
            self.step.outcome = "ok" if code == 0 else f"{EXIT_CODE} {code}"
        else:
            how = "killed" if code is None else "stopped, with what it had measured,"
            self.step.outcome = f"{how} {self.stopped}"
        self.end()
        return True

    def end(self) -> None:
        """End the process and what it started, if any of it still runs."""
        self.step.seconds = round(time.monotonic() - self.started, 1)
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        finally:
            self.process.wait()


def run_together(steps: Sequence[Step], folder: Path, end: float) -> Iterator[Step]:
    """Run those that have not run, all at once; yields each when it is over.

    ``end`` is when all must be over, in the time of ``time.monotonic``. Each writes into
    ``folder/<name>.log``. Interrupted, they are too, and get the time to write what they have.
    """
    running: list[Running] = []
    seconds_left = end - time.monotonic()
    try:
        for step in steps:
            if step.outcome != NOT_RUN:
                yield step
            elif min(60 * step.minutes, seconds_left) < LEAST_SECONDS:
                step.outcome = "no time was left"
                yield step
            else:
                running.append(Running(step, folder / f"{step.name}.log", seconds_left))
        yield from finished(running)
    except KeyboardInterrupt:
        for one in running:
            one.stop("by the user")
        for _ in finished(running):
            pass
        raise
    finally:
        for one in running:
            one.end()


def finished(running: list[Running]) -> Iterator[Step]:
    """The steps in the order in which they end, taken from the list."""
    while running:
        over = [one for one in running if one.is_over()]
        for one in over:
            running.remove(one)
            yield one.step
        time.sleep(0.05)

"""Ctrl-C and polite requests to end, noticed only where the state of a run is whole."""

import signal
from types import FrameType
from typing import Any, Self

from rich.console import Console


class Interrupted(Exception):
    """A signal came; raised between steps."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class Interruption:
    """A context that notes SIGINT and SIGTERM; a second one ends the program at once."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.number: int | None = None

    def __enter__(self) -> Self:
        self.before = {n: signal.signal(n, self.note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, _frame: FrameType | None) -> None:
        self.number = number
        signal.signal(number, signal.SIG_DFL)
        self.console.print("will save and end; once more ends at once, unsaved")

    def check(self) -> None:
        """Raise Interrupted if a signal came."""
        if self.number is not None:
            raise Interrupted(self.number)

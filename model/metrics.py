"""What a run writes down: ``metrics.jsonl``, one JSON object a line, and TensorBoard events."""

import json
from pathlib import Path
from typing import Any

from .errors import UserError
from .outputs import writing

METRICS = "metrics.jsonl"


class MetricsLog:
    """Appends to a run's ``metrics.jsonl`` and, where it is installed, to TensorBoard.

    ``size`` (bytes) goes into checkpoints: a resumed run cuts off what was written after its
    checkpoint, so that every line stands there once, and what is left of a line where the file was
    torn or edited. TensorBoard forgets the steps from
    ``purge_step`` on. Without a directory nothing is written.
    """

    def __init__(
        self, directory: Path | None, size: int = 0, purge_step: int | None = None
    ) -> None:
        self.size = 0
        self.path: Path | None = None
        self.board: Any = None
        if directory is None:
            return
        self.path = path = directory / METRICS
        with writing(f"{path}:"), path.open("a+b") as file:
            file.seek(0)
            self.size = file.read(size).rfind(b"\n") + 1
            file.truncate(self.size)
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(directory), purge_step=purge_step if size else None)
        except ImportError:
            pass

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One line ``{"kind": kind, "step": step, ...}``; numbers go to TensorBoard too."""
        if self.path is None:
            return
        line = json.dumps({"kind": kind, "step": step, **values}).encode() + b"\n"
        with writing(f"{self.path}:"), self.path.open("ab") as file:
            file.write(line)
        self.size += len(line)
        if self.board is not None and kind == "epoch":
            for name, value in values.items():
                if isinstance(value, float):
                    self.board.add_scalar(name, value, step)

    def image(self, name: str, pixels: Any, step: int) -> None:
        """A picture, uint8 [H, W, C], for TensorBoard alone."""
        if self.board is not None:
            self.board.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; UserError names the first that is none."""
    lines = []
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read: {error}") from None
    for number, line in enumerate(text.splitlines(), 1):
        try:
            values = json.loads(line)
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise UserError(f"{path}: line {number} is not a JSON object")
        lines.append(values)
    return lines

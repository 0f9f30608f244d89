"""A run's directory: new where it must be, of one run, held by one process at a time."""

import fcntl
import itertools
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .checkpoint import CHECKPOINT, WEIGHTS
from .errors import UserError
from .metrics import METRICS
from .outputs import remove_unfinished, writing

PICTURE = "reconstructions.png"
RUN_FILES = (CHECKPOINT, METRICS, WEIGHTS, PICTURE, "events.out.tfevents.*")
"""What a run leaves, as patterns; the last are TensorBoard's."""


def make_new(directory: Path) -> Path:
    """Make a directory, with -2, -3 ... behind its name where that is taken; the one it became.

    Runs that begin in the same second so get one each.
    """
    with writing(f"--save-dir {directory}"):
        directory.parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            path = directory if number == 1 else Path(f"{directory}-{number}")
            try:
                path.mkdir()
            except FileExistsError:
                continue
            break
    return path


@contextmanager
def held(directory: Path, fresh: bool) -> Iterator[None]:
    """Keep a run's directory to this process; made if need be, tidied, and seen to be writable.

    UserError if another process holds it, or if a ``fresh`` run would write over files of a run.
    """
    what = f"{'--save-dir' if fresh else '--resume'} {directory}"
    with writing(what):
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY)
    try:
        lock(descriptor, what)
        if fresh:
            refuse_used(directory)
        with writing(what):
            remove_unfinished(directory)
            with tempfile.TemporaryFile(dir=directory) as file:
                file.write(b"x")
        yield
    finally:
        os.close(descriptor)  # which unlocks it, as the end of the process does, however it ends


def lock(descriptor: int, what: str) -> None:
    """Lock an open directory; UserError, which begins with ``what``, if another process did."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{what} is in use by a run in another process: wait for its end, or name another"
        ) from None
    except OSError:
        pass  # some network file systems have no locks of directories


def refuse_used(directory: Path) -> None:
    """UserError if any file of a run is in a directory: a new run would write over it."""
    if (directory / CHECKPOINT).exists():
        raise UserError(
            f"--save-dir {directory} holds a run already: --resume {directory} goes on with it, "
            "another --save-dir starts afresh"
        )
    for pattern in RUN_FILES:
        for path in directory.glob(pattern):
            raise UserError(
                f"--save-dir {directory} holds {path.name} of a run already: it must be empty of "
                "runs; take another, or remove that one"
            )

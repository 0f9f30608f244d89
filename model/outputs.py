"""Files that commands write: whole or not at all, and told beforehand where they can't be."""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from .errors import UserError

UNFINISHED = re.compile(r".+\.[a-z0-9_]{8}\.unfinished")
"""Names of what :func:`write_atomically` has begun: the file's own, and characters of chance."""


def reason_against(path: Path) -> str | None:
    """Why a file can't be written there, as far as can be told before, or None.

    Permissions do not tell it of every file system: one is made there, and is gone at once.
    """
    folder = path.absolute().parent
    if path.is_dir():
        return "it is a folder, expected a file's name"
    if not folder.is_dir():
        return f"{folder} is no folder"
    try:
        with unfinished(path):
            return None
    except OSError as error:
        return f"no file can be made in {folder}: {error.strerror or error}"


def check_writable(flag: str, path: Path | None) -> None:
    """UserError, naming the flag, if a file can't be written there; None is no file."""
    if path is not None and (reason := reason_against(path)):
        raise UserError(f"{flag} {path} can't be written: {reason}")


@contextmanager
def writing(what: str) -> Iterator[None]:
    """OSError becomes UserError, which begins with ``what``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} can't be written: {error.strerror or error}") from None


@contextmanager
def unfinished(path: Path) -> Iterator[IO[bytes]]:
    """A new file beside a path, which is gone afterwards unless it took the path's place."""
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f"{path.name}.", suffix=".unfinished", delete=False
    ) as file:
        try:
            yield file
        finally:
            Path(file.name).unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or, whatever happens, as it was before."""
    with writing(f"{path}:"), unfinished(path) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        os.fchmod(file.fileno(), 0o644)
        Path(file.name).replace(path)


def remove_unfinished(directory: Path) -> None:
    """Remove what writes into a run's directory left there when their process was killed.

    A write that still goes on, in a second process on the same run, ends with its UserError; the
    file that it would have replaced stays whole.
    """
    for path in directory.iterdir():
        if UNFINISHED.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)

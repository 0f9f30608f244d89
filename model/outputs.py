"""Files a command will write: whether it can is known before its work, not after."""

import os
from pathlib import Path

from .errors import UserError


def check_writable(flag: str, path: Path | None) -> None:
    """UserError, naming the flag, if a file can't be written there; None is no file."""
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{flag} {path} can't be written: it is a folder, expected a file's name")
    if not path.parent.is_dir():
        raise UserError(f"{flag} {path} can't be written: {path.parent} is no folder")
    # A file appears by being renamed: what counts is its folder's permission, not its own.
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {path} can't be written: no permission in {path.parent}")

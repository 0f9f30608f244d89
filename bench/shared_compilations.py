"""A cache for Triton in which processes that need a kernel at the same time compile it once.

With ``TRITON_CACHE_MANAGER=bench.shared_compilations:OneCompiles`` the first that misses a kernel,
or its launcher, compiles it, and the others wait and load it. Tests that share a kernel often run
side by side, and compiling is nearly all of their time.
"""

import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from triton.runtime.cache import FileCacheManager


class OneCompiles(FileCacheManager):
    """Whoever misses holds the entry's lock until Triton, which has stored it, drops this manager.

    So a compilation that fails gives the turn to the next; the system does where a process is
    killed.
    """

    turn: TextIO | None = None

    def get_file(self, filename: str) -> Any:
        return self.found(super().get_file, filename)

    def get_group(self, filename: str) -> Any:
        return self.found(super().get_group, filename)

    def found(self, look: Callable[[str], Any], filename: str) -> Any:
        """What lies under the name, now or when another has stored it."""
        there = look(filename)
        if there is None and self.turn is None:
            # An open file of its own: threads of a process wait for each other, too.
            self.turn = (Path(self.cache_dir) / "turn").open("w")
            fcntl.flock(self.turn, fcntl.LOCK_EX)
            there = look(filename)
        return there

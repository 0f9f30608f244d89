"""Tests run with Triton's kernels interpreted.

Triton reads TRITON_INTERPRET when it is imported, hence a process of its own.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capsule_kernels.backends import triton

MARKS = [
    pytest.mark.interpreter,
    pytest.mark.slow,
    pytest.mark.skipif(not triton.INSTALLED, reason="Triton is not installed"),
    pytest.mark.skipif(triton.INTERPRETED, reason="this is the process with TRITON_INTERPRET=1"),
]


def marked(test: Callable[..., None]) -> Callable[..., None]:
    """``MARKS`` on one test, in a file that has others."""
    for mark in MARKS:
        test = mark(test)
    return test


def environment(*, covered: bool = False) -> dict[str, str]:
    """Of a process with the interpreter. ``covered``: its lines are counted where this one's are,
    which more than doubles the time; test_triton_interpreted.py says which tests reach nearly all
    of them."""
    kept = {n: value for n, value in os.environ.items() if covered or "COVERAGE" not in n}
    return kept | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def spare_the_interpreter_what_it_throws_away() -> None:
    """It then takes about a quarter of the time.

    It puts its own functions into the language, which takes half a millisecond, at every call of a
    device function: once for the modules that a launch meets is enough. It computes whether sums
    and products of integers overflow, and then, not debugging, doesn't look. And it writes down the
    type of every tuple, of which there is one in every tensor, that only the compiler asks for.
    """
    from triton.language import core
    from triton.runtime import interpreter

    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(
        sanitize_overflow=False
    )
    core._type_for_tuple_values = lambda values, fields=None: None

    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    patched: set[int] = set()

    def launch_anew(*args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(*args, **kwargs)

    def call_device_function(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = self.fn.__globals__
        if id(module) not in patched:
            patch(self.fn)
            patched.add(id(module))
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.GridExecutor.__call__ = launch_anew
    interpreter.InterpretedFunction.__call__ = call_device_function


def check_in_the_interpreter(
    files: str,
    chosen: str,
    least: int,
    figure: Callable[[str, str], None] | None = None,
    *,
    covered: bool = False,
) -> None:
    """The chosen tests of some files pass, at least so many, so that a choice that no longer finds
    what it names is noticed; none is skipped, and what they print is printed."""
    options = ["-q", "-x", "-p", "no:cacheprovider", "-k", chosen]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(f"tests/{file}" for file in files.split())],
        cwd=Path(__file__).parent.parent,
        env=environment(covered=covered),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= least, f"-k '{chosen}': {passed[0]}, of at least {least}"
    assert "skipped" not in done.stdout
    printed = ("properties, triton-cpu", "ranges, triton-cpu", "repeats of the interpreted Triton")
    for line in done.stdout.splitlines() if figure is not None else ():
        what, separator, amount = line.rpartition(": ")
        if separator and what.startswith(printed):
            figure(what, amount)

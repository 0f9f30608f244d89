"""Malformed calls of the raw CPU operators, in a process of their own: none crashes it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from capsule_kernels import backends

CALLS = int(os.environ.get("CAPSULE_FUZZ_CALLS", "3000"))


@pytest.mark.skipif(not backends()["cpu"].usable, reason=backends()["cpu"].reason)
def test_no_call_crashes(figure):
    finished = subprocess.run(
        [sys.executable, "-m", "tests.operator_fuzz", "--calls", str(CALLS), "--seed", "1"],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, f"exit {finished.returncode}: {finished.stderr[-3000:]}"
    outcomes = {name: int(n) for n, name in re.findall(r"(\d+) (\w[\w ]*)", finished.stdout)}
    # The fuzz reaches both sides of the checks.
    assert outcomes["calls"] == CALLS
    assert outcomes["accepted"] > CALLS / 10
    assert outcomes["ValueError"] > CALLS / 10
    figure("fuzz of the raw operators", finished.stdout.strip())

"""Which files decide about what was measured, so that a report can be told from a stale one."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

KERNELS, NETWORK, MEASUREMENT = "kernels", "network", "measurement"
RECIPE, CHANGED = "recipe", "changed"
"""Fields of a report: digests, the recipe they were made by, and what changed meanwhile."""
LATEST = 2
CALL = tuple(f"capsule_kernels/{name}.py" for name in ("autograd", "ops", "windows"))
"""What a call does around its kernels: what it computes, saves and copies."""
STEPS = ("model/capsnet.py", "model/spectral.py", "bench/popular.py")
RECIPES: dict[int, dict[str, tuple[str, ...]]] = {
    1: {
        "cpu": ("csrc/cpu",),
        "triton": ("capsule_kernels/backends/triton",),
        "cuda": ("csrc/cuda",),
        NETWORK: STEPS,
    },
    LATEST: {
        "cpu": ("csrc/cpu", "capsule_kernels/backends/cpu.py", "setup.py", *CALL),
        "triton": ("capsule_kernels/backends/triton", *CALL),
        "cuda": ("csrc/cuda", "capsule_kernels/backends/cuda.py", "setup.py", *CALL),
        NETWORK: (*STEPS, "model/losses.py", "bench/training.py"),
        MEASUREMENT: ("bench/peers.py", "bench/timing.py", "bench/routing.py", "bench/shapes.py"),
    },
}
"""The files of each backend, of the networks whose training steps are measured, and of what is
measured beside them and how. A report is compared by the recipe it was made with: the digests of
another say nothing about it. The first is that of reports that name none."""
SUFFIXES = (".py", ".cpp", ".cu", ".cuh", ".h")


def digest(places: Iterable[str], root: Path = ROOT) -> str:
    """A digest of files and folders: it changes when one of them does.

    Not with the layout of C++, which no compiler sees.
    """
    hashed = hashlib.sha256()
    for place in places:
        for path in [root / place, *sorted((root / place).rglob("*"))]:
            if path.suffix in SUFFIXES and path.is_file():
                hashed.update(path.relative_to(root).as_posix().encode() + b"\0")
                content = path.read_bytes()
                if path.suffix != ".py":
                    content = b"".join(content.split())
                hashed.update(content + b"\0")
    return hashed.hexdigest()[:16]


def digests(backends: Iterable[str], root: Path = ROOT, recipe: int = LATEST) -> dict[str, Any]:
    """What a report of these backends says about its sources."""
    places = RECIPES[recipe]
    others = [name for name in (NETWORK, MEASUREMENT) if name in places]
    return {
        RECIPE: recipe,
        KERNELS: {backend: digest(places[backend], root) for backend in backends},
        **{name: digest(places[name], root) for name in others},
    }


def differences(report: dict[str, Any], root: Path = ROOT) -> list[str]:
    """Which sources of a report are others now: backends, NETWORK, MEASUREMENT."""
    then = report[KERNELS]
    now = digests(then, root, report.get(RECIPE, 1))
    found = [backend for backend in then if then[backend] != now[KERNELS][backend]]
    return found + [name for name in (NETWORK, MEASUREMENT) if report.get(name) != now.get(name)]

"""Which files decide about a backend's speed, so that a report can be told from a stale one."""

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

KERNELS = {
    "cpu": ("csrc/cpu",),
    "triton": ("capsule_kernels/backends/triton",),
    "cuda": ("csrc/cuda",),
}
"""The folders of each backend's kernels."""
SUFFIXES = (".py", ".cpp", ".cu", ".cuh", ".h")


def digest(backend: str, root: Path = ROOT) -> str:
    """A digest of the kernels' sources: it changes when one of them does.

    Not with the layout of C++, which no compiler sees.
    """
    hashed = hashlib.sha256()
    for folder in KERNELS[backend]:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in SUFFIXES:
                hashed.update(path.relative_to(root).as_posix().encode() + b"\0")
                content = path.read_bytes()
                if path.suffix != ".py":
                    content = b"".join(content.split())
                hashed.update(content + b"\0")
    return hashed.hexdigest()[:16]

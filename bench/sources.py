"""Which files decide about what was measured, so that a report can be told from a stale one."""

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

NETWORK = "network"
SOURCES = {
    "cpu": ("csrc/cpu",),
    "triton": ("capsule_kernels/backends/triton",),
    "cuda": ("csrc/cuda",),
    NETWORK: ("model/capsnet.py", "model/spectral.py", "bench/popular.py"),
}
"""The kernels of each backend, and the networks whose training steps are measured."""
SUFFIXES = (".py", ".cpp", ".cu", ".cuh", ".h")


def digest(of: str, root: Path = ROOT) -> str:
    """A digest of the sources of a backend or of the networks: it changes when one of them does.

    Not with the layout of C++, which no compiler sees.
    """
    hashed = hashlib.sha256()
    for place in SOURCES[of]:
        for path in [root / place, *sorted((root / place).rglob("*"))]:
            if path.suffix in SUFFIXES and path.is_file():
                hashed.update(path.relative_to(root).as_posix().encode() + b"\0")
                content = path.read_bytes()
                if path.suffix != ".py":
                    content = b"".join(content.split())
                hashed.update(content + b"\0")
    return hashed.hexdigest()[:16]

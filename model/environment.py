"""The machine a command runs on, and what has to be said about it beside a figure."""

import argparse
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from .errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def choose_device(name: str | None) -> torch.device:
    """A device by name, or the first GPU where there is one; UserError if it can't be used."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):  # torch has more, on which not all of this runs
            raise UserError(f"--device must be cpu, cuda or one GPU, such as cuda:1, got {name}")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} can't be used: {reason}") from None
    return device


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":  # needs a GPU
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        return next(names)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of this source, where it is a git checkout, "-dirty" after it if tracked files
    differ from it: reports aside, which are written while they are measured."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        if head.returncode:
            return None
        changed = git("diff", "--quiet", "HEAD", "--", ".", ":(exclude)bench/results").returncode
    except OSError:
        return None
    return head.stdout.strip() + "-dirty" * bool(changed)


def description(device: torch.device) -> dict[str, Any]:
    """What a reader of measurements needs to judge them."""
    return {
        "command": " ".join(["python -m model.train", *without_paths(sys.argv[1:])]),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
    }


def without_paths(arguments: list[str]) -> list[str]:
    """A command line without the flags that only say where files lie."""
    p = argparse.ArgumentParser(add_help=False)
    p.add_argument("--data-dir")
    p.add_argument("--save-dir")
    return p.parse_known_args(arguments)[1]

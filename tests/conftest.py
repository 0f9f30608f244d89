"""Figures that tests count, such as calls tried or bits compared: a line each, after the run."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

# Convolutions round to TF32 by default, in sums whose order cuDNN chooses: what is the same network
# to a test would differ by more than float32's rounding.
torch.backends.cudnn.allow_tf32 = False

LINES = pytest.StashKey[dict[str, str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LINES] = {}


@pytest.fixture(scope="session")
def figure(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``figure(what, amount)`` prints ``what: amount`` in the summary; the last amount counts."""
    return request.config.stash[LINES].__setitem__


@pytest.fixture(autouse=True)
def _give_memory_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """A GPU's memory: several processes may test on it at a time."""
    yield
    if request.node.get_closest_marker("gpu") is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def pytest_sessionfinish(session: pytest.Session) -> None:
    # A process of pytest-xdist hands its lines to the one that prints.
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["figures"] = session.config.stash[LINES]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[LINES] |= getattr(node, "workeroutput", {}).get("figures", {})


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    lines = config.stash[LINES]
    if lines:
        terminalreporter.section("figures")
    for what, amount in lines.items():
        terminalreporter.write_line(f"{what}: {amount}")

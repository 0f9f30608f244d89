"""What all tests have in common: how a GPU is set and shared, failures told at once where wanted,
and figures that tests count, such as calls tried or bits compared: a line each, after the run."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from capsule_kernels.backends import triton

from .interpreted import spare_the_interpreter_what_it_throws_away

# Convolutions round to TF32 by default, in sums whose order cuDNN chooses: what is the same network
# to a test would differ by more than float32's rounding.
torch.backends.cudnn.allow_tf32 = False

LINES = pytest.StashKey[dict[str, str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--failures-at-once",
        action="store_true",
        help="print a failure when it happens, too, for a run that may be cut short",
    )
    parser.addoption(
        "--files-side-by-side",
        action="store_true",
        help="take tests of all files in turn: neighbours in a file often need one kernel, which "
        "Triton compiles in one process while others would wait for it",
    )


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files with interpreted kernels first: they take longest, and a file is one process's."""
    long = {item.path for item in items if item.get_closest_marker("interpreter")}
    items.sort(key=lambda item: item.path not in long)
    if config.getoption("--files-side-by-side"):
        tests = Counter(item.path for item in items)
        seen: Counter[Path] = Counter()

        def share(item: pytest.Item) -> float:
            seen[item.path] += 1
            return seen[item.path] / tests[item.path]

        items.sort(key=share)


def pytest_configure(config: pytest.Config) -> None:
    if triton.INSTALLED and triton.INTERPRETED:
        spare_the_interpreter_what_it_throws_away()
    config.stash[LINES] = {}
    if config.getoption("--failures-at-once") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(FailuresAtOnce(config))


class FailuresAtOnce:
    """Prints what went wrong in a test when it happens."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            terminal.write_line("")
            terminal.write_line(f"{report.nodeid} failed in its {report.when}:", red=True)
            terminal.write_line(report.longreprtext)


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

"""The cache of a report's Triton tests: what several need at a time is compiled once."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event

import pytest

from bench.report import SHARED_COMPILATIONS

cache = pytest.importorskip("triton.runtime.cache", reason="Triton is not installed")

from bench.shared_compilations import OneCompiles  # noqa: E402

NAME = "kernel.json"


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled_by(key: str, compilations: list[str]) -> str:
    """What Triton does: look, compile on a miss, store, and tell of it as a group."""
    entry = OneCompiles(key)
    group = entry.get_group(NAME)
    if group is None:
        compilations.append(key)
        group = {NAME: entry.put("compiled", NAME, binary=False)}
        entry.put_group(NAME, group)
    return group[NAME]


def test_all_but_one_wait():
    compilations: list[str] = []
    start = Barrier(8)

    def work(_: int) -> str:
        start.wait()
        return compiled_by("a", compilations)

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(work, range(8)))) == 1
    assert compilations == ["a"]
    compiled_by("b", compilations)
    assert compilations == ["a", "b"]


def test_the_next_compiles_where_one_fails():
    misses, goes_on = Event(), Event()

    def fail() -> None:
        entry = OneCompiles("a")
        assert entry.get_file(NAME) is None
        misses.set()
        goes_on.wait()

    compilations: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        failing = pool.submit(fail)
        misses.wait()
        next_one = pool.submit(compiled_by, "a", compilations)
        with pytest.raises(TimeoutError):
            next_one.result(timeout=0.2)
        assert not compilations
        goes_on.set()
        failing.result()
        assert next_one.result(timeout=60).endswith(NAME)
    assert compilations == ["a"]


def test_triton_takes_what_a_report_names(monkeypatch):
    for name, value in SHARED_COMPILATIONS.items():
        monkeypatch.setenv(name, value)
    assert isinstance(cache.get_cache_manager("aa"), OneCompiles)

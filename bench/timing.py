"""Timing: variants interleaved in one process, every sample kept, medians and spread reported."""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

PATIENCE = 20.0
"""Seconds after which no further round starts."""
MOST_SAMPLES = 50
"""Of a variant in a turn."""
Name = TypeVar("Name")
Call = Callable[[], object]
Sampler = Callable[[], float]
"""Runs its calls once and returns the seconds that one of them took."""


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median of the samples and their inter-quartile range."""

    median: float
    spread: float
    samples: int
    how: str

    @classmethod
    def of(cls, samples: Sequence[float], how: str) -> "Timing":
        quartiles = statistics.quantiles(samples, n=4) if len(samples) > 1 else [samples[0]] * 3
        return cls(statistics.median(samples), quartiles[2] - quartiles[0], len(samples), how)

    def fields(self) -> dict[str, float | str]:
        """As fields of a record."""
        return {
            "seconds": self.median,
            "spread": self.spread,
            "samples": self.samples,
            "timed_by": self.how,
        }


class Timer(Protocol):
    """How calls are timed on a device."""

    how: str

    def sampler(self, calls: Sequence[Call]) -> Sampler:
        """A sampler of the calls, which do the same work on different tensors."""


class CpuTimer:
    """The clock around one call; the calls take turns."""

    how = "clock"

    def sampler(self, calls: Sequence[Call]) -> Sampler:
        turns = itertools.cycle(calls)
        return lambda: seconds_by_clock(next(turns))


class EventTimer:  # needs a GPU
    """CUDA events around one call as it is launched from Python; the calls take turns."""

    how = "events"

    def sampler(self, calls: Sequence[Call]) -> Sampler:
        turns = itertools.cycle(calls)
        return lambda: seconds_by_events(next(turns))


class ReplayTimer:  # needs a GPU
    """CUDA events around the replay of one CUDA graph that holds all calls.

    The calls should work on tensors that together exceed the L2. Replay takes Python and launch
    overhead out of every variant alike.
    """

    how = "graph replay"

    def sampler(self, calls: Sequence[Call]) -> Sampler:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                calls[0]()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()

        return lambda: seconds_by_events(graph.replay) / len(calls)


def seconds_by_clock(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def seconds_by_events(call: Call) -> float:  # needs a GPU
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def make_timer(device: str, replay: bool = True) -> Timer:
    """The timer of a device; ``replay``: of CUDA graphs, without the time that launching takes."""
    if device == "cpu":
        return CpuTimer()
    return ReplayTimer() if replay else EventTimer()  # needs a GPU


def interleave(
    samplers: Mapping[Name, Sampler],
    how: str,
    rounds: int = 5,
    slice_seconds: float = 0.05,
    means: bool = False,
    patience: float = PATIENCE,
) -> dict[Name, Timing]:
    """Sample every variant in turn, ``rounds`` times round.

    In its turn a variant is sampled until ``slice_seconds`` are over (once at least,
    ``MOST_SAMPLES`` times at most), so that fast variants get more samples than slow ones, and all
    see the same noise. No round starts after ``patience`` seconds.

    ``means``: a turn is one sample, the mean over all of it. The median of short calls leaves out
    what now and then disturbs the machine, which no long call escapes: where calls of different
    lengths are compared with each other, the mean over the same time is fair.
    """
    started = time.perf_counter()
    for sample in samplers.values():
        sample()
    samples: dict[Name, list[float]] = {name: [] for name in samplers}
    for round_number in range(rounds):
        if round_number and time.perf_counter() - started > patience:
            break
        for name, sample in samplers.items():
            stop = time.perf_counter() + slice_seconds
            turn: list[float] = []
            while (means or len(turn) < MOST_SAMPLES) and (not turn or time.perf_counter() < stop):
                turn.append(sample())
            samples[name] += [statistics.fmean(turn)] if means else turn
    return {name: Timing.of(values, how) for name, values in samples.items()}

"""A training step as one CUDA graph: launched at once instead of kernel by kernel."""

from collections.abc import Callable

import torch

from .views import Batch

WARM_UP = 3
"""Steps that run as usual, on a side stream, before the graph is captured, as torch asks for."""


class GraphedStep:  # needs a GPU
    """Calls ``step`` for a few batches, then captures it and replays the capture.

    Every batch must have the shapes of the first. What ``step`` changes (weights, optimizer state,
    sums) must be changed in place.
    """

    def __init__(self, step: Callable[[Batch], None]) -> None:
        self.step = step
        self.calls = 0
        self.graph = torch.cuda.CUDAGraph()

    def __call__(self, batch: Batch) -> None:
        self.calls += 1
        if self.calls <= WARM_UP:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.step(batch)
            torch.cuda.current_stream().wait_stream(side)
            return
        if self.calls == WARM_UP + 1:
            self.static = Batch(*(x.clone() for x in batch))
            with torch.cuda.graph(self.graph):  # only records
                self.step(self.static)
        for own, new in zip(self.static, batch, strict=True):
            own.copy_(new)
        self.graph.replay()

"""Times for comparison between commits: ``pytest bench --benchmark-only --benchmark-autosave``.

Then ``--benchmark-compare``. Tests of correctness are in tests/; nothing here can fail on time.
"""

from typing import Any

import pytest
import torch

from .peers import BACKENDS, Implementation, ours
from .routing import RUN, Settings, input_sets
from .shapes import MNIST
from .timing import make_timer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SETTINGS = Settings(DEVICE)


@pytest.mark.parametrize("direction", RUN)
@pytest.mark.parametrize("B", [1, 16, 128])
@pytest.mark.parametrize("implementation", ours(DEVICE), ids=BACKENDS[DEVICE])
def test_routing(benchmark: Any, implementation: Implementation, B: int, direction: str) -> None:
    """The fused backends at the MNIST shape, float32, R = 3."""
    if implementation.missing:
        pytest.skip(implementation.missing)
    SETTINGS.apply()
    routing, (inputs, *_) = implementation.make(MNIST), input_sets(MNIST, B, SETTINGS)
    sample = make_timer(DEVICE, replay=False).sampler(
        [lambda: RUN[direction](routing, inputs, SETTINGS.R)]
    )
    # The sampler waits for the GPU, so that the plugin's own clock sees the whole call.
    benchmark(sample)

"""PyTorch's counter of floating-point operations counts routing as it counts the oracle."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import capsule_kernels.flops  # noqa: F401
from capsule_kernels import CapsuleConv2d, fused_routing

B, I, J, K, D = 5, 12, 7, 3, 4
SIZES = {"u": (B, I, K), "weight": (I, J, D, K), "logits": (I, J), "bias": (J, D)}


def counts(backend: str, wanted: list[str], R: int, **options: object) -> tuple[int, int]:
    """Of a forward, and of the backward for the wanted gradients."""
    inputs = {name: torch.randn(size) for name, size in SIZES.items()}
    inputs["weight"] = inputs["weight"][: I // options.get("weight_sharing", 1)]
    for name in wanted:
        inputs[name].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        v = fused_routing(**inputs, num_iterations=R, backend=backend, **options)
        forward = counter.get_total_flops()
        v.sum().backward()
    return forward, counter.get_total_flops() - forward


@pytest.mark.parametrize("R", [1, 2, 3])
@pytest.mark.parametrize(
    "options", [{}, {"weight_sharing": 4, "leaky": True}, {"routing_gradient": "last"}], ids=str
)
def test_every_gradient_counts_as_in_the_oracle(options, R):
    for few in range(1, len(SIZES) + 1):
        for wanted in map(list, itertools.combinations(SIZES, few)):
            ours, oracle = (counts(name, wanted, R, **options) for name in ("cpu", "reference"))
            assert ours == oracle, wanted
            assert ours[0] > 0


def test_windows_count_as_in_the_oracle():
    grid = torch.randn(2, 3, 4, 6, 5, requires_grad=True)
    layer = CapsuleConv2d(3, 4, 2, 5, kernel_size=3, stride=2, padding=1)

    def count(backend: str) -> int:
        layer.backend = backend
        with FlopCounterMode(display=False) as counter:
            layer(grid).sum().backward()
        return counter.get_total_flops()

    assert count("cpu") == count("reference") > 0

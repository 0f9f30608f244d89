"""Mixed precision: the op under autocast, and a network trained with it."""

from pathlib import Path

import pytest
import torch

from capsule_kernels import fused_routing
from model.metrics import read_metrics

from .cases import Case, make_inputs
from .tiny import train_tiny


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast_is_a_cast_before_the_op(backend: str) -> None:
    inputs = make_inputs(Case(logits=True, bias=True), torch.float32)
    u, weight = inputs.pop("u"), inputs.pop("weight")
    with torch.autocast("cpu", torch.bfloat16):
        v = fused_routing(u, weight, backend=backend, **inputs)
        assert torch.is_autocast_enabled("cpu")
    v.float().square().sum().backward()
    assert v.dtype == torch.bfloat16
    leaves = {name: x.detach().bfloat16().requires_grad_() for name, x in inputs.items()}
    low_u, low_weight = (x.detach().bfloat16().requires_grad_() for x in (u, weight))
    expected = fused_routing(low_u, low_weight, backend=backend, **leaves)
    expected.float().square().sum().backward()
    assert torch.equal(v, expected)
    for x, low in zip(
        (u, weight, *inputs.values()), (low_u, low_weight, *leaves.values()), strict=True
    ):
        assert x.grad is not None
        assert x.grad.dtype == torch.float32
        assert torch.equal(x.grad, low.grad.float())


def test_autocast_leaves_float64_alone() -> None:
    inputs = make_inputs(Case(), torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_routing(inputs["u"], inputs["weight"]).dtype == torch.float64


def test_a_network_trains_with_amp(tmp_path: Path) -> None:
    assert train_tiny(tmp_path, "--amp", "--lr", "0.01") == 0
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "epoch"]
    assert lines[1]["train_loss"] < lines[0]["train_loss"]

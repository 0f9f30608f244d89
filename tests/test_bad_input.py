"""A wrong shape raises the same sentence under every feature of PyTorch as in eager mode."""

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

from capsule_kernels import fused_routing, fused_routing_conv

from .targets import DEVICES

Function = Callable[[Tensor, Tensor], Tensor]


class Layer(nn.Module):
    def __init__(self, function: Function, weight: Tensor) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(weight)

    def forward(self, u: Tensor) -> Tensor:
        return self.function(u, self.weight)


def export(function: Function, u: Tensor, weight: Tensor) -> object:
    batch = torch.export.Dim("batch", min=1, max=64)
    return torch.export.export(Layer(function, weight), (u,), dynamic_shapes=({0: batch},))


def autocast(function: Function, u: Tensor, weight: Tensor) -> Tensor:
    with torch.autocast(u.device.type, torch.bfloat16):
        return function(u, weight)


def inference(function: Function, u: Tensor, weight: Tensor) -> Tensor:
    with torch.inference_mode():
        return function(u, weight)


SURROUNDINGS: dict[str, Callable[[Function, Tensor, Tensor], object]] = {
    "eager": lambda f, u, w: f(u, w),
    "compile": lambda f, u, w: torch.compile(f, backend="aot_eager")(u, w),
    "compile, dynamic": lambda f, u, w: torch.compile(f, dynamic=True, backend="aot_eager")(u, w),
    "export": export,
    "autocast": autocast,
    "inference_mode": inference,
    "checkpoint": lambda f, u, w: checkpoint(f, u.requires_grad_(), w, use_reentrant=False),
    "grad": lambda f, u, w: grad(lambda u, w: f(u, w).sum())(u, w),
    "vmap over u": lambda f, u, w: vmap(f, (0, None))(torch.stack([u, u]), w),
    "vmap over weight": lambda f, u, w: vmap(f, (None, 0))(u, torch.stack([w, w])),
    "jvp": lambda f, u, w: jvp(f, (u, w), (u, w)),
    "jacrev": lambda f, u, w: jacrev(f)(u, w),
}
CALLS: dict[str, tuple[Function, tuple[int, ...], tuple[int, ...], str]] = {
    "fused_routing": (
        fused_routing, (4, 6, 3), (5, 2, 4, 3),
        "fused_routing: weight must have shape [I // weight_sharing, J, D, K] = [6, J, D, 3], "
        "got [5, 2, 4, 3]",
    ),
    "fused_routing_conv": (
        fused_routing_conv, (2, 3, 4, 6, 7), (2, 3, 3, 2, 4, 4),
        "fused_routing_conv: weight must have shape [C, kh, kw, J, D, K] = [3, kh, kw, J, D, 4], "
        "got [2, 3, 3, 2, 4, 4]",
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    gc.collect()  # torch 2.11's checkpoint, where the call raised, is left with the traceback alone


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("surrounding", SURROUNDINGS)
@pytest.mark.parametrize("name", CALLS)
def test_the_same_sentence(name: str, surrounding: str, device: str) -> None:
    function, *sizes, sentence = CALLS[name]
    u, weight = (torch.randn(size, device=device) for size in sizes)
    with pytest.raises(ValueError) as raised:  # noqa: PT011 (the whole message is compared)
        SURROUNDINGS[surrounding](function, u, weight)
    assert str(raised.value).startswith(sentence)

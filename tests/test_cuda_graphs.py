"""A whole training step captured as one CUDA graph and replayed on new data."""

from functools import partial

import pytest
import torch

from capsule_kernels import CapsuleConv2d, CapsuleLinear, backends

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here"),
]


LAYERS = {
    "linear": (partial(CapsuleLinear, 64, 8, 10, 16), (64, 8)),
    "conv": (partial(CapsuleConv2d, 4, 8, 10, 16, 3, stride=2, padding=1), (4, 8, 7, 6)),
}
"""Layers, and the shape of a sample of their input."""


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_replayed_step_is_the_step(backend: str, name: str) -> None:
    make, shape = LAYERS[name]
    status = backends()[backend]
    if not status.usable:
        pytest.skip(f"{backend}: {status.reason}")
    generator = torch.Generator("cuda").manual_seed(0)
    data = torch.randn(8, 16, *shape, generator=generator, device="cuda")  # [steps, B, ...]

    def train(captured: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        layer = make(bias=True, backend=backend, device="cuda")
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        u = data[0].clone()

        def step() -> None:
            optimizer.zero_grad(set_to_none=False)
            layer(u).square().sum(2).mean().backward()
            optimizer.step()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):  # records, runs nothing
                step()
        for batch in data:
            u.copy_(batch)
            graph.replay() if captured else step()
        torch.cuda.synchronize()
        return [p.detach().clone() for p in layer.parameters()]

    for found, expected in zip(train(True), train(False), strict=True):
        assert torch.equal(found, expected)

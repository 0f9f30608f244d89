"""``torch.autocast`` and ``GradScaler``: the op behaves as PyTorch's own matrix products do."""

import pytest
import torch
from torch import Tensor, nn

from capsule_kernels import CapsuleLinear, fused_routing

from .cases import Case, make_inputs
from .targets import DEVICES, NEEDS_KERNELS

LOW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("low", LOW, ids=str)
def test_casts_as_a_matrix_product_does(low: torch.dtype, device: str) -> None:
    """Every mix of input dtypes gives the dtype that ``u @ weight`` would have."""
    inputs = make_inputs(Case(), torch.float32, device)
    u, weight = inputs["u"].detach(), inputs["weight"].detach()
    mixes = [(a, b) for a in (torch.float32, *LOW) for b in (torch.float32, *LOW)]
    with torch.autocast(device, low):
        for a, b in [*mixes, (torch.float64, torch.float64)]:
            x, W = u.to(a), weight.to(b)
            v, coupling = fused_routing(x, W, return_coupling=True)
            assert v.dtype == coupling.dtype == (x[0] @ W[0, 0].T).dtype
        # float64 is not cast, so a mix with it is refused as outside of autocast.
        with pytest.raises(TypeError, match=r"weight must have the dtype of u, torch.float64"):
            fused_routing(u.double(), weight)
    with pytest.raises(TypeError, match="weight must have the dtype of u"):
        fused_routing(u, weight.to(low))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("low", LOW, ids=str)
def test_a_network_trains_with_a_scaler(low: torch.dtype, device: str) -> None:
    """Capsules after a convolution, float32 weights; the loss falls as it does without autocast."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 8, 3, stride=2)
            self.capsules = CapsuleLinear(18, 4, 3, 4)

        def forward(self, images: Tensor) -> Tensor:
            u = self.conv(images).unflatten(1, (2, 4)).flatten(3).transpose(2, 3).flatten(1, 2)
            return self.capsules(u).float().norm(dim=-1)

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(32, 1, 7, 7, generator=generator).to(device)
    targets = torch.eye(3)[torch.randint(3, (32,), generator=generator)].to(device)

    def losses(enabled: bool) -> list[float]:
        torch.manual_seed(0)
        network = Network().to(device)
        optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
        scaler = torch.amp.GradScaler(device, enabled=enabled, init_scale=2.0**10)
        found = []
        for _ in range(25):
            with torch.autocast(device, low, enabled=enabled):
                lengths = network(images)
                loss = (lengths - targets).square().sum(-1).mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            found.append(loss.item())
        assert all(p.dtype == torch.float32 for p in network.parameters())
        return found

    plain, mixed = losses(False), losses(True)
    assert mixed[-1] < 0.7 * mixed[0]
    assert mixed != plain, "nothing was cast"
    assert mixed[-1] == pytest.approx(plain[-1], rel=0.1)


@pytest.mark.parametrize("device", DEVICES)
def test_overflow_is_seen_by_the_scaler(device: str) -> None:
    """Gradients too large for float16 come out infinite, so that the step is skipped."""
    inputs = make_inputs(Case(), torch.float32, device)
    u, weight = inputs["u"], inputs["weight"]
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**40)
    before = weight.detach().clone()
    with torch.autocast(device, torch.float16):
        loss = fused_routing(u, weight).sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(weight, before)
    assert scaler.get_scale() == 2.0**39


@NEEDS_KERNELS
@pytest.mark.parametrize("device", DEVICES)
def test_under_compile(device: str) -> None:
    inputs = make_inputs(Case(), torch.float32, device)
    u, weight = inputs["u"], inputs["weight"]
    whole = torch.compile(fused_routing, fullgraph=True, backend="aot_eager")
    with torch.autocast(device, torch.bfloat16):
        found, expected = whole(u, weight), fused_routing(u, weight)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(v.float().sum(), [u, weight]) for v in (found, expected)]
    torch.testing.assert_close(*gradients)

"""Convolutional capsules against loops over positions, and at the size of the window itself."""

import pytest
import torch
from torch import Tensor

from capsule_kernels import CapsuleConv2d, fused_routing, fused_routing_conv, reference_routing

B, C, K, H, W, J, D = 2, 3, 4, 6, 7, 5, 2


def inputs(kh: int = 3, kw: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, C, K, H, W), (C, kh, kw, J, D, K), (J, D))
    u, weight, bias = (
        torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes
    )
    return u, weight, bias


@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 0), (2, 1), (3, 2)])
def test_is_routing_at_every_position(stride: int, padding: int) -> None:
    u, weight, bias = leaves = inputs()
    v = fused_routing_conv(u, weight, 2, stride=stride, padding=padding, bias=bias, leaky=True)
    grid = torch.nn.functional.pad(u, (padding,) * 4)
    expected = torch.empty_like(v)
    rows, columns = v.shape[3:]
    assert rows == (H + 2 * padding - 3) // stride + 1
    assert columns == (W + 2 * padding - 2) // stride + 1
    for y in range(rows):
        for x in range(columns):
            capsules, matrices = [], []
            for c in range(C):
                for dy in range(3):
                    for dx in range(2):
                        capsules.append(grid[:, c, :, y * stride + dy, x * stride + dx])
                        matrices.append(weight[c, dy, dx])
            expected[..., y, x] = reference_routing(
                torch.stack(capsules, 1), torch.stack(matrices), 2, bias=bias, leaky=True
            )
    torch.testing.assert_close(v, expected)
    direction = torch.randn_like(v)
    torch.testing.assert_close(
        torch.autograd.grad(v, leaves, direction),
        torch.autograd.grad(expected, leaves, direction),
    )


def test_a_window_as_large_as_the_grid_is_a_fully_connected_layer() -> None:
    u, weight, _ = inputs(H, W)
    v = fused_routing_conv(u, weight)
    assert v.shape == (B, J, D, 1, 1)
    flat = fused_routing(u.permute(0, 1, 3, 4, 2).flatten(1, 3), weight.flatten(0, 2))
    assert torch.equal(v[..., 0, 0], flat)


def test_the_predictions_are_not_kept() -> None:
    """What the graph holds for the backward: windows, kernel and s, but nothing like u_hat."""
    u, weight, _ = inputs()
    saved: list[int] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(x.numel()) or x, lambda x: x
    )
    with hooks:
        v = fused_routing_conv(u, weight, 3)
    positions = v.shape[3] * v.shape[4]
    windows = B * positions * C * 6 * K
    assert sum(saved) == windows + weight.numel() + 3 * v.numel()
    assert max(saved) < B * positions * C * 6 * J * D


def test_layer() -> None:
    torch.manual_seed(0)
    layer = CapsuleConv2d(C, K, J, D, kernel_size=3, stride=2, padding=1, bias=True)
    u = torch.randn(B, C, K, H, W)
    assert list(layer.state_dict()) == ["weight", "bias"]
    found = layer(u)
    assert torch.equal(
        found, fused_routing_conv(u, layer.weight, stride=2, padding=1, bias=layer.bias)
    )
    rebuilt = eval(repr(layer), {"CapsuleConv2d": CapsuleConv2d})
    rebuilt.load_state_dict(layer.state_dict())
    assert torch.equal(rebuilt(u), found)
    assert layer(u[:0]).shape == (0, *found.shape[1:])
    found.square().sum().backward()
    assert layer.weight.grad is not None
    whole = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(whole(u), found)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"u": torch.zeros(2, 3, 4, 6)}, ValueError, r"u must have shape \[B, C, K, H, W\]"),
        ({"weight": torch.zeros(2, 3, 2, J, D, K)}, ValueError, r"\[3, kh, kw, J, D, 4\]"),
        ({"weight": torch.zeros(C, 9, 2, J, D, K)}, ValueError, "window of weight, 9 x 2"),
        ({"stride": 0}, ValueError, "stride must be >= 1, got 0"),
        ({"padding": -1}, ValueError, "padding must be >= 0, got -1"),
        ({"padding": "same"}, TypeError, "padding must be an int >= 0, got str 'same'"),
    ],
)
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    u, weight, _ = inputs()
    arguments = {"u": u.float(), "weight": weight.float()} | change
    with pytest.raises(error, match=f"^fused_routing_conv: .*{message}"):
        fused_routing_conv(**arguments)  # type: ignore[arg-type]

"""Convolutional capsules against loops over positions, and at the size of the window itself."""

import re
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.memory import CLEAR, extra_bytes, in_fresh_process
from capsule_kernels import (
    CapsuleConv2d,
    backends,
    fused_routing,
    fused_routing_conv,
    reference_routing,
)

from .targets import NEEDS_KERNELS

Pair = int | tuple[int, int]

B, C, K, H, W, J, D = 2, 3, 4, 6, 7, 5, 2


def inputs(kh: int = 3, kw: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "u": (B, C, K, H, W),
        "weight": (C, kh, kw, J, D, K),
        "logits": (C, kh, kw, J),
        "bias": (J, D),
    }
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize(
    ("stride", "padding"), [(1, 0), (2, 0), (2, 1), (3, 2), ((1, 2), (2, 0)), ((3, 1), (0, 1))]
)
def test_is_routing_at_every_position(stride: Pair, padding: Pair) -> None:
    leaves = inputs()
    weight, logits, bias = leaves["weight"], leaves["logits"], leaves["bias"]
    v, coupling = fused_routing_conv(
        **leaves, num_iterations=2, stride=stride, padding=padding, leaky=True, return_coupling=True
    )
    down, right = stride if isinstance(stride, tuple) else (stride, stride)
    above, left = padding if isinstance(padding, tuple) else (padding, padding)
    grid = torch.nn.functional.pad(leaves["u"], (left, left, above, above))
    expected, expected_coupling = torch.empty_like(v), torch.empty_like(coupling)
    rows, columns = v.shape[3:]
    assert rows == (H + 2 * above - 3) // down + 1
    assert columns == (W + 2 * left - 2) // right + 1
    places = list(product(range(C), range(3), range(2)))
    for y, x in product(range(rows), range(columns)):
        capsules = [grid[:, c, :, y * down + dy, x * right + dx] for c, dy, dx in places]
        expected[..., y, x], c = reference_routing(
            torch.stack(capsules, 1),
            torch.stack([weight[place] for place in places]),
            2,
            logits=torch.stack([logits[place] for place in places]),
            bias=bias,
            leaky=True,
            return_coupling=True,
        )
        expected_coupling[..., y, x] = c.unflatten(1, (C, 3, 2))
    torch.testing.assert_close((v, coupling), (expected, expected_coupling))
    assert not coupling.requires_grad
    direction = torch.randn_like(v)
    torch.testing.assert_close(
        torch.autograd.grad(v, list(leaves.values()), direction),
        torch.autograd.grad(expected, list(leaves.values()), direction),
    )


def test_a_window_as_large_as_the_grid_is_a_fully_connected_layer() -> None:
    leaves = inputs(H, W)
    u, weight = leaves["u"], leaves["weight"]
    v = fused_routing_conv(u, weight)
    assert v.shape == (B, J, D, 1, 1)
    flat = fused_routing(u.permute(0, 1, 3, 4, 2).flatten(1, 3), weight.flatten(0, 2))
    assert torch.equal(v[..., 0, 0], flat)


@NEEDS_KERNELS
def test_neither_predictions_nor_windows_are_kept() -> None:
    """What the graph holds for the backward: the grid, the kernel and s."""
    leaves = inputs()
    u, weight = leaves["u"], leaves["weight"]
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        v = fused_routing_conv(u, weight, 3)
    assert sum(kept.values()) == 8 * (u.numel() + weight.numel() + 3 * v.numel())


def probe(backends: tuple[str, ...]) -> tuple[list[int], int]:
    """Extra bytes at the peak of forward+backward of each backend, and the bytes of the grid.

    The windows are 14 times the grid, and the outputs next to nothing.
    """
    torch.set_num_threads(1)
    u = torch.randn(16, 16, 16, 64, 8).permute(0, 3, 4, 1, 2).requires_grad_()
    weight = torch.randn(64, 5, 5, 2, 2, 8, requires_grad=True)

    def call(backend: str) -> tuple[Tensor, ...]:
        v = fused_routing_conv(u, weight, backend=backend)
        return v, *torch.autograd.grad(v.sum(), (u, weight))

    call(backends[0])
    return [extra_bytes(partial(call, backend), "cpu") for backend in backends], u.nbytes


@pytest.mark.skipif(not backends()["cpu"].usable, reason="the oracle stores windows")
@pytest.mark.skipif(not CLEAR.exists(), reason="the peak resident set needs Linux's /proc")
def test_windows_are_not_stored(figure: Any) -> None:
    (extra, stored), grid = in_fresh_process(probe, ("cpu", "reference"))
    assert stored > 14 * grid, "the probe would not see windows"
    assert extra < grid
    figure("extra memory of windows 5 x 5, of the grid", f"{extra / grid:.2f}")


@NEEDS_KERNELS
def test_a_grid_changed_in_place_is_noticed() -> None:
    leaves = inputs()
    u = leaves["u"].detach().clone()
    v = fused_routing_conv(u, leaves["weight"])
    u.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        v.sum().backward()


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1, "bias": True},
        {"kernel_size": (2, 3), "stride": (1, 2), "padding": (0, 1), "learn_logits": True},
    ],
    ids=str,
)
def test_layer(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = CapsuleConv2d(C, K, J, D, **options)
    u = torch.randn(B, C, K, H, W)
    assert set(layer.state_dict()) == {
        "weight",
        *(["bias"] if "bias" in options else ["logits"]),
    }
    found = layer(u)
    expected = fused_routing_conv(
        u,
        layer.weight,
        stride=options["stride"],
        padding=options["padding"],
        bias=layer.bias,
        logits=layer.logits,
    )
    assert torch.equal(found, expected)
    rebuilt = eval(repr(layer), {"CapsuleConv2d": CapsuleConv2d})
    rebuilt.load_state_dict(layer.state_dict())
    assert torch.equal(rebuilt(u), found)
    assert layer(u[:0]).shape == (0, *found.shape[1:])
    found.square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    whole = torch.compile(layer, fullgraph=True, backend="aot_eager")
    again = whole(u)
    assert torch.equal(again, found)
    gradient = torch.autograd.grad(again.square().sum(), layer.weight)
    torch.testing.assert_close(*gradient, layer.weight.grad)


def test_layer_passes_its_options_on() -> None:
    torch.manual_seed(0)
    options = {"leaky": True, "routing_gradient": "last", "backend": "reference"}
    layer = CapsuleConv2d(2, 3, 4, 5, 2, num_iterations=2, **options)  # type: ignore[arg-type]
    u = torch.randn(1, 2, 3, 3, 3)

    def gradient(v: Tensor) -> Tensor:
        return torch.autograd.grad(v.square().sum(), layer.weight)[0]

    def both(**change: Any) -> tuple[Tensor, Tensor]:
        v = fused_routing_conv(u, layer.weight, 2, **options | change)  # type: ignore[call-overload]
        return v, gradient(v)

    v = layer(u)
    expected, expected_gradient = both()
    assert torch.equal(v, expected)
    assert torch.equal(gradient(v), expected_gradient)
    for change in ({"leaky": False}, {"routing_gradient": "full"}):
        assert not torch.equal(both(**change)[1], expected_gradient), change


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_inductor_compiles_overlapping_windows(backend: str) -> None:
    """Sizes at which the backward of ``Tensor.unfold`` wrote past its memory."""

    def scores(u: Tensor, weight: Tensor) -> Tensor:
        # Once, as further iterations are compiled for long and don't look at the grid.
        v = fused_routing_conv(u, weight, 1, stride=2, backend=backend)
        return v.square().sum((2, 3, 4))

    u = torch.randn(4, 32, 8, 14, 14, requires_grad=True)
    weight = (0.1 * torch.randn(32, 3, 3, 4, 4, 8)).requires_grad_()
    whole = torch.compile(scores, fullgraph=True)
    found, expected = (
        torch.autograd.grad(function(u, weight).sum(), (u, weight)) for function in (whole, scores)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"u": torch.zeros(2, 3, 4, 6)}, ValueError, r"u must have shape \[B, C, K, H, W\]"),
        ({"weight": torch.zeros(2, 3, 2, J, D, K)}, ValueError, r"\[3, kh, kw, J, D, 4\]"),
        (
            {"weight": torch.zeros(C, 9, 2, J, D, K)},
            ValueError,
            "the window of weight, 9 x 2, must fit into the grid of u, 6 x 7 with padding 0",
        ),
        ({"weight": torch.zeros(C, 0, 2, J, D, K)}, ValueError, "weight must have kh >= 1"),
        ({"weight": torch.zeros(C, 3, 2, J, 0, K)}, ValueError, "weight must have D >= 1"),
        ({"weight": torch.zeros(C, 3, 2, J, D, K).double()}, TypeError, "weight must have the d"),
        (
            {"u": torch.zeros(B, 0, K, H, W), "weight": torch.zeros(0, 3, 2, J, D, K)},
            ValueError,
            "u must have C >= 1",
        ),
        (
            {"u": torch.zeros(B, C, 0, H, W), "weight": torch.zeros(C, 3, 2, J, D, 0)},
            ValueError,
            "u must have K >= 1",
        ),
        ({"logits": torch.zeros(C, 3, 2, 1)}, ValueError, r"logits must .* = \[3, 3, 2, 5\], got"),
        ({"bias": torch.zeros(J)}, ValueError, r"bias must have shape \[J, D\], got \[5\]"),
        ({"bias": torch.zeros(J, D).double()}, TypeError, "bias must have the dtype of u"),
        ({"num_iterations": 0}, ValueError, "num_iterations must be >= 1, got 0"),
        ({"return_coupling": 1}, TypeError, "return_coupling must be True or False"),
        ({"stride": 0}, ValueError, "stride must be >= 1, got 0"),
        ({"stride": (1, 2, 3)}, ValueError, r"stride must be an int >= 1 or two of them, got \(1"),
        ({"padding": -1}, ValueError, "padding must be >= 0, got -1"),
        ({"padding": "same"}, TypeError, "padding must be an int >= 0 or two of them, got 'same'"),
        ({"backend": "tpu"}, ValueError, "backend must be one of 'auto', .*, got 'tpu'"),
    ],
)
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {name: x.detach().float() for name, x in inputs().items()} | change
    with pytest.raises(error, match=f"^fused_routing_conv: .*{message}"):
        fused_routing_conv(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name, s in backends().items() if not s.usable])
def test_an_unusable_backend_says_why(name: str) -> None:
    arguments = {name: x.detach() for name, x in inputs().items()}
    reason = re.escape(f"backend '{name}' can't be used: {backends()[name].reason}")
    with pytest.raises(RuntimeError, match=f"^fused_routing_conv: {reason}$"):
        fused_routing_conv(**arguments, backend=name)


@NEEDS_KERNELS
def test_a_transform_under_compile_is_refused_by_name() -> None:
    def gradient(u: Tensor, weight: Tensor) -> Tensor:
        return torch.func.grad(lambda u: fused_routing_conv(u, weight).sum())(u)

    u, weight = (inputs()[name].detach() for name in ("u", "weight"))
    whole = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"fused_routing_conv: torch\.func transforms"):
        whole(u, weight)

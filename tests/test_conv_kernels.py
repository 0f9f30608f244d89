"""Windows in the CPU kernels: every vector layout and instruction set, the same bits."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from capsule_kernels import backends, fused_routing_conv

from .tolerance import assert_as_good_as_reference, reference_dtype

pytestmark = pytest.mark.skipif(
    not backends()["cpu"].usable, reason=f"cpu backend: {backends()['cpu'].reason}"
)


@dataclass(frozen=True)
class Conv:
    """Sizes and options of a convolutional layer."""

    B: int = 2
    C: int = 3
    K: int = 8
    H: int = 5
    W: int = 6
    J: int = 3
    D: int = 16
    window: tuple[int, int] = (3, 2)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    routing_gradient: str = "full"

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.C, self.J, self.D, self.K


CASES = [
    Conv(),
    Conv(B=3, stride=(1, 2), padding=(1, 0), routing_gradient="last"),
    Conv(B=7, K=3, D=5, J=4, C=5, stride=(2, 1), padding=(1, 1)),
    # Steps no smaller than the window: no capsule is in two windows.
    Conv(B=9, window=(2, 3), stride=(2, 3)),
    Conv(B=6, window=(1, 2), stride=(3, 2), C=9),
    # Few samples, lanes are capsules: in one window, and in several.
    Conv(B=1, H=3, W=2, C=11),
    Conv(B=1, H=4, W=2, C=11),
    Conv(B=1, H=3, W=3, K=3, C=5, padding=(1, 0)),
    # The weights of a type are too large to be in the cache together.
    Conv(B=5, J=33, C=2, window=(3, 3)),
    Conv(B=1, H=4, W=3, J=33, C=2, window=(3, 3)),
    # More types than tasks, and one.
    Conv(B=2, J=1, D=1, K=1, C=70),
    Conv(B=8, C=1, K=16, D=8, window=(5, 5)),
]


def make_inputs(case: Conv, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "u": (case.B, case.C, case.K, case.H, case.W),
        "weight": (case.C, *case.window, case.J, case.D, case.K),
        "logits": (case.C, *case.window, case.J),
        "bias": (case.J, case.D),
    }
    scale = {"weight": (case.K * case.D) ** -0.5 * 2}
    return {
        name: (scale.get(name, 1.0) * torch.randn(shape, generator=generator)).to(dtype)
        for name, shape in shapes.items()
    }


def run(case: Conv, inputs: dict[str, Tensor], backend: str, **options: Any) -> dict[str, Tensor]:
    """v, c and the gradients of a random loss of v."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    v, coupling = fused_routing_conv(
        **leaves, stride=case.stride, padding=case.padding, leaky=True, return_coupling=True,
        routing_gradient=case.routing_gradient, backend=backend, **options,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    grad_v = torch.randn(v.shape, generator=generator).bfloat16().to(v.dtype)
    gradients = torch.autograd.grad(v, list(leaves.values()), grad_v)
    named = {f"grad_{name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {"v": v.detach(), "coupling": coupling} | named


def oracle(case: Conv, inputs: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The oracle over types and dimensions in another order: it differs by rounding alone."""
    generator = torch.Generator().manual_seed(seed)
    c, j, d, k = (torch.randperm(size, generator=generator) for size in case.sizes)
    moved = {
        "u": inputs["u"][:, c][:, :, k],
        "weight": inputs["weight"][c][..., j, :, :][..., d, :][..., k],
        "logits": inputs["logits"][c][..., j],
        "bias": inputs["bias"][j][:, d],
    }
    found = run(case, moved, "reference")
    c, j, d, k = (order.argsort() for order in (c, j, d, k))
    return {
        "v": found["v"][:, j][:, :, d],
        "coupling": found["coupling"][:, c][:, :, :, :, j],
        "grad_u": found["grad_u"][:, c][:, :, k],
        "grad_weight": found["grad_weight"][c][..., j, :, :][..., d, :][..., k],
        "grad_logits": found["grad_logits"][c][..., j],
        "grad_bias": found["grad_bias"][j][:, d],
    }


def check(case: Conv, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    found = run(case, inputs, "cpu")
    exact = run(case, {name: x.double() for name, x in inputs.items()}, "reference")
    same = {name: x.to(reference_dtype(dtype)) for name, x in inputs.items()}
    references = [oracle(case, same, seed) for seed in range(8)]
    for name in exact:
        assert_as_good_as_reference(
            f"{case}: {name}", found[name], [r[name] for r in references], exact[name]
        )


@pytest.fixture(params=["avx512", "avx2", "baseline"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    from capsule_kernels import _C

    if request.param not in _C.usable_instruction_sets():
        pytest.skip(f"this processor or build has no {request.param}")
    before = _C.instruction_set()
    _C.set_instruction_set(request.param)
    yield
    _C.set_instruction_set(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("instruction_set")
def test_matches_oracle(case: Conv, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES[:6], ids=str)
def test_low_precision(case: Conv, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits_on_any_number_of_threads(case: Conv) -> None:
    """Windows overlap, and what they add to a cell of the grid is one task's alone."""
    inputs = make_inputs(case, torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = run(case, inputs, "cpu")
        for threads in (2, 3, 7, 16):
            torch.set_num_threads(threads)
            found = run(case, inputs, "cpu")
            for name in alone:
                assert torch.equal(found[name], alone[name]), (threads, name)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_memory_held_before_does_not_matter(case: Conv) -> None:
    inputs = make_inputs(case, torch.float32)
    clean = run(case, inputs, "cpu")
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan().all()
        poisoned = run(case, inputs, "cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    for name in clean:
        assert torch.equal(poisoned[name], clean[name]), name

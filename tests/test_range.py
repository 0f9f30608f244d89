"""Zeros, denormals, huge and non-finite values: as in the oracle, sample by sample."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from capsule_kernels import fused_routing, reference_routing

from .cases import Case, check_inputs, copies, make_inputs, run
from .targets import DTYPES, KERNELS, Target

EVERYTHING = Case(I=6, J=4, K=3, D=5, logits=True, bias=True, leaky=True)
INF, NAN = float("inf"), float("nan")

pytestmark = [
    pytest.mark.parametrize("target", KERNELS),
    # Lanes are capsules for few samples, samples for many.
    pytest.mark.parametrize("B", [3, 21]),
]
tried: Counter[Target] = Counter()


@pytest.fixture(autouse=True)
def _counted(target, figure) -> Iterator[None]:
    yield
    tried[target] += 1
    figure(f"ranges, {target}", f"{tried[target]} cases tried")


def prepared(target: Target, case: Case, dtype: torch.dtype) -> dict[str, Any]:
    if not target.can_run(case, dtype):
        pytest.skip(f"{target} does not take {dtype}")
    return make_inputs(case, dtype, target.device)


def assert_finite_where_the_oracle_is(backend: str, case: Case, inputs: dict[str, Any]) -> None:
    found = run(fused_routing, case, inputs, backend=backend)
    expected = run(reference_routing, case, copies(inputs, inputs["u"].dtype))
    for name in expected:
        wrong = found[name].isfinite() != expected[name].isfinite()
        assert not wrong.any(), f"{name}: {int(wrong.sum())} of {wrong.numel()} elements"


@pytest.mark.parametrize("value", [INF, -INF, NAN], ids=str)
@pytest.mark.parametrize("argument", ["u", "weight", "logits", "bias"])
@pytest.mark.parametrize("leaky", [False, True], ids=["", "leaky"])
@pytest.mark.parametrize("R", [1, 3], ids=lambda R: f"R{R}")
def test_one_value_that_is_not_finite(target, B, value, argument, leaky, R):
    case = replace(EVERYTHING, B=B, R=R, leaky=leaky)
    inputs = prepared(target, case, torch.float32)
    with torch.no_grad():
        inputs[argument].flatten()[inputs[argument].numel() // 2] = value
    assert_finite_where_the_oracle_is(target.backend, case, inputs)


@pytest.mark.parametrize("value", [INF, NAN, 1e30], ids=str)
def test_a_spoilt_sample_spoils_no_other(target, B, value):
    case = replace(EVERYTHING, B=B)
    inputs = prepared(target, case, torch.float32)
    clean = run(fused_routing, case, inputs, backend=target.backend)
    with torch.no_grad():
        inputs["u"][1] = value
    spoilt = run(fused_routing, case, inputs, backend=target.backend)
    others = torch.arange(B, device=target.device) != 1
    for name in ("v", "coupling", "grad_u"):
        assert torch.equal(spoilt[name][others], clean[name][others]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("leaky", [False, True], ids=["", "leaky"])
def test_log_priors_of_minus_infinity_decouple(target, B, dtype, leaky):
    case = replace(EVERYTHING, B=B, leaky=leaky)
    inputs = prepared(target, case, dtype)
    with torch.no_grad():
        inputs["logits"][:, 1] = -INF
        inputs["logits"][2, :3] = -INF
    check_inputs(case, inputs, target.backend)
    found = run(fused_routing, case, inputs, backend=target.backend)
    assert not found["coupling"][:, :, 1].any()
    assert not found["grad_logits"][:, 1].any()


@pytest.mark.parametrize("leaky", [False, True], ids=["", "leaky"])
@pytest.mark.parametrize("R", [1, 3], ids=lambda R: f"R{R}")
def test_a_capsule_that_couples_to_none(target, B, leaky, R):
    """All log priors -inf: "none of the above" takes it, or c is NaN, as in softmax."""
    case = replace(EVERYTHING, B=B, R=R, leaky=leaky)
    inputs = prepared(target, case, torch.float32)
    with torch.no_grad():
        inputs["logits"][2] = -INF
    assert_finite_where_the_oracle_is(target.backend, case, inputs)
    coupling = run(fused_routing, case, inputs, backend=target.backend)["coupling"][:, 2]
    assert (coupling == 0).all() if leaky else coupling.isnan().all()


@pytest.mark.parametrize("value", [-1e30, -1e4, 0.0, 1e4, 1e30], ids=str)
def test_equal_log_priors_are_none(target, B, value):
    """Softmax takes differences: with one iteration, any equal logits give the same bits."""
    case = replace(EVERYTHING, B=B, R=1, leaky=False)
    inputs = prepared(target, case, torch.float32)
    equal = torch.full_like(inputs["logits"], value)
    found = run(fused_routing, case, inputs | {"logits": equal}, backend=target.backend)
    expected = run(fused_routing, case, inputs | {"logits": None}, backend=target.backend)
    for name in ("v", "coupling"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float64, "highest"), (torch.float32, "highest"), (torch.float32, "high")],
    ids=str,
)
@pytest.mark.parametrize("scale", [20, 100])
def test_couplings_of_large_logits_sum_to_1(target, B, dtype, precision, scale):
    """The largest logit has one rounding in the softmax's numerator and denominator, which then
    cancels, though they may come from two kernels: where J takes several tiles. Two roundings were
    hundreds of a coupling's last places."""
    case = Case(B=B, I=5, J=33, scale=scale)
    inputs = prepared(target, case, dtype)
    torch.set_float32_matmul_precision(precision)
    try:
        _, c = fused_routing(
            inputs["u"], inputs["weight"], return_coupling=True, backend=target.backend
        )
    finally:
        torch.set_float32_matmul_precision("highest")
    eps = torch.finfo(dtype).eps
    assert (c == 1).any()
    assert c.max() <= 1 + eps
    assert (c.double().sum(2) - 1).abs().max() <= 4 * eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiny_and_huge_capsules(target, B, dtype):
    """By the tolerance rule: squash and softmax overflow nowhere, and lose nothing."""
    case = replace(EVERYTHING, B=B, bias=False)
    for scale in (1e-30, 1e-8, 1e-3, 1e3, 1e8, 1e30):
        inputs = prepared(target, case, dtype)
        if not 0 < inputs["u"].detach().mul(scale).abs().max() < INF:
            continue  # float16 holds neither
        with torch.no_grad():
            inputs["u"].mul_(scale)
        check_inputs(case, inputs, target.backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", [2**-2, 2**-10, 2**-20])
def test_denormal_capsules(target, B, dtype, share):
    """Results below the smallest normal number may be flushed to 0, but are never NaN."""
    case = replace(EVERYTHING, B=B, bias=False)
    smallest = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).tiny
    inputs = prepared(target, case, dtype)
    with torch.no_grad():
        inputs["u"].mul_(smallest * share)
        inputs["weight"][:, :, ::2] = 0
    found = run(fused_routing, case, inputs, backend=target.backend)
    exact = run(reference_routing, case, copies(inputs, torch.float64))
    for name in ("v", "grad_u", "grad_weight"):
        error = (found[name].double() - exact[name]).abs()
        assert error.max() <= 64 * smallest, name  # NaN is not


def inputs_at_the_end_of_the_range(
    case: Case, dtype: torch.dtype, device: str
) -> Iterator[dict[str, Any]]:
    largest = torch.finfo(dtype).max
    for u_size, weight_size in ((largest, 1.0), (largest, 0.01), (1.0, largest / 100), (1e-3, 1e3)):
        inputs = make_inputs(case, dtype, device)
        with torch.no_grad():
            inputs["u"].clamp_(-1, 1).mul_(u_size / 8)
            inputs["weight"].clamp_(-1, 1).mul_(weight_size)
        yield inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_at_the_end_of_the_range(target, B, dtype):
    """v stays finite; a gradient overflows only where the oracle's does."""
    case = replace(EVERYTHING, B=B, bias=False)
    prepared(target, case, dtype)  # or skip
    for inputs in inputs_at_the_end_of_the_range(case, dtype, target.device):
        assert_finite_where_the_oracle_is(target.backend, case, inputs)


@pytest.mark.parametrize("exponent", [10, 16])
def test_half_precision_gradients_with_a_scaled_loss(target, B, exponent):
    """A loss scale, as GradScaler's: overflows where the oracle overflows, else it divides out."""
    case = replace(EVERYTHING, B=B)
    inputs = prepared(target, case, torch.float16)

    def gradients(routing: Any, scale: float, **options: Any) -> tuple[Tensor, ...]:
        leaves = copies(inputs, torch.float16)
        v = routing(
            leaves["u"], leaves["weight"], logits=leaves["logits"], bias=leaves["bias"], leaky=True,
            **options,
        )  # fmt: skip
        return torch.autograd.grad(scale * v.float().square().sum(), list(leaves.values()))

    scale = 2.0**exponent
    found = gradients(fused_routing, scale, backend=target.backend)
    expected = gradients(reference_routing, scale)
    plain = gradients(fused_routing, 1.0, backend=target.backend)
    for x, reference, unscaled in zip(found, expected, plain, strict=True):
        assert torch.equal(x.isfinite(), reference.isfinite())
        usable = x.isfinite() & (unscaled.abs() > 1e-3)
        torch.testing.assert_close(
            x[usable].float() / scale, unscaled[usable].float(), rtol=2**-8, atol=1e-4
        )

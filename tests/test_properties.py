"""Properties that hold for any input, tried on inputs that hypothesis draws: the same every run."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from capsule_kernels import fused_routing, reference_routing, squash
from capsule_kernels.backends import triton

from .cases import (
    LAYOUTS,
    Case,
    check_case,
    check_inputs,
    copies,
    make_inputs,
    reordered,
    route,
    run,
)
from .targets import DTYPES, KERNELS, Target
from .tolerance import assert_as_good_as_reference, reference_dtype

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
pytestmark = pytest.mark.parametrize("target", KERNELS)
tried: Counter[str] = Counter()


# Interpreted kernels take seconds where compiled ones take microseconds.
MOST_CAPSULES = 2 if triton.INTERPRETED else 12


class Property(NamedTuple):
    """What holds for any input of a target, how many are tried, and what they are drawn from."""

    check: Callable[..., None]
    examples: int
    strategies: dict[str, st.SearchStrategy]


PROPERTIES: list[Property] = []
"""All of this file, for test_properties_emulated.py."""


def examples(count: int) -> hypothesis.settings:
    """So many examples, the same ones in every run."""
    return hypothesis.settings(max_examples=count, derandomize=True, deadline=None, database=None)


def tried_on(count: int, *, interpreted: int, **strategies: st.SearchStrategy) -> Callable:
    """Make a property a test of so many examples, and of few where kernels are interpreted."""

    def test(check: Callable[..., None]) -> Callable[..., None]:
        PROPERTIES.append(Property(check, count, strategies))
        here = interpreted if triton.INTERPRETED else count
        return examples(here)(hypothesis.given(**strategies)(check))

    return test


@st.composite
def cases(draw: st.DrawFn, **fixed: object) -> Case:
    """Any sizes and options: whole vectors of lanes and rests, few samples and many."""
    weight_sharing = draw(st.sampled_from([1, 1, 2, 3, 5]))
    drawn = Case(
        B=draw(st.sampled_from([1, 2, 3, 4, 5, 8, 9, 16, 17, 33])),
        I=weight_sharing * draw(st.integers(1, MOST_CAPSULES)),
        J=draw(st.integers(1, 12)),
        K=draw(st.integers(1, 10)),
        D=draw(st.integers(1, 20)),
        R=draw(st.integers(1, 4)),
        weight_sharing=weight_sharing,
        logits=draw(st.booleans()),
        bias=draw(st.booleans()),
        leaky=draw(st.booleans()),
        routing_gradient=draw(st.sampled_from(["full", "last"])),
    )
    return replace(drawn, **fixed)  # type: ignore[arg-type]


def count(figure: Callable[[str, str], None], what: str) -> None:
    tried[what] += 1
    figure(what, f"{tried[what]} calls tried")


seeds = st.integers(0, 2**16)


@tried_on(120, interpreted=7, case=cases(), dtype=st.sampled_from(DTYPES), seed=seeds)
def test_everything_is_as_good_as_the_oracle(target: Target, figure, case, dtype, seed):
    hypothesis.assume(target.can_run(case, dtype))
    check_case(case, dtype, target.backend, target.device, seed)
    count(figure, f"properties, {target}: as good as the oracle")


def fill(x: Tensor, value: str) -> None:
    """Put what is hard to compute with into a leaf."""
    tiny = torch.finfo(x.dtype).tiny
    with torch.no_grad():
        match value:
            case "all equal":
                x.fill_(x.flatten()[0].item())
            case "zeros":
                x.zero_()
            case "denormal":
                x.clamp_(-1, 1).mul_(tiny)
            case "large":
                x.mul_(1e30)
            case _:
                x.flatten()[x.numel() // 2] = float(value)


@tried_on(
    60,
    interpreted=2,
    case=cases(),
    seed=seeds,
    argument=st.sampled_from(["u", "weight", "logits", "bias"]),
    value=st.sampled_from(["all equal", "zeros", "denormal", "large", "inf", "nan"]),
    layouts=st.lists(st.sampled_from(["contiguous", *LAYOUTS]), min_size=4, max_size=4),
)
def test_any_values_in_any_layout(target: Target, figure, case, seed, argument, value, layouts):
    """Strides change no bit, and where the oracle is finite the kernels are.

    How exact they are with values of any size: test_range.py.
    """
    hypothesis.assume(target.can_run(case, torch.float32))
    inputs = make_inputs(case, torch.float32, target.device, seed)
    hypothesis.assume(inputs[argument] is not None)
    fill(inputs[argument], value)
    odd = {
        name: None if x is None else LAYOUTS.get(layout, Tensor.clone)(x.detach()).requires_grad_()
        for (name, x), layout in zip(inputs.items(), layouts, strict=True)
    }
    dense = {
        name: None if x is None else x.detach().clone(memory_format=torch.contiguous_format)
        for name, x in odd.items()
    }
    plain = copies(dense, torch.float32)
    found = run(fused_routing, case, odd, backend=target.backend)
    expected = run(fused_routing, case, plain, backend=target.backend)
    reference = run(reference_routing, case, copies(plain, torch.float32))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(found[name].isfinite(), reference[name].isfinite()), name
    if value == "zeros" or (value, argument) == ("all equal", "logits"):
        check_inputs(case, plain, target.backend)
    count(figure, f"properties, {target}: any values in any layout")


@tried_on(40, interpreted=2, case=cases(), seed=seeds)
def test_order_of_capsules(target: Target, figure, case, seed):
    """Input capsules in another order change nothing, output capsules follow theirs."""
    hypothesis.assume(target.can_run(case, torch.float32))
    inputs = make_inputs(case, torch.float32, target.device, seed)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(case.I // case.weight_sharing, generator=generator)
    # The capsules of a type stay together.
    i = (rows[:, None] * case.weight_sharing + torch.arange(case.weight_sharing)).flatten()
    j = torch.randperm(case.J, generator=generator)
    rows, i, j = (order.to(target.device) for order in (rows, i, j))
    orders: dict[str, Callable[[Tensor], Tensor]] = {
        "u": lambda x: x[:, i],
        "weight": lambda x: x[rows][:, j],
        "logits": lambda x: x[i][:, j],
        "bias": lambda x: x[j],
    }
    moved = {
        name: None if x is None else orders[name](x.detach()).requires_grad_()
        for name, x in inputs.items()
    }
    found = route(fused_routing, case, moved, backend=target.backend)
    references = [
        run(reordered(seed), case, copies(inputs, torch.float32))["v"] for seed in range(8)
    ]
    exact = run(reference_routing, case, copies(inputs, torch.float64))["v"]
    assert_as_good_as_reference(
        "v in another order", found.detach(), [x[:, j] for x in references], exact[:, j]
    )
    count(figure, f"properties, {target}: order of capsules")


@tried_on(
    60,
    interpreted=2,
    case=cases(),
    seed=seeds,
    spoilt=seeds,
    value=st.sampled_from([0.0, 1.0, 1e30, float("nan")]),
)
def test_samples_do_not_see_each_other(target: Target, figure, case, seed, spoilt, value):
    """Bit for bit: other samples' values do not change a sample's results."""
    hypothesis.assume(target.can_run(case, torch.float32))
    inputs = make_inputs(case, torch.float32, target.device, seed)
    before = run(fused_routing, case, inputs, backend=target.backend)
    b = spoilt % case.B
    with torch.no_grad():
        inputs["u"][b] = inputs["u"][b] - 1 if value == 1.0 else value
    after = run(fused_routing, case, inputs, backend=target.backend)
    others = torch.arange(case.B, device=target.device) != b
    for name in ("v", "coupling", "grad_u"):
        assert torch.equal(before[name][others], after[name][others]), name
    count(figure, f"properties, {target}: batch independence")


@tried_on(
    40,
    interpreted=2,
    case=cases(R=1, logits=False, leaky=False),
    dtype=st.sampled_from(DTYPES),
    seed=seeds,
)
def test_one_iteration_is_linear_and_squash(target: Target, figure, case, dtype, seed):
    hypothesis.assume(target.can_run(case, dtype))
    inputs = make_inputs(case, dtype, target.device, seed)

    def linear(wide: torch.dtype) -> Tensor:
        u, weight = inputs["u"].detach().to(wide), inputs["weight"].detach().to(wide)
        s = torch.einsum("ijdk,bik->bjd", weight.repeat_interleave(case.weight_sharing, 0), u)
        bias = 0 if inputs["bias"] is None else inputs["bias"].detach().to(wide)
        return squash(s / case.J + bias)

    found = run(fused_routing, case, inputs, backend=target.backend)
    wide = torch.promote_types(reference_dtype(dtype), torch.float32)
    assert_as_good_as_reference(
        "v", found["v"], linear(wide).to(reference_dtype(dtype)), linear(torch.float64)
    )
    assert torch.equal(found["coupling"], torch.full_like(found["coupling"], 1 / case.J))
    count(figure, f"properties, {target}: one iteration is linear and squash")


@tried_on(
    60,
    interpreted=4,
    case=cases(),
    dtype=st.sampled_from(DTYPES),
    seed=seeds,
    scale=st.floats(0, 1e4),
)
def test_lengths_and_couplings(target: Target, figure, case, dtype, seed, scale):
    """|v| < 1; c >= 0 and sums to 1, to less when leaky: whatever the values."""
    hypothesis.assume(target.can_run(case, dtype))
    inputs = make_inputs(replace(case, scale=scale), dtype, target.device, seed)
    found = run(fused_routing, case, inputs, backend=target.backend)
    v, c = found["v"].double(), found["coupling"].double()
    # Roundings of D components, or of J couplings.
    eps = torch.finfo(dtype).eps
    assert (v.norm(dim=2) <= 1 + case.D * eps).all()
    total = c.sum(2)
    assert (c >= 0).all()
    assert (total <= 1 + case.J * eps).all()
    if not case.leaky:
        assert (total >= 1 - case.J * eps).all()
    elif scale < 1:
        assert (total < 1).all()
    count(figure, f"properties, {target}: lengths and couplings")

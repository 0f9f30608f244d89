"""The checks that tests of kernels are made of: each fails where it should."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from . import cases, conv_cases
from .cases import OPTIONS, Case
from .conv_cases import Conv
from .tolerance import assert_as_good_as_reference

EXACT = torch.linspace(1, 2, 100, dtype=torch.float64)


def one_off(x: Tensor, error: float) -> Tensor:
    """x with an error in one element."""
    return x + error * (torch.arange(len(x)) == 3)


def test_the_tolerance_rule_accepts_what_errs_as_its_reference_does():
    x = EXACT.float()
    assert_as_good_as_reference("x", one_off(x, 1e-6), one_off(x, -8e-7), EXACT)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: one_off(x, 1e-5), "error .* at flat index 3 of"),
        (lambda x: x * (1 + 3e-6), "error"),
        (lambda x: -x, "error"),
        (lambda x: x.where(x < 1.5, torch.nan), "50 of 100 not finite"),
        (lambda x: x[:99], "shape"),
        (lambda x: x.double(), "oracle in"),
    ],
)
def test_the_tolerance_rule_refuses(wrong, message):
    x = EXACT.float()
    reference = x * (1 + 4e-7)
    reference = reference if wrong(x).dtype == torch.float32 else reference.bfloat16()
    with pytest.raises(AssertionError, match=f"^v: .*{message}"):
        assert_as_good_as_reference("v", wrong(x), reference, EXACT)


def test_the_tolerance_rule_refuses_many_errors_of_the_size_of_the_reference_s_largest():
    x = EXACT.float()
    with pytest.raises(AssertionError, match="L2 error"):
        assert_as_good_as_reference("v", x + 8e-7, one_off(x, 1e-6), EXACT)


NAMES = ["v", "coupling", "grad_u", "grad_weight", "grad_logits", "grad_bias"]


@pytest.fixture(params=[cases, conv_cases], ids=["capsules", "windows"])
def module(request):
    return request.param


@pytest.fixture
def check(module) -> Callable[[], None]:
    """Of a small call on whatever kernels there are."""
    if module is cases:
        small = Case(B=2, I=3, J=2, D=4, logits=True, bias=True)
        return lambda: cases.check_case(small, torch.float32, "auto")
    return lambda: conv_cases.check(Conv(B=1, H=3, W=3), torch.float32, "auto")


def spoil(monkeypatch, module, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Change what the kernels find, not what the oracle does."""
    run = module.run

    def spoiling(*arguments, **options):
        results = run(*arguments, **options)
        ours = "auto" in (*arguments[2:], options.get("backend"))
        return change(results) if ours else results

    monkeypatch.setattr(module, "run", spoiling)


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_result_is_noticed(name, module, check, monkeypatch):
    spoil(monkeypatch, module, lambda found: found | {name: found[name] * (1 + 1e-4)})
    with pytest.raises(AssertionError, match=f": {name}: error"):
        check()


@pytest.mark.parametrize(
    "change",
    [
        lambda found: {name: x for name, x in found.items() if name != "grad_logits"},
        lambda found: found | {"grad_of_more": found["v"]},
    ],
    ids=["missing", "more"],
)
def test_other_results_than_the_oracle_s_are_noticed(change, module, check, monkeypatch):
    check()
    spoil(monkeypatch, module, change)
    with pytest.raises(AssertionError, match=r"'grad_.*, the oracle: \["):
        check()


@pytest.mark.parametrize("case", [Case(logits=True, bias=True), OPTIONS[-2]], ids=str)
def test_the_oracle_in_another_order_rounds_otherwise(case):
    """Else its error would be that of one run, lucky or not."""
    inputs = cases.make_inputs(case, torch.float32)
    same, one, other = (cases.run(cases.reordered(seed), case, inputs) for seed in (0, 1, 2))
    oracle = cases.run(cases.reference_routing, case, inputs)
    for name in NAMES:
        assert torch.equal(same[name], oracle[name]), name
        assert not torch.equal(one[name], other[name]), name
        torch.testing.assert_close(one[name], other[name])


@pytest.mark.parametrize("shared", [1, 4])
def test_another_order_is_one_along_every_axis(shared, monkeypatch):
    """But of the capsules that share weights."""
    case = Case(I=8, J=9, weight_sharing=shared, logits=True, bias=True)
    inputs = cases.make_inputs(case, torch.float64)
    oracle, seen = cases.reference_routing, {}

    def spy(u, weight, R, **options):
        seen.update(u=u / 1.02, weight=weight * 1.02, **options)
        return oracle(u, weight, R, **options)

    monkeypatch.setattr(cases, "reference_routing", spy)
    cases.run(cases.reordered(2), case, inputs)
    moved = {"u": [1, 2], "weight": [0, 1, 2, 3], "logits": [0, 1], "bias": [0, 1]}
    for name, axes in moved.items():
        for axis in axes:
            others = [n for n in range(inputs[name].dim()) if n != axis]
            given, found = inputs[name].sum(others), seen[name].sum(others)
            stays = shared > 1 and (name, axis) in (("u", 1), ("weight", 0), ("logits", 0))
            assert torch.allclose(given, found) == stays, (name, axis)
            torch.testing.assert_close(found.sort().values, given.sort().values)


def test_the_oracle_of_windows_in_another_order_rounds_otherwise():
    inputs = conv_cases.make_inputs(Conv(), torch.float32)
    one, other = (conv_cases.oracle(Conv(), inputs, seed) for seed in (1, 2))
    for name in NAMES:
        assert not torch.equal(one[name], other[name]), name
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)

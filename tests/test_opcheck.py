"""``torch.library.opcheck``: schemas, fakes and tracing of the operators, for every option."""

from dataclasses import replace

import pytest
import torch

from capsule_kernels import backends
from capsule_kernels.ops import OPERATORS

from .cases import Case, make_inputs

SMALL = Case(B=2, I=4, J=3, K=2, D=3)
CASES = [
    replace(SMALL, B=0),
    replace(SMALL, R=1, bias=True),
    replace(SMALL, logits=True, bias=True, leaky=True, weight_sharing=2),
    replace(SMALL, logits=True, routing_gradient="last"),
]
DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.float32]
MASKS = [[True, True, True, True], [False, True, True, False]]

pytestmark = pytest.mark.skipif(
    not backends()["cpu"].usable, reason=f"cpu backend: {backends()['cpu'].reason}"
)


@pytest.mark.parametrize(("case", "dtype"), list(zip(CASES, DTYPES, strict=True)), ids=str)
def test_operators(case: Case, dtype: torch.dtype) -> None:
    tensors = [x if x is None else x.detach() for x in make_inputs(case, dtype).values()]
    u, weight, logits, _ = tensors
    forward, backward = OPERATORS["cpu"]
    for return_coupling in (False, True):
        options = (case.R, case.leaky, case.weight_sharing, return_coupling)
        torch.library.opcheck(forward, (*tensors, *options))
    v, s, _ = forward(*tensors, *options)
    full = case.routing_gradient == "full"
    for mask in MASKS:
        arguments = (v, u, weight, logits, s, case.leaky, case.weight_sharing, full, mask)
        torch.library.opcheck(backward, arguments)


def test_any_strides() -> None:
    u, weight, *_ = make_inputs(SMALL, torch.float32).values()
    u, weight = (x.detach().movedim(-1, 0).contiguous().movedim(0, -1) for x in (u, weight))
    assert not u.is_contiguous()
    forward, backward = OPERATORS["cpu"]
    torch.library.opcheck(forward, (u, weight, None, None, 3, False, 1, True))
    v, s, _ = forward(u, weight, None, None, 3, False, 1, True)
    ones = torch.ones(()).expand_as(v)  # as y.sum().backward() hands it over
    torch.library.opcheck(backward, (ones, u, weight, None, s, False, 1, True, MASKS[0]))


def test_tensors_on_two_devices() -> None:
    """A meta tensor among others leads to the fakes, whose results no kernel fills."""
    u, weight = torch.randn(2, 4, 2), torch.empty(4, 3, 3, 2, device="meta")
    with pytest.raises(ValueError, match="on one device, got cpu, meta"):
        OPERATORS["cpu"].forward(u, weight, None, None, 3, False, 1, False)

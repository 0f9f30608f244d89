"""``torch.library.opcheck``: schemas, fakes and tracing of the operators, for every option."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

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


def windowed(dtype: torch.dtype) -> list[Tensor]:
    """A grid [B, H, W, C, K] = [2, 4, 5, 2, 3], weight and logits of windows 3 x 2."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, 5, 2, 3), (12, 3, 2, 3), (12, 3)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


WINDOW = [3, 2, 1, 2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_windows(dtype: torch.dtype) -> None:
    u, weight, logits = windowed(dtype)
    forward, backward = OPERATORS["cpu"]
    for grid in (u, u.transpose(0, 3).contiguous().transpose(0, 3), u[:0]):
        arguments = (grid, weight, logits, None, 2, True, 1, True, WINDOW)
        torch.library.opcheck(forward, arguments)
        v, s, _ = forward(*arguments)
        assert v.shape == (grid.shape[0] * 2 * 2, 3, 2)
        for mask in MASKS:
            gradients = (v, grid, weight, logits, s, True, 1, True, mask, WINDOW)
            torch.library.opcheck(backward, gradients)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": [3, 2]}, "window must be empty or kh, kw and a step's rows and columns"),
        ({"window": [5, 2, 1, 1]}, "window must fit into u"),
        ({"window": [0, 2, 1, 1]}, "window must fit into u"),
        ({"window": [3, 2, 0, 1]}, "window must fit into u, its steps must be >= 1"),
        ({"window": [2, 2, 1, 1]}, "weight must have shape"),
        ({"window": []}, r"u must have shape \[B, I, K\]"),
        ({"u": torch.zeros(2, 12, 3)}, r"u must have shape \[B, H, W, C, K\]"),
        ({"weight_sharing": 3}, "weight_sharing must be 1"),
    ],
)
def test_bad_windows(change: dict[str, object], message: str) -> None:
    u, weight, logits = windowed(torch.float32)
    given = {"u": u, "weight": weight, "weight_sharing": 1, "window": WINDOW} | change
    sharing, window = given.pop("weight_sharing"), given.pop("window")
    forward, backward = OPERATORS["cpu"]
    with pytest.raises(ValueError, match=f"^routing_forward: {message}"):
        forward(*given.values(), logits, None, 2, True, sharing, False, window)
    v, s = torch.zeros(8, 3, 2), torch.zeros(2, 8, 3, 2)
    with pytest.raises(ValueError, match=f"^routing_backward: {message}"):
        backward(v, *given.values(), logits, s, True, sharing, True, MASKS[0], window)


def test_tensors_on_two_devices() -> None:
    """A meta tensor among others leads to the fakes, whose results no kernel fills."""
    u, weight = torch.randn(2, 4, 2), torch.empty(4, 3, 3, 2, device="meta")
    with pytest.raises(ValueError, match="on one device, got cpu, meta"):
        OPERATORS["cpu"].forward(u, weight, None, None, 3, False, 1, False)


OTHER_OPERATORS = """
from torch.library import Library

define = Library.define
Library.define = lambda self, schema, *rest: define(
    self, schema.replace("window=None", "window=None, bool more=False"), *rest
)
import capsule_kernels
"""


DOES_NOT_LOAD = """
import importlib, warnings
real = importlib.import_module
def failing(name, *rest):
    if name == "capsule_kernels._C":
        raise ImportError("_C.so: undefined symbol: _ZN3c10")
    return real(name, *rest)
importlib.import_module = failing
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    from capsule_kernels import backends
for warning in seen:
    if warning.category is RuntimeWarning:
        print(warning.message)
print(backends()["cpu"].reason)
"""


def test_an_extension_that_does_not_load_is_not_one_that_is_missing() -> None:
    """As after an update of torch alone: kernels that were built are never lost in silence."""
    done = subprocess.run(
        [sys.executable, "-c", DOES_NOT_LOAD], capture_output=True, text=True, check=True
    )
    warning, reason = done.stdout.splitlines()
    assert warning == reason
    assert f"does not load with torch {torch.__version__} (_C.so: undefined symbol" in reason
    assert "build it anew" in reason


def test_an_extension_of_other_operators_is_told_from_one_that_fits() -> None:
    """As after an update of the sources alone; torch would end the process without a word of it."""
    done = subprocess.run(
        [sys.executable, "-c", OTHER_OPERATORS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: capsule_kernels: the compiled extension ")
    assert "was built for other operators than this version has; build it anew" in message

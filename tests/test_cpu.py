"""The C++ kernels against the oracle: awkward sizes, every option, every instruction set here."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from capsule_kernels import backends, fused_routing

from .cases import OPTIONS, SHAPES, Case, check_case
from .targets import instruction_set  # noqa: F401  (a fixture)

pytestmark = pytest.mark.skipif(
    not backends()["cpu"].usable, reason=f"cpu backend: {backends()['cpu'].reason}"
)


@pytest.mark.parametrize(
    ("B", "lanes", "block"),
    [(4, "capsules", 1), (5, "samples", 16), (8, "samples", 16), (9, "samples", 32)],
)
def test_vectors_of_avx512_are_not_half_empty(B, lanes, block):
    """5 to 8 samples fill the vectors of AVX2, and take their kernels."""
    from capsule_kernels import _C

    if _C.instruction_set() != "avx512":
        pytest.skip(f"the CPU kernels use {_C.instruction_set()}, not avx512")
    plan = _C.kernel_plan(B=B, I=1152, J=10, K=8, D=16, R=3, weight_sharing=1)
    assert (plan["lanes"], plan["samples_per_block"]) == (lanes, block)


@pytest.mark.parametrize(
    "wrong",
    [*({name: 0} for name in ("B", "I", "J", "K", "D", "R", "weight_sharing")), {"B": -1},
     {"weight_sharing": 7}],
    ids=str,
)  # fmt: skip
def test_a_plan_of_no_problem_is_refused(wrong):
    """It was a division by zero, which ends the process."""
    from capsule_kernels import _C

    sizes = {"B": 2, "I": 12, "J": 10, "K": 8, "D": 16, "R": 3, "weight_sharing": 1} | wrong
    got = ", ".join(f"{name} = {size}" for name, size in sizes.items())
    with pytest.raises(ValueError, match=f">= 1 and weight_sharing must divide I, got {got}$"):
        _C.kernel_plan(**sizes)


# Both lane layouts: few samples (lanes are capsules) and many (lanes are samples).
BATCHES = [1, 2, 5, 9, 20]


@pytest.mark.parametrize("case", SHAPES + OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.usefixtures("instruction_set")
def test_matches_oracle(case, dtype):
    check_case(case, dtype, "cpu")


@pytest.mark.parametrize("B", BATCHES)
@pytest.mark.parametrize("case", OPTIONS, ids=str)
@pytest.mark.usefixtures("instruction_set")
def test_options_at_every_batch_layout(case, B):
    check_case(replace(case, B=B), torch.float32, "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [SHAPES[0], SHAPES[1], *OPTIONS], ids=str)
def test_low_precision(case, dtype):
    check_case(case, dtype, "cpu")


# W is contracted with the states: capsules by the chunk, in several tasks, other K and D than the
# paper's. 33 and 65 samples end in a block of one vector, however many samples that is.
SHARED = [
    Case(B=33, I=36, J=10, weight_sharing=12),
    Case(B=40, I=36, J=10, weight_sharing=12, R=1),
    Case(B=33, I=36, J=10, weight_sharing=12, R=1, logits=True),
    Case(B=33, I=150, J=3, K=6, D=10, weight_sharing=75, logits=True, bias=True, leaky=True),
    Case(B=70, I=130, J=2, K=11, D=20, weight_sharing=130, R=2),
    Case(B=65, I=130, K=3, weight_sharing=65, logits=True, routing_gradient="last"),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", SHARED, ids=str)
@pytest.mark.usefixtures("instruction_set")
def test_shared_weights(case, dtype):
    from capsule_kernels import _C

    sizes = {name: getattr(case, name) for name in ("B", "I", "J", "K", "D", "R", "weight_sharing")}
    assert _C.kernel_plan(**sizes)["contracts_weight"]
    check_case(case, dtype, "cpu")


def test_weights_are_contracted_where_it_pays():
    from capsule_kernels import _C

    def contracts(**sizes: int) -> bool:
        return _C.kernel_plan(**{"B": 128, "I": 1152, "J": 10, "K": 8, "D": 16} | sizes)[
            "contracts_weight"
        ]

    assert not contracts()
    assert not contracts(weight_sharing=3)
    assert contracts(weight_sharing=4)
    assert not contracts(weight_sharing=36, B=1)  # lanes are capsules
    assert not contracts(weight_sharing=1152, D=1)  # products with W cost as much as u_hat


@pytest.mark.parametrize("B", [3, 20])
@pytest.mark.parametrize(("dtype", "lowest"), [(torch.float32, -80), (torch.float64, -600)])
@pytest.mark.usefixtures("instruction_set")
def test_small_couplings_are_exact_too(dtype, lowest, B):
    """Relative to themselves, however small: softmax of priors whose largest is 0, as u is 0."""
    generator = torch.Generator().manual_seed(0)
    logits = lowest * torch.rand(64, 8, generator=generator, dtype=dtype)
    logits[:, 0] = 0
    logits[0, 1] = -torch.inf
    u, weight = torch.zeros(B, 64, 4, dtype=dtype), torch.ones(64, 8, 3, 4, dtype=dtype)
    _, c = fused_routing(u, weight, 2, logits=logits, return_coupling=True, backend="cpu")
    exponentials = np.exp(logits.numpy().astype(np.longdouble))
    expected = exponentials / exponentials.sum(-1, keepdims=True)
    errors = np.abs(c.numpy() - expected)
    assert (errors <= 3 * torch.finfo(dtype).eps * expected).all()

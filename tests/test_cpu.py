"""The C++ kernels against the oracle: awkward sizes, every option, every instruction set here."""

from dataclasses import replace

import pytest
import torch

from capsule_kernels import backends

from .cases import OPTIONS, SHAPES, check_case

pytestmark = pytest.mark.skipif(
    not backends()["cpu"].usable, reason=f"cpu backend: {backends()['cpu'].reason}"
)


@pytest.fixture(params=["avx512", "avx2", "baseline"])
def instruction_set(request):
    """Runs a test on one set of kernels; what this processor lacks is skipped, visibly."""
    from capsule_kernels import _C

    if request.param not in _C.usable_instruction_sets():
        pytest.skip(f"this processor or build has no {request.param}")
    before = _C.instruction_set()
    _C.set_instruction_set(request.param)
    yield request.param
    _C.set_instruction_set(before)


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


# Both lane layouts: few samples (lanes are capsules) and many (lanes are samples).
BATCHES = [1, 2, 5, 9, 20]


@pytest.mark.parametrize("case", SHAPES + OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_matches_oracle(case, dtype, instruction_set):
    check_case(case, dtype, "cpu")


@pytest.mark.parametrize("B", BATCHES)
@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_options_at_every_batch_layout(case, B, instruction_set):
    check_case(replace(case, B=B), torch.float32, "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [SHAPES[0], SHAPES[1], *OPTIONS], ids=str)
def test_low_precision(case, dtype):
    check_case(case, dtype, "cpu")

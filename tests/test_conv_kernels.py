"""Windows in the CPU kernels: every vector layout and instruction set, the same bits."""

import pytest
import torch

from capsule_kernels import backends

from .conv_cases import CASES, Conv, check, make_inputs, run
from .targets import instruction_set  # noqa: F401  (a fixture)

pytestmark = pytest.mark.skipif(
    not backends()["cpu"].usable, reason=f"cpu backend: {backends()['cpu'].reason}"
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("instruction_set")
def test_matches_oracle(case: Conv, dtype: torch.dtype) -> None:
    check(case, dtype, "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES[:6], ids=str)
def test_low_precision(case: Conv, dtype: torch.dtype) -> None:
    check(case, dtype, "cpu")


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

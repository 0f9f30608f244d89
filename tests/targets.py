"""The kernels that can run here: what tests of every backend are parametrized with."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from capsule_kernels import backends
from capsule_kernels.dispatch import RoutingShape, reason_against

from .cases import Case

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Target(NamedTuple):
    """A backend and the device its tensors live on."""

    backend: str
    device: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}"

    def can_run(self, case: Case, dtype: torch.dtype) -> bool:
        shape = RoutingShape(case.I, case.J, case.K, case.D, case.R, case.weight_sharing)
        return (
            self.backend == "reference"
            or reason_against(self.backend, torch.device(self.device), dtype, shape) is None
        )


def parameter(target: Target) -> Any:
    """The target as a parameter of a test: one on a GPU is part of ``pytest -m gpu``."""
    return pytest.param(target, marks=[pytest.mark.gpu] * (target.device == "cuda"), id=str(target))


GPU = "cuda" if torch.cuda.is_available() else "cpu"
TARGETS = [
    Target(name, "cpu" if name == "cpu" else GPU)
    for name, status in backends().items()
    if name != "reference" and status.usable
]
KERNELS = [parameter(target) for target in TARGETS]
"""Every kernel backend; triton is among them on a GPU or under ``TRITON_INTERPRET=1``."""

NEEDS_KERNELS = pytest.mark.skipif(not TARGETS, reason="the oracle alone is usable here")

EVERY = [parameter(Target("reference", "cpu")), *KERNELS]


@pytest.fixture(params=["avx512", "avx2", "baseline"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs a test on one set of CPU kernels; what this processor lacks is skipped, visibly."""
    from capsule_kernels import _C

    if request.param not in _C.usable_instruction_sets():
        pytest.skip(f"this processor or build has no {request.param}")
    before = _C.instruction_set()
    _C.set_instruction_set(request.param)
    assert _C.instruction_set() == request.param
    yield
    _C.set_instruction_set(before)


DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here"),
        ],
    ),
]
"""For tests that leave the choice of the backend to the op."""

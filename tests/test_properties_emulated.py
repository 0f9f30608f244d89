"""The properties of every backend, for the emulated CUDA kernels: on devices of many sizes, in any
schedule, as far as calls fit."""

from collections.abc import Iterator

import pytest
import torch

from capsule_kernels import fused_routing, reference_routing

from .cases import Case, copies, make_inputs, reordered, run
from .cuda_emulation.emulator import Device, Emulator, build, compiler
from .targets import Target
from .test_properties import PROPERTIES, Property, examples, hypothesis, st
from .tolerance import assert_as_good_as_reference, reference_dtype

pytestmark = [
    pytest.mark.cuda_emulation,
    pytest.mark.slow,
    pytest.mark.skipif(compiler() is None, reason="the emulation needs g++"),
]

DEVICES = st.builds(
    Device, st.integers(1, 9), st.sampled_from([1024 * kib for kib in (48, 99, 163, 227)])
)


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    emulator = Emulator(build())
    with emulator.installed():
        yield emulator


def has_priors_of_one_capsule(case: Case) -> bool:
    """Where logits have no effect: test_priors_of_one_capsule."""
    return case.J == 1 and case.logits and not case.leaky


@pytest.mark.parametrize("what", PROPERTIES, ids=lambda what: what.check.__name__)
def test_on_the_emulated_device(emulator: Emulator, figure, what: Property) -> None:
    @examples(what.examples)
    @hypothesis.given(device=DEVICES, schedule=st.integers(0, 2**16), **what.strategies)
    def check(device: Device, schedule: int, case: Case, **drawn: object) -> None:
        hypothesis.assume(not has_priors_of_one_capsule(case))
        emulator.device = device
        emulator.configure(seed=schedule)
        what.check(Target("cuda", "cpu"), figure, case=case, **drawn)

    check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("R", [1, 3])
def test_priors_of_one_capsule(emulator: Emulator, R: int, dtype: torch.dtype) -> None:
    """The coupling is 1 up to rounding, and so is their gradient 0; the oracle's is exactly 0,
    which leaves nothing for the tolerance of the properties."""
    emulator.reset()
    case = Case(B=9, J=1, R=R, logits=True)
    for seed in range(8):
        inputs = make_inputs(case, dtype, seed=seed)
        found = run(fused_routing, case, inputs, backend="cuda")
        exact = run(reference_routing, case, copies(inputs, torch.float64))
        plain = copies(inputs, reference_dtype(dtype))
        references = [run(reordered(n), case, plain) for n in range(8)]
        grad_logits = found.pop("grad_logits")
        for name, x in found.items():
            assert_as_good_as_reference(name, x, [r[name] for r in references], exact[name])
        # grad_u . u is what would be the gradient, were the coupling not held at 1.
        held = (exact["grad_u"] * inputs["u"].detach().double()).abs().sum((0, 2))
        eps = torch.finfo(torch.float32).eps
        assert (grad_logits.double().abs()[:, 0] <= 2 * eps * held).all()


@pytest.mark.parametrize("argument", ["weight", "bias"])
def test_one_nan_spoils_all_of_v(emulator: Emulator, argument: str) -> None:
    """As in the oracle: a capsule of NaN length is not taken for a silent one."""
    emulator.reset()
    case = Case(B=1, I=1, J=1, K=1, D=2, R=1, bias=True)
    inputs = make_inputs(case, torch.float32)
    with torch.no_grad():
        inputs[argument].flatten()[0] = torch.nan
    assert run(fused_routing, case, inputs, backend="cuda")["v"].isnan().all()

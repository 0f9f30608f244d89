"""The CUDA kernels without a GPU: their own sources, run on the host by an emulation of the
execution model with shuffled schedules, behind the public face and against the oracle."""

import itertools
import math
import re
from collections import Counter, defaultdict
from dataclasses import replace
from statistics import median

import pytest
import torch

from capsule_kernels import fused_routing, reference_routing
from capsule_kernels.backends import cuda

from . import cases, conv_cases
from .cases import OPTIONS, Case, check_case, copies, make_inputs, reordered, run
from .cuda_emulation.emulator import KERNELS, Device, Emulator, Shape, build, compiler
from .test_determinism import REPEATS, assert_same_bits, bits
from .test_range import assert_finite_where_the_oracle_is, inputs_at_the_end_of_the_range
from .tolerance import assert_as_good_as_reference

pytestmark = [
    pytest.mark.cuda_emulation,
    pytest.mark.skipif(compiler() is None, reason="the emulation needs g++"),
]

H200 = cuda.Figures((9, 0), 132, 227 * 1024)
A100 = cuda.Figures((8, 0), 108, 163 * 1024)


def fits(case: Case) -> bool:
    shape = (case.I, case.J, case.K, case.D, case.R, case.weight_sharing)
    return cuda.does_not_fit(H200, torch.float32, shape) is None


# What tests/test_gpu.py runs on a GPU, as far as it fits, and what meets other instances.
SHAPES = [
    *filter(fits, cases.SHAPES), Case(J=20, D=8), Case(J=10, D=8), Case(J=3, D=16), Case(K=17),
]  # fmt: skip


@pytest.fixture(scope="module")
def built() -> Emulator:
    return Emulator(build())


launched: Counter[str] = Counter()


@pytest.fixture
def emulator(built: Emulator, figure):
    """The emulated kernels as backend "cuda" for CPU tensors."""
    built.reset()
    with built.installed():
        yield built
    launched.update(built.launches)
    counts = ", ".join(f"{count} {name}" for name, count in launched.items())
    figure("launches of the emulated CUDA kernels", counts)


@pytest.mark.parametrize("case", [*SHAPES, *OPTIONS], ids=str)
def test_float32_agrees_with_the_oracle(emulator: Emulator, case: Case) -> None:
    check_case(case, torch.float32, "cuda")
    assert emulator.launches == ["forward", "backward"]


@pytest.mark.parametrize("case", conv_cases.CASES[:3], ids=str)
@pytest.mark.usefixtures("emulator")
def test_windows_agree_with_the_oracle(case: conv_cases.Conv) -> None:
    """Copied in Python here; on a device by the binding."""
    conv_cases.check(case, torch.float32, "cuda")


@pytest.mark.parametrize("case", [Case(D=1), Case(R=10)], ids=str)
def test_ill_conditioned_calls_err_as_float32_does(emulator: Emulator, case: Case) -> None:
    """One input says little where errors grow by a factor that depends on it: over many, the
    median is at most twice that of the float32 oracle with its sums in another order."""
    errors: dict[str, list[tuple[float, float]]] = {}
    for seed in range(30):
        inputs = make_inputs(case, torch.float32, seed=seed)
        found = run(fused_routing, case, inputs, backend="cuda")
        reference = run(reordered(1), case, copies(inputs, torch.float32))
        for name, exact in run(reference_routing, case, copies(inputs, torch.float64)).items():
            pair = [float((x[name] - exact).abs().max()) for x in (found, reference)]
            errors.setdefault(name, []).append((pair[0], pair[1]))
    for name, pairs in errors.items():
        ours, float32s = (median(column) for column in zip(*pairs, strict=True))
        assert ours <= 2 * float32s, f"{name}: {ours:.3e}, the float32 oracle {float32s:.3e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case", [Case(), Case(K=3, D=7), Case(D=24), Case(B=33, I=40, J=10), *OPTIONS[-2:]], ids=str
)
def test_16_bit_agrees_with_the_oracle(emulator: Emulator, case: Case, dtype: torch.dtype) -> None:
    check_case(case, dtype, "cuda")
    assert emulator.launches == ["forward", "backward"]


def rounded_to_tf32(x: torch.Tensor) -> torch.Tensor:
    """To the nearest value of 11 significant bits, ties away from zero."""
    bits = x.detach().view(torch.int32) + 0x1000
    return (bits & ~0x1FFF).view(torch.float32).requires_grad_()


def run_tf32(
    case: Case, inputs: dict[str, torch.Tensor], return_coupling: bool = True
) -> dict[str, torch.Tensor]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return run(fused_routing, case, inputs, return_coupling, backend="cuda")
    finally:
        torch.set_float32_matmul_precision(before)


def check_tf32(case: Case, return_coupling: bool = True) -> None:
    inputs = make_inputs(case, torch.float32)
    found = run_tf32(case, inputs, return_coupling)
    # The oracle in the same precision: what enters a product is rounded to TF32.
    rounded = inputs | {name: rounded_to_tf32(inputs[name]) for name in ("u", "weight")}
    reference = run(reference_routing, case, rounded)
    exact = run(reference_routing, case, copies(inputs, torch.float64))
    for name in found:
        assert_as_good_as_reference(name, found[name], reference[name], exact[name])
    strict = run(fused_routing, case, inputs, backend="cuda")
    assert not torch.equal(strict["v"], found["v"]), "TF32 products were not used"


@pytest.mark.parametrize("case", [Case(), Case(B=33, I=40, J=10), *OPTIONS[-2:]], ids=str)
@pytest.mark.usefixtures("emulator")
def test_tf32_is_as_good_as_products_of_rounded_inputs(case: Case) -> None:
    check_tf32(case)


BY_OUTPUT_CAPSULES = [
    # Samples of a group of input capsules in one block, in two and in many; two groups of a block.
    (Case(B=70, I=30, J=10), 1, (1, 1)),
    (Case(B=90, I=40, J=10), 2, (2, 2)),
    (Case(B=400, I=9, J=7, R=2, leaky=True, bias=True), 3, (3, 5)),
    (Case(B=130, I=36, J=3, leaky=True, weight_sharing=9), 1, (3, 1)),
    (Case(B=300, I=5, J=4), 1, (2, 3)),
]


@pytest.mark.parametrize(("case", "sm_count", "expected"), BY_OUTPUT_CAPSULES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_by_output_capsules(
    emulator: Emulator, case: Case, sm_count: int, expected: tuple[int, int], dtype: torch.dtype
) -> None:
    emulator.device = Device(sm_count, 227 * 1024)
    sizes = (case.B, case.I, case.J, case.K, case.D, case.R, case.weight_sharing)
    plan = emulator.plan(Shape(*sizes), dtype)
    assert (plan.output_blocks, plan.output_parts) == expected
    if dtype == torch.float32:
        check_tf32(case)
    else:
        check_case(case, dtype, "cuda")


@pytest.mark.parametrize(
    "case",
    [Case(J=11, D=8), Case(K=6), Case(D=10), Case(R=1), Case(R=4), Case(B=100, I=40)],
    ids=str,
)
def test_other_shapes_and_few_units_have_other_gradients(built: Emulator, case: Case) -> None:
    built.reset()
    case = case if case.B > 3 else replace(case, B=2000)
    shape = Shape(case.B, case.I, case.J, case.K, case.D, case.R, 1)
    plan = built.plan(shape, torch.bfloat16)
    assert plan.gradient_capsules > 0
    assert plan.output_blocks == 0


# Groups of input capsules and of samples, and the tiles of a pass: 8 where the warpgroups of a
# block share its samples, 16 where they do not. One pass of a block and several; a warpgroup
# without samples, or without input capsules, which are no multiple of four.
BY_WARPGROUPS = [
    (Case(B=260, I=9, J=5, R=2), 2, (2, 1, 8)),
    (Case(B=256, I=22, J=10, leaky=True, bias=True), 5, (1, 4, 8)),
    (Case(B=150, I=22, J=10), 4, (1, 3, 8)),
    (Case(B=256, I=12, J=5, R=4, leaky=True), 6, (3, 2, 16)),
    (Case(B=270, I=18, J=5), 4, (1, 3, 16)),
    (Case(B=260, I=4, J=5), 1, (1, 1, 16)),
]


@pytest.mark.parametrize(("case", "sm_count", "expected"), BY_WARPGROUPS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sweeps_by_warpgroups(
    emulator: Emulator,
    case: Case,
    sm_count: int,
    expected: tuple[int, int, int],
    dtype: torch.dtype,
) -> None:
    emulator.device = Device(sm_count, 227 * 1024, warpgroups=128)
    shape = Shape(case.B, case.I, case.J, case.K, case.D, case.R, 1)
    plan = emulator.plan(shape, dtype)
    assert plan.slots > 0
    assert plan[:3] == expected
    if dtype == torch.float32:
        check_tf32(case, return_coupling=False)
    else:
        check_case(case, dtype, "cuda", return_coupling=False)


@pytest.mark.parametrize(
    "case",
    [
        Case(B=127, J=10), Case(J=9), Case(J=10, D=15), Case(J=10, K=6), Case(J=10, R=1),
        Case(I=12, J=10, weight_sharing=4),
    ],
    ids=str,
)  # fmt: skip
def test_other_calls_are_not_swept_by_warpgroups(built: Emulator, case: Case) -> None:
    built.reset()
    case = case if case.B > 3 else replace(case, B=128)
    shape = Shape(case.B, case.I, case.J, case.K, case.D, case.R, case.weight_sharing)
    for warpgroups in (0, 128):
        built.device = Device(132, 227 * 1024, warpgroups)
        assert built.plan(shape, torch.bfloat16).slots == 0
    built.device = Device(132, 100 * 1024, warpgroups=128)
    assert built.plan(Shape(128, 12, 10, 8, 16, 3, 1), torch.bfloat16).slots == 0
    built.device = Device(132, 227 * 1024, warpgroups=128)
    assert built.plan(Shape(128, 12, 10, 8, 16, 3, 1), torch.bfloat16).slots > 0


def test_priors_and_couplings_are_not_swept_by_warpgroups(emulator: Emulator) -> None:
    """They give the same bits wherever warpgroups are."""
    case = Case(B=128, I=8, J=5, logits=True)
    for logits, return_coupling in ((True, False), (False, True)):
        inputs = make_inputs(replace(case, logits=logits), torch.bfloat16)
        found = []
        for warpgroups in (0, 128):
            emulator.device = Device(3, 227 * 1024, warpgroups)
            with torch.no_grad():
                options = {"return_coupling": return_coupling, "backend": "cuda"}
                found.append(fused_routing(inputs["u"], inputs["weight"], logits=inputs["logits"],
                                           **options))  # fmt: skip
        if return_coupling:
            torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
        else:
            assert torch.equal(*found)


@pytest.mark.parametrize(
    ("sm_count", "expected"),
    [(2, (2, 1, 4)), (5, (2, 2, 4)), (7, (3, 2, 4)), (40, (5, 7, 1))],
)
def test_layouts_over_devices_of_many_sizes(
    emulator: Emulator, sm_count: int, expected: tuple[int, int, int]
) -> None:
    case = Case(B=50, I=40, J=10, logits=True)
    emulator.device = Device(sm_count, 227 * 1024)
    plan = emulator.plan(Shape(case.B, case.I, case.J, case.K, case.D, case.R, 1), torch.float32)
    assert plan[:3] == expected
    check_case(case, torch.float32, "cuda")


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kernels", ["usual", "by output capsules", "by warpgroups"])
def test_any_schedule_gives_the_same_bits(emulator: Emulator, kernels: str, seed: int) -> None:
    case, dtype = Case(B=20, I=36, J=10, logits=True, bias=True, leaky=True, weight_sharing=9), None
    if kernels == "by output capsules":
        case, dtype = Case(B=60, I=36, J=6, bias=True, leaky=True), torch.bfloat16
        emulator.device = Device(1, 227 * 1024)
    elif kernels == "by warpgroups":
        case, dtype = Case(B=256, I=12, J=5, bias=True, leaky=True), torch.bfloat16
        emulator.device = Device(6 if seed % 2 else 1, 227 * 1024, warpgroups=128)
    inputs = make_inputs(case, dtype or torch.float32)
    options = {"return_coupling": kernels != "by warpgroups", "backend": "cuda"}
    first = run(fused_routing, case, inputs, **options)
    emulator.configure(seed=seed + 1)
    second = run(fused_routing, case, inputs, **options)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_a_hundred_schedules_give_the_same_bits(emulator: Emulator, figure) -> None:
    case = Case(B=9, I=6, J=3, K=4, D=4, logits=True, bias=True, leaky=True)
    emulator.device = Device(4, 227 * 1024)
    inputs = make_inputs(case, torch.float32)
    first = run(fused_routing, case, inputs, backend="cuda")
    for seed in range(REPEATS):
        emulator.configure(seed=seed + 1)
        assert_same_bits(run(fused_routing, case, inputs, backend="cuda"), first)
    compared = REPEATS * bits(first)
    figure("repeats of the emulated CUDA kernels", f"{REPEATS} schedules, {compared} bits equal")


# In these calls every barrier matters: several tiles, groups of samples and of capsules, also with
# more sums than blocks; sums that all warps share, one and several; more input capsules of a block
# than warps, with room for the states of one tile and of four; gradients by output capsules; sweeps
# by warpgroups, in one pass and in two.
BARRIER_CASES = [
    (Case(B=50, I=8, J=3, D=10, bias=True), torch.float32, Device(5, 227 * 1024)),
    (Case(B=5, I=20, J=7, K=3, D=8), torch.float32, Device(5, 227 * 1024)),
    (Case(B=20, I=40, J=3, D=8), torch.float32, Device(3, 40 * 1024)),
    (Case(B=50, I=12, J=7, K=17, D=8), torch.float32, Device(3, 40 * 1024)),
    (Case(B=20, I=20, J=3, D=10, logits=True), torch.float32, Device(2, 75 * 1024)),
    (Case(B=50, I=18, J=3, D=10, logits=True), torch.float32, Device(2, 227 * 1024)),
    (Case(B=64, I=40, J=4), torch.bfloat16, Device(1, 120 * 1024)),
    (Case(B=256, I=12, J=5), torch.bfloat16, Device(6, 227 * 1024, warpgroups=128)),
    (Case(B=260, I=4, J=5), torch.bfloat16, Device(1, 227 * 1024, warpgroups=128)),
    (Case(B=130, I=22, J=5), torch.bfloat16, Device(1, 227 * 1024, warpgroups=128)),
]
BARRIER = r"\b(__syncthreads|__syncwarp|publish|counted_barrier|grid_arrive|grid_wait|wait)\("


def test_a_missing_barrier_is_found(emulator: Emulator) -> None:
    """Each barrier of the kernels is reached, and left out in turn: then there is a data race."""
    inputs = [make_inputs(case, dtype) for case, dtype, _ in BARRIER_CASES]

    def call(n: int) -> None:
        case, _, emulator.device = BARRIER_CASES[n]
        run(fused_routing, case, inputs[n], not emulator.device.warpgroups, backend="cuda")

    def fails(n: int) -> bool:
        try:
            call(n)
        except RuntimeError as error:
            return bool(re.match("a data race|deadlock", str(error)))
        return False

    reached_by = defaultdict(list)
    for n in range(len(BARRIER_CASES)):
        emulator.configure()
        call(n)
        for barrier in emulator.barriers():
            reached_by[barrier].append(n)
    written = {
        f"{path.name}:{number}"
        for path in KERNELS.glob("*.cuh")
        if path.name != "execution.cuh"  # which says what they are
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if re.search(BARRIER, line)
    }
    assert {barrier.rpartition(":")[0] for barrier in reached_by} == written

    def is_noticed(barrier: str) -> bool:
        emulator.configure(skip=barrier)
        return any(fails(n) for n in reached_by[barrier])

    assert [barrier for barrier in reached_by if not is_noticed(barrier)] == []


@pytest.mark.parametrize(
    ("wanted", "dtype"),
    [
        *itertools.product(
            [("u",), ("weight",), ("bias",), ("u", "bias")], [torch.float32, torch.bfloat16]
        ),
        (("logits",), torch.float32),
    ],
)
def test_only_the_gradients_that_are_wanted(
    emulator: Emulator, wanted: tuple[str, ...], dtype: torch.dtype
) -> None:
    case = Case(B=20, logits=True, bias=True)
    if dtype == torch.bfloat16:  # gradients by output capsules, which take no logits
        case = Case(B=60, I=36, J=6, bias=True)
        emulator.device = Device(1, 227 * 1024)
    inputs = make_inputs(case, dtype)
    everything = run(fused_routing, case, inputs, backend="cuda")
    given = {name: x for name, x in inputs.items() if x is not None}
    some = inputs | {name: x.detach().requires_grad_(name in wanted) for name, x in given.items()}
    found = run(fused_routing, case, some, backend="cuda")
    assert {name for name in found if name.startswith("grad_")} == {f"grad_{n}" for n in wanted}
    for name in found:
        assert torch.equal(found[name], everything[name]), name


def test_a_silent_capsule_stays_silent(emulator: Emulator) -> None:
    """squash(0) = 0 with a gradient of exactly 0."""
    case = Case()
    inputs = make_inputs(case, torch.float32)
    with torch.no_grad():
        inputs["u"][1] = 0
    found = run(fused_routing, case, inputs, backend="cuda")
    assert (found["v"][1] == 0).all()
    assert (found["grad_u"][1] == 0).all()
    check = run(reference_routing, case, copies(inputs, torch.float32))
    torch.testing.assert_close(found["grad_u"], check["grad_u"])


@pytest.mark.parametrize("R", [1, 3])
@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-19, 1e-18, 1e18])
def test_no_square_of_a_length_leaves_the_range(emulator: Emulator, scale: float, R: int) -> None:
    check_case(Case(R=R, scale=scale), torch.float32, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("emulator")
def test_values_at_the_end_of_the_range(dtype: torch.dtype) -> None:
    for inputs in inputs_at_the_end_of_the_range(Case(logits=True, leaky=True), dtype, "cpu"):
        assert_finite_where_the_oracle_is("cuda", Case(logits=True, leaky=True), inputs)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_not_finite_stays_in_its_sample(
    emulator: Emulator, dtype: torch.dtype, value: float
) -> None:
    case = Case(B=20)
    if dtype == torch.bfloat16:  # gradients by output capsules
        case = Case(B=60, I=36, J=6)
        emulator.device = Device(1, 227 * 1024)
    elif dtype == torch.float16:  # sweeps by warpgroups
        case = Case(B=256, I=14, J=5)
        emulator.device = Device(2, 227 * 1024, warpgroups=128)
    inputs = make_inputs(case, dtype)
    options = {"return_coupling": dtype != torch.float16, "backend": "cuda"}
    clean = run(fused_routing, case, inputs, **options)
    with torch.no_grad():
        inputs["u"][2, 3, 1] = value
    found = run(fused_routing, case, inputs, **options)
    oracle = run(reference_routing, case, copies(inputs, dtype))
    for name in found:
        assert torch.equal(found[name].isfinite(), oracle[name].isfinite()), name
    others = torch.arange(case.B) != 2
    for name in found.keys() & {"v", "coupling", "grad_u"}:
        assert torch.equal(found[name][others], clean[name][others]), name


def test_a_prior_of_minus_infinity_closes_a_path(emulator: Emulator) -> None:
    case = Case(logits=True)
    inputs = make_inputs(case, torch.float32)
    with torch.no_grad():
        inputs["logits"][:, 2] = -math.inf
    found = run(fused_routing, case, inputs, backend="cuda")
    oracle = run(reference_routing, case, copies(inputs, torch.float32))
    assert (found["coupling"][:, :, 2] == 0).all()
    for name in found:
        torch.testing.assert_close(found[name], oracle[name], msg=name)


@pytest.mark.parametrize("figures", [H200, A100], ids=["sm_90", "sm_80"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_python_and_the_plan_agree_on_what_fits(
    built: Emulator, figures: cuda.Figures, dtype: torch.dtype
) -> None:
    built.device = Device(figures.sm_count, figures.shared_per_block)
    answers = set()
    for I in (1, 7, 132, 133, 1152, 2048, 4608, 6000, 9216, 20000, 20_000_000):
        for J, D in ((1, 1), (1, 32), (5, 16), (10, 16), (10, 8), (20, 8), (5, 32)):
            for K, sharing in itertools.product((1, 8, 17, 64, 200), (1, 4, I)):
                plan = built.plan(Shape(64, I, J, K, D, 3, sharing), dtype)
                fits = plan.capsule_groups > 0 and plan.gradient_capsules > 0
                reason = cuda.does_not_fit(figures, dtype, (I, J, K, D, 3, sharing))
                assert (reason is None) == fits, (I, J, K, D, sharing, reason, plan)
                answers.add(fits)
    assert answers == {True, False}
    for J in range(1, 30):
        for D in range(1, 40):
            registers = bool(built.library.fits_registers(J, D))
            reason = cuda.does_not_fit(H200, dtype, (1, J, 8, D, 3, 1))
            assert (reason is None) == registers, (J, D, reason)


@pytest.mark.parametrize(
    ("J", "D", "most"), [(10, 16, 53_687_088), (5, 16, 2 * 53_687_088), (1, 1, 2**27 - 1)]
)
def test_no_plan_for_a_batch_whose_states_an_int_does_not_count(
    built: Emulator, J: int, D: int, most: int
) -> None:
    """In float4s of padded output capsules. The binding takes no more than 2^27 samples at all."""
    built.device = Device(132, 227 * 1024)
    assert built.plan(Shape(most, 4, J, 8, D, 3, 1), torch.float32).capsule_groups > 0
    if most < 2**27 - 1:
        assert built.plan(Shape(most + 1, 4, J, 8, D, 3, 1), torch.float32).capsule_groups == 0


@pytest.mark.parametrize(
    ("figures", "dtype", "shape", "message"),
    [
        (H200, torch.float32, (1152, 10, 8, 16, 3, 1), None),
        (H200, torch.float32, (4608, 10, 8, 16, 3, 1), None),
        (H200, torch.float32, (9216, 10, 8, 16, 3, 1), "weight does not fit in shared memory"),
        (H200, torch.float32, (9216, 10, 8, 16, 3, 8), None),
        (H200, torch.bfloat16, (9216, 10, 8, 16, 3, 1), None),
        (H200, torch.float32, (1152, 10, 8, 16, 30, 1), "states of 30 iterations"),
        (A100, torch.float32, (4608, 10, 8, 16, 3, 1), "weight does not fit in shared memory"),
        (H200, torch.float32, (3872, 196, 8, 16, 3, 1), "do not fit in registers"),
        (H200, torch.float32, (10, 2, 8, 64, 3, 1), "do not fit in registers"),
        # Capsules that share one weight: as many as 32 bits count the elements of.
        (H200, torch.bfloat16, (2_200_000, 4, 1024, 8, 3, 2_200_000), "I * K = 2200000 * 1024"),
        (H200, torch.bfloat16, (2**21, 4, 1024, 8, 3, 2**21), "2147483648 elements, which"),
        (H200, torch.bfloat16, (2**21 - 1, 4, 1024, 8, 3, 2**21 - 1), None),
        (H200, torch.float64, (1152, 10, 8, 16, 3, 1), "got torch.float64"),
        (cuda.Figures((7, 5), 40, 64 * 1024), torch.float16, (1, 1, 1, 1, 1, 1), "has 7.5"),
    ],
)
def test_the_reason_against_a_call(figures, dtype, shape, message: str | None) -> None:
    reason = cuda.does_not_fit(figures, dtype, shape)
    assert reason is None if message is None else message in reason


def test_tensors_elsewhere_are_refused() -> None:
    reason = cuda.unsupported(torch.device("cpu"), torch.float32, (1, 1, 1, 1, 1, 1))
    assert reason == "it takes CUDA tensors, got tensors on cpu"


def test_kernels_know_nothing_of_torch() -> None:
    named = [
        path.name
        for path in KERNELS.iterdir()
        if "torch/" in path.read_text() or "ATen/" in path.read_text()
    ]
    assert named == ["bindings.cpp"]

"""The Triton kernels, interpreted on CPU tensors, against the oracle.

test_triton_interpreted.py runs this file in a process of its own, with TRITON_INTERPRET=1.

What this proves: the kernels' arithmetic, indices, masks and order of launches. What it does not:
the compiler, races, and the rounding of matrix units, which the interpreter computes exactly;
that is put back where it matters (``matrix_unit``). bfloat16 and float16 take the path they take
on a GPU: their values are widened first and multiplied as TF32 values, which they are.
"""

from dataclasses import replace

import pytest
import torch

from capsule_kernels import backends, fused_routing, reference_routing
from capsule_kernels.backends import triton as backend

from . import conv_cases
from .cases import Case, check_case, copies, make_inputs, run
from .conv_cases import Conv
from .test_determinism import assert_same_bits, bits

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(
        not (backend.INSTALLED and backend.INTERPRETED),
        reason="test_triton_interpreted.py runs these in a process with TRITON_INTERPRET=1",
    ),
]

EVERYTHING = Case(B=17, I=4, J=10, R=2, logits=True, bias=True, leaky=True, weight_sharing=2)

CASES = [
    Case(B=1, I=2, J=10), Case(B=127, I=1, J=2, D=4, R=2), Case(I=1), Case(I=19, B=1, J=2, R=2),
    Case(I=2, J=1), Case(I=2, J=33, D=8, R=2), Case(I=2, K=3), Case(I=2, K=6, D=8),
    Case(I=2, D=1), Case(I=2, D=7), Case(I=2, D=10), Case(I=1, D=24), Case(I=2, D=32, R=2),
    Case(B=1, I=1, D=64), Case(B=1, I=1, D=128), Case(I=3, R=1), Case(I=5, R=2), Case(I=1, R=10),
    Case(I=2, logits=True), Case(I=2, bias=True), Case(I=2, leaky=True),
    Case(I=4, B=2, weight_sharing=2), Case(I=3, routing_gradient="last"),
    Case(I=3, R=1, logits=True), Case(R=1, I=3, routing_gradient="last"), EVERYTHING,
    replace(EVERYTHING, weight_sharing=4, routing_gradient="last"),
    # J in several tiles: the softmax statistics come from a sweep of their own.
    Case(B=2, I=2, J=20, R=2, logits=True, leaky=True, bias=True),
    Case(B=1, I=2, J=20, routing_gradient="last"), Case(B=1, I=2, J=20, R=1, logits=True),
    # W_ij in several blocks.
    Case(B=2, I=2, J=3, K=72, D=64, R=2), Case(B=1, I=2, J=2, K=130, D=33),
    Case(B=1, I=1, J=2, K=5, D=300),
    Case(B=17, I=2, J=3, K=72, D=64, R=2, logits=True, bias=True, leaky=True, weight_sharing=2),
    Case(B=1, I=2, J=3, K=300, D=2, R=2, routing_gradient="last", logits=True),
    Case(B=1, I=2, J=3, K=72, D=64, routing_gradient="last"), Case(B=1, I=1, J=3, K=72, D=64, R=1),
]  # fmt: skip
"""The awkward sizes of SPEC section 4 and every option, as small as shows them."""


CONVOLUTIONS = [
    Conv(B=1, C=2, K=3, H=3, W=3, J=2, D=4, window=(2, 2)),
    Conv(B=3, C=3, K=3, H=4, W=3, J=2, D=4, window=(3, 2), stride=(2, 1), padding=(1, 0)),
    Conv(B=1, C=3, K=3, H=4, W=5, J=3, D=4, window=(3, 3), padding=(0, 1), routing_gradient="last"),
    # Steps as large as the window, and larger, so that a cell is in one window or in none.
    Conv(B=1, C=2, K=3, H=4, W=4, J=2, D=4, window=(2, 2), stride=(2, 2)),
    Conv(B=2, C=5, K=3, H=5, W=4, J=2, D=4, window=(1, 2), stride=(3, 3)),
    # J in several tiles, and W_ij in several blocks.
    Conv(B=1, C=2, K=3, H=2, W=3, J=20, D=16, window=(2, 2)),
    Conv(B=1, C=1, K=72, H=2, W=3, J=2, D=64, window=(1, 2)),
]
"""Convolutional capsules: windows that overlap in one direction, in both, and in none."""


@pytest.fixture(autouse=True)
def poisoned_workspaces():
    """Every tensor that the backend leaves empty starts as NaN: what is not written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def matrix_unit(monkeypatch):
    """tl.dot as the hardware multiplies TF32: it drops the last 13 bits of every operand."""
    from triton.runtime.interpreter import InterpreterBuilder

    exact = InterpreterBuilder.create_dot

    def truncated(self, a, b, c, input_precision, *rest):
        if "TF32" in str(input_precision):
            for x in (a, b):
                x.data = (x.data.view("int32") & -0x2000).view("float32")
        return exact(self, a, b, c, input_precision, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", truncated)


def test_backend_is_usable():
    assert backends()["triton"].usable


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_oracle(case):
    check_case(case, torch.float32, "triton")


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_convolutional_capsules_match_oracle(case):
    conv_cases.check(case, torch.float32, "triton")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS[::5], ids=str)
def test_convolutional_capsules_in_other_dtypes(case, dtype, matrix_unit):
    conv_cases.check(case, dtype, "triton")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(B=2, I=2, logits=True, bias=True, weight_sharing=2),
        Case(B=1, I=1, J=20, R=2),
        Case(B=1, I=1, J=2, K=72, D=64, R=2, bias=True),
    ],
    ids=str,
)
def test_matches_oracle_in_other_dtypes(case, dtype, matrix_unit):
    check_case(case, dtype, "triton")


@pytest.mark.parametrize(
    "case",
    [Case(B=17, I=3, J=10), Case(B=2, I=2, J=20, R=2), Case(B=2, I=2, J=2, K=72, D=64, R=2)],
    ids=str,
)
def test_highest_precision_is_float32_on_tf32_hardware(case, matrix_unit):
    check_case(case, torch.float32, "triton")
    torch.set_float32_matmul_precision("high")  # and TF32 is not: the emulation does round
    try:
        with pytest.raises(AssertionError, match="error"):
            check_case(case, torch.float32, "triton")
    finally:
        torch.set_float32_matmul_precision("highest")


def test_two_iterations_at_once_in_the_last_sweep(monkeypatch):
    """What TF32 takes where R = 3; the interpreter multiplies exactly, so the tolerance holds."""
    from capsule_kernels.backends.triton import launch, launch_sweeps

    monkeypatch.setattr(launch_sweeps, "UNROLLS", True)
    unrolled = []

    def spy(kernel, *rest, **arguments):
        unrolled.append(arguments.get("UNROLL_T"))
        launch.run(kernel, *rest, **arguments)

    case = Case(B=9, I=5, J=10)
    torch.set_float32_matmul_precision("high")
    try:
        check_case(case, torch.float32, "triton")
        inputs = make_inputs(case, torch.float32)
        u, weight = inputs["u"].detach(), inputs["weight"].detach()
        v, s, _ = launch.routing_forward(u, weight, None, None, 3, False, 1, False)
        mask = [True, True, False, False]
        launch.routing_backward(v, u, weight, None, s, False, 1, True, mask, launch=spy)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert 2 in unrolled


def test_tiles_of_a_large_batch(monkeypatch):
    """In TF32; the interpreter multiplies exactly, so the tolerance holds.

    One sample is left over from the tiles of 64 and of 32, and of J and of I there are rests, too.
    """
    from capsule_kernels.backends.triton import config, launch, routing

    for name in ("LARGE_BATCH", "LARGE_UNIFORM_BATCH", "LARGE_SHARED"):
        monkeypatch.setattr(config, name, 0)
    warps = []

    def spy(kernel, grid, num_warps, *rest, **arguments):
        warps.append((num_warps, arguments.get("BLOCK_B")))
        routing.run(kernel, grid, num_warps, *rest, **arguments)

    torch.set_float32_matmul_precision("high")
    try:
        check_case(Case(B=65, I=9, J=10, D=6, R=2), torch.float32, "triton")
        u, weight = torch.randn(65, 9, 8), torch.randn(9, 10, 6, 8)
        launch.routing_forward(u, weight, None, None, 2, False, 1, False, launch=spy)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert warps[:2] == [(8, 64), (8, 32)]


def test_shorter_steps_where_shared_memory_is_small(monkeypatch):
    """As with compute capability 8.6 and 8.9."""
    from capsule_kernels.backends.triton import config, routing

    steps = []

    def spy(*arguments):
        warps, stages = fitting(*arguments)
        steps.append((warps.STEP_I, stages))
        return warps, stages

    fitting = config.fitting
    monkeypatch.setattr(config, "fitting", spy)
    monkeypatch.setattr(routing, "gpu_of", lambda device: config.Gpu(4, False, 99 << 10))
    check_case(Case(B=17, I=5, J=10, R=2, logits=True), torch.float32, "triton")
    assert (2, 2) in steps


def test_64_bit_offsets_give_the_same_bits(monkeypatch):
    from capsule_kernels.backends.triton import config

    parts = Case(B=2, I=5, J=2, D=2, R=2, weight_sharing=5, logits=True)  # of one row of dW
    cases = [Case(B=2, I=2, R=2, logits=True), Case(B=1, I=1, J=20, R=2), parts]
    calls = [
        lambda case=case: run(
            fused_routing, case, make_inputs(case, torch.float32), backend="triton"
        )
        for case in (*cases, Case(B=1, I=1, J=2, K=72, D=64, R=2))
    ]
    calls += [
        lambda case=case: conv_cases.run(
            case, conv_cases.make_inputs(case, torch.float32), "triton"
        )
        for case in (CONVOLUTIONS[0], CONVOLUTIONS[-1])
    ]
    for call in calls:
        with_32_bits = call()
        monkeypatch.setattr(config, "needs_int64", lambda *counts: True)
        with_64_bits = call()
        monkeypatch.undo()
        for name in with_32_bits:
            assert torch.equal(with_32_bits[name], with_64_bits[name]), name


def test_tiles_along_the_first_axis_of_a_grid_give_the_same_bits(monkeypatch):
    """As where they are more than 65535: batch tiles, tiles of J, and groups with statistics."""
    from capsule_kernels.backends.triton import config

    case = Case(B=17, I=9, J=20, K=16, R=1, logits=True)
    apart = run(fused_routing, case, make_inputs(case, torch.float32), backend="triton")
    flat = []
    grid = config.grid

    def spy(*counts):
        programs, is_flat = grid(*counts)
        flat.append(is_flat)
        return programs, is_flat

    monkeypatch.setattr(config, "MOST_ALONG_AXIS", 1)
    monkeypatch.setattr(config, "grid", spy)
    together = run(fused_routing, case, make_inputs(case, torch.float32), backend="triton")
    assert all(flat)
    for name in apart:
        assert torch.equal(apart[name], together[name]), name


# One row of weights, in parts of its capsules and pieces of the batch.
ONE_ROW = Case(B=17, I=6, J=3, D=4, R=2, weight_sharing=6, logits=True)
TWO_ROWS = Case(B=17, I=5, J=2, K=2, D=2, R=2, logits=True)


@pytest.fixture(params=[ONE_ROW, TWO_ROWS], ids=str)
def shared_by_programs(request, monkeypatch):
    """A call that many programs contribute to a gradient of."""
    from capsule_kernels.backends.triton import config

    split = split_of(ONE_ROW)
    if request.param is TWO_ROWS:
        # Of the rows only the last, a short one, is cut. By itself a call of nine rows and 56
        # samples is cut so, which takes five times as long.
        split = config.Split(
            whole=1, cut=1, parts=1, capsules=4, pieces=3, batch_tiles=1, counts=True
        )
        monkeypatch.setattr(config, "split", lambda *sizes, counts: split)
    assert split.counted
    assert split.pieces > 1
    assert (split.whole > 0) == (request.param is TWO_ROWS)
    return request.param


def split_of(case):
    from capsule_kernels.backends.triton import config

    step = config.warps_of_gradients(case.J, case.K, case.D).STEP_I
    rows = case.I // case.weight_sharing
    return config.split(rows, case.weight_sharing, step, -(-case.B // 8), 4, counts=True)


def test_rows_shared_by_programs(shared_by_programs):
    check_case(shared_by_programs, torch.float32, "triton")


def test_parts_of_few_rows_are_added_by_a_launch_where_programs_can_not_count(monkeypatch):
    """As on AMD, and where more programs share a row than one should add."""
    from capsule_kernels.backends.triton import config

    monkeypatch.setattr(config, "MOST_COUNTED", 1)
    assert not split_of(ONE_ROW).counted
    check_case(ONE_ROW, torch.float32, "triton")


def test_the_order_in_which_programs_finish_changes_no_bit(shared_by_programs, monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    set_index = InterpreterBuilder.set_grid_idx

    def backwards(self, x, y, z):
        set_index(self, self.grid_dim[0] - 1 - x, y, z)

    inputs = make_inputs(shared_by_programs, torch.float32)
    forwards = run(fused_routing, shared_by_programs, inputs, backend="triton")
    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", backwards)
    reversed_ = run(fused_routing, shared_by_programs, inputs, backend="triton")
    for name in forwards:
        assert torch.equal(forwards[name], reversed_[name]), name


def test_tuning_counts_anew_in_every_trial(monkeypatch):
    """Else only the first trial would add the parts of a gradient, not the call itself."""
    from functools import partial

    import triton

    from capsule_kernels.backends.triton import launch, routing

    case = Case(B=9, I=8, J=2, K=2, D=2, R=2, weight_sharing=8)
    assert split_of(case).counted
    gradients = []

    def spy(kernel, *rest, **arguments):
        gradients[:] = [x for name, x in arguments.items() if name == "grad_weight_ptr"]
        routing.run(kernel, *rest, **arguments)

    def bench(trial, quantiles):
        trial()
        for gradient in gradients:
            gradient.fill_(float("nan"))
        return [1.0] * len(quantiles)

    inputs = make_inputs(case, torch.float32)
    u, weight = inputs["u"].detach(), inputs["weight"].detach()
    v, s, _ = launch.routing_forward(u, weight, None, None, 2, False, 8, False)

    def grad_weight():
        mask = [False, True, False, False]
        _, gradient, *_ = launch.routing_backward(
            v, u, weight, None, s, False, 8, True, mask, launch=spy
        )
        return gradient

    plain = grad_weight()
    monkeypatch.setattr(triton, "autotune", partial(triton.autotune, do_bench=bench))
    monkeypatch.setenv("CAPSULE_KERNELS_AUTOTUNE", "1")
    routing.tuned.cache_clear()
    try:
        assert torch.equal(grad_weight(), plain)
    finally:
        routing.tuned.cache_clear()


def test_only_wanted_gradients_are_computed():
    case = Case(B=2, I=1, R=2, logits=True, bias=True)
    every = run(fused_routing, case, make_inputs(case, torch.float32), backend="triton")
    for wanted in ("u", "weight", "logits", "bias"):
        inputs = make_inputs(case, torch.float32)
        for name, x in inputs.items():
            x.requires_grad_(name == wanted)
        some = run(fused_routing, case, inputs, backend="triton")
        assert [name for name in some if name.startswith("grad")] == [f"grad_{wanted}"]
        assert torch.equal(some[f"grad_{wanted}"], every[f"grad_{wanted}"])


def test_any_strides():
    case = Case(B=2, I=2, R=2, logits=True, bias=True)
    inputs = make_inputs(case, torch.float32)
    leaves = list(inputs.values())
    strided = [torch.stack([x, x], -1)[..., 0] for x in leaves]
    assert not any(x.is_contiguous() for x in strided)

    def call(function, u, weight, logits, bias, **options):
        v = function(u, weight, case.R, logits=logits, bias=bias, **options)
        return v, torch.autograd.grad(v.sum(), leaves)  # a gradient of stride 0

    v, gradients = call(fused_routing, *strided, backend="triton")
    v_dense, gradients_dense = call(fused_routing, *leaves, backend="triton")
    assert torch.equal(v, v_dense)
    for g, g_dense in zip(gradients, gradients_dense, strict=True):
        assert torch.equal(g, g_dense)


def test_empty_batch():
    u = torch.zeros(0, 3, 4, requires_grad=True)
    weight = torch.randn(3, 5, 6, 4, requires_grad=True)
    v = fused_routing(u, weight, backend="triton")
    v.sum().backward()
    assert v.shape == (0, 5, 6)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_zero_input_gives_zero_and_exactly_zero_gradients():
    u = torch.zeros(2, 3, 8, requires_grad=True)
    weight = torch.randn(3, 5, 16, 8, requires_grad=True)
    v = fused_routing(u, weight, backend="triton")
    grads = torch.autograd.grad(v.sum(), (u, weight))
    for x in (v, *grads):
        assert torch.equal(x, torch.zeros_like(x))


# 1e-20: squares below float32's range; 1e-42: lengths that are denormal, with an infinite inverse.
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-20, 1e15])
def test_lengths_whose_squares_leave_float32(scale):
    case = Case(B=1, I=2, J=3, R=2, scale=scale)
    found = run(fused_routing, case, make_inputs(case, torch.float32), backend="triton")
    exact = run(reference_routing, case, copies(make_inputs(case, torch.float32), torch.float64))
    torch.testing.assert_close(found["v"].double(), exact["v"], rtol=1e-4, atol=1e-30)
    assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_stay_in_their_sample(value):
    case = Case(B=3, I=3, J=5, R=2)
    inputs = make_inputs(case, torch.float32)
    inputs["u"].data[1, 2, 0] = value
    found = run(fused_routing, case, inputs, backend="triton")
    expected = run(reference_routing, case, copies(inputs, torch.float32))
    for name in expected:
        assert torch.equal(found[name].isnan(), expected[name].isnan()), name


REPEATS = 5  # all that could differ is what was left in memory


def test_same_bits_every_time(figure):
    case = Case(B=2, I=3, J=2, K=2, D=4, R=2, logits=True)
    inputs = make_inputs(case, torch.float32)
    first = run(fused_routing, case, inputs, backend="triton")
    for _ in range(REPEATS):
        assert_same_bits(run(fused_routing, case, inputs, backend="triton"), first)
    compared = REPEATS * bits(first)
    figure("repeats of the interpreted Triton kernels", f"{REPEATS} calls, {compared} bits equal")


def test_gradcheck_and_opcheck():
    case = Case(B=1, I=2, J=3, K=2, D=2, R=2, logits=True, bias=True)
    inputs = list(make_inputs(case, torch.float64).values())

    def function(u, weight, logits, bias):
        return fused_routing(u, weight, 2, logits=logits, bias=bias, leaky=True, backend="triton")

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    operator = torch.ops.capsule_kernels.routing_forward.triton
    torch.library.opcheck(operator, (*(x.detach() for x in inputs), 2, True, 1, True))


@pytest.mark.parametrize("J", [5, 2**17 + 1])
def test_a_step_of_more_than_2_to_31_weights_is_counted_with_64_bits(J):
    import triton.language as tl

    from .offset_kernels import last_offsets_kernel

    last = torch.zeros(2, dtype=torch.int64)
    last_offsets_kernel[(1,)](last, J=J, K=64, D=64, STEP_I=4, OFFSET=tl.int64)
    assert last.tolist() == [4 * J * 64 * 64 - 1] * 2


def test_a_sample_of_more_than_2_to_31_elements_is_counted_with_64_bits():
    import triton.language as tl

    from .offset_kernels import last_input_kernel

    B, I, K = 3, 2**27 + 1, 64
    last = torch.zeros(1, dtype=torch.int64)
    last_input_kernel[(1,)](last, B=B, I=I, K=K, OFFSET=tl.int64)
    assert last.item() == (B * I - 1) * K


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_tiles_that_shared_memory_cuts_match(dtype, monkeypatch):
    """J = 10 in tiles in the backward's sweeps, and in float64 the forward's, but whole in the last
    sweep, as on a GPU with 99 KiB."""
    from capsule_kernels.backends.triton import config, routing

    small = config.Gpu(processors=4, hip=False, shared_bytes=99 << 10)
    monkeypatch.setattr(routing, "gpu_of", lambda device: small)
    tabulated = []
    tabulate = routing.Routing.tabulate
    monkeypatch.setattr(
        routing.Routing,
        "tabulate",
        lambda self, *rest: tabulated.append(self.backward) or tabulate(self, *rest),
    )
    check_case(Case(B=1, I=2, J=10, K=32, R=2, logits=True, leaky=True), dtype, "triton")
    assert tabulated.count(True) == 1
    assert (False in tabulated) == (dtype == torch.float64)

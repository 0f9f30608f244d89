"""The Triton backend without running a kernel: configurations, launches, refusals, imports.

The kernels themselves are interpreted in a process of their own (test_triton_interpreter.py),
because Triton reads TRITON_INTERPRET once, when it is first imported.
"""

import subprocess
import sys
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from capsule_kernels import dispatch, fused_routing
from capsule_kernels.backends import triton as backend
from capsule_kernels.backends.triton import config
from capsule_kernels.dispatch import RoutingShape

from . import interpreted

ROOT = Path(__file__).parent.parent
needs_triton = pytest.mark.skipif(not backend.INSTALLED, reason="Triton is not installed")
MNIST = (1152, 10, 8, 16)
SIZES = [
    MNIST, (3200, 10, 8, 16), (2048, 5, 8, 16), (9216, 10, 8, 16), (1024, 10, 6, 8),
    (3872, 196, 8, 16), (1, 1, 1, 1), (7, 33, 3, 7), (1153, 2, 8, 64), (64, 1000, 8, 24),
]  # fmt: skip
"""(I, J, K, D): the shapes of published networks, and awkward ones."""


PRECISIONS = [(8, "ieee"), (4, "tf32x3"), (4, "tf32"), (2, "tf32")]
"""Bytes of an element, and how it is multiplied."""

INTERPRETED = "test_triton_interpreter.py test_window_memory.py"
REACH_NEARLY_ALL = (
    "convolutional_capsules_match or wanted or strides or two_iterations or shorter or few_rows or "
    "gradcheck or zero_input or empty or usable or J33"
)
"""The tests whose lines are counted: the others would take minutes more for a few."""


@interpreted.marked
@pytest.mark.parametrize("covered", [True, False], ids=["covered", "others"])
def test_kernels_in_the_interpreter(covered, figure):
    chosen = REACH_NEARLY_ALL if covered else f"not ({REACH_NEARLY_ALL})"
    interpreted.check_in_the_interpreter(INTERPRETED, chosen, figure, covered=covered)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("B", [1, 3, 128, 1000])
@pytest.mark.parametrize("processors", [1, 4, 132, 304])
@pytest.mark.parametrize("columns", [None, 32, 48, 80])
def test_sweeps_cover_every_sample_and_capsule_once(B, sizes, processors, columns):
    I, J, K, D = sizes
    warps = config.warps_of(J, K, D, columns) if columns else config.warps_of_uniform(J, K, D)
    sweep = config.sweep(B, I, J, K, warps, processors)
    assert (sweep.tiles_B - 1) * warps.BLOCK_B < B <= sweep.tiles_B * warps.BLOCK_B
    assert (sweep.tiles_J - 1) * warps.output_capsules < J <= sweep.tiles_J * warps.output_capsules
    assert (sweep.groups - 1) * sweep.capsules < I <= sweep.groups * sweep.capsules
    assert sweep.capsules % warps.capsules == 0


@pytest.mark.parametrize("columns", [32, 48, 80])
@pytest.mark.parametrize("J", [1, 2, 5, 10, 16, 33, 196])
@pytest.mark.parametrize("K", [1, 3, 6, 8, 16, 64, 256])
@pytest.mark.parametrize("D", [1, 7, 16, 24, 64, 256])
def test_warps_hold_what_fits(J, K, D, columns):
    if config.tile_of(J, K, D) is None:
        return
    warps = config.warps_of(J, K, D, columns)
    assert max(D, config.MATRIX_ROWS) <= warps.BLOCK_D
    assert warps.BLOCK_K >= K
    assert warps.STEP_I * warps.BLOCK_K >= config.MATRIX_ROWS  # a contraction of tl.dot
    for size in (warps.WARPS_I, warps.WARPS_J, warps.STEP_I, warps.BLOCK_D, warps.BLOCK_K):
        assert size == config.power_of_two(size)
    assert 1 <= warps.number <= 8
    assert max(columns, warps.BLOCK_D) >= warps.UNROLL_J * warps.BLOCK_D
    step = warps.number * warps.UNROLL_J * warps.BLOCK_D * warps.STEP_I * warps.BLOCK_K
    assert step <= config.MAX_STEP
    if J <= 10 and D <= 16 and K <= 8:
        assert warps.output_capsules >= J  # the published networks need no statistics


@pytest.mark.parametrize("shared_bytes", [64 << 10, 99 << 10, 163 << 10, 227 << 10])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sweeps_fit_into_shared_memory(sizes, shared_bytes):
    """99 KiB are what a block may have with compute capability 8.6 and 8.9."""
    _, J, K, D = sizes
    for backward, precision in ((False, "tf32"), (True, "tf32"), (False, "tf32x3")):
        states = config.states_of(backward, precision)
        columns = config.state_columns(backward, precision)
        wanted = config.warps_of(J, K, D, columns)
        warps, stages = config.fitting(wanted, 4, states, shared_bytes)
        assert config.fitting(warps, 4, states, shared_bytes) == (warps, stages)
        assert warps.STEP_I * warps.BLOCK_K >= config.MATRIX_ROWS
        assert config.sweep_bytes(warps, stages, 4, states) <= shared_bytes
        if shared_bytes > 64 << 10 and D <= 16:  # steps may be shorter, no more
            assert replace(warps, STEP_I=wanted.STEP_I) == wanted
        if shared_bytes == 227 << 10:
            assert (warps, stages) == (wanted, 3)


@pytest.mark.parametrize(("element_bytes", "precision"), PRECISIONS)
@pytest.mark.parametrize("shared_bytes", [64 << 10, 99 << 10, 227 << 10])
def test_no_shape_is_cut_to_nothing(shared_bytes, element_bytes, precision):
    """Where one step of all output capsules does not fit, they are cut into tiles; only float64
    has shapes of which nothing fits into 99 KiB, and in 64 KiB the largest D in split float32."""
    refused = set()
    for J, K, D in product((1, 2, 5, 10, 33, 196), (1, 8, 16, 32, 64, 128, 256), (1, 16, 64, 256)):
        if config.is_wide(J, K, D):
            continue
        fits = config.least_bytes(J, K, D, element_bytes, precision) <= shared_bytes
        for backward in (False, True):
            states = config.states_of(backward, precision)
            wanted = config.warps_of(J, K, D, config.state_columns(backward, precision))
            fitting = config.fitting(wanted, element_bytes, states, shared_bytes)
            assert not fits or fitting is not None
            if fitting is not None:
                warps, stages = fitting
                assert min(vars(warps).values()) >= 1
                assert warps.STEP_I * warps.BLOCK_K >= config.MATRIX_ROWS
                assert {warps.number, warps.STEP_I} <= {1, 2, 4, 8}
                assert config.sweep_bytes(warps, stages, element_bytes, states) <= shared_bytes
        last = config.warps_of_gradients(J, K, D)
        last = config.fitting_gradients(last, element_bytes, precision, shared_bytes)
        assert not fits or config.gradient_bytes(last, element_bytes, precision) <= shared_bytes
        if not fits:
            refused.add((K, D))
    if shared_bytes == 227 << 10 or (element_bytes < 8 and shared_bytes == 99 << 10):
        assert not refused
    if (precision, shared_bytes) == ("tf32x3", 64 << 10):
        assert {D for _, D in refused} == {256}
    if element_bytes == 8:
        assert not refused & {(8, 16), (16, 16), (32, 16)}


def test_split_float32_of_mnist_takes_shorter_steps_where_shared_memory_is_small():
    _, J, K, D = MNIST
    wanted = config.warps_of(J, K, D, config.state_columns(True, "tf32x3"))
    warps, stages = config.fitting(wanted, 4, 4, 99 << 10)
    assert (wanted.STEP_I, warps.STEP_I, stages) == (4, 2, 2)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("uniform", "rows"), [(True, 64), (False, 32)])
def test_large_batches_share_weights_in_eight_warps_that_see_all_of_J(sizes, uniform, rows):
    _, J, K, D = sizes
    assert config.warps_of_large(255, J, K, D, uniform) is None
    warps = config.warps_of_large(512, J, K, D, uniform)
    assert (warps is not None) == (J <= 10 and D <= 16)
    if warps is not None:
        assert (warps.number, warps.BLOCK_B) == (8, rows)
        assert warps.output_capsules >= J


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("B", [1, 3, 128, 1000])
def test_tiles_cover_every_sample_and_output_capsule_once(B, sizes):
    _, J, K, D = sizes
    tiles = config.tiles(B, J, K, D)
    tile = tiles.tile
    assert (tiles.tiles_B - 1) * tile.BLOCK_B < B <= tiles.tiles_B * tile.BLOCK_B
    assert (tiles.tiles_J - 1) * tile.BLOCK_J < J <= tiles.tiles_J * tile.BLOCK_J
    assert tile.BLOCK_D >= D
    assert max(K, config.MATRIX_ROWS) <= tile.BLOCK_K
    assert config.MATRIX_ROWS <= tiles.columns <= config.MAX_TILE
    for size in (*vars(tile).values(), tiles.num_warps):
        assert size == config.power_of_two(size)


@pytest.mark.parametrize("rows", [1, 64, 288, 800, 1152])
@pytest.mark.parametrize("weight_sharing", [1, 3, 144])
@pytest.mark.parametrize("tiles_B", [1, 5, 64])
@pytest.mark.parametrize("counts", [True, False])
def test_splits_cover_every_capsule_and_batch_tile_once(rows, weight_sharing, tiles_B, counts):
    split = config.split(rows, weight_sharing, 4, tiles_B, 132, counts)
    assert (split.parts - 1) * split.capsules < weight_sharing <= split.parts * split.capsules
    assert split.capsules % 4 == 0
    assert (split.pieces - 1) * split.batch_tiles < tiles_B <= split.pieces * split.batch_tiles
    assert split.whole + split.cut == rows * split.parts
    assert split.programs == split.whole + split.cut * split.pieces
    assert split.rows == rows
    assert split.cut_of(rows) == rows - split.whole
    assert split.cut_of(4 * rows - 1) == 4 * (rows - split.whole) - (split.cut > 0)
    if split.whole:  # some rows are cut and some are not, so no launch can add the parts
        assert counts
        assert split.parts == 1
        assert split.contributors <= config.MOST_COUNTED


def test_only_the_rows_that_do_not_fill_the_machine_are_cut():
    """288 programs on 132 multiprocessors are three for some of them and two for others."""
    split = config.split(288, 1, 4, 16, 132, counts=True)
    assert (split.whole, split.cut, split.pieces, split.batch_tiles) == (264, 24, 8, 2)
    assert split.counted
    split = config.split(288, 1, 4, 128, 132, counts=True)
    assert (split.whole, split.cut, split.pieces, split.batch_tiles) == (264, 24, 11, 12)
    for rows, tiles_B, counts in ((264, 128, True), (288, 1, True), (288, 16, False)):
        assert config.split(rows, 1, 4, tiles_B, 132, counts).programs == rows
    split = config.split(288, 1, 4, 128, 132, counts=False)
    assert split.pieces == 4
    assert not split.counted


def test_large_batches_are_cut_by_samples_and_small_ones_by_capsules():
    I, J, K, D = MNIST
    warps = config.warps_of(J, K, D, 80)
    assert config.sweep(4096, I, J, K, warps, 132).groups <= 4
    assert config.sweep(1, I, J, K, warps, 132).groups >= 64


def test_wide_offsets_only_where_an_element_lies_beyond_32_bits():
    assert not config.needs_int64(128 * 1152 * 8, 1152 * 10 * 16 * 8)
    assert config.needs_int64(5, 2**31)
    assert config.needs_int64(2**31 - 5)  # masked elements of the last tile lie beyond


@needs_triton
@pytest.mark.parametrize(("I", "weight_sharing", "wide"), [(8, 1, 1), (8, 8, 1), (4, 1, 0)])
def test_parts_of_dW_count_for_the_width_of_offsets(I, weight_sharing, wide):
    """Many programs contribute to each row of W: dW needs no wide offsets, but its parts may."""
    import triton.language as tl

    widths: set[tl.dtype] = set()
    sizes: dict[str, int] = {}
    launches(512, I, 2500, 64, 64, 3, sizes=sizes, widths=widths, weight_sharing=weight_sharing)
    parts = sizes.pop("weight_parts_ptr")
    assert sizes.pop("x_ptr") == parts  # more of them than one program should add
    assert not config.needs_int64(*sizes.values())
    assert parts % sizes["grad_weight_ptr"] == 0
    assert config.needs_int64(parts) == wide
    # The forward's offsets are narrow all the same.
    assert widths == ({tl.int32, tl.int64} if wide else {tl.int32})


@needs_triton
@pytest.mark.parametrize("R", [1, 2, 3, 10])
@pytest.mark.parametrize("routing_gradient", ["full", "last"])
def test_number_of_launches(R, routing_gradient):
    names = launches(128, *MNIST, R, full_gradient=routing_gradient == "full")
    sweeps = R - 1 if routing_gradient == "full" else 0
    assert len(names) <= 2 * R + 2
    assert names == (
        ["routing_forward_kernel"] * R
        + ["routing_output_kernel"]
        + ["routing_backward_kernel"] * sweeps
        + ["routing_state_kernel", "routing_gradients_kernel"]
    )


@needs_triton
@pytest.mark.parametrize(("K", "D"), [(8, 16), (72, 64)])
def test_the_gradient_of_a_grid_takes_one_launch_more(K, D):
    """And no kernel is given anything as large as the windows but the gradients of them."""
    B, C = 8, 16
    sizes: dict[str, int] = {}
    names = launches(B, C * 9, 2, K, D, 3, sizes=sizes, grid=(12, 12, C), window=(3, 3, 1, 1))
    names.remove("grid_gradient_kernel")
    assert names == launches(B * 10 * 10, C * 9, 2, K, D, 3)
    windows = B * 10 * 10 * C * 9 * K
    assert {name for name, size in sizes.items() if size >= windows} == {"du_ptr", "grad_u_ptr"}
    assert sizes["u_ptr"] == B * 12 * 12 * C * K


@needs_triton
def test_every_launch_has_all_arguments_and_no_workspace_grows_with_u_hat():
    """J in several tiles: also the statistics; the largest workspace stays far below u_hat."""
    B, I, J, K, D = 128, 3872, 196, 8, 16
    sizes: dict[str, int] = {}
    names = launches(B, I, J, K, D, 3, sizes=sizes)
    assert names.count("routing_statistics_kernel") == 2 + 3
    assert max(sizes.values()) <= B * I * J * D / 15


@needs_triton
def test_blocks_of_large_weights_need_three_launches_an_iteration():
    names = launches(8, 16, 10, 72, 64, 3)
    assert names[:9] == ["wide_coupling_kernel", "wide_sum_kernel", "wide_state_kernel"] * 3
    assert all(name.startswith("wide_") for name in names)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("B", [64, 1024])
@pytest.mark.parametrize("shape", [MNIST, (64, 10, 32, 16), (64, 196, 8, 16)], ids=str)
def test_every_sweep_that_is_launched_fits_into_99_KiB(shape, B, dtype):
    """Also the first one, whose tiles are its own."""
    from capsule_kernels.backends.triton.device import Gpu, precision_of

    gpu = Gpu(processors=82, hip=False, shared_bytes=99 << 10)
    precision = precision_of(dtype, gpu)
    launched = []
    launches(B, *shape, 3, gpu=gpu, dtype=dtype, launched=launched)
    swept = []
    for name, stages, arguments in launched:
        if name in ("routing_forward_kernel", "routing_backward_kernel"):
            held = {field.name: arguments[field.name] for field in fields(config.Warps)}
            warps = config.Warps(**held)
            uniform = arguments.get("FIRST", False)  # no state is an operand
            states = 0 if uniform else config.states_of("backward" in name, precision)
            swept.append(config.sweep_bytes(warps, stages, dtype.itemsize, states))
    assert len(swept) == 5
    assert max(swept) <= gpu.shared_bytes


def launches(
    B, I, J, K, D, R, full_gradient=True, sizes=None, grid=None, window=None,
    weight_sharing=1, widths=None, gpu=None, dtype=None, launched=None,
):  # fmt: skip
    """Names of the kernels that a forward and backward launch, in order.

    ``sizes``: a dict, filled with the elements of the largest tensor given under each name.
    ``grid``: (H, W, C) of u [B, H, W, C, K] under a ``window``.
    ``widths``: a set, which receives the dtypes of the offsets.
    ``launched``: a list, which receives names, stages and arguments.
    """
    import triton.language as tl

    from capsule_kernels.backends.triton import launch
    from capsule_kernels.backends.triton.device import Gpu

    names = []

    def record(kernel, grid, num_warps, num_stages, **arguments):
        assert set(arguments) == set(kernel.arg_names), kernel.__name__
        assert all(0 < size < 2**31 for size in grid)
        names.append(kernel.__name__)
        if launched is not None:
            launched.append((kernel.__name__, num_stages, arguments))
        given = [x.numel() for x in arguments.values() if isinstance(x, torch.Tensor)]
        assert arguments["OFFSET"] in (tl.int32, tl.int64)
        assert arguments["OFFSET"] == tl.int64 or not config.needs_int64(*given), kernel.__name__
        if widths is not None:
            widths.add(arguments["OFFSET"])
        if sizes is not None:
            for name, x in arguments.items():
                if isinstance(x, torch.Tensor):
                    sizes[name] = max(sizes.get(name, 0), x.numel())

    gpu = gpu or Gpu(processors=132, hip=False, shared_bytes=227 << 10)
    u = torch.empty((B, *grid, K) if grid else (B, I, K), device="meta", dtype=dtype)
    weight = torch.empty(I // weight_sharing, J, D, K, device="meta", dtype=dtype)
    v, s, _ = launch.routing_forward(
        u, weight, None, None, R, False, weight_sharing, False, window, launch=record, gpu=gpu
    )
    launch.routing_backward(
        v, u, weight, None, s, False, weight_sharing, full_gradient, [True, True, False, False],
        window, launch=record, gpu=gpu,
    )  # fmt: skip
    return names


@needs_triton
def test_float32_follows_the_matmul_precision_at_run_time():
    from capsule_kernels.backends.triton.device import Gpu, precision_of

    cuda, hip = Gpu(132, hip=False), Gpu(304, hip=True)
    before = torch.get_float32_matmul_precision()
    try:
        for precision, expected in (("highest", "tf32x3"), ("high", "tf32"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(precision)
            assert precision_of(torch.float32, cuda) == expected
            assert precision_of(torch.float32, hip) == "ieee"
            assert precision_of(torch.bfloat16, cuda) == "tf32"  # exact: 8 bits of TF32's 11
            assert precision_of(torch.float64, cuda) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


@needs_triton
def test_tuning_is_by_request_and_leaves_the_order_of_sums_alone(monkeypatch):
    import triton

    from capsule_kernels.backends.triton import routing

    calls = []

    class Kernel:
        arg_names = ("u_ptr", "B", "t", "J")

        def __getitem__(self, grid):
            return lambda **options: calls.append((options, routing.ONE_AT_A_TIME.locked()))

    def autotune(configs, key):
        calls.append((configs, key))
        return lambda kernel: kernel

    monkeypatch.setattr(triton, "autotune", autotune)
    monkeypatch.delenv("CAPSULE_KERNELS_AUTOTUNE", raising=False)
    routing.run(Kernel(), (1,), 4, 2, B=3)
    plain = {"B": 3, "num_warps": 4, "num_stages": 2, **routing.OPTIONS}
    assert calls == [(plain, backend.INTERPRETED)]
    monkeypatch.setenv("CAPSULE_KERNELS_AUTOTUNE", "1")
    routing.run(Kernel(), (1,), 4, 2, B=3)
    configs, key = calls[1]
    assert {config.num_warps for config in configs} == {4}
    assert len({config.num_stages for config in configs}) == len(configs) > 1
    assert key == ["B", "J"]
    # An autotuner keeps the arguments it was last called with: threads take turns.
    assert calls[2] == ({"B": 3, **routing.OPTIONS}, True)
    assert not routing.ONE_AT_A_TIME.locked()


SHAPE = RoutingShape(*MNIST, 3, 1)


def test_cpu_tensors_without_the_interpreter_are_refused(monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETED", False)
    reason = backend.unsupported(torch.device("cpu"), torch.float32, SHAPE)
    assert "got tensors on cpu" in reason
    assert "TRITON_INTERPRET=1" in reason


def test_old_gpus_are_refused_by_name(monkeypatch):
    properties = SimpleNamespace(major=7, minor=5, name="T4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    reason = backend.unsupported(torch.device("cuda", 0), torch.float32, SHAPE)
    assert (
        reason == "it needs compute capability 8.0 or higher, T4 has 7.5; use backend='reference'"
    )
    properties.major, properties.minor = 8, 0
    properties.multi_processor_count = 108
    assert backend.unsupported(torch.device("cuda", 0), torch.float32, SHAPE) is None


SMALL = SimpleNamespace(
    major=8, minor=9, name="L4", multi_processor_count=58, shared_memory_per_block_optin=99 << 10
)
TOO_LARGE = (16, 4, 16, 256)
"""(I, J, K, D): in float64 W, states and all that is exchanged take 140 KiB at least."""


def test_float64_that_does_not_fit_into_shared_memory_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SMALL)
    device, shape = torch.device("cuda", 0), RoutingShape(*TOO_LARGE, 3, 1)
    reason = backend.unsupported(device, torch.float64, shape)
    assert reason == (
        "J = 4, K = 16, D = 256 in torch.float64 needs 143360 bytes of shared memory for a step of "
        "the smallest program, and this device has 101376; use another dtype or backend='reference'"
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert backend.unsupported(device, dtype, shape) is None
    monkeypatch.setattr(backend, "unavailable", lambda: None)
    assert dispatch.reason_against("triton", device, torch.float64, shape) == reason
    monkeypatch.setattr(dispatch.cuda, "is_preferred", lambda *call: False)
    u, weight = (
        SimpleNamespace(device=device, dtype=torch.float64, shape=torch.Size(sizes))
        for sizes in ((2, 16, 16), (16, 4, 256, 16))
    )
    assert dispatch.select_backend("fused_routing", "auto", u, weight, 3, 1) == "reference"
    with pytest.raises(RuntimeError, match="this device has 101376"):
        dispatch.select_backend("fused_routing", "triton", u, weight, 3, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_choice_of_a_backend_can_be_traced(dtype, monkeypatch):
    """In one graph for all sizes, on a GPU too, of which nothing but its description is here."""
    describe = torch.compiler.assume_constant_result(lambda device: SMALL)  # as of torch's own
    monkeypatch.setattr(torch.cuda, "get_device_properties", describe)
    torch._dynamo.reset()

    def supported(u, weight):
        rows, J, D, K = weight.shape
        shape = RoutingShape(rows, J, K, D, 3, 1)
        return 2 * u if backend.unsupported(torch.device("cuda", 0), dtype, shape) is None else u

    whole = torch.compile(supported, fullgraph=True, dynamic=True, backend="eager")
    for J in (10, 4):
        assert whole(torch.ones(3), torch.ones(6, J, 256, 16)).sum() == 6


@needs_triton
def test_what_does_not_fit_is_refused_past_the_checks_before_any_launch():
    from capsule_kernels.backends.triton.device import Gpu

    launched = []
    gpu = Gpu(processors=58, hip=False, shared_bytes=99 << 10)
    with pytest.raises(RuntimeError, match=r"routing_forward: J = 4, .* this device has 101376"):
        launches(2, *TOO_LARGE, 3, gpu=gpu, dtype=torch.float64, launched=launched)
    assert not launched


def test_a_gpu_whose_shared_memory_torch_does_not_tell_has_what_all_of_them_have(monkeypatch):
    from capsule_kernels.backends.triton.device import gpu_of

    properties = SimpleNamespace(multi_processor_count=108)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert gpu_of(torch.device("cuda", 0)).shared_bytes == 99 << 10


def test_any_size_is_taken_up_to_the_largest_tile_of_triton(monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETED", True)

    def reason(K, D):
        return backend.unsupported(torch.device("cpu"), torch.float32, (16, 10, K, D, 3))

    for K, D in ((8, 16), (72, 64), (130, 33), (5, 300), (1 << 22, 1), (1, 1 << 20)):
        assert reason(K, D) is None
    assert f"D = {(1 << 20) + 1}" in reason(1, (1 << 20) + 1)


def test_only_large_weights_take_the_path_of_blocks():
    assert not any(config.is_wide(J, K, D) for _, J, K, D in SIZES)
    assert not config.is_wide(10, 64, 64)
    for K, D in ((72, 64), (130, 33), (5, 300), (300, 1)):
        assert config.is_wide(10, K, D)
        blocks = config.blocks_of(K, D)
        assert blocks.BLOCK_D <= config.WIDE_BLOCK
        assert min(blocks.BLOCK_D, blocks.BLOCK_K) >= config.MATRIX_ROWS


def test_a_named_backend_raises_its_reason(monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="backend 'triton' can't be used"):
        fused_routing(torch.randn(2, 3, 4), torch.randn(3, 5, 6, 4), backend="triton")


@pytest.mark.parametrize("blocked", [False, True])
def test_importing_the_package_does_not_import_triton(blocked):
    lines = [
        "import importlib.util, sys",
        "find = importlib.util.find_spec",
        f"hide = lambda name, *rest: None if {blocked} and name == 'triton' else find(name, *rest)",
        "importlib.util.find_spec = hide",
        "import capsule_kernels, torch",
        "status = capsule_kernels.backends()['triton']",
        "capsule_kernels.fused_routing(torch.randn(2, 3, 4), torch.randn(3, 5, 6, 4))",
        "print('triton' in sys.modules, status.usable, status.reason)",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    imported, _, reason = done.stdout.strip().split(maxsplit=2)
    assert imported == "False"
    if blocked:
        assert "Triton is not installed" in reason

"""How the Triton backend cuts a call into tiles, programs and steps: pure functions of sizes."""

from dataclasses import replace
from itertools import product

import pytest

from capsule_kernels.backends.triton import config

from .triton_calls import MNIST, SIZES, launches, needs_triton

PRECISIONS = [(8, "ieee"), (4, "tf32x3"), (4, "tf32"), (2, "tf32")]
"""Bytes of an element, and how it is multiplied."""


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("B", [1, 3, 128, 1000])
@pytest.mark.parametrize("processors", [1, 4, 132, 304])
@pytest.mark.parametrize("columns", [None, 32, 48, 80])
def test_sweeps_cover_every_sample_and_capsule_once(B, sizes, processors, columns):
    I, J, K, D = sizes
    warps = config.warps_of(J, K, D, columns) if columns else config.warps_of_uniform(J, K, D)
    sweep = config.sweep(B, I, J, K, warps, 2, processors)
    assert (sweep.tiles_B - 1) * warps.BLOCK_B < B <= sweep.tiles_B * warps.BLOCK_B
    assert (sweep.tiles_J - 1) * warps.output_capsules < J <= sweep.tiles_J * warps.output_capsules
    assert (sweep.groups - 1) * sweep.capsules < I <= sweep.groups * sweep.capsules
    assert sweep.capsules % warps.capsules == 0


@pytest.mark.parametrize("columns", [32, 48, 80])
@pytest.mark.parametrize("J", [1, 2, 5, 10, 16, 33, 196])
@pytest.mark.parametrize("K", [1, 3, 6, 8, 16, 64, 256])
@pytest.mark.parametrize("D", [1, 7, 16, 24, 64, 256])
def test_warps_hold_what_fits(J, K, D, columns):
    if config.is_wide(K, D):
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
    gpu = config.Gpu(1, hip=False, shared_bytes=shared_bytes)
    for backward, precision in ((False, "tf32"), (True, "tf32"), (False, "tf32x3")):
        states = config.states_of(backward, precision)
        columns = config.state_columns(backward, precision)
        wanted = config.warps_of(J, K, D, columns)
        warps, stages = config.fitting(wanted, 4, states, gpu)
        assert config.fitting(warps, 4, states, gpu) == (warps, stages)
        assert warps.STEP_I * warps.BLOCK_K >= config.MATRIX_ROWS
        assert config.sweep_bytes(warps, stages, 4, states, gpu) <= shared_bytes
        if shared_bytes > 64 << 10 and D <= 16:  # steps may be shorter, no more
            assert replace(warps, STEP_I=wanted.STEP_I) == wanted
        if shared_bytes == 227 << 10:
            assert (warps, stages) == (wanted, 3)


@pytest.mark.parametrize(("element_bytes", "precision"), PRECISIONS)
@pytest.mark.parametrize("shared_bytes", [64 << 10, 99 << 10, 227 << 10])
def test_no_shape_is_cut_to_nothing(shared_bytes, element_bytes, precision):
    """Where one step of all output capsules does not fit, they are cut into tiles; only float64
    has shapes of which nothing fits into 99 KiB, and in 64 KiB the largest D in split float32."""
    gpu = config.Gpu(1, hip=False, shared_bytes=shared_bytes)
    refused = set()
    for J, K, D in product((1, 2, 5, 10, 33, 196), (1, 8, 16, 32, 64, 128, 256), (1, 16, 64, 256)):
        if config.is_wide(K, D):
            continue
        fits = config.least_bytes(J, K, D, element_bytes, precision, gpu) <= shared_bytes
        for backward in (False, True):
            states = config.states_of(backward, precision)
            wanted = config.warps_of(J, K, D, config.state_columns(backward, precision))
            fitting = config.fitting(wanted, element_bytes, states, gpu)
            assert not fits or fitting is not None
            if fitting is not None:
                warps, stages = fitting
                assert min(vars(warps).values()) >= 1
                assert warps.STEP_I * warps.BLOCK_K >= config.MATRIX_ROWS
                assert {warps.number, warps.STEP_I} <= {1, 2, 4, 8}
                assert config.sweep_bytes(warps, stages, element_bytes, states, gpu) <= shared_bytes
        last = config.warps_of_gradients(J, K, D)
        last = config.fitting_gradients(last, element_bytes, precision, gpu)
        assert (
            not fits or config.gradient_bytes(last, element_bytes, precision, gpu) <= shared_bytes
        )
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
    warps, stages = config.fitting(wanted, 4, 4, config.Gpu(82, hip=False, shared_bytes=99 << 10))
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
    assert config.sweep(4096, I, J, K, warps, 2, 132).groups <= 4
    assert config.sweep(1, I, J, K, warps, 2, 132).groups >= 64


def test_tiles_share_the_first_axis_of_a_grid_where_the_third_is_too_short():
    assert config.grid(8, 16, 65535) == ((8, 16, 65535), False)
    assert config.grid(8, 16, 65536) == ((8 * 65536, 16, 1), True)
    assert config.grid(70_000, 16, 1) == ((70_000, 16, 1), False)


def test_64_bit_offsets_only_where_an_element_lies_beyond_32_bits():
    assert not config.needs_int64(128 * 1152 * 8, 1152 * 10 * 16 * 8)
    assert config.needs_int64(5, 2**31)
    assert config.needs_int64(2**31 - 5)  # masked elements of the last tile lie beyond


@needs_triton
@pytest.mark.parametrize(("I", "weight_sharing", "beyond"), [(8, 1, 1), (8, 8, 1), (4, 1, 0)])
def test_parts_of_dW_count_for_the_width_of_offsets(I, weight_sharing, beyond):
    """Many programs contribute to each row of W: dW has no 64-bit offsets, but its parts may."""
    import triton.language as tl

    widths: set[tl.dtype] = set()
    sizes: dict[str, int] = {}
    launches(512, I, 2500, 64, 64, 3, sizes=sizes, widths=widths, weight_sharing=weight_sharing)
    parts = sizes.pop("weight_parts_ptr")
    assert sizes.pop("x_ptr") == parts  # more of them than one program should add
    assert not config.needs_int64(*sizes.values())
    assert parts % sizes["grad_weight_ptr"] == 0
    assert config.needs_int64(parts) == beyond
    # The forward's offsets have 32 bits all the same.
    assert widths == ({tl.int32, tl.int64} if beyond else {tl.int32})

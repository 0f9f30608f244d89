"""What the Triton backend launches, without running a kernel: which, how often, with what."""

from dataclasses import fields

import pytest
import torch

from capsule_kernels.backends import triton as backend
from capsule_kernels.backends.triton import config

from .triton_calls import MNIST, launches, needs_triton


@needs_triton
@pytest.mark.parametrize(
    ("B", "sizes", "weight_sharing", "many"),
    [
        (1, (300_000, 33, 32, 16), 300_000, ["routing_statistics_kernel"]),
        (2, (1, 70_000, 8, 256), 1, ["routing_forward_kernel", "routing_backward_kernel"]),
        (2, (1, 70_000, 8, 256), 1, ["routing_output_kernel", "routing_state_kernel"]),
        (2, (300_000, 10, 8, 16), 1, ["routing_gradients_kernel"]),
        (2, (70_000, 2, 72, 64), 70_000, ["wide_coupling_kernel", "wide_input_gradient_kernel"]),
        (2, (1, 70_000, 72, 64), 1, ["wide_sum_kernel", "wide_state_kernel"]),
    ],
)  # fmt: skip
def test_no_grid_has_more_programs_along_an_axis_than_cuda_allows(B, sizes, weight_sharing, many):
    """65535 along all but the first (``launches`` asserts it), where there are more in all."""
    programs: dict[str, int] = {}
    launches(B, *sizes, 3, weight_sharing=weight_sharing, programs=programs)
    assert all(programs[name] > 65535 for name in many), programs


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
    assert names.count("routing_statistics_kernel") == 2 + 2
    assert max(sizes.values()) <= B * I * J * D / 15


@needs_triton
@pytest.mark.parametrize("shared_bytes", [99 << 10, 227 << 10])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(64, 33, 8, 16), (64, 196, 6, 24)], ids=str)
def test_statistics_are_tabled_in_the_tiles_of_the_sweep_that_reads_them(
    shape, dtype, shared_bytes
):
    """So the logits that both compute have the same last bits."""
    launched = []
    gpu = config.Gpu(processors=82, hip=False, shared_bytes=shared_bytes)
    launches(64, *shape, 3, gpu=gpu, dtype=dtype, launched=launched)
    names = [field.name for field in fields(config.Warps)] + ["PRECISION", "ACC", "t"]
    tabled = None
    readers = []
    for kernel, stages, arguments in launched:
        if kernel == "routing_statistics_kernel":
            tabled = stages, [arguments[name] for name in names]
        elif "statistics_ptr" in arguments and not arguments.get("FIRST"):
            readers.append(kernel)
            if kernel != "routing_gradients_kernel":
                assert tabled == (stages, [arguments[name] for name in names])
    sweeps = ["routing_forward_kernel"] * 2 + ["routing_backward_kernel"] * 2
    assert readers == [*sweeps, "routing_gradients_kernel"]


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
    from capsule_kernels.backends.triton.device import precision_of

    gpu = config.Gpu(processors=82, hip=False, shared_bytes=99 << 10)
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
            swept.append(config.sweep_bytes(warps, stages, dtype.itemsize, states, gpu))
    assert len(swept) == 5
    assert max(swept) <= gpu.shared_bytes


@needs_triton
def test_float32_follows_the_matmul_precision_at_run_time():
    from capsule_kernels.backends.triton.device import precision_of

    cuda, hip = config.Gpu(132, hip=False), config.Gpu(304, hip=True)
    before = torch.get_float32_matmul_precision()
    matmul = torch.backends.cuda.matmul
    try:
        for precision, expected in (("highest", "tf32x3"), ("high", "tf32"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(precision)
            assert precision_of(torch.float32, cuda) == expected
            assert precision_of(torch.float32, hip) == "ieee"
            assert precision_of(torch.bfloat16, cuda) == "tf32"  # exact: 8 bits of TF32's 11
            assert precision_of(torch.float64, cuda) == "ieee"
            # The newer setting has the last word, though the older one can't be read beside it.
            for newer, then in (("tf32", "tf32"), ("ieee", "tf32x3")):
                matmul.fp32_precision = newer
                assert precision_of(torch.float32, cuda) == then
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.get_float32_matmul_precision() == before


@needs_triton
def test_tuning_is_by_request_and_leaves_the_order_of_sums_alone(monkeypatch):
    import triton

    from capsule_kernels.backends.triton import routing

    calls = []

    class Kernel:
        arg_names = ("u_ptr", "finished_ptr", "B", "t", "J")

        def __getitem__(self, grid):
            return lambda **options: calls.append((options, routing.ONE_AT_A_TIME.locked()))

    def autotune(configs, key, reset_to_zero):
        calls.append((configs, key, reset_to_zero))
        return lambda kernel: kernel

    monkeypatch.setattr(triton, "autotune", autotune)
    monkeypatch.delenv("CAPSULE_KERNELS_AUTOTUNE", raising=False)
    routing.run(Kernel(), (1,), 4, 2, B=3)
    plain = {"B": 3, "num_warps": 4, "num_stages": 2, **routing.OPTIONS}
    assert calls == [(plain, backend.INTERPRETED)]
    monkeypatch.setenv("CAPSULE_KERNELS_AUTOTUNE", "1")
    routing.run(Kernel(), (1,), 4, 2, B=3)
    configs, key, reset = calls[1]
    assert {config.num_warps for config in configs} == {4}
    assert len({config.num_stages for config in configs}) == len(configs) > 1
    assert key == ["B", "J"]
    assert reset is None
    # An autotuner keeps the arguments it was last called with: threads take turns.
    assert calls[2] == ({"B": 3, **routing.OPTIONS}, True)
    assert not routing.ONE_AT_A_TIME.locked()
    # Counters are of one launch only.
    routing.run(Kernel(), (1,), 4, 2, B=3, finished_ptr=torch.zeros(1))
    assert calls[3][2] == ["finished_ptr"]


@needs_triton
def test_what_is_not_aligned_is_copied():
    """For it Triton would compile other kernels, whose sums are in another order."""
    from capsule_kernels.backends.triton.routing import ALIGNMENT, laid_out

    stored = torch.randn(2, 3, 5)
    assert laid_out(stored) is stored
    for odd in (torch.randn(31)[1:].view(2, 3, 5), torch.randn(2, 5, 3).mT):
        copied = laid_out(odd)
        assert torch.equal(copied, odd)
        assert copied.is_contiguous()
        assert copied.data_ptr() % ALIGNMENT == 0

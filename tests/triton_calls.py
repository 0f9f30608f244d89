"""Shapes, and the launches of a call of the Triton backend, without running a kernel."""

import math

import pytest
import torch

from capsule_kernels.backends import triton as backend
from capsule_kernels.backends.triton import config

needs_triton = pytest.mark.skipif(not backend.INSTALLED, reason="Triton is not installed")
MNIST = (1152, 10, 8, 16)
SIZES = [
    MNIST, (3200, 10, 8, 16), (2048, 5, 8, 16), (9216, 10, 8, 16), (1024, 10, 6, 8),
    (3872, 196, 8, 16), (1, 1, 1, 1), (7, 33, 3, 7), (1153, 2, 8, 64), (64, 1000, 8, 24),
]  # fmt: skip
"""(I, J, K, D): the shapes of published networks, and awkward ones."""


def launches(
    B, I, J, K, D, R, full_gradient=True, sizes=None, grid=None, window=None,
    weight_sharing=1, widths=None, gpu=None, dtype=None, launched=None, programs=None,
):  # fmt: skip
    """Names of the kernels that a forward and backward launch, in order.

    ``sizes``: a dict, filled with the elements of the largest tensor given under each name.
    ``grid``: (H, W, C) of u [B, H, W, C, K] under a ``window``.
    ``widths``: a set, which receives the dtypes of the offsets.
    ``launched``: a list, which receives names, stages and arguments.
    ``programs``: a dict, filled with the most programs of a launch of each kernel.
    """
    import triton.language as tl

    from capsule_kernels.backends.triton import launch

    names = []

    def record(kernel, grid, num_warps, num_stages, **arguments):
        assert set(arguments) == set(kernel.arg_names), kernel.__name__
        along_x, *along_others = grid
        assert 0 < along_x < 2**31, kernel.__name__
        assert all(0 < size < 2**16 for size in along_others), kernel.__name__
        names.append(kernel.__name__)
        if programs is not None:
            programs[kernel.__name__] = max(programs.get(kernel.__name__, 0), math.prod(grid))
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

    gpu = gpu or config.Gpu(processors=132, hip=False, shared_bytes=227 << 10)
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

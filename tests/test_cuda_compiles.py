"""The CUDA kernels through nvcc, without a GPU: what ``python -m bench aot`` says of them."""

import pytest

from bench import aot_cuda
from bench.shapes import MANY_CLASSES, MNIST

reason = aot_cuda.missing()
pytestmark = pytest.mark.skipif(reason is not None, reason=reason or "")


def test_the_forward_stays_in_registers_and_uses_tensor_cores() -> None:
    pytest.importorskip("triton", reason="its cuobjdump reads the machine code")
    forward = next(aot_cuda.rows(MNIST, 128, 3, "TF32", "sm_90"))
    assert forward.kernel == "routing_forward_kernel"
    assert forward.spilled_bytes == 0
    # One for each 8 columns of u_hat [16, 10 * 16], in each of three sweeps: all couplings alike,
    # none but those of routing, and with a prior or to be written.
    assert forward.matrix_instructions == 3 * 20
    assert forward.blocks == 1, "its W and its registers fit on a multiprocessor"


def test_what_does_not_fit_is_not_compiled() -> None:
    assert list(aot_cuda.rows(MANY_CLASSES, 128, 3, "TF32", "sm_90")) == []
    assert list(aot_cuda.rows(MNIST, 128, 3, "float64", "sm_90")) == []
    assert list(aot_cuda.rows(MNIST, 128, 3, "TF32", "gfx942")) == []

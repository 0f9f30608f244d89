"""The CUDA kernels through nvcc, without a GPU: what ``python -m bench aot`` says of them."""

from itertools import product

import pytest

from bench import aot_cuda
from bench.aot import KNOWN_SPILLS
from bench.shapes import MANY_CLASSES, MNIST

reason = aot_cuda.missing()
pytestmark = pytest.mark.skipif(reason is not None, reason=reason or "")


# Products with the matrix instructions of the MNIST shape, 10 for u_hat [8, 10 * 16]: in the
# forward's sweeps with all couplings alike for one and for two tiles, with a prior, with those of
# routing, and with those of routing and a prior or to be written; in the states' sweep; and in the
# gradients beside u_hat dW in registers and on chip, and du, 20.
PRODUCTS = {
    "routing_forward_kernel": 60,
    "routing_backward_states_kernel": 10,
    "routing_backward_gradients_kernel": 50,
}
# From sm_90 on every sweep but the first works on two capsules at a time, and on one that is left;
# not in float32, three products for each.
OF_PAIRS = {"routing_forward_kernel": 2 * 20, "routing_backward_states_kernel": 20}
# The gradients by output capsules: of four k, two products of each state for the logits and for du,
# and dW. They need more shared memory than sm_80 has.
OF_OUTPUTS = 32 + 40 + 80
# Of warpgroups, for each of 10 output capsules and four input capsules: two for the products with
# a state, V and in the backward ds, and four for the sum. The forward's first sweep only sums, five
# output capsules at a time.
OF_WARPGROUPS = {
    "warpgroup_forward_kernel": 2 * 4 + 10 * (2 + 4),
    "warpgroup_backward_states_kernel": 10 * (2 + 2 + 4),
}


# float16 differs from bfloat16 only in how values are converted when they are loaded and stored.
COMPILED = [
    (precision, target)
    for precision, target in product(aot_cuda.PRECISIONS, aot_cuda.ARCHITECTURES)
    if precision != "float16" or target == "sm_90"
]


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "target"), COMPILED)
def test_the_mnist_shape_stays_in_registers(precision: str, target: str) -> None:
    pytest.importorskip("triton", reason="its tools read the machine code")
    rows = {row.kernel: row for row in aot_cuda.rows(MNIST, 128, 3, precision, target)}
    outputs = rows.pop(aot_cuda.OUTPUTS, None)
    assert (outputs is None) == (target == "sm_80" or precision == "float32")
    if outputs is not None:
        assert outputs.spilled_bytes <= KNOWN_SPILLS[aot_cuda.OUTPUTS, precision, target]
        assert outputs.matrix_instructions == OF_OUTPUTS
        assert outputs.blocks == 1
    for name in aot_cuda.WARPGROUPS:
        row = rows.pop(name, None)
        assert (row is None) == (target != "sm_90" or precision == "float32")
        if row is not None:
            assert row.spilled_bytes == 0, name
            assert row.matrix_instructions == OF_WARPGROUPS[name]
            assert row.blocks == 1
    assert rows.keys() == PRODUCTS.keys()
    for name, row in rows.items():
        assert row.spilled_bytes == 0, name
        products = 3 * PRODUCTS[name] if precision == "float32" else PRODUCTS[name]
        if target != "sm_80" and precision != "float32":
            products += OF_PAIRS.get(name, 0)
        assert row.matrix_instructions == products
        assert row.blocks == 1, "its W and its registers fit on a multiprocessor"


def test_what_does_not_fit_is_not_compiled() -> None:
    assert list(aot_cuda.rows(MANY_CLASSES, 128, 3, "TF32", "sm_90")) == []
    assert list(aot_cuda.rows(MNIST, 128, 3, "float64", "sm_90")) == []
    assert list(aot_cuda.rows(MNIST, 128, 3, "TF32", "gfx942")) == []

"""Interpreted Triton kernels, in a process of their own.

Triton reads TRITON_INTERPRET once, when it is first imported.
"""

import pytest

from . import interpreted

INTERPRETED = "test_triton_interpreter.py test_window_memory.py"
REACH_NEARLY_ALL = (
    "convolutional_capsules_match or wanted or strides or two_iterations or shorter or few_rows or "
    "gradcheck or zero_input or empty or usable or J33"
)
"""The tests whose lines are counted: the others would take long for a few more."""


@interpreted.marked
@pytest.mark.parametrize(("covered", "least"), [(True, 17), (False, 78)], ids=["covered", "others"])
def test_kernels_in_the_interpreter(covered, least, figure):
    # What test_window_memory.py says of the CPU kernels needs no interpreter.
    chosen = REACH_NEARLY_ALL if covered else f"not ({REACH_NEARLY_ALL} or cpu-cpu)"
    interpreted.check_in_the_interpreter(INTERPRETED, chosen, least, figure, covered=covered)

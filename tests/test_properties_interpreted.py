"""The properties of every backend, for the interpreted Triton kernels, on few examples."""

from .interpreted import MARKS, check_in_the_interpreter

pytestmark = MARKS


def test_properties_in_the_interpreter(figure):
    check_in_the_interpreter("test_properties.py", "triton-cpu", 6, figure)

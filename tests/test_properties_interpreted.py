"""The properties of every backend, for the interpreted Triton kernels, on few examples."""

from .interpreted import MARKS, check_in_the_interpreter

pytestmark = MARKS


def test_properties_in_the_interpreter(figure):
    # That samples don't see each other takes two calls for each example; with one sample spoilt
    # test_range.py and test_triton_interpreter.py look at the same.
    chosen = "triton-cpu and not do_not_see_each_other"
    check_in_the_interpreter("test_properties.py", chosen, 5, figure)

"""The ranges of every backend, for the interpreted Triton kernels.

A file of its own, as test_properties_interpreted.py is: each takes minutes, and tests are shared
out by files.
"""

from .interpreted import MARKS, check_in_the_interpreter

pytestmark = MARKS


def test_ranges_in_the_interpreter(figure):
    # The smaller batch, as the kernels have one layout for both, and what they compute in: they
    # widen 16-bit values as they load them. Rounding those it stores is all that is left to go
    # wrong.
    chosen = "triton-cpu-3 and (not float16 or huge or end_of_the_range)"
    check_in_the_interpreter("test_range.py", chosen, figure)

"""The ranges of every backend, for the interpreted Triton kernels.

A file of its own, as test_properties_interpreted.py is: each takes long, and tests are shared out
by files.
"""

from .interpreted import MARKS, check_in_the_interpreter

pytestmark = MARKS


def test_ranges_in_the_interpreter(figure):
    # The smaller batch, as the kernels have one layout for both, and what they compute in: they
    # widen 16-bit values as they load them. Rounding those it stores is all that is left to go
    # wrong: at the end of the range. ("float16" stands in "bfloat16", too.)
    of_16_bits = "float16 and not end_of_the_range"
    # Added to others, infinity of either sign is the same but among log priors.
    of_the_other_sign = "u--inf or weight--inf or bias--inf"
    # Rounding in two places shows most where logits are largest.
    of_smaller_logits = "20-torch.float64 or 20-torch.float32-high-"
    left_out = f"({of_16_bits}) or {of_the_other_sign} or {of_smaller_logits}"
    check_in_the_interpreter("test_range.py", f"triton-cpu-3 and not ({left_out})", 69, figure)

"""The loops in assembly that hold a matrix instruction, and what each of them costs."""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Assembly(NamedTuple):
    """What a label, a branch to one (both name it) and a matrix instruction look like."""

    label: str
    branch: str
    matrix: str


PTX = Assembly(
    r"(\$\w+):", r"\bbra(?:\.uni)?\s+(\$\w+)", r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)"
)
SASS = Assembly(r"\s*(\.L_x_\d+):", r"\bBRA\b.*?(\.L_x_\d+)", r"\b\w*MMA\b")


def in_loops(lines: Sequence[str], assembly: Assembly, cost: Callable[[range], str]) -> str:
    """What each loop costs, by the numbers of its lines, outer loops first.

    A loop is what lies between a label and the last branch back to it. "a > b": b's is inside of
    a's; "a, b": it is not. What branches from behind a loop back into its middle is no loop.
    """
    labels: dict[str, int] = {}
    ends: dict[int, int] = {}
    for number, line in enumerate(lines):
        if label := re.match(assembly.label, line):
            labels[label[1]] = number
        branch = re.search(assembly.branch, line)
        if branch and branch[1] in labels:
            ends[labels[branch[1]]] = number
    products = [number for number, line in enumerate(lines) if re.search(assembly.matrix, line)]
    text, found = "", [range(0)]
    for start, end in sorted(ends.items()):
        loop = range(start, end + 1)
        resumes = any(start in other and end not in other for other in found)
        if not resumes and any(number in loop for number in products):
            text += (" > " if start in found[-1] else ", " if text else "") + cost(loop)
            found.append(loop)
    return text


def loop_lengths(listing: str) -> str:
    """Instructions of these loops in machine code, as ``nvdisasm`` lists it."""
    lines = listing.splitlines()
    counts = [re.match(r"\s+/\*[0-9a-f]{4,}\*/", line) is not None for line in lines]
    return in_loops(lines, SASS, lambda loop: str(sum(counts[loop.start : loop.stop])))

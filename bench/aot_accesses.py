"""What a kernel's loops ask of memory, counted from its PTX, without a GPU.

An access of a warp is served 128 bytes at a time: all lanes where they have four bytes each, 16
with eight, 8 with sixteen. Shared memory has 32 banks of four bytes. Each such part takes as many
turns as the bank that is asked for the most different words; all but the first are conflicts.
Global memory comes in sectors of 32 bytes: each part asks for all that it touches, of which those
beyond the bytes that it wants are excess; lanes that a mask leaves out ask for nothing.

The addresses in Triton's kernels come from the thread's number by whole-number arithmetic, plus
what is the same for all threads. So one pass over the text of PTX, for all threads of a block at
once, tells who meets whom: whatever is loaded counts as 0, and branches are not taken, for these
move all lanes alike; parameters, of which some are strides, count as ``PARAMETER``. What Nsight
Compute counts on a GPU are the same numbers (docs/kernels.md), but for the turns of ``cp.async`` of
less than 16 bytes, which meets more than banks.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from .aot_loops import PTX, in_loops

Values = np.ndarray
"""A register's value in every thread of a block, int64."""

ACCESS = re.compile(r"(?:ld|st|cp\.async|ldmatrix|stmatrix)\b\S*?\.(shared|global)(\.global)?")
ADDRESS = re.compile(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]")
INSTRUCTION = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.]*)\s+(.*)")
NUMBER = re.compile(r"-?(0x[0-9a-fA-F]+|\d+)")
PARAMETER = 4096


@dataclass(frozen=True)
class Access:
    """What all warps ask of a memory in one instruction: turns or sectors; those in ``vain`` are
    conflicts or excess."""

    line: int
    memory: str  # "shared" or "global"
    asked: int
    vain: int


def loop_accesses(ptx: str, warps: int) -> dict[str, str]:
    """Turns in shared memory, and sectors of global, of all warps in a pass of each loop.

    "704 (368)": 704, of which 368 are conflicts, or excess. Of a loop inside one pass counts.
    """
    lines = [line.split("//")[0].strip().rstrip(";") for line in ptx.splitlines()]
    accesses = list(accesses_of(lines, warps))

    def counted(memory: str) -> str:
        def cost(loop: range) -> str:
            inside = [a for a in accesses if a.memory == memory and a.line in loop]
            return f"{sum(a.asked for a in inside)} ({sum(a.vain for a in inside)})"

        return in_loops(lines, PTX, cost)

    return {"turns": counted("shared"), "sectors": counted("global")}


def accesses_of(lines: list[str], warps: int) -> Iterator[Access]:
    registers: dict[str, Values] = {"%tid.x": np.arange(32 * warps)}
    zero = np.zeros(32 * warps, np.int64)

    def value(operand: str) -> Values:
        if operand in registers:
            return registers[operand]
        return zero + int(operand, 0) if NUMBER.fullmatch(operand) else zero

    for number, line in enumerate(lines):
        instruction = INSTRUCTION.match(line)
        if instruction is None:
            continue
        negated, predicate, name, rest = instruction.groups()
        if access := ACCESS.match(name):
            addresses = [
                (value(base) + int(further or 0)).reshape(warps, 32)
                for base, further in ADDRESS.findall(rest)
            ]
            width = width_of(name, rest)
            if access[1] == "shared":
                yield Access(number, "shared", *turns_of(addresses[0], width))
            if access[1] == "global" or access[2]:  # what a copy reads comes second
                asks = zero == 0 if predicate is None else (value(predicate) != 0) ^ bool(negated)
                if access[2]:
                    asks = asks & (value(rest.split(",")[-1].strip()) != 0)  # bytes to copy
                yield Access(number, "global", *sectors_of(addresses[-1], asks, width))
            continue
        target, *operands = (operand.strip() for operand in rest.split(","))
        if target.startswith("%"):
            operation = OPERATIONS.get(name.split(".")[0])
            whole = operation is not None and re.search(r"\.([bsu](16|32|64)|pred)$", name)
            result = zero + PARAMETER if name.startswith("ld.param") else zero
            if operation and whole:
                result = operation(name, *map(value, operands))
            registers[target.split("|")[0]] = result


def width_of(name: str, operands: str) -> int:
    """Bytes that one lane moves."""
    if name.startswith("cp.async"):
        return int(operands.split(",")[2], 0)
    if "matrix" in name:  # a lane names a row of 16 bytes
        return 16
    elements = int(found[1]) if (found := re.search(r"\.v(\d)", name)) else 1
    return elements * int(re.findall(r"\.[bsuf](\d+)", name)[-1]) // 8


def turns_of(addresses: Values, width: int) -> tuple[int, int]:
    """Turns and conflicts of the warps whose lanes access ``width`` bytes there, [warps, 32]."""
    lanes = min(32, 128 // width)
    turns = conflicts = 0
    for part in addresses.reshape(-1, lanes):
        words = np.unique((part[:, None] + np.arange(0, width, 4)) // 4)
        most = int(np.bincount(words % 32).max())
        turns += most
        conflicts += most - 1
    return turns, conflicts


def sectors_of(addresses: Values, asks: Values, width: int) -> tuple[int, int]:
    """Sectors that the lanes ask for that ask at all, and those beyond the bytes they want."""
    lanes = min(32, 128 // width)
    asked = least = 0
    for part, of_part in zip(addresses.reshape(-1, lanes), asks.reshape(-1, lanes), strict=True):
        words = np.unique((part[of_part, None] + np.arange(0, width, 4)) // 4)
        asked += len(np.unique(words // 8))
        least += -(-len(words) // 8)
    return asked, asked - least


def signed(x: Values) -> Values:
    return (x + 2**31) % 2**32 - 2**31


def shift_right(name: str, x: Values, bits: Values) -> Values:
    return (signed(x) if ".s" in name else x) >> bits


def compare(name: str, x: Values, y: Values, *_: Values) -> Values:
    relation = name.split(".")[1]
    x, y = signed(x), signed(y)
    orders = {"eq": x == y, "ne": x != y, "lt": x < y, "le": x <= y, "gt": x > y, "ge": x >= y}
    return orders.get(relation, x == x).astype(np.int64)


OPERATIONS: dict[str, Callable[..., Values]] = {
    "mov": lambda _, x, *more: x,  # more where it packs what is no address
    "cvt": lambda _, x: x,
    "shl": lambda _, x, bits: x << bits,
    "shr": shift_right,
    "and": lambda _, x, y: x & y,
    "or": lambda _, x, y: x | y,
    "xor": lambda _, x, y: x ^ y,
    "not": lambda _, x: ~x,
    "add": lambda _, x, y: x + y,
    "sub": lambda _, x, y: x - y,
    "mul": lambda _, x, y: x * y,
    "mad": lambda _, x, y, z: x * y + z,
    "min": lambda _, x, y: np.minimum(signed(x), signed(y)),
    "max": lambda _, x, y: np.maximum(signed(x), signed(y)),
    "bfe": lambda _, x, first, bits: (x >> first) & ((1 << bits) - 1),
    "selp": lambda _, x, y, which: np.where(which != 0, x, y),
    "setp": compare,
}

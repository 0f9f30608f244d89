"""The GPUs that ``python -m bench aot`` compiles for, and what it says of one compiled kernel."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """The usual GPU of a target: its multiprocessors (AMD: compute units), and what the blocks of
    one share.

    Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD
    CDNA 3 ISA guide, section 3.
    """

    multiprocessors: int
    warps: int
    blocks: int
    shared_bytes: int
    reserved_bytes: int = 1 << 10  # of shared memory, a block
    registers: int = 65536  # 32-bit, of all lanes together
    lanes: int = 32

    @property
    def block_bytes(self) -> int:
        """Shared memory that a block may have."""
        return self.shared_bytes - self.reserved_bytes


TARGETS = {  # large GPUs of each generation, and the others, which have the least shared memory
    "sm_80": Target(108, 64, 32, 164 << 10),
    "sm_86": Target(82, 48, 16, 100 << 10),
    "sm_89": Target(128, 48, 24, 100 << 10),
    "sm_90": Target(132, 64, 32, 228 << 10),
    "sm_100": Target(148, 64, 32, 228 << 10),
    "gfx942": Target(304, 32, 16, 64 << 10, 0, registers=4 * 512 * 64, lanes=64),
}
REGISTER_UNIT = 8
"""Registers a lane are given in multiples of this."""


@dataclass(frozen=True)
class Row:
    """One kernel as compiled for one target.

    ``useful`` is the share of the padded tile, samples times columns (j, d), that is not padding;
    ``loops`` the instructions of its loops (``aot_loops``), ``turns`` and ``sectors`` what they ask
    of shared and global memory (``aot_accesses``), where the code could be read.
    """

    backend: str
    kernel: str
    shape: str
    precision: str
    target: str
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix_instructions: int
    useful: float
    loops: str = ""
    turns: str = ""
    sectors: str = ""

    @property
    def shared_share(self) -> float:
        """Share of the shared memory that a block may have; above 1 it can't be launched."""
        return self.shared_bytes / TARGETS[self.target].block_bytes

    @property
    def blocks(self) -> int:
        """Blocks that one multiprocessor holds at a time."""
        limits = TARGETS[self.target]
        rounded = -(-self.registers // REGISTER_UNIT) * REGISTER_UNIT
        by_registers = limits.registers // (max(rounded, 1) * limits.lanes * self.warps)
        by_shared = limits.shared_bytes // max(self.shared_bytes + limits.reserved_bytes, 1)
        return min(limits.blocks, limits.warps // self.warps, by_registers, by_shared)

    @property
    def occupancy(self) -> float:
        """Share of the multiprocessor's warps that are filled."""
        return self.blocks * self.warps / TARGETS[self.target].warps

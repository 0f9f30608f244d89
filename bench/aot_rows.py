"""What ``python -m bench aot`` says of one compiled kernel, and how many of its blocks fit."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Multiprocessor:
    """What the blocks of one multiprocessor (AMD: compute unit) share.

    Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD
    CDNA 3 ISA guide, section 3.
    """

    warps: int
    blocks: int
    registers: int  # 32-bit, for one lane of every warp together times the lanes of a warp
    register_unit: int  # registers a lane are given in multiples of this
    shared_bytes: int
    reserved_bytes: int  # of shared memory, a block
    lanes: int = 32


TARGETS = {
    "sm_80": Multiprocessor(64, 32, 65536, 8, 164 << 10, 1 << 10),
    "sm_86": Multiprocessor(48, 16, 65536, 8, 100 << 10, 1 << 10),
    "sm_89": Multiprocessor(48, 24, 65536, 8, 100 << 10, 1 << 10),
    "sm_90": Multiprocessor(64, 32, 65536, 8, 228 << 10, 1 << 10),
    "sm_100": Multiprocessor(64, 32, 65536, 8, 228 << 10, 1 << 10),
    "gfx942": Multiprocessor(32, 16, 4 * 512 * 64, 8, 64 << 10, 0, lanes=64),
}


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
        limits = TARGETS[self.target]
        return self.shared_bytes / (limits.shared_bytes - limits.reserved_bytes)

    @property
    def blocks(self) -> int:
        """Blocks that one multiprocessor holds at a time."""
        limits = TARGETS[self.target]
        rounded = -(-self.registers // limits.register_unit) * limits.register_unit
        by_registers = limits.registers // (max(rounded, 1) * limits.lanes * self.warps)
        by_shared = limits.shared_bytes // max(self.shared_bytes + limits.reserved_bytes, 1)
        return min(limits.blocks, limits.warps // self.warps, by_registers, by_shared)

    @property
    def occupancy(self) -> float:
        """Share of the multiprocessor's warps that are filled."""
        return self.blocks * self.warps / TARGETS[self.target].warps

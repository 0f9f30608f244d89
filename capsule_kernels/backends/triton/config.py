"""Launch configurations and offset widths: pure functions of sizes, tested without a GPU."""

from dataclasses import dataclass
from functools import lru_cache

MATRIX_ROWS = 16
"""Rows of the matrix instructions' tile, and the shortest contraction that tl.dot takes."""

MAX_TILE = 256
"""Most (j, d) columns of a tile."""

WARP_COLUMNS = 64
"""Columns of a warp: with 16 samples 32 registers of a thread for each of u_hat, V and s."""

MAX_WEIGHTS = 4096
"""Most elements of a tile of weights, (j, d) times k. The last sweep of split float32 keeps 16
bytes of shared memory for each and 128 for each column: 96 KiB; sm_86 and sm_89 have 99."""


STATISTICS_CAPSULES = 16
"""Input capsules of a program that tables softmax statistics."""


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def ceil_div(n: int, divisor: int) -> int:
    return -(-n // divisor)


@dataclass(frozen=True)
class Tile:
    """What a program holds at a time: samples, output capsules and their padded dimensions."""

    BLOCK_B: int
    BLOCK_J: int
    BLOCK_D: int
    BLOCK_K: int


@dataclass(frozen=True)
class Sweep:
    """How one sweep over (b, i) is cut into programs."""

    tile: Tile
    tiles_B: int
    tiles_J: int
    groups: int
    capsules: int
    num_warps: int
    num_stages: int

    @property
    def one_tile(self) -> bool:
        """Whether a program sees all of J: then it takes the softmax by itself."""
        return self.tiles_J == 1

    @property
    def table_size(self) -> int:
        """Elements of a [B, J, D] table padded to whole tiles."""
        return self.tiles_B * self.tiles_J * self.tile.BLOCK_B * self.columns

    @property
    def columns(self) -> int:
        """(j, d) of a tile."""
        return self.tile.BLOCK_J * self.tile.BLOCK_D


def tile_of(J: int, K: int, D: int) -> Tile | None:
    """The tile for a shape, or None where not even one output capsule fits into one."""
    BLOCK_D = power_of_two(D)
    BLOCK_K = max(MATRIX_ROWS, power_of_two(K))
    columns = min(MAX_TILE, MAX_WEIGHTS // BLOCK_K)
    if columns < max(BLOCK_D, MATRIX_ROWS):
        return None
    BLOCK_J = min(power_of_two(J), columns // BLOCK_D)
    return Tile(MATRIX_ROWS, max(BLOCK_J, MATRIX_ROWS // BLOCK_D), BLOCK_D, BLOCK_K)


@lru_cache(maxsize=1024)
def sweep(B: int, I: int, J: int, K: int, D: int, processors: int) -> Sweep:
    """The cut of a sweep for a machine with ``processors`` multiprocessors.

    Too few groups leave multiprocessors idle; but each is one more partial sum that every program
    of the next sweep reads. Cost in the time of one capsule's step, where a step reads 5 KB of
    weights through the L2 and a partial sum of 16 samples 10 KB: the programs of the busiest
    multiprocessor, times the steps and sums of each. One program alone fills two thirds of the
    instruction slots that two fill (a guess, to be measured).
    """
    tile = tile_of(J, K, D)
    assert tile is not None, "unsupported() lets no such shape pass"
    tiles_B, tiles_J = ceil_div(B, tile.BLOCK_B), ceil_div(J, tile.BLOCK_J)
    partial_sum = 2 * min(1, B / tile.BLOCK_B)

    def cost(groups: int) -> float:
        programs = ceil_div(tiles_B * tiles_J * groups, processors)
        step = 1.5 if programs == 1 else 1
        return programs * (step * ceil_div(I, groups) + groups * partial_sum)

    groups = min(range(1, min(I, 2 * processors) + 1), key=cost)
    capsules = ceil_div(ceil_div(I, groups), 2) * 2  # two at a time
    columns = tile.BLOCK_J * tile.BLOCK_D
    return Sweep(
        tile=tile,
        tiles_B=tiles_B,
        tiles_J=tiles_J,
        groups=ceil_div(I, capsules),
        capsules=capsules,
        num_warps=max(1, columns // WARP_COLUMNS),
        num_stages=2,
    )


def step(sweep: Sweep, precision: str, first: bool) -> int:
    """Input capsules that a sweep of the forward takes at a time.

    Two give a warp independent work and share the exchange of the softmax between warps, for 32
    more registers a thread: split float32 has them only in the first sweep, which holds no V, and
    the sweeps of the backward, which hold ds as well, never do.
    """
    return 2 if sweep.one_tile and (precision == "tf32" or first) else 1


@dataclass(frozen=True)
class Split:
    """How the last sweep of the backward is cut: by rows of the weights, then as little as fills.

    ``parts`` programs share the capsules of a row, ``splits`` the batch; every program beyond the
    first of a row costs a partial sum of its dW.
    """

    parts: int
    capsules: int
    splits: int
    batch_tiles: int


def split(rows: int, weight_sharing: int, tiles_B: int, processors: int) -> Split:
    """Two programs for every multiprocessor where there are too few rows."""
    wanted = ceil_div(2 * processors, rows)
    capsules = ceil_div(weight_sharing, min(wanted, weight_sharing))
    parts = ceil_div(weight_sharing, capsules)
    batch_tiles = ceil_div(tiles_B, min(ceil_div(wanted, parts), tiles_B))
    return Split(parts, capsules, ceil_div(tiles_B, batch_tiles), batch_tiles)


def parts_of_product(sweep: Sweep) -> int:
    """Groups of j in W^T du_hat: one for every warp, of four j and of a legal contraction."""
    tile = sweep.tile
    columns = tile.BLOCK_J * tile.BLOCK_D
    return max(1, min(sweep.num_warps, tile.BLOCK_J // 4, columns // MATRIX_ROWS))


def needs_int64(*element_counts: int) -> bool:
    """Whether any tensor has elements beyond the reach of 32-bit offsets (masked ones included)."""
    return max(element_counts) > 2**31 - 2**22

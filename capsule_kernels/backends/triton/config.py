"""Launch configurations and offset widths: pure functions of sizes, tested without a GPU."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

MATRIX_ROWS = 16
"""Rows of the matrix instructions' tile, and the shortest contraction that tl.dot takes."""

MAX_TILE = 256
"""Most (j, d) columns of a tile of [B, J, D], and longest d of a sweep."""

MAX_WEIGHTS = 4096
"""Most elements of W_ij in a sweep, with d and k padded to powers of two."""

WIDE_BLOCK = 64
"""Longest block of d and of k where W_ij does not fit into a tile."""

MAX_DIMENSION = 1 << 20
"""Largest D: squash takes a whole output capsule, and Triton has no larger tiles."""

INPUT_COLUMNS = 32
"""Columns (i, k) of a warp: four capsules of K = 8, as many as a row of a matrix instruction has
threads."""

UNIFORM_ROWS = 32
UNIFORM_COLUMNS = 32
"""Samples and columns (j, d) of a warp in a first sweep without priors. It has registers for 64
samples in TF32, but not with every version of Triton."""

LARGE_BATCH = 256
LARGE_ROWS = 32
LARGE_COLUMNS = 48
LARGE_STEP = 12288
LARGE_SHARED = 140 << 10
"""Of a sweep of the forward over a large batch: samples it has at least, samples and columns (j, d)
of a warp, most weights of a step, and the shared memory that a program takes at most."""

LARGE_UNIFORM_BATCH = 512
LARGE_UNIFORM_ROWS = 64
"""The same of a first sweep without priors."""

GRADIENT_ROWS = 8
GRADIENT_COLUMNS = 48
"""Samples of a tile of the last sweep, and columns (j, d) of one of its warps."""

PARTIAL_GRADIENT = 2
"""What writing and adding a partial dW costs, in batch tiles of the program that makes it: a guess,
which no profile of the whole kernel tells."""

MOST_COUNTED = 16
"""Most parts of a row's gradients that the last program to finish adds by itself."""

PARTIAL_SUM = 1 / 3
LEAST_PARTIAL_SUM = 0.2
"""What adding a partial sum costs: in the time of the work with as many weights, and at least in
that of the work with one capsule's. From the times of small batches on an H200 (docs/kernels.md).
"""

MAX_STEP = 10240
"""Most weights of a step of a sweep: 40 KiB of shared memory, twice."""

SCRATCH = 8 << 10
"""Shared memory of a sweep's program beside what is counted (``sweep_bytes``), at most."""

STATISTICS_STEPS = 4
"""Steps of input capsules of a program that tables softmax statistics."""

MOST_ALONG_AXIS = 65535
"""Most programs along the second and third axis of a grid in CUDA; along the first 2^31 - 1."""

GRID_BLOCK = 1024
"""Elements of a grid of a program that sums the gradients of windows."""


@dataclass(frozen=True)
class Gpu:
    """A device, as far as configurations depend on it."""

    processors: int  # multiprocessors
    hip: bool  # an AMD device
    shared_bytes: int = 64 << 10  # most that a program may take; any GPU grants 64 KiB


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def padded(size: int, least: int = MATRIX_ROWS) -> int:
    """What a tile holds for an axis of this size: a power of two, which is at least ``least``."""
    return max(least, power_of_two(size))


def ceil_div(n: int, divisor: int) -> int:
    return -(-n // divisor)


def is_wide(K: int, D: int) -> bool:
    """Whether one output capsule's weights take several blocks of d and k (``wide.py``)."""
    return padded(D) > MAX_TILE or padded(D) * padded(K) > MAX_WEIGHTS


@dataclass(frozen=True)
class Blocks:
    """What the kernels for such shapes hold at a time."""

    BLOCK_B: int
    BLOCK_D: int
    BLOCK_K: int


def blocks_of(K: int, D: int) -> Blocks:
    return Blocks(MATRIX_ROWS, min(padded(D), WIDE_BLOCK), min(padded(K), WIDE_BLOCK))


@dataclass(frozen=True)
class Warps:
    """What the warps of a sweep's program hold (``sweeps.py``)."""

    WARPS_I: int
    WARPS_J: int
    UNROLL_J: int
    STEP_I: int
    BLOCK_B: int
    BLOCK_D: int
    BLOCK_K: int

    @property
    def number(self) -> int:
        return self.WARPS_I * self.WARPS_J

    @property
    def capsules(self) -> int:
        """Input capsules of a step."""
        return self.WARPS_I * self.STEP_I

    @property
    def output_capsules(self) -> int:
        """Output capsules of a program."""
        return self.WARPS_J * self.UNROLL_J


def states_of(backward: bool, precision: str) -> int:
    """States that are operands of a sweep: V, and ds in the backward; as two in split float32."""
    return (2 if backward else 1) * (2 if precision == "tf32x3" else 1)


def state_columns(backward: bool, precision: str) -> int:
    """Most columns (j, d) of a warp of a sweep, so that its states do not spill.

    With 16 samples a thread has a register for every two columns of each: V and s in the forward;
    V, ds and G in the backward; the low parts of V and ds, too, in split float32.
    """
    if precision == "tf32x3":
        return 32 if backward else 48
    return 48 if backward else 80


def warps_of(J: int, K: int, D: int, columns: int) -> Warps:
    """As few warps for all of J as have ``columns`` enough, and the rest of four along I.

    Where no number of warps has, J is cut into tiles.
    """
    BLOCK_D, BLOCK_K = padded(D), padded(K, MATRIX_ROWS // 4)
    STEP_I = max(1, min(4, INPUT_COLUMNS // BLOCK_K))
    most_weights = MAX_STEP // (STEP_I * BLOCK_K * BLOCK_D)  # of so many output capsules
    number = min(4, power_of_two(most_weights + 1) // 2)

    def unroll(warps: int) -> int:
        return min(max(1, columns // BLOCK_D), most_weights // max(number, warps))

    WARPS_J = next((n for n in (1, 2, 4, 8) if n * unroll(n) >= J), number)
    return Warps(
        WARPS_I=max(1, number // WARPS_J),
        WARPS_J=WARPS_J,
        UNROLL_J=min(unroll(WARPS_J), ceil_div(J, WARPS_J)),
        STEP_I=STEP_I,
        BLOCK_B=MATRIX_ROWS,
        BLOCK_D=BLOCK_D,
        BLOCK_K=BLOCK_K,
    )


def warps_of_uniform(J: int, K: int, D: int) -> Warps:
    """For the first sweep without priors: its coupling is known, so J may be cut as one likes.

    It holds s only, and with 32 samples reads W half as often as with 16.
    """
    few = max(1, min(J, UNIFORM_COLUMNS // power_of_two(D)))
    return replace(warps_of(few, K, D, UNIFORM_COLUMNS), BLOCK_B=UNIFORM_ROWS)


def warps_of_large(B: int, J: int, K: int, D: int, uniform: bool) -> Warps | None:
    """For a sweep of the forward where the batch is large, or None.

    W is then most of what is read: twice the samples share it, in eight warps, which must see all
    of J. Fewer programs and more groups of input capsules would cost a smaller batch more.
    """
    least, rows, most = LARGE_BATCH, LARGE_ROWS, LARGE_COLUMNS
    if uniform:
        least, rows, most = LARGE_UNIFORM_BATCH, LARGE_UNIFORM_ROWS, UNIFORM_COLUMNS
    if least > B:
        return None
    warps = warps_of(J, K, D, most)
    warps = replace(warps, WARPS_I=8 // warps.WARPS_J, BLOCK_B=rows)
    columns = warps.UNROLL_J * warps.BLOCK_D
    step = warps.number * columns * warps.STEP_I * warps.BLOCK_K
    fits = columns <= most and step <= LARGE_STEP
    return warps if fits and warps.output_capsules >= J else None


def sweep_bytes(warps: Warps, stages: int, element_bytes: int, states: int, gpu: Gpu) -> int:
    """Shared memory that a program of a sweep takes, at most.

    On HIP it holds one step of W and u, and registers what is on its way. On CUDA steps are on
    their way in all stages but one. States that no other warp needs are
    operands, which Triton 3.9 keeps in shared memory and 3.6 in registers. In float64 both keep
    every warp's, and one more copy of a step. Long steps and float64 exchange more between threads.
    The statistics kernel, which has one product less, takes no more.
    """
    columns = warps.STEP_I * warps.BLOCK_K
    W = warps.number * warps.UNROLL_J * warps.BLOCK_D * columns
    u = warps.WARPS_I * warps.BLOCK_B * columns
    if gpu.hip:
        return element_bytes * (W + u)
    state = warps.output_capsules * warps.BLOCK_B * warps.BLOCK_D
    exchanged = warps.number * MATRIX_ROWS * columns
    if element_bytes == 8:
        kept = states * warps.WARPS_I * state
        return 8 * (stages * (W + u) + kept) + max(SCRATCH, 8 * exchanged)
    kept = states * state if warps.WARPS_I == 1 else 0
    scratch = max(SCRATCH, 4 * exchanged) if columns > INPUT_COLUMNS else SCRATCH
    return (stages - 1) * element_bytes * (W + u) + 4 * kept + scratch


def smaller(warps: Warps) -> Iterator[Warps]:
    """The warps, then ever less: shorter steps, fewer input capsules, and tiles of J at last, which
    take the softmax from statistics."""
    outputs = [(warps.WARPS_J, unroll) for unroll in halves(warps.UNROLL_J)]
    outputs += [(number, 1) for number in halves(warps.WARPS_J)[1:]]
    for (WARPS_J, UNROLL_J), WARPS_I, STEP_I in product(
        outputs, halves(warps.WARPS_I), halves(warps.STEP_I)
    ):
        if STEP_I == warps.STEP_I or STEP_I * warps.BLOCK_K >= MATRIX_ROWS:
            yield replace(warps, WARPS_I=WARPS_I, WARPS_J=WARPS_J, UNROLL_J=UNROLL_J, STEP_I=STEP_I)


def halves(n: int) -> list[int]:
    """n, half of it and so on down to 1."""
    return [n] if n == 1 else [n, *halves(ceil_div(n, 2))]


def fitting(warps: Warps, element_bytes: int, states: int, gpu: Gpu) -> tuple[Warps, int] | None:
    """The warps, or what fits of them into shared memory, and for how many stages; or None."""
    for fewer in smaller(warps):
        for stages in (2,) if gpu.hip else (3, 2):
            if sweep_bytes(fewer, stages, element_bytes, states, gpu) <= gpu.shared_bytes:
                return fewer, stages
    return None


def warps_of_gradients(J: int, K: int, D: int) -> Warps:
    """For the last sweep of the backward, whose programs hold 8 samples of two arrays.

    A thread has a register for every two of these columns of dW, and two for each of P.
    """
    warps = warps_of(J, K, D, GRADIENT_COLUMNS)
    return replace(warps, WARPS_I=1, BLOCK_B=GRADIENT_ROWS)


def gradient_bytes(warps: Warps, element_bytes: int, precision: str, gpu: Gpu) -> int:
    """Shared memory that a program of the last sweep takes, at most: W, and in float64 states."""
    columns = warps.STEP_I * warps.BLOCK_K
    W = warps.output_capsules * columns * warps.BLOCK_D
    if gpu.hip:
        return element_bytes * W
    exchanged = warps.number * GRADIENT_ROWS * columns
    if element_bytes == 8:
        states = 2 * warps.output_capsules * GRADIENT_ROWS * warps.BLOCK_D
        return 8 * (W + states + exchanged) + SCRATCH
    return 4 * (W * (2 if precision == "tf32x3" else 1) + exchanged) + SCRATCH


def fitting_gradients(warps: Warps, element_bytes: int, precision: str, gpu: Gpu) -> Warps | None:
    """The warps of the last sweep, or what fits of them into shared memory, or None."""
    for fewer in smaller(warps):
        if gradient_bytes(fewer, element_bytes, precision, gpu) <= gpu.shared_bytes:
            return fewer
    return None


@lru_cache(maxsize=1024)
def least_bytes(J: int, K: int, D: int, element_bytes: int, precision: str, gpu: Gpu) -> int:
    """Shared memory that the smallest programs take for a shape, forward or backward."""
    if is_wide(K, D):
        return 0
    sweeps = (
        min(
            sweep_bytes(warps, 2, element_bytes, states_of(backward, precision), gpu)
            for warps in smaller(warps_of(J, K, D, state_columns(backward, precision)))
        )
        for backward in (False, True)
    )
    gradients = (
        gradient_bytes(warps, element_bytes, precision, gpu)
        for warps in smaller(warps_of_gradients(J, K, D))
    )
    return max(*sweeps, min(gradients))


def table_size(B: int, J: int, warps: Warps) -> int:
    """Elements of one iteration's table of ds and V for the last sweep, both orders of it."""
    padded_J = ceil_div(J, warps.output_capsules) * warps.output_capsules
    return ceil_div(B, warps.BLOCK_B) * warps.BLOCK_B * padded_J * warps.BLOCK_D * 4


def grid(tiles_B: int, groups: int, tiles: int) -> tuple[tuple[int, int, int], bool]:
    """A grid of programs, and whether it is FLAT (``blocks.tiles_of_program``).

    The first axis, whose neighbours run side by side, has the batch tiles: they read the same
    weights. The second has the groups of a ``sweep``, which are few. The third has other tiles,
    unless they are more than CUDA allows there.
    """
    if tiles > MOST_ALONG_AXIS:
        return (tiles_B * tiles, groups, 1), True
    return (tiles_B, groups, tiles), False


@dataclass(frozen=True)
class Sweep:
    """How one sweep over (b, i) is cut into programs."""

    warps: Warps
    stages: int  # of its load pipeline
    tiles_B: int
    tiles_J: int
    groups: int
    capsules: int

    @property
    def one_tile(self) -> bool:
        """Whether a program sees all of J: then it takes the softmax by itself."""
        return self.tiles_J == 1


@lru_cache(maxsize=1024)
def sweep(B: int, I: int, J: int, K: int, warps: Warps, stages: int, processors: int) -> Sweep:
    """The cut of a sweep for a machine with ``processors`` multiprocessors.

    Too few groups leave multiprocessors idle; but each is one more partial sum that every program
    of the next sweep reads. Cost, in the time of one capsule: the programs of the busiest
    multiprocessor, times the capsules and partial sums of each. Four warps alone fill two thirds of
    the instruction slots that eight fill: a guess that measurements allow. On an H200
    (docs/kernels.md) a scheduler issues in 0.15 to 0.20 of the cycles with one warp and in 0.15 to
    0.28 with two; one and the same sweep of the backward in 0.17 and in 0.23.
    """
    tiles_B, tiles_J = ceil_div(B, warps.BLOCK_B), ceil_div(J, warps.output_capsules)
    partial_sum = max(LEAST_PARTIAL_SUM, PARTIAL_SUM * min(B, warps.BLOCK_B) / K)

    def cut(groups: int) -> int:
        """Capsules of a group: whole steps."""
        return ceil_div(ceil_div(I, groups), warps.capsules) * warps.capsules

    def cost(groups: int) -> float:
        programs = ceil_div(tiles_B * tiles_J * groups, processors)
        step = 1.5 if programs * warps.number <= 4 else 1
        return programs * (step * cut(groups) + groups * partial_sum)

    capsules = cut(min(range(1, min(I, 2 * processors) + 1), key=cost))
    return Sweep(warps, stages, tiles_B, tiles_J, ceil_div(I, capsules), capsules)


@dataclass(frozen=True)
class Split:
    """How the last sweep of the backward is cut.

    The first ``whole`` rows of the weights take a program each. Of the others the capsules are cut
    into ``parts`` and the batch into ``pieces``; each leaves a part of its row's gradients.
    """

    whole: int
    cut: int  # rows after them, times their parts
    parts: int
    capsules: int
    pieces: int
    batch_tiles: int
    counts: bool  # whether programs may count who of them is the last

    @property
    def rows(self) -> int:
        return self.whole + self.cut // self.parts

    def cut_of(self, length: int) -> int:
        """How much of a gradient's first axis, ``length`` in all, belongs to rows that are cut."""
        return length - min(length, self.whole * ceil_div(length, self.rows))

    @property
    def share(self) -> dict[str, int]:
        """What a program needs to know to find its share (``parts.py``)."""
        return {name: value for name, value in vars(self).items() if name != "counts"}

    @property
    def programs(self) -> int:
        return self.whole + self.cut * self.pieces

    @property
    def contributors(self) -> int:
        """Programs that contribute to a row that is cut."""
        return self.parts * self.pieces

    @property
    def counted(self) -> bool:
        """Whether the last of these to finish can add their parts, without a launch of its own."""
        return self.counts and 1 < self.contributors <= MOST_COUNTED


@lru_cache(maxsize=1024)
def split(
    rows: int, weight_sharing: int, step: int, tiles_B: int, processors: int, counts: bool
) -> Split:
    """Two programs for every multiprocessor, and as even a load as pays for the parts it leaves.

    With few rows all are cut. With many, and where programs may count who is the last
    (``counts``), only those that are left when each multiprocessor has had its two programs as
    often as there are enough rows.
    """
    places = 2 * processors
    steps = ceil_div(weight_sharing, step)
    steps_of_part = ceil_div(steps, min(ceil_div(places, rows), steps))
    parts = ceil_div(steps, steps_of_part)
    units = rows * parts

    def cut(whole: int, most: int) -> Split:
        batch_tiles = ceil_div(tiles_B, min(most, tiles_B))
        pieces = ceil_div(tiles_B, batch_tiles)
        capsules = steps_of_part * step
        return Split(whole, units - whole, parts, capsules, pieces, batch_tiles, counts)

    def cost(split: Split) -> float:
        """Steps of the busiest multiprocessor, with what a part costs for each of its pieces.

        One program alone fills two thirds of the instruction slots that two fill, as in ``sweep``.
        """
        part = PARTIAL_GRADIENT if split.contributors > 1 else 0
        piece = steps_of_part * split.batch_tiles + part
        if split.whole:
            return split.whole / processors * steps_of_part * tiles_B + 2 * piece
        programs = ceil_div(split.programs, processors)
        return (1.5 if programs == 1 else programs) * piece

    most = min(8 * ceil_div(places, units), tiles_B)
    choices = [cut(0, pieces) for pieces in range(1, most + 1)]
    left = units % places
    if counts and parts == 1 and units > left > 0:
        choices.append(cut(units - left, min(places // left, MOST_COUNTED)))
    return min(choices, key=cost)


def needs_int64(*element_counts: int) -> bool:
    """Whether any tensor has elements beyond the reach of 32-bit offsets (masked ones included)."""
    return max(element_counts) > 2**31 - 2**22

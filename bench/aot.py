"""``python -m bench aot``: the GPU kernels compiled ahead of time, without a GPU.

For every kernel that a forward and backward launch: registers, spilled bytes, shared memory,
matrix instructions, occupancy, how much of the padded tile is not padding, the instructions of the
loops that multiply matrices, and for Triton's kernels for NVIDIA the turns that these take in
shared memory (conflicts) and the sectors that they ask for of global memory (excess).
"""

import argparse
import sys
from collections.abc import Iterator
from itertools import product

from rich.console import Console

from . import aot_cuda, aot_triton
from .aot_cuda import OUTPUTS
from .aot_rows import TARGETS, Row
from .options import INTERRUPTED, positive
from .shapes import MNIST, SHAPES
from .tables import Table

BY_NAME = {shape.name.split()[0]: shape for shape in SHAPES}
"""The shapes by the first word of their names."""
KNOWN_SPILLS = {
    ("routing_gradients_kernel", precision, "sm_100"): 8
    for precision in ("TF32", "bfloat16", "float16")
}
KNOWN_SPILLS |= {("routing_forward_kernel", "float32", target): 8 for target in ("sm_86", "sm_89")}
KNOWN_SPILLS |= {
    (OUTPUTS, precision, target): 32
    for precision in ("TF32", "bfloat16", "float16")
    for target in ("sm_90", "sm_100")
}
"""Bytes a thread that --check allows, of a kernel, precision and target: a register that is saved
before the last sweep's loop and restored behind it, one of a sweep, and what loops over units count
by."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape", nargs="+", choices=BY_NAME, default=list(BY_NAME), help="shapes (all)"
    )
    parser.add_argument(
        "--target",
        nargs="+",
        choices=TARGETS,
        default=list(TARGETS),
        help=f"targets ({', '.join(TARGETS)})",
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=aot_triton.PRECISIONS,
        default=["float32", "TF32", "bfloat16"],
        help="precisions (float32, TF32 and bfloat16)",
    )
    parser.add_argument("--batch", type=positive, default=128, metavar="B", help="batch size (128)")
    parser.add_argument(
        "--iterations", type=positive, default=3, metavar="R", help="iterations (3)"
    )
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument(
        "--check",
        action="store_true",
        help="exit with 1 if a kernel of the MNIST shape spills more than is known of it, or any "
        "takes more shared memory than there is",
    )


def compiled(options: argparse.Namespace) -> Iterator[Row]:
    for name, target, precision in product(options.shape, options.target, options.precision):
        call = (BY_NAME[name], options.batch, options.iterations, precision, target)
        yield from aot_triton.rows(*call)
        if aot_cuda.missing() is None:
            yield from aot_cuda.rows(*call)


def table(rows: list[Row]) -> Table:
    found = Table(
        "Kernels compiled ahead of time",
        ["backend", "kernel", "shape", "precision", "target", "warps", "registers", "spilled",
         "shared", "matrix", "blocks", "occupancy", "useful", "loops", "turns", "sectors"],
    )  # fmt: skip
    for row in rows:
        found.rows.append([
            row.backend, row.kernel, row.shape, row.precision, row.target, str(row.warps),
            str(row.registers), f"{row.spilled_bytes} B",
            f"{row.shared_bytes} B ({row.shared_share:.0%})",
            str(row.matrix_instructions), str(row.blocks), f"{row.occupancy:.0%}",
            f"{row.useful:.0%}", row.loops, row.turns, row.sectors,
        ])  # fmt: skip
    return found


def run(options: argparse.Namespace) -> int:
    """Compile, print, and with --check judge; 2 where nothing can be compiled."""
    reason = aot_triton.missing()
    if reason is not None:
        print(f"aot: {reason}", file=sys.stderr)
        return 2
    progress = Console(stderr=True)
    if (without_cuda := aot_cuda.missing()) is not None:
        progress.print(f"aot: the CUDA kernels are left out: {without_cuda}")
    rows: list[Row] = []
    interrupted = False
    try:
        with progress.status("compiling") as status:
            for row in compiled(options):
                rows.append(row)
                status.update(
                    f"{len(rows)}: {row.kernel}, {row.shape}, {row.precision}, {row.target}"
                )
    except KeyboardInterrupt:
        progress.print("interrupted: here is what was compiled")
        interrupted = True
    if options.markdown:
        print(table(rows).markdown())
    else:
        Console(width=None if sys.stdout.isatty() else 200).print(table(rows).rich())
    spilling = [row for row in rows if row.shape == MNIST.name and row.spilled_bytes]
    for row in spilling:
        progress.print(
            f"{row.kernel} spills {row.spilled_bytes} bytes ({row.precision}, {row.target})"
        )
    too_large = [row for row in rows if row.shared_share > 1]
    for row in too_large:
        progress.print(
            f"{row.kernel} takes {row.shared_bytes} bytes of shared memory, more than {row.target} "
            f"has ({row.shape}, {row.precision})"
        )
    if interrupted:
        return INTERRUPTED
    too_much = [
        row.spilled_bytes > KNOWN_SPILLS.get((row.kernel, row.precision, row.target), 0)
        for row in spilling
    ]
    return int(options.check and (bool(too_large) or any(too_much)))

"""Command-line options that the subcommands share."""

import argparse
from pathlib import Path

import torch

from model.outputs import reason_against

from .machine import processors
from .shapes import MNIST

INTERRUPTED = 130
"""The exit code after Ctrl-C."""


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


def minutes(text: str) -> float:
    """A time of more than nothing, for argparse."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be more than 0, got {value:g}")
    return value


def threads(text: str) -> int:
    """As many as there are processors, at most: with a million OpenMP ends the process."""
    value, most = positive(text), processors()
    if value > most:
        raise argparse.ArgumentTypeError(f"must be {most} or less (processors), got {value}")
    return value


USUAL_ITERATIONS = 3


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def reason_against_device(device: str) -> str | None:
    if device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: torch sees no GPU here"
    return None


def common_arguments() -> argparse.ArgumentParser:
    """Where to measure, and where the results go. Commands add what makes a difference to them; of
    the rest they have what is usual."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default=default_device(),
        help="where to measure (default: a GPU if there is one)",
    )
    parser.add_argument("--threads", type=threads, help="CPU threads (default: torch's choice)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records to FILE")
    parser.add_argument("--markdown", action="store_true", help="print tables as Markdown")
    parser.set_defaults(
        precision="ieee", iterations=USUAL_ITERATIONS, rounds=5, quick=False, plots=None, shape=None
    )
    return parser


def add_plots(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plots", type=Path, metavar="FOLDER", help="draw plots of the MNIST shape into FOLDER"
    )


def add_iterations(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--iterations",
        type=positive,
        metavar="R",
        help=f"routing iterations ({USUAL_ITERATIONS})",
    )


def add_precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        choices=("ieee", "tf32"),
        help="true float32 products (default), or TF32 where the hardware has it",
    )


def add_rounds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=positive, help="rounds over all variants (5)")


def add_quick(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--quick", action="store_true", help=f"fewer {what}")


def reason_against_options(options: argparse.Namespace) -> str | None:
    """Why what is asked for can't be had, or would make no difference, or None."""
    if reason := reason_against_device(options.device):
        return reason
    if options.device == "cpu" and options.precision == "tf32":
        return "--precision tf32: only GPUs have it"
    if options.json and (reason := reason_against(options.json)):
        return f"--json {options.json}: {reason}"
    if options.plots and options.shape and MNIST.name not in options.shape:
        return f"--plots: they are of the shape {MNIST.name}, which --shape leaves out"
    if options.plots and (reason := reason_against_folder(options.plots)):
        return f"--plots {options.plots}: {reason}"
    return None


def reason_against_folder(path: Path) -> str | None:
    """Why a folder can't be made or written into, as far as can be told before."""
    if path.exists() and not path.is_dir():
        return "it is no folder"
    return reason_against(path / "plot.svg" if path.is_dir() else path)


def add_peers_arguments(parser: argparse.ArgumentParser, default: str = "all") -> None:
    """Which peers to measure: see ``peers.chosen_peers``."""
    parser.add_argument(
        "--peers",
        choices=("all", "eager", "none"),
        default=default,
        help=f"which peers to measure beside the fused backends ({default}; compiling takes time)",
    )
    parser.add_argument(
        "--max-autotune",
        action=argparse.BooleanOptionalAction,
        help="torch.compile(mode='max-autotune') as well (default: on a GPU)",
    )

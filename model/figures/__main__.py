"""``python -m model.figures RUN...``: draw the paper's figures from trained networks."""

import argparse
import io
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure

from .. import checkpoint as checkpoints
from ..capsnet import CapsNet
from ..commands import add_data_flags, add_device_flags, open_dataset
from ..environment import choose_device
from ..errors import UserError, run_command
from ..networks import restored
from ..outputs import write_atomically, writing
from .decoded import perturbations, reconstructions, segmentations
from .equivariance import equivariance
from .routing import coupling_maps, error_by_iterations
from .trained import Trained

NEEDS_DECODER: dict[str, Callable[[Trained], Figure]] = {
    "reconstructions": reconstructions,
    "perturbations": perturbations,
    "segmentations": segmentations,
}
ANY_CAPSNET: dict[str, Callable[[Trained], Figure]] = {
    "couplings": coupling_maps,
    "equivariance": equivariance,
}
NAMES = (*NEEDS_DECODER, *ANY_CAPSNET, "iterations")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m model.figures", description=__doc__)
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories or weights")
    p.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    p.add_argument("--save-dir", type=Path, metavar="DIR", help="default: the first run's")
    add_data_flags(p)
    add_device_flags(p)
    return p


def load_trained(run: Path, arguments: argparse.Namespace, device: torch.device) -> Trained:
    state = checkpoints.load(run)
    network = restored(state, run, device, arguments.backend)
    if not isinstance(network, CapsNet):
        kind = network.architecture.network
        raise UserError(f"{run}: figures need a capsule network, this is a {kind}")
    dataset = open_dataset(state.config, arguments)
    checkpoints.check_data(state, dataset, run)
    name = checkpoints.short_name(run)
    return Trained(name, state.config, network, dataset.test.to(device), state.classes)


def wanted(trained: Trained, only: list[str] | None) -> list[str]:
    """Which figures to draw; UserError for one that was asked for and can't be drawn."""
    reasons = {}
    if trained.network.decoder is None:
        reasons = dict.fromkeys(NEEDS_DECODER, "its network has no decoder")
    elif not trained.config.pairs:
        reasons = {"segmentations": "it shows overlapping pairs"}
    for name in only or ():
        if name in reasons:
            raise UserError(f"--only {name} can't be drawn of {trained.name}: {reasons[name]}")
    return [name for name in NAMES if (name in only if only else name not in reasons)]


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    device = choose_device(arguments.device)
    runs = [load_trained(run, arguments, device) for run in arguments.runs]
    first = arguments.runs[0]
    directory = arguments.save_dir or (first if first.is_dir() else first.parent)
    names = wanted(runs[0], arguments.only)
    with writing(f"--save-dir {directory}"):
        directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        buffer = io.BytesIO()
        with matplotlib.rc_context({"text.parse_math": False}):  # "$" in a name is no formula
            if name == "iterations":
                figure = error_by_iterations(runs)
            else:
                figure = (NEEDS_DECODER | ANY_CAPSNET)[name](runs[0])
            figure.savefig(buffer, format="png", dpi=150)
        path = directory / f"figure-{name}.png"
        write_atomically(path, buffer.getvalue())
        print(path)
    return 0


if __name__ == "__main__":
    run_command(main)

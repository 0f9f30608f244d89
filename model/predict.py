"""``python -m model.predict --weights RUN IMAGE...``: what a network sees in anybody's pictures."""

import argparse
import json
from pathlib import Path

import torch
from rich.table import Table

from . import checkpoint as checkpoints
from .capsnet import CapsNet
from .commands import add_device_flags, table_console
from .data import NATIVE_SIZES, Split
from .data.pictures import read_picture
from .drawing import reconstruction_rows, save_png
from .environment import choose_device
from .errors import UserError, run_command
from .evaluation import scores_of
from .networks import restored
from .outputs import check_writable
from .views import central_views, show

BEST = 3
"""How many classes are shown for a picture."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m model.predict", description=__doc__)
    p.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="picture files")
    p.add_argument("--weights", type=Path, required=True, metavar="RUN", help="run or its weights")
    p.add_argument("--invert", action="store_true", help="for dark strokes on bright paper")
    p.add_argument("--reconstructions", type=Path, metavar="FILE", help="draw them into a PNG")
    p.add_argument("--json", action="store_true", help="one JSON object a picture")
    add_device_flags(p)
    return p


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    check_writable("--reconstructions", arguments.reconstructions)
    device = choose_device(arguments.device)
    state = checkpoints.load(arguments.weights)
    config, a = state.config, state.config.architecture
    if a.in_channels not in (1, 3):
        raise UserError(
            f"{arguments.weights}: sees images of {a.in_channels} channels; pictures have 1 or 3"
        )
    network = restored(state, arguments.weights, device, arguments.backend)
    if arguments.reconstructions and not (isinstance(network, CapsNet) and network.decoder):
        raise UserError(f"--reconstructions: the network in {arguments.weights} has no decoder")

    # Like the data's own images, of which the network sees a window, or which lie on its canvas.
    size = NATIVE_SIZES.get(config.dataset, a.image_size)
    pixels = torch.stack(
        [read_picture(p, a.in_channels, size, arguments.invert) for p in arguments.images]
    )
    split = Split(pixels, torch.zeros(len(pixels), dtype=torch.long)).to(device)
    # Central on a canvas, too: what is seen in a picture doesn't depend on the others beside it.
    views = central_views(config, split)
    scores, _ = scores_of(network, config, split, views)
    objects = 2 if config.pairs else 1
    if a.network != "capsnet":
        scores = scores.sigmoid() if config.pairs else scores.softmax(-1)
    values, order = scores.topk(min(BEST, a.classes))
    title = "capsule lengths" if a.network == "capsnet" else "probabilities"
    table = Table("image", "classes" if objects == 2 else "class", title, box=None)
    for path, found, value in zip(arguments.images, order.tolist(), values.tolist(), strict=True):
        names = [state.classes[j] for j in found]
        best = dict(zip(names, value, strict=True))
        if arguments.json:
            print(json.dumps({"image": str(path), "classes": names[:objects], "scores": best}))
        shown = ", ".join(f"{name} {x:.2f}" for name, x in best.items())
        table.add_row(str(path), " and ".join(names[:objects]), shown)
    if not arguments.json:
        table_console().print(table)
    if isinstance(network, CapsNet) and arguments.reconstructions:
        batch = show(config, split, views)._replace(labels=order[:, :objects])
        save_png(arguments.reconstructions, reconstruction_rows(network, batch))
    return 0


if __name__ == "__main__":
    run_command(main)

"""The command line of training: every flag, and the configuration that results."""

import argparse
import time
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from .commands import add_data_flags, add_device_flags
from .config import ARCHITECTURE_FLAGS, Config, Schedule, flag
from .data import DATASETS
from .errors import UserError, require
from .experiments import EXPERIMENTS

FIELDS = {field.name for field in fields(Config)} | set(ARCHITECTURE_FLAGS)
"""Of Config and Architecture, some with flags; all other flags say where and how a run goes on."""

CHANGEABLE = ("epochs", "backend")
"""Fields of Config that a resumed run may change."""

WITHOUT_ROUTING = {
    "routings": "no routing",
    "backend": "no routing",
    "bias": "no class capsules",
    "margin": "no margin loss",
    "lam_recon": "no decoder",
}
"""Fields of Config and Architecture that mean nothing to a plain network, and what it lacks."""

OF_THE_DATA = ("classes", "in_channels")
"""Fields of Architecture that a run takes from its data, whatever its experiment says."""


def parser() -> argparse.ArgumentParser:
    """Of FIELDS those that are not given are absent from the result, so that resuming can tell."""
    p = argparse.ArgumentParser(
        prog="python -m model.train",
        description="Train a capsule network (Sabour, Frosst, Hinton 2017).",
        argument_default=argparse.SUPPRESS,
    )
    flag_pair = argparse.BooleanOptionalAction
    run = p.add_argument_group("run", argument_default=None)
    run.add_argument("--experiment", choices=EXPERIMENTS, metavar="NAME", help="see --list")
    run.add_argument("--list", action="store_true", help="show the experiments and leave")
    run.add_argument("--save-dir", type=Path, metavar="DIR", help="default: runs/NAME-DATE-TIME")
    run.add_argument("--weights", type=Path, metavar="FILE", help="start from these weights")
    run.add_argument("--resume", type=Path, metavar="DIR", help="go on with the run saved in DIR")
    run.add_argument("--max-minutes", type=float, help="save and stop after this time")
    run.add_argument(
        "--checkpoint-minutes", type=float, default=5.0, help="save this often (default 5)"
    )
    add_device_flags(run, backend=argparse.SUPPRESS)
    run.add_argument("--cuda-graph", action="store_true", help="capture the step in a CUDA graph")

    data = p.add_argument_group("data")
    data.add_argument("--dataset", choices=DATASETS, metavar="NAME", help=", ".join(DATASETS))
    add_data_flags(data)
    data.add_argument("--shift-pixels", type=int, help="largest random shift of an image")
    data.add_argument("--image-size", type=int, help="side of what the network sees, in pixels")
    data.add_argument("--in-channels", type=int, choices=(1, 3), help="own pictures: grey, colour")

    train = p.add_argument_group("training (defaults are the experiment's)")
    train.add_argument("--epochs", type=int, help="0 only tests")
    train.add_argument("--batch-size", type=int)
    train.add_argument("--accumulate", type=int, metavar="N", help="work a batch off in N parts")
    train.add_argument("--lr", type=float, help="learning rate of Adam")
    train.add_argument("--lr-schedule", choices=get_args(Schedule))
    train.add_argument("--lr-decay", type=float, help="factor an epoch (or --lr-decay-steps)")
    train.add_argument("--lr-decay-steps", type=int)
    train.add_argument("--warmup-steps", type=int, help="over which the rate rises from 0")
    train.add_argument("--lam-recon", type=float, help="weight of the summed squared error")
    train.add_argument("--margin", choices=("paper", "authors"), help="form of the margin loss")
    train.add_argument("--routings", type=int, help="routing iterations")
    train.add_argument("--bias", action=flag_pair, help="of class capsules, as the authors'")
    train.add_argument("--seed", type=int)
    train.add_argument("--stop-accuracy", type=float, help="end once the test accuracy is this")
    train.add_argument("--amp", action=flag_pair, help="bfloat16 autocast")
    train.add_argument("--tf32", action=flag_pair, help="TF32 tensor cores for float32 products")
    train.add_argument("--compile", action=flag_pair, help="torch.compile")
    return p


class Arguments(argparse.Namespace):
    """A parsed command line: what is none of FIELDS as attributes, and ``changes``."""

    changes: dict[str, Any]
    """Those of FIELDS that were given."""


def parse(argv: list[str] | None = None) -> Arguments:
    """A command line; SystemExit (2) for unknown flags, UserError for a time that can't be one and
    for what a resumed run has already."""
    given = vars(parser().parse_args(argv))
    changes = {name: given.pop(name) for name in list(given) if name in FIELDS}
    for name in ("max_minutes", "checkpoint_minutes"):
        minutes = given[name]
        require(minutes is None or minutes >= 0, flag(name), "be at least 0", minutes)
    for name in ("save_dir", "weights"):
        if given["resume"] is not None and given[name] is not None:
            raise UserError(f"{flag(name)} can't be given with --resume: the run has its own")
    return Arguments(**given, changes=changes)


def new_config(arguments: Arguments) -> Config:
    """The configuration of a new run: the experiment's, changed by the flags given."""
    changes = arguments.changes
    name = arguments.experiment or changes.get("dataset", "digits")
    config = EXPERIMENTS[name].config.replaced(changes)
    config.check()
    check_meaning(changes, config)
    return config


def check_meaning(changes: dict[str, Any], config: Config) -> None:
    """UserError if a flag was given that would do nothing in a run of this configuration."""
    network = config.architecture.network
    reasons = {} if network == "capsnet" else {
        name: f"the network is a {network}: it has {lacks}"
        for name, lacks in WITHOUT_ROUTING.items()
    }  # fmt: skip
    if config.dataset != "folder":
        reasons["in_channels"] = f"the images of {config.dataset} have their own"
    if config.lr_schedule == "linear":
        reasons["lr_decay"] = "with the linear --lr-schedule the rate falls to 0"
    if config.lr_schedule != "steps":
        reasons["lr_decay_steps"] = f"it is for --lr-schedule steps, this is {config.lr_schedule}"
    for name in changes:
        if name in reasons:
            raise UserError(f"{flag(name)} would do nothing here: {reasons[name]}")


def resumed_config(arguments: Arguments, stored: Config) -> Config:
    """The configuration of a saved run; flags that would make it another run are refused."""
    wanted = stored.replaced(arguments.changes)
    wanted.check()
    if stored.lr_schedule == "linear" and wanted.epochs != stored.epochs:
        raise UserError(
            f"--epochs {wanted.epochs} can't be given with this --resume: the learning rate of the "
            f"run falls to 0 over its {stored.epochs} epochs"
        )
    for name, value in arguments.changes.items():
        if name not in CHANGEABLE and stored.replaced({name: value}) != stored:
            raise UserError(
                f"{flag(name)} {value} differs from the configuration of the run saved in "
                f"{arguments.resume}; only {' and '.join(map(flag, CHANGEABLE))} may change"
            )
    check_meaning(arguments.changes, wanted)
    if arguments.experiment is not None:
        experiment = EXPERIMENTS[arguments.experiment].config.replaced(arguments.changes)
        theirs = settings(stored)
        for name, value in settings(experiment).items():
            if value != theirs[name]:
                raise UserError(
                    f"--experiment {arguments.experiment} is not the run saved in "
                    f"{arguments.resume}: its {name} is {value}, that of the run {theirs[name]}; "
                    "--resume needs no --experiment"
                )
    return wanted


def settings(config: Config) -> dict[str, Any]:
    """What a resumed run has in common with the experiment that is named, field by field."""
    values = config.to_dict()
    values = values.pop("architecture") | values
    return {k: v for k, v in values.items() if k not in (*CHANGEABLE, *OF_THE_DATA)}


def default_directory(arguments: Arguments, config: Config) -> Path:
    """A fresh directory for a run that was given none."""
    name = arguments.experiment or config.dataset
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"

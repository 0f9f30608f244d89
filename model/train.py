"""``python -m model.train``: train a network, say how well it does, save everything.

Leaves in the run's directory: ``metrics.jsonl``, ``checkpoint.safetensors`` (to resume),
``weights.safetensors`` (to evaluate and predict), ``reconstructions.png``, TensorBoard events.
"""

import shlex
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from . import arguments as command_line
from . import checkpoint as checkpoints
from .arguments import Arguments
from .capsnet import CapsNet
from .commands import open_dataset, plain_console, table_console
from .config import Config
from .data import Dataset
from .directory import PICTURE, held, make_new
from .distributed import World, join
from .drawing import reconstruction_rows, save_png
from .environment import description
from .errors import UserError, run_command
from .experiments import EXPERIMENTS
from .fit import Fit, Outcome
from .interrupt import Interrupted, Interruption
from .metrics import MetricsLog
from .networks import build, check_backend
from .trainer import Trainer

SHOWN = 20
"""How many test images the picture of reconstructions shows."""


def main(argv: list[str] | None = None) -> int:
    arguments = command_line.parse(argv)
    if arguments.list:
        list_experiments()
        return 0
    world = join(arguments.device)
    with ExitStack() as stack:
        with world.together():
            trainer = prepare(arguments, world)
        with world.together():
            if world.is_main:
                if arguments.resume is None and arguments.save_dir is None:
                    trainer.directory = make_new(trainer.directory)
                stack.enter_context(held(trainer.directory, fresh=arguments.resume is None))
        console = plain_console(stderr=True, soft_wrap=True, quiet=not world.is_main)
        code = train(trainer, arguments, console)
        world.meet()
        return code


def prepare(arguments: Arguments, world: World) -> Trainer:
    """Everything that can go wrong before anything is written."""
    device, state = world.device, None
    if arguments.resume is not None:
        state = checkpoints.load(arguments.resume)
        if "progress.sums" not in state.tensors:
            raise UserError(
                f"--resume {arguments.resume}: weights alone; --weights starts a new run from them"
            )
        config = command_line.resumed_config(arguments, state.config)
        directory = arguments.resume if arguments.resume.is_dir() else arguments.resume.parent
    else:
        config = command_line.new_config(arguments)
        directory = arguments.save_dir or command_line.default_directory(arguments, config)
    if config.batch_size % (world.size * config.accumulate):
        raise UserError(
            f"--batch-size must be a multiple of {world.size} processes times --accumulate "
            f"{config.accumulate}, got {config.batch_size}"
        )
    if arguments.cuda_graph and (device.type != "cuda" or world.size > 1 or config.compile):
        raise UserError("--cuda-graph needs one process on one GPU, without --compile")
    dataset = open_dataset(config, arguments).to(device)
    if state is not None:
        checkpoints.check_data(state, dataset, arguments.resume)
        checkpoints.check_same_data(state, dataset, arguments.resume)
    config = fitted(config, dataset)
    check_backend(config.backend, device, config.architecture)
    torch.backends.cudnn.benchmark = True  # a step's shapes are those of all steps
    if config.tf32:
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(config.seed)
    model = build(config.architecture, config.backend)
    if arguments.weights is not None:
        checkpoints.restore_model(model, checkpoints.load(arguments.weights), arguments.weights)
    trainer = Trainer(config, model, dataset, directory, world, arguments.cuda_graph)
    if state is not None:
        trainer.restore(state, arguments.resume)
    return trainer


def fitted(config: Config, dataset: Dataset) -> Config:
    """With as many classes and channels as the data has."""
    architecture = replace(
        config.architecture,
        classes=len(dataset.classes),
        in_channels=dataset.train.images.shape[1],
    )
    return replace(config, architecture=architecture)


def train(trainer: Trainer, arguments: Arguments, console: Console) -> int:
    """Run to the end and report; the exit code."""
    config, directory, dataset = trainer.config, trainer.directory, trainer.dataset
    parameters = sum(p.numel() for p in trainer.model.parameters())
    go_on = go_on_command(arguments, directory, trainer.world.size)
    # From before the first file is written: what can't be resumed would be left otherwise.
    with Interruption(console) as interruption:
        with trainer.world.together():
            log = begun_log(trainer, arguments, parameters)
        console.print(
            f"{config.dataset}: {len(dataset.train):,} images to train on, {len(dataset.test):,} "
            f"to test; {parameters:,} parameters; in {directory}"
        )
        if config.tf32 and trainer.world.device.type == "cpu":
            console.print("--tf32 is for GPUs: nearly all CPUs have no TF32, and go on in float32")
        fit = Fit(
            trainer, log, console, interruption,
            arguments.max_minutes, arguments.checkpoint_minutes,
        )  # fmt: skip
        try:
            outcome = fit.run()
            if outcome == "out of time":
                fit.save()
            with trainer.world.together():
                if trainer.world.is_main:
                    report(fit, outcome)
        except Interrupted as interrupted:
            fit.save()
            log.close()
            console.print(f"interrupted, saved; go on: {go_on}")
            return interrupted.exit_code
    if outcome == "out of time":
        console.print(f"out of time, saved; go on: {go_on}")
    log.close()
    return 0


def begun_log(trainer: Trainer, arguments: Arguments, parameters: int) -> MetricsLog:
    """Where the run is written down, how it began already there."""
    progress, config = trainer.progress, trainer.config
    # An epoch that was written down carries the step at its end, and stays.
    purge_step = progress.step + (progress.step == progress.epoch * trainer.steps_per_epoch)
    directory = trainer.directory if trainer.world.is_main else None
    log = MetricsLog(directory, progress.metrics_size, purge_step)
    if progress.step == 0 and log.size == 0:  # unless resumed, be it from before the first step
        about = {
            "experiment": arguments.experiment or config.dataset,
            "config": config.to_dict(),
            "parameters": parameters,
            "processes": trainer.world.size,
            "weights": arguments.weights and checkpoints.short_name(arguments.weights),
        }
        log.write("run", 0, about | description(trainer.world.device))
    return log


def go_on_command(arguments: Arguments, directory: Path, processes: int) -> str:
    """What a shell resumes a run with, as it ran: what no checkpoint restores is said again."""
    start = ["python"] if processes == 1 else ["torchrun", "--nproc-per-node", str(processes)]
    flags = ["--resume", str(directory), "--data-dir", str(arguments.data_dir)]
    if arguments.device is not None:
        flags += ["--device", arguments.device]
    if arguments.cuda_graph:
        flags.append("--cuda-graph")
    return shlex.join([*start, "-m", "model.train", *flags])


def report(fit: Fit, outcome: Outcome) -> None:
    """Test errors, weights and the picture of reconstructions at the end of a run.

    Raises Interrupted only in a test, before the run's last line is written.
    """
    trainer, log, console = fit.trainer, fit.log, fit.console
    dataset = trainer.dataset
    results = {dataset.test_name: fit.tested or fit.test(dataset.test)}
    results |= {name: fit.test(split) for name, split in dataset.further_tests.items()}
    weights = trainer.save_weights()
    values: dict[str, Any] = {"outcome": outcome, "seconds": fit.seconds(), "tests": {}}
    for name, result in results.items():
        values["tests"][name] = {
            "error": result.error, "wrong": result.wrong, "count": result.count
        }  # fmt: skip
        console.print(
            f"{name}: error {result.error:.2f} % ({result.wrong:,} of {result.count:,} wrong)"
        )
    log.write("final", trainer.progress.step, values)
    console.print(f"weights: {weights}")
    if isinstance(trainer.model, CapsNet) and trainer.model.decoder is not None:
        picture = trainer.directory / PICTURE
        pixels = reconstruction_rows(trainer.model, trainer.test_batch(SHOWN))
        save_png(picture, pixels)
        log.image("reconstructions", pixels, trainer.progress.step)
        console.print(f"inputs above their reconstructions: {picture}")


def list_experiments() -> None:
    """One line for each experiment, with the paper's test error."""
    table = Table("experiment", "what", "the paper's test error", box=None, pad_edge=False)
    for name, experiment in EXPERIMENTS.items():
        table.add_row(name, experiment.about, experiment.paper)
    table_console().print(table)


if __name__ == "__main__":
    run_command(main)

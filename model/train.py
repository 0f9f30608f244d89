"""``python -m model.train``: train a network, say how well it does, save everything.

Leaves in the run's directory: ``metrics.jsonl``, ``checkpoint.safetensors`` (to resume),
``weights.safetensors`` (to evaluate and predict), ``reconstructions.png``, TensorBoard events.
"""

import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from . import arguments as command_line
from . import checkpoint as checkpoints
from .arguments import Arguments
from .data import load_dataset
from .errors import UserError, run_command
from .experiments import EXPERIMENTS
from .fit import Fit
from .interrupt import Interrupted, Interruption
from .losses import lengths
from .metrics import MetricsLog
from .networks import build
from .pictures import grid, save_png
from .trainer import Trainer
from .views import evaluation_batch

SHOWN = 20
"""How many test images the picture of reconstructions shows."""


def main(argv: list[str] | None = None) -> int:
    arguments = command_line.parse(argv)
    console = Console(stderr=True, highlight=False)
    if arguments.list:
        list_experiments()
        return 0
    device = choose_device(arguments.device)
    state = None
    if arguments.resume is not None:
        state = checkpoints.load(arguments.resume)
        config = command_line.resumed_config(arguments, state.config)
        directory = arguments.resume if arguments.resume.is_dir() else arguments.resume.parent
    else:
        config = command_line.new_config(arguments)
        directory = arguments.save_dir or command_line.default_directory(arguments, config)
    dataset = load_dataset(config.dataset, arguments.data_dir, arguments.download).to(device)
    torch.manual_seed(config.seed)
    model = build(config.architecture, config.backend)
    if arguments.weights is not None:
        checkpoints.restore_model(model, checkpoints.load(arguments.weights), arguments.weights)
    prepare_directory(directory, fresh=state is None)
    trainer = Trainer(config, model, dataset, directory, device)
    if state is not None:
        trainer.restore(state, arguments.resume)
    return train(trainer, arguments, console)


def train(trainer: Trainer, arguments: Arguments, console: Console) -> int:
    """Run to the end and report; the exit code."""
    config, directory, progress = trainer.config, trainer.directory, trainer.progress
    log = MetricsLog(directory, progress.metrics_size, progress.step)
    if progress.step == 0:
        log.write("run", 0, description(trainer))
    console.print(
        f"{config.dataset}: {len(trainer.dataset.train):,} images to train on, "
        f"{len(trainer.dataset.test):,} to test; {parameters(trainer.model):,} parameters; "
        f"in {directory}"
    )
    with Interruption(console) as interruption:
        fit = Fit(
            trainer, log, console, interruption.check,
            arguments.max_minutes, arguments.checkpoint_minutes,
        )  # fmt: skip
        try:
            outcome = fit.run()
            if outcome == "out of time":
                fit.save()
        except Interrupted as interrupted:
            fit.save()
            console.print(f"interrupted, saved; go on: {resume_command(arguments, directory)}")
            log.close()
            return interrupted.exit_code
    report(trainer, fit, outcome, log, console)
    if outcome == "out of time":
        console.print(f"out of time; go on: {resume_command(arguments, directory)}")
    log.close()
    return 0


def report(trainer: Trainer, fit: Fit, outcome: str, log: MetricsLog, console: Console) -> None:
    """Test errors, weights and the picture of reconstructions at the end of a run."""
    tests = {trainer.dataset.test_name: trainer.dataset.test, **trainer.dataset.further_tests}
    results = {name: trainer.test(split) for name, split in tests.items()}
    weights = trainer.save_weights()
    values: dict[str, Any] = {"outcome": outcome, "seconds": fit.seconds()}
    for name, result in results.items():
        values[name] = {"error": result.error, "wrong": result.wrong, "count": result.count}
        console.print(
            f"{name}: error {result.error:.2f} % ({result.wrong} of {result.count:,} wrong)"
        )
    log.write("final", trainer.progress.step, values)
    console.print(f"weights: {weights}")
    if trainer.config.architecture.reconstruction:
        picture = trainer.directory / "reconstructions.png"
        pixels = reconstruction_picture(trainer)
        save_png(picture, pixels)
        log.image("reconstructions", pixels, trainer.progress.step)
        console.print(f"inputs above their reconstructions: {picture}")


@torch.no_grad()
def reconstruction_picture(trainer: Trainer) -> Any:
    """Test images in rows, each row above its reconstructions from the predicted capsules."""
    trainer.model.eval()
    index = torch.arange(min(SHOWN, len(trainer.dataset.test)), device=trainer.device)
    batch = evaluation_batch(trainer.config, trainer.dataset.test, index)
    capsules = trainer.model.capsules(batch.images)
    predicted = lengths(capsules).topk(batch.labels.shape[1]).indices
    drawn = trainer.model.reconstruct(capsules, predicted).sum(1).clamp(max=1)
    columns = 10
    pairs = zip(batch.images.split(columns), drawn.split(columns), strict=True)
    rows = [images for pair in pairs for images in pair]
    return grid(torch.cat(rows), columns)


def prepare_directory(directory: Path, fresh: bool) -> None:
    """Make the run's directory and see that it can be written, before anything else takes time."""
    if fresh and (directory / checkpoints.CHECKPOINT).exists():
        raise UserError(
            f"--save-dir {directory} holds a run already: --resume {directory} goes on with it, "
            "another --save-dir starts afresh"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"x")
    except OSError as error:
        raise UserError(f"--save-dir {directory} can't be written: {error.strerror}") from None


def choose_device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} can't be used: {reason}") from None
    return device


def description(trainer: Trainer) -> dict[str, Any]:
    """What a reader of the metrics needs to judge them."""
    return {
        "config": trainer.config.to_dict(),
        "command": " ".join(["python -m model.train", *sys.argv[1:]]),
        "parameters": parameters(trainer.model),
        "device": device_name(trainer.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
    }


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of this source, where it is a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def resume_command(arguments: Arguments, directory: Path) -> str:
    data = "" if arguments.data_dir == Path("data") else f" --data-dir {arguments.data_dir}"
    return f"python -m model.train --resume {directory}{data}"


def list_experiments() -> None:
    table = Table("experiment", "what", "the paper's figure")
    for name, experiment in EXPERIMENTS.items():
        table.add_row(name, experiment.about, experiment.paper)
    Console().print(table)


if __name__ == "__main__":
    run_command(main)

"""Checkpoints: one safetensors file, written atomically, holding everything a run needs to go on.

Tensors are named ``model.<parameter>``, ``optimizer.<parameter>.<slot>`` and ``progress.<name>``;
the metadata carries the format, the configuration, the class names and the counters as JSON.
A file of weights alone is the same without the optimizer and the progress.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import Config
from .data import Dataset, cifar10, class_name
from .errors import UserError
from .outputs import write_atomically

FORMAT = "capsule_kernels checkpoint 1"
CHECKPOINT = "checkpoint.safetensors"
WEIGHTS = "weights.safetensors"


@dataclass
class Checkpoint:
    """What a file holds: see the module's docstring for the names of ``tensors``."""

    config: Config
    classes: tuple[str, ...]
    tensors: dict[str, Tensor]
    counters: dict[str, Any] = field(default_factory=dict)
    data: dict[str, list[int]] = field(default_factory=dict)
    """``Dataset.fingerprint`` of what the run is trained on; empty in files of older versions."""

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors below ``prefix.``, without it."""
        start = len(prefix) + 1
        return {k[start:]: t for k, t in self.tensors.items() if k.startswith(prefix + ".")}


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; UserError (a full disk, no permission) leaves the previous one whole."""
    import safetensors.torch

    metadata = {
        "format": FORMAT,
        "config": json.dumps(checkpoint.config.to_dict()),
        "classes": json.dumps(checkpoint.classes),
        "counters": json.dumps(checkpoint.counters),
        "data": json.dumps(checkpoint.data),
    }
    tensors = {name: t.detach().contiguous() for name, t in checkpoint.tensors.items()}
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def load(path: Path) -> Checkpoint:
    """Read a checkpoint, or the one in a run's directory; UserError if it is torn or foreign."""
    import safetensors
    from safetensors import safe_open

    if path.is_dir():
        candidates = [path / CHECKPOINT, path / WEIGHTS]
        path = next((p for p in candidates if p.is_file()), candidates[0])
    if not path.is_file():
        raise UserError(f"{path} is not there; expected a checkpoint or a run's directory")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file: {error}") from None
    if metadata.get("format") != FORMAT:
        raise UserError(
            f"{path}: not a checkpoint of this program: its format must be {FORMAT!r}, "
            f"got {metadata.get('format')!r}"
        )
    try:
        config = Config.from_dict(json.loads(metadata["config"]))
        config.check()
        classes = json.loads(metadata["classes"])
        if not isinstance(classes, list) or not all(isinstance(c, str) for c in classes):
            raise TypeError(f"classes must be a list of names, got {classes!r}")
        classes = [class_name(c) for c in classes]  # older versions kept folders' names as they are
        counters = json.loads(metadata["counters"])
        data = json.loads(metadata.get("data", "null")) or {}  # null: weights of older versions
        for name, value in (("counters", counters), ("data", data)):
            if not isinstance(value, dict):
                raise TypeError(f"{name} must be an object, got {value!r}")
    except KeyError as error:
        raise UserError(f"{path}: its metadata can't be read: {error} is missing") from None
    except (TypeError, ValueError, UserError) as error:
        raise UserError(f"{path}: its metadata can't be read: {error}") from None
    return Checkpoint(config, tuple(classes), tensors, counters, data)


def short_name(path: Path) -> str:
    """A run or its weights by their name and folder, without where these lie."""
    return "/".join(path.resolve().parts[-2:])


def check_data(checkpoint: Checkpoint, dataset: Dataset, source: Path) -> None:
    """UserError unless the network was trained on images of such classes and channels, and, as far
    as its file says, not on those of CIFAR-10 that are held out here."""
    if checkpoint.classes != dataset.classes:
        raise UserError(
            f"{source}: trained on the classes {', '.join(checkpoint.classes)}; "
            f"the data has {', '.join(dataset.classes)}"
        )
    channels, theirs = checkpoint.config.architecture.in_channels, dataset.test.images.shape[1]
    if channels != theirs:
        raise UserError(
            f"{source}: trained on images of {channels} channels; the data has {theirs}"
        )
    ours = dataset.fingerprint()["train"]
    trained = checkpoint.data.get("train", ours)
    if dataset.test_name == cifar10.HELD_OUT and trained != ours:
        raise UserError(
            f"{source}: may be trained on the {cifar10.HELD_OUT}: (count, checksum of labels) of "
            f"its training images must be {ours}, got {trained}; {cifar10.TEST} is needed"
        )


def check_same_data(checkpoint: Checkpoint, dataset: Dataset, source: Path) -> None:
    """UserError unless a run that goes on finds the images it began with.

    Its epochs would have other lengths, and what is tested could have been trained on.
    """
    for name, ours in dataset.fingerprint().items():
        theirs = checkpoint.data.get(name, ours)
        if theirs != ours:
            raise UserError(
                f"{source}: the run's {name} images are not those of the data: (count, checksum of "
                f"their labels) must be {theirs}, got {ours}; --weights starts a new run from it"
            )


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {f"model.{name}": t for name, t in model.state_dict().items()}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by the names of the parameters."""
    return {
        f"optimizer.{name}.{slot}": value
        for name, parameter in model.named_parameters()
        for slot, value in optimizer.state[parameter].items()
    }


def restore_model(model: nn.Module, checkpoint: Checkpoint, source: Path) -> None:
    """Copy the weights into a model; UserError names the first that does not fit."""
    weights = checkpoint.part("model")
    own = model.state_dict()
    for name in own | weights:  # in the model's order, then the file's
        theirs = list(weights[name].shape) if name in weights else "nothing"
        ours = list(own[name].shape) if name in own else "nothing"
        if theirs != ours:
            raise UserError(
                f"{source}: weights of another architecture: {name} is {theirs} there, {ours} here"
            )
    model.load_state_dict(weights)


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint
) -> None:
    """Copy the optimizer's state, in the memory format of the parameters: the same bits go on."""
    for key, value in checkpoint.part("optimizer").items():
        name, slot = key.rsplit(".", 1)
        parameter = model.get_parameter(name)
        if value.shape == parameter.shape:
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        elif parameter.is_cuda:
            value = value.to(parameter.device)
        optimizer.state[parameter][slot] = value

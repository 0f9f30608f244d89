"""What a run is: the architecture of its network and everything that decides its weights."""

import dataclasses
import math
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from .errors import require

Network = Literal["capsnet", "cnn", "pooled-cnn"]
Schedule = Literal["epoch", "steps", "linear"]
MarginForm = Literal["paper", "authors"]


ARCHITECTURE_FLAGS = ("routings", "image_size", "in_channels", "bias")
"""Fields of Architecture that have a flag of their own."""

LARGEST_IMAGE = 1024
"""In pixels: a batch of 128 such images takes the first convolution more than 100 GB already."""
MOST_ROUTINGS = 1000


@dataclass(frozen=True)
class Architecture:
    """Sizes of a network; the defaults are the paper's for MNIST. A checkpoint carries its own."""

    network: Network = "capsnet"
    in_channels: int = 1
    image_size: int = 28
    classes: int = 10
    conv_channels: int = 256
    capsule_types: int = 32
    capsule_dim: int = 8
    class_dim: int = 16
    routings: int = 3
    reconstruction: bool = True
    bias: bool = False
    """Learn a bias added to s in every iteration, as the authors' code does; the text has none."""
    leaky: bool = False
    """ "None of the above" in the routing softmax."""
    same_padding: bool = False
    """Convolutions keep the image's size (before the stride)."""
    hidden: int = 1024
    """Units of the fully connected layer of the network "pooled-cnn"."""
    dropout: float = 0.0
    """Of those units, in training."""

    @property
    def capsule_grid(self) -> int:
        """Side of the grid of primary capsules of one type."""
        if self.same_padding:
            return (self.image_size + 1) // 2
        return (self.image_size - 8 - 9) // 2 + 1

    @property
    def smallest_image(self) -> int:
        """Side of the smallest image of which anything is left after convolutions and pooling."""
        if self.network == "capsnet":
            return 1 if self.same_padding else 17
        return 4 if self.network == "pooled-cnn" else 1

    def check(self) -> None:
        """Raise UserError for sizes no network can have."""
        for name in (
            "in_channels", "classes", "conv_channels", "capsule_types", "capsule_dim",
            "class_dim", "hidden",
        ):  # fmt: skip
            require(getattr(self, name) >= 1, name, "be at least 1", getattr(self, name))
        size, smallest = self.image_size, self.smallest_image
        must = f"be at least {smallest} for this {self.network}"
        require(size >= smallest, "--image-size", must, size)
        require(size <= LARGEST_IMAGE, "--image-size", f"be at most {LARGEST_IMAGE}", size)
        require(0 <= self.dropout < 1, "dropout", "be at least 0 and less than 1", self.dropout)
        R = self.routings
        require(R >= 1, "--routings", "be at least 1", R)
        require(R <= MOST_ROUTINGS, "--routings", f"be at most {MOST_ROUTINGS}", R)


@dataclass(frozen=True)
class Config:
    """A run. Two runs of equal configuration on the same device have equal weights."""

    dataset: str = "digits"
    architecture: Architecture = Architecture()
    epochs: int = 50
    batch_size: int = 128
    """Samples a step, over all processes and accumulated parts together."""
    accumulate: int = 1
    """Parts a batch is worked off in, one after another, to save memory."""
    lr: float = 1e-3
    lr_schedule: Schedule = "epoch"
    """"epoch": times ``lr_decay`` after each epoch. "steps": times ``lr_decay`` every
    ``lr_decay_steps`` steps, continuously, as the authors' code. "linear": down to 0 at the end."""
    lr_decay: float = 0.9
    lr_decay_steps: int = 2000
    warmup_steps: int = 0
    """Steps over which the learning rate rises to what the schedule says. With thousands of input
    capsules Adam's first step, as large as any, makes all class capsules so long that squash lets
    hardly any gradient through."""
    lam_recon: float = 0.0005
    """Weight of the squared error summed over pixels; 0.0005 * 784 = 0.392 of its mean."""
    margin: MarginForm = "paper"
    shift_pixels: int = 2
    """Largest random shift of a training image (of each digit of MultiMNIST), in pixels."""
    pairs: bool = False
    """Show two images of different classes laid over each other (MultiMNIST)."""
    flip: bool = False
    jitter: bool = False
    """Random brightness and contrast."""
    standardize: bool = False
    """The network sees images of mean 0 and standard deviation 1; reconstructions are of 0..1."""
    seed: int = 0
    backend: str = "auto"
    amp: bool = False
    tf32: bool = False
    """Float32 matrix products may use TF32 tensor cores."""
    compile: bool = False
    stop_accuracy: float | None = None
    """End the run once the test accuracy reaches this."""

    def check(self) -> None:
        """Raise UserError for values no run can have. Comparisons are such that NaN has none."""
        for name, smallest in {
            "epochs": 0, "batch_size": 1, "accumulate": 1, "lr_decay_steps": 1, "warmup_steps": 0,
            "shift_pixels": 0, "seed": 0,
        }.items():  # fmt: skip
            value = getattr(self, name)
            require(value >= smallest, flag(name), f"be at least {smallest}", value)
        require(self.seed < 2**63, "--seed", "be below 2**63", self.seed)
        finite = 0 <= self.lam_recon < math.inf
        require(finite, "--lam-recon", "be at least 0 and finite", self.lam_recon)
        # It is a float32.
        require(0 < self.lr < 1e38, "--lr", "be above 0 and below 1e38", self.lr)
        # A rate that rises leaves float32, sooner or later.
        require(0 < self.lr_decay <= 1, "--lr-decay", "be above 0, at most 1", self.lr_decay)
        accuracy = self.stop_accuracy
        is_share = accuracy is None or 0 < accuracy <= 1
        require(is_share, "--stop-accuracy", "be above 0, at most 1", accuracy)
        must = f"divide --batch-size = {self.batch_size}"
        require(self.batch_size % self.accumulate == 0, "--accumulate", must, self.accumulate)
        self.architecture.check()
        size, shift = self.architecture.image_size, self.shift_pixels
        require(shift <= size, "--shift-pixels", f"be at most the image's {size} pixels", shift)

    def replaced(self, changes: dict[str, Any]) -> Self:
        """A copy with other values; those of ARCHITECTURE_FLAGS and a ``lam_recon`` of 0 reach the
        architecture."""
        changes = dict(changes)
        network = {name: changes.pop(name) for name in ARCHITECTURE_FLAGS if name in changes}
        if "lam_recon" in changes and self.architecture.network == "capsnet":
            network["reconstruction"] = changes["lam_recon"] > 0
        architecture = dataclasses.replace(self.architecture, **network)
        return dataclasses.replace(self, architecture=architecture, **changes)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of ``to_dict``; TypeError for names of another version, or other types."""
        values = dict(values)
        config = cls(architecture=Architecture(**values.pop("architecture")), **values)
        check_types(config.architecture)
        check_types(config)
        return config


def check_types(record: Any) -> None:
    """Raise TypeError unless the fields of a dataclass, read from a file, are what they must be."""
    for name, kind in get_type_hints(type(record)).items():
        value = getattr(record, name)
        if not is_of(value, kind):
            raise TypeError(f"{name} must be {shown(kind)}, got {value!r}")


def is_of(value: Any, kind: Any) -> bool:
    """Whether a value read from JSON is of an annotated type: True is no int, 1 is a float."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if isinstance(kind, UnionType):
        return any(is_of(value, k) for k in get_args(kind))
    return type(value) is kind or (kind is float and type(value) is int)


def shown(kind: Any) -> str:
    """A type in the words of a message."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    return f"of type {kind.__name__ if isinstance(kind, type) else kind}"


def flag(name: str) -> str:
    """The command line's name of a field."""
    return "--" + name.replace("_", "-")

"""Time and memory of a training step of the MNIST CapsNet, ours and others', and of its parts."""

import argparse
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from model.capsnet import CapsNet
from model.config import Architecture
from model.losses import margin_loss, multi_hot, reconstruction_loss

from .memory import extra_bytes, measured_in
from .options import add_precision, add_quick, add_rounds, positive
from .peers import oracle, reason_it_does_not_fit
from .popular import PopularCapsNet
from .records import CannotRunError, Record, reason_of
from .routing import Settings
from .shapes import MNIST
from .timing import interleave, make_timer

RECONSTRUCTION_WEIGHT = 0.0005
MORE_ROUNDS = 2
"""Times as many rounds as for other measurements: on a CPU a turn of a step is one sample."""
PATIENCE = 60.0
"""Seconds of rounds: there a round lasts ten."""
WHOLE, CONVOLUTIONS, ROUTING = PARTS = ("whole step", "convolutions", "routing layer")
FUSED, ORACLE, POPULAR, COMPILED = "fused", "oracle", "popular", "compiled oracle"
Network = CapsNet | PopularCapsNet
MODELS: dict[str, Callable[[], Network]] = {
    FUSED: lambda: CapsNet(Architecture(), backend="auto"),
    ORACLE: lambda: CapsNet(Architecture(), backend="reference"),
    POPULAR: PopularCapsNet,
    COMPILED: lambda: CapsNet(Architecture(), backend="reference"),
}
"""The CapsNet on the fused op; the same on the oracle; a popular implementation's; the second by
``torch.compile``."""
STORED = {FUSED: 0, ORACLE: 4, POPULAR: 4, COMPILED: 3}
"""How many buffers of the size of ``u_hat`` a step holds, roughly."""


class Step:
    """A model with its optimiser and a fixed batch: a training step, and its parts alone."""

    def __init__(self, name: str, B: int, device: str) -> None:
        if reason := reason_it_does_not_fit(STORED[name] * MNIST.prediction_bytes(B), device):
            raise CannotRunError(reason)
        model = MODELS[name]()
        if isinstance(model, PopularCapsNet):
            check_popular(model)
        generator = torch.Generator().manual_seed(0)
        self.model = model.to(device)
        self.forward = torch.compile(self.model) if name == COMPILED else self.model
        self.images = torch.rand(B, 1, 28, 28, generator=generator).to(device)
        self.labels = torch.randint(10, (B, 1), generator=generator).to(device)
        self.targets = multi_hot(self.labels, 10)
        # Fused for every model, as in our trainer.
        self.optimiser = torch.optim.Adam(model.parameters(), fused=True)
        with torch.no_grad():
            self.u = model.primary_capsules(self.images)
            self.v = model.digits(self.u)

    def loss(self) -> Tensor:
        scores, reconstructions = self.forward(self.images, self.labels)
        assert reconstructions is not None  # both models have a decoder
        error = reconstruction_loss(reconstructions.flatten(1), self.images.flatten(1))
        return margin_loss(scores, self.targets) + RECONSTRUCTION_WEIGHT * error

    def whole(self) -> None:
        self.optimiser.zero_grad()
        self.loss().backward()
        self.optimiser.step()

    def convolutions(self) -> None:
        """Forward and backward of the two convolutions (and the squash after them)."""
        parameters = [*self.model.conv1.parameters(), *self.model.primary.parameters()]
        u = self.model.primary_capsules(self.images)
        torch.autograd.grad(u, parameters, torch.ones_like(u))

    def routing(self) -> None:
        """Forward and backward of the routing layer."""
        u = self.u.requires_grad_()
        v = self.model.digits(u)
        torch.autograd.grad(v, (u, self.model.digits.weight), self.v)

    def parts(self) -> dict[str, Callable[[], None]]:
        return {
            WHOLE: self.whole,
            CONVOLUTIONS: self.convolutions,
            ROUTING: self.routing,
        }


def check_popular(model: PopularCapsNet) -> None:
    """Raise ``ValueError`` unless its capsule layer agrees with the oracle on the same capsules."""
    u = torch.randn(2, 1152, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        v = model.digits(u)
        weight = model.digits.weight.transpose(0, 1)
        expected = oracle(MNIST)(u, weight, model.digits.num_iterations)
    error = float((v - expected).abs().max() / expected.abs().max())
    if not error < 1e-4:
        raise ValueError(f"its capsule layer differs from the oracle's by {error:.1e}")


def step_memory(name: str, B: int, settings: Settings) -> int:
    """Bytes at the peak of a step beyond the parameters and the optimiser's state."""
    settings.apply()
    step = Step(name, B, settings.device)
    step.whole()
    step.optimiser.zero_grad()

    def whole() -> tuple[Tensor, ...]:
        step.whole()
        return ()

    return extra_bytes(whole, settings.device)


def measure_steps(
    B: int,
    settings: Settings,
    names: Collection[str] = tuple(MODELS),
    parts_of: Collection[str] = (FUSED, ORACLE, POPULAR),
) -> Iterator[Record]:
    """Whole steps of models with their memory, and the parts of some.

    All are interleaved: a part and the step that it is a share of have met the same machine.
    """
    steps: dict[str, Step] = {}
    missing: dict[str, str] = {}
    for name in names:
        try:
            steps[name] = Step(name, B, settings.device)
        except Exception as error:
            missing[name] = reason_of(error)
    timer = make_timer(settings.device, replay=False)  # as users launch it
    rows = [(part, name) for part in PARTS for name in names if part == WHOLE or name in parts_of]
    failures = {row: missing[row[1]] for row in rows if row[1] in missing}
    samplers = {}
    for part, name in rows:
        if name in steps:
            try:
                call = steps[name].parts()[part]
                call()  # what fails, fails here
                samplers[part, name] = timer.sampler([call])
            except Exception as error:
                failures[part, name] = reason_of(error)
    rounds = MORE_ROUNDS * settings.rounds
    timings = interleave(samplers, timer.how, rounds, settings.slice_seconds, patience=PATIENCE)
    for part, name in rows:
        record: Record = {
            "table": "training",
            "implementation": name,
            "part": part,
            "B": B,
            "precision": settings.precision,
            "status": failures.get((part, name), "ok"),
        }
        if (part, name) in timings:
            record |= timings[part, name].fields()
        if part == WHOLE and (part, name) in timings and name != COMPILED:  # compiles anew
            try:
                where = measured_in(settings.device)
                record["extra_bytes"] = where(step_memory, name, B, settings)
            except Exception as error:
                record["memory_status"] = reason_of(error)
        yield record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=positive, help="samples a step (128; 16 with --quick)")
    parser.add_argument(
        "--compiled",
        action=argparse.BooleanOptionalAction,
        help="the oracle's network by torch.compile as well (default: but with --quick)",
    )
    add_precision(parser)
    add_rounds(parser)
    add_quick(parser, "samples, models and rounds")


def measure(options: argparse.Namespace, settings: Settings, _ceilings: Record) -> Iterator[Record]:
    wanted = not options.quick if options.compiled is None else options.compiled
    names = [name for name in MODELS if wanted or name != COMPILED]
    yield from measure_steps(options.batch_size or (16 if options.quick else 128), settings, names)

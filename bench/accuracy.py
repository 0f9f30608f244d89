"""Error against float64, of every backend and dtype, beside the oracle's own in that dtype."""

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from .options import add_iterations, add_peers_arguments, add_precision, positive
from .peers import Implementation, chosen_peers, oracle, ours, outputs_and_gradients
from .records import CannotRunError, Record, reason_of
from .routing import Settings
from .shapes import MNIST, Inputs, Shape, make_inputs

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
QUANTITIES = ("v", "grad u", "grad weight")
SAMPLES = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch", type=positive, default=SAMPLES, metavar="B", help=f"samples ({SAMPLES})"
    )
    add_peers_arguments(parser, default="none")
    add_iterations(parser)
    add_precision(parser)


def measure(options: argparse.Namespace, settings: Settings, _ceilings: Record) -> Iterator[Record]:
    """Three records (v, grad u, grad weight) for each backend and dtype, at the MNIST shape."""
    everyone = [*ours(settings.device), *chosen_peers(options)]
    for dtype in DTYPES:
        yield from compare(MNIST, options.batch, dtype, everyone, settings)


def compare(
    shape: Shape, B: int, dtype: torch.dtype, everyone: list[Implementation], settings: Settings
) -> Iterator[Record]:
    inputs = make_inputs(shape, B, settings.device, dtype)
    exact = Inputs(
        inputs.u.detach().double().requires_grad_(),
        inputs.weight.detach().double().requires_grad_(),
        inputs.grad_v.double(),
    )
    expected = outputs_and_gradients(oracle(shape), exact, settings.R)
    own = errors(outputs_and_gradients(oracle(shape), inputs, settings.R), expected)
    for implementation in everyone:
        found, status = [float("nan")] * len(QUANTITIES), "ok"
        try:
            if implementation.missing:
                raise CannotRunError(implementation.missing)
            routing = implementation.make(shape)
            found = errors(outputs_and_gradients(routing, inputs, settings.R), expected)
        except Exception as failure:
            status = reason_of(failure)
        for quantity, error, reference in zip(QUANTITIES, found, own, strict=True):
            record: Record = {
                "table": "accuracy",
                "case": shape.name,
                "B": B,
                "dtype": str(dtype).removeprefix("torch."),
                "precision": settings.precision,
                "implementation": implementation.name,
                "quantity": quantity,
                "oracle_error": reference,
                "status": status,
            }
            yield record | ({"error": error} if status == "ok" else {})


def errors(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> list[float]:
    """The largest difference of each tensor, relative to its largest value."""
    return [
        float((x.double() - exact).abs().max() / exact.abs().max())
        for x, exact in zip(found, expected, strict=True)
    ]

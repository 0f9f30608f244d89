"""Malformed calls of the raw operators, past the checks of ``fused_routing``.

``python -m tests.operator_fuzz --calls 100000 --seed 0`` calls ``routing_forward.cpu`` and
``routing_backward.cpu`` with right arguments of which up to three were spoilt, on every instruction
set that this processor has. A call is refused with an ordinary exception, or its results have the
shapes and dtypes that the operator's fake implementation promises. Anything else ends the process:
a crash by its signal. ``--backend triton`` calls Triton's, under ``TRITON_INTERPRET=1``;
``--backend cuda`` CUDA's, on a GPU, where an error of CUDA ends the process too.
"""

import argparse
import random
import resource
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from capsule_kernels.backends import extension
from capsule_kernels.ops import OPERATORS, accumulation_dtype, backward_shapes, forward_shapes

from .interpreted import spare_the_interpreter_what_it_throws_away

DTYPES = [
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool,
    torch.complex64, torch.uint8, torch.float8_e4m3fn,
]  # fmt: skip
SIZES = [0, 1, 2, 3, 5, 7, 8, 9, 16, 17, 33]
ENORMOUS = 2**40
INTEGERS = [-(2**63), -1, 0, 1, 2, 3, 5, 7, 2**31, 2**40, 2**62, 2**63 - 1]
# Interpreted kernels take seconds where compiled ones take microseconds; a sample's outputs have to
# fit in the registers that the CUDA kernels keep them in.
SIZES_OF = {"cpu": SIZES, "triton": SIZES[:4], "cuda": SIZES[:8]}
# Where torch refuses a bool among integers, before it calls any operator: with an internal assert.
CONVERSION = "torch/csrc/utils/pybind.cpp"
# AttributeError: None for a tensor beside a meta tensor, which the fakes in Python receive.
REFUSALS = (TypeError, ValueError, RuntimeError, IndexError, AttributeError)


def resized(rng: random.Random, x: Tensor) -> Tensor:
    """Another size along one dimension."""
    if x.dim() == 0:
        return x.expand(rng.choice(SIZES))
    shape = list(x.shape)
    shape[rng.randrange(len(shape))] = rng.choice(SIZES)
    return torch.randn(shape).to(x.dtype)


def enormous(rng: random.Random, x: Tensor) -> Tensor:
    """A dimension that no memory could hold, without one: stride 0."""
    if x.dim() == 0 or 0 in x.shape:
        return x.expand(ENORMOUS, *x.shape)
    dim = rng.randrange(x.dim())
    return x.narrow(dim, 0, 1).expand([ENORMOUS if d == dim else n for d, n in enumerate(x.shape)])


def overlapping(rng: random.Random, x: Tensor) -> Tensor:
    """The same shape over less memory than it has elements."""
    return x.flatten()[:1].expand(x.shape) if x.numel() else x


SPOIL_TENSOR: list[Callable[[random.Random, Tensor], Any]] = [
    resized,
    resized,
    enormous,
    overlapping,
    lambda rng, x: x.to(rng.choice(DTYPES)),
    lambda rng, x: x.unsqueeze(rng.randint(0, x.dim())),
    lambda rng, x: x.flatten(),
    lambda rng, x: x[..., 0] if x.dim() and x.shape[-1] else x.sum(),
    lambda rng, x: x.permute(rng.sample(range(x.dim()), x.dim())),
    lambda rng, x: x.repeat_interleave(2, -1)[..., 1::2] if x.dim() else x,
    lambda rng, x: x.flip(0) if x.dim() else x,
    lambda rng, x: torch.full_like(x, rng.choice([float("nan"), float("inf"), 1e38, 0])),
    lambda rng, x: x.to("meta"),
    lambda rng, x: x.to_sparse() if x.numel() < ENORMOUS else x,
    lambda rng, x: x.clone().requires_grad_(),
    lambda rng, x: torch.nested.nested_tensor([x, x]),
    lambda rng, x: torch.zeros(rng.choice(SIZES)),
    lambda rng, x: None,
    lambda rng, x: rng.choice([1, 2.5, "u", [x], (), {}, object()]),
]  # fmt: skip


def on_device(rng: random.Random, value: Any, device: str) -> Any:
    """A tensor among those of ``device``, or now and then not."""
    if device == "cpu" or not isinstance(value, Tensor):
        return value
    if value.is_meta or value.numel() >= ENORMOUS:
        return value
    return value.to(device if rng.random() < 0.9 else "cpu")


def spoil(rng: random.Random, value: Any) -> Any:
    if isinstance(value, Tensor):
        return rng.choice(SPOIL_TENSOR)(rng, value)
    if isinstance(value, bool):
        return rng.choice([not value, None, 2, "yes", torch.tensor(True)])
    if isinstance(value, int):
        return rng.choice([*INTEGERS, None, 1.5, "3", torch.tensor(2)])
    if isinstance(value, list):
        spoilt = [*value[:-1], rng.choice(INTEGERS)]
        return rng.choice([value[:-1], [*value, True], [], None, [2, 3, 4, 5], True, spoilt])
    return rng.choice([torch.randn(3, 4), 1, "x"])


def right_arguments(rng: random.Random, backward: bool, sizes: list[int]) -> list[Any]:
    weight_sharing = rng.choice([1, 1, 2, 3, 9])
    B, J, K, D = (rng.choice(sizes[low:]) for low in (0, 1, 1, 1))
    I, R = weight_sharing * rng.randint(1, 6), rng.randint(1, 4)
    dtype = rng.choice(DTYPES[:4])

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    window: list[int] = []
    shape: tuple[int, ...] = (B, I, K)
    if rng.random() < 0.3:
        weight_sharing, C = 1, rng.randint(1, 4)
        kh, kw, down, right = window = [rng.randint(1, 3) for _ in range(4)]
        H, W = kh + rng.randint(0, 4), kw + rng.randint(0, 4)
        shape, I = (B, H, W, C, K), C * kh * kw
        B *= ((H - kh) // down + 1) * ((W - kw) // right + 1)
    u, weight = tensor(*shape), tensor(I // weight_sharing, J, D, K)
    logits, bias = (tensor(*x) if rng.random() < 0.5 else None for x in ((I, J), (J, D)))
    leaky, flag = rng.random() < 0.5, rng.random() < 0.5
    if not backward:
        return [u, weight, logits, bias, R, leaky, weight_sharing, flag, window]
    s = torch.randn(R, B, J, D).to(accumulation_dtype(dtype))
    mask = [rng.random() < 0.7 for _ in range(4)]
    options = [leaky, weight_sharing, flag, mask, window]
    return [tensor(B, J, D), u, weight, logits, s, *options]


def try_call(rng: random.Random, backend: str) -> str:
    """What became of one call: "accepted" or the name of the exception."""
    backward = rng.random() < 0.5
    device = "cuda" if backend == "cuda" else "cpu"
    arguments = [
        x.to(device) if isinstance(x, Tensor) else x
        for x in right_arguments(rng, backward, SIZES_OF[backend])
    ]
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        position = rng.randrange(len(arguments))
        try:
            arguments[position] = on_device(rng, spoil(rng, arguments[position]), device)
        except REFUSALS:
            return "not made"  # torch itself has no such tensor
    if backend == "cpu":
        extension.module.set_instruction_set(rng.choice(instruction_sets()))
    operator = OPERATORS[backend].backward if backward else OPERATORS[backend].forward
    try:
        results = operator(*arguments)
    except REFUSALS as error:
        of_torch = CONVERSION in str(error)
        if device == "cuda":
            torch.cuda.synchronize()  # raises again what a kernel has done to the device
            if "CUDA error" in str(error) or "cudaError" in str(error):
                raise SystemError("reached the device before it was refused") from error
        if not str(error) or ("INTERNAL ASSERT" in str(error) and not of_torch):
            raise SystemError("no sentence that a caller could act on") from error
        return type(error).__name__
    # Torch takes a tensor of one element for an integer; fakes are given the integer.
    arguments = [int(x) if isinstance(x, Tensor) and x.dim() == 0 else x for x in arguments]
    promised = (backward_shapes if backward else forward_shapes)(*arguments)
    for x, expected in zip(results, promised, strict=True):
        assert x.shape == expected.shape, f"{x.shape}, promised {expected.shape}"
        assert x.dtype == expected.dtype, f"{x.dtype}, promised {expected.dtype}"
        if not x.is_meta:
            x.clone()  # reads every element
    if device == "cuda":
        torch.cuda.synchronize()
    return "accepted"


def instruction_sets() -> list[str]:
    return extension.module.usable_instruction_sets()


def where(backend: str) -> str:
    """What the calls ran on."""
    if backend == "cuda":
        return torch.cuda.get_device_name()
    return ", ".join(instruction_sets()) if backend == "cpu" else "the interpreter"


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz the raw operators.")
    parser.add_argument("--backend", choices=list(SIZES_OF), default="cpu")
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--memory-gib", type=int, default=16, help="0 for no limit (sanitizers, CUDA)"
    )
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # nested tensors are a prototype
    torch.set_num_threads(arguments.threads)
    if arguments.backend == "triton":
        spare_the_interpreter_what_it_throws_away()
    if arguments.memory_gib:
        limit = arguments.memory_gib << 30
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    outcomes: Counter[str] = Counter()
    for call in range(arguments.calls):
        # A seed for each call: any one can be repeated alone.
        seed = arguments.seed * 1_000_000_007 + call
        rng = random.Random(seed)
        torch.manual_seed(seed % 2**32)
        try:
            outcomes[try_call(rng, arguments.backend)] += 1
        except BaseException:
            print(f"call {call} of seed {arguments.seed}", file=sys.stderr)
            raise
    listed = ", ".join(f"{count} {name}" for name, count in sorted(outcomes.items()))
    print(f"{arguments.calls} calls: {listed}; on {where(arguments.backend)}")


if __name__ == "__main__":
    main()

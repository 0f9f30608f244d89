"""The CUDA kernels on the host: compiled against the emulated execution model, as torch operators.

``Emulator.installed()`` puts them behind the operators of the ``cuda`` backend for CPU tensors, so
that tests call ``fused_routing(..., backend="cuda")`` and run all of the path but the binding.
"""

import ctypes
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from capsule_kernels import ops
from capsule_kernels.backends import cuda
from capsule_kernels.windows import capsules, cells, places

KERNELS = Path(__file__).parents[2] / "csrc" / "cuda"
MODEL = Path(__file__).parent
BUILT = Path(__file__).parents[2] / "build" / "cuda_emulation"
SCALARS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FENCE = 256  # elements of NaN before and behind every array


class Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("B", "I", "J", "K", "D", "R", "weight_sharing")]


class Device(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("sm_count", "shared_per_block", "warpgroups")]


class Call(ctypes.Structure):
    _fields_ = [
        ("shape", Shape),
        ("device", Device),
        *((name, ctypes.c_int) for name in ("leaky", "full_gradient", "scalar", "products")),
    ]


class Plan(NamedTuple):
    """How a call is laid over the device; zeros where it does not fit."""

    capsule_groups: int
    sample_groups: int
    tiles_per_pass: int
    gradient_capsules: int
    splits: int
    buffers: int
    output_blocks: int
    """Of the gradients by output capsules, in one product and without a prior; 0: not these."""
    output_parts: int
    slots: int
    """For images of W, where the forward's sweeps are by warpgroups."""


def grid_gradient(gradient: Tensor, grid: Tensor, window: list[int] | None) -> Tensor:
    """The gradient of a grid from that of its windows, as the binding adds it; [0] stays."""
    if not window or gradient.dim() == 1:
        return gradient
    sums = grid.new_zeros(grid.shape, dtype=torch.promote_types(grid.dtype, torch.float32))
    gradient = gradient.view(len(grid), *places(grid, window), grid.shape[3], -1, grid.shape[4])
    # Cell by cell of the window, none of which meets one of the grid twice: always in one order.
    for n, cell in enumerate(cells(sums, window)):
        cell += gradient[..., n, :]
    return sums.to(grid.dtype)


def compiler() -> str | None:
    return shutil.which("g++")


def build() -> Path:
    """The library of kernels and model, compiled where these very sources have not been."""
    flags = ["-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]
    flags += ["-U_FORTIFY_SOURCE", "-DCAPSULE_KERNELS_EMULATION", f"-I{KERNELS}", f"-I{MODEL}"]
    # The kernels tell the model of their accesses; g1: where in the sources these are.
    watched = ["-g1", "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"]
    sources = dict.fromkeys((*sorted(KERNELS.glob("*.cu")), KERNELS / "routing.cpp"), watched)
    sources |= {source: ["-O3"] for source in sorted(MODEL.glob("*.cpp"))}
    digest = hashlib.sha256(" ".join([*flags, *watched]).encode())
    for path in [*sorted(KERNELS.iterdir()), *sorted(MODEL.iterdir())]:
        if path.suffix in (".cu", ".cuh", ".cpp", ".h"):
            digest.update(path.name.encode() + path.read_bytes())
    library = BUILT / f"{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library
    BUILT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILT) as folder:
        objects = [Path(folder) / f"{source.name}.o" for source in sources]
        for (source, more), made in zip(sources.items(), objects, strict=True):
            command = ["g++", *flags, *more, "-x", "c++", "-c", source, "-o", made]
            subprocess.run(command, check=True)
        made = Path(folder) / library.name
        subprocess.run(["g++", "-shared", *objects, "-ldl", "-o", made], check=True)
        made.replace(library)  # whole, whoever else builds it at the time
    return library


class Fenced:
    """A contiguous copy (or NaN) of an array between fences of NaN."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, values: Tensor | None = None):
        size = torch.Size(shape).numel()
        self.all = torch.full((FENCE + size + FENCE,), torch.nan, dtype=dtype)
        self.values = self.all[FENCE : FENCE + size].view(shape)
        if values is not None:
            self.values.copy_(values)

    def pointer(self) -> int:
        return self.values.data_ptr()

    def check(self, name: str) -> Tensor:
        fences = torch.cat([self.all[:FENCE], self.all[-FENCE:]])
        assert fences.isnan().all(), f"{name}: a write outside of the array"
        return self.values.clone()


class Emulator:
    """The emulated kernels and the device they believe to be on."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        for name in ("forward", "backward", "barriers"):
            getattr(self.library, name).restype = ctypes.c_char_p
        self.launches: list[str] = []
        self.reset()

    def reset(self) -> None:
        """The default device, seed and no barrier left out."""
        self.device = Device(sm_count=5, shared_per_block=227 * 1024)
        self.launches.clear()
        self.configure()

    def configure(self, seed: int = 0, skip: str = "") -> None:
        self.library.configure(seed, skip.encode())

    def barriers(self) -> list[str]:
        """Where the barriers stand that were reached since ``configure``, ``file:line:call``."""
        return self.library.barriers().decode().split()

    def plan(self, shape: Shape, dtype: torch.dtype) -> Plan:
        figures = (ctypes.c_int * len(Plan._fields))()
        call = Call(shape, self.device, 0, 0, SCALARS[dtype], 0)
        self.library.planned(ctypes.byref(call), figures)
        return Plan(*figures)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Backend "cuda" takes CPU tensors, where a call fits the device."""

        def unsupported(_: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
            figures = cuda.Figures((9, 0), self.device.sm_count, self.device.shared_per_block)
            return cuda.does_not_fit(figures, dtype, shape)

        library = torch.library.Library("capsule_kernels", "IMPL")
        library.impl("routing_forward.cuda", self.routing_forward, "CPU")
        library.impl("routing_backward.cuda", self.routing_backward, "CPU")
        with (
            patch.object(cuda, "unavailable", lambda: None),
            patch.object(cuda, "unsupported", unsupported),
        ):
            yield
        library._destroy()

    def routing_forward(
        self, u, weight, logits, bias, num_iterations, leaky, weight_sharing, return_coupling,
        window=None, full_gradient=True,
    ):  # fmt: skip
        u = capsules(u, window)
        outputs = ops.forward_shapes(
            u, weight, logits, bias, num_iterations, leaky, weight_sharing, return_coupling
        )
        call = self._call(u, weight, num_iterations, weight_sharing, leaky)
        return self._run("forward", call, (u, weight, logits, bias), outputs)

    def routing_backward(
        self, grad_v, grid, weight, logits, s, leaky, weight_sharing, full_gradient, output_mask,
        window=None,
    ):  # fmt: skip
        u = capsules(grid, window)
        outputs = ops.backward_shapes(
            grad_v, u, weight, logits, s, leaky, weight_sharing, full_gradient, output_mask
        )
        call = self._call(u, weight, s.shape[0], weight_sharing, leaky, full_gradient)
        grad_u, *others = self._run("backward", call, (grad_v, u, weight, logits, s), outputs)
        return grid_gradient(grad_u, grid, window), *others

    def _line_of(self, address: re.Match[str]) -> str:
        """Where in the kernels an instruction of the library comes from."""
        command = ["addr2line", "--exe", self.library._name, "--inlines", address[0]]
        shown = subprocess.run(command, capture_output=True, text=True, check=True)
        return " < ".join(Path(line).name for line in shown.stdout.split())

    def _call(self, u, weight, R, weight_sharing, leaky, full_gradient=False) -> Call:
        (B, I, K), (_, J, D, _) = u.shape, weight.shape
        products = torch.backends.cuda.matmul.fp32_precision != "tf32"
        shape = Shape(B, I, J, K, D, R, weight_sharing)
        return Call(shape, self.device, leaky, full_gradient, SCALARS[u.dtype], products)

    def _run(self, name, call, inputs, outputs) -> tuple[Tensor, ...]:
        self.launches.append(name)
        sources = [
            None if x is None else Fenced(tuple(x.shape), x.dtype, x.detach()) for x in inputs
        ]
        targets = [Fenced(tuple(x.shape), x.dtype) if x.numel() else None for x in outputs]
        pointers = [
            ctypes.c_void_p(None if x is None else x.pointer()) for x in (*sources, *targets)
        ]
        message = getattr(self.library, name)(ctypes.byref(call), *pointers).decode()
        if message:
            raise RuntimeError(re.sub(r"(?<= at )0x[0-9a-f]+", self._line_of, message))
        return tuple(
            x if target is None else target.check(f"{name}, output {n}")
            for n, (x, target) in enumerate(zip(outputs, targets, strict=True))
        )

"""Builds the compiled extension ``capsule_kernels._C``. Metadata is in pyproject.toml.

Never downloads, never asks for a GPU. What can't be built is left out, with one line that says why:
everything without a C++ compiler, the CUDA kernels without nvcc or with a CPU build of torch.

Environment: ``CAPSULE_KERNELS_CUDA=0`` leaves the CUDA kernels out, ``=1`` insists on them;
``CAPSULE_KERNELS_CXXFLAGS`` has the last word on how the CPU kernels are compiled (sanitizers,
coverage), where ``CXXFLAGS`` set for everything on a machine must not lower their optimisation.
``TORCH_CUDA_ARCH_LIST`` (9.0 is built as 9.0a), ``CUDA_HOME``, ``CXX`` and ``MAX_JOBS`` as for
every torch extension.
"""

import copy
import os
import platform
import shlex
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import setuptools
import torch
from setuptools import setup
from setuptools.extension import Extension
from torch.utils import cpp_extension

ROOT = Path(__file__).parent
if int(setuptools.__version__.split(".")[0]) < 77:  # without build isolation nobody else looks
    sys.exit(
        f"capsule_kernels: setuptools {setuptools.__version__} is too old to read pyproject.toml: "
        'pip install "setuptools>=77"'
    )
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")

# One object of csrc/cpu/kernels.cpp for each instruction set: vector bytes and compiler flags. The
# widest that the processor has is chosen at run time.
INSTRUCTION_SETS: dict[str, tuple[int, list[str]]] = {"baseline": (16, [])}
if IS_X86:
    avx512 = "-mavx512f -mavx512dq -mavx512vl -mavx512bw -mfma -mprefer-vector-width=512"
    INSTRUCTION_SETS["avx2"] = (32, ["-mavx2", "-mfma"])
    INSTRUCTION_SETS["avx512"] = (64, avx512.split())

KERNEL_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    # a * b + c as one instruction, everywhere alike.
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
]


def left_out(what: str, why: str) -> None:
    print(f"capsule_kernels: building without {what}: {why}", file=sys.stderr)


def missing_compiler() -> str | None:
    compiler = (os.environ.get("CXX") or "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler: {compiler} is not there (install g++, or set CXX)"
    return None


def missing_cuda() -> str | None:
    """Why the CUDA kernels can't be built here, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if cpp_extension.CUDA_HOME is None:
        return "no CUDA toolkit found (set CUDA_HOME)"
    nvcc = Path(cpp_extension.CUDA_HOME) / "bin" / "nvcc"
    if not nvcc.exists():
        return f"{nvcc} is not there (CUDA_HOME must name the toolkit)"
    return None


def wants_cuda() -> bool:
    wish = os.environ.get("CAPSULE_KERNELS_CUDA", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"capsule_kernels: CAPSULE_KERNELS_CUDA must be 0 or 1, got {wish!r}")
    reason = "CAPSULE_KERNELS_CUDA=0" if wish == "0" else missing_cuda()
    if reason is None:
        return True
    if wish == "1":
        sys.exit(f"capsule_kernels: CAPSULE_KERNELS_CUDA=1, but {reason}")
    left_out("the CUDA kernels", reason)
    return False


def builds_for_sm_90a() -> bool:
    """Whether sm_90 is among the architectures; it then becomes sm_90a in ``TORCH_CUDA_ARCH_LIST``.

    Only code for the very device knows the products of warpgroups (csrc/cuda/execution.cuh). Where
    nothing is said, the devices at hand decide, as they do for torch.
    """
    wish = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if wish is None and torch.cuda.is_available():
        devices = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
        wish = ";".join(sorted({f"{major}.{minor}" for major, minor in devices}))
    if not wish:
        return False
    names = ["9.0a" if name == "9.0" else name for name in wish.replace(";", " ").split()]
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(names)
    return "9.0a" in names


class Build(cpp_extension.BuildExtension):
    """Compiles the CPU kernels once for each instruction set, beside what torch builds."""

    def build_extensions(self) -> None:
        # csrc/cpu/kernels.cpp knows nothing of torch: plain compiler calls, with flags of its own.
        # They start here, since torch is about to make the compiler its own.
        last_flags = shlex.split(os.environ.get("CAPSULE_KERNELS_CXXFLAGS", ""))
        compiler = copy.copy(self.compiler)

        def compile_kernels(name: str) -> str:
            vector_bytes, flags = INSTRUCTION_SETS[name]
            (compiled,) = compiler.compile(
                ["csrc/cpu/kernels.cpp"],
                output_dir=str(Path(self.build_temp) / name),
                macros=[("CAPSULE_ISA", name), ("CAPSULE_VECTOR_BYTES", str(vector_bytes))],
                extra_postargs=[*KERNEL_FLAGS, *flags, *last_flags],
            )
            return compiled

        link = self.compiler.link_shared_object

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            kernels = [pool.submit(compile_kernels, name) for name in INSTRUCTION_SETS]
            if "MAX_JOBS" in os.environ:
                wait(kernels)  # together with torch's jobs they would be more

            def link_with_kernels(objects: list[str], *rest: Any, **options: Any) -> None:
                link([*objects, *(kernel.result() for kernel in kernels)], *rest, **options)

            self.compiler.link_shared_object = link_with_kernels
            super().build_extensions()

    def copy_extensions_to_source(self) -> None:
        """A process that runs the extension keeps it: a new file takes the place of the old."""
        for extension in self.extensions:
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()


def extensions() -> list[Extension]:
    reason = missing_compiler()
    if reason is not None:
        left_out("the compiled extension", reason)
        return []
    sources = ["csrc/bindings.cpp", "csrc/cpu/dispatch.cpp", "csrc/cpu/operators.cpp"]
    macros: list[tuple[str, str | None]] = [("CAPSULE_X86", None)] if IS_X86 else []
    flags = {"cxx": ["-O2", "-fopenmp", "-fvisibility=hidden"]}
    make = cpp_extension.CppExtension
    if wants_cuda():
        make = cpp_extension.CUDAExtension
        macros.append(("CAPSULE_CUDA", None))
        if builds_for_sm_90a():
            macros.append(("CAPSULE_SM_90A", None))
        sources += sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cuda").glob("*.c[pu]*"))
        sources = [source for source in sources if not source.endswith(".cuh")]
        flags["nvcc"] = ["-O3", "-std=c++17"]
    return [
        make(
            "capsule_kernels._C",
            sources,
            define_macros=macros,
            extra_compile_args=flags,
            extra_link_args=["-fopenmp"],
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": Build})

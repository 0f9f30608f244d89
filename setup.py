"""Builds the compiled extension ``capsule_kernels._C``. Metadata is in pyproject.toml.

Never downloads, never asks for a GPU. What can't be built is left out, with one line that says why:
everything without a C++ compiler, the CUDA kernels without nvcc or with a CPU build of torch.

Environment: ``CAPSULE_KERNELS_CUDA=0`` leaves the CUDA kernels out, ``=1`` insists on them;
``CAPSULE_KERNELS_CXXFLAGS`` has the last word on how the CPU kernels are compiled (sanitizers,
coverage), where ``CXXFLAGS`` set for everything on a machine must not lower their optimisation.
``TORCH_CUDA_ARCH_LIST``, ``CUDA_HOME``, ``CXX`` and ``MAX_JOBS`` as for every torch extension; what
is below 8.0 in that list is left out, and 9.0 is built as 9.0a.
"""

import copy
import os
import platform
import re
import shlex
import shutil
import subprocess
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


OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]
"""For torch's threads. Apple's compiler refuses it; csrc/cpu/threads.h does without there."""

GENERATIONS = ("80", "90", "100")
"""Of devices that the CUDA kernels are for, without the dot; the first is the least."""


def left_out(what: str, why: str) -> None:
    print(f"capsule_kernels: building without {what}: {why}", file=sys.stderr)


def missing_compiler() -> str | None:
    compiler = (os.environ.get("CXX") or "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler: {compiler} is not there (install g++, or set CXX)"
    return None


def ask_nvcc(option: str) -> str:
    command = [f"{cpp_extension.CUDA_HOME}/bin/nvcc", option]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def missing_cuda() -> str | None:
    """Why the CUDA kernels can't be built here, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if cpp_extension.CUDA_HOME is None:
        return "no CUDA toolkit found (set CUDA_HOME)"
    nvcc = Path(cpp_extension.CUDA_HOME) / "bin" / "nvcc"
    if not nvcc.exists():
        return f"{nvcc} is not there (CUDA_HOME must name the toolkit)"
    release = re.search(r"release (\d+)\.\d+", ask_nvcc("--version"))
    if release is not None and release[1] != torch.version.cuda.split(".")[0]:
        return (
            f"{nvcc} is of CUDA {release[0].split()[1]}, and torch was built with "
            f"{torch.version.cuda} (set CUDA_HOME to a toolkit of that major version)"
        )
    return None


def cuda_targets() -> list[str]:
    """What the CUDA kernels are compiled for, as nvcc's ``code``: sm_80, sm_90a, compute_100 ...

    Torch decides, by ``TORCH_CUDA_ARCH_LIST`` or the devices at hand; without either, it is a
    device of each generation. Only sm_90a knows products of warpgroups (csrc/cuda/execution.cuh).
    """
    wish = os.environ.get("TORCH_CUDA_ARCH_LIST") or "native"
    if wish == "native" and not torch.cuda.is_available():
        known = re.findall(r"compute_(\d+)", ask_nvcc("--list-gpu-arch"))
        wish = ";".join(f"{n[:-1]}.{n[-1]}" for n in GENERATIONS if n in known) + "+PTX"
        os.environ["TORCH_CUDA_ARCH_LIST"] = wish
    try:
        flags = cpp_extension._get_cuda_arch_flags()
    except ValueError as error:
        sys.exit(f"capsule_kernels: TORCH_CUDA_ARCH_LIST={wish}: {error}")
    found = {flag.rpartition("code=")[2] for flag in flags}
    old = {t for t in found if int("".join(re.findall(r"\d", t))) < int(GENERATIONS[0])}
    if old:
        left_out(f"CUDA kernels for {', '.join(sorted(old))}", f"they need sm_{GENERATIONS[0]}")
    return sorted("sm_90a" if target == "sm_90" else target for target in found - old)


def code_flag(target: str) -> str:
    return f"-gencode=arch=compute_{target.rpartition('_')[2]},code={target}"


def wanted_cuda_targets() -> list[str]:
    """Empty where the CUDA kernels are left out, which is said."""
    wish = os.environ.get("CAPSULE_KERNELS_CUDA", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"capsule_kernels: CAPSULE_KERNELS_CUDA must be 0 or 1, got {wish!r}")
    reason = "CAPSULE_KERNELS_CUDA=0" if wish == "0" else missing_cuda()
    if reason is None:
        targets = cuda_targets()
        if targets:
            return targets
        reason = "no architecture to build them for"
    if wish == "1":
        sys.exit(f"capsule_kernels: CAPSULE_KERNELS_CUDA=1, but {reason}")
    left_out("the CUDA kernels", reason)
    return []


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
    flags = {"cxx": ["-O2", *OPENMP, "-fvisibility=hidden"]}
    make = cpp_extension.CppExtension
    targets = wanted_cuda_targets()
    if targets:
        make = cpp_extension.CUDAExtension
        macros.append(("CAPSULE_CUDA_TARGETS", ",".join(targets)))
        if "sm_90a" in targets:
            macros.append(("CAPSULE_SM_90A", None))
        sources += sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cuda").glob("*.c[pu]*"))
        sources = [source for source in sources if not source.endswith(".cuh")]
        flags["nvcc"] = ["-O3", "-std=c++17", *map(code_flag, targets)]
    return [
        make(
            "capsule_kernels._C",
            sources,
            define_macros=macros,
            extra_compile_args=flags,
            extra_link_args=OPENMP,
        )
    ]


if __name__ == "__main__":  # tests ask it for targets
    setup(ext_modules=extensions(), cmdclass={"build_ext": Build})

"""Builds the compiled extension ``capsule_kernels._C``. Metadata is in pyproject.toml.

Never downloads, never asks for a GPU. Without a C++ compiler the package installs without the
extension and says so.
"""

import platform
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")

# One object of csrc/cpu/kernels.cpp for each instruction set; the widest usable is chosen at run time.
INSTRUCTION_SETS = {"baseline": (16, [])}
if IS_X86:
    INSTRUCTION_SETS["avx2"] = (32, ["-mavx2", "-mfma"])
    INSTRUCTION_SETS["avx512"] = (
        64,
        ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mprefer-vector-width=512"],
    )

KERNEL_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    # a * b + c as one instruction; the same everywhere, so results do not depend on inlining.
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
]


class Build(BuildExtension):
    """Compiles the kernels once for each instruction set before torch's own build takes over."""

    def build_extensions(self) -> None:
        headers = [str(path) for path in (ROOT / "csrc" / "cpu").glob("*.h")]

        def compile_kernels(name: str) -> str:
            width, flags = INSTRUCTION_SETS[name]
            (kernel_object,) = self.compiler.compile(
                ["csrc/cpu/kernels.cpp"],
                output_dir=str(Path(self.build_temp) / name),
                extra_postargs=[
                    *KERNEL_FLAGS,
                    *flags,
                    f"-DCAPSULE_ISA={name}",
                    f"-DCAPSULE_VECTOR_BYTES={width}",
                ],
                depends=headers,
            )
            return kernel_object

        with ThreadPoolExecutor() as pool:
            self.extensions[0].extra_objects += pool.map(compile_kernels, INSTRUCTION_SETS)
        super().build_extensions()


def extensions() -> list[CppExtension]:
    if shutil.which("c++") is None and shutil.which("g++") is None and shutil.which("clang++") is None:
        print("capsule_kernels: no C++ compiler found: installing without the compiled extension")
        return []
    macros = [("CAPSULE_X86", None)] if IS_X86 else []
    return [
        CppExtension(
            "capsule_kernels._C",
            ["csrc/bindings.cpp", "csrc/cpu/dispatch.cpp", "csrc/cpu/operators.cpp"],
            define_macros=macros,
            extra_compile_args=["-O2", "-fopenmp", "-fvisibility=hidden"],
            extra_link_args=["-fopenmp"],
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": Build})

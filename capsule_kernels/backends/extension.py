"""The compiled extension ``capsule_kernels._C``: loaded once, or the reason why it is not there."""

import importlib
from types import ModuleType

module: ModuleType | None = None
missing: str | None = None

try:
    # Loading it registers its kernels behind the operators that capsule_kernels.ops then defines.
    module = importlib.import_module("capsule_kernels._C")
except ImportError as error:
    missing = (
        "the compiled extension capsule_kernels._C is not there "
        f"({error}); install a C++ compiler and reinstall capsule_kernels to get it"
    )

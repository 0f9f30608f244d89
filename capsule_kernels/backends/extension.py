"""The compiled extension ``capsule_kernels._C``: loaded once, or the reason why it is missing."""

import importlib
import warnings
from types import ModuleType

import torch

module: ModuleType | None = None
missing: str | None = None

try:
    # Loading it registers its kernels behind the operators that capsule_kernels.ops then defines.
    module = importlib.import_module("capsule_kernels._C")
except ModuleNotFoundError as error:
    missing = (
        "the compiled extension capsule_kernels._C is not there "
        f"({error}); install a C++ compiler and reinstall capsule_kernels to get it"
    )
except ImportError as error:  # it is there: most likely built for another torch
    missing = (
        f"the compiled extension capsule_kernels._C does not load with torch {torch.__version__} "
        f"({error}); build it anew: pip install --no-build-isolation --no-deps --force-reinstall ."
    )
    warnings.warn(missing, RuntimeWarning, stacklevel=2)

"""Checks of every argument, before any kernel starts.

Each message names the function and the argument, says what was expected and what came.
"""

from typing import Any

from torch import SymInt, Tensor, bfloat16, device, dtype, float16, float32, float64, strided

DTYPES = (float64, float32, bfloat16, float16)
LARGEST_INT = 2**63 - 1
"""That an operator takes."""
ROUTING_GRADIENTS = ("full", "last")
# A tuple of types: torch 2.9 does not compile their union.
WHOLE = (int, SymInt)
"""What a number is, also where it comes from a size while ``torch.export`` records a program. For
an operator that takes no such numbers PyTorch then fixes the size, as for its own."""


def check_tensor(name: str, value: object, shape: str, rank: int | None, caller: str) -> None:
    """A floating-point tensor of the given rank, of any if that is None; ``shape`` describes it to
    the reader."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{caller}: {name} must be a tensor {shape}, got {type(value).__name__}")
    if value.layout is not strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else value.layout
        raise TypeError(f"{caller}: {name} must be a dense tensor {shape}, got {kind}")
    check_dtype(name, value.dtype, caller)
    if rank is not None and value.dim() != rank:
        raise ValueError(f"{caller}: {name} must have shape {shape}, got {list(value.shape)}")


def check_dtype(name: str, value: dtype, caller: str) -> None:
    """A floating-point type that there are kernels for."""
    if value not in DTYPES:
        raise TypeError(
            f"{caller}: {name} must be float64, float32, bfloat16 or float16, got {value!r}"
        )


def check_beside_u(
    name: str, value: Tensor, shape: str, sizes: tuple[int, ...], u: Tensor, caller: str
) -> None:
    """A tensor of the given sizes, called ``shape`` in letters, with the dtype and device of u."""
    check_tensor(name, value, shape, len(sizes), caller)
    if tuple(value.shape) != sizes:
        raise ValueError(
            f"{caller}: {name} must have shape {shape} = {list(sizes)}, got {list(value.shape)}"
        )
    check_like_u(name, value, u, caller)


def check_like_u(name: str, value: Tensor, u: Tensor, caller: str) -> None:
    """The dtype and device of u."""
    check_dtype_and_device(name, value, "u", u.dtype, u.device, caller)


def check_dtype_and_device(
    name: str, value: Tensor, of: str, dtype: dtype, device: device, caller: str
) -> None:
    if value.dtype != dtype:
        raise TypeError(f"{caller}: {name} must have the dtype of {of}, {dtype}, got {value.dtype}")
    if value.device != device:
        raise ValueError(
            f"{caller}: {name} must be on the device of {of}, {device}, got {value.device}"
        )


def check_layer_input(
    u: Tensor, shape: str, sizes: tuple[int | None, ...], weight: Tensor, cast: bool, caller: str
) -> None:
    """What a layer is called with, in words of the layer. None stands for any size; where u is
    ``cast`` on its way to the operator, its dtype is not looked at."""
    check_tensor("u", u, shape, len(sizes), caller)
    if any(size is not None and size != got for size, got in zip(sizes, u.shape, strict=True)):
        wanted = ", ".join("*" if size is None else str(size) for size in sizes)
        raise ValueError(f"{caller}: u must have shape {shape} = [{wanted}], got {list(u.shape)}")
    dtype = u.dtype if cast else weight.dtype
    check_dtype_and_device("u", u, "the layer's weight", dtype, weight.device, caller)


def check_not_empty(name: str, value: Tensor, caller: str, **sizes: int) -> None:
    """Sizes of at least 1, each given by its letter."""
    for letter, size in sizes.items():
        if size < 1:
            raise ValueError(
                f"{caller}: {name} must have {letter} >= 1, got shape {list(value.shape)}"
            )


def check_int(name: str, value: object, caller: str, least: int = 1) -> None:
    """A whole number of at least ``least`` (bool does not count as one)."""
    if isinstance(value, bool) or not isinstance(value, WHOLE):
        raise TypeError(
            f"{caller}: {name} must be an int >= {least}, got {type(value).__name__} {value!r}"
        )
    if value < least:
        raise ValueError(f"{caller}: {name} must be >= {least}, got {value}")
    if value > LARGEST_INT:
        raise ValueError(f"{caller}: {name} must be < 2**63, got {value}")


def check_pair(name: str, value: Any, caller: str, least: int = 1) -> tuple[int, int]:
    """The pair that ``value`` stands for: itself, or a whole number twice."""
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(isinstance(x, WHOLE) for x in pair):
        wrong = TypeError if len(pair) == 2 else ValueError
        raise wrong(f"{caller}: {name} must be an int >= {least} or two of them, got {value!r}")
    for x in pair:
        check_int(name, x, caller, least)
    return pair


def check_bool(name: str, value: object, caller: str) -> None:
    if not isinstance(value, bool):
        raise TypeError(
            f"{caller}: {name} must be True or False, got {type(value).__name__} {value!r}"
        )


def check_choice(name: str, value: object, choices: tuple[str, ...], caller: str) -> None:
    """One of a few words."""
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join(map(repr, choices))
        raise ValueError(f"{caller}: {name} must be one of {listed}, got {value!r}")


def check_options(
    num_iterations: int,
    leaky: bool,
    routing_gradient: str,
    caller: str,
    **switches: bool,
) -> None:
    """What is no tensor and the same for every kind of layer, and further switches by name."""
    check_int("num_iterations", num_iterations, caller)
    for name, value in {"leaky": leaky, **switches}.items():
        check_bool(name, value, caller)
    check_choice("routing_gradient", routing_gradient, ROUTING_GRADIENTS, caller)


def check_arguments(
    u: Tensor,
    weight: Tensor,
    num_iterations: int,
    logits: Tensor | None,
    bias: Tensor | None,
    leaky: bool,
    weight_sharing: int,
    routing_gradient: str,
    return_coupling: bool,
    caller: str,
) -> None:
    """Raise ``TypeError`` or ``ValueError`` at the first argument that does not fit."""
    check_options(num_iterations, leaky, routing_gradient, caller, return_coupling=return_coupling)
    check_int("weight_sharing", weight_sharing, caller)
    check_tensor("u", u, "[B, I, K]", 3, caller)
    check_tensor("weight", weight, "[I // weight_sharing, J, D, K]", 4, caller)
    _, I, K = u.shape
    rows, J, D, weight_K = weight.shape
    check_not_empty("u", u, caller, I=I, K=K)
    check_not_empty("weight", weight, caller, J=J, D=D)
    if I % weight_sharing != 0:
        raise ValueError(
            f"{caller}: weight_sharing must divide I = {I} (u is {list(u.shape)}), "
            f"got {weight_sharing}"
        )
    if rows != I // weight_sharing or weight_K != K:
        raise ValueError(
            f"{caller}: weight must have shape [I // weight_sharing, J, D, K] = "
            f"[{I // weight_sharing}, J, D, {K}], got {list(weight.shape)}"
        )
    check_like_u("weight", weight, u, caller)
    if logits is not None:
        check_beside_u("logits", logits, "[I, J]", (I, J), u, caller)
    if bias is not None:
        check_beside_u("bias", bias, "[J, D]", (J, D), u, caller)

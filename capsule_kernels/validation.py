"""Checks of every argument of :func:`fused_routing`, before any kernel starts.

Each message names the argument, says what was expected and what came.
"""

from torch import Tensor, bfloat16, float16, float32, float64

DTYPES = (float64, float32, bfloat16, float16)
ROUTING_GRADIENTS = ("full", "last")


def check_tensor(
    name: str, value: object, shape: str, rank: int, caller: str = "fused_routing"
) -> None:
    """A floating-point tensor of the given rank; ``shape`` describes it to the reader."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{caller}: {name} must be a tensor {shape}, got {type(value).__name__}")
    if value.dtype not in DTYPES:
        raise TypeError(
            f"{caller}: {name} must be float64, float32, bfloat16 or float16, got {value.dtype}"
        )
    if value.dim() != rank:
        raise ValueError(f"{caller}: {name} must have shape {shape}, got {list(value.shape)}")


def check_int(name: str, value: object, caller: str = "fused_routing") -> None:
    """A whole number of at least 1 (bool does not count as one)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{caller}: {name} must be an int >= 1, got {type(value).__name__} {value!r}"
        )
    if value < 1:
        raise ValueError(f"{caller}: {name} must be >= 1, got {value}")


def check_bool(name: str, value: object, caller: str = "fused_routing") -> None:
    if not isinstance(value, bool):
        raise TypeError(
            f"{caller}: {name} must be True or False, got {type(value).__name__} {value!r}"
        )


def check_choice(
    name: str, value: object, choices: tuple[str, ...], caller: str = "fused_routing"
) -> None:
    """One of a few words."""
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join(map(repr, choices))
        raise ValueError(f"{caller}: {name} must be one of {listed}, got {value!r}")


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
) -> None:
    """Raise ``TypeError`` or ``ValueError`` at the first argument that does not fit."""
    check_int("num_iterations", num_iterations)
    check_int("weight_sharing", weight_sharing)
    check_bool("leaky", leaky)
    check_bool("return_coupling", return_coupling)
    check_choice("routing_gradient", routing_gradient, ROUTING_GRADIENTS)
    check_tensor("u", u, "[B, I, K]", 3)
    check_tensor("weight", weight, "[I // weight_sharing, J, D, K]", 4)
    _, I, K = u.shape
    rows, J, D, weight_K = weight.shape
    for size, letter, name in (
        (I, "I", "u"),
        (K, "K", "u"),
        (J, "J", "weight"),
        (D, "D", "weight"),
    ):
        if size < 1:
            raise ValueError(
                f"fused_routing: {name} must have {letter} >= 1, got shape "
                f"{list(u.shape if name == 'u' else weight.shape)}"
            )
    if I % weight_sharing != 0:
        raise ValueError(
            f"fused_routing: weight_sharing must divide I = {I} (u is {list(u.shape)}), "
            f"got {weight_sharing}"
        )
    if rows != I // weight_sharing or weight_K != K:
        raise ValueError(
            f"fused_routing: weight must have shape [I // weight_sharing, J, D, K] = "
            f"[{I // weight_sharing}, J, D, {K}], got {list(weight.shape)}"
        )
    others = [("weight", weight)]
    if logits is not None:
        check_tensor("logits", logits, "[I, J]", 2)
        if logits.shape[0] != I or logits.shape[1] != J:
            raise ValueError(
                f"fused_routing: logits must have shape [I, J] = [{I}, {J}], "
                f"got {list(logits.shape)}"
            )
        others.append(("logits", logits))
    if bias is not None:
        check_tensor("bias", bias, "[J, D]", 2)
        if bias.shape[0] != J or bias.shape[1] != D:
            raise ValueError(
                f"fused_routing: bias must have shape [J, D] = [{J}, {D}], got {list(bias.shape)}"
            )
        others.append(("bias", bias))
    for name, value in others:
        if value.dtype != u.dtype:
            raise TypeError(
                f"fused_routing: {name} must have the dtype of u, {u.dtype}, got {value.dtype}"
            )
        if value.device != u.device:
            raise ValueError(
                f"fused_routing: {name} must be on the device of u, {u.device}, got {value.device}"
            )

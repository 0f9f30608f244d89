"""Weights of other implementations in the layout of this one."""

from torch import Tensor


def rearrange_weight(weight: Tensor, layout: str) -> Tensor:
    """A transformation matrix stored in another order, as [I, J, D, K].

    Args:
        weight: a tensor with one axis for each name in ``layout``.
        layout: names of its axes, separated by blanks: each of I (input capsules), J (output
            capsules), D (output dimension) and K (input dimension) once, and any number of axes
            of size 1, named 1. ``"J I D K"``, ``"1 I J D K"``, ``"J I K D"``, ...

    Returns:
        A contiguous tensor [I, J, D, K]: a copy, unless ``weight`` had that layout already.

    Raises:
        ValueError: the layout does not name each axis once, or the weight has other axes.
        TypeError: the weight is no tensor, or the layout no string.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"rearrange_weight: weight must be a tensor, got {type(weight).__name__}")
    if not isinstance(layout, str):
        raise TypeError(f"rearrange_weight: layout must be a str, got {type(layout).__name__}")
    names = layout.split()
    if sorted(name for name in names if name != "1") != ["D", "I", "J", "K"]:
        raise ValueError(
            "rearrange_weight: layout must name I, J, D and K once each, and axes of size 1 as 1, "
            f"separated by blanks, got {layout!r}"
        )
    if weight.dim() != len(names):
        raise ValueError(
            f"rearrange_weight: weight must have the {len(names)} axes of layout {layout!r}, "
            f"got {list(weight.shape)}"
        )
    for axis, name in enumerate(names):
        if name == "1" and weight.shape[axis] != 1:
            raise ValueError(
                f"rearrange_weight: axis {axis} of weight must have size 1 as layout {layout!r} "
                f"says, got {list(weight.shape)}"
            )
    squeezed = weight.squeeze([axis for axis, name in enumerate(names) if name == "1"])
    remaining = [name for name in names if name != "1"]
    return squeezed.permute([remaining.index(name) for name in "IJDK"]).contiguous()

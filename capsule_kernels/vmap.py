"""How ``torch.func.vmap`` maps the operators: over u as one larger batch, over the rest in turn."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .ops import OPERATORS


def map_forward(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The rule of a ``routing_forward``: where only u is mapped over, one larger batch."""

    def rule(info: Any, in_dims: tuple[Any, ...], u: Tensor, *others: Any) -> tuple[Any, Any]:
        if any(dim is not None for dim in in_dims[1:4]):
            return map_in_turn(operator, info, in_dims, (u, *others))
        N = info.batch_size
        v, s, coupling = operator(u.movedim(in_dims[0], 0).flatten(0, 1), *others)
        B = v.shape[0] // N  # samples; with a window its positions
        return_coupling = coupling.dim() == 3
        if return_coupling:
            coupling = coupling.unflatten(0, (N, B))
        results = v.unflatten(0, (N, B)), s.unflatten(1, (N, B)), coupling
        return results, (0, 1, 0 if return_coupling else None)

    return rule


def map_backward(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The rule of a ``routing_backward``: every mapped call has weight gradients of its own."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        return map_in_turn(operator, info, in_dims, arguments)

    return rule


def map_in_turn(
    operator: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """One call for each index of the mapped dimension, results stacked."""
    calls = [
        operator(
            *(
                x if dim is None or not isinstance(x, Tensor) else x.select(dim, n)
                for x, dim in zip(arguments, in_dims, strict=True)
            )
        )
        for n in range(info.batch_size)
    ]
    results = tuple(torch.stack(parts) for parts in zip(*calls, strict=True))
    return results, (0,) * len(results)


for _forward, _backward in OPERATORS.values():
    torch.library.register_vmap(_forward, map_forward(_forward))
    torch.library.register_vmap(_backward, map_backward(_backward))

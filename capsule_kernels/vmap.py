"""How ``torch.func.vmap`` maps the operators: over u as one larger batch, over the rest in turn."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .ops import OPERATORS


def map_forward(
    operator: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], u: Tensor, *others: Any
) -> tuple[Any, Any]:
    """Where only u is mapped over, one larger batch."""
    N = info.batch_size
    if N == 0 or any(dim is not None for dim in in_dims[1:4]):
        return map_in_turn(operator, info, in_dims, u, *others)
    v, s, coupling = operator(u.movedim(in_dims[0], 0).flatten(0, 1), *others)
    B = v.shape[0] // N  # samples; with a window its positions
    return_coupling = coupling.dim() == 3
    if return_coupling:
        coupling = coupling.unflatten(0, (N, B))
    results = v.unflatten(0, (N, B)), s.unflatten(1, (N, B)), coupling
    return results, (0, 1, 0 if return_coupling else None)


def map_in_turn(
    operator: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *arguments: Any
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """One call for each index of the mapped dimension, results stacked.

    All of a ``routing_backward``, too: every mapped call has weight gradients of its own.
    """

    def call(of: Callable[[Tensor, int | None], Tensor]) -> tuple[Tensor, ...]:
        return operator(
            *(
                of(x, dim) if isinstance(x, Tensor) else x
                for x, dim in zip(arguments, in_dims, strict=True)
            )
        )

    def selected(n: int) -> Callable[[Tensor, int | None], Tensor]:
        return lambda x, dim: x if dim is None else x.select(dim, n)

    if info.batch_size > 0:
        calls = [call(selected(n)) for n in range(info.batch_size)]
        results = tuple(torch.stack(parts) for parts in zip(*calls, strict=True))
    else:  # the shapes of a call that there would be
        like = call(lambda x, dim: (x if dim is None else x.movedim(dim, 0).sum(0)).to("meta"))
        results = tuple(arguments[0].new_empty((0, *x.shape), dtype=x.dtype) for x in like)
    return results, (0,) * len(results)


for _forward, _backward in OPERATORS.values():
    torch.library.register_vmap(_forward, partial(map_forward, _forward))
    torch.library.register_vmap(_backward, partial(map_in_turn, _backward))

"""What a type checker is told of functions whose result depends on ``return_coupling``."""

from collections.abc import Callable
from inspect import signature
from typing import Any, get_overloads

import pytest
from torch import Tensor

from capsule_kernels import fused_routing, fused_routing_conv, reference_routing


@pytest.mark.parametrize("function", [fused_routing, fused_routing_conv, reference_routing])
def test_overloads_differ_in_the_coupling_alone(function: Callable[..., Any]) -> None:
    overloads = [signature(overload) for overload in get_overloads(function)]
    pair = tuple[Tensor, Tensor]
    assert [s.return_annotation for s in overloads] == [Tensor, pair, Tensor | pair]

    def others(s: Any) -> list[Any]:
        return [x for x in s.parameters.values() if x.name != "return_coupling"]

    assert all(others(s) == others(signature(function)) for s in overloads)

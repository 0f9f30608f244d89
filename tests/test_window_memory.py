"""What the operators allocate for windows: no copy of them, on every kernel that can run here.

test_triton_interpreted.py runs this file once more, with the interpreted kernels.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from capsule_kernels.ops import OPERATORS
from capsule_kernels.windows import capsules, sizes

from .targets import KERNELS, Target

WINDOW = [3, 3, 1, 1]


class Allocations(TorchDispatchMode):
    """Bytes of every tensor that is made meanwhile, inside of the operators, too."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "capsule_kernels":
            key = getattr(torch._C.DispatchKey, args[1].device.type.upper())
            with self:  # the kernel itself: a call of the operator would come here again
                return func._op_dk(key, *args, **(kwargs or {}))
        made = func(*args, **(kwargs or {}))
        given = set(storages((args, kwargs)))
        self.bytes += [nbytes for x, nbytes in storages(made).items() if x not in given]
        return made


def storages(tensors: Any) -> dict[int, int]:
    """The memory of tensors and its bytes."""
    found = (x.untyped_storage() for x in tree_leaves(tensors) if isinstance(x, Tensor))
    return {storage._cdata: storage.nbytes() for storage in found}


@pytest.fixture(params=KERNELS)
def target(request: pytest.FixtureRequest) -> Target:
    return request.param


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Every thread of the CPU kernels has a buffer of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def inputs(target: Target) -> tuple[Tensor, Tensor]:
    """A grid [B, H, W, C, K] whose windows take four times its memory, and weight."""
    if target.backend == "cuda":
        pytest.skip("the cuda backend copies windows in its binding, as docs/pytorch.md says")
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 6, 6, 16, 8), (16 * 3 * 3, 1, 1, 8)
    u, weight = (torch.randn(shape, generator=generator).to(target.device) for shape in shapes)
    return u, weight


def windows_bytes(u: Tensor) -> int:
    B, I = sizes(u, WINDOW)
    return B * I * u.shape[-1] * u.element_size()


def test_the_count_sees_copies(inputs: tuple[Tensor, Tensor]) -> None:
    u, _ = inputs
    with Allocations() as made:
        windows = capsules(u, WINDOW)
        windows[0].view(-1)
    assert made.bytes == [windows.nbytes] == [windows_bytes(u)]
    assert windows.nbytes == 4 * u.nbytes


def test_the_forward_copies_none(target: Target, inputs: tuple[Tensor, Tensor]) -> None:
    u, weight = inputs
    with Allocations() as made:
        OPERATORS[target.backend].forward(u, weight, None, None, 2, False, 1, False, WINDOW)
    assert 0 < max(made.bytes) < windows_bytes(u)


@pytest.mark.parametrize("of_u", [False, True])
def test_the_backward_copies_none(
    target: Target, inputs: tuple[Tensor, Tensor], of_u: bool
) -> None:
    """Triton's has the gradients of their capsules once, to add up those of a cell."""
    u, weight = inputs
    forward, backward = OPERATORS[target.backend]
    v, s, _ = forward(u, weight, None, None, 2, False, 1, False, WINDOW)
    with Allocations() as made:
        mask = [of_u, True, False, False]
        backward(v, u, weight, None, s, False, 1, True, mask, WINDOW)
    large = [nbytes for nbytes in made.bytes if nbytes >= windows_bytes(u)]
    assert large == [windows_bytes(u)] * (of_u and target.backend == "triton")

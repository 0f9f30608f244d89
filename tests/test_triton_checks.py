"""What Triton's operators refuse past the checks of ``fused_routing``: shapes with which their
kernels would read out of bounds. The tensors are meta tensors: no kernel is near."""

from typing import Any

import pytest
import torch
from torch import Tensor

from capsule_kernels.backends.triton.checks import check_backward, check_forward

B, I, J, K, D, R = 2, 6, 3, 4, 5, 2


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "meta") -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def inputs() -> dict[str, Any]:
    return {
        "u": tensor(B, I, K),
        "weight": tensor(I, J, D, K),
        "logits": tensor(I, J),
        "weight_sharing": 1,
        "window": None,
    }


def forward_arguments() -> dict[str, Any]:
    return inputs() | {"bias": tensor(J, D), "num_iterations": R}


def backward_arguments() -> dict[str, Any]:
    # s is as wide as what kernels compute in.
    return inputs() | {
        "grad_v": tensor(B, J, D),
        "s": tensor(R, B, J, D, dtype=torch.float32),
    }


GRID = {"u": tensor(B, 4, 5, 2, K), "weight": tensor(12, J, D, K), "logits": tensor(12, J)}
"""Windows 3 x 2 of 2 types: [B * 2 * 4, 12, K]."""


def test_what_the_tables_start_from_is_accepted():
    check_forward(**forward_arguments())
    check_backward(**backward_arguments())
    for weight_sharing in (2, 3, 6):
        shared = {"weight": tensor(I // weight_sharing, J, D, K), "weight_sharing": weight_sharing}
        check_forward(**forward_arguments() | shared | {"logits": None, "bias": None})
        check_backward(**backward_arguments() | shared | {"logits": None})
    windows = GRID | {"window": [3, 2, 1, 1]}
    check_forward(**forward_arguments() | windows)
    of_windows = {"grad_v": tensor(16, J, D), "s": tensor(R, 16, J, D, dtype=torch.float32)}
    check_backward(**backward_arguments() | windows | of_windows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": tensor(B, I, K, dtype=torch.int64)}, "u must be float64, float32, .*, got torch.i"),
        ({"u": tensor(B, I)}, r"u must have shape \[B, I, K\], got \[2, 6\]"),
        ({"u": tensor(B, I + 1, K)}, r"weight must be \[7, 3, 5, 4\]"),
        ({"u": tensor(B, I, K + 1)}, r"weight must be \[6, 3, 5, 5\]"),
        ({"weight": tensor(I, J, D)}, r"weight must have shape .*, got \[6, 3, 5\]"),
        *(
            ({"weight": tensor(*sizes)}, "weight must have shape .*, none of them 0")
            for sizes in ((0, J, D, K), (I, 0, D, K), (I, J, 0, K), (I, J, D, 0))
        ),
        ({"weight": tensor(I, J, D, K, dtype=torch.float32)}, "weight must be .* torch.bfloat16"),
        ({"weight": tensor(I, J, D, K, device="cpu")}, "weight must be .* on meta, got .* on cpu"),
        ({"weight_sharing": 0}, "weight_sharing must divide I = 6, got 0"),
        ({"weight_sharing": -1}, "weight_sharing must divide I = 6, got -1"),
        ({"weight_sharing": 4}, "weight_sharing must divide I = 6, got 4"),
        ({"weight_sharing": 2}, r"weight must be \[3, 3, 5, 4\]"),
        ({"logits": tensor(J, I)}, r"logits must be \[6, 3\]"),
        ({"logits": tensor(I, J, dtype=torch.float16)}, "logits must be .* torch.bfloat16"),
        ({"window": [3, 2, 1, 1]}, r"a window of 4 integers takes u \[B, H, W, C, K\]"),
        (GRID | {"window": [3, 2]}, "a window of 4 integers takes u"),
        (GRID | {"window": [3, 2, 1, 1], "weight_sharing": 2}, "a window of 4 .* got .* and 2"),
        *(
            (GRID | {"window": window}, r"window must fit into the grid \[4, 5\] and move by 1")
            for window in (
                [0, 2, 1, 1], [3, 0, 1, 1], [5, 2, 1, 1], [3, 6, 1, 1], [3, 2, 0, 1], [3, 2, 1, -1],
            )
        ),
        (GRID | {"window": [2, 2, 1, 1]}, r"weight must be \[8, 3, 5, 4\]"),
    ],
)  # fmt: skip
def test_inputs_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^routing_forward: {message}"):
        check_forward(**forward_arguments() | change)
    with pytest.raises(ValueError, match=f"^routing_backward: {message}"):
        check_backward(**backward_arguments() | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_iterations": 0}, "num_iterations must be >= 1, got 0"),
        ({"num_iterations": -(2**63)}, "num_iterations must be >= 1, got -9"),
        ({"bias": tensor(D, J)}, r"bias must be \[3, 5\]"),
        ({"bias": tensor(J, D, dtype=torch.float32)}, "bias must be .* torch.bfloat16"),
    ],
)
def test_what_only_the_forward_takes(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^routing_forward: {message}"):
        check_forward(**forward_arguments() | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_v": tensor(B, D, J)}, r"grad_v must be \[2, 3, 5\]"),
        ({"grad_v": tensor(B, J * D)}, r"grad_v must be \[2, 3, 5\]"),
        ({"grad_v": tensor(B, J, D, dtype=torch.float32)}, "grad_v must be .* torch.bfloat16"),
        ({"grad_v": tensor(B, J, D, device="cpu")}, "grad_v must be .* on meta, got .* on cpu"),
        ({"s": tensor(B, J, D)}, r"s must have shape \[R, B, J, D\], got \[2, 3, 5\]"),
        ({"s": tensor(0, B, J, D)}, r"s must have shape \[R, B, J, D\], got \[0"),
        ({"s": tensor(R, B, J, D)}, r"s must be .* torch.float32 on meta, got .* torch.bfloat16"),
        ({"s": tensor(R, B, D, J, dtype=torch.float32)}, r"s must be \[2, 2, 3, 5\]"),
        (GRID | {"window": [3, 2, 1, 1]}, r"grad_v must be \[16, 3, 5\]"),
    ],
)
def test_what_only_the_backward_takes(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^routing_backward: {message}"):
        check_backward(**backward_arguments() | change)

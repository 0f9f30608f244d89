"""Weights of other implementations: their formula in their layout gives what this package gives."""

import pytest
import torch
from torch import Tensor

from capsule_kernels import CapsuleLinear, rearrange_weight, squash

B, I, J, K, D = 3, 6, 4, 5, 2
SIZES = {"I": I, "J": J, "K": K, "D": D, "1": 1}


def routed(u: Tensor, weight: Tensor, layout: str, detach: bool) -> Tensor:
    """Three routing iterations with the weight in the layout it is stored in."""
    letters = layout.replace("1", "").replace(" ", "").lower()
    u_hat = torch.einsum(f"{letters},bik->bjid", weight.squeeze(), u)  # [B, J, I, D]
    inner = u_hat.detach() if detach else u_hat
    b = u.new_zeros(B, J, I)
    for _ in range(2):
        v = squash((b.softmax(1)[..., None] * inner).sum(2))
        b = b + (inner * v[:, :, None]).sum(-1)
    return squash((b.softmax(1)[..., None] * u_hat).sum(2))


@pytest.mark.parametrize("layout", ["J I D K", "1 J I D K", "1 I J D K", "J I K D", "I K J D"])
@pytest.mark.parametrize("detach", [False, True])
def test_a_checkpoint_predicts_and_trains_as_before(layout: str, detach: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(B, I, K, generator=generator, dtype=torch.float64)
    shape = [SIZES[name] for name in layout.split()]
    weight = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    layer = CapsuleLinear(
        I, K, J, D, routing_gradient="last" if detach else "full", dtype=torch.float64
    )
    rearranged = rearrange_weight(weight, layout)
    assert rearranged.is_contiguous()
    layer.load_state_dict({"weight": rearranged})
    expected = routed(u, weight, layout, detach)
    torch.testing.assert_close(layer(u), expected)
    expected.square().sum().backward()
    layer(u).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, rearrange_weight(weight.grad, layout))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("J I D", "layout must name I, J, D and K once each"),
        ("J I D D", "layout must name I, J, D and K once each"),
        ("1 J I D K", "weight must have the 5 axes of layout '1 J I D K', got"),
        ("J I D K 1 1", "weight must have the 6 axes"),
    ],
)
def test_a_layout_that_does_not_fit(layout: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^rearrange_weight: {message}"):
        rearrange_weight(torch.zeros(J, I, D, K), layout)


def test_what_is_no_weight_or_no_layout() -> None:
    with pytest.raises(TypeError, match="weight must be a tensor, got list"):
        rearrange_weight([1.0], "I J D K")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="layout must be a str, got list"):
        rearrange_weight(torch.zeros(1, 1, 1, 1), ["I", "J", "D", "K"])  # type: ignore[arg-type]


def test_an_axis_of_another_size() -> None:
    with pytest.raises(ValueError, match="axis 0 of weight must have size 1"):
        rearrange_weight(torch.zeros(2, J, I, D, K), "1 J I D K")

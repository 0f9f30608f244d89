"""``CapsuleLinear`` as a module among PyTorch's: state, copies, moves, parametrizations."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

from capsule_kernels import CapsuleLinear, fused_routing

OPTIONS = [
    {},
    {"bias": True, "learn_logits": True},
    {"leaky": True, "weight_sharing": 3, "routing_gradient": "last", "backend": "reference"},
]


def layer(**options: object) -> CapsuleLinear:
    torch.manual_seed(0)
    return CapsuleLinear(6, 4, 3, 5, **options)  # type: ignore[arg-type]


U = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_state_copies_and_pickles(options: dict[str, object]) -> None:
    original = layer(**options)
    names = ["weight", *(["bias", "logits"] if "bias" in options else [])]
    assert list(original.state_dict()) == names
    other = layer(**options)
    nn.init.zeros_(other.weight)
    assert other.load_state_dict(original.state_dict()) == ([], [])
    for same in (other, copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        assert torch.equal(same(U), original(U))
        assert repr(same) == repr(original)
        assert same.weight.data_ptr() != original.weight.data_ptr()


def test_repr_rebuilds_the_layer() -> None:
    for options in OPTIONS:
        original = layer(**options)
        rebuilt = eval(repr(original), {"CapsuleLinear": CapsuleLinear})
        rebuilt.load_state_dict(original.state_dict())
        assert torch.equal(rebuilt(U), original(U))
    assert repr(layer()) == (
        "CapsuleLinear(in_capsules=6, in_dim=4, out_capsules=3, out_dim=5, num_iterations=3, "
        "bias=False)"
    )


def test_parameters_start_as_the_authors_did() -> None:
    torch.manual_seed(0)
    large = CapsuleLinear(100, 8, 10, 16, bias=True, learn_logits=True)
    assert large.weight.std().item() == pytest.approx(0.1, rel=0.02)
    assert abs(large.weight.mean().item()) < 0.002
    assert large.bias is not None
    assert (large.bias == 0.1).all()
    assert large.logits is not None
    assert not large.logits.any()


def test_reset_parameters_starts_anew() -> None:
    a, b = layer(bias=True, learn_logits=True), layer(bias=True, learn_logits=True)
    with torch.no_grad():
        for p in a.parameters():
            p.fill_(7)
    torch.manual_seed(0)
    a.reset_parameters()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


def test_dtype_and_device_moves() -> None:
    original = layer(bias=True)
    assert {p.dtype for p in layer(bias=True, dtype=torch.float64).parameters()} == {torch.float64}
    half = copy.deepcopy(original).to(torch.bfloat16)
    assert half(U.bfloat16()).dtype == torch.bfloat16
    assert original.double()(U.double()).dtype == torch.float64
    with pytest.raises(
        TypeError, match=r"u must have the dtype of the layer's weight, torch\.float64"
    ):
        original(U)


@pytest.mark.slow
def test_on_the_meta_device_and_back() -> None:
    with torch.device("meta"):
        empty = layer(bias=True)
    assert empty.weight.is_meta
    v = empty(U.to("meta"))
    assert v.is_meta
    assert v.shape == (2, 3, 5)
    empty.to_empty(device="cpu").load_state_dict(layer(bias=True).state_dict())
    assert torch.equal(empty(U), layer(bias=True)(U))
    skipped = nn.utils.skip_init(CapsuleLinear, 6, 4, 3, 5)
    assert skipped.weight.shape == (6, 3, 5, 4)


def test_parametrizations_and_functional_call() -> None:
    normalised = parametrizations.weight_norm(layer(), dim=1)
    torch.testing.assert_close(normalised(U), layer()(U))
    normalised(U).sum().backward()
    assert all(p.grad is not None for p in normalised.parameters())
    doubled = functional_call(layer(), {"weight": 2 * layer().weight}, U)
    assert torch.equal(doubled, fused_routing(U, 2 * layer().weight))


def test_hooks_and_containers() -> None:
    network = nn.Sequential(layer(), CapsuleLinear(3, 5, 2, 4))
    shapes = []
    network[0].register_forward_hook(lambda m, i, v: shapes.append(tuple(v.shape)))
    assert network(U).shape == (2, 2, 4)
    assert shapes == [(2, 3, 5)]
    assert sum(p.numel() for p in network.parameters()) == 6 * 3 * 5 * 4 + 3 * 2 * 4 * 5

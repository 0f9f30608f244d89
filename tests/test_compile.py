"""``torch.compile`` of the op and of a network: one graph, no recompilation, the same errors."""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from capsule_kernels import fused_routing
from model.config import Config
from model.losses import total_loss
from model.views import Batch

from .cases import OPTIONS, Case, make_inputs, run
from .targets import DEVICES, NEEDS_KERNELS
from .tiny import ARCHITECTURE, tiny_capsnet


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=lambda m, n=name: f"{n}: {m}")


@NEEDS_KERNELS
@pytest.mark.parametrize(
    ("case", "dynamic"), [*product(OPTIONS, [True]), (Case(), False), (OPTIONS[-1], False)], ids=str
)
def test_every_option_is_one_graph(case: Case, dynamic: bool) -> None:
    """Traced forward and backward by AOTAutograd; the next test compiles what was traced."""
    inputs = make_inputs(case, torch.float32)
    whole = torch.compile(fused_routing, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert_same(run(whole, case, inputs), run(fused_routing, case, inputs))


@pytest.mark.slow
def test_with_inductor_between_other_operations() -> None:
    def function(u: Tensor, weight: Tensor, R: int, **options: Any) -> tuple[Tensor, Tensor]:
        v, c = fused_routing(u.tanh(), weight * 2, R, **options)
        return v.exp(), c

    case = Case(B=4)
    inputs = make_inputs(case, torch.float32)
    assert_same(
        run(torch.compile(function, fullgraph=True), case, inputs), run(function, case, inputs)
    )


def test_a_new_batch_size_compiles_nothing_anew() -> None:
    whole = torch.compile(fused_routing, fullgraph=True, dynamic=True, backend="aot_eager")
    for B in (4, 3, 17, 8):
        case = Case(B=B)
        inputs = make_inputs(case, torch.float32)
        # From the second size on, compiling anew is an error.
        with torch._dynamo.config.patch(error_on_recompile=B != 4):
            found = run(whole, case, inputs)
        assert_same(found, run(fused_routing, case, inputs))


def test_inputs_changed_in_place_are_noticed() -> None:
    """As without the compiler: their gradients would be those of other values."""

    def function(u: Tensor, weight: Tensor) -> Tensor:
        u = u * 1
        v = fused_routing(u, weight)
        u.add_(1)
        return v

    inputs = make_inputs(Case(), torch.float32)
    for backend in ("eager", "aot_eager"):
        whole = torch.compile(function, fullgraph=True, backend=backend)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            whole(inputs["u"], inputs["weight"]).sum().backward()


def test_second_derivatives_are_right_or_refused() -> None:
    inputs = make_inputs(Case(), torch.float64)
    leaves = inputs["u"], inputs["weight"]

    def second(routing: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        (g,) = torch.autograd.grad(routing(*leaves).square().sum(), leaves[0], create_graph=True)
        return torch.autograd.grad(g.square().sum(), leaves)

    expected = second(fused_routing)
    found = second(torch.compile(fused_routing, fullgraph=True, backend="eager"))
    torch.testing.assert_close(found, expected)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        second(torch.compile(fused_routing, fullgraph=True, backend="aot_eager"))


def test_batched_gradients_are_right_and_have_no_graph() -> None:
    """As docs/pytorch.md warns: PyTorch drops that of any function that AOTAutograd compiled."""
    inputs = make_inputs(Case(), torch.float64)
    leaves = inputs["u"], inputs["weight"]

    def batched(routing: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        v = routing(*leaves)
        rows = torch.stack([v.detach().sin(), v.detach().cos()])
        return torch.autograd.grad(v, leaves, rows, is_grads_batched=True, create_graph=True)

    found = batched(torch.compile(fused_routing, fullgraph=True, backend="aot_eager"))
    expected = batched(fused_routing)
    torch.testing.assert_close([x.detach() for x in found], [x.detach() for x in expected])
    assert all(x.requires_grad for x in expected)
    assert not any(x.requires_grad for x in found)


def network_and_batch(B: int, device: str) -> tuple[nn.Module, Callable[[Batch], Tensor], Batch]:
    torch.manual_seed(0)
    network = tiny_capsnet().to(device)
    config = Config("tiny", ARCHITECTURE)

    def loss(batch: Batch) -> Tensor:
        return total_loss(network(batch.images, batch.labels), batch, config)

    images = torch.rand(B, 1, 28, 28).to(device)
    labels = torch.randint(10, (B, 1)).to(device)
    return network, loss, Batch(images, labels, images.unsqueeze(1).clone())


@pytest.mark.parametrize("device", DEVICES)
def test_the_whole_network_with_its_loss(device: str) -> None:
    network, loss, batch = network_and_batch(6, device)
    expected = loss(batch)
    expected.backward()
    gradients = {name: p.grad for name, p in network.named_parameters()}
    network.zero_grad()
    whole = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    found = whole(batch)
    found.backward()
    torch.testing.assert_close(found, expected)
    assert_same({name: p.grad for name, p in network.named_parameters()}, gradients)
    with torch._dynamo.config.patch(error_on_recompile=True):
        smaller = Batch(*(x[:5].clone() for x in batch))
        torch.testing.assert_close(whole(smaller), loss(smaller))


BAD = {
    "weight must have shape": lambda u, w: fused_routing(u, w[1:]),
    "u must have shape": lambda u, w: fused_routing(u[0], w),
    "num_iterations must be >= 1": lambda u, w: fused_routing(u, w, 0),
    "routing_gradient must be": lambda u, w: fused_routing(u, w, routing_gradient="none"),
    "bias must have the dtype of u": lambda u, w: fused_routing(u, w, bias=w[0, :, :, 0].double()),
    "backend must be one of": lambda u, w: fused_routing(u, w, backend="fast"),
    "backend 'cuda' can't be used": lambda u, w: fused_routing(u, w, backend="cuda"),
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_input_names_the_argument(sentence: str) -> None:
    inputs = make_inputs(Case(), torch.float32)
    u, weight = inputs["u"].detach(), inputs["weight"].detach()
    errors = (ValueError, TypeError, RuntimeError)
    with pytest.raises(errors, match=f"^fused_routing: {sentence}"):
        torch.compile(BAD[sentence], backend="aot_eager")(u, weight)
    torch._dynamo.reset()
    # Asked for one whole graph, Dynamo wraps what was raised; the sentence is in it.
    with pytest.raises(torch._dynamo.exc.Unsupported, match=f"fused_routing: {sentence}"):
        torch.compile(BAD[sentence], fullgraph=True, backend="aot_eager")(u, weight)

"""The op among PyTorch's features, on every kernel that can run here: a test for each feature.

The files named after a feature (test_compile.py, test_transforms.py, ...) go through its options on
the CPU kernels. This one shows that nothing about a feature depends on the backend: on a GPU it is
part of the GPU suite, and elsewhere it runs once more, interpreted, in a process of its own.
"""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

from capsule_kernels import (
    CapsuleConv2d,
    CapsuleLinear,
    autograd,
    fused_routing,
    fused_routing_conv,
)
from capsule_kernels.ops import OPERATORS, Operators

from . import cases, interpreted
from .cases import Case, make_inputs, run
from .targets import KERNELS, Target

CASE = Case(B=4, I=2, J=2, K=2, D=3, R=2, logits=True, bias=True, leaky=True)


@pytest.fixture(params=KERNELS)
def target(request: pytest.FixtureRequest) -> Target:
    return request.param


@pytest.fixture
def dtype(target: Target) -> torch.dtype:
    """float64 where the kernels take it: what is compared then differs by nothing but rounding."""
    return torch.float64 if target.can_run(CASE, torch.float64) else torch.float32


@pytest.fixture
def inputs(target: Target, dtype: torch.dtype) -> dict[str, Tensor]:
    return make_inputs(CASE, dtype, target.device)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@interpreted.marked
def test_in_the_interpreter() -> None:
    interpreted.check_in_the_interpreter("test_every_backend.py", "triton-cpu", 29)


def route(inputs: dict[str, Tensor], backend: str) -> Tensor:
    return cases.route(fused_routing, CASE, inputs, backend=backend)


def of_u_and_weight(inputs: dict[str, Tensor], backend: str) -> Callable[..., Tensor]:
    fixed = {name: inputs[name].detach() for name in ("logits", "bias")}
    return lambda u, weight: route({"u": u, "weight": weight, **fixed}, backend)


def assert_same(found: Any, expected: Any) -> None:
    """Up to the order of float32 sums, where float64 is not to be had."""
    first = found[0] if isinstance(found, tuple | list) else found
    loose = {"rtol": 1e-4, "atol": 1e-5} if first.dtype == torch.float32 else {}
    torch.testing.assert_close(found, expected, **loose)


@pytest.mark.parametrize("weight_sharing", [1, 2])
def test_opcheck(target: Target, dtype: torch.dtype, weight_sharing: int) -> None:
    case = Case(**{**vars(CASE), "weight_sharing": weight_sharing, "bias": weight_sharing == 1})
    inputs = make_inputs(case, dtype, target.device)
    tensors = [None if x is None else x.detach() for x in inputs.values()]
    forward, backward = OPERATORS[target.backend]
    options = (case.R, case.leaky, weight_sharing, weight_sharing == 1)
    torch.library.opcheck(forward, (*tensors, *options))
    v, s, _ = forward(*tensors, *options)
    mask = [True, True, True, weight_sharing == 1]
    options = (case.leaky, weight_sharing, weight_sharing == 1, mask)
    torch.library.opcheck(backward, (v, *tensors[:3], s, *options))


def test_any_strides(target: Target, inputs: dict[str, Tensor]) -> None:
    """Every tensor, the s that the forward saved among them, as a slice of a larger one."""
    tensors = [x.detach() for x in inputs.values()]
    forward, backward = OPERATORS[target.backend]
    options = (CASE.leaky, CASE.weight_sharing)

    def both(view: Callable[[Tensor], Tensor]) -> list[Tensor]:
        u, weight, logits, bias = map(view, tensors)
        v, s, c = forward(u, weight, logits, bias, CASE.R, *options, True)
        given = (view(v), u, weight, logits, view(s), *options, True, [True] * 4)
        return [v, s, c, *backward(*given)]

    dense, strided = both(lambda x: x), both(lambda x: torch.stack([x, -x], 1).select(1, 0))
    torch.testing.assert_close(strided, dense, rtol=0, atol=0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_graph_for_every_batch_size(
    target: Target, inputs: dict[str, Tensor], dynamic: bool
) -> None:
    whole = torch.compile(route, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for B in (4, 3) if dynamic else (4,):
        sized = inputs | {"u": inputs["u"].detach()[:B].clone().requires_grad_()}
        with torch._dynamo.config.patch(error_on_recompile=B != 4):
            found = whole(sized, target.backend)
        expected = route(sized, target.backend)
        assert torch.equal(found, expected)
        leaves = list(sized.values())
        gradients = (torch.autograd.grad(v.square().sum(), leaves) for v in (found, expected))
        torch.testing.assert_close(*gradients)


def test_bad_input_under_compile(target: Target, inputs: dict[str, Tensor]) -> None:
    compiled = torch.compile(route, backend="aot_eager")
    with pytest.raises(ValueError, match=r"^fused_routing: weight must have shape"):
        compiled(inputs | {"weight": inputs["weight"][1:]}, target.backend)


def test_export(target: Target, dtype: torch.dtype) -> None:
    layer = CapsuleLinear(
        2, 2, 2, 3, 2, backend=target.backend, device=target.device, dtype=dtype
    ).eval()
    u = torch.randn(4, 2, 2, device=target.device, dtype=dtype)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (u,), dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    served = torch.export.load(file).module()
    operators = {str(node.target) for node in program.graph.nodes}
    assert f"capsule_kernels.routing_forward.{target.backend}" in operators
    for B in (1, 4):
        assert torch.equal(served(u[:B]), layer(u[:B]))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(target: Target, low: torch.dtype) -> None:
    """What it casts by itself is what a cast by hand gives; gradients have the leaves' dtype."""
    inputs = make_inputs(CASE, torch.float32, target.device)
    with torch.autocast(target.device, low):
        found = route(inputs, target.backend)
    expected = route({name: x.to(low) for name, x in inputs.items()}, target.backend)
    assert found.dtype == low
    assert torch.equal(found, expected)
    leaves = list(inputs.values())
    gradients = [torch.autograd.grad(v.float().sum(), leaves) for v in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_forward_mode_of_a_backward_inside_autocast(target: Target) -> None:
    """The oracle beneath it computes as outside: nothing is cast again."""
    inputs = make_inputs(CASE, torch.float32, target.device)
    u = inputs["u"]
    tangents = []
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(u, u.detach().cos())
        v = route(inputs | {"u": dual}, target.backend).sum()
        for enabled in (False, True):
            with torch.autocast(target.device, torch.bfloat16, enabled=enabled):
                (gradient,) = torch.autograd.grad(v, dual, retain_graph=True)
            tangents.append(forward_ad.unpack_dual(gradient).tangent)
    assert tangents[0].any()
    assert torch.equal(*tangents)


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor]], Callable[..., Any]]] = {
    "grad": lambda f: grad(lambda u, w: f(u, w).square().sum(), (0, 1)),
    "vmap over u": lambda f: lambda u, w: vmap(f, (0, None))(torch.stack([u, -u, 2 * u]), w),
    "vmap of grad": lambda f: (
        lambda u, w: vmap(grad(lambda w, x: f(x[None], w).square().sum()), (None, 0))(w, u)
    ),
    "jvp": lambda f: lambda u, w: jvp(f, (u, w), (u.cos(), w.sin())),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(target: Target, inputs: dict[str, Tensor], name: str) -> None:
    u, weight = inputs["u"].detach(), inputs["weight"].detach()
    found, expected = (
        TRANSFORMS[name](of_u_and_weight(inputs, backend))(u, weight)
        for backend in (target.backend, "reference")
    )
    assert_same(found, expected)


def test_an_ensemble(target: Target, dtype: torch.dtype) -> None:
    layers = [
        CapsuleLinear(2, 2, 2, 3, 2, backend=target.backend, device=target.device, dtype=dtype)
        for _ in range(2)
    ]
    parameters, buffers = stack_module_state(layers)  # type: ignore[arg-type]
    u = torch.randn(2, 2, 2, device=target.device, dtype=dtype)
    v = vmap(lambda p, b: functional_call(layers[0], (p, b), (u,)))(parameters, buffers)
    assert torch.equal(v, torch.stack([layer(u) for layer in layers]))
    v.square().sum().backward()
    for n, layer in enumerate(layers):
        layer(u).square().sum().backward()
        torch.testing.assert_close(parameters["weight"].grad[n], layer.weight.grad)


def test_double_backward(target: Target, inputs: dict[str, Tensor]) -> None:
    def derivatives(backend: str) -> list[Tensor]:
        leaves = list(inputs.values())
        first = torch.autograd.grad(route(inputs, backend).sum(), leaves, create_graph=True)
        penalty = torch.stack([g.square().sum() for g in first]).sum()
        return [*first, *torch.autograd.grad(penalty, leaves)]

    assert_same(derivatives(target.backend), derivatives("reference"))


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch, target: Target) -> list[list[bool]]:
    """The gradients asked for in every call of the backward operator."""
    noted: list[list[bool]] = []
    forward, backward = OPERATORS[target.backend]

    def noting(*arguments: Any) -> Any:
        noted.append(arguments[8])
        return backward(*arguments)

    monkeypatch.setitem(autograd.OPERATORS, target.backend, Operators(forward, noting))  # type: ignore[arg-type]
    return noted


def test_a_frozen_weight_costs_nothing(
    target: Target, inputs: dict[str, Tensor], masks: list[list[bool]]
) -> None:
    (everything,) = torch.autograd.grad(route(inputs, "reference").sum(), inputs["u"])
    (asked,) = torch.autograd.grad(route(inputs, target.backend).sum(), inputs["u"])
    frozen = {name: x.detach() for name, x in inputs.items()} | {"u": inputs["u"]}
    route(frozen, target.backend).sum().backward()
    assert masks == [[True, False, False, False]] * 2
    assert_same([asked, inputs["u"].grad], [everything, everything])
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(route(inputs, target.backend), route(frozen, target.backend))
    assert len(masks) == 2


def test_checkpointing(target: Target, inputs: dict[str, Tensor]) -> None:
    leaves = list(inputs.values())
    v = checkpoint(route, inputs, target.backend, use_reentrant=False)
    found = torch.autograd.grad(v.sum(), leaves)
    expected = torch.autograd.grad(route(inputs, target.backend).sum(), leaves)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_many_threads(target: Target, dtype: torch.dtype) -> None:
    """Calls of other sizes and options at once, as Triton's interpreter alone does not bear."""
    cases = [CASE, Case(B=3, I=3, J=2, K=3, D=2, R=2), Case(B=1, I=2, J=3, K=2, D=4, R=1)]
    calls = [
        partial(run, fused_routing, case, make_inputs(case, dtype, target.device)) for case in cases
    ]
    alone = [call(backend=target.backend) for call in calls]
    start = Barrier(len(calls))

    def work(call: Callable[..., dict[str, Tensor]]) -> dict[str, Tensor]:
        start.wait()
        return call(backend=target.backend)

    with ThreadPoolExecutor(len(calls)) as pool:
        for found, expected in zip(pool.map(work, calls), alone, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_layer_is_a_module(target: Target, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = CapsuleLinear(4, 2, 2, 3, 2, True, weight_sharing=2, backend=target.backend)
    moved = copy.deepcopy(layer).to(target.device, dtype)
    u = torch.randn(2, 4, 2, dtype=dtype, device=target.device)
    expected = moved(u)
    rebuilt = eval(repr(layer), {"CapsuleLinear": CapsuleLinear}).to(target.device, dtype)
    rebuilt.load_state_dict(moved.state_dict())
    for same in (rebuilt, copy.deepcopy(moved), pickle.loads(pickle.dumps(moved))):
        assert torch.equal(same(u), expected)
    normalised = nn.utils.parametrizations.weight_norm(copy.deepcopy(moved), dim=1)
    assert_same(normalised(u), expected)
    oracle = copy.deepcopy(moved)
    oracle.backend = "reference"
    for any_layer in (moved, oracle):
        any_layer(u).square().sum().backward()
    for p, q in zip(moved.parameters(), oracle.parameters(), strict=True):
        assert_same(p.grad, q.grad)


def convolve(u: Tensor, weight: Tensor, backend: str) -> Tensor:
    """Windows that overlap along the rows and leave the grid, routed twice."""
    return fused_routing_conv(u, weight, 2, stride=(1, 2), padding=(1, 0), backend=backend)


@pytest.fixture
def grid_and_kernel(target: Target, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (4, 1, 2, 2, 3), (1, 2, 1, 2, 3, 2)
    return [
        torch.randn(shape, generator=generator).to(target.device, dtype).requires_grad_()
        for shape in shapes
    ]


def test_opcheck_of_windows(target: Target, grid_and_kernel: list[Tensor]) -> None:
    u, weight = (x.detach() for x in grid_and_kernel)
    forward, backward = OPERATORS[target.backend]
    grid, weight, window = u.permute(0, 3, 4, 1, 2), weight.flatten(0, 2), [2, 1, 1, 2]
    torch.library.opcheck(forward, (grid, weight, None, None, 2, False, 1, True, window))
    v, s, _ = forward(grid, weight, None, None, 2, False, 1, True, window)
    options = (False, 1, True, [True, True, True, False], window)
    torch.library.opcheck(backward, (v, grid, weight, None, s, *options))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_windows(target: Target, grid_and_kernel: list[Tensor], name: str) -> None:
    u, weight = (x.detach() for x in grid_and_kernel)
    found, expected = (
        TRANSFORMS[name](partial(convolve, backend=backend))(u, weight)
        for backend in (target.backend, "reference")
    )
    assert_same(found, expected)


def test_windows_under_compile(target: Target, grid_and_kernel: list[Tensor]) -> None:
    u, weight = grid_and_kernel
    whole = torch.compile(convolve, fullgraph=True, dynamic=True, backend="aot_eager")
    for B in (4, 2):  # 4 first, as no other size is: Dynamo takes equal ones for the same
        sized = u.detach()[:B].clone().requires_grad_()
        with torch._dynamo.config.patch(error_on_recompile=B != 4):
            found = whole(sized, weight, target.backend)
        expected = convolve(sized, weight, target.backend)
        assert torch.equal(found, expected)
        gradients = (
            torch.autograd.grad(v.square().sum(), (sized, weight)) for v in (found, expected)
        )
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_windows_under_autocast(
    target: Target, grid_and_kernel: list[Tensor], low: torch.dtype
) -> None:
    leaves = [x.detach().float().requires_grad_() for x in grid_and_kernel]
    with torch.autocast(target.device, low):
        found = convolve(*leaves, target.backend)
    expected = convolve(*(x.to(low) for x in leaves), target.backend)
    assert found.dtype == low
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(v.float().sum(), leaves) for v in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_convolutional_capsules(target: Target, dtype: torch.dtype) -> None:
    """A layer and a gradient penalty of it; exported for any batch."""
    torch.manual_seed(0)
    layer = CapsuleConv2d(
        1, 2, 2, 3, (2, 1), (1, 2), (1, 0), 2, bias=True, learn_logits=True,
        backend=target.backend, device=target.device, dtype=dtype,
    )  # fmt: skip
    oracle = copy.deepcopy(layer)
    oracle.backend = "reference"
    u = torch.randn(2, 1, 2, 2, 3, dtype=dtype, device=target.device, requires_grad=True)

    def derivatives(layer: nn.Module) -> list[Tensor]:
        v = layer(u)
        leaves = [u, *layer.parameters()]
        first = torch.autograd.grad(v.square().sum(), leaves, create_graph=True)
        penalty = torch.stack([g.square().sum() for g in first]).sum()
        return [v, *first, *torch.autograd.grad(penalty, leaves)]

    assert_same(derivatives(layer), derivatives(oracle))
    batch = torch.export.Dim("batch", min=1, max=64)
    served = torch.export.export(layer, (u,), dynamic_shapes=({0: batch},)).module()
    for B in (1, 2):
        assert torch.equal(served(u[:B]), layer(u[:B]))

"""The GPU backends on a GPU: full-size shapes, every dtype, streams, threads, graphs, bits.

What depends on the device alone is here; autocast, distribution, export, a whole training step as a
graph and the rest of PyTorch's features have their GPU cases in the files named after them and in
test_every_backend.py: ``pytest -m gpu`` runs them all.

Skipped with the reason where a backend can't be used. A shape that a backend does not take is
skipped too, with the backend's own words.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import pytest
import torch

from capsule_kernels import backends, fused_routing
from capsule_kernels.dispatch import RoutingShape, reason_against
from capsule_kernels.ops import OPERATORS
from model.config import Config
from model.losses import total_loss
from model.views import Batch

from . import conv_cases
from .cases import OPTIONS, SHAPES, Case, check_case, copies, make_inputs, run
from .tiny import ARCHITECTURE, tiny_capsnet

HAS_GPU = torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU, reason="torch sees no GPU here"),
]

NETWORKS = [
    Case(B=128, I=1152, J=10), Case(B=1, I=1152, J=10), Case(B=127, I=1153, J=10),
    Case(B=1024, I=1152, J=10), Case(B=32, I=3200, J=10), Case(B=32, I=2048, J=5),
    Case(B=16, I=4608, J=10, weight_sharing=36), Case(B=16, I=9216, J=10, bias=True),
    Case(B=64, I=1024, J=10, K=6, D=8), Case(B=4, I=3872, J=196),
    Case(B=300, I=1153, J=10, leaky=True, bias=True), Case(B=300, I=1152, J=9, R=2),
    Case(B=640, I=1152, J=4, weight_sharing=36),
]  # fmt: skip
"""The routing layers of the paper's networks, at batches whose u_hat the oracle can hold."""

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    status = backends()[request.param]
    if not status.usable:
        pytest.skip(f"{request.param}: {status.reason}")
    return request.param


def skip_unsupported(backend: str, case: Case, dtype: torch.dtype) -> None:
    shape = RoutingShape(case.I, case.J, case.K, case.D, case.R, case.weight_sharing)
    reason = reason_against(backend, torch.device("cuda", 0), dtype, shape)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


@pytest.mark.parametrize("case", SHAPES + OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_oracle(case, dtype, backend):
    skip_unsupported(backend, case, dtype)
    check_case(case, dtype, backend, "cuda")


@pytest.mark.slow
@pytest.mark.parametrize("case", NETWORKS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matches_oracle_at_full_size(case, dtype, backend):
    skip_unsupported(backend, case, dtype)
    check_case(case, dtype, backend, "cuda")


def routing_of(conv: conv_cases.Conv) -> Case:
    """What is routed in each window."""
    kh, kw = conv.window
    return Case(I=conv.C * kh * kw, J=conv.J, K=conv.K, D=conv.D)


CONVOLUTION = conv_cases.Conv(B=16, C=32, H=14, W=14, J=16, D=8, window=(3, 3), stride=(2, 2))
"""As in a network."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_convolutional_capsules_match_oracle(dtype, backend):
    skip_unsupported(backend, routing_of(CONVOLUTION), dtype)
    conv_cases.check(CONVOLUTION, dtype, backend, "cuda")


@pytest.mark.parametrize("case", conv_cases.CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_awkward_windows_match_oracle(case, dtype, backend):
    """Each has kernels of its own: of a window and its grid Triton compiles everything in."""
    skip_unsupported(backend, routing_of(case), dtype)
    conv_cases.check(case, dtype, backend, "cuda")


def test_convolutional_capsules_give_the_same_bits(backend):
    """Windows overlap: each cell of the grid's gradient is a sum. Workspaces start as NaN once."""
    skip_unsupported(backend, routing_of(CONVOLUTION), torch.float32)
    inputs = conv_cases.make_inputs(CONVOLUTION, torch.float32, "cuda")
    first = conv_cases.run(CONVOLUTION, inputs, backend)
    for poisoned in (False, True):
        torch.use_deterministic_algorithms(poisoned)
        try:
            again = conv_cases.run(CONVOLUTION, inputs, backend)
        finally:
            torch.use_deterministic_algorithms(False)
        for name in first:
            assert torch.equal(first[name], again[name]), name


def test_tf32_is_taken_where_allowed(backend):
    """The two precisions differ, by a few of TF32's roundings of 2^-12."""
    case = NETWORKS[0]
    skip_unsupported(backend, case, torch.float32)
    inputs = make_inputs(case, torch.float32, "cuda")
    exact = run(fused_routing, case, inputs, backend=backend)["v"]
    torch.set_float32_matmul_precision("high")
    try:
        rounded = run(fused_routing, case, inputs, backend=backend)["v"]
        # The newer setting has the last word, though the older one can't be read beside it.
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        exact_again = run(fused_routing, case, inputs, backend=backend)["v"]
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        rounded_again = run(fused_routing, case, inputs, backend=backend)["v"]
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(exact, exact_again)
    assert torch.equal(rounded, rounded_again)
    assert not torch.equal(exact, rounded)
    assert (exact - rounded).norm() < 2**-9 * exact.norm()


def test_tf32_gradients_of_a_large_batch(backend):
    """Where the CUDA backend takes its gradients by output capsules."""
    case = Case(B=300, I=1152, J=10)
    skip_unsupported(backend, case, torch.float32)
    inputs = make_inputs(case, torch.float32, "cuda")
    torch.set_float32_matmul_precision("high")
    try:
        found = run(fused_routing, case, inputs, backend=backend)
    finally:
        torch.set_float32_matmul_precision("highest")
    exact = run(fused_routing, case, copies(inputs, torch.float64), backend="reference")
    for name in exact:
        assert (found[name] - exact[name]).norm() < 2**-9 * exact[name].norm(), name


def launched_kernels(call):
    """The names of the kernels that a call launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
    return {event.name for event in profile.events()}


@pytest.mark.parametrize(
    "case",
    [
        replace(NETWORKS[0], B=256), replace(NETWORKS[3], B=300), replace(NETWORKS[10], B=257),
        Case(B=320, I=2047, J=5, R=2), Case(B=2000, I=130, J=5, R=4),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sweeps_by_warpgroups(case, dtype):
    """Taken by large batches, right, from workspaces of NaN, with the same bits every time."""
    skip_unsupported("cuda", case, dtype)
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("only compute capability 9.0 has products of warpgroups")
    inputs = make_inputs(case, dtype, "cuda")

    def result():
        torch.set_float32_matmul_precision("high")
        torch.use_deterministic_algorithms(True)  # tensors that are left empty start as NaN
        try:
            return run(fused_routing, case, inputs, return_coupling=False, backend="cuda")
        finally:
            torch.use_deterministic_algorithms(False)
            torch.set_float32_matmul_precision("highest")

    kernels = launched_kernels(result)
    for kernel in ("warpgroup_forward_kernel", "warpgroup_backward_states_kernel"):
        assert any(kernel in name for name in kernels), kernels
    found = result()
    for _ in range(3):
        again = result()
        for name in found:
            assert torch.equal(again[name], found[name]), name
    if dtype == torch.float32:
        exact = run(fused_routing, case, copies(inputs, torch.float64), False, backend="reference")
        for name in exact:
            assert (found[name] - exact[name]).norm() < 2**-9 * exact[name].norm(), name
    else:
        check_case(case, dtype, "cuda", "cuda", return_coupling=False)


@pytest.mark.parametrize("case", [NETWORKS[0], NETWORKS[-1], OPTIONS[-1]], ids=str)
def test_same_bits_every_time(case, backend):
    skip_unsupported(backend, case, torch.float32)
    inputs = make_inputs(case, torch.float32, "cuda")
    first = run(fused_routing, case, inputs, backend=backend)
    for _ in range(5):
        again = run(fused_routing, case, inputs, backend=backend)
        for name in first:
            assert torch.equal(first[name], again[name]), name


def test_poisoned_workspaces(backend):
    """Tensors that are left empty start as NaN: what is not written shows."""
    case = replace(NETWORKS[2], bias=True, logits=True)
    skip_unsupported(backend, case, torch.float32)
    inputs = make_inputs(case, torch.float32, "cuda")
    clean = run(fused_routing, case, inputs, backend=backend)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1, device="cuda").isnan().all()
        poisoned = run(fused_routing, case, inputs, backend=backend)
    finally:
        torch.use_deterministic_algorithms(False)
    for name in clean:
        assert torch.equal(clean[name], poisoned[name]), name


def capture(step):
    """The graph of a step, after three to warm up, and what it returns at each replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # records, runs nothing
        returned = step()
    return graph, returned


def test_cuda_graph_replays_with_new_inputs(backend):
    case = Case(B=128, I=1152, J=10)
    skip_unsupported(backend, case, torch.float32)
    inputs = make_inputs(case, torch.float32, "cuda")
    u, weight = inputs["u"], inputs["weight"]

    def step():
        v = fused_routing(u, weight, 3, backend=backend)
        return v, *torch.autograd.grad(v, (u, weight), torch.ones_like(v))

    graph, captured = capture(step)
    u.data.copy_(torch.randn_like(u))
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        assert torch.equal(found, expected)


def test_a_training_step_of_the_whole_network_as_a_graph():
    """The CapsNet, its losses and Adam: replays train as steps do; cuDNN may add in another order.

    A layer alone, whose replays give the same bits, is in test_cuda_graphs.py.
    """
    generator = torch.Generator("cuda").manual_seed(0)
    images = torch.rand(6, 8, 1, 28, 28, generator=generator, device="cuda")
    labels = torch.randint(10, (6, 8, 1), generator=generator, device="cuda")
    config = Config("tiny", ARCHITECTURE)

    def losses(replayed):
        torch.manual_seed(0)
        network = tiny_capsnet().to("cuda")
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, capturable=True)
        batch = Batch(images[0].clone(), labels[0].clone(), images[0].unsqueeze(1).clone())

        def step():
            optimizer.zero_grad(set_to_none=False)
            loss = total_loss(network(batch.images, batch.labels), batch, config)
            loss.backward()
            optimizer.step()
            return loss.detach()

        if replayed:
            graph, loss = capture(step)
        else:
            for _ in range(3):
                step()
        found = []
        for shown, label in zip(images, labels, strict=True):
            batch.images.copy_(shown)
            batch.labels.copy_(label)
            batch.originals.copy_(shown.unsqueeze(1))
            if replayed:
                graph.replay()
            else:
                loss = step()
            found.append(loss.clone())
        return torch.stack(found)

    torch.testing.assert_close(losses(True), losses(False), rtol=1e-3, atol=1e-4)


def test_other_streams(backend):
    case = Case(B=64, I=1152, J=10)
    skip_unsupported(backend, case, torch.float32)
    inputs = make_inputs(case, torch.float32, "cuda")
    expected = run(fused_routing, case, inputs, backend=backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = run(fused_routing, case, inputs, backend=backend)
    torch.cuda.current_stream().wait_stream(stream)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees fewer than two GPUs here")
def test_a_device_other_than_the_current_one(backend):
    case = Case(B=16, I=64, J=10)
    skip_unsupported(backend, case, torch.float32)
    assert torch.cuda.current_device() == 0
    check_case(case, torch.float32, backend, "cuda:1")


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_whole(mode, backend):
    """By Inductor; "reduce-overhead" records CUDA graphs on the second call and then replays."""
    case = Case(B=16, I=64, J=10)
    skip_unsupported(backend, case, torch.float32)
    inputs = make_inputs(case, torch.float32, "cuda")
    u, weight = inputs["u"], inputs["weight"]

    def function(u, weight):
        return fused_routing(u, weight, 3, backend=backend)

    def step(function):
        v = function(u, weight)
        return [v, *torch.autograd.grad(v.square().sum(), (u, weight))]

    expected = step(function)
    torch._dynamo.reset()
    whole = torch.compile(function, fullgraph=True, mode=mode)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        for found, exact in zip(step(whole), expected, strict=True):
            assert torch.equal(found, exact)
    torch._dynamo.reset()


def test_many_threads_each_with_a_stream(backend):
    case = Case(B=16, I=64, J=10)
    skip_unsupported(backend, case, torch.float32)
    inputs = make_inputs(case, torch.float32, "cuda")
    expected = run(fused_routing, case, inputs, backend=backend)
    torch.cuda.synchronize()
    start = Barrier(8)

    def work(_):
        start.wait()
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(10):
                own = copies(inputs, torch.float32)
                found = run(fused_routing, case, own, backend=backend)
                for name in expected:
                    assert torch.equal(found[name], expected[name]), name

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


@pytest.mark.slow
def test_more_than_2_to_31_elements(backend):
    """u alone has 2^31 elements; the first and the last samples are checked."""
    case = Case(B=2**31 // (1152 * 8) + 3, I=1152, J=10, D=4)
    skip_unsupported(backend, case, torch.bfloat16)
    free, _ = torch.cuda.mem_get_info()
    if free < 40 << 30:
        pytest.skip(f"needs 40 GiB of GPU memory, {free >> 30} are free")
    generator = torch.Generator("cuda").manual_seed(0)
    u = torch.randn(case.B, case.I, 8, generator=generator, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(case.I, case.J, case.D, 8, device="cuda", dtype=torch.bfloat16) * 0.1
    v = fused_routing(u, weight, 3, backend=backend)
    for rows in (slice(0, 16), slice(case.B - 16, case.B)):
        part = fused_routing(u[rows], weight, 3, backend=backend)
        torch.testing.assert_close(v[rows], part, rtol=1e-2, atol=1e-3)


def test_samples_of_more_than_2_to_31_elements_are_refused_by_the_cuda_kernels():
    """By name and past the checks. All capsules share one weight; u takes no memory."""
    status = backends()["cuda"]
    if not status.usable:
        pytest.skip(f"cuda: {status.reason}")
    I, J, K, D = 2_200_000, 4, 1024, 8
    u = torch.zeros((), device="cuda", dtype=torch.bfloat16).expand(1, I, K)
    weight = u.new_zeros(1, J, D, K)
    with pytest.raises(RuntimeError, match=r"in 32 bits, .* use backend 'triton'"):
        fused_routing(u, weight, 3, weight_sharing=I, backend="cuda")
    forward, backward = OPERATORS["cuda"]
    with pytest.raises(ValueError, match=r"in 32 bits, .* use the triton backend"):
        forward(u, weight, None, None, 3, False, I, False)
    s = torch.zeros(3, 1, J, D, device="cuda")
    with pytest.raises(ValueError, match=r"in 32 bits, .* use the triton backend"):
        backward(u.new_zeros(1, J, D), u, weight, None, s, False, I, True, [True] * 4)


def test_batches_whose_states_an_int_does_not_count_are_refused_by_the_cuda_kernels():
    """By name and past the checks, before anything is allocated: u and s take no memory."""
    status = backends()["cuda"]
    if not status.usable:
        pytest.skip(f"cuda: {status.reason}")
    B, I, J, K, D = 53_687_089, 1, 10, 8, 16
    u = torch.zeros((), device="cuda", dtype=torch.bfloat16).expand(B, I, K)
    weight = u.new_zeros(I, J, D, K)
    used = torch.cuda.memory_allocated()
    with pytest.raises(ValueError, match=f"in 32 bits, got B = {B}"):
        fused_routing(u, weight, 3, backend="cuda")
    forward, backward = OPERATORS["cuda"]
    with pytest.raises(ValueError, match=f"in 32 bits, got B = {B}"):
        forward(u, weight, None, None, 3, False, 1, False)
    s = torch.zeros((), device="cuda").expand(3, B, J, D)
    grad_v = u[:1, :1, :1].expand(B, J, D)
    with pytest.raises(ValueError, match=f"in 32 bits, got B = {B}"):
        backward(grad_v, u, weight, None, s, False, 1, True, [True] * 4)
    assert torch.cuda.memory_allocated() - used < 2**20

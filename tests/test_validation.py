"""Wrong arguments raise before anything runs, each with a sentence that names it."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from capsule_kernels import (
    CapsuleConv2d,
    CapsuleLinear,
    backends,
    fused_routing,
    reference_routing,
    squash,
)
from capsule_kernels.backends import cuda
from capsule_kernels.dispatch import RoutingShape, automatic_order

# I = 6, K = 4, J = 3, D = 5
SIZES: dict[str, tuple[int, ...]] = {
    "u": (2, 6, 4),
    "weight": (6, 3, 5, 4),
    "logits": (6, 3),
    "bias": (3, 5),
}
W_SHAPE = "weight must have shape [I // weight_sharing, J, D, K]"
GRADIENTS = "routing_gradient must be one of 'full', 'last'"
BACKENDS = "backend must be one of 'auto', 'reference', 'cpu', 'triton', 'cuda'"


def tensor(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


def good_arguments() -> dict[str, Any]:
    return {name: tensor(*shape) for name, shape in SIZES.items()}


# What is wrong, and the message after "fused_routing: ".
VALUE_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"u": tensor(6, 4)}, "u must have shape [B, I, K], got [6, 4]"),
    ({"u": tensor(2, 6, 4, 1)}, "u must have shape [B, I, K], got [2, 6, 4, 1]"),
    ({"u": tensor()}, "u must have shape [B, I, K], got []"),
    ({"u": tensor(2, 0, 4)}, "u must have I >= 1, got shape [2, 0, 4]"),
    ({"u": tensor(2, 6, 0)}, "u must have K >= 1, got shape [2, 6, 0]"),
    ({"u": tensor(2, 7, 4)}, f"{W_SHAPE} = [7, J, D, 4], got [6, 3, 5, 4]"),
    ({"u": tensor(2, 6, 3)}, f"{W_SHAPE} = [6, J, D, 3], got [6, 3, 5, 4]"),
    ({"weight": tensor(6, 3, 20)}, f"{W_SHAPE}, got [6, 3, 20]"),
    ({"weight": tensor(1, 6, 3, 5, 4)}, f"{W_SHAPE}, got [1, 6, 3, 5, 4]"),
    ({"weight": tensor(3, 6, 5, 4)}, f"{W_SHAPE} = [6, J, D, 4], got [3, 6, 5, 4]"),
    ({"weight": tensor(6, 3, 4, 5)}, f"{W_SHAPE} = [6, J, D, 4], got [6, 3, 4, 5]"),
    ({"weight": tensor(6, 0, 5, 4)}, "weight must have J >= 1, got shape [6, 0, 5, 4]"),
    ({"weight": tensor(6, 3, 0, 4)}, "weight must have D >= 1, got shape [6, 3, 0, 4]"),
    ({"logits": tensor(2, 6, 3)}, "logits must have shape [I, J], got [2, 6, 3]"),
    ({"logits": tensor(3, 6)}, "logits must have shape [I, J] = [6, 3], got [3, 6]"),
    ({"logits": tensor(1, 3)}, "logits must have shape [I, J] = [6, 3], got [1, 3]"),
    ({"bias": tensor(15)}, "bias must have shape [J, D], got [15]"),
    ({"bias": tensor(4, 5)}, "bias must have shape [J, D] = [3, 5], got [4, 5]"),
    ({"bias": tensor(3, 1)}, "bias must have shape [J, D] = [3, 5], got [3, 1]"),
    ({"num_iterations": 0}, "num_iterations must be >= 1, got 0"),
    ({"num_iterations": -3}, "num_iterations must be >= 1, got -3"),
    ({"num_iterations": 2**63}, f"num_iterations must be < 2**63, got {2**63}"),
    ({"weight_sharing": 0}, "weight_sharing must be >= 1, got 0"),
    ({"weight_sharing": -1}, "weight_sharing must be >= 1, got -1"),
    ({"weight_sharing": 4}, "weight_sharing must divide I = 6 (u is [2, 6, 4]), got 4"),
    ({"weight_sharing": 12}, "weight_sharing must divide I = 6 (u is [2, 6, 4]), got 12"),
    ({"weight_sharing": 2}, f"{W_SHAPE} = [3, J, D, 4], got [6, 3, 5, 4]"),
    ({"routing_gradient": "first"}, f"{GRADIENTS}, got 'first'"),
    ({"routing_gradient": None}, f"{GRADIENTS}, got None"),
    ({"routing_gradient": tensor(2)}, f"{GRADIENTS}, got tensor([1., 1.])"),
    ({"backend": "tpu"}, f"{BACKENDS}, got 'tpu'"),
    ({"backend": None}, f"{BACKENDS}, got None"),
    *(
        (
            {name: tensor(*SIZES[name], device="meta")},
            f"{name} must be on the device of u, cpu, got meta",
        )
        for name in ("weight", "logits", "bias")
    ),
]

TYPE_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"u": [[[1.0]]]}, "u must be a tensor [B, I, K], got list"),
    ({"u": None}, "u must be a tensor [B, I, K], got NoneType"),
    (
        {"weight": None},
        "weight must be a tensor [I // weight_sharing, J, D, K], got NoneType",
    ),
    ({"logits": 0.0}, "logits must be a tensor [I, J], got float"),
    ({"bias": True}, "bias must be a tensor [J, D], got bool"),
    ({"num_iterations": 3.0}, "num_iterations must be an int >= 1, got float 3.0"),
    ({"num_iterations": "3"}, "num_iterations must be an int >= 1, got str '3'"),
    ({"num_iterations": True}, "num_iterations must be an int >= 1, got bool True"),
    ({"num_iterations": None}, "num_iterations must be an int >= 1, got NoneType None"),
    ({"weight_sharing": 2.0}, "weight_sharing must be an int >= 1, got float 2.0"),
    ({"leaky": 0.1}, "leaky must be True or False, got float 0.1"),
    ({"leaky": 1}, "leaky must be True or False, got int 1"),
    ({"return_coupling": None}, "return_coupling must be True or False, got NoneType None"),
    *(
        (
            {name: torch.empty(SIZES[name], dtype=dtype)},
            f"{name} must be float64, float32, bfloat16 or float16, got {dtype}",
        )
        for name in SIZES
        for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)
    ),
    *(
        (
            {name: tensor(*SIZES[name], dtype=dtype)},
            f"{name} must have the dtype of u, torch.float32, got {dtype}",
        )
        for name in ("weight", "logits", "bias")
        for dtype in (torch.float64, torch.bfloat16, torch.float16)
    ),
]

REFUSED = [(changes, ValueError, message) for changes, message in VALUE_ERRORS] + [
    (changes, TypeError, message) for changes, message in TYPE_ERRORS
]


class Operations(TorchDispatchMode):
    """Records every tensor operation that starts."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.started.append(str(func))
        return func(*args, **(kwargs or {}))


def whole(message: str) -> str:
    """Matches this message and no other."""
    return f"^{re.escape(message)}$"


@pytest.mark.parametrize(
    ("changes", "error", "message"), REFUSED, ids=[message[:60] for _, _, message in REFUSED]
)
def test_wrong_arguments_raise_before_anything_runs(changes, error, message, figure):
    arguments = good_arguments() | changes
    with Operations() as operations, pytest.raises(error, match=whole(f"fused_routing: {message}")):
        fused_routing(**arguments)
    # A message may print an option that should not have been a tensor.
    assert operations.started == [] or "got tensor(" in message
    figure("wrong arguments refused, each with its message", str(len(REFUSED)))


def test_good_arguments_run_and_are_seen():
    """What the tables above start from is accepted, and the recorder sees what runs."""
    with Operations() as operations:
        fused_routing(**good_arguments(), backend="reference")
    assert operations.started


def test_two_faults_name_the_first():
    with pytest.raises(ValueError, match="num_iterations must be >= 1"):
        fused_routing(None, None, 0)  # type: ignore[call-overload]


SIZE_NAMES = (
    "in_capsules",
    "in_dim",
    "out_capsules",
    "out_dim",
    "num_iterations",
    "weight_sharing",
)

LAYER_REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    *(
        ({name: value}, error, f"{name} {expected}")
        for name in SIZE_NAMES
        for value, error, expected in (
            (0, ValueError, "must be >= 1, got 0"),
            (-2, ValueError, "must be >= 1, got -2"),
            (2.0, TypeError, "must be an int >= 1, got float 2.0"),
            (True, TypeError, "must be an int >= 1, got bool True"),
        )
    ),
    *(
        ({name: 0.1}, TypeError, f"{name} must be True or False, got float 0.1")
        for name in ("bias", "learn_logits", "leaky")
    ),
    ({"weight_sharing": 4}, ValueError, "weight_sharing must divide in_capsules = 6, got 4"),
    ({"routing_gradient": "none"}, ValueError, f"{GRADIENTS}, got 'none'"),
    ({"backend": "gpu"}, ValueError, f"{BACKENDS}, got 'gpu'"),
]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    LAYER_REFUSED,
    ids=[message[:60] for _, _, message in LAYER_REFUSED],
)
def test_layer_refuses_wrong_sizes_and_options_when_made(changes, error, message):
    arguments = {"in_capsules": 6, "in_dim": 4, "out_capsules": 3, "out_dim": 5} | changes
    with pytest.raises(error, match=whole(f"CapsuleLinear: {message}")):
        CapsuleLinear(**arguments)


@pytest.mark.parametrize(
    ("u", "error", "message"),
    [
        (
            tensor(2, 7, 4),
            ValueError,
            "u must have shape [B, in_capsules, in_dim] = [*, 6, 4], got [2, 7, 4]",
        ),
        (
            tensor(6, 4),
            ValueError,
            "u must have shape [B, in_capsules, in_dim], got [6, 4]",
        ),
        (
            tensor(2, 6, 4, dtype=torch.float64),
            TypeError,
            "u must have the dtype of the layer's weight, torch.float32, got torch.float64",
        ),
        (
            tensor(2, 6, 4, dtype=torch.int64),
            TypeError,
            "u must be float64, float32, bfloat16 or float16, got torch.int64",
        ),
        (
            tensor(2, 6, 4, device="meta"),
            ValueError,
            "u must be on the device of the layer's weight, cpu, got meta",
        ),
    ],
    ids=["capsules", "rank", "dtype", "integers", "device"],
)
def test_layer_refuses_a_wrong_input(u, error, message):
    layer = CapsuleLinear(6, 4, 3, 5)
    with pytest.raises(error, match=whole(f"CapsuleLinear: {message}")):
        layer(u)


def test_convolutional_layer_refuses_a_wrong_input():
    layer = CapsuleConv2d(6, 4, 3, 5, kernel_size=[3, 3])
    assert layer(tensor(1, 6, 4, 3, 3)).shape == (1, 3, 5, 1, 1)
    message = "u must have shape [B, in_types, in_dim, H, W] = [*, 6, 4, *, *], got [2, 6, 5, 7, 7]"
    with pytest.raises(ValueError, match=whole(f"CapsuleConv2d: {message}")):
        layer(tensor(2, 6, 5, 7, 7))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        *(
            ({name: 0}, ValueError, f"{name} must be >= 1, got 0")
            for name in ("in_types", "in_dim", "out_types", "out_dim", "kernel_size", "stride")
        ),
        ({"kernel_size": (3, 0)}, ValueError, "kernel_size must be >= 1, got 0"),
        ({"stride": (2, 0)}, ValueError, "stride must be >= 1, got 0"),
        ({"padding": -1}, ValueError, "padding must be >= 0, got -1"),
        ({"in_types": 2.0}, TypeError, "in_types must be an int >= 1, got float 2.0"),
        ({"stride": True}, TypeError, "stride must be an int >= 1, got bool True"),
    ],
    ids=str,
)
def test_convolutional_layer_refuses_wrong_sizes_when_made(changes, error, message):
    sizes = {"in_types": 6, "in_dim": 4, "out_types": 3, "out_dim": 5, "kernel_size": 3}
    with pytest.raises(error, match=whole(f"CapsuleConv2d: {message}")):
        CapsuleConv2d(**sizes | changes)


@pytest.mark.parametrize("value", ["same", 1.5, (1, None)])
def test_a_pair_that_is_none_says_what_is_allowed(value):
    message = f"CapsuleConv2d: padding must be an int >= 0 or two of them, got {value!r}"
    with pytest.raises(TypeError, match=whole(message)):
        CapsuleConv2d(6, 4, 3, 5, kernel_size=3, padding=value)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float8_e4m3fn])
def test_layer_refuses_a_type_without_kernels(dtype):
    message = f"CapsuleLinear: dtype must be float64, float32, bfloat16 or float16, got {dtype}"
    with pytest.raises(TypeError, match=whole(message)):
        CapsuleLinear(6, 4, 3, 5, dtype=dtype)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(
    "kind", [Tensor.to_sparse, Tensor.to_mkldnn, lambda t: torch.nested.nested_tensor([t])]
)
def test_tensors_that_are_not_dense_are_refused(name, kind):
    arguments = good_arguments()
    arguments[name] = kind(arguments[name])
    with pytest.raises(
        TypeError, match=rf"^fused_routing: {name} must be a dense tensor \[.*, got"
    ):
        fused_routing(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_iterations": 0}, "num_iterations must be >= 1, got 0"),
        ({"routing_gradient": "lst"}, f"{GRADIENTS}, got 'lst'"),
        ({"weight": tensor(1, 3, 5, 4)}, f"{W_SHAPE} = [6, J, D, 4], got [1, 3, 5, 4]"),
    ],
)
def test_the_oracle_refuses_in_its_own_name(changes, message):
    with pytest.raises(ValueError, match=whole(f"reference_routing: {message}")):
        reference_routing(**good_arguments() | changes)


@pytest.mark.parametrize(
    ("s", "message"),
    [
        ([3.0, 4.0], "s must be a tensor [..., D], got list"),
        (
            torch.tensor([3, 4]),
            f"s must be float64, float32, bfloat16 or float16, got {torch.int64}",
        ),
    ],
    ids=["list", "integers"],
)
def test_squash_takes_vectors_of_floating_point_numbers(s, message):
    """Of integers it would make zeros: lengths are below 1."""
    with pytest.raises(TypeError, match=whole(f"squash: {message}")):
        squash(s)


@pytest.mark.parametrize("name", [name for name, s in backends().items() if not s.usable])
def test_an_unusable_backend_says_why_and_never_falls_back(name):
    reason = backends()[name].reason
    assert len(reason) > 20
    message = f"fused_routing: backend '{name}' can't be used: {reason}"
    with pytest.raises(RuntimeError, match=whole(message)):
        fused_routing(**good_arguments(), backend=name)


@pytest.mark.skipif(not backends()["cpu"].usable, reason=backends()["cpu"].reason)
def test_cpu_backend_refuses_other_devices():
    arguments = {name: tensor(*shape, device="meta") for name, shape in SIZES.items()}
    message = (
        "fused_routing: backend 'cpu' can't be used: it takes CPU tensors, got tensors on meta"
    )
    with pytest.raises(RuntimeError, match=whole(message)):
        fused_routing(**arguments, backend="cpu")


def test_automatic_choice_serves_devices_without_kernels():
    arguments = {name: tensor(*shape, device="meta") for name, shape in SIZES.items()}
    v = fused_routing(**arguments)
    assert v.device.type == "meta"
    assert v.shape == (2, 3, 5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to ask")
def test_fake_tensors_of_a_gpu_need_none() -> None:
    """At the sizes of the paper's networks, where "auto" asks which GPU it is."""
    with FakeTensorMode():
        u = torch.empty(2, 1152, 8, device="cuda")
        v = fused_routing(u, torch.empty(1152, 10, 16, 8, device="cuda"))
    assert v.device.type == "cuda"
    assert v.shape == (2, 10, 16)


def test_auto_takes_the_cuda_kernels_first_only_where_they_were_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, float32 = torch.device("cuda"), torch.float32
    mnist = RoutingShape(I=1152, J=10, K=8, D=16, R=3, weight_sharing=1)

    def order(
        capability: tuple[int, int], dtype: torch.dtype = float32, shape: RoutingShape = mnist
    ) -> tuple[str, ...]:
        monkeypatch.setattr(cuda, "unavailable", lambda: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        return automatic_order(device, dtype, shape)

    assert order((9, 0)) == order((9, 0), torch.bfloat16) == ("cuda", "triton")
    assert order((8, 0)) == order((10, 0)) == ("triton", "cuda")
    assert order((9, 0), torch.float16) == order((9, 0), torch.float64) == ("triton", "cuda")
    for change in ({"J": 5}, {"K": 6}, {"D": 8}, {"weight_sharing": 36}):
        assert order((9, 0), shape=mnist._replace(**change)) == ("triton", "cuda")
    assert automatic_order(torch.device("cpu"), float32, mnist) == ("cpu",)
    assert automatic_order(torch.device("meta"), float32, mnist) == ()

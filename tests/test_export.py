"""``torch.export``, AOTInductor, ONNX: a network saved, and served without its code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

from capsule_kernels import CapsuleConv2d, CapsuleLinear, fused_routing, fused_routing_conv

from .targets import DEVICES, NEEDS_KERNELS
from .tiny import tiny_capsnet


class Scores(nn.Module):
    """Class scores [B, classes] of images [B, C, H, W]: what a server wants of the network."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = tiny_capsnet(reconstruction=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images).scores


def export(network: nn.Module, device: str) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=1024)
    images = torch.rand(4, 1, 28, 28, device=device)
    return torch.export.export(network.eval(), (images,), dynamic_shapes=({0: batch},))


@pytest.mark.parametrize("device", DEVICES)
def test_one_program_for_every_batch_size(device: str) -> None:
    network = Scores().to(device)
    program = export(network, device)
    names = {str(node.target) for node in program.graph.nodes}
    backend = "cpu" if device == "cpu" else "triton"
    assert f"capsule_kernels.routing_forward.{backend}" in names
    module = program.module()
    for B in (1, 2, 9):
        images = torch.rand(B, 1, 28, 28, device=device)
        torch.testing.assert_close(module(images), network(images))


def gradients(network: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """By name, of the parameters."""
    network.zero_grad()
    network(x).square().sum().backward()
    return {name: p.grad for name, p in network.named_parameters()}


LAYERS = {
    "full": lambda: CapsuleLinear(6, 8, 3, 5, bias=True, learn_logits=True),
    "last": lambda: CapsuleLinear(6, 8, 3, 5, routing_gradient="last", leaky=True),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("save", ["export", "strict export", "trace"])
def test_a_saved_program_trains(save: str, layer: str, tmp_path: Path) -> None:
    """Gradients reach what lies before the routing, which is an operator there, and no function."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 8), LAYERS[layer](), nn.Linear(5, 2))
    x = torch.randn(4, 6, 8)
    expected = gradients(network, x)
    if save == "trace":
        torch.jit.save(torch.jit.trace(network, (x,)), tmp_path / "network.pt")
        program = torch.jit.load(tmp_path / "network.pt")
    else:
        program = torch.export.export(network, (x,), strict=save == "strict export").module()
    found = gradients(program, x)
    for name, gradient in expected.items():
        assert found[name] is not None, name
        assert torch.equal(found[name], gradient), name


def test_of_torch_func_a_saved_program_takes_vmap_alone() -> None:
    """As docs/pytorch.md warns: PyTorch drops the tangents that enter a custom operator."""
    layer = CapsuleLinear(6, 4, 3, 5)
    u = torch.randn(2, 6, 4)
    program = torch.export.export(layer, (u,)).module()
    several = torch.stack([u, 2 * u])
    torch.testing.assert_close(vmap(program)(several), vmap(layer)(several))
    with pytest.raises(RuntimeError, match="setup_context"):
        grad(lambda u: program(u).sum())(u)
    assert jvp(layer, (u,), (u,))[1].any()
    assert not jvp(program, (u,), (u,))[1].any()


class Shared(nn.Module):
    """A weight for each of two types of capsules, however many there are of a type."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3, 5, 4))
        self.backend = backend

    def forward(self, u: Tensor) -> Tensor:
        sharing = u.shape[1] // self.weight.shape[0]
        return fused_routing(u, self.weight, weight_sharing=sharing, backend=self.backend)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_weights_shared_by_any_number_of_capsules(backend: str) -> None:
    """The operators take no number that a program leaves open."""
    torch.manual_seed(0)
    layer = Shared(backend)
    types = ({1: 2 * torch.export.Dim("capsules", max=50)},)
    program = torch.export.export(layer, (torch.randn(3, 6, 4),), dynamic_shapes=types).module()
    for I in (6, 14):
        u = torch.randn(3, I, 4)
        torch.testing.assert_close(program(u), layer(u))
        expected = gradients(layer, u)["weight"]
        torch.testing.assert_close(gradients(program, u)["weight"], expected)


def test_a_stride_from_a_size() -> None:
    weight = torch.randn(2, 2, 2, 3, 5, 4)

    class Strided(nn.Module):
        def forward(self, grid: Tensor, like: Tensor) -> Tensor:
            return fused_routing_conv(grid, weight, stride=like.shape[0])

    sizes = {"grid": None, "like": {0: torch.export.Dim.AUTO}}
    grid = torch.randn(1, 2, 4, 9, 9)
    program = torch.export.export(Strided(), (grid, torch.ones(2)), dynamic_shapes=sizes).module()
    for stride in (2, 3):
        like = torch.ones(stride)
        assert torch.equal(program(grid, like), Strided()(grid, like))


TRANSFORMS = {
    "grad": lambda f: lambda u: grad(lambda u: f(u).sum())(u),
    "vmap": lambda f: lambda u: vmap(f)(u[None]),
    "jvp": lambda f: lambda u: jvp(f, (u,), (u.cos(),)),
}


class Transformed(nn.Module):
    def __init__(self, transform: str, backend: str) -> None:
        super().__init__()
        layer = CapsuleLinear(6, 4, 3, 5, backend=backend)
        self.layer, self.transform = layer, TRANSFORMS[transform](layer)

    def forward(self, u: Tensor) -> object:
        return self.transform(u)


@NEEDS_KERNELS
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_inside_a_program_are_refused(transform: str) -> None:
    """With advice that holds there, where nothing is compiled without fullgraph."""
    u = torch.randn(2, 6, 4)
    with pytest.raises(RuntimeError, match=r"inside torch\.export are not .* backend='reference'"):
        torch.export.export(Transformed(transform, "auto"), (u,), strict=False)


def test_a_program_of_the_oracle_takes_vmap() -> None:
    u = torch.randn(2, 6, 4)
    network = Transformed("vmap", "reference")
    program = torch.export.export(network, (u,), strict=False).module()
    torch.testing.assert_close(program(u), network(u))


class Autocast(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


def test_a_saved_program_keeps_its_own_casts() -> None:
    """Autocast inside of it is exported. One around it casts what lies before the operator."""
    layers = nn.Linear(4, 4), CapsuleLinear(6, 4, 3, 5)
    x = torch.randn(2, 6, 4)
    inside = torch.export.export(Autocast(*layers), (x,)).module()
    assert torch.equal(inside(x), Autocast(*layers)(x))
    assert inside(x).dtype == torch.bfloat16
    around = torch.export.export(nn.Sequential(*layers), (x,)).module()
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match="weight must have the dtype of u"),
    ):
        around(x)


@pytest.mark.parametrize("free", ["B", "H", "W", "BH", "HW"])
def test_windows_of_grids_of_any_size(free: str) -> None:
    layer = CapsuleConv2d(2, 4, 3, 4, 3, stride=2, padding=1)
    sizes = {
        n: torch.export.Dim(side, min=3, max=50) for n, side in enumerate("B..HW") if side in free
    }
    program = torch.export.export(layer, (torch.randn(3, 2, 4, 9, 8),), dynamic_shapes=(sizes,))
    for rows in (9, 12) if "H" in free else (9,):
        u = torch.randn(5 if "B" in free else 3, 2, 4, rows, 11 if "W" in free else 8)
        assert torch.equal(program.module()(u), layer(u))


def test_windows_of_the_oracle_in_grids_of_any_size() -> None:
    """Sides that PyTorch is to find limits for: it can't prove that those of a ``Dim`` hold."""
    layer = CapsuleConv2d(2, 4, 3, 4, 3, stride=2, padding=1, backend="reference")
    free = torch.export.Dim.AUTO
    sizes = ({3: free, 4: free},)
    program = torch.export.export(layer, (torch.randn(3, 2, 4, 9, 8),), dynamic_shapes=sizes)
    for rows, columns in ((9, 8), (12, 11), (5, 14)):
        u = torch.randn(3, 2, 4, rows, columns)
        torch.testing.assert_close(program.module()(u), layer(u))


def test_a_saved_program_of_windows_trains() -> None:
    torch.manual_seed(0)
    network = CapsuleConv2d(2, 4, 3, 4, 3, stride=2, padding=1, bias=True)
    u = torch.randn(2, 2, 4, 9, 8)
    expected = gradients(network, u)
    found = gradients(torch.export.export(network, (u,), strict=True).module(), u)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_a_traced_program_of_windows_takes_any_grid() -> None:
    """While it is recorded, sizes are tensors."""
    layer = CapsuleConv2d(2, 4, 3, 4, (3, 2), stride=(2, 1), padding=1)
    program = torch.jit.trace(layer, (torch.randn(3, 2, 4, 9, 8),))
    for sizes in ((3, 2, 4, 9, 8), (5, 2, 4, 12, 11)):
        u = torch.randn(sizes, requires_grad=True)
        found, expected = program(u), layer(u)
        assert torch.equal(found, expected)
        inputs = (u, layer.weight)
        for a, b in zip(
            torch.autograd.grad(found.square().sum(), inputs),
            torch.autograd.grad(expected.square().sum(), inputs),
            strict=True,
        ):
            assert torch.equal(a, b)


class Capsules(nn.Module):
    """Both kinds of layers with every option: a grid [B, 2, 4, 4, 3] to capsules [B, 4, 5]."""

    def __init__(self, backend: str = "auto") -> None:
        super().__init__()
        torch.manual_seed(0)
        options = {"bias": True, "learn_logits": True, "leaky": True, "backend": backend}
        self.windows = CapsuleConv2d(2, 4, 3, 4, 2, padding=1, **options)
        self.all = CapsuleLinear(60, 4, 4, 5, weight_sharing=20, **options)

    def forward(self, grid: Tensor) -> Tensor:
        return self.all(self.windows(grid).movedim(2, -1).flatten(1, 3))


GRID = torch.randn(7, 2, 4, 4, 3, generator=torch.Generator().manual_seed(1))
FREE = ({0: torch.export.Dim("batch", min=1)},)
"""Dimensions of a program for batches of any size."""


def namespaces(program: torch.export.ExportedProgram) -> set[str]:
    """Where the operators of a program come from."""
    targets = (node.target for node in program.graph.nodes)
    return {x.namespace for x in targets if isinstance(x, torch._ops.OpOverload)}


SERVE_ALONE = """
import sys, torch
sys.modules["capsule_kernels"] = None  # as where it is not installed

program, grid, v = sys.argv[1:]
serve, grid = torch.export.load(program).module(), torch.load(grid)
torch.save([serve(grid[:n]) for n in (1, 7)], v)
"""


@pytest.mark.slow
def test_the_oracle_is_served_without_the_package(tmp_path: Path) -> None:
    network = Capsules("reference")
    program = torch.export.export(network, (GRID,), dynamic_shapes=FREE)
    assert namespaces(program) == {"aten"}
    torch.export.save(program, tmp_path / "program.ep")
    torch.save(GRID, tmp_path / "grid.pt")
    done = subprocess.run(
        [sys.executable, "-c", SERVE_ALONE, "program.ep", "grid.pt", "v.pt"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for v in torch.load(tmp_path / "v.pt"):
        torch.testing.assert_close(v, network(GRID[: len(v)]))


def test_onnx_records_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody asked for another backend, and only what is recorded."""
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    assert namespaces(torch.export.export(Capsules(), (GRID,))) == {"aten"}
    ours = {"aten", "capsule_kernels"}
    assert namespaces(torch.export.export(Capsules("cpu"), (GRID,))) == ours
    assert torch.equal(Capsules()(GRID), Capsules("cpu")(GRID))
    monkeypatch.undo()
    assert namespaces(torch.export.export(Capsules(), (GRID,))) == ours


@pytest.mark.slow
def test_an_onnx_runtime_serves_a_network(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="there is no onnxruntime")
    network, path = Capsules().eval(), str(tmp_path / "network.onnx")
    torch.onnx.export(network, (GRID,), path, dynamo=True, dynamic_shapes=FREE)
    serve = runtime.InferenceSession(path)
    for B in (1, 7):
        (v,) = serve.run(None, {serve.get_inputs()[0].name: GRID[:B].numpy()})
        torch.testing.assert_close(torch.from_numpy(v), network(GRID[:B]).detach())


def with_shared_libstdcxx() -> dict[str, str]:
    """An environment that loads this process's libstdc++ before a package of AOTInductor.

    A compiler that has no shared libstdc++ gives the package a copy of its own. Where torch reads
    the device's name, in the package's constructor, that copy meets the shared one and crashes, as
    seen on an H200. Loaded first, the shared one serves the package, too.
    """
    maps = Path("/proc/self/maps")
    found = maps.read_text().split() if maps.exists() else []
    library = next((word for word in found if "/libstdc++.so" in word), "")
    # To load a package torch otherwise first tries each kind of vectors the processor says it has,
    # in processes that import torch: longer than all the rest.
    preloaded = ":".join(filter(None, [os.environ.get("LD_PRELOAD"), library]))
    return os.environ | {"LD_PRELOAD": preloaded, "TORCHINDUCTOR_VEC_ISA_OK": "1"}


SERVE = """
import sys, torch
import capsule_kernels

package, inputs, outputs = sys.argv[1:]
serve = (
    torch._inductor.aoti_load_package(package)
    if package.endswith(".pt2")
    else torch.export.load(package).module()
)
x = torch.load(inputs)
torch.save([serve(x[:n]) for n in (1, len(x))], outputs)
assert not any(name.split(".")[0] in ("model", "tests") for name in sys.modules)
"""


def check_in_a_fresh_process(
    kind: str, program: torch.export.ExportedProgram, network: nn.Module, x: Tensor, folder: Path
) -> None:
    """Save the program, load it in a process that imports only the package, and compare."""
    package = folder / ("program.pt2" if kind == "aotinductor" else "program.ep")
    if kind == "aotinductor":
        torch._inductor.aoti_compile_and_package(program, package_path=str(package))
    else:
        torch.export.save(program, package)
    torch.save(x, folder / "inputs.pt")
    done = subprocess.run(
        [sys.executable, "-c", SERVE, package, folder / "inputs.pt", folder / "outputs.pt"],
        cwd=folder, env=with_shared_libstdcxx(), capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr}"
    for found in torch.load(folder / "outputs.pt"):
        torch.testing.assert_close(found, network(x[: len(found)]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["export", "aotinductor"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_saved_program_in_a_fresh_process(kind: str, device: str, tmp_path: Path) -> None:
    network = Scores().to(device)
    images = torch.rand(7, 1, 28, 28, device=device)
    check_in_a_fresh_process(kind, export(network, device), network, images, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_windows_in_a_package_of_aotinductor(device: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = CapsuleConv2d(2, 4, 3, 4, 3, stride=2, padding=1, device=device).eval()
    u = torch.randn(4, 2, 4, 9, 8, device=device)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (u,), dynamic_shapes=({0: batch},))
    check_in_a_fresh_process("aotinductor", program, layer, u, tmp_path)

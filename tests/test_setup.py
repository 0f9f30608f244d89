"""Which devices the CUDA kernels are built for, and on which such a build runs: without a GPU."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.utils import cpp_extension

from capsule_kernels.backends import cuda, extension

ROOT = Path(__file__).parent.parent


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py beside a torch with CUDA 13.0, without a GPU or a wish."""
    for name in ("TORCH_CUDA_ARCH_LIST", "CAPSULE_KERNELS_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def a_toolkit(
    monkeypatch: pytest.MonkeyPatch, home: Path, release: str, *architectures: int
) -> None:
    (home / "bin").mkdir()
    nvcc = home / "bin" / "nvcc"
    names = " ".join(f"compute_{name}" for name in architectures)
    nvcc.write_text(
        "#!/bin/sh\n"
        f'case "$1" in --version) echo "Cuda compilation tools, release {release}, V{release}";;\n'
        f"--list-gpu-arch) for name in {names}; do echo $name; done;; esac\n"
    )
    nvcc.chmod(0o755)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(home))


def devices(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90", "sm_120"])


@pytest.mark.parametrize(
    ("wish", "targets"),
    [
        ("8.0", ["sm_80"]),
        ("8.0 9.0 10.0", ["sm_100", "sm_80", "sm_90a"]),
        ("9.0a", ["sm_90a"]),
        ("9.0+PTX", ["compute_90", "sm_90a"]),
        ("Hopper", ["compute_90", "sm_90a"]),
        ("7.5;8.6+PTX", ["compute_86", "sm_86"]),
    ],
)
def test_a_list_of_architectures(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wish: str, targets: object
) -> None:
    a_toolkit(monkeypatch, tmp_path, "13.0")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wish)
    assert setup.wanted_cuda_targets() == targets
    flags = [setup.code_flag(target) for target in setup.wanted_cuda_targets()]
    assert cpp_extension._get_cuda_arch_flags(flags) == []  # torch adds none of its own


def test_without_a_list_the_devices_at_hand_decide(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    a_toolkit(monkeypatch, tmp_path, "13.0")
    devices(monkeypatch, (9, 0), (8, 0), (9, 0))
    assert setup.wanted_cuda_targets() == ["compute_90", "sm_80", "sm_90a"]


@pytest.mark.parametrize("wish", [None, "native"])
def test_without_a_device_every_generation_that_the_toolkit_knows(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wish: str | None
) -> None:
    a_toolkit(monkeypatch, tmp_path, "13.0", 75, 80, 86, 90, 100, 120)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if wish is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wish)
    assert setup.wanted_cuda_targets() == ["compute_100", "sm_100", "sm_80", "sm_90a"]


def test_old_devices_are_left_out_with_a_line(
    setup: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    a_toolkit(monkeypatch, tmp_path, "13.0")
    devices(monkeypatch, (7, 5), (8, 9))
    assert setup.wanted_cuda_targets() == ["compute_89", "sm_89"]
    assert "without CUDA kernels for sm_75: they need sm_80" in capsys.readouterr().err

    devices(monkeypatch, (7, 5))
    assert setup.wanted_cuda_targets() == []
    assert "without the CUDA kernels: no architecture" in capsys.readouterr().err
    monkeypatch.setenv("CAPSULE_KERNELS_CUDA", "1")
    with pytest.raises(SystemExit, match="CAPSULE_KERNELS_CUDA=1, but no architecture"):
        setup.wanted_cuda_targets()


def test_a_toolkit_of_another_version_is_told_before_anything_is_built(
    setup: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    a_toolkit(monkeypatch, tmp_path, "12.4", 80, 90)
    assert setup.wanted_cuda_targets() == []
    message = capsys.readouterr().err
    assert "is of CUDA 12.4, and torch was built with 13.0" in message
    assert message.count("\n") == 1


def test_an_unknown_architecture_ends_in_one_line(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    a_toolkit(monkeypatch, tmp_path, "13.0")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.x")
    with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST=9\.x: .*9\.x"):
        setup.wanted_cuda_targets()


EVERY = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)]


@pytest.mark.parametrize(
    ("targets", "runs_on"),
    [
        ("sm_80", EVERY[:3]),
        ("sm_86", EVERY[1:3]),
        ("sm_90a", EVERY[3:4]),
        ("compute_90,sm_90a", EVERY[3:]),
        ("sm_100,sm_80,sm_90a", EVERY[:6]),
    ],
)
def test_a_build_runs_where_it_has_code_for(
    monkeypatch: pytest.MonkeyPatch, targets: str, runs_on: list[tuple[int, int]]
) -> None:
    monkeypatch.setattr(extension, "module", SimpleNamespace(cuda_targets=targets))
    reasons = {capability: cuda.no_code_for.__wrapped__(capability) for capability in EVERY}
    assert [capability for capability, reason in reasons.items() if reason is None] == runs_on
    for (major, minor), reason in reasons.items():
        assert reason is None or reason == (
            f"the compiled extension was built for {targets} and this device is sm_{major}{minor}: "
            f"build it anew on this machine, or with TORCH_CUDA_ARCH_LIST={major}.{minor}"
        )


def test_apples_compiler_gets_no_option_that_it_refuses(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPSULE_KERNELS_CUDA", "0")
    for system, wanted in (("linux", True), ("darwin", False)):
        monkeypatch.setattr(sys, "platform", system)
        assert setup.__spec__ is not None
        assert setup.__spec__.loader is not None
        setup.__spec__.loader.exec_module(setup)
        (extension,) = setup.extensions()
        assert ("-fopenmp" in extension.extra_compile_args["cxx"]) is wanted
        assert ("-fopenmp" in extension.extra_link_args) is wanted

"""``python -m bench aot``: the kernels compiled without a GPU, and what is read from the result."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench import aot, aot_triton
from bench.__main__ import main
from bench.aot_rows import Row
from bench.shapes import Shape
from capsule_kernels.backends import triton as backend

ROOT = Path(__file__).parent.parent
ROW = Row("triton", "kernel", "MNIST", "TF32", "sm_90", 4, 128, 0, 35840, 32, 0.625)


@pytest.mark.slow
@pytest.mark.skipif(not backend.INSTALLED, reason="Triton is not installed")
def test_shipped_configurations_of_mnist_do_not_spill():
    arguments = ["--shape", "MNIST", "--target", "sm_90", "gfx942", "--precision", "float32"]
    done = subprocess.run(
        [sys.executable, "-m", "bench", "aot", *arguments, "--check", "--markdown"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
    header, _, *rows = rows
    kernels = [dict(zip(header, row, strict=True)) for row in rows]
    products = ("routing_forward_kernel", "routing_backward_kernel", "routing_gradients_kernel")
    for target in ("sm_90", "gfx942"):
        for name in products:
            found = [k for k in kernels if k["kernel"] == name and k["target"] == target]
            assert found, (name, target)
            assert all(int(k["matrix"]) > 0 for k in found), (name, target)
    assert {k["spilled"] for k in kernels} == {"0 B"}


@pytest.mark.slow
@pytest.mark.skipif(not backend.INSTALLED, reason="Triton is not installed")
@pytest.mark.skipif(backend.INTERPRETED, reason="Triton interprets here")
def test_the_compiler_takes_no_more_shared_memory_than_small_gpus_have(monkeypatch):
    """The sweeps in true float32 with four times the weights of MNIST: J in tiles for sm_86."""
    compile_for = aot_triton.compile_for
    sweeps = ("routing_forward_kernel", "routing_backward_kernel", "routing_statistics_kernel")

    def compile_sweeps(target, kernel, *rest):
        if kernel.__name__ in sweeps:
            return compile_for(target, kernel, *rest)
        return dict.fromkeys(
            ("registers", "spilled_bytes", "shared_bytes", "matrix_instructions"), 0
        )

    monkeypatch.setattr(aot_triton, "compile_for", compile_sweeps)
    rows = list(aot_triton.rows(Shape("K = 32", 64, 10, K=32), 64, 2, "float32", "sm_86"))
    found = [row for row in rows if row.kernel in sweeps]
    assert {row.kernel for row in found} == set(sweeps)
    assert len(found) == 4
    assert all(row.matrix_instructions > 0 and 0 < row.shared_share <= 1 for row in found)


@pytest.mark.slow
@pytest.mark.skipif(not backend.INSTALLED, reason="Triton is not installed")
@pytest.mark.skipif(backend.INTERPRETED, reason="Triton interprets here")
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_kernels_that_read_windows_compile(target):
    """Windows of 3 x 3 on 12 x 12 grids of 32 types, with the capsules of MNIST."""
    shape = Shape("windows", 32 * 9, 10)
    window = (3, 3, 2, 2)
    rows = list(aot_triton.rows(shape, 16, 3, "TF32", target, (12, 12, 32), window))
    names = [row.kernel for row in rows]
    assert names.count("grid_gradient_kernel") == 1
    assert names.count("routing_forward_kernel") > 1
    assert {row.spilled_bytes for row in rows} == {0}
    reading = ("routing_forward_kernel", "routing_backward_kernel", "routing_gradients_kernel")
    assert all(row.matrix_instructions for row in rows if row.kernel in reading)


@pytest.mark.parametrize(
    ("rows", "status"),
    [
        ([ROW], 0),
        ([ROW, replace(ROW, spilled_bytes=8)], 1),
        ([replace(ROW, spilled_bytes=8, shape="CIFAR-10 24x24")], 0),
        ([replace(ROW, kernel="routing_forward_kernel", target="sm_89", spilled_bytes=8)], 0),
        ([replace(ROW, kernel="routing_forward_kernel", target="sm_89", spilled_bytes=16)], 1),
        ([replace(ROW, target="sm_89", shared_bytes=99 << 10)], 0),
        ([replace(ROW, target="sm_89", shared_bytes=(99 << 10) + 1, shape="CIFAR-10 24x24")], 1),
    ],
)
def test_check_fails_on_a_spill_of_the_mnist_shape_and_on_what_cannot_be_launched(
    rows, status, monkeypatch, capsys
):
    monkeypatch.setattr(aot_triton, "missing", lambda: None)
    monkeypatch.setattr(aot, "compiled", lambda options: iter(rows))
    assert main(["aot", "--check"]) == status
    assert main(["aot"]) == 0
    assert "62%" in capsys.readouterr().out


def test_interrupted_it_prints_what_was_compiled(monkeypatch, capsys):
    def compiled(_options):
        yield ROW
        raise KeyboardInterrupt

    monkeypatch.setattr(aot, "compiled", compiled)
    monkeypatch.setattr(aot_triton, "missing", lambda: None)
    assert main(["aot", "--markdown"]) == 130
    assert "| triton | kernel | MNIST |" in capsys.readouterr().out


def test_what_is_missing_is_said(monkeypatch, capsys):
    monkeypatch.setattr(aot_triton, "missing", lambda: "Triton is not installed")
    assert main(["aot"]) == 2
    assert "aot: Triton is not installed" in capsys.readouterr().err


def test_blocks_that_fit():
    assert ROW.blocks == 4  # 65536 registers / (128 * 128)
    assert ROW.occupancy == 0.25
    assert replace(ROW, registers=129).blocks == 3  # given in eights
    assert replace(ROW, shared_bytes=99328).blocks == 2  # 228 KiB, one KiB of each block reserved
    assert replace(ROW, registers=32).blocks == 6  # shared memory again
    assert replace(ROW, target="gfx942", registers=144, shared_bytes=0).blocks == 3
    assert ROW.shared_share == 35840 / (227 << 10)
    assert replace(ROW, target="sm_86", shared_bytes=100 << 10).shared_share > 1
    assert replace(ROW, target="sm_86", shared_bytes=99 << 10).blocks == 1


def test_loops_are_found_in_machine_code():
    def line(number: int, text: str) -> str:
        return f"        /*{number:04x}*/                   {text} ;"

    code = [line(0, "MOV R1, R2"), ".L_x_1:", line(1, "FADD R1, R1, R2"), ".L_x_2:"]
    code += [line(n, "FFMA R1, R2, R3, R4") for n in range(2, 6)]
    code += [line(6, "@P0 BRA `(.L_x_2)"), line(7, "HMMA R1, R2, R3"), line(8, "BRA `(.L_x_1)")]
    code += [".L_x_3:", line(9, "BRA `(.L_x_3)")]
    assert aot_triton.loops("\n".join(code)) == "8 > 5"

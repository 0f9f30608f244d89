"""``python -m bench aot``: the kernels compiled without a GPU, and what is read from the result."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench import aot, aot_triton
from bench.__main__ import main
from bench.aot_accesses import loop_accesses
from bench.aot_loops import loop_lengths
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
    for what in ("turns", "sectors"):
        counted = {(k["kernel"], k["target"]) for k in kernels if k[what]}
        assert counted == {(name, "sm_90") for name in products}, what
    for kernel in kernels:
        if kernel["kernel"] in products[:2] and kernel["turns"]:  # no copy asks for half a sector
            assert kernel["sectors"].endswith(" (0)"), kernel


@pytest.mark.slow
@pytest.mark.skipif(not backend.INSTALLED, reason="Triton is not installed")
@pytest.mark.skipif(backend.INTERPRETED, reason="Triton interprets here")
def test_the_compiler_takes_no_more_shared_memory_than_small_gpus_have(monkeypatch):
    """The sweeps in true float32 with four times the weights of MNIST: J in tiles for sm_86."""
    compile_for = aot_triton.compile_for
    sweeps = ("routing_forward_kernel", "routing_backward_kernel", "routing_statistics_kernel")

    def compile_sweeps(target, source, *rest):
        if source.name in sweeps:
            return compile_for(target, source, *rest)
        return dict.fromkeys(
            ("registers", "spilled_bytes", "shared_bytes", "matrix_instructions"), 0
        )

    monkeypatch.setattr(aot_triton, "compile_for", compile_sweeps)
    rows = list(aot_triton.rows(Shape("K = 32", 64, 10, K=32), 64, 2, "float32", "sm_86"))
    found = [row for row in rows if row.kernel in sweeps]
    assert {row.kernel for row in found} == set(sweeps)
    assert [row.warps for row in found] == [4, 4, 8, 8]
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
        ([replace(ROW, kernel="routing_gradients_kernel", target="sm_100", spilled_bytes=8)], 0),
        ([replace(ROW, kernel="routing_gradients_kernel", target="sm_100", spilled_bytes=16)], 1),
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
    """Not one without a product; one, where two branches go back to a label; and none that only
    resumes another."""

    def line(number: int, text: str) -> str:
        return f"        /*{number:04x}*/                   {text} ;"

    code = [line(0, "MOV R1, R2"), ".L_x_1:", line(1, "FADD R1, R1, R2"), ".L_x_2:"]
    code += [line(n, "HMMA.1688.F32.TF32 R1, R2, R3, R4") for n in range(2, 6)]
    code += [line(6, "@P0 BRA `(.L_x_2)"), line(7, "FFMA R1, R2, R3"), line(8, "BRA `(.L_x_1)")]
    code += [".L_x_3:", line(9, "BRA `(.L_x_3)"), ".L_x_4:", line(10, "HGMMA R1")]
    code += [line(11, "@P0 BRA `(.L_x_4)"), ".L_x_5:", line(12, "HGMMA R1")]
    code += [line(13, "@P0 BRA `(.L_x_4)"), line(14, "BRA `(.L_x_5)")]
    assert loop_lengths("\n".join(code)) == "8 > 5, 4"


def in_a_loop(access: str, before: str) -> str:
    """PTX of a loop with a matrix instruction, and of accesses behind it, which do not count; %r1
    is the thread's number."""
    return f"""
        mov.u32 %r1, %tid.x;
        {before}
    $L__BB0_1:  // a loop
        {access};
        mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {{%r10}}, {{%r11}}, {{%r12}}, {{%r13}};
        @%p2 bra $L__BB0_1;
        ld.shared.b32 %r9, [%r2];
        ld.global.b32 %r9, [%rd2];
    """


@pytest.mark.parametrize(
    ("access", "lane_bytes", "turns", "conflicts"),
    [
        ("ld.shared.b32 %r9, [%r2+512]", 4, 1, 0),
        ("ld.shared.b32 %r9, [%r2]", 8, 2, 1),
        ("@%p1 st.shared.b32 [%r2], %r9", 128, 32, 31),
        ("ld.shared.b16 %rs9, [%r2]", 2, 1, 0),  # two lanes in a word
        ("ld.shared.b32 %r9, [%r2]", 0, 1, 0),  # all in one
        ("ld.shared.v2.b32 {%r8, %r9}, [%r2]", 8, 2, 0),
        ("ld.shared.v4.b32 {%r6, %r7, %r8, %r9}, [%r2]", 16, 4, 0),
        ("ld.shared.v4.b32 {%r6, %r7, %r8, %r9}, [%r2]", 32, 8, 4),
        ("st.shared.v2.b64 [%r2], {%rd1, %rd2}", 16, 4, 0),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r6, %r7, %r8, %r9}, [%r2]", 64, 16, 12),
        ("cp.async.cg.shared.global [ %r2 + 0 ], [ %rd1 + 0 ], 0x10, %r9", 16, 4, 0),
        ("cp.async.commit_group", 16, 0, 0),
        ("ld.global.b32 %r9, [%rd2]", 128, 0, 0),
    ],
)
def test_turns_in_shared_memory(access, lane_bytes, turns, conflicts):
    ptx = in_a_loop(access, f"mad.lo.s32 %r2, %r1, {lane_bytes}, 1024;")
    assert loop_accesses(ptx, 1)["turns"] == f"{turns} ({conflicts})"
    assert loop_accesses(ptx, 4)["turns"] == f"{4 * turns} ({4 * conflicts})"


@pytest.mark.parametrize(
    ("access", "lane_bytes", "sectors", "excess"),
    [
        ("ld.global.b32 %r9, [%rd2]", 4, 4, 0),
        ("ld.global.b32 %r9, [%rd2+16]", 4, 5, 1),
        ("ld.global.b32 %r9, [%rd2]", 0, 1, 0),
        ("@%p1 st.global.b32 [%rd2], %r9", 32, 16, 14),  # half of the lanes
        ("@!%p1 st.global.b32 [%rd2], %r9", 4, 2, 0),
        ("ld.global.v4.b32 {%r6, %r7, %r8, %r9}, [%rd2]", 16, 16, 0),
        ("ld.global.v4.b32 {%r6, %r7, %r8, %r9}, [%rd2]", 32, 32, 16),
        ("cp.async.cg.shared.global [ %r2 + 0 ], [ %rd2 + 0 ], 0x10, %r7", 16, 8, 0),
        ("cp.async.cg.shared.global [ %r2 + 0 ], [ %rd2 + 64 ], 0x10, 0x10", 32, 32, 16),
        ("cp.async.ca.shared.global [ %r2 + 0 ], [ %rd2 + 0 ], 0x8, 0x8", 32, 32, 24),
        ("ld.shared.b32 %r9, [%r2]", 128, 0, 0),
    ],
)
def test_sectors_of_global_memory(access, lane_bytes, sectors, excess):
    before = f"""
        ld.param.b64 %rd1, [kernel_param_0];
        mul.wide.s32 %rd3, %r1, {lane_bytes};
        add.s64 %rd2, %rd1, %rd3;
        and.b32 %r5, %r1, 31;
        setp.lt.u32 %p1, %r5, 16;
        selp.b32 %r7, 16, 0, %p1;
    """
    ptx = in_a_loop(access, before)
    assert loop_accesses(ptx, 1)["sectors"] == f"{sectors} ({excess})"
    assert loop_accesses(ptx, 4)["sectors"] == f"{4 * sectors} ({4 * excess})"


def test_turns_where_addresses_are_swizzled_and_loops_nested():
    """A lane's column is moved by its row, bit by bit; without that its four rows would meet."""
    ptx = """
        mov.u32 %r1, %tid.x;
        shr.u32 %r2, %r1, 3;
        and.b32 %r3, %r1, 7;
        setp.lt.u32 %p1, %r2, 99;
        selp.b32 %r4, %r2, 0, %p1;
        shl.b32 %r5, %r4, 3;
        xor.b32 %r6, %r3, %r5;
        bfe.u32 %r7, %r1, 3, 2;
        shl.b32 %r8, %r7, 5;
        or.b32 %r9, %r6, %r8;
        shl.b32 %r10, %r9, 2;
        shl.b32 %r11, %r8, 2;
    $outer:
        ld.shared.b32 %r20, [%r10];
    $inner:
        mma.sync.aligned.m16n8k8 {%r20}, {%r20}, {%r20}, {%r20};
        st.shared.b32 [%r11], %r20;
        bra.uni $inner;
    $copies:
        ld.shared.b32 %r20, [%r10];
        @%p1 bra $copies;
    $last:
        mma.sync.aligned.m16n8k8 {%r20}, {%r20}, {%r20}, {%r20};
        @%p1 bra $last;
        @%p1 bra $outer;
    """
    assert loop_accesses(ptx, 1)["turns"] == "6 (3) > 4 (3), 0 (0)"

"""``python -m bench``, run as a user runs it, on very little."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.__main__ import main, parse, settings_of
from bench.records import WRONG_RESULT, load

ROOT = Path(__file__).parent.parent


def test_accuracy_is_printed_and_written(tmp_path, capsys):
    file = tmp_path / "accuracy.json"
    arguments = ["accuracy", "--device", "cpu", "--batch", "1", "--markdown", "--json", str(file)]
    assert main(arguments) == 0
    machine, ceilings, records = load(file)
    assert machine["device"] == "cpu"
    assert ceilings["gemm"] > 0
    assert ceilings["copy"] > 0
    assert {record["dtype"] for record in records} == {"float64", "float32", "bfloat16", "float16"}
    printed = capsys.readouterr().out
    assert "| implementation | dtype | v | grad u | grad weight |" in printed
    assert "x) |" in printed
    assert machine["commit"] in printed


def test_interrupted_it_keeps_what_was_measured(tmp_path):
    """Ctrl-C after the first row: exit code 130, the row in the file and in the table."""
    file = tmp_path / "routing.json"
    options = ["--device", "cpu", "--peers", "none", "--shape", "SVHN (reduced)", "--rounds", "1"]
    batches = [part for B in range(1, 2000) for part in ("--batch", str(B))]
    process = subprocess.Popen(
        [sys.executable, "-m", "bench", "routing", *options, *batches, "--json", str(file)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "routing SVHN" in line:
            break
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    _, _, records = load(file)
    assert records
    assert "SVHN (reduced)" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["--rounds", "0"], "must be 1 or more, got 0"),
        (["--json", "no/such/folder/file.json"], "no/such/folder is no folder"),
        (["routing", "--batch", "-1"], "must be 1 or more, got -1"),
        (["routing", "--shape", "cube"], "invalid choice: 'cube'"),
        (["routing", "--json", str(ROOT)], "it is a folder"),
        (["memory", "--plots", __file__], "it is no folder"),
        (["routing", "--json", "/proc/x.json"], "no file can be made in /proc"),
        (["routing", "--plots", "/proc"], "no file can be made in /proc"),
        (["accuracy", "--plots", "x"], "unrecognized arguments: --plots"),
        (["scaling", "--plots", "x"], "unrecognized arguments: --plots"),
        (["routing", "--shape", "many classes", "--plots", "x"], "which --shape leaves out"),
        (["goals", "--only", "training", "--plots", "x"], "which --only leaves out"),
        (["scaling", "--axis", "R", "--iterations", "7"], "--iterations: axis R has its own"),
        (["scaling", "--axis", "threads", "--threads", "1"], "--threads: axis threads has its own"),
        (["goals", "--device", "cpu", "--only", "autotuned"], "of a CPU there are batches, shapes"),
        (["memory", "--device", "cpu", "--precision", "tf32"], "--precision tf32: only GPUs have"),
        (["routing", "--threads", "1000000"], "or less (processors), got 1000000"),
        # What would make no difference, or none that is judged.
        (["goals", "--iterations", "1"], "unrecognized arguments: --iterations"),
        (["goals", "--precision", "tf32"], "unrecognized arguments: --precision"),
        (["training", "--iterations", "30"], "unrecognized arguments: --iterations"),
        (["memory", "--rounds", "2"], "unrecognized arguments: --rounds"),
        (["accuracy", "--quick"], "unrecognized arguments: --quick"),
        (["aot", "--batch", "-5"], "must be 1 or more, got -5"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_a_failure_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    """As where a GPU is lost in the middle."""
    row = {"table": "accuracy", "implementation": "ours", "dtype": "float32", "quantity": "v"}

    def measure(*_):
        yield row | {"error": 1e-7, "oracle_error": 2e-7}
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr("bench.accuracy.measure", measure)
    monkeypatch.setattr("bench.machine.ceilings", lambda device: {"gemm": 1e11, "copy": 1e10})
    file = tmp_path / "accuracy.json"
    assert main(["accuracy", "--device", "cpu", "--json", str(file)]) == 1
    _, _, (record,) = load(file)
    assert record["error"] == 1e-7
    printed = capsys.readouterr()
    assert "float32" in printed.out
    assert "an illegal memory access" in printed.err


def test_a_wrong_result_is_a_failure(monkeypatch, capsys):
    row = {"table": "accuracy", "implementation": "ours", "dtype": "float32", "quantity": "v"}
    row |= {"oracle_error": 1e-7, "status": f"ValueError: v [2, 3] is off {WRONG_RESULT} 0.1"}
    monkeypatch.setattr("bench.accuracy.measure", lambda *_: iter([row]))
    monkeypatch.setattr("bench.machine.ceilings", lambda device: {"gemm": 1e11, "copy": 1e10})
    assert main(["accuracy", "--device", "cpu"]) == 1
    assert "some results are wrong" in capsys.readouterr().err


def test_interrupted_before_the_first_row(monkeypatch, capsys):
    def interrupted(device):
        raise KeyboardInterrupt

    monkeypatch.setattr("bench.machine.ceilings", interrupted)
    assert main(["accuracy", "--device", "cpu"]) == 130
    assert "interrupted before anything was measured" in capsys.readouterr().err


def test_options_reach_what_is_measured():
    command = "routing --device cpu --iterations 5 --threads 1 --rounds 9 --dtype bfloat16"
    settings = settings_of(parse(command.split()))
    assert (settings.R, settings.threads, settings.rounds) == (5, 1, 9)
    assert settings_of(parse([*command.split(), "--quick"])).rounds == 3


def test_without_a_subcommand_it_measures_the_goals():
    assert parse([]).command == "goals"
    assert parse(["--quick"]).command == "goals"


def test_a_file_that_is_no_report_is_named(tmp_path):
    (tmp_path / "torn.json").write_text('{"machine": {}, "cei')
    with pytest.raises(ValueError, match=r"torn\.json is not a report of python -m bench"):
        load(tmp_path / "torn.json")


def test_an_interrupt_does_not_wait_for_a_process_that_measures():
    """It may be compiling for a minute, and a report grants less before it kills."""
    code = (
        "import time; from bench.memory import in_fresh_process; print(flush=True); "
        "in_fresh_process(time.sleep, 600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.readline()
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert b"KeyboardInterrupt" in process.communicate(timeout=60)[1]

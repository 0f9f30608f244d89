"""``python -m bench`` and its report, run as a user runs them, on very little."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import report
from bench.__main__ import main, parse
from bench.records import load

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
    assert "| implementation | dtype | of | error |" in printed
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
        if line.startswith("routing SVHN"):
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
        (["--json", "no/such/folder/file.json"], "there is no folder"),
        (["routing", "--batch", "-1"], "must be 1 or more, got -1"),
        (["routing", "--shape", "cube"], "invalid choice: 'cube'"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_without_a_subcommand_it_measures_the_goals():
    assert parse([]).command == "goals"
    assert parse(["--quick"]).command == "goals"


def test_a_file_that_is_no_report_is_named(tmp_path):
    (tmp_path / "torn.json").write_text('{"machine": {}, "cei')
    with pytest.raises(ValueError, match=r"torn\.json is not a report of python -m bench"):
        load(tmp_path / "torn.json")


HANGS_SECONDS = 6


class OverOnceStarted(subprocess.Popen):
    """A process whose limit of HANGS_SECONDS is over when it has printed something: not before,
    however busy the machine is."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.output = options.get("stdout")

    def wait(self, timeout=None):
        if timeout != HANGS_SECONDS:
            return super().wait(timeout)
        while not os.fstat(self.output.fileno()).st_size and self.poll() is None:
            time.sleep(0.01)
        return super().wait(0.01)


def test_a_report_records_every_outcome_and_goes_on(tmp_path, monkeypatch, capsys):
    """Steps that work, fail, hang and come too late; and no path of this machine in the folder."""
    monkeypatch.setattr(report.subprocess, "Popen", OverOnceStarted)
    monkeypatch.setattr(report, "GRACE_SECONDS", 300)

    def steps(device, folder, scratch, data):
        def python(name, code, minutes=10.0):
            return report.Step(name, [sys.executable, "-c", code], minutes)

        waits = (
            "import time\nprint('started', flush=True)\n"
            "try: time.sleep(600)\nexcept KeyboardInterrupt: print('kept')"
        )
        return [
            python("works", f"print({str(ROOT)!r} + '/here')"),
            python("fails", "raise SystemExit(3)"),
            python("hangs", waits, minutes=HANGS_SECONDS / 60),
            python("last", "print('done')"),
        ]

    monkeypatch.setattr(report, "steps", steps)
    folder = report.make_report("cpu", 60.0, tmp_path)
    content = json.loads((folder / "report.json").read_text())
    outcomes = {step["name"]: step["outcome"] for step in content["steps"]}
    assert outcomes["works"] == "ok"
    assert outcomes["fails"] == "exit code 3"
    assert outcomes["hangs"] == f"stopped, with what it had measured, after {HANGS_SECONDS} s"
    assert outcomes["last"] == "ok"
    assert (folder / "works.log").read_text() == "./here\n"
    assert (folder / "hangs.log").read_text() == "started\nkept\n"
    assert set(content["kernels"]) == {"cpu"}
    for path in folder.iterdir():
        assert str(ROOT) not in path.read_text()


def test_a_report_whose_time_is_over_says_so(tmp_path):
    step = report.Step("late", [sys.executable, "-c", ""], 1.0)
    step.run(tmp_path / "log", seconds_left=1.0)
    assert step.outcome == "no time was left"


def test_every_step_of_a_report_is_a_command_that_parses(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    for device in ("cpu", "cuda"):
        for step in report.steps(device, tmp_path, tmp_path, None):
            if "bench" in step.command and "aot" not in step.command:
                parse(step.command[step.command.index("bench") + 1 :])

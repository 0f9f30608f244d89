"""``python -m bench`` and its report, run as a user runs them, on very little."""

import importlib.util
import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import report, steps
from bench.__main__ import main, parse, settings_of
from bench.records import WRONG_RESULT, load
from model.errors import UserError

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


def test_a_report_records_every_outcome_and_goes_on(tmp_path, monkeypatch, capsys):
    """Steps that work, fail and hang; and no path of this machine in the folder."""
    # Late as soon as it has started, however busy the machine is.
    log = "hangs.log"
    monkeypatch.setattr(
        steps.Running,
        "is_late",
        lambda one: one.step.name == "hangs" and any(p.stat().st_size for p in tmp_path.rglob(log)),
    )

    def planned(device, folder, scratch, data, built):
        def python(name, code):
            return steps.Step(name, [sys.executable, "-c", code], 10.0, grace=300)

        waits = (
            "import time\nprint('started', flush=True)\n"
            "try: time.sleep(600)\nexcept KeyboardInterrupt: print('kept')"
        )
        return [
            [python("works", f"print({str(ROOT)!r} + '/here')"), python("hangs", waits)],
            [python("fails", "raise SystemExit(3)")],
            [python("last", "print('done')")],
        ]

    monkeypatch.setattr(report, "steps", planned)
    folder, code = report.make_report("cpu", 60.0, tmp_path)
    assert code == 1, "a step has failed"
    content = json.loads((folder / "report.json").read_text())
    outcomes = {step["name"]: step["outcome"] for step in content["steps"]}
    assert outcomes["works"] == "ok"
    assert outcomes["fails"] == "exit code 3"
    assert outcomes["hangs"] == "stopped, with what it had measured, after 600 s"
    assert outcomes["last"] == "ok"
    assert (folder / "works.log").read_text() == "./here\n"
    assert (folder / "hangs.log").read_text() == "started\nkept\n"
    assert set(content["kernels"]) == {"cpu"}
    for path in folder.iterdir():
        assert str(ROOT) not in path.read_text()


def test_a_report_is_gone_on_with(tmp_path, monkeypatch, capsys):
    """Only with what has not ended well and the build, whose files may be gone; on the same device,
    and from the same sources."""
    attempts = []

    def planned(device, folder, scratch, data, built):
        attempts.append(1)
        write = f"print({len(attempts)})"
        return [
            [steps.Step(name, [sys.executable, "-c", write], 1.0) for name in ("build", "works")],
            [
                steps.Step(
                    "fails", [sys.executable, "-c", f"{write}; exit({2 - len(attempts)})"], 1.0
                )
            ],
        ]

    monkeypatch.setattr(report, "steps", planned)
    folder, _ = report.make_report("cpu", 1.0, tmp_path)
    first = json.loads((folder / "report.json").read_text())
    assert [step["outcome"] for step in first["steps"]] == ["ok", "ok", "exit code 1"]
    assert report.main(["--device", "cpu", "--resume", str(folder)]) == 0
    second = json.loads((folder / "report.json").read_text())
    assert [step["outcome"] for step in second["steps"]] == ["ok", "ok", "ok"]
    assert second["machine"] == first["machine"]
    logs = {step["name"]: (folder / f"{step['name']}.log").read_text() for step in second["steps"]}
    assert logs == {"build": "2\n", "works": "1\n", "fails": "2\n"}

    refused = {
        "holds no report.json": lambda content: None,
        "is of another device": lambda content: content["machine"].update(name="another"),
        "have changed since: cpu": lambda content: content["kernels"].update(cpu="0"),
        "is no report, or torn": lambda content: content.pop("steps"),
    }
    for message, change in refused.items():
        changed = json.loads(json.dumps(second))
        change(changed)
        (folder / "report.json").write_text(json.dumps(changed))
        where = tmp_path if "holds no" in message else folder
        assert report.main(["--device", "cpu", "--resume", str(where)]) == 2
        assert message in capsys.readouterr().err


def test_a_report_is_marked_whose_sources_change_meanwhile(tmp_path, monkeypatch, capsys):
    """And stays so when it is gone on with from the sources that it began with."""
    changed = tmp_path / "changed"
    monkeypatch.setattr(report, "differences", lambda _: ["cpu"] if changed.exists() else [])
    change = [sys.executable, "-c", f"open({str(changed)!r}, 'w')"]
    monkeypatch.setattr(report, "steps", lambda *_: [[steps.Step("changes", change, 1.0)]])
    folder, _ = report.make_report("cpu", 1.0, tmp_path)
    assert "changed while this was measured: cpu" in capsys.readouterr().out
    changed.unlink()
    assert report.main(["--device", "cpu", "--resume", str(folder)]) == 0
    assert json.loads((folder / "report.json").read_text())["changed"] == ["cpu"]


def waiting(tmp_path, name="waits", code="pass"):
    """A step that says that it started, then waits, and does ``code`` when it is interrupted."""
    program = (
        "import pathlib, time\ntry:\n"
        f"    pathlib.Path({str(tmp_path / name)!r}).touch(); time.sleep(600)\n"
        f"except KeyboardInterrupt: {code}"
    )
    return steps.Step(name, [sys.executable, "-c", program], 10.0)


def test_steps_of_a_group_run_side_by_side(tmp_path):
    """Each waits for the other to have started."""
    meets = "import pathlib, sys, time\nown, other = map(pathlib.Path, sys.argv[1:])\n"
    meets += "own.touch()\nwhile not other.exists(): time.sleep(0.01)"
    places = [str(tmp_path / "a"), str(tmp_path / "b")]
    group = [
        steps.Step(name, [sys.executable, "-c", meets, *order], 10.0)
        for name, order in (("one", places), ("two", places[::-1]))
    ]
    over = list(steps.run_together(group, tmp_path, time.monotonic() + 600))
    assert {step.name for step in over} == {"one", "two"}
    assert {step.outcome for step in group} == {"ok"}


def test_an_interrupted_group_gets_the_time_to_write_what_it_has(tmp_path, monkeypatch):
    step = waiting(tmp_path, code="print('kept')")

    def interrupt(_seconds):
        if (tmp_path / "waits").exists() and not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        pause(0.01)

    interrupted, pause = [], time.sleep
    monkeypatch.setattr(steps.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(steps.run_together([step], tmp_path, time.monotonic() + 600))
    assert step.outcome == "stopped, with what it had measured, by the user"
    assert (tmp_path / "waits.log").read_text() == "kept\n"


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


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_report_in_the_background_stops_with_its_steps(tmp_path, how):
    """Shells start a job in the background with SIGINT ignored."""
    step = waiting(tmp_path, code="print('kept')")
    code = (
        "import signal, sys\nfrom bench import report\n"
        f"waits, later = (report.Step(name, {step.command}, 10) for name in ('waits', 'later'))\n"
        "report.steps = lambda *_: [[waits], [later]]\n"
        f"sys.argv[1:] = ['--device', 'cpu', '--results', {str(tmp_path)!r}]\n"
        "sys.exit(report.as_command())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "waits").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(how)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    (log,) = tmp_path.rglob("waits.log")
    assert log.read_text() == "kept\n"
    content = json.loads((log.parent / "report.json").read_text())
    outcomes = [step["outcome"] for step in content["steps"]]
    assert outcomes == ["stopped, with what it had measured, by the user", "not run"]


def test_a_step_that_does_not_stop_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(steps.Running, "is_late", lambda one: (tmp_path / "waits").exists())
    step = waiting(tmp_path, code="time.sleep(600)")
    step.grace = 0.1
    list(steps.run_together([step], tmp_path, time.monotonic() + 600))
    assert step.outcome == "killed after 600 s"


def test_a_report_whose_time_is_over_says_so(tmp_path):
    skipped = steps.Step("other", [], 1.0, outcome="skipped: no reason")
    step = steps.Step("late", [sys.executable, "-c", ""], 1.0)
    list(steps.run_together([skipped, step], tmp_path, time.monotonic() + 1))
    assert step.outcome == "no time was left"
    assert skipped.outcome == "skipped: no reason"
    assert not step.failed
    assert not skipped.failed


def test_steps_can_be_left_out_and_run_later(tmp_path, monkeypatch, capsys):
    def planned(*_):
        return [[steps.Step(name, [sys.executable, "-c", ""], 1.0) for name in ("one", "two")]]

    monkeypatch.setattr(report, "steps", planned)
    here = ["--device", "cpu", "--results", str(tmp_path)]
    assert report.main([*here, "--without", "two"]) == 0
    (file,) = tmp_path.glob("*/*/report.json")
    assert capsys.readouterr().out.splitlines()[-1] == str(file.parent)

    def outcomes() -> list[str]:
        return [step["outcome"] for step in json.loads(file.read_text())["steps"]]

    assert outcomes() == ["ok", "skipped: left out as wished"]
    assert report.main([*here, "--resume", str(file.parent)]) == 0
    assert outcomes() == ["ok", "ok"]
    with pytest.raises(SystemExit):
        report.main([*here, "--without", "three"])
    assert "--without: there is no step three, only one, two" in capsys.readouterr().err


def test_a_report_that_has_no_place_or_data_is_refused(capsys):
    with pytest.raises(SystemExit):
        report.main(["--data-dir", "no/such/folder"])
    assert "no/such/folder: there is no such folder" in capsys.readouterr().err
    for results in ("/proc/x", __file__):
        with pytest.raises(UserError, match=r"can't be made: "):
            report.main(["--device", "cpu", "--results", results])


def test_what_is_not_installed_is_told(tmp_path, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "sklearn" else found(name)
    )
    monkeypatch.setattr(report, "steps", lambda *_: [])
    folder, _ = report.make_report("cpu", 1.0, tmp_path)
    assert "sklearn is not installed: the training run will fail" in capsys.readouterr().err
    assert json.loads((folder / "report.json").read_text())["missing_packages"] == ["sklearn"]


def test_without_rich_a_report_says_what_it_needs():
    code = "import sys; sys.modules['rich'] = None; from bench import report; report.main([])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "the package rich is not installed" in done.stderr


def test_the_toolkit_is_the_one_nvcc_belongs_to(tmp_path, monkeypatch):
    """nvcc on the PATH may be a wrapper of one elsewhere."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '#$ TOP={tmp_path}/toolkit/bin/..' >&2\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    (tmp_path / "toolkit" / "bin").mkdir(parents=True)
    assert report.surroundings()["CUDA_HOME"] == str(tmp_path / "toolkit")
    monkeypatch.setenv("CUDA_HOME", "/chosen")
    assert "CUDA_HOME" not in report.surroundings()


def test_every_step_of_a_report_is_a_command_that_parses(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    for device in ("cpu", "cuda"):
        for step in itertools.chain.from_iterable(report.steps(device, tmp_path, tmp_path, None)):
            if "bench" in step.command and "aot" not in step.command:
                parse(step.command[step.command.index("bench") + 1 :])

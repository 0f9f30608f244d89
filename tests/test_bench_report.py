"""``python -m bench.report`` and its steps, on stand-ins for what it runs."""

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
from bench.__main__ import parse
from model.errors import UserError

ROOT = Path(__file__).parent.parent


def step(name, code="", **options):
    """A step that runs some Python."""
    return steps.Step(name, [sys.executable, "-c", code], 10.0, **options)


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
        waits = (
            "import time\nprint('started', flush=True)\n"
            "try: time.sleep(600)\nexcept KeyboardInterrupt: print('kept')"
        )
        return [
            [step("works", f"print({str(ROOT)!r} + '/here')"), step("hangs", waits, grace=300)],
            [step("fails", "raise SystemExit(3)")],
            [step("last", "print('done')")],
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
    """Only with what has not ended well, and the build and compilation, whose files may be gone; on
    the same device, and from the same sources."""
    attempts = []

    def planned(device, folder, scratch, data, built):
        attempts.append(1)
        write = f"print({len(attempts)})"
        return [
            [step("build", write), step("compile", write), step("works", write)],
            [step("fails", f"{write}; exit({2 - len(attempts)})")],
        ]

    monkeypatch.setattr(report, "steps", planned)
    folder, _ = report.make_report("cpu", 1.0, tmp_path)
    first = json.loads((folder / "report.json").read_text())
    assert [step["outcome"] for step in first["steps"]] == ["ok", "ok", "ok", "exit code 1"]
    assert report.main(["--device", "cpu", "--resume", str(folder)]) == 0
    second = json.loads((folder / "report.json").read_text())
    assert [step["outcome"] for step in second["steps"]] == ["ok"] * 4
    assert second["machine"] == first["machine"]
    logs = {step["name"]: (folder / f"{step['name']}.log").read_text() for step in second["steps"]}
    assert logs == {"build": "2\n", "compile": "2\n", "works": "1\n", "fails": "2\n"}

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
    change = step("changes", f"open({str(changed)!r}, 'w')")
    monkeypatch.setattr(report, "steps", lambda *_: [[change]])
    folder, _ = report.make_report("cpu", 1.0, tmp_path)
    assert "changed while this was measured: cpu" in capsys.readouterr().out
    changed.unlink()
    assert report.main(["--device", "cpu", "--resume", str(folder)]) == 0
    assert json.loads((folder / "report.json").read_text())["changed"] == ["cpu"]


def waiting(tmp_path, code):
    """A step that says that it started, then waits, and does ``code`` when it is interrupted."""
    return step(
        "waits",
        "import pathlib, time\ntry:\n"
        f"    pathlib.Path({str(tmp_path / 'waits')!r}).touch(); time.sleep(600)\n"
        f"except KeyboardInterrupt: {code}",
    )


def test_steps_of_a_group_run_side_by_side(tmp_path):
    """Each waits for the other to have started."""
    one, two = (str(tmp_path / name) for name in ("one", "two"))

    def meets(own, other):
        code = f"import pathlib, time; pathlib.Path({own!r}).touch()\n"
        return f"{code}while not pathlib.Path({other!r}).exists(): time.sleep(0.01)"

    group = [step("one", meets(one, two)), step("two", meets(two, one))]
    over = list(steps.run_together(group, tmp_path, time.monotonic() + 600))
    assert {step.name for step in over} == {"one", "two"}
    assert {step.outcome for step in group} == {"ok"}


def test_an_interrupted_group_gets_the_time_to_write_what_it_has(tmp_path, monkeypatch):
    waits = waiting(tmp_path, "print('kept')")

    def interrupt(_seconds):
        if (tmp_path / "waits").exists() and not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        pause(0.01)

    interrupted, pause = [], time.sleep
    monkeypatch.setattr(steps.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(steps.run_together([waits], tmp_path, time.monotonic() + 600))
    assert waits.outcome == "stopped, with what it had measured, by the user"
    assert (tmp_path / "waits.log").read_text() == "kept\n"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_report_in_the_background_stops_with_its_steps(tmp_path, how):
    """Shells start a job in the background with SIGINT ignored."""
    waits = waiting(tmp_path, "print('kept')")
    code = (
        "import signal, sys\nfrom bench import report\n"
        f"waits, later = (report.Step(name, {waits.command}, 10) for name in ('waits', 'later'))\n"
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
    waits = waiting(tmp_path, "time.sleep(600)")
    waits.grace = 0.1
    list(steps.run_together([waits], tmp_path, time.monotonic() + 600))
    assert waits.outcome == "killed after 600 s"


def test_a_report_whose_time_is_over_says_so(tmp_path):
    skipped = steps.Step("other", [], 1.0, outcome="skipped: no reason")
    late = step("late")
    list(steps.run_together([skipped, late], tmp_path, time.monotonic() + 1))
    assert late.outcome == "no time was left"
    assert skipped.outcome == "skipped: no reason"
    assert not late.failed
    assert not skipped.failed


def test_steps_can_be_left_out_and_run_later(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "steps", lambda *_: [[step("one"), step("two")]])
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
    (tmp_path / "goals.json").write_text('{"machine": {}, "ceilings": {}, "records": []}')
    for device in ("cpu", "cuda"):
        for one in itertools.chain.from_iterable(report.steps(device, tmp_path, tmp_path, None)):
            if "bench" in one.command and "aot" not in one.command:
                parse(one.command[one.command.index("bench") + 1 :])


def test_what_a_gpu_should_do_in_its_minutes_fits_into_them(tmp_path, monkeypatch):
    """Every measurement that a document shows, and the tests of both backends."""
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    groups = report.steps("cuda", tmp_path, tmp_path, None, built=True)
    names = [step.name for group in groups for step in group]
    groups = [[step for step in group if step.outcome == steps.NOT_RUN] for group in groups]
    last = next(i for i, group in enumerate(groups) if group[0].name == "tests-triton")
    seconds = sum(60 * max(step.minutes for step in group) for group in groups[: last + 1])
    assert seconds / report.PATIENCE <= 60 * report.TOTAL_MINUTES["cuda"]
    wanted = {"accuracy", "memory", "goals", "routing", "scaling", "routing-tf32", "tests"}
    assert wanted < set(names[: names.index("tests-triton")])
    assert names.index("sanitizer-memcheck") < names.index("goals")

"""``python -m bench.report``: build, test and measure here, and leave one folder of evidence.

The folder is ``bench/results/<device>/<date>-<commit>/``: JSON and a log of each step, plots, and
``report.json``, which says what ran, how it ended and what the kernels' sources were. A step that
fails, or has no time left, is recorded, and the rest goes on. Needs no network.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from . import machine
from .options import default_device, positive, reason_against_device
from .peers import BACKENDS
from .sources import ROOT, digest

RESULTS = ROOT / "bench" / "results"
TOTAL_MINUTES = {"cpu": 45.0, "cuda": 8.0}
GRACE_SECONDS = 20
"""What a step gets to write what it has after it was interrupted."""
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
TRUST = ("tests/test_determinism.py", "tests/test_range.py", "tests/test_properties.py")
"""Tests of many values and sizes: a step of their own, as Triton compiles for each size."""


@dataclass
class Step:
    """A command with a time limit; ``outcome`` is "ok", or what went wrong."""

    name: str
    command: list[str]
    minutes: float
    environment: dict[str, str] = field(default_factory=dict)
    outcome: str = "not run"
    seconds: float = 0.0

    def run(self, log: Path, seconds_left: float) -> None:
        """Run it with its output in ``log``; interrupted, like by Ctrl-C, at its limit."""
        limit = min(60 * self.minutes, seconds_left)
        if limit < 5:
            self.outcome = "no time was left"
            return
        started = time.monotonic()
        with log.open("w") as output:
            process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(limit)
                self.outcome = "ok" if code == 0 else f"exit code {code}"
            except subprocess.TimeoutExpired:
                self.outcome = f"{interrupt(process)} after {limit:.0f} s"
            except KeyboardInterrupt:
                self.outcome = f"{interrupt(process)} by the user"
                raise
            finally:
                self.seconds = round(time.monotonic() - started, 1)
                end_group(process)


def interrupt(process: subprocess.Popen) -> str:
    """Ask the process to stop, so that it writes what it has; says how that went."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        return "killed"
    return "stopped, with what it had measured,"


def end_group(process: subprocess.Popen) -> None:
    """End the process and what it started, if any of it still runs."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()


def steps(device: str, folder: Path, scratch: Path, data: Path | None) -> list[Step]:
    """Everything a report consists of, the most wanted first."""
    python = sys.executable

    def bench(name: str, minutes: float, *options: str, command: str = "") -> Step:
        arguments = ["--device", device, "--json", str(folder / f"{name}.json"), *options]
        return Step(name, [python, "-m", "bench", command or name, *arguments], minutes)

    build = Step(
        "build", [python, "setup.py", "build_ext", "--inplace"], 8 if device == "cpu" else 4
    )
    if device == "cuda" and "TORCH_CUDA_ARCH_LIST" not in os.environ:
        # Only what runs here: every further architecture costs a compilation.
        major, minor = torch.cuda.get_device_capability()
        build.environment["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}"
    train = [python, "-m", "model.train", "--epochs=1", "--max-minutes=1", f"--device={device}"]
    if data is not None:
        train += ["--dataset=mnist", f"--data-dir={data}"]
    training_run = Step("training-run", [*train, f"--save-dir={scratch / 'run'}"], 2)
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    gpu_tests = [*pytest, "-m", "gpu", "--continue-on-collection-errors"]
    plots = ("--plots", str(folder))
    if device == "cpu":
        return [
            build,
            Step("tests", [*pytest, "tests/test_cpu.py", "tests/test_reference.py"], 10),
            bench("goals", 12),
            bench("routing", 10, "--shape", "MNIST", *plots),
            bench("memory", 5, *plots),
            bench("scaling", 4),
            bench("accuracy", 2),
            bench("training", 4),
            training_run,
        ]
    return [
        build,
        Step("tests", [*gpu_tests, *(f"--ignore={file}" for file in TRUST), "tests"], 2),
        bench("goals", 3),
        bench("accuracy", 0.5),
        bench("memory", 1, "--quick", "--no-max-autotune", *plots),
        *sanitizer_steps(),
        Step("trust", [*gpu_tests, *TRUST], 1),
        bench("scaling", 0.75),
        bench("routing", 1, "--shape", "MNIST", "--peers", "eager", *plots),
        bench("routing-tf32", 1, "--precision", "tf32", "--peers", "none", command="routing"),
        bench("training", 0.5),
        training_run,
        Step("aot", [python, "-m", "bench", "aot", "--shape=MNIST", "--markdown"], 1),
    ]


def sanitizer_steps() -> list[Step]:
    """Every tool of compute-sanitizer over small calls of the GPU backends."""
    sanitizer = shutil.which("compute-sanitizer", path=sanitizer_path())
    found = []
    for tool in SANITIZER_TOOLS:
        command = [sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
        step = Step(
            f"sanitizer-{tool}",
            [*command, sys.executable, "-m", "bench.small_calls"],
            0.5,
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        if sanitizer is None:
            step.outcome = "skipped: there is no compute-sanitizer here"
        found.append(step)
    return found


def sanitizer_path() -> str:
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    return os.pathsep.join([os.environ["PATH"], *(f"{home}/bin" for home in homes if home)])


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def make_anonymous(folder: Path, scratch: Path, data: Path | None) -> None:
    """Replace paths of this machine in every text file of the folder."""
    places = {
        sys.prefix: "<python>",
        sys.base_prefix: "<python>",
        str(ROOT): ".",
        str(scratch): "<scratch>",
        str(Path.home()): "~",
    }
    if data is not None:
        places[str(data)] = "<data>"
    for path in filter(Path.is_file, folder.rglob("*")):
        text = path.read_text(errors="replace")
        for place in sorted(places, key=len, reverse=True):
            text = text.replace(place, places[place])
        path.write_text(text)


def write_report(folder: Path, device: str, done: list[Step]) -> None:
    content = {
        "machine": machine.describe(device),
        "kernels": {backend: digest(backend) for backend in BACKENDS[device]},
        "steps": [asdict(step) for step in done],
    }
    (folder / "report.json").write_text(json.dumps(content, indent=1) + "\n")


def make_report(device: str, minutes: float, results: Path, data: Path | None = None) -> Path:
    """Run every step and write the folder; returns it."""
    screen = Console(stderr=True)
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    name = slug(f"{machine.device_name(device)} {machine.processors() if device == 'cpu' else ''}")
    folder = results / name / f"{date}-{machine.commit()}"
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as name_of_scratch:
        scratch = Path(name_of_scratch)
        planned = steps(device, folder, scratch, data)
        try:
            for step in planned:
                if step.outcome == "not run":
                    screen.print(f"{step.name} ...", end=" ")
                    step.run(folder / f"{step.name}.log", end - time.monotonic())
                screen.print(f"{step.name}: {step.outcome} ({step.seconds:.0f} s)", highlight=False)
        except KeyboardInterrupt:
            screen.print("interrupted: here is what was measured")
        for metrics in scratch.rglob("metrics.jsonl"):
            shutil.copy(metrics, folder)
    write_report(folder, device, planned)
    make_anonymous(folder, scratch, data)
    table = Table("step", "outcome", "seconds")
    for step in planned:
        table.add_row(step.name, step.outcome, f"{step.seconds:.0f}")
    Console().print(table)
    return folder


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device())
    parser.add_argument("--minutes", type=positive, help="time for everything (GPU: 8, CPU: 45)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the folder goes")
    parser.add_argument(
        "--data-dir", type=Path, help="MNIST's files, for the training run (default: digits)"
    )
    options = parser.parse_args(arguments)
    if reason := reason_against_device(options.device):
        parser.error(reason)
    data = options.data_dir
    if data is not None and not data.is_dir():
        parser.error(f"--data-dir {data}: there is no such folder")
    minutes = options.minutes or TOTAL_MINUTES[options.device]
    folder = make_report(options.device, minutes, options.results, data and data.resolve())
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""``python -m bench.report``: build, test and measure here, and leave one folder of evidence.

The folder is ``bench/results/<device>/<date>-<commit>/``: JSON and a log of each step, plots, and
``report.json``, which says what ran, how it ended and what the kernels' sources were. A step that
fails, or has no time left, is recorded, and the rest goes on; ``--resume`` gives it another chance.
The exit code is 1 where one has failed, 130 after Ctrl-C. Needs no network.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from model.errors import UserError, run_command
from model.outputs import check_writable, write_atomically

from . import machine, precompile
from .aot_rows import TARGETS
from .options import INTERRUPTED, default_device, minutes, reason_against_device
from .peers import BACKENDS
from .records import Record
from .shapes import CONVOLUTION, MNIST, SHARED
from .sources import CHANGED, KERNELS, ROOT, differences, digests
from .steps import NOT_RUN, Step, run_together

RESULTS = ROOT / "bench" / "results"
REPORT = "report.json"
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
TOTAL_MINUTES = {"cpu": 45.0, "cuda": 8.0}
LEFT_OUT = "skipped: left out as wished"
BUILD, COMPILE = "build", "compile"
"""What these leave, others find."""
PATIENCE = 1.4
"""Times the seconds that a step of a GPU should take are its limit."""
WINDOWS = ("--shape", CONVOLUTION.name, "--no-max-autotune")
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
TRUST = ("tests/test_determinism.py", "tests/test_range.py", "tests/test_properties.py")
"""Tests of many values and sizes: a step of their own, as Triton compiles for each size."""
FIRST = (
    "tests/test_export.py",
    "tests/test_gpu.py",
    "tests/test_cuda_graphs.py",
    "tests/test_every_backend.py",
)
"""What tests begin with: saved programs, which take a minute, then the GPU backends themselves."""
SANITIZED = "tests/test_cuda_sanitizer.py"
"""compute-sanitizer has steps of its own."""
OTHERS = "not triton and not aotinductor"
OTHER_TYPES = "(float64 or (float16 and not bfloat16))"
LATER = "(bfloat16 or awkward_windows)"
TRITON_FIRST = f"triton and not {OTHER_TYPES} and not {LATER}"
TRITON_NEXT = f"triton and not {OTHER_TYPES} and {LATER}"
TRITON_LAST = f"triton and {OTHER_TYPES}"
"""Which tests by their names. Triton compiles anew for each dtype and each window: what there is of
subjects, sizes, options and networks comes first in float32 alone. Packages of AOTInductor take two
minutes each, and are left out."""
SHARED_COMPILATIONS = {"TRITON_CACHE_MANAGER": "bench.shared_compilations:OneCompiles"}
"""So that none of the processes compiles what another is compiling."""
PACKAGES = {
    "ninja": "the build",
    "pybind11": "the build",
    "pytest": "tests",
    "hypothesis": "tests",
    "rich": "every measurement",
    "matplotlib": "plots",
    "safetensors": "the training run",
    "sklearn": "the training run",
    "PIL": "the training run",
}
"""Packages beside torch, and what needs them."""


def steps(
    device: str, folder: Path, scratch: Path, data: Path | None, built: bool = False
) -> list[list[Step]]:
    """Everything a report consists of, the most wanted first; those of a list run side by side.

    ``built``: the extension is; nothing waits for it then.
    """
    python = sys.executable

    def bench(name: str, minutes: float, *options: str, adds_to: str | None = None) -> Step:
        """A measurement by the command that its name begins with, which may add to another's."""
        file = str(folder / f"{adds_to or name}.json")
        command = [python, "-m", "bench", name.partition("-")[0], "--device", device]
        command += ["--json", file, *(["--with", file] if adds_to else []), *options]
        return Step(name, command, minutes)

    on_cpu = device == "cpu"
    build = Step(BUILD, [python, "setup.py", "build_ext", "--inplace"], 8 if on_cpu else 4)
    if built:
        build.outcome = "skipped: it was built before"
    train = [python, "-m", "model.train", f"--device={device}", f"--save-dir={scratch / 'run'}"]
    if data is not None:
        train += ["--experiment=mnist", "--lr-schedule=linear", f"--data-dir={data}"]
    plots = ("--plots", str(folder))
    if on_cpu:
        one_by_one = [
            build,
            Step("tests", [*PYTEST, "-q", "tests/test_cpu.py", "tests/test_reference.py"], 10),
            bench("goals", 12),
            bench("routing", 10, "--shape", MNIST.name, *plots),
            bench("routing-shared", 2, "--shape", SHARED.name),
            bench("routing-windows", 3, *WINDOWS),
            bench("memory", 8, *plots),
            bench("scaling", 4),
            bench("accuracy", 2),
            bench("training", 4),
            Step("training-run", [*train, "--epochs=1", "--max-minutes=1"], 2),
        ]
        return [[step] for step in one_by_one]
    # An epoch of the digits is 11 steps, of which a graph warms up three.
    train += ["--cuda-graph", "--tf32", "--amp", "--epochs=15", "--max-minutes=0.6"]
    return gpu_steps(bench, build, train, plots)


def limit(seconds: float) -> float:
    """The minutes after which a step of a GPU is stopped that should take so many seconds."""
    return PATIENCE * seconds / 60


def gpu_steps(
    bench: Callable[..., Step], build: Step, train: Sequence[str], plots: Sequence[str]
) -> list[list[Step]]:
    """Of a GPU; up to Triton's tests what its minutes are enough for where the extension is built.

    Numbers are the seconds that a step should take on an H200 with 16 processors: estimates from
    what those of earlier reports took that were not overloaded.
    """
    major, minor = torch.cuda.get_device_capability()
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        # Only what runs here: every further architecture costs a compilation.
        build.environment["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}"
    # By name: of folders pytest would choose the order.
    found = {str(file.relative_to(ROOT)) for file in (ROOT / "tests").glob("test_*.py")}
    files = [*FIRST, *sorted(found.difference(FIRST, TRUST, [SANITIZED]))]
    ours_alone = ("--peers", "none")
    batches = [option for B in precompile.BFLOAT16_BATCHES for option in ("--batch", str(B))]
    tf32 = ("--precision", "tf32", "--batch", str(precompile.TF32_BATCH))
    bfloat16 = ("--dtype", "bfloat16", "--shape", MNIST.name, *batches)
    # The most wanted first; a training step comes with its parts. Tuning peers takes minutes.
    goals = ("batches", "memory", "training", "small batches")
    own = f"sm_{major}{minor}"
    aot = ["aot", "--shape=MNIST", "--target", own if own in TARGETS else "sm_90", "--markdown"]
    modules = [sys.executable, "-m"]
    # Each of many processes compiles alone, and has nothing to write when it is stopped.
    compiling = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return [
        [build, Step(COMPILE, [*modules, "bench.precompile"], limit(45), compiling, grace=1)],
        # No table has a time of these. Every other measurement runs alone.
        [
            gpu_tests("tests", 75, OTHERS, *files, share=0.5),
            bench("accuracy", limit(20)),
            bench("memory", limit(45), "--quick", "--no-max-autotune", *plots),
            *sanitizer_steps(40),
            Step("training-run", list(train), limit(40)),
        ],
        [bench("goals", limit(95), *(f"--only={part}" for part in goals))],
        [bench("routing", limit(50), "--shape", MNIST.name, "--peers", "eager", *plots)],
        [bench("scaling", limit(45))],
        [bench("routing-tf32", limit(30), *tf32, *ours_alone)],
        [bench("routing-bfloat16", limit(25), *bfloat16, *ours_alone)],
        [gpu_tests("tests-triton", 110, TRITON_FIRST, *files)],
        # What --minutes or --resume have time for.
        [bench("goals-autotuned", limit(150), "--only=autotuned", adds_to="goals")],
        [
            gpu_tests("tests-bfloat16", 60, TRITON_NEXT, *files, share=0.5),
            gpu_tests("tests-other-types", 60, TRITON_LAST, *files, share=0.25),
            gpu_tests("trust", 60, "", *TRUST, share=0.25),
        ],
        [bench("routing-windows", limit(70), *WINDOWS)],
        [Step("aot", [*modules, "bench", *aot], limit(40))],
    ]


def gpu_tests(name: str, seconds: float, which: str, *files: str, share: float = 1) -> Step:
    """Tests on the GPU in a process for each of a ``share`` of the processors: most compile."""
    command = [*PYTEST, "-v", "-m", "gpu", "--continue-on-collection-errors"]
    command += ["--failures-at-once", "--durations=25", "-k", which]
    if which != OTHERS:
        command.append("--files-side-by-side")
    if importlib.util.find_spec("xdist"):
        processes = max(1, int(share * machine.processors()))
        command += ["--numprocesses", str(processes), "--maxschedchunk", "2"]
    environment = {"OMP_NUM_THREADS": "1", **SHARED_COMPILATIONS}
    # Its log is written as it goes: nothing is lost where it does not stop at once.
    return Step(name, [*command, *files], limit(seconds), environment, grace=5)


def sanitizer_steps(seconds: float) -> list[Step]:
    """Every tool of compute-sanitizer over small calls of the GPU backends."""
    sanitizer = shutil.which("compute-sanitizer", path=sanitizer_path())
    found = []
    for tool in SANITIZER_TOOLS:
        command = [sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
        step = Step(
            f"sanitizer-{tool}",
            [*command, sys.executable, "-m", "bench.small_calls"],
            limit(seconds),
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", **SHARED_COMPILATIONS},
        )
        if sanitizer is None:
            step.outcome = "skipped: there is no compute-sanitizer here"
        found.append(step)
    return found


def sanitizer_path() -> str:
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    return os.pathsep.join([os.environ["PATH"], *(f"{home}/bin" for home in homes if home)])


def surroundings() -> dict[str, str]:
    """Where steps find ninja (beside this Python), this package, and the toolkit of nvcc.

    The package need not be installed. nvcc on the PATH may be a wrapper somewhere else: it knows
    best where its toolkit is.
    """
    places = {"PATH": sysconfig.get_path("scripts"), "PYTHONPATH": str(ROOT)}
    found = {
        name: os.pathsep.join(filter(None, [place, os.environ.get(name)]))
        for name, place in places.items()
    }
    nvcc = shutil.which("nvcc")
    if nvcc is not None and "CUDA_HOME" not in os.environ:
        dry = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True, check=False
        )
        if home := re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE):
            found["CUDA_HOME"] = str(Path(home[1]).resolve())
    return found


def missing_packages() -> dict[str, str]:
    """Which packages are not here, and what will fail without them."""
    return {name: what for name, what in PACKAGES.items() if importlib.util.find_spec(name) is None}


def place(described: Record) -> Path:
    """Where a report of a machine lies: <device>/<date>-<commit>."""
    name = described["name"]
    if described["device"] == "cpu":
        name += f" {machine.processors()} cpus"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return Path(slug, f"{described['date'][:10]}-{described['commit']}")


def make_anonymous(folder: Path, scratch: Path, data: Path | None) -> None:
    """Replace paths of this machine in every text file of the folder."""
    places = {
        sys.prefix: "<python>",
        sys.base_prefix: "<python>",
        str(ROOT): ".",
        str(folder): "<report>",
        str(scratch): "<scratch>",
        str(Path.home()): "~",
    }
    if data is not None:
        places[str(data)] = "<data>"
    for path in filter(Path.is_file, folder.rglob("*")):
        text = path.read_text(errors="replace")
        for place in sorted(places, key=len, reverse=True):
            if len(place) > 1:  # a home of / is in every path
                text = text.replace(place, places[place])
        path.write_text(text)


def write_report(folder: Path, content: Record, done: Iterable[Step]) -> None:
    """Write it as it is by now, with a mark where the sources have changed since it was begun."""
    content[CHANGED] = sorted({*content.get(CHANGED, ()), *differences(content)})
    content["steps"] = [asdict(step) for step in done]
    write_atomically(folder / REPORT, json.dumps(content, indent=1).encode() + b"\n")


def reason_against_resuming(folder: Path, device: str) -> str | None:
    """Why the report in ``folder`` can't be gone on with here and now, or None."""
    if not (folder / REPORT).is_file():
        return f"{folder} holds no {REPORT}"
    try:
        stored = json.loads((folder / REPORT).read_text())
        _ = stored["machine"]["name"], stored[KERNELS], stored["steps"][0]["outcome"]
    except (ValueError, LookupError, TypeError):
        return f"{folder / REPORT} is no report, or torn"
    now = machine.describe(device)
    if any(stored["machine"][what] != now[what] for what in ("device", "name")):
        return f"{folder} is of another device: {stored['machine']['name']}"
    if changed := differences(stored):
        return f"the sources of {folder} have changed since: {', '.join(changed)}"
    return None


def keep_what_is_done(steps: Iterable[Step], stored: Iterable[Record]) -> None:
    """Take the outcome of steps that ended well from the report they stand in.

    Not of the build and the compilation: what they left may be gone, and where it is not, they cost
    little.
    """
    done = {step["name"]: step for step in stored if step["outcome"] == "ok"}
    for name in (BUILD, COMPILE):
        done.pop(name, None)
    for step in steps:
        if step.name in done:
            step.outcome, step.seconds = "ok", done[step.name]["seconds"]


def make_report(
    device: str,
    minutes: float,
    results: Path,
    data: Path | None = None,
    built: bool = False,
    resumed: Path | None = None,
    without: Sequence[str] = (),
) -> tuple[Path, int]:
    """Run every step but those ``without``, of a ``resumed`` report those that did not end well;
    returns the folder and the command's exit code."""
    from rich.console import Console
    from rich.table import Table

    screen = Console(stderr=True)
    content: Record = {"machine": machine.describe(device), **digests(BACKENDS[device])}
    folder = resumed or results / place(content["machine"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} can't be made: {error.strerror}") from None
    check_writable("the report", folder / REPORT)
    end = time.monotonic() + 60 * minutes
    interrupted = False
    missing = missing_packages()
    for package, what in missing.items():
        screen.print(f"{package} is not installed: {what} will fail without it", highlight=False)
    with tempfile.TemporaryDirectory() as name_of_scratch:
        scratch = Path(name_of_scratch)
        planned = steps(device, folder, scratch, data, built)
        every = [step for group in planned for step in group]
        if resumed is not None:
            # The machine and sources it began with: each step's own machine is in its records.
            content = json.loads((folder / REPORT).read_text())
            keep_what_is_done(every, content["steps"])
        content["missing_packages"] = list(missing)
        for step in every:
            if step.name in without and step.outcome == NOT_RUN:
                step.outcome = LEFT_OUT
        try:
            for group in planned:
                screen.print(", ".join(step.name for step in group), "...")
                for step in run_together(group, folder, end):
                    screen.print(
                        f"{step.name}: {step.outcome} ({step.seconds:.0f} s)", highlight=False
                    )
                write_report(folder, content, every)  # lest this process be killed
        except KeyboardInterrupt:
            screen.print("interrupted: here is what was measured")
            interrupted = True
        for metrics in scratch.rglob("metrics.jsonl"):
            shutil.copy(metrics, folder)
    write_report(folder, content, every)
    make_anonymous(folder, scratch, data)
    table = Table("step", "outcome", "seconds")
    for step in every:
        table.add_row(step.name, step.outcome, f"{step.seconds:.0f}")
    Console().print(table)
    if content[CHANGED]:
        Console().print(f"changed while this was measured: {', '.join(content[CHANGED])}")
    return folder, INTERRUPTED if interrupted else int(any(step.failed for step in every))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device())
    parser.add_argument("--minutes", type=minutes, help="time for everything (GPU: 8, CPU: 45)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the folder goes")
    parser.add_argument(
        "--data-dir", type=Path, help="MNIST's files, for the training run (default: digits)"
    )
    parser.add_argument(
        "--built", action="store_true", help="the extension is built already, from these sources"
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FOLDER",
        help="run the steps that this report lacks",
    )
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        metavar="STEP",
        help="leave these out; --resume may run them later",
    )
    options = parser.parse_args(arguments)
    reason = reason_against_device(options.device)
    if reason is None and options.resume is not None:
        reason = reason_against_resuming(options.resume, options.device)
    if reason is not None:
        print(f"bench.report: {reason}", file=sys.stderr)
        return 2
    if "rich" in missing_packages():
        parser.error("the package rich is not installed; requirements.txt lists what is needed")
    if options.without:
        planned = steps(options.device, Path(), Path(), None)
        names = {step.name for group in planned for step in group}
        if unknown := sorted(set(options.without) - names):
            known = ", ".join(sorted(names))
            parser.error(f"--without: there is no step {', '.join(unknown)}, only {known}")
    data = options.data_dir
    if data is not None and not data.is_dir():
        parser.error(f"--data-dir {data}: there is no such folder")
    if options.device == "cuda":
        os.environ.update(surroundings())
    in_all = options.minutes or TOTAL_MINUTES[options.device]
    results = options.results.resolve()
    data, resumed = (path and path.resolve() for path in (data, options.resume))
    folder, code = make_report(
        options.device, in_all, results, data, options.built, resumed, options.without
    )
    print(folder)
    return code


def as_command() -> int:
    """``main`` of a process of its own, which signals can stop, and its steps with it.

    SIGINT also where a shell started it in the background, with the signal ignored; what ends a
    process otherwise is SIGTERM.
    """
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.default_int_handler)
    return main()


if __name__ == "__main__":
    run_command(as_command)

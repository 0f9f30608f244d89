"""What each subcommand of ``python -m bench`` measures, on stand-ins for what takes long."""

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench import goals, memory, plots, precompile, scaling, training
from bench.__main__ import main, parse
from bench.records import load, select
from bench.routing import PASSES, Settings
from bench.shapes import MNIST, SHAPES, Shape
from bench.tables import training_table

ROOT = Path(__file__).parent.parent
CEILINGS = {"gemm": 1e11, "copy": 1e10}
SECONDS = {"ours": 1e-9, "eager": 1.0, "compiled": 1.0}


def routing_records(shape, B, implementations, settings, passes=PASSES):
    """Every implementation at once: ours in no time, a peer in a second."""
    for direction in passes:
        for implementation in implementations:
            yield {
                "table": "routing", "case": shape.name, "B": B, "pass": direction,
                "precision": settings.precision, "dtype": "float32",
                "implementation": implementation.name, "family": implementation.family,
                "operations": 1e9, "bytes": 1e7, "product_rate": 1e11, "status": "ok",
                "seconds": SECONDS[implementation.family], "spread": 0.0, "samples": 1,
                "timed_by": "clock",
            }  # fmt: skip


def memory_records(shape, B, implementations, settings):
    for implementation in implementations:
        yield {
            "table": "memory", "case": shape.name, "B": B, "status": "ok", "saved_bytes": 10,
            "precision": "ieee",
            "implementation": implementation.name, "family": implementation.family,
            "extra_bytes": 1000 * SECONDS[implementation.family] + 1, "prediction_bytes": 1e6,
        }  # fmt: skip


def training_records(B, settings, names=(), parts_of=()):
    for name, seconds in (("fused", 1e-3), ("oracle", 1.0), ("popular", 1.0)):
        yield {
            "table": "training", "part": "whole step", "B": B, "implementation": name,
            "status": "ok", "seconds": seconds, "spread": 0.0, "extra_bytes": 1000 * seconds,
        }  # fmt: skip


@pytest.fixture
def stand_ins(monkeypatch):
    for module in (goals, scaling):
        monkeypatch.setattr(module, "measure_routing", routing_records)
    monkeypatch.setattr(memory, "measure_memory", memory_records)
    monkeypatch.setattr(goals.training, "measure_steps", training_records)
    monkeypatch.setattr("bench.machine.ceilings", lambda device: CEILINGS)


@pytest.mark.parametrize("device", goals.GOALS)
def test_every_goal_is_judged_by_what_is_measured(device, stand_ins):
    """With ours in no time all are met; without a measurement none is."""
    options = argparse.Namespace(only=None, quick=False, earlier=None)
    records = list(goals.measure(options, Settings(device), CEILINGS))
    verdicts = goals.conclude(records, device)
    assert {verdict["verdict"] for verdict in verdicts} == {"yes"}
    nothing = goals.conclude([], device)
    assert {verdict["verdict"] for verdict in nothing} == {"not measured"}


def test_goals_are_judged_with_an_earlier_run(stand_ins, tmp_path, capsys):
    """What it measured is kept, and only once."""
    file = tmp_path / "goals.json"
    here = ["goals", "--device", "cpu", "--json", str(file)]
    parts = ("memory", "batches", "shapes", "training")
    for number, part in enumerate(parts):
        assert main([*here, "--only", part, *(["--with", str(file)] if number else [])]) == 0
        _, _, records = load(file)
        assert [r["table"] for r in records].count("goals") == len(goals.GOALS["cpu"])
    assert {verdict["verdict"] for verdict in select(records, table="goals")} == {"yes"}
    file.write_text("{")
    with pytest.raises(SystemExit):
        main([*here, "--with", str(file)])
    assert "is not a report of python -m bench" in capsys.readouterr().err


def test_ours_beside_autotuned_peers_is_compared_with_these_alone(stand_ins):
    options = argparse.Namespace(only=[goals.AUTOTUNED], quick=False, earlier=None)
    records = list(goals.measure(options, Settings("cuda"), CEILINGS))
    verdicts = {r["what"]: r["verdict"] for r in goals.conclude(records, "cuda")}
    assert {what for what, verdict in verdicts.items() if verdict == "yes"} == {
        what for what in verdicts if "max-autotune" in what
    }


def test_the_memory_of_every_batch_and_multiple_of_I(stand_ins, tmp_path, capsys):
    file = tmp_path / "memory.json"
    arguments = ["memory", "--device", "cpu", "--json", str(file), "--plots", str(tmp_path)]
    assert main(arguments) == 0
    _, _, records = load(file)
    measured = select(records, table="memory")
    assert {r["B"] for r in measured} == {*memory.BATCHES, 32}
    assert {r["family"] for r in measured} == {"ours", "eager", "compiled"}
    (growth,) = select(records, table="exponents")
    assert (growth["axis"], growth["exponent"], growth["verdict"]) == ("I", 0, "yes")
    assert (tmp_path / "memory.svg").exists()
    assert "many classes" in capsys.readouterr().out


def test_scaling_measures_a_decade_of_every_size(stand_ins, tmp_path, capsys):
    file = tmp_path / "scaling.json"
    assert main(["scaling", "--device", "cpu", "--json", str(file), "--peers", "eager"]) == 0
    _, _, records = load(file)
    found = select(records, table="exponents", implementation="ours (cpu)", **{"pass": "forward"})
    ends = {r["axis"]: (r["from"], r["to"]) for r in found}
    assert all(to == 10 * first for axis, (first, to) in ends.items() if axis != "threads")
    assert {"B", "I", "J", "R"} <= ends.keys()
    assert {r["family"] for r in select(records, table="scaling")} == {"ours", "eager"}


def test_a_training_step_and_its_parts(tmp_path, monkeypatch, capsys):
    """Really measured, on two images; memory in this process: others take long to start."""
    monkeypatch.setattr("bench.machine.ceilings", lambda device: CEILINGS)
    monkeypatch.setattr(training, "measured_in", lambda _device: memory.call_here)
    file = tmp_path / "training.json"
    arguments = ["training", "--device", "cpu", "--batch-size", "2", "--rounds", "1", "--markdown"]
    arguments.append("--no-compiled")
    assert main([*arguments, "--json", str(file)]) == 0
    _, _, records = load(file)
    assert {r["status"] for r in records} == {"ok"}
    assert {r["implementation"] for r in records} == {"fused", "oracle", "popular"}
    assert {r["part"] for r in records} == {"whole step", "convolutions", "routing layer"}
    assert all(r["extra_bytes"] > 0 for r in select(records, part="whole step"))
    assert "| fused | whole step | 2 |" in capsys.readouterr().out


def test_parts_are_measured_in_the_rounds_of_their_step(monkeypatch):
    calls = []
    parts = ["whole", "convolutions", "routing"]
    for part in parts:
        monkeypatch.setattr(training.Step, part, lambda _, part=part: calls.append(part))
    monkeypatch.setattr(training, "measured_in", lambda _device: lambda *_: 0)
    names, rounds = (training.FUSED,), 2
    settings = Settings("cpu", rounds=rounds, slice_seconds=0)
    records = list(training.measure_steps(2, settings, names, parts_of=names))
    assert {record["samples"] for record in records} == {training.MORE_ROUNDS * rounds}
    assert calls == parts * (2 + training.MORE_ROUNDS * rounds), "twice before the rounds"


def test_a_step_whose_memory_is_not_measured_keeps_its_time(monkeypatch):
    def fails(*_arguments):
        raise MemoryError("no room")

    monkeypatch.setattr(training, "measured_in", lambda _device: fails)
    settings = Settings("cpu", rounds=1)
    names = (training.FUSED, training.ORACLE)
    records = list(training.measure_steps(2, settings, names, parts_of=()))
    assert {record["status"] for record in records} == {"ok"}
    text = str(training_table(records, CEILINGS))
    assert "MemoryError: no room" in text
    with pytest.raises(goals.NotMeasuredError, match="no room"):
        goals.lowest("extra_bytes", {"implementation": training.ORACLE})(records)


def test_a_model_that_fails_has_its_row_and_the_rest_goes_on(monkeypatch):
    step, fits = training.Step.whole, training.reason_it_does_not_fit

    def whole(self):
        if isinstance(self.model, training.PopularCapsNet):
            raise RuntimeError("out of memory")
        step(self)

    def reason(needed, device):
        return fits(needed, device) if needed == 0 else "it needs more than there is"

    settings = Settings("cpu", rounds=1)
    monkeypatch.setattr(training.Step, "whole", whole)
    records = list(training.measure_steps(2, settings, (training.POPULAR, training.FUSED), ()))
    monkeypatch.setattr(training, "reason_it_does_not_fit", reason)
    records += training.measure_steps(2, settings, (training.COMPILED,), ())
    found = {record["implementation"]: record["status"] for record in records}
    assert found.pop("fused") == "ok"
    assert "out of memory" in found.pop("popular")
    assert found == {"compiled oracle": "it needs more than there is"}


def test_plots_are_the_same_for_the_same_records(tmp_path):
    fused, peer = (argparse.Namespace(name=n, family=n) for n in ("ours", "eager"))
    shape = Shape("MNIST", 1152, 10)
    records = [
        record
        for B in (1, 16)
        for precision in ("ieee", "tf32")
        for record in routing_records(shape, B, [fused, peer], Settings(precision=precision))
    ]
    records += [r for B in (1, 16) for r in memory_records(shape, B, [fused, peer], None)]
    first = plots.draw(records, CEILINGS, tmp_path / "a")
    second = plots.draw(records, CEILINGS, tmp_path / "b")
    assert [path.stem for path in first] == ["roofline", "time", "memory"]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert plots.draw([], CEILINGS, tmp_path / "c") == []
    assert not (tmp_path / "c").exists()


def test_what_is_compiled_ahead_is_what_is_measured():
    points = list(precompile.points())
    calls = [call for _, *call in points]
    ieee, tf32 = (Settings("cuda", precision=precision) for precision in ("ieee", "tf32"))
    for call in ((MNIST, 128, tf32), (MNIST, 1024, ieee), scaling.point("R", 30, ieee)):
        assert list(call) in calls
    assert {shape for shape, *_ in calls} > set(SHAPES)
    assert ("compiled contracted", MNIST, 128, tf32) in points
    on_cpu = Settings("cpu")
    done = precompile.compile_point(("eager einsum", replace(MNIST, I=3), 1, on_cpu))
    assert done == "eager einsum MNIST I=3 J=10 B=1 R=3 torch.float32, ieee: done"
    refused = precompile.compile_point(("ours (cpu)", MNIST, -1, on_cpu))
    assert refused.startswith("ours (cpu) MNIST I=1152 J=10 B=-1 R=3 torch.float32: Trying to cre")


def test_the_benchmarks_for_comparison_between_commits_run():
    """``pytest bench``, each once and untimed."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider",
         "--benchmark-disable"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_device_that_is_not_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        parse(["routing", "--device", "cuda"])
    assert "--device cuda: torch sees no GPU here" in capsys.readouterr().err

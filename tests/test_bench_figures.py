"""scripts/fill_figures.py: tables in documents come from committed reports, or CI says so."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from bench.records import save
from bench.sources import CHANGED, KERNELS, NETWORK, RECIPE, differences, digests

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("fill_figures", ROOT / "scripts/fill_figures.py")
assert spec is not None
assert spec.loader is not None
fill_figures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fill_figures)

MACHINE = {
    "device": "cpu",
    "name": "A processor",
    "threads": 2,
    "instructions": "AVX2",
    "python": "3.11",
    "torch": "2.13",
    "cuda": None,
    "triton": None,
    "commit": "abc",
}
DOCUMENT = "Before.\n\n<!-- figures:cpu goals -->\n<!-- /figures -->\n\nAfter.\n"


def add_report(root: Path, date: str, measured: str) -> Path:
    folder = root / "bench" / "results" / "a-processor" / date
    folder.mkdir(parents=True)
    machine = MACHINE | {"date": f"{date} 10:00"}
    goal = {"table": "goals", "what": "speed", "goal": ">= 1x", "measured": measured}
    save(folder / "goals.json", machine, {"gemm": 1e11, "copy": 1e10}, [goal | {"verdict": "yes"}])
    content = {"machine": machine, **digests(["cpu"], root), "steps": []}
    (folder / "report.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def checkout(tmp_path):
    """A checkout with one kernel, two reports and a document."""
    kernels = tmp_path / "csrc" / "cpu"
    kernels.mkdir(parents=True)
    (kernels / "kernels.cpp").write_text("int kernel;\n")
    add_report(tmp_path, "2026-01-01", "2x")
    add_report(tmp_path, "2026-02-01", "3x")
    (tmp_path / "README.md").write_text(DOCUMENT)
    return tmp_path


def run(root: Path, *options: str) -> int:
    return fill_figures.main(["--root", str(root), *options])


def test_fill_takes_the_newest_report_and_can_be_repeated(checkout):
    assert run(checkout, "--check") == 1, "an empty block differs from its report"
    assert run(checkout) == 0
    text = (checkout / "README.md").read_text()
    assert "| speed | >= 1x | 3x | yes |" in text
    assert "A processor, 2 threads" in text
    assert text.startswith("Before.")
    assert text.endswith("After.\n")
    assert run(checkout) == 0
    assert (checkout / "README.md").read_text() == text
    assert run(checkout, "--check") == 0


def test_an_edited_figure_fails(checkout, capsys):
    run(checkout)
    path = checkout / "README.md"
    path.write_text(path.read_text().replace("3x", "9x"))
    assert run(checkout, "--check") == 1
    assert "README.md: differs from its reports" in capsys.readouterr().err


def test_a_figure_outside_of_a_block_fails(checkout, capsys):
    run(checkout)
    path = checkout / "README.md"
    path.write_text(path.read_text() + "It takes 12 ms.\nIts goal is 10 ms.\n")
    assert run(checkout, "--check") == 1
    assert capsys.readouterr().err == "README.md: a figure without a report: It takes 12 ms.\n"


@pytest.mark.parametrize(
    ("line", "loose"),
    [
        ("It has 500 times the speed.", True),
        ("That is a speed-up of 4.5x.", True),
        ("A 12-fold rate, at 80 GFLOPS.", True),
        ("It is over in 3 seconds, or 1.5 s.", True),
        ("What took 12 ms is near its floor, however one counts.", True),
        ("It takes 12 ms. Goals are far.", True),
        ("At B = 16 the goal of 4.0 times eager's speed is met.", False),
        ("9 us were predicted, for windows of 5 x 5 and a run of 3 min 20 s.", False),
        ("## Goals\n\n40 and 120 us.", False),
    ],
)
def test_what_counts_as_a_figure(checkout, line, loose):
    """The words that exempt one stand beside it, not anywhere in its line."""
    run(checkout)
    path = checkout / "README.md"
    path.write_text(f"{path.read_text()}{line}\n")
    assert run(checkout, "--check") == loose


def test_changed_kernels_earn_a_warning_line_but_no_failure(checkout, capsys):
    run(checkout)
    fresh = (checkout / "README.md").read_text()
    assert fill_figures.WARNING not in fresh
    (checkout / "csrc/cpu/kernels.cpp").write_text("int faster_kernel;\n")
    assert run(checkout, "--check") == 0
    assert "README.md: a warning about stale figures is missing" in capsys.readouterr().err
    run(checkout)
    warned = (checkout / "README.md").read_text()
    assert f"{fill_figures.WARNING} the kernels of cpu have changed" in warned
    assert run(checkout, "--check") == 0
    assert capsys.readouterr().err == ""
    (checkout / "csrc/cpu/kernels.cpp").write_text("int kernel;\n")
    run(checkout)
    assert (checkout / "README.md").read_text() == fresh


def test_changed_networks_earn_a_warning_line_where_steps_were_timed(checkout):
    table = "<!-- figures:cpu accuracy -->\n<!-- /figures -->\n"
    (checkout / "README.md").write_text(DOCUMENT + table)
    (checkout / "model").mkdir()
    (checkout / "model/capsnet.py").write_text("layers = 3\n")
    run(checkout)
    goals, accuracy = (checkout / "README.md").read_text().split("After.")
    warning = f"{fill_figures.WARNING} the networks of the training steps have changed"
    assert warning in goals
    assert warning not in accuracy
    assert fill_figures.NOT_IN_REPORT in accuracy


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("setup.py", "the kernels of cpu"),
        ("capsule_kernels/autograd.py", "the kernels of cpu"),
        ("bench/timing.py", "the benchmarks"),
    ],
)
def test_whatever_decides_a_time_outdates_a_report(checkout, file, what):
    path = checkout / file
    path.parent.mkdir(exist_ok=True)
    path.write_text("another = 1\n")
    run(checkout)
    warning = f"{fill_figures.WARNING} {what} have changed since this was measured."
    assert warning in (checkout / "README.md").read_text()


def test_an_older_report_is_compared_by_the_recipe_it_was_made_with(checkout):
    older = digests(["cpu"], checkout, recipe=1)
    del older[RECIPE]
    assert older.keys() == {KERNELS, NETWORK}, "as in reports that name no recipe"
    (checkout / "setup.py").write_text("another = 1\n")
    assert differences(older, checkout) == []
    (checkout / "csrc/cpu/kernels.cpp").write_text("int faster_kernel;\n")
    assert differences(older, checkout) == ["cpu"]


def test_sources_that_changed_while_they_were_measured_earn_a_warning_line(checkout):
    file = checkout / "bench/results/a-processor/2026-02-01/report.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {CHANGED: ["cpu", NETWORK]}))
    run(checkout)
    what = "the kernels of cpu and the networks of the training steps"
    warning = f"{fill_figures.WARNING} {what} changed while this was measured."
    assert warning in (checkout / "README.md").read_text()
    assert run(checkout, "--check") == 0


def test_what_the_newest_report_lacks_comes_from_the_one_before(checkout):
    (checkout / "bench/results/a-processor/2026-02-01/goals.json").unlink()
    run(checkout)
    text = (checkout / "README.md").read_text()
    assert "2x" in text
    assert "a-processor/2026-01-01/" in text


def test_tuned_peers_are_those_of_a_report_that_has_them():
    """Beside ours, of the same batch and precision."""
    fields = {"table": "routing", "B": 128, "precision": "tf32"}
    records = [
        fields | {"implementation": name, "family": name.partition(" ")[0]}
        for name in ("ours (cuda)", "eager einsum", "compiled einsum")
    ]
    view = fill_figures.VIEWS["autotuned"]
    assert view.chosen(records) == []
    tuned = records[-1] | {"implementation": "compiled einsum (max-autotune)"}
    others = [tuned | {"B": 16}, tuned | {"precision": "ieee"}]
    assert view.chosen([*records, tuned, *others]) == [records[0], tuned]


def test_a_section_with_figures_links_what_was_measured(checkout, capsys):
    """In documents without blocks."""
    run(checkout)
    document = checkout / "docs" / "kernels.md"
    document.parent.mkdir()
    measured = "# Kernels\n\n## Sweeps\n\nA sweep took 3.7 ms.\n"
    document.write_text(measured)
    assert run(checkout, "--check") == 1
    assert "kernels.md: figures without a report in the section '## Sweeps'" in (
        capsys.readouterr().err
    )
    for link in ("nowhere", "../README.md"):
        document.write_text(f"{measured}\n[there]({link})\n")
        assert run(checkout, "--check") == 1
    document.write_text(
        f"{measured}\n[there](../bench/results/a-processor/2026-01-01/goals.json)\n"
    )
    assert run(checkout, "--check") == 0
    document.write_text(measured.replace("Sweeps", "Predictions"))
    assert run(checkout, "--check") == 0


def test_without_a_report_a_block_holds_no_figure(checkout):
    run(checkout)
    path = checkout / "README.md"
    shutil.rmtree(checkout / "bench")
    assert run(checkout, "--check") == 1, "figures whose report is gone"
    run(checkout)
    assert "3x" not in path.read_text()
    assert fill_figures.NO_REPORT in path.read_text()
    assert run(checkout, "--check") == 0


def test_an_unknown_view_is_named(checkout):
    (checkout / "README.md").write_text("<!-- figures:cpu gaols -->\n<!-- /figures -->\n")
    with pytest.raises(ValueError, match=r"README\.md: there is no view 'gaols', only goals"):
        run(checkout)


def test_the_documents_of_this_checkout_agree_with_its_reports(capsys):
    assert run(ROOT, "--check") == 0, capsys.readouterr().err


def test_the_layout_of_kernels_does_not_outdate_a_report(checkout, capsys):
    run(checkout)
    (checkout / "csrc/cpu/kernels.cpp").write_text("int\n    kernel;\n")
    assert run(checkout, "--check") == 0
    assert capsys.readouterr().err == ""

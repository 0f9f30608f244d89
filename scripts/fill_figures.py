"""Fills the tables in README.md and docs/ from the newest committed benchmark reports.

A document asks for a table by a pair of comments, and this script writes what stands between:

    <!-- figures:cpu goals -->
    <!-- /figures -->

"goals" is the view (see VIEWS), and "cpu" or "cuda" chooses the newest report of such a device
below bench/results that has it: a report that had too little time does not hide what an earlier one
measured. A report that is older than what it measured, the backend's kernels, the networks whose
training steps were timed, or the benchmarks themselves, earns the document a warning line; so does
one in whose course they changed. An older report knows of fewer files (bench/sources.py).

With --check nothing is written: it fails where a document differs from its reports, or holds a
figure with a unit of speed (ms, x, times, GFLOP/s) outside such a block; in a document without
blocks, where a section with such a figure links nothing that is committed below bench/results or
docs/results. A goal, a floor or a prediction is no such figure where its heading or a word beside
it says so. What this can't see: figures in words ("eight times"), in % or bytes, and whether a
linked report has the figure. A missing or outdated warning line is told, but is no failure.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import machine, tables  # noqa: E402
from bench.records import Record, load, select  # noqa: E402
from bench.sources import CHANGED, MEASUREMENT, NETWORK, differences  # noqa: E402

BLOCK = re.compile(
    r"(?P<start><!-- figures:(?P<device>\w+) (?P<view>[\w-]+) -->\n)"
    r"(?P<body>.*?)"
    r"(?P<end><!-- /figures -->)",
    re.DOTALL,
)
WARNING = "> **Older than the code:**"
NO_REPORT = "*No report of such a device is committed yet.*"
NOT_IN_REPORT = "*No committed report of such a device has this.*"
UNIT = r"(?:[mµu]?s|(?:milli|micro)?seconds?|[GT]FLOP(?:/s|S)?|GB/s|images/s)\b|x\b(?! \d)|times\b"
FIGURE = re.compile(rf"(?<!min )(?<![\w.])\d[\d.,]*(?:\s?(?:{UNIT})|-?fold\b)")
"""Not the "3 min 20 s" of a run, nor the sizes 5 x 5."""
UNMEASURED = re.compile(r"goal|floor|predict", re.IGNORECASE)
"""Below a heading with one of these words a figure may be one that no report has."""
TARGET, WORDS = r"\b(?:goals?|floors?|predicted)\b", r"(?:[\s,]+[^\s.,;:]+){0,2}?[\s,]+"
TARGET_BEFORE = re.compile(rf"{TARGET}{WORDS}$", re.IGNORECASE)
TARGET_AFTER = re.compile(rf"{WORDS}{TARGET}", re.IGNORECASE)
"""A figure may be one, too, with such a word beside it: up to two others lie between."""
NEAR = 60
"""Characters within which these stand."""
SECTION = re.compile(r"^(?=#+ )", re.MULTILINE)
LINK = re.compile(r"\]\((?P<target>[^)#\s]+)")


@dataclass(frozen=True)
class View:
    """A table of a report: the file of records, how to draw them, and which."""

    file: str
    table: Callable[[list[Record], Record], tables.Table]
    kind: str
    where: dict[str, object] = field(default_factory=dict)
    batches: tuple[int, ...] = ()  # only these, if any are named
    peers: str = ""  # ours beside peers with this in their names, where there are such

    def chosen(self, records: list[Record]) -> list[Record]:
        found = select(records, table=self.kind, **self.where)
        if self.peers:
            peers = [record for record in found if self.peers in record["implementation"]]
            found = peers and [*select(found, family="ours"), *peers]
        return [record for record in found if not self.batches or record["B"] in self.batches]


VIEWS = {
    "goals": View("goals", tables.goals_table, "goals"),
    "routing": View("goals", tables.summary_table, "routing"),
    "mnist": View(
        "goals", tables.summary_table, "routing", {"case": "MNIST"}, batches=(1, 16, 128)
    ),
    "peers": View("goals", tables.routing_table, "routing", {"case": "MNIST", "B": 128}),
    "autotuned": View(
        "goals",
        tables.summary_table,
        "routing",
        {"precision": "tf32"},
        batches=(128,),
        peers="max-autotune",
    ),
    "batches": View("routing", tables.summary_table, "routing", {"case": "MNIST"}),
    "shared": View("routing-shared", tables.summary_table, "routing"),
    "windows": View("routing-windows", tables.summary_table, "routing"),
    "shapes": View("goals", tables.summary_table, "routing", batches=(32,)),
    "shapes-tf32": View("routing-tf32", tables.summary_table, "routing", batches=(128,)),
    "batches-bfloat16": View("routing-bfloat16", tables.summary_table, "routing"),
    "mnist-memory": View("goals", tables.memory_table, "memory", {"case": "MNIST"}),
    "memory": View("memory", tables.memory_table, "memory", batches=(4, 32, 128)),
    "memory-windows": View(
        "memory", tables.memory_table, "memory", {"case": "3x3 windows, stride 2"}
    ),
    "memory-growth": View("memory", tables.exponents_table, "exponents"),
    "training": View("training", tables.training_table, "training"),
    "training-step": View("goals", tables.training_table, "training"),
    "scaling": View("scaling", tables.exponents_table, "exponents"),
    "accuracy": View("accuracy", tables.accuracy_table, "accuracy"),
}
PLOTS = {"plot-roofline": "roofline", "plot-time": "time", "plot-memory": "memory"}


@dataclass(frozen=True)
class Report:
    """A folder of bench/results and what its report.json says."""

    folder: Path
    content: Record

    @property
    def date(self) -> str:
        return self.content["machine"]["date"]

    def outdated(self, kind: str, root: Path) -> list[str]:
        """What is no longer as it was for records of a kind, or was not all the while."""
        since = described(differences(self.content, root), kind)
        during = described(self.content.get(CHANGED, []), kind)
        found = [f"{since} have changed since this was measured"] if since else []
        return found + ([f"{during} changed while this was measured"] if during else [])


def described(changed: list[str], kind: str) -> str:
    """The sources that records of a kind depend on in words; nothing where none is among these."""
    backends = [name for name in changed if name not in (NETWORK, MEASUREMENT)]
    found = [f"the kernels of {' and '.join(backends)}"] if backends else []
    if NETWORK in changed and kind in ("goals", "training"):
        found.append("the networks of the training steps")
    if MEASUREMENT in changed:
        found.append("the benchmarks")
    return " and ".join(found)


def reports_of_devices(root: Path) -> dict[str, list[Report]]:
    """The reports of each kind of device, the newest first."""
    reports = (
        Report(path.parent, json.loads(path.read_text()))
        for path in (root / "bench" / "results").glob("*/*/report.json")
    )
    found: dict[str, list[Report]] = {}
    ordered = sorted(reports, key=lambda report: (report.date, report.folder.name), reverse=True)
    for report in ordered:
        found.setdefault(report.content["machine"]["device"], []).append(report)
    return found


def drawn(report: Report, view: str, document: Path, root: Path) -> str | None:
    """The plot or table of a view, or None where the report does not have it."""
    link = Path(os.path.relpath(report.folder, document.parent)).as_posix()
    if view in PLOTS:
        plot = report.folder / f"{PLOTS[view]}.svg"
        return f"![{PLOTS[view]}]({link}/{plot.name})" if plot.exists() else None
    wanted = VIEWS[view]
    path = report.folder / f"{wanted.file}.json"
    if not path.exists():
        return None
    machine_line, ceilings, records = load(path)
    chosen = wanted.chosen(records)
    if not chosen:
        return None
    lines = [
        wanted.table(chosen, ceilings).markdown(),
        f"*{machine.line(machine_line)} ([report]({link}/)).*",
    ]
    if wanted.kind == "goals":
        lines[-1] += f" *Measured limits: {machine.ceilings_line(ceilings)}.*"
    if outdated := report.outdated(wanted.kind, root):
        lines.append(f"{WARNING} {'; '.join(outdated)}.")
    return "\n\n".join(lines)


def body(reports: list[Report], view: str, document: Path, root: Path) -> str:
    """What stands between the comments of a block; ``ValueError`` where there is no such view."""
    if view not in VIEWS | PLOTS:
        known = ", ".join([*VIEWS, *PLOTS])
        raise ValueError(f"{document.name}: there is no view {view!r}, only {known}")
    found = filter(None, (drawn(report, view, document, root) for report in reports))
    return f"\n{next(found, NOT_IN_REPORT if reports else NO_REPORT)}\n\n"


def fill(text: str, document: Path, root: Path) -> str:
    """The document's text with every block filled anew."""
    reports = reports_of_devices(root)

    def replacement(block: re.Match[str]) -> str:
        found = body(reports.get(block["device"], []), block["view"], document, root)
        return block["start"] + found + block["end"]

    return BLOCK.sub(replacement, text)


def without_warnings(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.startswith(WARNING)).replace(
        "\n\n\n", "\n\n"
    )


def loose_figures(section: str) -> list[str]:
    """Lines of a section, outside of blocks, that state a measured speed."""
    if UNMEASURED.search(section.partition("\n")[0]):
        return []
    found = {}
    for figure in FIGURE.finditer(section):
        start, end = figure.span()
        before, after = section[max(0, start - NEAR) : start], section[end : end + NEAR]
        if not TARGET_BEFORE.search(before) and not TARGET_AFTER.match(after):
            line = section[section.rfind("\n", 0, start) + 1 :].partition("\n")[0]
            found[line.strip()] = None
    return list(found)


def sections_without_evidence(document: Path, root: Path) -> Iterator[str]:
    """Headings of sections that state a measured speed and link nothing that was measured."""
    evidence = (root / "bench" / "results", root / "docs" / "results")
    for section in SECTION.split(document.read_text()):
        heading = section.partition("\n")[0]
        if not loose_figures(section):
            continue
        targets = [(document.parent / link["target"]).resolve() for link in LINK.finditer(section)]
        if not any(
            target.exists() and target.is_relative_to(folder)
            for target in targets
            for folder in evidence
        ):
            yield heading


def check(document: Path, root: Path) -> tuple[list[str], list[str]]:
    """Failures and notices of a document."""
    text = document.read_text()
    filled = fill(text, document, root)
    failures, notices = [], []
    if without_warnings(text) != without_warnings(filled):
        failures.append("differs from its reports; run scripts/fill_figures.py")
    elif text != filled:
        notices.append("a warning about stale figures is missing or outdated")
    if BLOCK.search(text):
        for section in SECTION.split(BLOCK.sub("", text)):
            failures += [f"a figure without a report: {line}" for line in loose_figures(section)]
    else:
        for heading in sections_without_evidence(document, root):
            failures.append(f"figures without a report in the section {heading!r}")
    return failures, notices


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a difference")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout (default: this one)")
    options = parser.parse_args(arguments)
    root = options.root.resolve()
    failed = False
    for document in filter(Path.exists, [root / "README.md", *sorted(root.glob("docs/*.md"))]):
        if not options.check:
            document.write_text(fill(document.read_text(), document, root))
            continue
        failures, notices = check(document, root)
        for line in [*failures, *notices]:
            print(f"{document.name}: {line}", file=sys.stderr)
        failed |= bool(failures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

"""``python -m bench``: the table of goals; with a subcommand, one kind of measurement.

Whatever was measured is printed, and written where asked, even after Ctrl-C.
"""

import argparse
import importlib
import signal
import sys
import time

from rich.console import Console

from model.errors import run_command

from . import machine
from .options import INTERRUPTED, add_plots, common_arguments, reason_against_options
from .records import WRONG_RESULT, Record, save
from .routing import SLICE_SECONDS, Settings
from .tables import describe_record, tables

COMMANDS = {
    "goals": "every goal with what was measured for it (the default)",
    "routing": "time of the routing layer: all shapes, B from 1 to 2048",
    "training": "a training step of the CapsNet and its parts",
    "memory": "peak memory of forward+backward, and what is saved for the backward",
    "scaling": "time against B, I, J, R and threads, with fitted exponents",
    "accuracy": "error against float64, each backend and dtype",
    "aot": "resources of the GPU kernels, compiled ahead of time without a GPU",
}
"""Subcommands, each the module of its name: ``add_arguments(parser)`` and
``measure(options, settings, ceilings)``, a generator of records; where more follows from them,
``conclude(records, device)``; where options of its own can be wrong together,
``reason_against(options)``. aot has ``run(options)`` instead."""
PLOTTED = ("goals", "routing", "memory")
"""Those whose records are drawn."""

DESCRIPTION = (
    "Measure fused routing against its peers. Without a command: the table of goals. Whatever was "
    "measured is printed, and written where asked, even after Ctrl-C."
)
QUICK_ROUNDS = 3
WIDTH = 130
"""Columns of the tables where the output is no terminal."""


def parse(arguments: list[str]) -> argparse.Namespace:
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["goals", *arguments]
    parser = argparse.ArgumentParser(prog="python -m bench", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    common = common_arguments()
    for name, text in COMMANDS.items():
        subparser = commands.add_parser(
            name, help=text, description=text, parents=[] if name == "aot" else [common]
        )
        if name in PLOTTED:
            add_plots(subparser)
        if name == arguments[0]:
            importlib.import_module(f".{name}", __package__).add_arguments(subparser)
    options = parser.parse_args(arguments)
    if options.command != "aot":
        module = importlib.import_module(f".{options.command}", __package__)
        reason = reason_against_options(options)
        if reason is None and hasattr(module, "reason_against"):
            reason = module.reason_against(options)
        if reason is not None:
            parser.error(reason)
    return options


def settings_of(options: argparse.Namespace) -> Settings:
    """What was chosen, or is usual where the command has no choice."""
    return Settings(
        options.device,
        options.precision,
        R=options.iterations,
        rounds=min(options.rounds, QUICK_ROUNDS) if options.quick else options.rounds,
        slice_seconds=SLICE_SECONDS[options.device],
        threads=options.threads,
    )


def run(options: argparse.Namespace) -> int:
    """Measure, then print and write what was measured."""
    settings = settings_of(options)
    settings.apply()
    started = time.monotonic()
    screen = Console(stderr=True, soft_wrap=True)
    records: list[Record] = []
    status = 0
    machine_line = machine.describe(options.device)
    screen.print(machine.line(machine_line))
    ceilings = machine.ceilings(options.device)
    module = importlib.import_module(f".{options.command}", __package__)
    try:
        with screen.status("measuring"):
            for record in module.measure(options, settings, ceilings):
                records.append(record)
                seconds = time.monotonic() - started
                screen.print(f"{seconds:4.0f} s: {describe_record(record)}", highlight=False)
    except KeyboardInterrupt:
        screen.print("interrupted: here is what was measured")
        status = INTERRUPTED
    except Exception:  # of a GPU: nothing more can be measured in this process
        screen.print_exception()
        screen.print("failed: here is what was measured")
        status = 1
    if any(WRONG_RESULT in record.get("status", "") for record in records):
        screen.print("some results are wrong: the tables say which")
        status = status or 1
    if hasattr(module, "conclude"):
        records += module.conclude(records, options.device)
    if options.json:
        save(options.json, machine_line, ceilings, records)
    show(records, machine_line, ceilings, options.markdown)
    if options.plots:
        from .plots import draw

        draw(records, ceilings, options.plots)
    return status


def show(records: list[Record], machine_line: Record, ceilings: Record, markdown: bool) -> None:
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    lines = [machine.line(machine_line), machine.ceilings_line(ceilings)]
    if markdown:
        print("\n\n".join(lines))
        for table in tables(records, ceilings):
            print(f"\n**{table.title}**\n\n{table.markdown()}")
        return
    for line in lines:
        console.print(line, highlight=False)
    for table in tables(records, ceilings):
        console.print(table.rich())


def main(arguments: list[str] | None = None) -> int:
    # Also where a shell started this in the background, with the signal ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    options = parse(sys.argv[1:] if arguments is None else arguments)
    if options.command == "aot":
        return importlib.import_module(".aot", __package__).run(options)
    try:
        return run(options)
    except KeyboardInterrupt:
        print("interrupted before anything was measured", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    run_command(main)

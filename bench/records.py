"""Measurements as flat records, collected in a report that is JSON on disk."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from model.outputs import write_atomically

Record = dict[str, Any]
"""One measurement. ``table`` names its kind; ``status`` is "ok" or the reason why figures lack."""

WRONG_RESULT = "the oracle's by"
"""What every status of a wrong result has in it (peers.check_equal, training.check_popular)."""


class CannotRunError(RuntimeError):
    """Something can't run here; the message is the whole reason."""


def reason_of(error: BaseException) -> str:
    """An exception in one line, without the advice that PyTorch's compilers add."""
    if isinstance(error, CannotRunError):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return f"{type(error).__name__}: {text}"[:200] if text else type(error).__name__


def select(records: Iterable[Record], **fields: Any) -> list[Record]:
    """The records that have these values in these fields."""
    return [
        record
        for record in records
        if all(record.get(name) == value for name, value in fields.items())
    ]


def fastest(records: Iterable[Record], **fields: Any) -> Record | None:
    """The fastest of the records that have these values and a time."""
    timed = [record for record in select(records, **fields) if "seconds" in record]
    return min(timed, key=lambda record: record["seconds"], default=None)


def share_of_product(record: Record) -> float:
    """A rate of operations over that of the machine's own matrix product, measured beside it."""
    return record["operations"] / record["seconds"] / record["product_rate"]


def groups(records: Iterable[Record], *names: str) -> list[tuple[Record, list[Record]]]:
    """Records that agree in the named fields, in the order of their first appearance."""
    found: dict[tuple, list[Record]] = {}
    for record in records:
        found.setdefault(tuple(record.get(name) for name in names), []).append(record)
    return [(dict(zip(names, values, strict=True)), group) for values, group in found.items()]


def save(path: Path, machine: Record, ceilings: Record, records: list[Record]) -> None:
    """Write a report, of which a reader never meets half."""
    content = {"machine": machine, "ceilings": ceilings, "records": records}
    write_atomically(path, json.dumps(content, indent=1).encode() + b"\n")


def load(path: Path) -> tuple[Record, Record, list[Record]]:
    """Machine, ceilings and records of a report; ``ValueError`` names a file that is none."""
    try:
        content = json.loads(path.read_text())
        return content["machine"], content["ceilings"], content["records"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a report of python -m bench ({error})") from None

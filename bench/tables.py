"""Tables of measurements, for the terminal and for documents: pure functions of records."""

from collections.abc import Callable
from dataclasses import dataclass, field

from rich.markup import escape
from rich.table import Table as RichTable

from .records import Record, fastest, groups, select, share_of_product


@dataclass
class Table:
    """A title, headers, and rows of finished text."""

    title: str
    headers: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> str:
        """A mark for a cell; the text itself stands once, below the table."""
        if text not in self.notes:
            self.notes.append(text)
        return f"[{self.notes.index(text) + 1}]"

    def note_lines(self) -> list[str]:
        return [f"[{number}] {text}" for number, text in enumerate(self.notes, start=1)]

    def rich(self) -> RichTable:
        table = RichTable(
            title=self.title,
            title_justify="left",
            caption="\n".join(map(escape, self.note_lines())) or None,
            caption_justify="left",
        )
        for number, header in enumerate(self.headers):
            table.add_column(header, justify="right" if number else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*map(escape, row))
        return table

    def markdown(self) -> str:
        """The table without its title, its notes below."""
        rule = ["---"] + ["---:"] * (len(self.headers) - 1)
        lines = [f"| {' | '.join(row)} |" for row in (self.headers, rule, *self.rows)]
        return "\n".join(lines) + "".join(f"\n\n{line}" for line in self.note_lines())


def duration(seconds: float) -> str:
    """Three digits in the unit that fits."""
    scale, unit = next(
        (pair for pair in ((1, "s"), (1e3, "ms")) if seconds * pair[0] >= 1), (1e6, "µs")
    )
    value = seconds * scale
    return f"{value:.{max(0, 3 - len(str(int(value))))}f} {unit}"


def size(count: float) -> str:
    for scale, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= scale:
            return f"{count / scale:.{1 if count / scale < 100 else 0}f} {unit}"
    return f"{count:.0f} B"


def ratio(value: float) -> str:
    return f"{value:.{1 if value < 100 else 0}f}x"


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


WHERE = ("table", "case", "axis", "size", "B", "pass", "part", "dtype", "quantity", "what")
FIGURES: dict[str, Callable[[float], str]] = {
    "seconds": duration,
    "extra_bytes": size,
    "exponent": "{:.2f}".format,
    "error": "{:.1e}".format,
    "measured": str,
}


def describe_record(record: Record) -> str:
    """A record in a line, to watch a measurement go on."""
    fields = [*WHERE, "implementation"]
    where = " ".join(str(record[name]) for name in fields if name in record)
    if record.get("status", "ok") != "ok":
        return f"{where}: {record['status']}"
    figure = next((text(record[name]) for name, text in FIGURES.items() if name in record), "")
    return f"{where}: {figure}"


def floor_seconds(record: Record, ceilings: Record) -> float:
    """No implementation is faster: operations at the product's rate, bytes at the copy's rate."""
    return max(record["operations"] / record["product_rate"], record["bytes"] / ceilings["copy"])


def of_product(share: float, dtype: str, table: Table) -> str:
    """A share of what the matrix product allows, which is measured in float32 alone."""
    note = "" if dtype == "float32" else f" {table.note('by the product in float32')}"
    return percent(share) + note


def case(record: Record) -> str:
    """A shape's name, and what differs from float32 in its own precision."""
    usual = {"dtype": "float32", "precision": "ieee"}
    return ", ".join([record["case"], *(record[n] for n in usual if record[n] != usual[n])])


def summary_table(records: list[Record], _ceilings: Record) -> Table:
    """Each shape and pass in a line: the fastest eager peer, the fastest compiled one, ours.

    Where there are no peers of a kind, it has no columns.
    """
    records = select(records, table="routing")
    kinds = [kind for kind in ("eager", "compiled") if select(records, family=kind)]
    table = Table(
        "Routing layer, fastest of each kind",
        ["shape", "B", "pass", *kinds, "ours", *(f"vs {kind}" for kind in kinds), "of gemm"],
    )
    for key, group in groups(records, "case", "B", "pass", "dtype", "precision"):
        *others, ours = best = [fastest(group, family=family) for family in (*kinds, "ours")]
        cells = [duration(record["seconds"]) if record else "-" for record in best]
        for peer in others:
            cells.append(ratio(peer["seconds"] / ours["seconds"]) if peer and ours else "-")
        share = share_of_product(ours) if ours else None
        cells.append("-" if share is None else of_product(share, key["dtype"], table))
        table.rows.append([case(key), str(key["B"]), key["pass"], *cells])
    return table


def routing_table(records: list[Record], ceilings: Record) -> Table:
    """Every implementation in a line."""
    table = Table(
        "Routing layer, every implementation",
        ["implementation", "shape", "B", "pass", "median", "spread", "ours is", "of floor"],
    )
    for _, group in groups(records, "case", "B", "pass", "dtype", "precision"):
        ours = fastest(group, family="ours")
        for record in group:
            where = [record["implementation"], case(record), str(record["B"]), record["pass"]]
            if "seconds" not in record:
                table.rows.append([*where, table.note(record["status"]), "", "", ""])
                continue
            faster = ratio(record["seconds"] / ours["seconds"]) if ours else "-"
            share = floor_seconds(record, ceilings) / record["seconds"]
            floor = of_product(share, record["dtype"], table)
            spread = percent(record["spread"] / record["seconds"])
            table.rows.append([*where, duration(record["seconds"]), spread, faster, floor])
    return table


def memory_table(records: list[Record], _ceilings: Record) -> Table:
    table = Table(
        "Memory of forward+backward beyond inputs, outputs and gradients",
        ["implementation", "shape", "B", "extra", "saved for backward", "u_hat would be"],
    )
    for record in records:
        where = [record["implementation"], record["case"], str(record["B"])]
        cells = (
            [size(record["extra_bytes"]), size(record["saved_bytes"])]
            if "extra_bytes" in record
            else [table.note(record["status"]), ""]
        )
        table.rows.append([*where, *cells, size(record["prediction_bytes"])])
    return table


def training_table(records: list[Record], _ceilings: Record) -> Table:
    table = Table(
        "A training step of the CapsNet and its parts",
        ["model", "part", "B", "median", "spread", "images/s", "of the step", "extra memory"],
    )
    steps = {r["implementation"]: r for r in select(records, part="whole step") if "seconds" in r}
    for record in records:
        where = [record["implementation"], record["part"], str(record["B"])]
        if "seconds" not in record:
            table.rows.append([*where, table.note(record["status"]), "", "", "", ""])
            continue
        step = steps.get(record["implementation"])
        memory = ""
        if "extra_bytes" in record:
            memory = size(record["extra_bytes"])
        elif "memory_status" in record:
            memory = table.note(record["memory_status"])
        table.rows.append(
            [
                *where,
                duration(record["seconds"]),
                percent(record["spread"] / record["seconds"]),
                f"{record['B'] / record['seconds']:.0f}",
                percent(record["seconds"] / step["seconds"]) if step else "-",
                memory,
            ]
        )
    return table


def scaling_table(records: list[Record], _ceilings: Record) -> Table:
    """Times over one axis in a line."""
    table = Table("Time against size", ["implementation", "axis", "pass", "size: median"])
    for key, group in groups(records, "implementation", "axis", "pass"):
        cells = [
            f"{r['size']}: {duration(r['seconds']) if 'seconds' in r else table.note(r['status'])}"
            for r in group
        ]
        table.rows.append([*key.values(), ", ".join(cells)])
    return table


def exponents_table(records: list[Record], _ceilings: Record) -> Table:
    """Exponents; where a straight line was fitted too, what it says, and the rates at both ends."""
    table = Table(
        "Fitted exponents of growth",
        ["implementation", "over", "of", "exponent", "goal", "met"],
    )
    if lines := any("each" in record for record in records):
        table.headers += ["first", "each further", "off a line", "of gemm"]
    for record in records:
        goal = f"<= {record['most']}" if "most" in record else ""
        over = f"{record['axis']} from {record['from']} to {record['to']}"
        row = [record["implementation"], over, record["pass"], f"{record['exponent']:.2f}"]
        row += [goal, record.get("verdict", "")]
        if "each" in record:
            row += [duration(record["first"]) if "first" in record else ""]
            row += [duration(record["each"]), percent(record["off_line"])]
            row += [f"{percent(record['share_from'])} to {percent(record['share_to'])}"]
        elif lines:
            row += [""] * 4
        table.rows.append(row)
    return table


def accuracy_table(records: list[Record], _ceilings: Record) -> Table:
    """A backend and dtype in a line: each error, and how many times the oracle's own it is."""
    quantities = list(dict.fromkeys(record["quantity"] for record in records))
    table = Table(
        "Largest error against float64, relative to the largest value (over the oracle's own)",
        ["implementation", "dtype", *quantities],
    )
    for key, group in groups(records, "implementation", "dtype"):
        table.rows.append([*key.values(), *(error(record, table) for record in group)])
    return table


def error(record: Record, table: Table) -> str:
    if "error" not in record:
        return table.note(record["status"])
    own = record["oracle_error"]
    quotient = f" ({record['error'] / own:.2f}x)" if own else ""
    return f"{record['error']:.1e}{quotient}"


def goals_table(records: list[Record], _ceilings: Record) -> Table:
    table = Table("Goals", ["what", "goal", "measured", "met"])
    for record in records:
        reason = record.get("reason")
        measured = record.get("measured") or (table.note(reason) if reason else "-")
        table.rows.append([record["what"], record["goal"], measured, record["verdict"]])
    return table


TABLES: dict[str, list[Callable[[list[Record], Record], Table]]] = {
    "routing": [routing_table, summary_table],
    "training": [training_table],
    "memory": [memory_table],
    "scaling": [scaling_table],
    "exponents": [exponents_table],
    "accuracy": [accuracy_table],
    "goals": [goals_table],
}
"""The tables of each kind of record."""


def tables(records: list[Record], ceilings: Record) -> list[Table]:
    """All tables that the records fill."""
    return [
        make(kind_records, ceilings)
        for kind, makers in TABLES.items()
        if (kind_records := select(records, table=kind))
        for make in makers
    ]

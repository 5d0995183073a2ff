"""Tables of typed cells, and the one place where cells become text: for people, Markdown, CSV and LaTeX.

A column has a kind, which says how its cells are shown. Scores, differences and shares are fractions of 1 in cells, and
points of 100 or per cent in texts. Losses are in nats.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tiedlora.records.interval import MISSING, Interval, Unit
from tiedlora.text import visible


def minus(text: str) -> str:
    """Numbers with the sign that is as wide as the plus."""
    return text.replace("-", "−")


class Scored(NamedTuple):
    """A score, or a difference of scores, with its interval. The ends are NaN if there is no interval."""

    interval: Interval
    unit: Unit = Unit.POINTS
    covers: str = ""
    """What the interval covers, such as `examples`, if it is not what the column's name says."""


@dataclass(frozen=True)
class Kind:
    """How the cells of a column become text. A cell of any kind may also be a word such as `failed`, or None."""

    text: Callable[[Any], str] = str
    """For people."""
    csv: Callable[[Any], Sequence[str]] | None = None
    """For programs: a text for each ending of `endings`. None is the text for people."""
    endings: tuple[str, ...] = ("",)
    """The endings of the names of its columns in CSV."""
    is_number: bool = True
    """Whether the page aligns it to the right."""


VALUE_LOW_HIGH = ("", " low", " high")


def numbers(interval: Interval, unit: Unit, sign: str = "") -> list[str]:
    """The value and the two ends."""
    return [unit.number(number, sign) for number in (interval.value, interval.low, interval.high)]


def _scored(shown: Callable[[Unit, Interval, str], str], sign: str, start: int = 0, stop: int = 3) -> Kind:
    """A kind of Scored.

    Args:
        start, stop: which of the value and the two ends are in CSV.
    """
    return Kind(
        lambda cell: shown(cell.unit, cell.interval, sign),
        lambda cell: numbers(cell.interval, cell.unit, sign)[start:stop],
        VALUE_LOW_HIGH[start:stop],
    )


def amount(decimals: int) -> Kind:
    """A measured quantity whose unit is in the column's name."""
    return Kind(lambda cell: f"{cell:,.{decimals}f}", lambda cell: [f"{cell:.{decimals}f}"])


def percent(decimals: int) -> Kind:
    """A share."""
    return Kind(lambda cell: f"{100 * cell:.{decimals}f} %")


def _percents(cell: Interval) -> list[str]:
    ends = [MISSING if math.isnan(end) else f"{100 * end:.0f}" for end in (cell.low, cell.high)]
    return [f"{100 * cell.value:.0f} %", *ends]


def _percent_interval(cell: Interval) -> str:
    share, low, high = _percents(cell)
    return share if low == MISSING else f"{share} [{low}, {high}]"


TEXT = Kind(is_number=False)
WHOLE = Kind()
COUNT = Kind(lambda cell: f"{cell:,}", lambda cell: [str(cell)])
"""A whole number that may be large: parameters, rows."""
RATE = Kind(lambda cell: f"{cell[0]:g} of {cell[1]}" if cell[1] > 1 else f"{cell[0]:g}")
"""The chosen learning rate, and how many were tried."""
PERCENT_INTERVAL = Kind(_percent_interval, _percents, VALUE_LOW_HIGH)
"""A share as Interval."""
WORTH = Kind(
    str,
    lambda cell: [f"{size:.0f}" if cell.is_measured(size) else "" for size in (cell.value, cell.low, cell.high)],
    VALUE_LOW_HIGH,
)
"""A compare.Worth. In CSV, what is beyond the curve is empty."""
SCORE, DIFFERENCE = (_scored(lambda unit, one, sign: unit.number(one.value, sign), sign, stop=1) for sign in ("", "+"))
SCORE_ENDS, DIFFERENCE_ENDS = (_scored(Unit.ends, sign, start=1) for sign in ("", "+"))
SCORE_INTERVAL, DIFFERENCE_INTERVAL = (_scored(Unit.text, sign) for sign in ("", "+"))
NAMED_ENDS = Kind(
    lambda cell: f"{cell.unit.ends(cell.interval, '+')} {cell.covers}".rstrip(),
    lambda cell: [cell.covers, *numbers(cell.interval, cell.unit, "+")[1:]],
    VALUE_LOW_HIGH,
)
"""The ends of a difference's interval, which may cover less than the column's name says."""


@dataclass(frozen=True)
class Column:
    """A column: its name, the kind of its cells, and what gives the cell of an item (see Table.of)."""

    name: str
    kind: Kind = TEXT
    cell: Callable[[Any], Any] = lambda item: item
    csv_name: str = ""
    """The name in CSV files, if another column of the table has the same name."""
    wraps: bool = False
    """Whether the column has long texts."""

    def text(self, cell: Any) -> str:
        """A cell for people. None means missing, and is never filled in."""
        return MISSING if cell is None else cell if isinstance(cell, str) else self.kind.text(cell)

    def csv(self, cell: Any) -> list[str]:
        """A cell's texts in CSV."""
        if cell is None or isinstance(cell, str):
            first = MISSING if cell is None else safe_text(cell)
            return [first, *[MISSING] * (len(self.kind.endings) - 1)]
        return [self.text(cell)] if self.kind.csv is None else list(self.kind.csv(cell))


@dataclass(frozen=True)
class Table:
    """Columns and rows of cells, with a caption that says how to read them."""

    name: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]

    @classmethod
    def of(cls, name: str, caption: str, columns: Sequence[Column], items: Iterable[Any]) -> Table:
        """The table with a row for each item."""
        return cls(name, caption, columns, [[column.cell(item) for column in columns] for item in items])

    @property
    def head(self) -> list[str]:
        """The columns' names."""
        return [column.name for column in self.columns]

    def texts(self) -> list[list[str]]:
        """The rows for people."""
        return [[column.text(cell) for column, cell in zip(self.columns, row, strict=True)] for row in self.rows]

    def at(self, places: Sequence[int]) -> Table:
        """The table with only the columns at these places."""
        rows = [[row[place] for place in places] for row in self.rows]
        return Table(self.name, self.caption, [self.columns[place] for place in places], rows)


def to_markdown(table: Table) -> str:
    """The caption, and below it a pipe table."""
    return f"{_markdown(table.caption)}\n\n{pipe_table(table)}"


def pipe_table(table: Table) -> str:
    """The table in Markdown, without its caption."""
    lines = [f"| {' | '.join(map(_markdown, table.head))} |", f"|{' --- |' * len(table.columns)}"]
    lines += [f"| {' | '.join(map(_markdown, row))} |" for row in table.texts()]
    return "\n".join(lines) + "\n"


def _markdown(cell: str) -> str:
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", visible(cell)) or " "


def to_csv(table: Table) -> str:
    """CSV for programs and spreadsheets.

    The ends of an interval have their own columns, counts have no commas, and a text that a spreadsheet would run as a
    formula gets an apostrophe.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    columns = table.columns
    names = [(column.csv_name or column.name, column.kind.endings) for column in columns]
    writer.writerow([safe_text(name + ending) for name, endings in names for ending in endings])
    for row in table.rows:
        writer.writerow([text for column, cell in zip(columns, row, strict=True) for text in column.csv(cell)])
    return file.getvalue()


def safe_text(cell: str) -> str:
    """A text that no spreadsheet runs: what starts like a formula and is not a number gets an apostrophe."""
    cell = visible(cell)
    if re.fullmatch(r"[+-]?\d*\.?\d+", cell):
        return cell
    return cell if not cell.lstrip().startswith(("=", "+", "-", "@")) else f"'{cell}"


_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        **{c: rf"\{c}" for c in "&%$#_{}"},
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        MISSING: "--",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
    }
)


def to_latex(table: Table) -> str:
    """A booktabs table."""
    lines = [
        "% needs \\usepackage{booktabs}",
        r"\begin{table}",
        rf"\caption{{{_latex(table.caption)}}}",
        rf"\begin{{tabular}}{{{'l' * len(table.columns)}}}",
        *(r"\toprule", _latex_row(table.head), r"\midrule", *map(_latex_row, table.texts()), r"\bottomrule"),
        *(r"\end{tabular}", r"\end{table}"),
    ]
    return "\n".join(lines) + "\n"


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(map(_latex, cells)) + r" \\"


def _latex(cell: str) -> str:
    return visible(cell).translate(_LATEX)

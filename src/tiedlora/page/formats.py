"""Tables as Markdown, CSV and LaTeX. Here the values of a table become text."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence

from tiedlora.page.values import (
    Amount,
    AverageScore,
    Column,
    Count,
    Ends,
    LearningRate,
    NamedEnds,
    Percent,
    PercentInterval,
    ScoreInterval,
    ScoreValue,
    Table,
    TaskScore,
    Value,
)
from tiedlora.records.interval import Interval, Unit
from tiedlora.text import visible

MISSING = "–"


def score(value: float, signed: bool = False, unit: Unit = Unit.POINTS) -> str:
    """0.4213 -> 42.1 in points, 0.421 in nats."""
    return MISSING if math.isnan(value) else f"{unit.factor * value:{'+' if signed else ''}.{unit.decimals}f}"


def ends(interval: Interval, signed: bool = False, unit: Unit = Unit.POINTS) -> str:
    """[40.1, 44.2]."""
    if math.isnan(interval.low):
        return MISSING
    return f"[{score(interval.low, signed, unit)}, {score(interval.high, signed, unit)}]"


def score_interval(interval: Interval, signed: bool = False, unit: Unit = Unit.POINTS) -> str:
    """42.1 [40.1, 44.2], or 42.1 if there is no interval."""
    value = score(interval.value, signed, unit)
    return value if math.isnan(interval.low) else f"{value} {ends(interval, signed, unit)}"


def text(value: Value) -> str:
    """A value as text for people."""
    match value:
        case None:
            return MISSING
        case str() | int():
            return str(value)
        case float():
            return f"{value:g}"
        case Count():
            return f"{value.value:,}"
        case Amount():
            return f"{value.value:,.{value.decimals}f}"
        case Percent():
            return f"{100 * value.value:.{value.decimals}f} %"
        case PercentInterval():
            return _percent_interval(value.interval)
        case LearningRate():
            return f"{value.value:g} of {value.tried}" if value.tried > 1 else f"{value.value:g}"
        case ScoreValue():
            return score(value.value, value.signed, value.unit)
        case ScoreInterval():
            return score_interval(value.interval, value.signed, value.unit)
        case Ends():
            return ends(value.interval, value.signed, value.unit)
        case NamedEnds():
            return f"{ends(value.interval, value.signed, value.unit)} {value.covers}".rstrip()
        case TaskScore():
            return _task_score(value)
        case AverageScore():
            return f"{score_interval(value.interval, unit=value.unit)} (n={value.seeds})"


def _percent_interval(interval: Interval) -> str:
    share = f"{100 * interval.value:.0f} %"
    return share if math.isnan(interval.low) else f"{share} [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"


def _task_score(value: TaskScore) -> str:
    star = "*" if value.has_notes else ""
    if value.score is None:
        return f"{MISSING}{star}"
    shown = f"{score(value.score, unit=value.unit)} (n={value.seeds}){star}"
    return shown if value.difference is None else f"{shown} ({text(value.difference)})"


def to_markdown(table: Table) -> str:
    """The caption, and below it a pipe table."""
    return f"{_markdown(table.caption)}\n\n{pipe_table(table)}"


def pipe_table(table: Table) -> str:
    """The table in Markdown, without its caption."""
    lines = [f"| {' | '.join(map(_markdown, table.head))} |", f"|{' --- |' * len(table.head)}"]
    lines += [f"| {' | '.join(_markdown(text(value)) for value in row)} |" for row in table.rows]
    return "\n".join(lines) + "\n"


def _markdown(cell: str) -> str:
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", visible(cell)) or " "


_CSV_COLUMNS: dict[type, tuple[str, ...]] = {
    PercentInterval: ("", " low", " high"),
    ScoreInterval: ("", " low", " high"),
    Ends: (" low", " high"),
    NamedEnds: ("", " low", " high"),
    TaskScore: ("", " seeds", " notes", " minus LoRA", " minus LoRA low", " minus LoRA high"),
    AverageScore: ("", " seeds", " low", " high"),
}
"""For values that take several columns in CSV: the endings of the columns' names."""


def to_csv(table: Table) -> str:
    """CSV for programs and spreadsheets.

    The ends of an interval have their own columns, counts have no commas, and a text that a spreadsheet would run as a
    formula gets an apostrophe.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([name for column in table.columns for name in _csv_names(column)])
    for row in table.rows:
        writer.writerow(
            [cell for column, value in zip(table.columns, row, strict=True) for cell in _csv_cells(column, value)]
        )
    return file.getvalue()


def _csv_names(column: Column) -> list[str]:
    name = column.csv_name or column.name
    return [safe_text(f"{name}{end}") for end in _CSV_COLUMNS.get(column.kind, ("",))]


def _csv_cells(column: Column, value: Value) -> list[str]:
    count = len(_CSV_COLUMNS.get(column.kind, ("",)))
    match value:
        case None:
            return [MISSING] * count
        case str():
            return [safe_text(value), *[MISSING] * (count - 1)]
        case Count():
            return [str(value.value)]
        case Amount():
            return [f"{value.value:.{value.decimals}f}"]
        case PercentInterval(interval):
            share = f"{100 * interval.value:.0f} %"
            return [share, *(f"{100 * end:.0f}" if not math.isnan(end) else MISSING for end in _ends(interval))]
        case ScoreInterval():
            return _csv_interval(value)
        case Ends(interval, signed, unit):
            return _score_ends(interval, signed, unit)
        case NamedEnds(interval, covers, signed, unit):
            return [covers, *_score_ends(interval, signed, unit)]
        case TaskScore():
            shown = MISSING if value.score is None else score(value.score, unit=value.unit)
            difference = [MISSING] * 3 if value.difference is None else _csv_interval(value.difference)
            return [shown, str(value.seeds), "*" if value.has_notes else "", *difference]
        case AverageScore(interval, seeds, unit):
            return [score(interval.value, unit=unit), str(seeds), *_score_ends(interval, unit=unit)]
        case _:
            return [text(value)]


def _csv_interval(value: ScoreInterval) -> list[str]:
    interval, signed, unit = value.interval, value.signed, value.unit
    return [score(interval.value, signed, unit), *_score_ends(interval, signed, unit)]


def _ends(interval: Interval) -> tuple[float, float]:
    return interval.low, interval.high


def _score_ends(interval: Interval, signed: bool = False, unit: Unit = Unit.POINTS) -> list[str]:
    return [score(end, signed, unit) for end in _ends(interval)]


def safe_text(cell: str) -> str:
    """A text that no spreadsheet runs: what starts like a formula and is not a number gets an apostrophe."""
    cell = visible(cell)
    if re.fullmatch(r"[+-]?\d*\.?\d+", cell):
        return cell
    return cell if not cell.lstrip().startswith(("=", "+", "-", "@")) else f"'{cell}"


_LATEX = {
    "\\": r"\textbackslash{}",
    **{c: rf"\{c}" for c in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    MISSING: "--",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def to_latex(table: Table) -> str:
    """A booktabs table."""
    rows = [_latex_row([text(value) for value in row]) for row in table.rows]
    lines = [
        "% needs \\usepackage{booktabs}",
        r"\begin{table}",
        rf"\caption{{{_latex(table.caption)}}}",
        rf"\begin{{tabular}}{{{'l' * len(table.columns)}}}",
        *(r"\toprule", _latex_row(table.head), r"\midrule", *rows, r"\bottomrule"),
        *(r"\end{tabular}", r"\end{table}"),
    ]
    return "\n".join(lines) + "\n"


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(map(_latex, cells)) + r" \\"


def _latex(cell: str) -> str:
    return "".join(_LATEX.get(c, c) for c in visible(cell))

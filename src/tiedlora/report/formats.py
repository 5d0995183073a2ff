"""Tables as Markdown, CSV and LaTeX. Here the values of a table become text."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence

from tiedlora.report.values import (
    Amount,
    AverageScore,
    Column,
    Count,
    Ends,
    LearningRate,
    NamedEnds,
    Percent,
    PercentInterval,
    Points,
    PointsInterval,
    Table,
    TaskScore,
    Value,
)
from tiedlora.statistics.interval import Interval
from tiedlora.text import visible

MISSING = "–"


def points(value: float, signed: bool = False) -> str:
    """0.4213 -> 42.1."""
    return MISSING if math.isnan(value) else f"{100 * value:{'+' if signed else ''}.1f}"


def ends(interval: Interval, signed: bool = False) -> str:
    """[40.1, 44.2]."""
    if math.isnan(interval.low):
        return MISSING
    return f"[{points(interval.low, signed)}, {points(interval.high, signed)}]"


def points_interval(interval: Interval, signed: bool = False) -> str:
    """42.1 [40.1, 44.2], or 42.1 if there is no interval."""
    value = points(interval.value, signed)
    return value if math.isnan(interval.low) else f"{value} {ends(interval, signed)}"


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
        case Points():
            return points(value.value, value.signed)
        case PointsInterval():
            return points_interval(value.interval, value.signed)
        case Ends():
            return ends(value.interval, value.signed)
        case NamedEnds():
            return f"{ends(value.interval, value.signed)} {value.covers}".rstrip()
        case TaskScore():
            return _task_score(value)
        case AverageScore():
            return f"{points_interval(value.interval)} (n={value.seeds})"


def _percent_interval(interval: Interval) -> str:
    share = f"{100 * interval.value:.0f} %"
    return share if math.isnan(interval.low) else f"{share} [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"


def _task_score(value: TaskScore) -> str:
    star = "*" if value.has_notes else ""
    if value.score is None:
        return f"{MISSING}{star}"
    shown = f"{points(value.score)} (n={value.seeds}){star}"
    return shown if value.difference is None else f"{shown} ({text(value.difference)})"


def to_markdown(table: Table) -> str:
    """The caption, and below it a pipe table."""
    lines = [
        _markdown(table.caption),
        "",
        f"| {' | '.join(map(_markdown, table.head))} |",
        f"|{' --- |' * len(table.head)}",
    ]
    lines += [f"| {' | '.join(_markdown(text(value)) for value in row)} |" for row in table.rows]
    return "\n".join(lines) + "\n"


def _markdown(cell: str) -> str:
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", visible(cell)) or " "


_CSV_COLUMNS: dict[type, tuple[str, ...]] = {
    PercentInterval: ("", " low", " high"),
    PointsInterval: ("", " low", " high"),
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
        case PointsInterval(interval, signed):
            return [points(interval.value, signed), *_point_ends(interval, signed)]
        case Ends(interval, signed):
            return _point_ends(interval, signed)
        case NamedEnds(interval, covers, signed):
            return [covers, *_point_ends(interval, signed)]
        case TaskScore():
            score = MISSING if value.score is None else points(value.score)
            return [score, str(value.seeds), "*" if value.has_notes else "", *_csv_difference(value.difference)]
        case AverageScore(interval, seeds):
            return [points(interval.value), str(seeds), *_point_ends(interval)]
        case _:
            return [text(value)]


def _csv_difference(difference: PointsInterval | None) -> list[str]:
    if difference is None:
        return [MISSING] * 3
    return [points(difference.interval.value, signed=True), *_point_ends(difference.interval, signed=True)]


def _ends(interval: Interval) -> tuple[float, float]:
    return interval.low, interval.high


def _point_ends(interval: Interval, signed: bool = False) -> list[str]:
    return [points(end, signed) for end in _ends(interval)]


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

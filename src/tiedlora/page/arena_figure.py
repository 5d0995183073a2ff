"""The arena's figure: score against trained and against stored parameters, for a setting with other methods in it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tiedlora.analysis.compare import ResultRow
from tiedlora.analysis.groups import RunGroup
from tiedlora.page.panels import INK, axis_of_counts, style

ROW_HEIGHT = 0.34
"""Inches for each name beside the panels."""


def has_other_methods(rows: Sequence[ResultRow]) -> bool:
    """Whether one of the rows is of another method than this project's own."""
    return any(row.group.is_other_method for row in rows)


def arena(rows: Sequence[ResultRow]) -> Figure:
    """Three panels that share their vertical axis: the names with intervals, trained parameters, stored parameters.

    The names are sorted by score, so no label covers another one. A name with * has marks: what the admission found, or
    a size more than 5 % off the budget.

    Args:
        rows: the results of one setting, each with a score.
    """
    ordered = sorted(rows, key=lambda row: row.measure.sign * value(row))
    height = 1.2 + ROW_HEIGHT * len(ordered)
    figure, axes = plt.subplots(
        1, 3, figsize=(9.6, height), sharey=True, layout="constrained", gridspec_kw={"width_ratios": [3, 2, 2]}
    )
    names, trained, stored = axes
    for place, row in enumerate(ordered):
        _interval(names, row, place)
        _dot(trained, row, row.group.params, place)
        _dot(stored, row, stored_params(row.group), place)
    names.set_yticks(range(len(ordered)), [_label(row.group) for row in ordered])
    names.set_ylim(-0.7, len(ordered) - 0.3)
    measure = ordered[0].measure
    names.set_xlabel(f"{measure.metric} on {measure.split} ({measure.unit.words})")
    for axis, title in ((trained, "trained parameters"), (stored, "stored numbers")):
        axis.set_xlabel(title)
        # Wide enough for labels at 1, 2 and 5, also where all arms have one size.
        low, high = axis.get_xlim()
        axis.set_xlim(low / 3, high * 3)
        axis_of_counts(axis)
        axis.tick_params(axis="y", length=0)
    for axis in axes:
        axis.grid(axis="y", color=INK, alpha=0.12)
    return figure


def value(row: ResultRow) -> float:
    """The score in the unit of the axis."""
    assert row.score is not None
    return row.measure.unit.factor * row.score.value


def stored_params(group: RunGroup) -> int:
    """The numbers in the files of the group's arm."""
    return group.runs[0].record.stored_params or group.params


def _label(group: RunGroup) -> str:
    star = " *" if group.short_marks else ""
    return f"{group.name}{star}"


def _interval(ax: Axes, row: ResultRow, place: int) -> None:
    assert row.score is not None
    colour, marker, _ = style(row.group)
    factor, middle = row.measure.unit.factor, value(row)
    interval = row.score.both or row.score.examples
    if interval is not None and math.isfinite(interval.low):
        ax.plot([factor * interval.low, factor * interval.high], [place, place], color=colour, linewidth=1.4)
    ax.plot([middle], [place], color=colour, marker=marker, markersize=7, linestyle="none")


def _dot(ax: Axes, row: ResultRow, count: int, place: int) -> None:
    colour, marker, _ = style(row.group)
    ax.plot([count], [place], color=colour, marker=marker, markersize=7, linestyle="none")

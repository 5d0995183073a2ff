"""Figures as PNG and SVG. They are safe for colour-blind readers, and every series has its own marker."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tiedlora.report import arena_figure
from tiedlora.report.arena_figure import arena
from tiedlora.report.compare import ResultRow
from tiedlora.report.groups import RunGroup
from tiedlora.report.panels import INK, curve_panel, pareto_panel, peer_panel, rank_panel, style
from tiedlora.report.peft_results import Peer
from tiedlora.report.runs import Run
from tiedlora.report.values import Unit

PANELS = 12
"""The most panels of a figure. More would be unreadable; the tables have every setting."""
RC: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "tiedlora",
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#9a9a9a",
    "grid.alpha": 0.25,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.dpi": 100,
    "text.parse_math": False,
}


@dataclass(frozen=True)
class DrawnFigure:
    """A figure that was written, for the page."""

    name: str
    caption: str
    svg: str
    """Its text, with ids that no other figure has."""


@dataclass(frozen=True)
class Panel:
    """The rows of one setting, which share a panel of a figure."""

    title: str
    rows: list[ResultRow]


def draw(rows: Sequence[ResultRow], peers: Sequence[Peer], out: Path) -> list[DrawnFigure]:
    """Write every figure to `out`, as PNG and SVG."""
    by_setting: dict[tuple[str, str, str], list[ResultRow]] = defaultdict(list)
    for row in rows:
        if row.primary and row.score is not None:
            by_setting[row.group.task, row.group.model, row.group.variant].append(row)
    if not by_setting:
        return []
    settings = list(by_setting)
    panels = [Panel(_title(*setting), by_setting[setting]) for setting in settings[:PANELS]]
    more = f" The first {PANELS} of {len(settings)} settings." if len(settings) > PANELS else ""
    # Costs can be compared only within a setting, so the setting with the most groups is drawn.
    (task, model, variant), widest = max(list(by_setting.items())[:PANELS], key=lambda item: len(item[1]))
    costs = _COST.format(f"{task}, {model}" + (f" ({variant})" if variant else ""))
    arms, widest_name = arena_figure.has_other_methods(widest), f"{task}, {model}"
    out.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(RC):
        return [
            _save(out, "pareto", _PARETO + more, pareto(panels, peers)),
            _save(out, "rank", _RANK + more, _by_setting(panels, rank_panel, "rank r", _score_axis(panels))),
            _save(out, "curves", _CURVES + more, _by_setting(panels, curve_panel, "step", "validation loss")),
            _save(out, "cost", costs, cost([row.group for row in widest])),
            *([_save(out, "arena", f"{arena_figure.CAPTION} {widest_name}.", arena(widest))] if arms else []),
        ]


def _score_axis(panels: Sequence[Panel]) -> str:
    """The name of the axis of scores, with the unit of every panel."""
    names = {Unit.POINTS: "score", Unit.NATS: "loss"}
    units = {row.measure.unit for panel in panels for row in panel.rows}
    return " or ".join(f"{name} ({unit.words})" for unit, name in names.items() if unit in units)


def _title(task: str, model: str, variant: str) -> str:
    return f"{task}, {model}" + (f"\n{variant[:60]}" if variant else "")


_PARETO = (
    "Score against trainable parameters. Filled markers joined by the line are not beaten by anything with as few "
    "parameters (the Pareto front); bars are 95 % intervals over examples. Hollow stars are scores that "
    "others have published for the same model, task, configuration and rank."
)
_RANK = "Score against rank, by configuration; bars are 95 % intervals over examples."
_CURVES = "Validation loss by step: the mean over seeds, and their range where there are several."
_COST = "Training speed, peak memory and adapter size on {}: means over the chosen runs. The table has every setting."


def _save(out: Path, name: str, caption: str, figure: Figure) -> DrawnFigure:
    # The layout takes half of the time, so it is computed once for both files.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    figure.savefig(out / f"{name}.png", dpi=160, facecolor="white")
    # Without a date, the same runs give the same bytes.
    figure.savefig(out / f"{name}.svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    text = (out / f"{name}.svg").read_text(encoding="utf-8")
    text = text[text.index("<svg") :]
    for pattern in (r'id="', r"url\(#", r'href="#'):
        text = re.sub(pattern, lambda match: f"{match[0]}{name}-", text)
    return DrawnFigure(name, caption, text)


def _by_setting(
    panels: Sequence[Panel], fill: Callable[[Axes, list[ResultRow]], None], x: str, y: str, peers: Sequence[Peer] = ()
) -> Figure:
    """A figure with one panel per setting, a panel for PEFT's results if there are any, and one legend."""
    count = len(panels) + bool(peers)
    columns = min(3, count)
    lines = math.ceil(count / columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.4 * columns + 1.6, 3.4 * lines), squeeze=False, layout="constrained"
    )
    for ax, panel in zip(axes.flat, panels, strict=False):
        fill(ax, panel.rows)
        ax.set_title(panel.title, fontsize=9)
        ax.set_xlabel(x)
    if peers:
        ax = axes.flat[len(panels)]
        peer_panel(ax, peers)
        ax.set_title("MetaMathQA to GSM8K, PEFT method_comparison, published", fontsize=9)
        ax.set_xlabel(x)
    for ax in axes.flat[count:]:
        ax.set_visible(False)
    for line in axes:
        line[0].set_ylabel(y)
    handles = {}
    for row in (row for panel in panels for row in panel.rows):
        colour, marker, dash = style(row.group)
        label = row.group.configuration[:32]
        handles[label] = Line2D([], [], color=colour, marker=marker, linestyle=dash, markersize=6, label=label)  # type: ignore[arg-type]
    figure.legend(handles=[handles[label] for label in sorted(handles)], loc="outside right center")
    return figure


def pareto(panels: Sequence[Panel], peers: Sequence[Peer]) -> Figure:
    """Score against trainable parameters, with the Pareto front. PEFT's results have a separate panel."""
    return _by_setting(panels, pareto_panel, "trainable parameters (log)", _score_axis(panels), peers)


def cost(groups: Sequence[RunGroup]) -> Figure:
    """Three bar charts over the groups of one setting."""
    groups = sorted(groups, key=lambda group: (group.rank, group.params))
    measures: tuple[tuple[str, Callable[[Run], float]], ...] = (
        ("training tokens/s", lambda run: run.record.training.tokens_per_s),
        ("peak memory, GiB", lambda run: run.record.training.peak_memory_bytes / 2**30),
        ("adapter, MiB", lambda run: run.record.adapter_bytes / 2**20),
    )
    figure, axes = plt.subplots(
        1, 3, figsize=(12, 1.2 + 0.28 * len(groups)), sharey=True, squeeze=False, layout="constrained"
    )
    for ax, (title, measure) in zip(axes[0], measures, strict=True):
        values = [np.mean([measure(run) for run in group.runs]) for group in groups]
        ax.barh(range(len(groups)), values, color=[style(group)[0] for group in groups], height=0.7)
        ax.set_yticks(range(len(groups)), [f"{group.configuration[:24]} r={group.rank}" for group in groups])
        ax.set_xlabel(title)
        ax.grid(axis="y", visible=False)
        for place, value in enumerate(values):
            ax.annotate(
                f"{value:,.3g}" if value < 100 else f"{value:,.0f}",
                (value, place),
                fontsize=7,
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
            )
        ax.margins(x=0.15)
    axes[0][0].invert_yaxis()
    return figure

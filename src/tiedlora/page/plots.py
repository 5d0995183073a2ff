"""Figures as PNG and SVG. They are safe for colour-blind readers, and every series has its own marker."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
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

from tiedlora.analysis import forest
from tiedlora.analysis.adapters import layer_profiles
from tiedlora.analysis.answers import Answer
from tiedlora.analysis.compare import ResultRow
from tiedlora.analysis.groups import RunGroup
from tiedlora.analysis.runs import Run
from tiedlora.analysis.shares_by_size import SizePanel, share_axis
from tiedlora.page.arena_figure import arena, has_other_methods
from tiedlora.page.charts import drawn
from tiedlora.page.forest_panel import forest_panel, height
from tiedlora.page.layer_panels import layer_panel, titled
from tiedlora.page.panels import INK, curve_panel, pareto_panel, rank_panel, share_panel, style
from tiedlora.records.interval import Unit

PANELS = 12
"""The most panels of a figure. More would be unreadable; the tables have every setting."""
WIDE = 8.0
"""The width of every figure in inches. At 800 pixels, text of 9 points is 12 pixels high."""
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
class Panel:
    """The rows of one setting and metric, which share a panel of a figure."""

    title: str
    rows: list[ResultRow]


def draw(
    rows: Sequence[ResultRow],
    answers: Sequence[Answer],
    sizes: Sequence[SizePanel],
    out: Path,
) -> None:
    """Write every figure to `out`, as PNG and SVG. They are as wide as a page of text, so they stay readable there."""
    by_place: dict[tuple[str, str, str, str], list[ResultRow]] = defaultdict(list)
    for row in rows:
        if row.primary and row.score is not None:
            by_place[row.group.model, row.group.task, row.group.variant, row.measure.metric].append(row)
    if not by_place:
        return
    panels = [Panel(_title(*place), own) for place, own in list(by_place.items())[:PANELS]]
    # Costs can be compared only within a setting, so the setting with the most groups is drawn.
    widest = max((panel.rows for panel in panels), key=len)
    out.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(RC):
        _save(out, "pareto", pareto(panels))
        _save(out, "rank", _by_setting(panels, rank_panel, "rank r", _score_axis))
        _save(out, "curves", _by_setting(_settings(rows)[:PANELS], curve_panel, "step", _loss_axis))
        _save(out, "cost", cost([row.group for row in widest]))
        if (figure := forest_figure(answers)) is not None:
            _save(out, "forest", figure)
        if sizes:
            _save(out, "shares", shares_figure(sizes[:PANELS]))
        if (figure := layers_figure([row.group for row in widest])) is not None:
            _save(out, "layers", figure)
        if has_other_methods(widest):
            _save(out, "arena", arena(widest))


def _score_axis(panel: Panel) -> str:
    """The name of a panel's axis of scores, with its unit."""
    unit = panel.rows[0].measure.unit
    return f"{'loss' if unit is Unit.NATS else 'score'} ({unit.words})"


def _loss_axis(_: Panel) -> str:
    return "validation loss"


def _title(model: str, task: str, variant: str, metric: str = "") -> str:
    """The title of a panel, in lines that fit above it."""
    return "\n".join(filter(None, (f"{task}, {metric}" if metric else task, model, variant[:60])))


def _settings(rows: Sequence[ResultRow]) -> list[Panel]:
    """A panel for each setting, with one row of each scored group, whatever its metric."""
    by_setting: dict[tuple[str, str, str], dict[int, ResultRow]] = defaultdict(dict)
    for row in rows:
        if row.primary and row.score is not None:
            by_setting[row.group.model, row.group.task, row.group.variant].setdefault(id(row.group), row)
    return [Panel(_title(*setting), list(own.values())) for setting, own in by_setting.items()]


def _save(out: Path, name: str, figure: Figure) -> None:
    # The layout takes half of the time, so it is computed once for both files.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    figure.savefig(out / f"{name}.png", dpi=200, facecolor="white")
    # Without a date, the same runs give the same bytes.
    figure.savefig(out / f"{name}.svg", transparent=True, metadata={"Date": None})
    plt.close(figure)


def forest_figure(answers: Sequence[Answer]) -> Figure | None:
    """The forest plot of the compared claims, a panel for each model; None if no answer has a share to draw."""
    models = list(dict.fromkeys(answer.model for answer in answers if answer.model))[:PANELS]
    of_model = {
        model: forest.groups(
            answer
            for answer in answers
            if answer.model == model and answer.measure is not None and answer.difference is not None
        )
        for model in models
    }
    groups = [group for own in of_model.values() for group in own]
    if not any(line.share is not None for group in groups for line in group.lines):
        return None
    heights = [height(own) + 2 for own in of_model.values()]
    figure, axes = plt.subplots(
        len(models),
        figsize=(WIDE, 0.5 + 0.27 * sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for ax, (model, own) in zip(axes.flat, of_model.items(), strict=True):
        forest_panel(ax, own)
        if len(models) > 1:
            ax.set_title(model, fontsize=10, loc="left")
    return figure


def shares_figure(sizes: Sequence[SizePanel]) -> Figure:
    """The share of a reference's gain that every arm keeps, against trainable parameters. All panels have one scale."""
    arms = [arm for panel in sizes for arm in panel.arms]
    axis = share_axis(sizes)
    counts = [arm.group.params for arm in arms]
    figure, axes = _grid(len(sizes))
    for ax, panel in zip(axes.flat, sizes, strict=False):
        ax.set_xlim(min(counts) / 1.3, max(counts) * 1.3)
        share_panel(ax, panel, axis)
        first = panel.arms[0].group
        ax.set_title(_title(first.model, first.task, first.variant, panel.measure.metric), fontsize=9)
        ax.set_xlabel("trainable parameters (log)")
        ax.set_ylabel(f"share of the gain of {panel.reference.name[:24]}")
    _add_legend(figure, [arm.group for arm in arms])
    return figure


def layers_figure(groups: Sequence[RunGroup]) -> Figure | None:
    """The profiles of the layers of one setting's groups; None if no adapter can be read."""
    panels = titled(layer_profiles(drawn(groups)))
    if not panels:
        return None
    lines = math.ceil(len(panels) / 2)
    figure, axes = plt.subplots(lines, 2, figsize=(WIDE, 2.9 * lines), squeeze=False, layout="constrained")
    for ax, (title, profiles) in zip(axes.flat, panels, strict=False):
        layer_panel(ax, title, profiles)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    return figure


def _by_setting(
    panels: Sequence[Panel],
    fill: Callable[[Axes, list[ResultRow]], None],
    x: str,
    y: Callable[[Panel], str],
) -> Figure:
    """A figure with one panel per setting, and one legend."""
    figure, axes = _grid(len(panels))
    for ax, panel in zip(axes.flat, panels, strict=False):
        fill(ax, panel.rows)
        ax.set_title(panel.title, fontsize=9)
        ax.set_xlabel(x)
        ax.set_ylabel(y(panel))
    _add_legend(figure, [row.group for panel in panels for row in panel.rows], with_lines=fill is curve_panel)
    return figure


def _grid(count: int) -> tuple[Figure, Any]:
    """A figure with `count` panels, two in a row."""
    columns = min(2, count)
    lines = math.ceil(count / columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(WIDE, (3.6 if columns == 1 else 2.9) * lines), squeeze=False, layout="constrained"
    )
    for ax in axes.flat[count:]:
        ax.set_visible(False)
    return figure, axes


def _add_legend(figure: Figure, groups: Iterable[RunGroup], with_lines: bool = False) -> None:
    handles = {}
    for group in groups:
        colour, marker, dash = style(group)
        label = group.configuration[:32]
        line = dash if with_lines else "none"
        handles[label] = Line2D([], [], color=colour, marker=marker, linestyle=line, markersize=6, label=label)  # type: ignore[arg-type]
    figure.legend(handles=[handles[label] for label in sorted(handles)], loc="outside lower center", ncols=5)


def pareto(panels: Sequence[Panel]) -> Figure:
    """Score against trainable parameters, with the Pareto front."""
    return _by_setting(panels, pareto_panel, "trainable parameters (log)", _score_axis)


def cost(groups: Sequence[RunGroup]) -> Figure:
    """Three bar charts over the groups of one setting."""
    groups = sorted(groups, key=lambda group: (group.rank, group.params))
    measures: tuple[tuple[str, Callable[[Run], float]], ...] = (
        ("training tokens/s", lambda run: run.record.training.tokens_per_s),
        ("peak memory, GiB", lambda run: run.record.training.peak_memory_bytes / 2**30),
        ("adapter, MiB", lambda run: run.record.adapter_bytes / 2**20),
    )
    figure, axes = plt.subplots(
        1, 3, figsize=(WIDE, 1.2 + 0.28 * len(groups)), sharey=True, squeeze=False, layout="constrained"
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

"""Figures as PNG and SVG: colour-blind-safe, every series with its own marker, readable on white paper."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tiedlora.report.cells import Cell
from tiedlora.report.compare import Row
from tiedlora.report.peft_results import Peer

INK = "#1b1b1d"
"""Text and axes. The page turns exactly this colour into its own text colour, so that figures serve both themes."""
# Okabe and Ito's palette without black and yellow (invisible on one of the two backgrounds), by configuration.
STYLES = {
    "LoRA": ("#0072B2", "o"),
    "LoRA_qkv": ("#56B4E9", "h"),
    "TABuv": ("#D55E00", "D"),
    "TAB": ("#009E73", "s"),
    "TA": ("#009E73", "^"),
    "TB": ("#009E73", "v"),
    "Tuv": ("#CC79A7", "P"),
    "TAuv": ("#E69F00", "<"),
    "TBuv": ("#E69F00", ">"),
}
OTHER = ("#7f7f7f", "X")
PEER = ("#7f7f7f", "*")
PANELS = 12
"""A figure shows at most so many panels; more settings would be unreadable, and the tables hold them all."""
RC = {
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

Panels = dict[tuple[str, str, str], Any]


def draw(rows: Sequence[Row], peers: Sequence[Peer], out: Path) -> list[tuple[str, str, str]]:
    """Write every figure to `out`.

    Returns:
        (name, caption, SVG text with its ids made unique) of each, for the page.
    """
    primary = [row for row in rows if row.primary and row.score is not None]
    if not primary:
        return []
    panels: Panels = defaultdict(list)
    for row in primary:
        panels[row.cell.model, row.cell.task, row.cell.variant].append(row)
    kept = dict(list(panels.items())[:PANELS])
    more = f" The first {PANELS} of {len(panels)} settings." if len(panels) > PANELS else ""
    out.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(RC):
        return [
            _save(out, name, caption + more, figure())
            for name, caption, figure in (
                ("pareto", _PARETO, lambda: pareto(kept, peers)),
                ("rank", _RANK, lambda: _small_multiples(kept, _rank_panel, "rank r", "score (points of 100)")),
                ("curves", _CURVES, lambda: _small_multiples(kept, _curve_panel, "step", "validation loss")),
                ("cost", _COST, lambda: cost([row.cell for rows in kept.values() for row in rows])),
            )
        ]


_PARETO = (
    "Score against trainable parameters. Filled markers joined by the line are not beaten by anything with as few "
    "parameters (the Pareto front); bars are 95 % intervals over examples."
)
_RANK = "Score against rank, by configuration; bars are 95 % intervals over examples."
_CURVES = "Validation loss by step: the mean over seeds, and their range where there are several."
_COST = "Training speed, peak memory and adapter size, means over the chosen runs of all tasks and seeds."


def _save(out: Path, name: str, caption: str, figure: Figure) -> tuple[str, str, str]:
    figure.savefig(out / f"{name}.png", dpi=160, facecolor="white")
    # No date: the same runs give the same bytes.
    figure.savefig(out / f"{name}.svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    text = (out / f"{name}.svg").read_text(encoding="utf-8")
    text = text[text.index("<svg") :]
    for pattern in (r'id="', r"url\(#", r'href="#'):
        text = re.sub(pattern, lambda match: f"{match[0]}{name}-", text)
    return name, caption, text


def style(cell: Cell) -> tuple[str, str]:
    """Colour and marker of a configuration, the same in every figure."""
    return STYLES.get(cell.label, OTHER)


def _small_multiples(
    panels: Panels, fill: Callable[[Axes, list[Row]], None], x: str, y: str, right: float = 0.0
) -> Figure:
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.4 * columns + 1.6, 3.4 * lines), squeeze=False, layout="constrained"
    )
    handles: dict[str, Any] = {}
    for ax, ((model, task, variant), rows) in zip(axes.flat, panels.items(), strict=False):
        fill(ax, rows)
        ax.set_title(f"{task}, {model}" + (f"\n{variant[:60]}" if variant else ""), fontsize=9)
        ax.set_xlabel(x)
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for line in axes:
        line[0].set_ylabel(y)
    figure.legend(handles.values(), handles.keys(), loc="outside right center")
    return figure


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Numbers of the points (parameters, score) that no other reaches with as few parameters, by parameters."""
    kept, best = [], -math.inf
    for number in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[number][1] > best:
            kept.append(number)
            best = points[number][1]
    return kept


def pareto(panels: Panels, peers: Sequence[Peer]) -> Figure:
    """Score against trainable parameters with the front; peers from PEFT's comparison in a panel of their own."""

    def fill(ax: Axes, rows: list[Any]) -> None:
        if isinstance(rows[0], Peer):
            _peer_panel(ax, rows)
            return
        places = [(row.cell.params, 100 * row.score.value) for row in rows]
        best = front(places)
        ax.plot(*zip(*[places[i] for i in best], strict=True), color=INK, linewidth=1, alpha=0.6, zorder=1)
        for number, row in enumerate(rows):
            colour, marker = style(row.cell)
            _errorbar(ax, row, places[number][0], filled=number in best)
            del colour, marker
        ax.set_xscale("log")

    shown: Panels = dict(panels)
    if peers:
        shown["PEFT method_comparison, published", "MetaMathQA to GSM8K", ""] = list(peers)
    return _small_multiples(shown, fill, "trainable parameters (log)", "score (points of 100)")


def _peer_panel(ax: Axes, peers: Sequence[Peer]) -> None:
    places = [(peer.params, 100 * peer.accuracy) for peer in peers if peer.params > 0]
    best = front(places)
    ax.plot(*zip(*[places[i] for i in best], strict=True), color=INK, linewidth=1, alpha=0.6, zorder=1)
    ax.scatter(*zip(*places, strict=True), color=PEER[0], marker=PEER[1], s=40, label="PEFT (published, 1 seed)", zorder=2)
    for number in best:
        ax.annotate(peers[number].method, places[number], fontsize=6, xytext=(3, -7), textcoords="offset points")
    ax.set_xscale("log")


def _errorbar(ax: Axes, row: Row, x: float, filled: bool = True) -> None:
    assert row.score is not None
    colour, marker = style(row.cell)
    interval = row.score.examples
    value = 100 * row.score.value
    # A bootstrap bound can lie a hair beyond the mean it belongs to; matplotlib refuses negative lengths.
    error = None
    if interval is not None:
        error = [[max(0.0, value - 100 * interval.low)], [max(0.0, 100 * interval.high - value)]]
    ax.errorbar(
        *([x], [value], error),
        color=colour,
        marker=marker,
        markersize=7,
        markerfacecolor=colour if filled else "none",
        linestyle="none",
        elinewidth=1,
        capsize=2,
        label=row.cell.configuration[:32],
    )


def _rank_panel(ax: Axes, rows: list[Row]) -> None:
    by_name: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_name[row.cell.configuration].append(row)
    ranks = sorted({row.cell.rank for row in rows})
    for place, (_, same) in enumerate(sorted(by_name.items())):
        # A small shift keeps the bars of configurations with equal ranks apart.
        shift = 1 + 0.03 * (place - len(by_name) / 2)
        same.sort(key=lambda row: row.cell.rank)
        for row in same:
            _errorbar(ax, row, row.cell.rank * shift)
        ax.plot(
            [row.cell.rank * shift for row in same],
            [100 * row.score.value for row in same if row.score],
            color=style(same[0].cell)[0],
            linewidth=1,
            alpha=0.7,
        )
    ax.set_xscale("log", base=2)
    ax.set_xticks(ranks, [str(rank) for rank in ranks])
    ax.minorticks_off()
    if len(ranks) == 1:
        ax.set_xlim(ranks[0] / 1.5, ranks[0] * 1.5)


def _curve_panel(ax: Axes, rows: list[Row]) -> None:
    widest = max(row.cell.rank for row in rows)
    for row in rows:
        curves = [run.curve("validation/loss") for run in row.cell.runs]
        steps = next((steps for steps, _ in curves if steps), [])
        same = np.array([values for own, values in curves if own == steps and steps])
        if not len(same):
            continue
        colour, marker = style(row.cell)
        # Ranks of one configuration share a colour: the higher the rank, the thicker.
        width = 0.8 + 1.2 * math.log2(1 + row.cell.rank) / math.log2(1 + widest)
        ax.plot(
            *(steps, same.mean(0)),
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=width,
            label=row.cell.configuration[:32],
        )
        if len(same) > 1:
            ax.fill_between(steps, same.min(0), same.max(0), color=colour, alpha=0.15, linewidth=0)


def cost(cells: Sequence[Cell]) -> Figure:
    """Three bar charts over configurations and ranks."""
    by_name: dict[tuple[str, int], list[Cell]] = defaultdict(list)
    for cell in cells:
        by_name[cell.label, cell.rank].append(cell)
    names = sorted(by_name, key=lambda name: (name[1], by_name[name][0].params))
    measures = (
        ("training tokens/s", lambda run: run.record["training"]["tokens_per_s"]),
        ("peak memory, GiB", lambda run: run.record["training"]["peak_memory_bytes"] / 2**30),
        ("adapter, MiB", lambda run: run.record["adapter_bytes"] / 2**20),
    )
    figure, axes = plt.subplots(
        1, 3, figsize=(12, 1.2 + 0.28 * len(names)), sharey=True, squeeze=False, layout="constrained"
    )
    for ax, (title, measure) in zip(axes[0], measures, strict=True):
        values = [np.mean([measure(run) for cell in by_name[name] for run in cell.runs]) for name in names]
        ax.barh(range(len(names)), values, color=[style(by_name[name][0])[0] for name in names], height=0.7)
        ax.set_yticks(range(len(names)), [f"{label[:24]} r={rank}" for label, rank in names])
        ax.set_xlabel(title)
        ax.grid(axis="y", visible=False)
        for place, value in enumerate(values):
            ax.annotate(f"{value:,.3g}" if value < 100 else f"{value:,.0f}", (value, place), fontsize=7,
                        xytext=(3, 0), textcoords="offset points", va="center")
        ax.margins(x=0.15)
    axes[0][0].invert_yaxis()
    return figure

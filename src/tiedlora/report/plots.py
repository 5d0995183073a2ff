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
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from tiedlora.report.cells import Cell
from tiedlora.report.compare import Row
from tiedlora.report.peft_results import Peer
from tiedlora.report.runs import Run

INK = "#1b1b1d"
"""Text and axes. The page turns exactly this colour into its own text colour, so that figures serve both themes."""
# Okabe and Ito's palette without black and yellow (each invisible on one of the two backgrounds): a colour a family,
# and within it a marker and a dash of its own, so that a grey print still tells them apart.
STYLES = {
    "LoRA": ("#0072B2", "o", "-"),
    "LoRA_qkv": ("#56B4E9", "h", "-"),
    "TABuv": ("#D55E00", "D", "-"),
    "TAB": ("#009E73", "s", "-"),
    "TA": ("#009E73", "^", "--"),
    "TB": ("#009E73", "v", ":"),
    "Tuv": ("#CC79A7", "P", "-"),
    "TAuv": ("#E69F00", "<", "--"),
    "TBuv": ("#E69F00", ">", ":"),
}
OTHER = ("#7f7f7f", "X", "-.")
PEER = ("#7f7f7f", "*")
PANELS = 12
"""A figure shows at most so many panels; more settings would be unreadable, and the tables hold them all."""
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
            _save(out, "pareto", _PARETO + more, pareto(kept, peers)),
            _save(out, "rank", _RANK + more, _small_multiples(kept, _rank_panel, "rank r", "score (points of 100)")),
            _save(out, "curves", _CURVES + more, _small_multiples(kept, _curve_panel, "step", "validation loss")),
            _cost(out, kept),
        ]


_PARETO = (
    "Score against trainable parameters. Filled markers joined by the line are not beaten by anything with as few "
    "parameters (the Pareto front); bars are 95 % intervals over examples."
)
_RANK = "Score against rank, by configuration; bars are 95 % intervals over examples."
_CURVES = "Validation loss by step: the mean over seeds, and their range where there are several."
_COST = "Training speed, peak memory and adapter size on {}: means over the chosen runs. The table has every setting."


def _save(out: Path, name: str, caption: str, figure: Figure) -> tuple[str, str, str]:
    # The layout is half of the time: made once, it serves both files.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    figure.savefig(out / f"{name}.png", dpi=160, facecolor="white")
    # No date: the same runs give the same bytes.
    figure.savefig(out / f"{name}.svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    text = (out / f"{name}.svg").read_text(encoding="utf-8")
    text = text[text.index("<svg") :]
    for pattern in (r'id="', r"url\(#", r'href="#'):
        text = re.sub(pattern, lambda match: f"{match[0]}{name}-", text)
    return name, caption, text


def _cost(out: Path, panels: Panels) -> tuple[str, str, str]:
    """Costs compare within a setting only: the one with the most cells is drawn."""
    (model, task, variant), rows = max(panels.items(), key=lambda item: len(item[1]))
    where = f"{task}, {model}" + (f" ({variant})" if variant else "")
    return _save(out, "cost", _COST.format(where), cost([row.cell for row in rows]))


def style(cell: Cell) -> tuple[str, str, str]:
    """Colour, marker and dash of a configuration, the same in every figure."""
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
        for row in rows:
            if isinstance(row, Row):
                colour, marker, dash = style(row.cell)
                label = row.cell.configuration[:32]
                handles[label] = Line2D([], [], color=colour, marker=marker, linestyle=dash, markersize=6, label=label)  # type: ignore[arg-type]
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for line in axes:
        line[0].set_ylabel(y)
    figure.legend(handles=[handles[label] for label in sorted(handles)], loc="outside right center")
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
            _errorbar(ax, row, places[number][0], filled=number in best)
        _parameters_axis(ax)

    shown: Panels = dict(panels)
    if peers:
        shown["PEFT method_comparison, published", "MetaMathQA to GSM8K", ""] = list(peers)
    return _small_multiples(shown, fill, "trainable parameters (log)", "score (points of 100)")


def _peer_panel(ax: Axes, peers: Sequence[Peer]) -> None:
    by_place = {(float(peer.params), 100 * peer.accuracy): peer.method for peer in peers if peer.params > 0}
    places = list(by_place)
    best = front(places)
    ax.plot(*zip(*[places[i] for i in best], strict=True), color=INK, linewidth=1, alpha=0.6, zorder=1)
    params, scores = zip(*places, strict=True)
    ax.scatter(params, scores, color=PEER[0], marker=PEER[1], s=40, zorder=2)
    last = 0.0
    for number in best:
        # Names of neighbours on the front would cover each other: one a third of a decade is what can be read.
        if params[number] > last * 10**0.35:
            last = params[number]
            ax.annotate(
                by_place[places[number]], places[number], fontsize=6, xytext=(3, -7), textcoords="offset points"
            )
    _parameters_axis(ax)


def _parameters_axis(ax: Axes) -> None:
    """A log axis that says 50k and 2M: powers of ten say little of counts that lie within a decade."""
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    # A single point, or close ones, would leave an axis without a tick.
    if high / low < 4:
        ax.set_xlim(low / 2, high * 2)
    wide = ax.get_xlim()[1] / ax.get_xlim()[0] > 300
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda count, _: short_count(count)))
    ax.xaxis.set_minor_formatter(NullFormatter())


def short_count(count: float) -> str:
    """41,328 -> 41.3k."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"


def _errorbar(ax: Axes, row: Row, x: float, filled: bool = True) -> None:
    assert row.score is not None
    colour, marker, _ = style(row.cell)
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
        colour, marker, dash = style(row.cell)
        # Ranks of one configuration share a colour: the higher the rank, the thicker.
        width = 0.8 + 1.2 * math.log2(1 + row.cell.rank) / math.log2(1 + widest)
        ax.plot(
            *(steps, same.mean(0)),
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=width,
            linestyle=dash,
        )
        if len(same) > 1:
            ax.fill_between(steps, same.min(0), same.max(0), color=colour, alpha=0.15, linewidth=0)


def cost(cells: Sequence[Cell]) -> Figure:
    """Three bar charts over the cells of one setting."""
    cells = sorted(cells, key=lambda cell: (cell.rank, cell.params))
    measures: tuple[tuple[str, Callable[[Run], float]], ...] = (
        ("training tokens/s", lambda run: run.record["training"]["tokens_per_s"]),
        ("peak memory, GiB", lambda run: run.record["training"]["peak_memory_bytes"] / 2**30),
        ("adapter, MiB", lambda run: run.record["adapter_bytes"] / 2**20),
    )
    figure, axes = plt.subplots(
        1, 3, figsize=(12, 1.2 + 0.28 * len(cells)), sharey=True, squeeze=False, layout="constrained"
    )
    for ax, (title, measure) in zip(axes[0], measures, strict=True):
        values = [np.mean([measure(run) for run in cell.runs]) for cell in cells]
        ax.barh(range(len(cells)), values, color=[style(cell)[0] for cell in cells], height=0.7)
        ax.set_yticks(range(len(cells)), [f"{cell.configuration[:24]} r={cell.rank}" for cell in cells])
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

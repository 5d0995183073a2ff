"""The panels of the figures. Each shows one setting, in colours that colour-blind readers can tell apart."""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from tiedlora.analysis import forest
from tiedlora.analysis.compare import ResultRow
from tiedlora.analysis.forest import ShareAxis
from tiedlora.analysis.groups import RunGroup
from tiedlora.analysis.shares_by_size import SizePanel

INK = "#1b1b1d"
"""The colour of text and axes."""
# Okabe and Ito's palette without black and yellow, each of which is invisible on one of the two backgrounds. A family
# has one colour, and each configuration has its own marker and dash, so that they differ in a grey print too.
STYLES = {
    "LoRA": ("#0072B2", "o", "-"),
    "LoRA_qkv": ("#56B4E9", "h", "-"),
    "TABuv": ("#D55E00", "D", "-"),
    "TABuv_v0": ("#D55E00", "d", "-."),
    "TAB": ("#009E73", "s", "-"),
    "TA": ("#009E73", "^", "--"),
    "TB": ("#009E73", "v", ":"),
    "Tuv": ("#CC79A7", "P", "-"),
    "TAuv": ("#E69F00", "<", "--"),
    "TBuv": ("#E69F00", ">", ":"),
}
COLOURS = ("#0072B2", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#7f7f7f")
"""Every colour of a series. The page has a class for each, k0 to k6, with a lighter one for its dark theme."""
OTHERS = [(colour, marker, dash) for marker, dash in (("X", "-."), ("p", "--"), ("H", ":")) for colour in COLOURS]
"""The styles of all other configurations: one of these, which follows from the name."""


def style(group: RunGroup) -> tuple[str, str, str]:
    """The colour, marker and dash of a configuration. They are the same in every figure."""
    return STYLES.get(group.label) or OTHERS[zlib.crc32(group.label.encode("utf-8", "replace")) % len(OTHERS)]


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The indices of the points (parameters, score) on the Pareto front, sorted by parameters."""
    kept, best = [], -math.inf
    for number in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[number][1] > best:
            kept.append(number)
            best = points[number][1]
    return kept


def pareto_panel(ax: Axes, rows: list[ResultRow]) -> None:
    places = [(row.group.params, _shown(row)) for row in rows]
    best = front([(params, row.measure.sign * value) for row, (params, value) in zip(rows, places, strict=True)])
    ax.plot(*zip(*(places[number] for number in best), strict=True), color=INK, linewidth=1, alpha=0.6, zorder=1)
    for number, row in enumerate(rows):
        _errorbar(ax, row, places[number][0], filled=number in best)
        for score in row.published:
            colour = style(row.group)[0]
            ax.scatter(
                row.group.params,
                row.measure.unit.factor * score.value,
                marker="*",
                s=130,
                facecolors="none",
                edgecolors=colour,
            )
    axis_of_counts(ax)


def axis_of_counts(ax: Axes) -> None:
    """A log axis with labels such as 50k and 2M. Powers of ten would say little about counts within a decade."""
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    # With a single point, or with close points, the axis would have no tick.
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


def _shown(row: ResultRow) -> float:
    """The score in the unit of the axis."""
    assert row.score is not None
    return row.measure.unit.factor * row.score.value


def _errorbar(ax: Axes, row: ResultRow, x: float, filled: bool = True) -> None:
    assert row.score is not None
    colour, marker, _ = style(row.group)
    interval, factor, value = row.score.examples, row.measure.unit.factor, _shown(row)
    # By rounding, a bound can lie beyond its mean, but matplotlib refuses negative lengths.
    error = None
    if interval is not None:
        error = [[max(0.0, value - factor * interval.low)], [max(0.0, factor * interval.high - value)]]
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


def share_panel(ax: Axes, panel: SizePanel, axis: ShareAxis) -> None:
    ax.axhline(1, color=INK, linewidth=1, alpha=0.6, zorder=1)
    for arms in panel.lines():
        colour, marker, _ = style(arms[0].group)
        shown = [axis.nearest(arm.share.value) for arm in arms]
        ax.plot([arm.group.params for arm in arms], shown, color=colour, linewidth=1, alpha=0.7, zorder=2)
        for arm, value in zip(arms, shown, strict=True):
            params, share = arm.group.params, arm.share
            if math.isfinite(share.low) and arm.group is not panel.reference:
                ax.plot([params, params], [share.low, share.high], color=colour, linewidth=1, zorder=2)
            is_beyond = value != share.value
            face = "white" if is_beyond else colour
            ax.plot([params], [value], color=colour, marker=marker, markersize=6, markerfacecolor=face, clip_on=False)
            if is_beyond:
                ax.annotate(
                    forest.percent(share.value) + " %",
                    *((params, value), (7, -3)),
                    textcoords="offset points",
                    fontsize=7,
                )
    ax.set_ylim(axis.low, axis.high)
    ax.set_yticks(axis.ticks, [f"{100 * tick:.0f} %" for tick in axis.ticks])
    axis_of_counts(ax)


def rank_ticks(ranks: Sequence[int]) -> list[int]:
    """The ranks that a log axis names. Of close ones, whose labels would overlap, it names a power of two."""
    kept: list[int] = []
    for rank in sorted(ranks, key=lambda rank: (rank.bit_count() != 1, rank)):
        if all(max(rank, other) >= 1.2 * min(rank, other) for other in kept):
            kept.append(rank)
    return sorted(kept)


def rank_panel(ax: Axes, rows: list[ResultRow]) -> None:
    by_name: dict[str, list[ResultRow]] = defaultdict(list)
    for row in rows:
        by_name[row.group.configuration].append(row)
    ranks = sorted({row.group.rank for row in rows})
    for place, (_, of_name) in enumerate(sorted(by_name.items())):
        # A small shift separates the bars of configurations with equal ranks.
        shift = 1 + 0.03 * (place - len(by_name) / 2)
        of_name.sort(key=lambda row: row.group.rank)
        for row in of_name:
            _errorbar(ax, row, row.group.rank * shift)
        ax.plot(
            [row.group.rank * shift for row in of_name],
            [_shown(row) for row in of_name],
            color=style(of_name[0].group)[0],
            linewidth=1,
            alpha=0.7,
        )
    ax.set_xscale("log", base=2)
    ticks = rank_ticks(ranks)
    ax.set_xticks(ticks, list(map(str, ticks)))
    ax.minorticks_off()
    if len(ranks) == 1:
        ax.set_xlim(ranks[0] / 1.5, ranks[0] * 1.5)


def curve_panel(ax: Axes, rows: list[ResultRow]) -> None:
    widest = max(row.group.rank for row in rows)
    for row in rows:
        curves = [run.curve("validation/loss") for run in row.group.runs]
        steps = next((steps for steps, _ in curves if steps), [])
        losses = np.array([values for own_steps, values in curves if own_steps == steps and steps])
        if not len(losses):
            continue
        colour, marker, dash = style(row.group)
        # Ranks of one configuration have the same colour. A higher rank has a thicker line.
        width = 0.8 + 1.2 * math.log2(1 + row.group.rank) / math.log2(1 + widest)
        ax.plot(
            *(steps, losses.mean(0)),
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=width,
            linestyle=dash,
        )
        if len(losses) > 1:
            ax.fill_between(steps, losses.min(0), losses.max(0), color=colour, alpha=0.15, linewidth=0)

"""The forest plot as a file: the lines that the page shows, drawn with matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from tiedlora.analysis.forest import ForestGroup, ForestLine, ShareAxis, axis
from tiedlora.page.panels import INK

COLOURS = {"supported": "#00674a", "contradicted": "#b23b00", "undecided": "#8a6d00", "uninformative": "#6f6f6f"}
MARKERS = {"supported": "o", "contradicted": "D", "undecided": "o", "uninformative": "s"}
ZONE = "#4fa884"
LONGEST = 76
"""The most characters of a claim's name over its lines."""


def height(groups: Sequence[ForestGroup]) -> int:
    """The lines of the panel, claims included."""
    return sum(1 + len(group.lines) for group in groups)


def forest_panel(ax: Axes, groups: Sequence[ForestGroup]) -> None:
    """Draw every claim with its lines, from top to bottom."""
    scale = axis([line for group in groups for line in group.lines])
    across = ax.get_yaxis_transform()
    place, ticks = 0, []
    for group in groups:
        name = group.claim if len(group.claim) <= LONGEST else f"{group.claim[: LONGEST - 3]}..."
        ax.text(0.0, place, name, transform=across, va="center", fontsize=9, fontweight="bold", color=INK)
        place += 1
        for line in group.lines:
            _line(ax, line, place, scale)
            ticks.append((place, line.task if len(line.task) <= 22 else f"{line.task[:19]}..."))
            place += 1
    ax.set_ylim(place - 0.4, -0.7)
    ax.set_yticks([tick for tick, _ in ticks], [task for _, task in ticks])
    ax.tick_params(axis="y", length=0)
    ax.set_xlim(scale.low, scale.high)
    ax.set_xticks(list(scale.ticks), [f"{100 * tick:.0f} %" for tick in scale.ticks])
    ax.set_xlabel("share of the comparator's gain that is kept (0 %: base, 100 %: comparator)")
    ax.grid(visible=False)
    ax.spines["left"].set_visible(False)
    # Lines to compare with stand only beside the bars, so that they do not cross the claims' names.
    rows = np.array([tick for tick, _ in ticks])
    for tick in scale.ticks:
        weight = 0.9 if tick in (0.0, 1.0) else 0.4
        alpha = 0.55 if tick in (0.0, 1.0) else 0.3
        ax.vlines([tick] * len(rows), rows - 0.5, rows + 0.5, color=INK, linewidth=weight, alpha=alpha, zorder=1)


def _line(ax: Axes, line: ForestLine, place: int, scale: ShareAxis) -> None:
    colour = COLOURS[line.verdict]
    words = f"{line.in_words}  {line.verdict}"
    ax.text(1.02, place, words, transform=ax.get_yaxis_transform(), va="center", fontsize=8.5, color=colour)
    if line.zone is not None:
        low, high = max(line.zone[0], scale.low), min(line.zone[1], scale.high)
        ax.fill_between([low, high], place - 0.42, place + 0.42, color=ZONE, alpha=0.22, linewidth=0, zorder=0)
    if line.share is None:
        return
    if not math.isnan(line.share.low):
        low, high = max(line.share.low, scale.low), min(line.share.high, scale.high)
        dash = "-" if line.is_firm else "--"
        ax.plot([low, high], [place, place], color=colour, linewidth=1.8, linestyle=dash, solid_capstyle="butt")
        for end, is_cut, marker in (
            (scale.low, min(line.share.low, line.share.value) < scale.low, "<"),
            (scale.high, max(line.share.high, line.share.value) > scale.high, ">"),
        ):
            if is_cut:
                ax.plot([end], [place], marker=marker, color=colour, markersize=6, clip_on=False)
    is_filled = line.is_firm and line.verdict != "undecided"
    value = line.share.value
    if not scale.low <= value <= scale.high:
        return
    ax.plot(
        *([value], [place]),
        marker=MARKERS[line.verdict],
        markersize=6.5,
        markeredgecolor=colour,
        markerfacecolor=colour if is_filled else "white",
        markeredgewidth=1.5,
        linestyle="none",
        clip_on=False,
        zorder=3,
    )

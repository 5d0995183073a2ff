"""The charts: which ones a report has, and what each draws on an Axes from the analysis' values."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression
from scipy.spatial.distance import cdist

from tiedlora.analysis import shares
from tiedlora.analysis.groups import RunGroup
from tiedlora.analysis.over_steps import LeadAtStep
from tiedlora.analysis.ranking import RankedArm
from tiedlora.analysis.results import ResultRow
from tiedlora.analysis.runs import Measure, logged_curves
from tiedlora.analysis.shares import ShareAxis, SharePanel
from tiedlora.page import ranked
from tiedlora.page.figures import BACK, INK, SOFT, Panel, cut, order, style
from tiedlora.page.tables import minus
from tiedlora.page.tracks import better_right
from tiedlora.records.interval import Interval
from tiedlora.records.loss_metrics import is_loss
from tiedlora.text import visible

MOST_COLUMNS = 3
"""The most tasks beside each other in a figure of differences."""
COLUMN = 2.35
"""Inches of each of them."""
MOST_LINES = 8
"""The most configurations of a chart with lines. More could not be told apart; their numbers are in the tables."""
LONGEST = 32
"""The most characters of a name at the left of an axis."""
WIDE = 3
"""Losses that are further apart than this factor have a logarithmic axis."""
WITH_NAMES = (0.62, 1.1, 0.5, 0.12)
"""The margins of a panel with names at the right ends of lines."""
OVER_STEPS = (0.8, *WITH_NAMES[1:])
"""The same, with room for numbers such as -0.025 at the left."""


def panels(
    rows: Sequence[ResultRow],
    rankings: Sequence[Sequence[RankedArm]],
    share_panels: Sequence[SharePanel],
    leads: Sequence[Sequence[LeadAtStep]],
) -> list[Panel]:
    """Every panel of a report, by model and in the page's order."""
    found = []
    for model in dict.fromkeys(row.group.model for row in rows):
        found += _against_lora(model, [ranking for ranking in rankings if ranking[0].group.model == model])
        found += _over_steps(model, [lead for lead in leads if lead[0].group.model == model])
        for panel in (panel for panel in share_panels if panel.reference.model == model):
            draw = partial(draw_shares, panel=panel, share_panels=share_panels)
            seeds = [arm.seeds for arm in panel.arms]
            numbers = " to ".join(map(str, sorted({min(seeds), max(seeds)})))
            title = f"{_title(panel.reference, panel.measure)} ({numbers} seeds)"
            found.append(Panel("shares", model, title, draw, [arm.group for arm in panel.arms]))
        # By setting, and the scores also by metric. A loss over steps needs no score.
        scored: dict[tuple[str, str, str], list[ResultRow]] = defaultdict(list)
        trained: dict[tuple[str, str], dict[RunGroup, None]] = defaultdict(dict)
        for row in (row for row in rows if row.group.model == model):
            trained[row.group.task, row.group.variant][row.group] = None
            if row.primary and row.score is not None:
                scored[row.group.task, row.group.variant, row.measure.metric].append(row)
        for own in scored.values():
            title, draw = _title(own[0].group, own[0].measure), partial(draw_pareto, rows=own)
            found.append(Panel("pareto", model, title, draw, [row.group for row in own]))
        for groups in trained.values():
            found += [*_curves(model, sorted(groups, key=order)), *_search(model, sorted(groups, key=order))]
    return found


def _first(title: str, groups: Sequence[Any]) -> str:
    """The title of a panel that has room for the first MOST_LINES of these, and says of how many."""
    return f"{title} ({MOST_LINES} of {len(groups)})" if len(groups) > MOST_LINES else title


def _title(group: RunGroup, measure: Measure) -> str:
    return f"{group.task_in_words}, {measure.metric.replace('_', ' ')}"


# --- Every adapter against LoRA of its size.


def _against_lora(model: str, rankings: Sequence[Sequence[RankedArm]]) -> list[Panel]:
    """Panels of at most MOST_COLUMNS tasks, with the same rows; none without LoRA."""
    drawn = [
        [arm for arm in ranking if arm.difference is not None and not arm.group.is_control] for ranking in rankings
    ]
    drawn = [arms for arms in drawn if arms]
    found = []
    for start in range(0, len(drawn), MOST_COLUMNS):
        columns = drawn[start : start + MOST_COLUMNS]
        arms: dict[tuple[int, str, int], list[RankedArm]] = {}
        for arm in itertools.chain.from_iterable(columns):
            arms.setdefault((arm.group.params, arm.group.configuration, arm.group.rank), []).append(arm)
        rows = {key: _row_name(arms[key]) for key in sorted(arms, reverse=True)}
        left = 0.3 + 0.062 * max(map(len, rows.values()))
        size = (left + COLUMN * len(columns), 1.15 + 0.24 * len(rows))
        draw = partial(draw_against_lora, columns=columns, rows=rows)
        found.append(Panel("against", model, "", draw, (), size, (left, 0.1, 0.75, 0.4)))
    return found


def draw_against_lora(
    ax: Axes, columns: Sequence[Sequence[RankedArm]], rows: Mapping[tuple[int, str, int], str]
) -> None:
    """A row for each adapter, the largest one at the top, and a column for each task with its own axis.

    Better is to the right, also where a lower number is better. Each line is the interval of the verdict, or one of 95
    % where none is about it. A filled marker holds by Holm's procedure.

    Args:
        rows: an arm's parameters, configuration and rank -> its name, from top to bottom.
    """
    ax.set_axis_off()
    part, places = 1 / len(columns), {key: place for place, key in enumerate(rows)}
    for number, arms in enumerate(columns):
        own = ax.inset_axes((part * number, 0, 0.9 * part, 1))
        measure, factor = arms[0].measure, arms[0].measure.unit.factor
        low, high = (factor * end for end in ranked.difference_axis(arms))
        own.axvline(0, color=SOFT, linewidth=1, zorder=1)
        for arm in arms:
            assert arm.difference is not None
            row = places[arm.group.params, arm.group.configuration, arm.group.rank]
            _difference_line(own, row, _scaled(better_right(arm.difference, measure.sign), factor), (low, high), arm)
        own.set(xlim=(low, high), ylim=(len(places) - 0.4, -0.6), yticks=range(len(places)), yticklabels=[])
        own.tick_params(axis="y", length=0, pad=9)
        if number == 0:
            own.set_yticklabels(list(rows.values()))
        own.xaxis.set_major_locator(MaxNLocator(4))
        # The numbers keep the sign of a loss.
        own.xaxis.set_major_formatter(
            FuncFormatter(lambda x, _, sign=measure.sign: minus(f"{sign * x:+.3g}") if x else "0")
        )
        own.set_xlabel(f"{measure.metric.replace('_', ' ')}, {measure.unit.words}")
        own.set_title(cut(arms[0].group.task_in_words, LONGEST), pad=16)
        zero = -low / (high - low)
        for x, side, word in ((zero - 0.02, "right", "← worse"), (zero + 0.02, "left", "better →")):
            own.text(x, 1.01, word, transform=own.transAxes, ha=side, va="bottom", color=SOFT, fontsize=8)


def _difference_line(ax: Axes, row: int, found: Interval, ends: tuple[float, float], arm: RankedArm) -> None:
    colour, marker, _ = style(arm.group.arm)
    low, high = ends
    if not math.isnan(found.low):
        ax.plot([max(low, found.low), min(high, found.high)], [row, row], color=colour, linewidth=1.8, zorder=2)
    for is_beyond, end, arrow in ((found.low < low, low, "<"), (found.high > high, high, ">")):
        if is_beyond:
            ax.plot([end], [row], arrow, color=colour, markersize=4, clip_on=False)
    if low <= found.value <= high:
        _mark(ax, found.value, row, colour=colour, marker=marker, is_filled=arm.holds)


def _row_name(arms: Sequence[RankedArm]) -> str:
    """Such as `TABuv r 8 (41,328)`, with the size of the LoRA that it is compared with where that is another.

    Args:
        arms: the arm in each of the columns that have it.
    """
    group = arms[0].group
    # On another task the nearest LoRA may be another one.
    sizes = ["its size" if arm.has_equal_size else f"{arm.lora.params:,}" for arm in arms if arm.lora is not None]
    named = list(dict.fromkeys(sizes))
    others = "" if named in ([], ["its size"]) else f"; LoRA: {' or '.join(named)}"
    return f"{cut(group.short, LONGEST)} ({group.params:,}{others})"


def _scaled(found: Interval, factor: float) -> Interval:
    """In the unit of an axis."""
    return Interval(factor * found.value, factor * found.low, factor * found.high)


# --- Scores and shares against parameters.


class Point(NamedTuple):
    """One arm of a chart against parameters."""

    group: RunGroup
    value: Interval
    """In the unit of the axis; its ends are NaN without a bar."""
    is_filled: bool
    name: str


def _against_parameters(ax: Axes, points: Sequence[Point]) -> None:
    """Every arm with its interval and name. A line joins the ranks of a configuration."""
    by_name: dict[str, list[Point]] = defaultdict(list)
    for point in sorted(points, key=lambda point: point.group.params):
        by_name[point.group.configuration].append(point)
    for own in by_name.values():
        colour, marker, _ = style(own[0].group.arm)
        places = [(point.group.params, point.value.value) for point in own]
        ax.plot(*zip(*places, strict=True), color=colour, linewidth=0.8)
        for group, value, is_filled, _ in own:
            ax.plot([group.params] * 2, [value.low, value.high], color=colour, linewidth=1.2, alpha=0.75)
            _mark(ax, group.params, value.value, colour=colour, marker=marker, is_filled=is_filled)
    if not ax.get_xlabel():
        _count_axis(ax, [point.group.params for point in points])
    ordered = sorted(points, key=lambda point: order(point.group))
    _names(ax, [(point.group.params, point.value.value, point.name) for point in ordered])


def _mark(ax: Axes, x: float, y: float, *, colour: str, marker: str, is_filled: bool = True) -> None:
    face = colour if is_filled else BACK
    ax.plot([x], [y], marker=marker, color=colour, markerfacecolor=face, linestyle="", clip_on=False, zorder=3)


def draw_shares(ax: Axes, panel: SharePanel, share_panels: Sequence[SharePanel]) -> None:
    """What each arm keeps of the reference's gain, and the curve of its configuration with its band. The axes are those
    of all panels, so that small differences look small.
    """
    scale = shares.axis(arm.share for each in share_panels for arm in each.arms)
    _count_axis(ax, [arm.group.params for each in share_panels for arm in each.arms])
    margin = 0.02 * (scale.high - scale.low)
    ax.set_ylim(scale.low - margin, scale.high + 4 * margin)
    ax.set_yticks(list(scale.ticks), _percents(scale))
    ax.set_ylabel(f"share of the gain of {cut(panel.reference.short, 20)}")
    ax.axhline(1, color=SOFT, linewidth=0.8, zorder=1)
    colour, _, _ = style(panel.reference.arm)
    params, curve = [arm.group.params for arm in panel.curve], [arm.share for arm in panel.curve]
    # The band is as narrow as the line where there is no interval: at the reference itself, or with one seed.
    bands = [share if math.isfinite(share.low) else Interval(share.value, share.value, share.value) for share in curve]
    ax.fill_between(params, [s.low for s in bands], [s.high for s in bands], color=colour, alpha=0.15, linewidth=0)
    ax.plot(params, [share.value for share in curve], color=colour, linewidth=1.2)
    points = []
    for arm in panel.arms:
        shown = scale.nearest(arm.share.value)
        is_inside = shown == arm.share.value
        value = Interval(shown, math.nan, math.nan)
        if math.isfinite(arm.share.low) and arm.group is not panel.reference:
            value = Interval(shown, scale.nearest(arm.share.low), scale.nearest(arm.share.high))
            # A small arrow where the interval goes on.
            for end, marker in ((arm.share.low, "v"), (arm.share.high, "^")):
                if end != (seen := scale.nearest(end)):
                    ax.plot(arm.group.params, seen, marker, color=style(arm.group.arm)[0], markersize=3)
        name = arm.group.short if is_inside else minus(f"{arm.group.short}, {shares.percent(arm.share.value)} %")
        points.append(Point(arm.group, value, is_inside, name))
    _against_parameters(ax, points)


def draw_pareto(ax: Axes, rows: Sequence[ResultRow]) -> None:
    """Scores against parameters, with the Pareto front."""
    measure, values = rows[0].measure, []
    for row in rows:
        assert row.score is not None
        over_rows = row.score.examples or Interval(row.score.value, math.nan, math.nan)
        values.append(_scaled(replace(over_rows, value=row.score.value), measure.unit.factor))
    best = front([(row.group.params, measure.sign * v.value) for row, v in zip(rows, values, strict=True)])
    corners = [(rows[place].group.params, values[place].value) for place in best]
    ax.plot(*zip(*corners, strict=True), color=SOFT, linewidth=0.8, zorder=1)
    ax.set_ylabel(f"{measure.metric.replace('_', ' ')}, {measure.unit.words}")
    pairs = enumerate(zip(rows, values, strict=True))
    _against_parameters(ax, [Point(row.group, value, i in best, row.group.short) for i, (row, value) in pairs])


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The indices of the points (parameters, score) on the Pareto front, sorted by parameters."""
    ordered = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    best_before = itertools.accumulate((points[i][1] for i in ordered), max, initial=-math.inf)
    return [i for i, before in zip(ordered, best_before, strict=False) if points[i][1] > before]


# --- Training: the lead over LoRA, what was logged by step, and the search of rates.


def _over_steps(model: str, leads: Sequence[Sequence[LeadAtStep]]) -> list[Panel]:
    """A panel for each setting."""
    together: dict[str, list[Sequence[LeadAtStep]]] = defaultdict(list)
    for own in sorted(leads, key=lambda own: order(own[0].group)):
        together[own[0].group.setting].append(own)
    found = []
    for lines in together.values():
        groups = [own[0].group for own in lines]
        title, draw = _first(groups[0].task_in_words, lines), partial(draw_over_steps, lines=lines[:MOST_LINES])
        found.append(Panel("over-steps", model, title, draw, groups[:MOST_LINES], margins=OVER_STEPS))
    return found


def draw_over_steps(ax: Axes, lines: Sequence[Sequence[LeadAtStep]]) -> None:
    """Each arm's loss minus LoRA's, with the band of its intervals. Below the line at 0 the arm is better.

    The axis is as high as the second half of training needs, because the first steps may differ much more.
    """
    ax.axhline(0, color=SOFT, linewidth=1, zorder=1)
    ends = []
    for own in lines:
        colour, marker, dash = style(own[0].group.arm)
        steps, found = [lead.step for lead in own], [lead.difference for lead in own]
        if not math.isnan(found[-1].low):
            ax.fill_between(
                steps, [f.low for f in found], [f.high for f in found], color=colour, alpha=0.15, linewidth=0
            )
        values = [difference.value for difference in found]
        ax.plot(steps, values, color=colour, marker=marker, markevery=[-1], linestyle=dash, linewidth=1.4)
        ends.append(Curve(own[0].group, steps, np.array([values])))
    half = max(lead.step for own in lines for lead in own) / 2
    late = [lead.difference for own in lines for lead in own if lead.step >= half]
    shown = [end for found in late for end in (found.value, found.low, found.high) if not math.isnan(end)]
    margin = 0.1 * (max(0, *shown) - min(0, *shown)) or 0.01
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: minus(f"{y:+.3g}") if y else "0"))
    ax.set(xlabel="step", ylabel="validation loss minus LoRA's, nats")
    ax.set_ylim(min(0, *shown) - margin, max(0, *shown) + margin)
    _names_at_ends(ax, ends)


class Curve(NamedTuple):
    """A line with a value for every seed."""

    group: RunGroup
    steps: Sequence[int]
    values: NDArray[np.float64]
    """(seeds, steps)."""


def _curves(model: str, groups: Sequence[RunGroup]) -> list[Panel]:
    """A panel for each metric of validation that was logged."""
    logged = [(group, [logged_curves(run.path, "validation/") for run in group.runs]) for group in groups]
    found = []
    for metric in dict.fromkeys(name for _, runs in logged for logs in runs for name in logs):
        lines = []
        for group, runs in logged:
            own = [logs[metric] for logs in runs if metric in logs]
            # All seeds have a value at these steps. A run that lost a line of its log has fewer.
            steps = sorted(set.intersection(*map(set, own))) if own else []
            if len(steps) > 1:
                lines.append(Curve(group, steps, np.array([[values[step] for step in steps] for values in own])))
        task = groups[0].task_in_words
        title = _first(task if metric == "validation/loss" else f"{task}, {metric}", lines)
        if lines := lines[:MOST_LINES]:
            in_nats = metric.endswith("/loss") or is_loss(metric.rpartition("/")[2])
            draw = partial(draw_lines, curves=lines, y=metric.replace("/", " "), in_nats=in_nats)
            found.append(Panel("curves", model, title, draw, [line.group for line in lines], margins=WITH_NAMES))
    return found


def draw_lines(ax: Axes, curves: Sequence[Curve], y: str, in_nats: bool) -> None:
    """The mean over seeds, with the band from the lowest to the highest seed.

    Args:
        y: the name of the y axis.
        in_nats: whether the y axis is logarithmic where the values differ much.
    """
    for group, steps, values in curves:
        colour, marker, dash = style(group.arm)
        if len(values) > 1:
            ax.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
        ranks = sorted({curve.group.rank for curve in curves if curve.group.label == group.label})
        # Of one configuration, a higher rank has a thicker line.
        width = 1.4 if len(ranks) == 1 else 1.0 + 1.2 * ranks.index(group.rank) / (len(ranks) - 1)
        ax.plot(steps, values.mean(0), color=colour, marker=marker, markevery=[-1], linestyle=dash, linewidth=width)
    low, high = (float(end([end(curve.values) for curve in curves])) for end in (np.min, np.max))
    if in_nats and low > 0 and high > WIDE * low:
        _log_axis(ax.yaxis, [low, high], _number, widen=1.1)
    ax.set(xlabel="step", ylabel=visible(y))
    _names_at_ends(ax, curves)


def _search(model: str, groups: Sequence[RunGroup]) -> list[Panel]:
    """A panel, if a group tried several rates."""
    searched = [group for group in groups if len({trial.lr for trial in group.trials}) > 1]
    if not any(trial.loss is not None and trial.loss > 0 for group in searched for trial in group.trials):
        return []
    title, drawn = _first(groups[0].task_in_words, searched), searched[:MOST_LINES]
    return [Panel("search", model, title, partial(draw_search, groups=drawn), drawn)]


def draw_search(ax: Axes, groups: Sequence[RunGroup]) -> None:
    """The last validation loss of every run against its rate. A ring marks the chosen rate.

    The axis is as high as the finished runs need, and logarithmic if they are far apart. Runs with a higher loss and
    those without one stand at its top: the loss of a run that was stopped is that of an early step, which may be ten
    times as high.
    """
    trials = [trial for group in groups for trial in group.trials]
    losses = [trial.loss for trial in trials if trial.loss is not None and trial.loss > 0]
    finished = [trial.loss for trial in trials if trial.loss is not None and trial.ending == "finished"]
    low, high = min(losses), max(finished or losses)
    is_wide, margin = high > WIDE * low, 0.1 * (high - low) or 0.1 * high
    top, names = 1.15 * high if is_wide else high + margin, []
    for place, group in enumerate(groups):
        # A small shift separates the markers of configurations with equal rates.
        shift = 1.045 ** (place - (len(groups) - 1) / 2)
        colour, marker, dash = style(group.arm)
        by_rate: dict[float, dict[int, float]] = defaultdict(dict)
        for trial in group.trials:
            loss = min(trial.loss, top) if trial.loss is not None and trial.loss > 0 else top
            shape = "x" if trial.ending == "failed" else marker
            _mark(ax, trial.lr * shift, loss, colour=colour, marker=shape, is_filled=trial.ending == "finished")
            if trial.ending == "finished":
                by_rate[trial.lr][trial.seed] = loss
        # The chosen rate may have later seeds too, which would make it another mean than that of the choice.
        shared = set.intersection(*map(set, by_rate.values())) if by_rate else set()
        means: dict[float, float] = {}
        for rate in sorted(by_rate) if shared else ():
            means[rate] = float(np.mean([by_rate[rate][seed] for seed in shared]))
        ax.plot([rate * shift for rate in means], list(means.values()), color=colour, linestyle=dash, linewidth=1)
        if group.lr in means:
            ax.plot([group.lr * shift], [means[group.lr]], "o", color=INK, markersize=11, fillstyle="none", zorder=4)
            names.append((group.lr * shift, means[group.lr], group.short))
    _log_axis(ax.xaxis, [trial.lr for trial in trials if trial.lr > 0], _number)
    if is_wide:
        _log_axis(ax.yaxis, [low, top], _number, widen=1.15)
    else:
        ax.set_ylim(low - margin, top + margin)
    ax.set(xlabel="learning rate", ylabel="last validation loss")
    _names(ax, names)


# --- Axes and names.


def _number(value: float) -> str:
    return f"{value:g}".replace("e-0", "e-")


def _percents(scale: ShareAxis) -> list[str]:
    return [minus(f"{100 * tick:.0f} %") for tick in scale.ticks]


def _log_axis(axis: Any, values: Sequence[float], label: Callable[[float], str], widen: float = 1.3) -> None:
    """A logarithmic axis over positive values, with ticks at 1, 2 and 5, or at fewer places if it is wide."""
    low, high = min(values) / widen, max(values) * widen
    if high / low < 6:
        low, high = low / 1.8, high * 1.8
    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (low, high)})
    subs = (1.0,) if high / low > 300 else (1.0, 3.0) if high / low > 40 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: label(value)))


def _count_axis(ax: Axes, counts: Sequence[float]) -> None:
    _log_axis(ax.xaxis, counts, EngFormatter(sep=""))
    ax.set_xlabel("trainable parameters")


BESIDE = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
"""Where a name may stand beside its point: the directions to the right and up."""
GAPS = (0.06, 0.2, 0.35, 0.5)
"""How far from its point a name may stand, in inches. From the second one on, a thin line joins them."""


def _names(ax: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Write names beside points, where they cover no line, marker or other name. The first points' names come first."""
    ax.autoscale_view()
    # The pixels of an inch.
    inch = ax.figure.dpi
    room, drawn = ax.get_window_extent().padded(0.08 * inch), _drawn(ax)
    solid = ax.transData.transform([(x, y) for x, y, _ in points])
    for x, y, name in points:
        text = ax.annotate(cut(name, 28), (x, y), (0, 0), textcoords="offset points", fontsize=7.5, va="center")
        size, at = np.asarray(text.get_window_extent().size), ax.transData.transform((x, y))
        for gap, (across, up) in itertools.product(inch * np.array(GAPS), BESIDE):
            middle = at + np.array([across * (gap + size[0] / 2), up * (gap / 2 + size[1] / 2)])
            box = Bbox([middle - size / 2, middle + size / 2])
            is_free = room.contains(*box.min) and room.contains(*box.max)
            wide = box.padded(0.02 * inch)
            is_free = is_free and not ((drawn > wide.min) & (drawn < wide.max)).all(1).any()
            # A name farther away needs a line to its marker, which may cross lines, but no other marker or name.
            edge = middle - np.array([across, up]) * size / 2
            line = np.linspace(edge, at, 40)
            others = solid[np.abs(solid - at).max(1) > 1]
            # From a marker that has another one beside it, a line may still lead away.
            is_clear = (cdist(line, others) >= np.minimum(cdist([at], others), 0.1 * inch) - 1).all()
            is_far = gap > inch * GAPS[0]
            if is_free and (is_clear or not is_far):
                letters = np.mgrid[box.x0 : box.x1 : 3, box.y0 : box.y1 : 3].reshape(2, -1).T
                drawn, solid = np.concatenate([drawn, letters]), np.concatenate([solid, letters])
                text.set_horizontalalignment("right" if across < 0 else "left" if across else "center")
                text.xyann = tuple(72 / inch * np.array([across * gap, middle[1] - at[1]]))
                if is_far:
                    ax.plot(*ax.transData.inverted().transform([at, edge]).T, color=SOFT, linewidth=0.5, zorder=1)
                    drawn = np.concatenate([drawn, line])
                break
        else:
            text.remove()


def _drawn(ax: Axes) -> NDArray[np.float64]:
    """(points, 2): points in pixels along every line that is drawn, so close that no name fits between them."""
    along = []
    for line in ax.lines:
        places = line.get_transform().transform(line.get_xydata())
        along.append(places)
        for start, end in itertools.pairwise(places[np.isfinite(places).all(1)]):
            along.append(np.linspace(start, end, 2 + int(np.abs(end - start).max() / 3)))
    return np.concatenate([points[np.isfinite(points).all(1)] for points in along])


def _names_at_ends(ax: Axes, curves: Sequence[Curve]) -> None:
    """Names at the right of lines. Where ends are close, names keep their order and a distance."""
    last = max(curve.steps[-1] for curve in curves)
    ax.set_xlim(-0.02 * last, 1.02 * last)
    # At most five of the steps that were measured.
    measured = sorted({step for curve in curves for step in curve.steps})
    ax.set_xticks(measured[:: math.ceil(len(measured) / 5)])
    ax.autoscale_view()
    ends = sorted(((c.steps[-1], float(c.values[:, -1].mean()), c) for c in curves), key=lambda end: end[1])
    wanted = np.array([ax.transData.transform((x, y))[1] for x, y, _ in ends])
    inch = ax.figure.dpi
    apart = 0.115 * inch * np.arange(len(ends))
    # None stands below the axes, where the ticks are.
    places = np.maximum(isotonic_regression(wanted - apart).x, ax.bbox.y0) + apart
    for (x, y, curve), up in zip(ends, 72 / inch * (places - wanted), strict=True):
        name = cut(curve.group.short, 20)
        text = ax.annotate(name, (x, y), (6, up), textcoords="offset points", annotation_clip=False)
        text.set(fontsize=7, va="center")

"""The page's charts: score against parameters and rank, losses over steps, the search of rates, and layers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from tiedlora.analysis import adapters
from tiedlora.analysis.adapters import LayerProfile
from tiedlora.analysis.compare import ResultRow
from tiedlora.analysis.estimates import Measure
from tiedlora.analysis.groups import RunGroup
from tiedlora.analysis.runs import Run
from tiedlora.errors import UserError
from tiedlora.page.chart import Axis, Chart, linear_axis, log_axis, marker, number
from tiedlora.page.panels import COLOURS, front, rank_ticks, short_count, style
from tiedlora.records.interval import Unit
from tiedlora.records.loss_metrics import is_loss
from tiedlora.records.rows import read_metrics
from tiedlora.records.run_folder import RunFolder
from tiedlora.text import visible

MOST_LINES = 8
"""The most configurations of a chart with lines. More could not be told apart; their numbers are in the tables."""
FIRST = ("LoRA", "TABuv")
"""The configurations that are drawn first."""


@dataclass(frozen=True)
class Panel:
    """One chart with its title."""

    title: str
    svg: Markup


@dataclass(frozen=True)
class Key:
    """One entry of a legend."""

    svg: Markup
    name: str
    marks: list[str]


def css(group: RunGroup) -> str:
    """The class of a configuration's colour."""
    return f"k{COLOURS.index(style(group)[0])}"


def legend(groups: Iterable[RunGroup]) -> list[Key]:
    """One entry for each configuration and rank of the groups, with its short marks."""
    keys: dict[str, Key] = {}
    for group in groups:
        _, shape, dash = style(group)
        marks = list(dict.fromkeys([*(keys[group.name].marks if group.name in keys else ()), *group.short_marks]))
        keys[group.name] = Key(marker(shape, css(group), dash=dash), visible(group.name), list(map(visible, marks)))
    return list(keys.values())


def task_title(group: RunGroup) -> str:
    """The task, with the variant of its setting."""
    return visible(group.task_in_words)


def by_setting(rows: Sequence[ResultRow], model: str) -> list[list[ResultRow]]:
    """The rows with a score by a first metric, for each setting of the model and each such metric."""
    places: dict[tuple[str, str, str], list[ResultRow]] = defaultdict(list)
    for row in rows:
        if row.primary and row.score is not None and row.group.model == model:
            places[row.group.task, row.group.variant, row.measure.metric].append(row)
    return list(places.values())


def pareto(rows: Sequence[ResultRow]) -> Panel:
    """Score against trainable parameters in one setting, with the Pareto front."""
    unit = rows[0].measure.unit
    params = [float(row.group.params) for row in rows]
    chart = Chart(
        log_axis("trainable parameters", params, short_count),
        _score_axis(rows, [unit.factor * published.value for row in rows for published in row.published]),
        f"Score against trainable parameters on {rows[0].group.task}: {_values(rows)}",
    )
    points = [(params[place], _shown(row)) for place, row in enumerate(rows)]
    best = front([(x, rows[place].measure.sign * y) for place, (x, y) in enumerate(points)])
    chart.line([points[place] for place in best], "front", width=1.1)
    for row, (x, _) in zip(rows, points, strict=True):
        _score_bar(chart, row, x)
    for place, (row, point) in enumerate(zip(rows, points, strict=True)):
        chart.mark(*point, style(row.group)[1], css(row.group), _title(row), filled=place in best)
        for published in row.published:
            chart.mark(point[0], unit.factor * published.value, "*", css(row.group), published.note(), filled=False)
    for row, point in sorted(zip(rows, points, strict=True), key=lambda pair: order(pair[0].group)):
        chart.name(*point, row.group.name)
    return Panel(task_title(rows[0].group), chart.svg())


def ranks(rows: Sequence[ResultRow]) -> Panel | None:
    """Score against rank in one setting; None if there is only one rank."""
    values = sorted({row.group.rank for row in rows})
    if len(values) < 2:
        return None
    ticks = [(float(rank), str(rank)) for rank in rank_ticks(values)]
    axis = Axis("rank r", values[0] / 1.4, values[-1] * 1.4, ticks, is_log=True)
    chart = Chart(axis, _score_axis(rows), f"Score against rank on {rows[0].group.task}: {_values(rows)}")
    by_name: dict[str, list[ResultRow]] = defaultdict(list)
    for row in rows:
        by_name[row.group.configuration].append(row)
    for place, own in enumerate(by_name.values()):
        # A small shift separates the bars of configurations with equal ranks.
        shift = 1 + 0.035 * (place - len(by_name) / 2)
        own.sort(key=lambda row: row.group.rank)
        group = own[0].group
        chart.line([(row.group.rank * shift, _shown(row)) for row in own], css(group), style(group)[2], width=1.2)
        for row in own:
            _score_bar(chart, row, row.group.rank * shift)
            chart.mark(row.group.rank * shift, _shown(row), style(group)[1], css(group), _title(row))
    return Panel(task_title(rows[0].group), chart.svg())


def _score_axis(rows: Sequence[ResultRow], include: Sequence[float] = ()) -> Axis:
    unit = rows[0].measure.unit
    intervals = [row.score.examples for row in rows if row.score is not None and row.score.examples is not None]
    ends = [unit.factor * end for interval in intervals for end in (interval.low, interval.high)]
    values = [*(_shown(row) for row in rows), *ends]
    axis = linear_axis(f"{metric_words(rows[0].measure)}, {unit.words}", values, include)
    if unit is Unit.POINTS:
        # A score has ends, so the axis shows nothing beyond them.
        return Axis(axis.name, max(axis.low, -3.0), min(axis.high, 103.0), axis.ticks)
    return axis


def metric_words(measure: Measure) -> str:
    """The metric's name for an axis or a title."""
    return visible(measure.metric).replace("_", " ")


def _score_bar(chart: Chart, row: ResultRow, x: float) -> None:
    assert row.score is not None
    if (interval := row.score.examples) is not None and not math.isnan(interval.low):
        factor = row.measure.unit.factor
        chart.bar(x, factor * interval.low, factor * interval.high, css(row.group))
        chart.take(x, factor * interval.low, factor * interval.high)


def _shown(row: ResultRow) -> float:
    assert row.score is not None
    return row.measure.unit.factor * row.score.value


def _title(row: ResultRow) -> str:
    unit = row.measure.unit
    marks = f" ({', '.join(row.group.short_marks)})" if row.group.short_marks else ""
    seeds = f"{len(row.seeds)} seed{'s' if len(row.seeds) != 1 else ''}"
    return f"{row.group.name}{marks}: {_shown(row):.{unit.decimals}f}, {row.group.params:,} parameters, {seeds}"


def _values(rows: Sequence[ResultRow]) -> str:
    shown = "; ".join(_title(row) for row in rows[:12])
    return shown + (f"; and {len(rows) - 12} more in the table" if len(rows) > 12 else "")


def order(group: RunGroup) -> tuple[int, int]:
    """The key by which groups are sorted where there is not room for all."""
    return (FIRST.index(group.label) if group.label in FIRST else len(FIRST), group.rank)


def drawn(groups: Sequence[RunGroup]) -> list[RunGroup]:
    """The groups of a setting that charts with lines show."""
    return sorted(groups, key=order)[:MOST_LINES]


def validation_curves(groups: Sequence[RunGroup]) -> list[Panel]:
    """What was logged on validation by step: a panel for the loss, and one for each score that was logged too."""
    logged = {id(group): [_logged(run) for run in group.runs] for group in groups}
    metrics = dict.fromkeys(name for runs in logged.values() for curves in runs for name in curves)
    panels = []
    for metric in metrics:
        tables = []
        for group in groups:
            curves = [curves[metric] for curves in logged[id(group)] if metric in curves]
            steps = curves[0][0] if curves else []
            values = np.array([own for own_steps, own in curves if own_steps == steps])
            if len(steps) > 1:
                tables.append((group, steps, values))
        if tables:
            title = task_title(groups[0]) + ("" if metric == "validation/loss" else f", {visible(metric)}")
            panels.append(Panel(title, _curves(tables, metric)))
    return panels


def _logged(run: Run) -> dict[str, tuple[list[int], list[float]]]:
    """Metric -> steps and values, for every metric of validation in metrics.jsonl."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    try:
        rows = read_metrics(RunFolder(run.path).metrics_file, "validation/")
    except UserError:
        return curves
    for row in rows:
        for name, value in row.values.items():
            if name.startswith("validation/"):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(row.step)
                values.append(float(value))
    return curves


def _curves(tables: Sequence[tuple[RunGroup, list[int], np.ndarray]], metric: str) -> Markup:
    values = [float(value) for _, _, table in tables for value in (table.min(), table.max())]
    last = max(steps[-1] for _, steps, _ in tables)
    name = visible(metric).replace("/", " ")
    is_wide = min(values) > 0 and max(values) > 3 * min(values) and is_nats(metric)
    y = log_axis(name, values, widen=1.1) if is_wide else linear_axis(name, values)
    finals = "; ".join(f"{group.name} ends at {table.mean(0)[-1]:.3g}" for group, _, table in tables)
    chart = Chart(_with_room(linear_axis("step", [0, last])), y, f"{name} by step: {finals}")
    for group, steps, table in tables:
        if len(table) > 1:
            chart.band([float(step) for step in steps], list(table.min(0)), list(table.max(0)), css(group))
    for group, steps, table in tables:
        mean = table.mean(0)
        _, shape, dash = style(group)
        points = [(float(step), float(value)) for step, value in zip(steps, mean, strict=True)]
        chart.line(points, css(group), dash, _width(group, [other for other, _, _ in tables]))
        seeds = f"{len(table)} seed{'s' if len(table) != 1 else ''}"
        chart.mark(float(steps[-1]), float(mean[-1]), shape, css(group), f"{group.name}: {mean[-1]:.4g}, {seeds}")
    for group, steps, table in tables:
        chart.name(float(steps[-1]), float(table.mean(0)[-1]), group.name)
    return chart.svg()


def _with_room(axis: Axis) -> Axis:
    """The axis with room for names at the right ends of lines."""
    return Axis(axis.name, axis.low, axis.high + 0.25 * (axis.high - axis.low), axis.ticks)


def _width(group: RunGroup, others: Sequence[RunGroup]) -> float:
    """The width of a group's lines. Of one configuration, a higher rank has a thicker line."""
    ranks = sorted({other.rank for other in others if other.label == group.label})
    return 1.8 if len(ranks) == 1 else 1.1 + 1.3 * ranks.index(group.rank) / (len(ranks) - 1)


def is_nats(metric: str) -> bool:
    """Whether a logged metric is a loss."""
    return metric.endswith("/loss") or is_loss(metric.rpartition("/")[2])


def search(groups: Sequence[RunGroup]) -> Panel | None:
    """The last validation loss against the rate; None if no group of the setting tried several rates."""
    groups = [group for group in groups if len({trial.lr for trial in group.trials}) > 1]
    losses = [trial.loss for group in groups for trial in group.trials if trial.loss is not None and trial.loss > 0]
    if not losses:
        return None
    rates = [trial.lr for group in groups for trial in group.trials if trial.lr > 0]
    # A diverged loss would flatten everything else, so the axis ends at ten times the median.
    top = min(max(losses), 10 * float(np.median(losses)))
    y = log_axis("last validation loss", [loss for loss in losses if loss <= top], widen=1.15)
    chosen = "; ".join(f"{group.name} chose {group.lr:g} of {len(group.rates)} rates" for group in groups)
    chart = Chart(log_axis("learning rate", rates, number), y, f"Last validation loss by learning rate: {chosen}")
    for place, group in enumerate(groups):
        # A small shift separates the markers of configurations with equal rates.
        shift = 1.045 ** (place - (len(groups) - 1) / 2)
        means = _mean_losses(group)
        points = [(rate * shift, min(loss, y.high)) for rate, loss in means.items()]
        chart.line(points, css(group), style(group)[2], width=1.2)
        for trial in (trial for trial in group.trials if trial.lr > 0):
            loss = y.high if trial.loss is None or not 0 < trial.loss <= y.high else trial.loss
            words = {"pruned": f"stopped after step {trial.step}", "failed": "failed"}.get(trial.state, "finished")
            shown = f"{trial.loss:.4g}" if trial.loss is not None else "no loss"
            shape = "x" if trial.state == "failed" else style(group)[1]
            title = f"{group.name}, rate {trial.lr:g}, seed {trial.seed}: {shown}, {words}"
            chart.mark(trial.lr * shift, loss, shape, css(group), title, filled=trial.state == "finished")
        if group.lr in means:
            chart.ring(group.lr * shift, min(means[group.lr], y.high))
    return Panel(task_title(groups[0]), chart.svg())


def _mean_losses(group: RunGroup) -> dict[float, float]:
    """Rate -> the mean last loss of its finished runs."""
    by_rate: dict[float, list[float]] = defaultdict(list)
    for trial in group.trials:
        if trial.state == "finished" and trial.loss is not None and trial.loss > 0 and trial.lr > 0:
            by_rate[trial.lr].append(trial.loss)
    return {rate: float(np.mean(losses)) for rate, losses in by_rate.items()}


def layers(groups: Sequence[RunGroup]) -> list[Panel]:
    """Norms of u_l and v_l, norms of the updates, and their cosine with LoRA's, by layer; empty without adapters."""
    found = adapters.layer_profiles(groups)
    against = f"cosine with {found.compared_with}"
    panels = [
        _profile(found.u, "‖u‖ by layer", "‖u‖ / √r", include=(1.0,)),
        _profile(found.v, "‖v‖ by layer", "‖v‖ / √d", include=(1.0,)),
        _profile(found.updates, "size of the update by layer", "‖s B A‖", include=(0.0,)),
        _profile(found.cosines, f"{against} by layer", "cosine of the updates", include=(0.0,)),
    ]
    return [panel for panel in panels if panel is not None]


def _profile(profiles: Sequence[LayerProfile], title: str, y_name: str, include: Sequence[float]) -> Panel | None:
    values = [float(value) for profile in profiles for value in profile.values.ravel() if math.isfinite(value)]
    if not values:
        return None
    last = max(profile.layers[-1] for profile in profiles)
    means = "; ".join(f"{profile.name}: {np.nanmean(profile.values):.3g} on average" for profile in profiles)
    chart = Chart(
        _with_room(linear_axis("layer", [0, last])), linear_axis(y_name, values, include), f"{title}. {means}"
    )
    for level in include:
        chart.level(level)
    ends: list[tuple[LayerProfile, tuple[float, float]]] = []
    for profile in profiles:
        colour = "reference" if profile.is_reference else css(profile.group)
        dash = ":" if profile.is_reference else style(profile.group)[2]
        table = profile.values
        xs = [float(layer) for layer in profile.layers]
        if len(table) > 1:
            chart.band(xs, list(table.min(0)), list(table.max(0)), colour)
        points = [point for point in zip(xs, table.mean(0), strict=True) if math.isfinite(point[1])]
        width = 1.4 if profile.is_reference else _width(profile.group, [other.group for other in profiles])
        chart.line(points, colour, dash, width)
        if points and not profile.is_reference:
            seeds = f"{len(table)} seed{'s' if len(table) != 1 else ''}"
            chart.mark(*points[-1], style(profile.group)[1], colour, f"{profile.name}, {seeds}")
        ends += [(profile, points[-1])] if points else []
    for profile, end in ends:
        chart.name(*end, profile.name)
    return Panel(visible(title), chart.svg())

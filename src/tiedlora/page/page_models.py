"""What the page shows of each base model: verdicts, forest, score against parameters, and curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from tiedlora.analysis.claim_verdicts import ClaimVerdict
from tiedlora.analysis.compare import ResultRow
from tiedlora.analysis.forest import ForestGroup, ForestLine, ShareAxis, axis
from tiedlora.analysis.groups import RunGroup
from tiedlora.analysis.shares_by_size import SizePanel
from tiedlora.page import charts, matrix, share_charts
from tiedlora.page.charts import Key, Panel
from tiedlora.page.matrix import ModelVerdicts, minus
from tiedlora.records.interval import Interval
from tiedlora.text import visible

SHAPES = {
    "supported": "M-4.5,0a4.5,4.5 0 1,0 9,0a4.5,4.5 0 1,0 -9,0z",
    "contradicted": "M0,-6l6,6l-6,6l-6,-6z",
    "undecided": "M-4.5,0a4.5,4.5 0 1,0 9,0a4.5,4.5 0 1,0 -9,0z",
    "uninformative": "M-4,-4h8v8h-8z",
}
"""Verdict -> the marker of its line: a circle, a diamond, a hollow circle (by its style), a square."""
FOREST_CAPTION = (
    "0 % is the base model, 100 % the comparator. Shaded: what the claim asks for. A bar inside the shade supports its "
    "claim, a bar outside contradicts it. Bars have the level of the planned look. No verdict can rest on a dashed "
    "one: it is a 95 % interval before the first look, or the comparator's own gain may be 0."
)
PARETO_CAPTION = (
    "Filled markers on the line are not beaten by anything with as few parameters; bars are 95 % intervals over rows, "
    "which all arms share. Hollow stars are published scores."
)
SHARES_CAPTION = (
    "0 % is the base model, 100 % the comparator of the first claim on the task. Bars are 95 % intervals of the paired "
    "difference to it, over seeds and rows; a line joins the ranks of a configuration. A hollow marker lies beyond the "
    "axis. All charts have the same axes."
)
LOSS = "Mean over seeds, with the band from the lowest to the highest seed."
SEARCH = (
    "Last validation loss of every run against its learning rate. Lines join the means of finished runs, a ring marks "
    "the chosen rate, hollow runs were stopped by the search (at their last loss), and crosses failed."
)
LAYERS = (
    "From the adapters' files. Vectors: norm divided by the root of the length, so 1 is where they start. Update: "
    "Frobenius norm. Cosine of the whole update of a layer with LoRA's at the same seed; the dotted line is what two "
    "seeds of LoRA have in common. Bands go from the lowest to the highest seed."
)


@dataclass(frozen=True)
class ShownTick:
    """A tick of the share's axis: its place in per cent of the width, and its label."""

    place: str
    label: str
    name: str
    """What stands there: `base` or `comparator`; otherwise empty."""
    css: str


@dataclass(frozen=True)
class ShownLine:
    """A line of the forest, with places in per cent of the track's width."""

    task: str
    verdict: str
    is_firm: bool
    words: str
    zone: tuple[str, str] | None
    """The left end and the width."""
    point: str | None
    """None if the value is beyond an end of the axis."""
    low: str | None
    high: str | None
    beyond_low: bool
    beyond_high: bool
    shape: str


@dataclass(frozen=True)
class ShownForestGroup:
    claim: str
    lines: list[ShownLine]
    missing: list[tuple[str, list[str]]]
    """Why nothing is drawn, and on which tasks."""


@dataclass(frozen=True)
class ShownForest:
    caption: str
    groups: list[ShownForestGroup]
    ticks: list[ShownTick]


@dataclass(frozen=True)
class ShownModel:
    """One model's part of the first screen."""

    name: str
    verdicts: ModelVerdicts
    forest: ShownForest | None
    shares: list[Panel]
    shares_caption: str
    shares_legend: list[Key]
    pareto: list[Panel]
    pareto_caption: str
    ranks: list[Panel]
    legend: list[Key]


@dataclass(frozen=True)
class CurvePart:
    title: str
    captions: list[str]
    panels: list[Panel]


@dataclass(frozen=True)
class ModelCurves:
    """One model's curves."""

    model: str
    legend: list[Key]
    parts: list[CurvePart] = field(default_factory=list)


def models(
    rows: Sequence[ResultRow], verdicts: Sequence[ClaimVerdict], sizes: Sequence[SizePanel] = ()
) -> list[ShownModel]:
    """Every model of the report, in the order of its tables."""
    names = list(dict.fromkeys(row.group.model for row in rows))
    shown = []
    for name, of_model in zip(names or [""], matrix.by_model(verdicts, names), strict=True):
        settings = charts.by_setting(rows, name)
        own_sizes = [panel for panel in sizes if panel.reference.model == name]
        ranks = [panel for panel in map(charts.ranks, settings) if panel is not None]
        shown.append(
            ShownModel(
                visible(name) or "No finished run",
                of_model,
                forest(of_model.forest),
                share_charts.charts(own_sizes),
                SHARES_CAPTION,
                share_charts.legend(own_sizes),
                [charts.pareto(setting) for setting in settings],
                PARETO_CAPTION,
                ranks,
                charts.legend(row.group for setting in settings for row in setting),
            )
        )
    return shown


def forest(groups: Sequence[ForestGroup]) -> ShownForest | None:
    """The forest with its places; None without a line."""
    lines = [line for group in groups for line in group.lines]
    if not any(line.share is not None for line in lines):
        return None
    scale = axis(lines)
    comparators = {group.comparator for group in groups}
    # Near the base's name there is no room for a long one.
    full = visible(comparators.pop()) if len(comparators) == 1 else "comparator"
    names = {0.0: "base", 1.0: full[:12]}
    ticks = [
        ShownTick(
            _place(scale, tick),
            minus(f"{100 * tick:.0f} %"),
            names.get(tick, ""),
            "grid full" if tick in names else "grid",
        )
        for tick in scale.ticks
    ]
    return ShownForest(FOREST_CAPTION, [_forest_group(group, scale) for group in groups], ticks)


def _forest_group(group: ForestGroup, scale: ShareAxis) -> ShownForestGroup:
    missing: dict[str, list[str]] = {}
    for line in group.lines:
        if line.share is None:
            missing.setdefault(line.missing, []).append(visible(line.task))
    lines = [_line(line, line.share, scale) for line in group.lines if line.share is not None]
    return ShownForestGroup(visible(group.claim), lines, list(missing.items()))


def _place(scale: ShareAxis, share: float) -> str:
    return f"{100 * scale.place(share):.2f}"


def _line(line: ForestLine, share: Interval, scale: ShareAxis) -> ShownLine:
    zone = low = high = None
    point = _place(scale, share.value) if scale.low <= share.value <= scale.high else None
    if not math.isnan(share.low):
        low, high = _place(scale, share.low), _place(scale, share.high)
    if line.zone is not None:
        left, right = scale.place(line.zone[0]), scale.place(line.zone[1])
        zone = f"{100 * left:.2f}", f"{100 * (right - left):.2f}"
    return ShownLine(
        visible(line.task),
        line.verdict,
        line.is_firm,
        minus(line.in_words),
        *(zone, point, low, high),
        min(share.value, share.low) < scale.low,
        max(share.value, share.high) > scale.high,
        SHAPES[line.verdict],
    )


def curves(rows: Sequence[ResultRow]) -> list[ModelCurves]:
    """The curves of every model: validation losses, the search of rates, and layers."""
    blocks = []
    for name in dict.fromkeys(row.group.model for row in rows):
        settings = _settings(rows, name)
        drawn = [charts.drawn(groups) for groups in settings]
        hidden = sum(len(groups) for groups in settings) - sum(map(len, drawn))
        more = f" {charts.MOST_LINES} configurations of a task are drawn; {hidden} are not." if hidden else ""
        losses = [panel for groups in drawn for panel in charts.validation_curves(groups)]
        searches = [panel for groups in drawn if (panel := charts.search(groups)) is not None]
        layers = [(charts.task_title(groups[0]), charts.layers(groups)) for groups in drawn]
        if len(drawn) == 1:
            # One task has few panels, which share one row of the page.
            named = [
                Panel("loss over steps" if place == 0 else panel.title, panel.svg) for place, panel in enumerate(losses)
            ]
            named += [Panel("search of the learning rate", panel.svg) for panel in searches]
            of_layers = layers[0][1]
            captions = [LOSS + more, *([SEARCH] if searches else []), *([LAYERS] if of_layers else [])]
            parts = [CurvePart(layers[0][0], captions, [*named, *of_layers])]
        else:
            parts = [
                CurvePart("Loss over steps", [LOSS + more], losses),
                CurvePart("Search of the rate", [SEARCH], searches),
            ]
            parts += [CurvePart(f"Where the parameters went: {task}", [LAYERS], panels) for task, panels in layers]
        parts = [part for part in parts if part.panels]
        if parts:
            blocks.append(ModelCurves(visible(name), charts.legend(g for groups in drawn for g in groups), parts))
    return blocks


def _settings(rows: Sequence[ResultRow], model: str) -> list[list[RunGroup]]:
    """The groups of each setting of the model, also those without a score: a loss over steps needs none."""
    settings: dict[tuple[str, str], dict[int, RunGroup]] = {}
    for row in rows:
        if row.group.model == model:
            settings.setdefault((row.group.task, row.group.variant), {})[id(row.group)] = row.group
    return [list(groups.values()) for groups in settings.values()]

"""The page's charts of what every arm keeps of a reference's gain, against its trained parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tiedlora.analysis import forest
from tiedlora.analysis.forest import ShareAxis
from tiedlora.analysis.shares_by_size import SizedShare, SizePanel, share_axis
from tiedlora.page.chart import Axis, Chart, log_axis, marker
from tiedlora.page.charts import Key, Panel, css, metric_words, order, task_title
from tiedlora.page.matrix import minus
from tiedlora.page.panels import short_count, style
from tiedlora.text import visible


def charts(panels: Sequence[SizePanel]) -> list[Panel]:
    """A chart for each panel. All have the same axes, so that tasks on which the arms hardly differ look like it."""
    if not panels:
        return []
    scale = share_axis(panels)
    params = log_axis("trainable parameters", [arm.group.params for panel in panels for arm in panel.arms], short_count)
    return [_chart(panel, params, scale) for panel in panels]


def legend(panels: Sequence[SizePanel]) -> list[Key]:
    """One entry for each configuration, whatever its rank."""
    groups = {arm.group.configuration: arm.group for panel in panels for arm in panel.arms}
    ordered = sorted(groups.values(), key=lambda group: (order(group)[0], group.configuration))
    return [Key(marker(style(group)[1], css(group)), visible(group.configuration), []) for group in ordered]


def _chart(panel: SizePanel, params: Axis, scale: ShareAxis) -> Panel:
    task, metric = task_title(panel.arms[0].group), metric_words(panel.measure)
    ticks = [(tick, minus(f"{100 * tick:.0f} %")) for tick in scale.ticks]
    # Wider by half a marker, so that none is cut off at an end.
    margin = 0.02 * (scale.high - scale.low)
    axis = Axis(f"share of {visible(panel.reference.name)}’s gain", scale.low - margin, scale.high + margin, ticks)
    values = "; ".join(map(_title, panel.arms[:12]))
    chart = Chart(params, axis, f"What each arm keeps of the gain of {panel.reference.name} on {task}: {values}")
    chart.level(1.0)
    for arms in panel.lines():
        chart.line([_place(arm, scale) for arm in arms], css(arms[0].group), width=1.1)
        for arm in arms:
            if math.isfinite(arm.share.low) and arm.group is not panel.reference:
                ends = arm.group.params, arm.share.low, arm.share.high
                chart.bar(*ends, css(arm.group))
                chart.take(*ends)
            is_inside = scale.nearest(arm.share.value) == arm.share.value
            chart.mark(*_place(arm, scale), style(arm.group)[1], css(arm.group), _title(arm), filled=is_inside)
    for arm in sorted(panel.arms, key=lambda arm: order(arm.group)):
        chart.name(*_place(arm, scale), arm.group.name)
    return Panel(f"{task}, {metric}", chart.svg())


def _place(arm: SizedShare, scale: ShareAxis) -> tuple[float, float]:
    """Where the arm is drawn. One beyond the axis is at its end."""
    return float(arm.group.params), scale.nearest(arm.share.value)


def _title(arm: SizedShare) -> str:
    marks = f" ({', '.join(arm.group.short_marks)})" if arm.group.short_marks else ""
    seeds = f"{arm.seeds} seed{'s' if arm.seeds != 1 else ''} in common"
    share = forest.share_in_words(arm.share)
    return f"{arm.group.name}{marks}: {share}, {arm.group.params:,} parameters, {seeds}"

"""A ranking of arms as a table of the report, and on a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import mean

from rich.console import RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from tiedlora import screen
from tiedlora.analysis.comparison import Estimate
from tiedlora.analysis.ranking import RankedArm
from tiedlora.config.rates import NOT_SEARCHED, searched_lr
from tiedlora.page import tables
from tiedlora.page.tables import COUNT, RATE, WHOLE, Column, Table, amount, estimate
from tiedlora.records.interval import MISSING, Unit
from tiedlora.screen import FirstThatFits
from tiedlora.text import clock, counted, visible

CAPTION = (
    "Every arm of a task to which no claim applies, the best score first: no verdict. Differences are paired on the "
    "same examples and seeds, with the interval that covers most (95 %). The best arm was chosen by these scores, so "
    "its lead is seen too large. 'LoRA' is the one nearest in size. 'validation loss' and 'seconds' (of training) are "
    f"means over seeds. A rate that is '{NOT_SEARCHED}' may be far from the arm's best one."
)


def table(rankings: Sequence[Sequence[RankedArm]]) -> Table:
    """One row per arm, all rankings below each other."""
    columns = (
        Column("model", cell=lambda arm: arm.group.model),
        Column("task", cell=lambda arm: arm.group.task, wraps=True),
        Column("variant", cell=lambda arm: arm.group.variant or None, wraps=True),
        Column("metric", cell=lambda arm: arm.measure.metric),
        Column("split", cell=lambda arm: arm.measure.split),
        Column("configuration", cell=lambda arm: arm.group.configuration),
        Column("rank", WHOLE, lambda arm: arm.group.rank),
        Column("parameters", COUNT, lambda arm: arm.group.params),
        Column("seeds", WHOLE, lambda arm: len(arm.row.seeds)),
        estimate("score", lambda arm: arm.row.score, **tables.VALUE),
        estimate("minus the best", lambda arm: arm.from_best, "+"),
        estimate("minus LoRA", lambda arm: arm.from_lora, "+"),
        Column("LoRA", cell=lambda arm: arm.lora.name if arm.lora else None),
        Column("validation loss", amount(3), _loss),
        Column("lr", RATE, lambda arm: (arm.group.lr, len(arm.group.rates))),
        Column("rate", cell=_search),
        Column("seconds", amount(0), _seconds),
    )
    return Table.of("ranking", CAPTION, columns, [arm for ranking in rankings for arm in ranking])


HEADS = (
    *("task", "metric", "adapter", "size", "score", "minus the best", "minus LoRA", "LoRA"),
    *("val. loss", "lr", "rate", "time"),
)
NUMBERS = ("size", "score", "val. loss", "time")
IN_SHORT = ("adapter", "size", "score", "minus the best", "minus LoRA")
"""The columns of a narrow terminal. The title has the task and the metric."""


def parts(ranking: Sequence[RankedArm], most: int | None) -> Iterator[RenderableType]:
    """The ranking of one task for a terminal.

    Args:
        most: the most arms that are shown, the best ones; None shows all.
    """
    first, arms = ranking[0], ranking[:most]
    group, unit = first.group, first.measure.unit
    seeds = sorted({len(arm.row.seeds) for arm in ranking})
    over = counted(seeds[-1], "seed") if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
    title = f"{group.task_in_words}, {first.measure.metric} on {first.measure.split} ({unit.words}), {over}: ranked"
    yield Text(f"{visible(title)}, no verdict (no claim is about these adapters)", style="bold")
    yield FirstThatFits(*(_drawn(arms, heads, in_short) for heads, in_short in ((HEADS, False), (IN_SHORT, True))))
    if more := len(ranking) - len(arms):
        yield Text(f"{counted(more, 'more adapter')}: --all shows them", style="dim")


def _drawn(arms: Sequence[RankedArm], heads: Sequence[str], in_short: bool) -> RichTable:
    rows = []
    for arm in arms:
        unit = arm.measure.unit
        cells = {
            "task": arm.group.task_in_words,
            "metric": arm.measure.metric,
            "adapter": in_words(arm.group.name),
            "size": f"{arm.group.params:,}",
            "score": MISSING if arm.row.score is None else unit.number(arm.row.score.value),
            "minus the best": "the best" if arm is arms[0] else difference(unit, arm.from_best, in_short),
            "minus LoRA": difference(unit, arm.from_lora, in_short),
            "LoRA": in_words(arm.lora.name) if arm.lora and arm.from_lora else MISSING,
            "val. loss": f"{_loss(arm):.3f}",
            "lr": RATE.text((arm.group.lr, len(arm.group.rates))),
            "rate": _search(arm),
            "time": clock(_seconds(arm)),
        }
        if in_short and arm.lora and arm.from_lora:
            cells["minus LoRA"] += f" ({cells['LoRA']})"
        rows.append([cells[head] for head in heads])
    return screen.table(heads, rows, NUMBERS)


def in_words(name: str) -> str:
    """`TAuv r 8` for the name `TAuv r=8` of a group."""
    return name.replace(" r=", " r ")


def difference(unit: Unit, found: Estimate | None, in_short: bool) -> str:
    """Such as `+1.2 [+0.3, +2.1]`, or in short `+0.3 to +2.1`."""
    if found is None:
        return MISSING
    interval = found.widest
    if not in_short or math.isnan(interval.low):
        return unit.text(interval, "+")
    return f"{unit.number(interval.low, '+')} to {unit.number(interval.high, '+')}"


def _loss(arm: RankedArm) -> float:
    return mean(run.record.training.validation_loss_last for run in arm.group.runs)


def _seconds(arm: RankedArm) -> float:
    return mean(run.record.training.seconds for run in arm.group.runs)


def _search(arm: RankedArm) -> str:
    """Whether a search stands behind the rate: one of these runs, one that a sweep has recorded, or a published one."""
    group = arm.group
    if len(group.rates) > 1 or group.has_recorded_rate:
        return "searched"
    found = searched_lr(group.runs[0].record.base.name, group.task, group.label, group.rank)
    return "searched" if found == group.lr else NOT_SEARCHED

"""A ranking of arms as a table of the report, and as lines for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from tiedlora.analysis.comparison import Estimate
from tiedlora.analysis.ranking import RankedArm
from tiedlora.config.rates import NOT_SEARCHED, searched_lr
from tiedlora.page import tables
from tiedlora.page.tables import COUNT, RATE, WHOLE, Column, Table, amount, estimate
from tiedlora.records.interval import MISSING
from tiedlora.text import aligned, counted

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


def lines(ranking: Sequence[RankedArm]) -> list[str]:
    """The ranking of one task for a terminal: what each arm is, and then how it differs."""
    first = ranking[0]
    unit, group = first.measure.unit, first.group
    facts, differences = [["arm", "parameters", "score", "val. loss", "lr", "rate", "time"]], []
    for arm in ranking:
        score = MISSING if arm.row.score is None else unit.number(arm.row.score.value)
        rate, loss, seconds = RATE.text((arm.group.lr, len(arm.group.rates))), _loss(arm), _seconds(arm)
        numbers = [f"{arm.group.params:,}", score, f"{loss:.3f}", rate, _search(arm), f"{seconds:.0f} s"]
        facts.append([arm.group.name, *numbers])
        lora = f" ({arm.lora.name})" if arm.lora and arm.from_lora else ""
        from_best = "is the best" if arm is first else _difference(arm, arm.from_best)
        differences.append([arm.group.name, from_best, _difference(arm, arm.from_lora) + lora])
    seeds = sorted({len(arm.row.seeds) for arm in ranking})
    over = counted(seeds[-1], "seed") if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
    title = f"{'RANKED':<14} {group.task_in_words}, by {first.measure.metric} on {first.measure.split}, {over}"
    why = f"{'':<14} no claim applies to these arms, so this is no verdict"
    heads = ["arm", "minus the best", "minus LoRA"]
    blocks = [aligned(facts), aligned([heads, *differences])]
    return [title, why, *(f"  {line}" for block in blocks for line in block.splitlines())]


def _difference(arm: RankedArm, found: Estimate | None) -> str:
    return MISSING if found is None else arm.measure.unit.text(found.widest, "+")


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

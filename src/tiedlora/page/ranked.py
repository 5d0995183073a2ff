"""A ranking of arms: as a table of the report, as rows of its page, and on a terminal."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean

from markupsafe import Markup
from rich.console import RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from tiedlora import screen
from tiedlora.analysis.answers import Answer, Verdict
from tiedlora.analysis.comparison import Estimate
from tiedlora.analysis.groups import RunGroup
from tiedlora.analysis.ranking import RankedArm, is_at_equal_size
from tiedlora.config.rates import NOT_SEARCHED, searched_lr
from tiedlora.page import tables
from tiedlora.page.figures import CSS_NAMES, GLYPHS, style
from tiedlora.page.tables import COUNT, RATE, WHOLE, Column, Table, amount, estimate, minus
from tiedlora.page.tracks import axis_of_differences, better_right, track
from tiedlora.records.interval import MISSING, Interval, Unit
from tiedlora.screen import FirstThatFits
from tiedlora.text import clock, counted, visible

CAPTION = (
    "Every arm of a task, the best score first. Differences are paired on the same examples and seeds, with the "
    "interval that covers most (95 %, all seeds). The best arm was chosen by these scores, so its lead is seen too "
    "large. 'LoRA' is LoRA's curve at the arm's size, or the nearest of its sizes. 'minus LoRA, as tested' has the "
    "level and the seeds of the look on which the verdict rests. 'validation loss' and 'seconds' (of training) are "
    f"means over seeds. A rate that is '{NOT_SEARCHED}' may be far from the arm's best one."
)
EQUAL_SIZE = {Verdict.SUPPORTED: "better", Verdict.CONTRADICTED: "worse"}
"""The verdicts on a claim that an arm is better than LoRA of its size, in a word."""
TONES = {Verdict.SUPPORTED: "good", Verdict.CONTRADICTED: "bad", Verdict.UNDECIDED: "open"}
"""The colours of verdicts; all others have a soft one."""


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
        estimate("minus LoRA, as tested", lambda arm: arm.tested, "+"),
        Column("claim", cell=lambda arm: arm.answer.claim.name if arm.answer else None, wraps=True),
        Column("verdict", cell=lambda arm: arm.answer.verdict.value if arm.answer else None),
        Column("validation loss", amount(3), _loss),
        Column("lr", RATE, lambda arm: (arm.group.lr, len(arm.group.rates))),
        Column("rate", cell=_search),
        Column("seconds", amount(0), _seconds),
    )
    return Table.of("ranking", CAPTION, columns, [arm for ranking in rankings for arm in ranking])


@dataclass(frozen=True)
class ShownArm:
    """An arm as a row of the page."""

    group: RunGroup
    colour: str
    """The page's variable for it."""
    glyph: str
    score: str
    track: Markup
    """The difference, drawn; empty without one."""
    difference: str
    peer: str
    """What the difference is from, where that is not LoRA of the arm's size."""
    verdict: str
    word: str
    """The verdict in a word."""
    about: str
    """What the verdict is about, where that is not the difference."""
    holds: bool


def shown(ranking: Sequence[RankedArm]) -> list[ShownArm]:
    """The rows of a ranking, with the differences on one axis. Without LoRA, they are those from the best arm."""
    axis, rows, has_lora = difference_axis(ranking), [], _has_lora(ranking)
    for arm in ranking:
        interval, answer = _interval(arm, has_lora), arm.answer
        colour, marker, _ = style(arm.group.arm)
        tone, word, about, holds = "soft", "", "", False
        if answer is not None:
            at_equal_size = is_at_equal_size(answer)
            word = EQUAL_SIZE.get(answer.verdict, answer.verdict.value) if at_equal_size else answer.verdict.value
            about, holds = "" if at_equal_size else _about(answer), answer.survives_holm
            tone = TONES.get(answer.verdict, "soft") if at_equal_size else "soft"
        drawn = Markup()
        if interval is not None:
            drawn = track(better_right(interval, arm.measure.sign), axis, tone=tone, is_filled=arm.holds)
        unit = arm.measure.unit
        rows.append(
            ShownArm(
                group=arm.group,
                colour=CSS_NAMES[colour],
                glyph=GLYPHS[marker],
                score=MISSING if arm.row.score is None else unit.number(arm.row.score.value),
                track=drawn,
                difference="" if interval is None else minus(difference(unit, interval, in_short=False)),
                peer="" if arm.lora is None or _is_at_size_of_curve(arm) else f"from {in_words(arm.lora.name)}",
                verdict="" if answer is None else answer.verdict.value.replace(" ", "-"),
                word=word,
                about=about,
                holds=holds,
            )
        )
    return rows


def _about(answer: Answer) -> str:
    """What a claim says of its method, such as `keeps 90 % of the gain of LoRA at equal rank`."""
    rule = answer.claim.rule
    return f"{rule.words.removeprefix('is ')} {'of' if rule.needs_zero else 'than'} {answer.claim.comparator}"


def difference_axis(ranking: Iterable[RankedArm]) -> tuple[float, float]:
    """The axis of the differences. What learned from shuffled targets is no rival, and may go beyond it."""
    arms = list(ranking)
    rivals, has_lora = [arm for arm in arms if not arm.group.is_control], _has_lora(arms)
    found = [(interval, arm.measure.sign) for arm in rivals if (interval := _interval(arm, has_lora)) is not None]
    return axis_of_differences(better_right(interval, sign) for interval, sign in found)


def _has_lora(ranking: Iterable[RankedArm]) -> bool:
    """Whether any arm is compared with LoRA. Otherwise all are compared with the best one."""
    return any(arm.lora is not None for arm in ranking)


def _interval(arm: RankedArm, has_lora: bool) -> Interval | None:
    """The difference that is shown: from LoRA, or from the best arm if no arm has a LoRA to compare with."""
    return arm.difference if has_lora else _widest(arm.from_best)


def _is_at_size_of_curve(arm: RankedArm) -> bool:
    """Whether the arm is compared with LoRA's curve at its own size, which needs no name."""
    return arm.has_equal_size and not isinstance(arm.lora, RunGroup)


def compared_with(ranking: Sequence[RankedArm]) -> str:
    """What the differences are from, in words."""
    if not _has_lora(ranking):
        return "the best arm"
    alike = [arm.has_equal_size for arm in ranking if arm.lora is not None and not arm.group.is_control]
    return "LoRA of its size" if all(alike) else "LoRA"


def in_short(ranking: Sequence[RankedArm]) -> list[tuple[str, str]]:
    """The answer of a ranking: which arm has the best score, and which ones are better or worse than LoRA of their
    size. A star marks what holds by Holm's procedure.
    """
    best = ranking[0]
    score = "" if best.row.score is None else f" ({best.measure.unit.number(best.row.score.value)})"
    said = [("Best score", f"{best.group.short}{score}")]
    named: dict[str, list[str]] = defaultdict(list)
    for arm in ranking:
        if arm.answer is not None and is_at_equal_size(arm.answer):
            word = EQUAL_SIZE.get(arm.answer.verdict, arm.answer.verdict.value)
            named[word].append(arm.group.short + (" *" if arm.holds else ""))
    for word in ("better", "worse", *(verdict.value for verdict in Verdict)):
        if word in named:
            head = f"{word.capitalize()} than LoRA of its size" if word in EQUAL_SIZE.values() else word.capitalize()
            said.append((head, ", ".join(named[word])))
    return said


def has_star(ranking: Sequence[RankedArm]) -> bool:
    """Whether a verdict beside an arm holds by Holm's procedure."""
    return any(arm.answer is not None and arm.answer.survives_holm for arm in ranking)


HEADS = (
    *("task", "metric", "adapter", "size", "score", "minus the best", "minus LoRA", "LoRA"),
    *("val. loss", "lr", "rate", "time"),
)
NUMBERS = ("size", "score", "val. loss", "time")
IN_SHORT = ("adapter", "size", "score", "minus the best", "minus LoRA")
"""The columns of a narrow terminal. The title has the task and the metric."""


def parts(ranking: Sequence[RankedArm], most: int | None, has_models: bool) -> Iterator[RenderableType]:
    """The ranking of one task for a terminal.

    Args:
        most: the most arms that are shown, the best ones; None shows all.
        has_models: whether the report has several base models, so that the title names this one.
    """
    first, arms = ranking[0], ranking[:most]
    group, unit = first.group, first.measure.unit
    seeds = sorted({len(arm.row.seeds) for arm in ranking})
    over = counted(seeds[-1], "seed") if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
    task = f"{group.model}, {group.task_in_words}" if has_models else group.task_in_words
    title = f"{task}, {first.measure.metric} on {first.measure.split} ({unit.words}), {over}: ranked"
    without = "" if any(arm.answers for arm in ranking) else ", no verdict (no claim compares these adapters)"
    yield Text(f"{visible(title)}{without}", style="bold")
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
            "minus the best": "the best" if arm is arms[0] else difference(unit, _widest(arm.from_best), in_short),
            "minus LoRA": difference(unit, _widest(arm.from_lora), in_short),
            "LoRA": _peer(arm),
            "val. loss": f"{_loss(arm):.3f}",
            "lr": RATE.text((arm.group.lr, len(arm.group.rates))),
            "rate": _search(arm),
            "time": clock(_seconds(arm)),
        }
        if in_short and arm.from_lora:
            cells["minus LoRA"] += f" ({cells['LoRA']})"
        rows.append([cells[head] for head in heads])
    return screen.table(heads, rows, NUMBERS)


def _peer(arm: RankedArm) -> str:
    """The LoRA that an arm is compared with. The name of LoRA's curve at the arm's size is too long for a terminal."""
    if not arm.from_lora:
        return MISSING
    return in_words(arm.lora.name) if isinstance(arm.lora, RunGroup) else "LoRA, same size"


def in_words(name: str) -> str:
    """`TAuv r 8` for the name `TAuv r=8` of a group."""
    return name.replace(" r=", " r ")


def _widest(found: Estimate | None) -> Interval | None:
    return None if found is None else found.widest


def difference(unit: Unit, interval: Interval | None, in_short: bool) -> str:
    """Such as `+1.2 [+0.3, +2.1]`, or in short `+0.3 to +2.1`. It says if the ends are over rows alone."""
    if interval is None:
        return MISSING
    if not in_short or math.isnan(interval.low):
        alone = " (rows alone)" if interval.is_of_rows and not math.isnan(interval.low) else ""
        return f"{unit.text(interval, '+')}{alone}"
    return f"{unit.end(interval.low, '+')} to {unit.end(interval.high, '+')}"


def _loss(arm: RankedArm) -> float:
    return mean(run.record.training.validation_loss_last for run in arm.group.runs)


def _seconds(arm: RankedArm) -> float:
    return mean(run.record.training.seconds for run in arm.group.runs)


def _search(arm: RankedArm) -> str:
    """Whether a search stands behind the rate: one of these runs, one that a sweep has recorded, or a published one."""
    group = arm.group
    if len(group.rates) > 1:
        return "searched"
    found = searched_lr(group.runs[0].record.base.name, group.task, group.label, group.rank)
    return "searched" if found == group.lr else NOT_SEARCHED

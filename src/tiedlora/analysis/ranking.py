"""All arms of a setting in the order of their scores: against the best one, and against LoRA of the same size.

The differences are those of comparison.py, with its intervals. Where a claim asks for a difference, it is the one that
the claim's verdict rests on. A ranking by itself gives no verdict.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from tiedlora.analysis.answers import Answer
from tiedlora.analysis.claims import Pair
from tiedlora.analysis.comparison import Estimate, compare
from tiedlora.analysis.groups import Peer, RunGroup, curve, point
from tiedlora.analysis.results import BASELINE, ResultRow
from tiedlora.analysis.runs import Measure, NotComparable, Scorebook
from tiedlora.analysis.tested import number_tested
from tiedlora.config.sizes import is_near
from tiedlora.records.interval import Interval


@dataclass(frozen=True)
class RankedArm:
    """One arm of a ranking."""

    row: ResultRow
    from_best: Estimate | None
    """The paired difference from the best arm; None for this one, and where they cannot be compared."""
    lora: Peer | None
    """LoRA of the arm's size: its curve at this size, or outside of its sizes the nearest one. None for LoRA itself,
    and without any."""
    from_lora: Estimate | None
    """The paired difference from it."""
    answers: tuple[Answer, ...]
    """The answers about the arm by this measure; that on LoRA of its size is the first."""

    @property
    def measure(self) -> Measure:
        """What the arms are ranked by."""
        return self.row.measure

    @property
    def group(self) -> RunGroup:
        """The arm's runs."""
        return self.row.group

    @property
    def answer(self) -> Answer | None:
        """The answer that stands beside the arm."""
        return self.answers[0] if self.answers else None

    @property
    def difference(self) -> Interval | None:
        """The difference from `lora` that is shown: the one that the verdict rests on, or else that of all seeds."""
        if (tested := self.tested) is not None:
            return tested
        return None if self.from_lora is None else self.from_lora.widest

    @property
    def tested(self) -> Interval | None:
        """The difference from `lora` that a verdict rests on; None if no claim asks about it."""
        answer = self.answer
        found = number_tested(answer) if answer is not None and is_at_equal_size(answer) else None
        return None if found is None else found.interval

    @property
    def has_equal_size(self) -> bool:
        """Whether `lora` has about as many parameters as the arm."""
        return self.lora is not None and is_near(self.lora.params, self.group.params)

    @property
    def holds(self) -> bool:
        """Whether the verdict on the difference holds by Holm's procedure over all tests."""
        return self.answer is not None and is_at_equal_size(self.answer) and self.answer.survives_holm


def rankings(rows: Sequence[ResultRow], answers: Sequence[Answer], book: Scorebook) -> list[list[RankedArm]]:
    """The arms of each setting, the best first, by each metric that figures show. An arm without a score is in none."""
    together: dict[tuple[str, Measure], list[ResultRow]] = defaultdict(list)
    for row in rows:
        if row.primary and row.score is not None:
            together[row.group.setting, row.measure].append(row)
    about: dict[tuple[str, str, Measure | None], list[Answer]] = defaultdict(list)
    for answer in answers:
        if isinstance(pair := answer.pair, Pair):
            about[pair.anchor.setting, pair.method.name, answer.measure].append(answer)
    return [_ranked(own, about, book) for own in together.values()]


def is_at_equal_size(answer: Answer) -> bool:
    """Whether an answer says if an arm is better than LoRA of about its size, or than LoRA's curve at its size."""
    pair = answer.pair
    # A side may have no runs: none by the measure, or none with the seeds that its offset asks for.
    return (
        isinstance(pair, Pair)
        and answer.measure is not None
        and answer.claim.rule.margin == 0
        and all(group.runs and group.arm.family == BASELINE for group in pair.comparator.groups)
        and is_near(pair.comparator.params, pair.method.params)
    )


def _ranked(
    rows: Sequence[ResultRow], about: dict[tuple[str, str, Measure | None], list[Answer]], book: Scorebook
) -> list[RankedArm]:
    def goodness(row: ResultRow) -> float:
        return row.measure.sign * row.score.value if row.score is not None else -math.inf

    ordered = sorted(rows, key=goodness, reverse=True)
    groups = [row.group for row in rows]
    sizes = curve(BASELINE, groups[0].setting, groups)
    best, arms = ordered[0].group, []
    for row in ordered:
        group, lora, from_lora = row.group, None, None
        own = sorted(about[group.setting, group.name, row.measure], key=lambda answer: not is_at_equal_size(answer))
        pair = own[0].pair if own and is_at_equal_size(own[0]) else None
        if isinstance(pair, Pair):
            # As the claim compares them, so that the page has one difference.
            lora, from_lora = pair.comparator, own[0].findings.difference
        elif sizes and not group.arm.is_size_of(BASELINE):
            nearest = min(sizes, key=lambda size: abs(math.log(size.params / group.params)))
            lora = point(BASELINE, sizes, group.params) or nearest
            from_lora = _difference(row, lora, book)
        arms.append(RankedArm(row, _difference(row, best, book), lora, from_lora, tuple(own)))
    return arms


def _difference(row: ResultRow, other: Peer, book: Scorebook) -> Estimate | None:
    if other is row.group:
        return None
    try:
        return compare(row.group, other, row.measure, book).difference()[0]
    except NotComparable:
        return None

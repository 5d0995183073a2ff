"""Shares of a gain: how they are said and drawn, and what every arm keeps of a reference's gain beside its parameters.

0 is the zero point (the base model, or a claim's floor), and 1 the comparator. docs/results.md has the rest.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from tiedlora.analysis import claims, rules
from tiedlora.analysis.answers import BASE, Answer, Verdict
from tiedlora.analysis.claims import Pair
from tiedlora.analysis.comparison import compare
from tiedlora.analysis.groups import Blend, RunGroup, curve
from tiedlora.analysis.results import ResultRow
from tiedlora.analysis.runs import Measure, NotComparable, Scorebook
from tiedlora.analysis.tested import number_tested
from tiedlora.records.interval import Interval, Unit
from tiedlora.text import counted

LEAST, MOST = -0.25, 1.6
"""The widest axis, in shares of the comparator's gain. What lies beyond it ends in an arrow."""
USUAL = (0.89, 1.03)
"""The narrowest axis, with the comparator at 1. On a narrower one, arms that are level would look far apart."""
STEPS = (0.05, 0.1, 0.25, 0.5)


@dataclass(frozen=True)
class ShareAxis:
    """The axis that all lines of a plot share."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def nearest(self, share: float) -> float:
        """The share, or the end of the axis that it is beyond."""
        return min(self.high, max(self.low, share))


def axis(shares: Iterable[Interval], zones: Iterable[tuple[float, float]] = ()) -> ShareAxis:
    """The axis for these shares: as narrow as their intervals and zones allow, and within LEAST to MOST.

    All panels of shares have the same axis, so that small differences look small.
    """
    ends = [end for one in shares for end in (one.value, one.low, one.high) if not math.isnan(end)]
    ends += [*USUAL, *(end + 0.1 for zone in zones for end in zone if math.isfinite(end))]
    low, high = max(LEAST, min(ends)), min(MOST, max(ends))
    step = next(step for step in STEPS if (high - low) / step <= 6)
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return ShareAxis(low, high, tuple(round(step * number, 6) for number in numbers))


def share_in_words(share: Interval, edges: Iterable[float] = ()) -> str:
    """A share with its interval, such as `97 % [88, 106]`.

    Args:
        edges: the ends of a zone. An interval that ends just beside one gets a decimal: without it, it could read as if
            it ended at the edge.
    """
    if math.isnan(share.low):
        return f"{percent(share.value)} %"
    ends = (share.low, share.high)
    is_near = any(abs(end - edge) < 0.005 for end in ends for edge in edges)
    decimals = 1 if ends[1] - ends[0] < 0.01 or is_near else 0
    low, high = (percent(end, decimals) for end in ends)
    return f"{percent(share.value, decimals)} % [{low}, {high}]"


def at_least(share: float) -> str:
    """A lower limit in whole per cent, rounded down: more is not shown."""
    return f"{percent(math.floor(100 * share + 1e-9) / 100)} %"


def percent(share: float, decimals: int = 0) -> str:
    """A share in per cent. Beyond ten times the comparator's gain, its size says nothing more."""
    if abs(share) >= 10:
        return "> 999" if share > 0 else "< -999"
    return f"{100 * share:z.{decimals}f}"


def tested_in_words(answer: Answer) -> str:
    """What the rule tests, such as `97 % [88, 106], 5 seeds` or `-0.034 nats [-0.043, -0.026], 5 seeds`; or why there
    is no such number.
    """
    found, number = answer.findings, number_tested(answer)
    if number is None or answer.measure is None:
        if found.share is not None and answer.claim.rule.needs_zero:
            return "no gain of the comparator" if found.share.gain <= 0 else "the comparator's gain may be 0"
        return "no scores of the base" if found.seeds else "no comparison yet"
    count = found.seeds if number.is_share or found.look is not None else found.difference_seeds
    if number.is_share:
        return f"{share_in_words(number.interval, number.zone)}, {counted(count, 'seed')}"
    unit = answer.measure.unit
    words = " points" if unit is Unit.POINTS else f" {unit.words}" if unit is Unit.NATS else ""
    return f"{unit.text(number.interval, '+', words)}, {counted(count, 'seed')}"


# Shares beside parameters.


@dataclass(frozen=True)
class ArmShare:
    """One arm: its share of the reference's gain, with a 95 % interval. The ends are NaN if it has none."""

    group: RunGroup
    share: Interval
    seeds: int
    """How many seeds it has in common with the reference."""
    is_on_curve: bool
    """Whether it is a size of the reference's configuration."""


@dataclass(frozen=True)
class SharePanel:
    """The arms of one setting by one metric."""

    measure: Measure
    reference: RunGroup
    zero: str
    """What a gain is measured from."""
    arms: list[ArmShare]
    """The sizes of the reference's configuration in rising order, of which the reference is one, and all others."""

    @property
    def curve(self) -> list[ArmShare]:
        """The sizes of the reference's configuration."""
        return [arm for arm in self.arms if arm.is_on_curve]


def share_panels(rows: Sequence[ResultRow], answers: Sequence[Answer], book: Scorebook) -> list[SharePanel]:
    """A panel for every setting and metric of the figures in which a claim names a comparator that gains something.

    Where a claim cannot fail, and no other was shown able to fail, there is no panel: every arm would keep about all.
    """
    by_panel: dict[tuple[str, Measure], list[RunGroup]] = defaultdict(list)
    for row in rows:
        if row.primary and row.score is not None:
            by_panel[row.group.setting, row.measure].append(row.group)
    panels = []
    for (setting, measure), groups in by_panel.items():
        own = [a for a in answers if a.pair is not None and a.measure == measure and a.pair.anchor.setting == setting]
        cannot_fail = any(answer.verdict == Verdict.CANNOT_FAIL for answer in own)
        if len(groups) < 2 or (cannot_fail and all(answer.findings.sensitivity != "shown" for answer in own)):
            continue
        if (found := _reference(own, groups)) is None:
            continue
        reference, floor = found
        on_curve = curve(reference.label, setting, groups)
        arms = []
        for group in groups:
            # A note of the results says why scores cannot be compared.
            with suppress(NotComparable):
                comparison = compare(group, reference, measure, book, floor=floor)
                if (share := rules.share(comparison.sides)) is not None:
                    arms.append(ArmShare(group, share, len(comparison.matched.seeds), group in on_curve))
        if arms:
            arms.sort(key=lambda arm: (not arm.is_on_curve, arm.group.params if arm.is_on_curve else 0))
            panels.append(SharePanel(measure, reference, floor.name if floor else BASE, arms))
    return panels


def _reference(answers: Sequence[Answer], groups: Sequence[RunGroup]) -> tuple[RunGroup, RunGroup | None] | None:
    """The comparator of the first of these answers that gains something, and its floor. Curves come first.

    The reference of a curve is its largest size. It has the runs of all seeds, whatever seeds the claim takes. If the
    claim's rule needs no zero point, the floor is the first one of the others.
    """
    for answer in sorted(answers, key=lambda answer: not answer.claim.comparator.frontier):
        pair, measure, share = answer.pair, answer.measure, answer.findings.share
        if isinstance(pair, Pair) and measure is not None and share is not None and share.gain > 0:
            comparator = pair.arms[1][0]
            if isinstance(peer := pair.comparator, Blend):
                # None of the sizes has a score of its own if all of them have seeds with other rows too.
                measured = claims.sizes(answer.claim, peer.configuration, comparator, groups, measure.split)
                comparator = (measured or peer.groups)[-1]
            of_zero = [answer] if answer.claim.rule.needs_zero else answers
            floors = (own.floor for one in of_zero if isinstance(own := one.pair, Pair) and own.floor is not None)
            return comparator, next(floors, None)
    return None

"""Shares of a gain, for two figures: what each claim's method keeps, and what every arm keeps beside its parameters.

0 is the zero point (the base model, or a claim's floor) and 1 the comparator, in every metric and on every task. In the
forest plot, a line is one answer to a claim, with the interval at which its rule decides (`Rule.kept`). In the panels
of sizes, all arms of a setting stand on the scale of one reference, with the curve of the reference's configuration
through its sizes. There the share is of the seeds that an arm has in common with the reference, and its interval is
that of the paired difference. (Much of the interval of a score is the choice of rows, which all arms share.)
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tiedlora.analysis import compare
from tiedlora.analysis.answers import Answer, Verdict, test_of
from tiedlora.analysis.claims import Claim
from tiedlora.analysis.compare import Measure, ResultRow
from tiedlora.analysis.frontier import Blend, curve
from tiedlora.analysis.groups import RunGroup
from tiedlora.analysis.rules import Better
from tiedlora.analysis.runs import Scorebook
from tiedlora.errors import UserError
from tiedlora.records.interval import LEVEL, Interval

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


def _axis(intervals: Iterable[Interval], more: Iterable[float]) -> ShareAxis:
    """The axis that holds these shares with their intervals, and `more` shares, within LEAST to MOST."""
    ends = [end for one in intervals for end in (one.value, one.low, one.high) if not math.isnan(end)]
    ends += more
    low, high = max(LEAST, min(ends)), min(MOST, max(ends))
    step = next(step for step in (*STEPS, 1.0) if (high - low) / step <= 7 or step == 1.0)
    first = math.ceil(low / step - 1e-9)
    ticks = [step * number for number in range(first, math.floor(high / step + 1e-9) + 1)]
    return ShareAxis(low, high, tuple(round(tick, 6) for tick in ticks))


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


def percent(share: float, decimals: int = 0) -> str:
    """A share in per cent. Beyond ten times the comparator's gain, its size says nothing more."""
    if abs(share) >= 10:
        return "> 999" if share > 0 else "< -999"
    return f"{100 * share:.{decimals}f}"


# The forest plot.


@dataclass(frozen=True)
class ForestLine:
    """One answer as a line of the plot."""

    task: str
    verdict: str
    is_firm: bool
    """Whether a verdict can rest on the interval. It cannot before the first look, where it is a 95 % interval of the
    seeds there are, or while the comparator's own gain may be 0."""
    share: Interval | None
    """The share that the method keeps: 0 is the base, 1 the comparator."""
    zone: tuple[float, float] | None
    """The shares that the rule asks for."""
    missing: str
    """Why there is no share."""
    seeds: int = 0

    @property
    def in_words(self) -> str:
        """The share as text, such as `97 % [88, 106], 5 seeds`, or why there is none."""
        if self.share is None:
            return self.missing
        return f"{share_in_words(self.share, self.zone or ())}, {self.seeds} seed{'s' if self.seeds != 1 else ''}"


def forest_line(answer: Answer) -> ForestLine:
    """The line of one answer."""
    rule, gain, share, missing = answer.claim.rule, answer.comparator_gain, answer.kept, ""
    if share is None and gain is not None and gain > 0:
        share = _share_of_one_seed(answer, gain)
    if answer.measure is None:
        missing = "not run" if answer.pair is None else "no comparison yet"
    elif share is None:
        without_base = "no scores of the base" if answer.seeds else "no comparison yet"
        missing = "no gain of the comparator" if gain is not None else without_base
    elif answer.verdict == Verdict.UNINFORMATIVE:
        share, missing = None, "the comparator's gain may be 0"
    is_firm = answer.look is not None and not (answer.gain_may_be_zero and rule.needs_zero)
    zone = rule.zone(gain) if share is not None and gain else None
    return ForestLine(answer.task, answer.verdict.value, is_firm, share, zone, missing, answer.seeds)


def _share_of_one_seed(answer: Answer, gain: float) -> Interval | None:
    """One seed has no interval over seeds. Its difference has one over rows."""
    if answer.difference is None or answer.measure is None:
        return None
    difference, sign = answer.difference.widest, answer.measure.sign
    low, high = sorted(1 + sign * end / gain for end in (difference.low, difference.high))
    return Interval(1 + sign * difference.value / gain, low, high)


def forest_lines(answers: Iterable[Answer]) -> list[tuple[Claim, list[ForestLine]]]:
    """The answers of one model, by claim, in their order. A test that two claims share has one line."""
    by_claim: dict[int, tuple[Claim, list[ForestLine]]] = {}
    tests = set()
    for answer in answers:
        if (test := test_of(answer)) not in tests:
            by_claim.setdefault(id(answer.claim), (answer.claim, []))[1].append(forest_line(answer))
        tests.add(test)
    return list(by_claim.values())


def forest_axis(lines: Sequence[ForestLine]) -> ShareAxis:
    """The axis for these lines: as narrow as their intervals and zones allow, and within LEAST to MOST."""
    drawn = [(one.share, one.zone or ()) for one in lines if one.share is not None]
    beyond_zones = [end + 0.1 for _, zone in drawn for end in zone if math.isfinite(end)]
    return _axis((share for share, _ in drawn), [*USUAL, *beyond_zones])


# Shares beside parameters.


@dataclass(frozen=True)
class SizedShare:
    """One arm: its share of the reference's gain, with a 95 % interval. The ends are NaN if it has none."""

    group: RunGroup
    share: Interval
    seeds: int
    """How many seeds it has in common with the reference."""


@dataclass(frozen=True)
class SizePanel:
    """The arms of one setting by one metric."""

    measure: Measure
    reference: RunGroup
    zero: str
    """What a gain is measured from."""
    curve: list[SizedShare]
    """The sizes of the reference's configuration, in rising order; the reference is one of them."""
    arms: list[SizedShare]
    """All others."""

    @property
    def all_arms(self) -> list[SizedShare]:
        """The sizes of the reference's configuration, and all others."""
        return [*self.curve, *self.arms]


def size_panels(rows: Sequence[ResultRow], answers: Sequence[Answer], book: Scorebook) -> list[SizePanel]:
    """A panel for every setting and metric of the figures in which a claim names a comparator that gains something.

    Where a claim cannot fail, and none was shown to be able to, there is no panel: it would show 90 % of everything.
    """
    by_panel: dict[tuple[str, Measure], list[RunGroup]] = defaultdict(list)
    for row in rows:
        if row.primary and row.score is not None:
            by_panel[row.group.setting, row.measure].append(row.group)
    panels = []
    for (setting, measure), groups in by_panel.items():
        own = [a for a in answers if a.pair is not None and a.measure == measure and a.pair.anchor.setting == setting]
        cannot_fail = any(answer.verdict == Verdict.CANNOT_FAIL for answer in own)
        if len(groups) < 2 or (cannot_fail and all(answer.sensitivity != "shown" for answer in own)):
            continue
        if (found := _reference(own, groups)) is None:
            continue
        reference, floor = found
        arms = [arm for group in groups if (arm := _arm(group, reference, measure, book, floor)) is not None]
        members = curve(reference.label, setting, groups).groups
        on_curve = sorted((arm for arm in arms if arm.group in members), key=lambda arm: arm.group.params)
        others = [arm for arm in arms if arm.group not in members]
        if arms:
            panels.append(SizePanel(measure, reference, floor.name if floor else "the base", on_curve, others))
    return panels


def size_axis(panels: Iterable[SizePanel]) -> ShareAxis:
    """One axis for all panels, so that tasks on which the arms hardly differ look like it."""
    return _axis((arm.share for panel in panels for arm in panel.all_arms), USUAL)


def _reference(answers: Sequence[Answer], groups: Sequence[RunGroup]) -> tuple[RunGroup, RunGroup | None] | None:
    """The comparator of the first of these answers that gains something, and the floor that any of them names.

    Of a comparator on a curve, the largest size. It has the runs of all seeds, whatever seeds the claim takes.
    """
    for answer in answers:
        if answer.pair is None or not answer.pair.arms or not answer.comparator_gain or answer.comparator_gain <= 0:
            continue
        comparator = answer.pair.arms[1][0]
        if isinstance(peer := answer.pair.comparator, Blend):
            comparator = curve(peer.configuration, comparator.setting, groups).groups[-1]
        floors = (a.pair.floor for a in answers if a.pair is not None and a.pair.floor is not None)
        return comparator, next(floors, None)
    return None


def _arm(
    group: RunGroup, reference: RunGroup, measure: Measure, book: Scorebook, floor: RunGroup | None
) -> SizedShare | None:
    """The arm with its share; None if its scores cannot be compared, as a note of the results says."""
    try:
        sides = compare.paired_scores(group, reference, measure, book, floor)
    except UserError:
        return None
    if sides.zero is None or sides.gain is None:
        return None
    share = None
    if min(sides.method.shape) > 1:
        share = Better().kept(sides, 1 - LEVEL)
    elif (gain := float(sides.gain.mean())) > 0:
        share = Interval(float((sides.method - sides.zero).mean()) / gain, math.nan, math.nan)
    return None if share is None else SizedShare(group, share, len(sides.seeds))

"""The lines of the forest plot: one for each answer to a claim, on the scale of shares (shares.py)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tiedlora.analysis import claims, shares
from tiedlora.analysis.answers import Answer, Verdict
from tiedlora.analysis.claims import Claim
from tiedlora.records.interval import Interval

LEAST, MOST = -0.25, 1.6
"""The widest axis, in shares of the comparator's gain. What lies beyond it ends in an arrow."""
USUAL = (-0.1, 1.3)
"""The narrowest axis: the base at 0 and the comparator at 1 are always on it."""
STEPS = (0.05, 0.1, 0.25, 0.5)


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

    @property
    def in_words(self) -> str:
        """The share as text, such as `97 % [88, 106]`, or why there is none."""
        if self.share is None:
            return self.missing
        return share_in_words(self.share, self.zone or ())


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


@dataclass(frozen=True)
class ForestGroup:
    """The lines of one claim for one model."""

    claim: str
    rule: str
    """What the rule asks for, in words."""
    comparator: str
    lines: list[ForestLine]


def line(answer: Answer) -> ForestLine:
    """The line of one answer."""
    gain, share = answer.comparator_gain, answer.kept
    missing = ""
    if share is None and gain is not None and gain > 0 and answer.difference is not None:
        # One seed has no interval over seeds. Its difference has one over rows.
        share = _of_one_seed(answer, gain)
    if answer.pair is None or answer.measure is None:
        missing = "not run" if answer.pair is None else "no comparison yet"
    elif share is None:
        without_base = "no scores of the base" if answer.seeds else "no comparison yet"
        missing = "no gain of the comparator" if gain is not None else without_base
    elif answer.verdict == Verdict.UNINFORMATIVE:
        share, missing = None, "the comparator's gain may be 0"
    is_firm = answer.look is not None and not (answer.gain_may_be_zero and answer.claim.rule.needs_base)
    zone = shares.zone(answer.claim.rule, gain) if share is not None and gain else None
    return ForestLine(answer.task, answer.verdict.value, is_firm, share, zone, missing)


def _of_one_seed(answer: Answer, gain: float) -> Interval:
    assert answer.difference is not None
    assert answer.measure is not None
    difference, sign = answer.difference.widest, answer.measure.sign
    low, high = sorted(1 + sign * end / gain for end in (difference.low, difference.high))
    return Interval(1 + sign * difference.value / gain, low, high)


def groups(answers: Iterable[Answer]) -> list[ForestGroup]:
    """The answers of one model, by claim, in their order."""
    by_claim: dict[int, tuple[Claim, list[ForestLine]]] = {}
    for answer in answers:
        by_claim.setdefault(id(answer.claim), (answer.claim, []))[1].append(line(answer))
    return [
        ForestGroup(claim.name, claims.in_words(claim.rule), claim.comparator.configuration, lines)
        for claim, lines in by_claim.values()
    ]


@dataclass(frozen=True)
class ShareAxis:
    """The axis that all lines of a plot share."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def nearest(self, share: float) -> float:
        """The share, or the end of the axis that it is beyond."""
        return min(self.high, max(self.low, share))

    def place(self, share: float) -> float:
        """Where a share is on the axis, from 0 to 1. Shares beyond an end are at this end."""
        return min(1.0, max(0.0, (share - self.low) / (self.high - self.low)))


def axis(lines: Sequence[ForestLine]) -> ShareAxis:
    """The axis for these lines: as narrow as their intervals and zones allow, and within LEAST to MOST."""
    drawn = [(one.share, one.zone or ()) for one in lines if one.share is not None]
    beyond_zones = [end + 0.1 for _, zone in drawn for end in zone if math.isfinite(end)]
    return axis_of((share for share, _ in drawn), [*USUAL, *beyond_zones])


def axis_of(intervals: Iterable[Interval], more: Iterable[float]) -> ShareAxis:
    """The axis that holds these shares with their intervals, and `more` shares, within LEAST to MOST."""
    ends = [end for one in intervals for end in (one.value, one.low, one.high) if not math.isnan(end)]
    ends += more
    low, high = max(LEAST, min(ends)), min(MOST, max(ends))
    step = next(step for step in (*STEPS, 1.0) if (high - low) / step <= 7 or step == 1.0)
    first = math.ceil(low / step - 1e-9)
    ticks = [step * number for number in range(first, math.floor(high / step + 1e-9) + 1)]
    return ShareAxis(low, high, tuple(round(tick, 6) for tick in ticks))

"""The number that a claim's rule tests, which stands beside its verdict wherever people read one."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tiedlora.analysis.answers import Answer
from tiedlora.records.interval import Interval


@dataclass(frozen=True)
class Tested:
    """The number that a rule tests, as people read it: the share that is kept, or the difference from the comparator.

    At a look it has the look's level and seeds, so its interval never contradicts the verdict. Before the first look it
    has the level 5 % and all seeds.
    """

    interval: Interval
    """A share of the comparator's gain, or method minus comparator, which keeps the sign of a loss."""
    is_share: bool
    sign: float
    """-1 if a lower number is better."""
    zone: tuple[float, float]
    """What the rule asks for: the low and the high end of sign * interval."""


def number_tested(answer: Answer) -> Tested | None:
    """What the rule of an answer tests.

    Returns:
        None without such a number: where sides cannot be compared, or the comparator's gain may be 0 at the last look.
    """
    found, rule = answer.findings, answer.claim.rule
    if (margin := rule.margin) is None:
        share = found.share
        return None if share is None or share.kept is None else Tested(share.kept, True, 1.0, rule.zone(share.gain))
    if answer.measure is None:
        return None
    sign = answer.measure.sign
    if (contrast := found.contrast) is not None:
        low, high = sorted((sign * (contrast.low + margin), sign * (contrast.high + margin)))
        difference = Interval(sign * (contrast.value + margin), low, high, contrast.method)
    elif found.difference is not None:
        difference = found.difference.widest
    else:
        return None
    return Tested(difference, False, sign, (margin, math.inf))

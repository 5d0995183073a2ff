"""Every claim on one scale: the share of the comparator's gain over the base that the method keeps.

0 is the base and 1 is the comparator, in every metric and on every task, so that one figure can hold them all. A rule
then asks for a zone of this scale, such as 0.9 or more, and an answer has an interval on it.

The ends of the interval are those of the rule's own contrasts, divided by the comparator's gain. So an interval lies
inside the zone exactly if the rule supports the claim, and outside exactly if it contradicts it (where the rule also
asks for the comparator's gain, that must be shown as well).
"""

from __future__ import annotations

import math

from tiedlora.analysis import crossed
from tiedlora.analysis.crossed import Array
from tiedlora.analysis.rules import Better, Level, Retains, Rule, WithinMargin
from tiedlora.records.interval import Interval


def zone(rule: Rule, gain: float) -> tuple[float, float]:
    """The shares that the rule asks for: the low and the high end, which may be infinite.

    Args:
        gain: the comparator's gain over the base, above 0. Rules with a margin in the score's unit need it.
    """
    match rule:
        case Retains(rho):
            return rho, math.inf
        case Level(delta):
            return 1 - delta, 1 + delta
        case Better(margin):
            return 1 + margin / gain, math.inf
        case WithinMargin(margin):
            return 1 - margin / gain, math.inf
    raise TypeError(f"{rule} is no rule of a claim")


def kept(rule: Rule, sides: tuple[Array, Array, Array], level: float) -> Interval | None:
    """The share that the method keeps, with its interval over seeds and rows at a two-sided level.

    Args:
        sides: method, comparator (seeds, rows) and base (rows,); more is better. At least two seeds and rows.

    Returns:
        None if the comparator gains nothing on average.
    """
    method, comparator, base = sides
    gain = float((comparator - base).mean())
    if gain <= 0:
        return None
    low_end, high_end = zone(rule, gain)
    value = float((method - base).mean()) / gain
    contrasts = rule.contrasts(*sides)
    above = crossed.both_interval(contrasts[0], level)
    low, high = low_end + above.low / gain, low_end + above.high / gain
    if len(contrasts) > 1 and high >= low_end:
        # The second contrast of Level is the distance below the zone's high end.
        below = crossed.both_interval(contrasts[1], level)
        if below.high < 0:
            low, high = high_end - below.high / gain, high_end - below.low / gain
        else:
            # The two contrasts have intervals of different widths; the bar reaches into the zone if neither is below 0.
            low, high = min(low, high_end), max(high_end - below.low / gain, low_end)
    return Interval(value, low, high, "crossed")

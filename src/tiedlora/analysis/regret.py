"""Claims whose arms may have a rate that is far from the best one.

The bound of a rate's regret (rate_choice.regret_bound) is a loss on validation rows. So it says something about claims
that compare losses. An arm's rate is in doubt for a claim if the bound is larger than half of the claim's margin.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tiedlora.analysis.claims import Pair
from tiedlora.analysis.groups import RunGroup
from tiedlora.analysis.rules import Rule, Sides
from tiedlora.analysis.runs import Measure
from tiedlora.records.loss_metrics import LOSS_METRICS

LARGEST_PART = 0.5
"""Of a claim's margin."""
SHORT_MARK = "rate in doubt"


@dataclass(frozen=True, eq=False)
class DoubtfulRate:
    """An arm of a claim whose rate is in doubt."""

    group: RunGroup
    regret: float
    """The most that it changes the claim's contrast, in nats: the bound, times the arm's part in a point of a curve."""
    margin: float

    def __str__(self) -> str:
        return (
            f"the rate of {self.group.name} is in doubt: it may be worse than the best one by {self.regret:.3f} nats, "
            f"and the margin is {self.margin:.3f}"
        )


def claim_margin(rule: Rule, sides: Sides) -> float | None:
    """The margin of a claim, in the score's unit: how far it is from the edge of what the rule asks for. Of a share of
    the gain it is at most what that share leaves.

    Returns:
        None if a share has no gain to refer to.
    """
    if rule.margin is not None:
        return _distance(rule, sides)
    if sides.gain is None or (gain := float(sides.gain.mean())) <= 0:
        return None
    return min(_distance(rule, sides), (1 - rule.low) * gain)


def _distance(rule: Rule, sides: Sides) -> float:
    return abs(float(rule.contrast(sides).mean()))


def doubtful_rates(rule: Rule, pair: Pair, measure: Measure, sides: Sides) -> tuple[DoubtfulRate, ...]:
    """The arms of the method, the comparator and the floor whose rate is in doubt; none if no losses are compared.

    A floor has the weight in the contrast that the share of the gain leaves it: a tenth in *keeps 90 %*.
    """
    margin = claim_margin(rule, sides) if measure.metric in LOSS_METRICS else None
    if margin is None:
        return ()
    parts = [*pair.method.parts, *pair.comparator.parts]
    if pair.floor is not None and rule.needs_zero:
        parts.append((abs(1 - rule.low), pair.floor))
    bounds = [(group, weight * group.regret.nats) for weight, group in parts if group.regret is not None]
    return tuple(DoubtfulRate(group, bound, margin) for group, bound in bounds if bound > LARGEST_PART * margin)


def mark_arms(doubtful: Iterable[Sequence[DoubtfulRate]]) -> None:
    """Mark the arms with a rate that is in doubt for any claim."""
    for group in (rate.group for rates in doubtful for rate in rates):
        if SHORT_MARK not in group.short_marks:
            group.short_marks.append(SHORT_MARK)
            group.marks.append(f"{SHORT_MARK}: claims for which this matters say so")

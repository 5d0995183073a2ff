"""What a sweep can be expected to decide, before it is run: the chances at the planned looks of each claim."""

from __future__ import annotations

from collections.abc import Iterable

from tiedlora.analysis import looks
from tiedlora.analysis.claims import Claim
from tiedlora.analysis.crossed import Spread
from tiedlora.analysis.looks import Looks
from tiedlora.analysis.rules import Better, Level, Retains, Rule, WithinMargin

ASSUMED = Spread(seeds=0.01, examples=0.3, rest=0.45)
"""The spread of a paired difference that is assumed before anything was measured: one point between seeds; a third of
the examples differ between two methods, and a half between two seeds of one method."""
PLANNED_DIFFERENCE = 0.02
"""A claim without a margin is planned for a true difference of two points."""


def plan(claims: Iterable[Claim], seeds: int, rows: int, spread: Spread = ASSUMED) -> list[str]:
    """What a sweep with so many seeds and test rows can decide, one line per claim.

    Args:
        spread: the spread of the contrast, from earlier runs (crossed.measured_spread) if there are any.
    """
    return [f"{claim.name}: {_outlook(claim, seeds, rows, spread)}" for claim in claims]


def _outlook(claim: Claim, seeds: int, rows: int, spread: Spread) -> str:
    planned = claim.plan.looks
    count = sum(look <= seeds for look in planned.seeds)
    if count == 0:
        return f"{seeds} seeds reach no planned look (the first is at {planned.seeds[0]} seeds)"
    reached = Looks(planned.seeds[:count], planned.levels[:count])
    where = f"looks at {', '.join(map(str, reached.seeds))} seeds of {rows:,} rows"
    known = ", assuming a usual spread of scores" if spread is ASSUMED else ""
    if (share := slack(claim.rule)) is not None:
        is_level = isinstance(claim.rule, Level)
        gain = 100 * looks.gain_needed_at_last_look(1 - share, spread, rows, reached, both_sides=is_level)
        if gain > 100:
            return f"{where} will hardly decide it: use more seeds or rows, or compare the loss{known}"
        return (
            f"{where} decide it in 4 of 5 tries if the two are equal and the comparator gains {gain:.0f} points or "
            f"more{known}"
        )
    distance = getattr(claim.rule, "margin", 0.0) or PLANNED_DIFFERENCE
    chance = looks.chance_at_looks(distance, spread, rows, reached)[-1]
    return f"{where} decide it with a chance of {100 * chance:.0f} % if it is true by {100 * distance:g} points{known}"


def slack(rule: Rule) -> float | None:
    """The share of the comparator's gain between a method that equals the comparator and the rule's boundary."""
    match rule:
        case Retains(rho):
            return 1 - rho
        case Level(delta):
            return delta
        case Better() | WithinMargin():
            return None
    raise TypeError(f"{rule} is no rule of a claim")

"""What would decide a claim: the seeds of its next look, and how likely a later look decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tiedlora.analysis import rules
from tiedlora.analysis.claims import Claim
from tiedlora.analysis.comparison import PlannedSides
from tiedlora.analysis.rules import Sides
from tiedlora.text import number_list


@dataclass(frozen=True)
class Next:
    """What would decide a claim, how likely, and with which seeds, as an Answer has them."""

    decide: str
    chance: float | None = None
    lacking: Mapping[str, set[int]] = field(default_factory=dict)


def before_look(
    claim: Claim, found: PlannedSides, number: int, ended: Mapping[str, set[int]], taken: Mapping[int, int]
) -> Next | None:
    """What is needed before the look with this number can be taken; None if it can.

    Args:
        ended: group -> its seeds that have ended.
        taken: the number of each earlier look that was taken -> how many of its seeds all sides have.
    """
    declared, count = set(claim.plan.of_look(number)), claim.plan.looks[number]
    if claim.shared_seeds(number):
        return Next(f"a larger seed_offset: with {count} seeds, both sides would have the same runs")
    if not all(declared <= own for own in ended.values()):
        return _wait_for(claim, found.sides, number, ended, taken)
    if found.usable is not None and not declared <= found.usable:
        return Next(f"scores of the look at {count} seeds that can be compared: {found.problem}")
    return None


def _wait_for(claim: Claim, sides: Sides, number: int, ended: Mapping[str, set[int]], taken: Mapping[int, int]) -> Next:
    """What the look with this number still needs, and how likely it or a later one decides, by the last one's seeds."""
    plan, decide = claim.plan, next_look(claim, number, ended)
    lacking = {name: seeds for name, own in ended.items() if (seeds := set(plan.of_look(number)) - own)}
    # A prediction is from all seeds of a look, so none may have diverged.
    if not taken or taken[last := max(taken)] < plan.looks[last]:
        return Next(decide, None, lacking)
    chance = rules.chance_of_decision(claim.rule, sides.of(plan.of_look(last)), plan, last)
    if chance < rules.FUTILE:
        return Next(f"no planned look is likely to change it (chance {100 * chance:.0f} %)", chance)
    return Next(f"{decide}; a later look decides with a chance of {100 * chance:.0f} %", chance, lacking)


def next_look(claim: Claim, number: int, ended: Mapping[str, set[int]]) -> str:
    """The look with this number in words, and the seeds that it still needs; empty if it has all of them.

    Args:
        ended: group -> its seeds that have ended; empty if no group is known.
    """
    declared = claim.plan.of_look(number)
    seeds = {name: number_list(set(declared) - own) for name, own in ended.items()} or {"": number_list(declared)}
    missing = [f"seeds {lacking} of {name}" for name, lacking in seeds.items() if lacking]
    if not missing:
        return ""
    if len(set(seeds.values())) == 1:
        missing = [f"seeds {next(iter(seeds.values()))} {'on both sides' if len(seeds) <= 2 else 'of every arm'}"]
    words = f"the look at {claim.plan.looks[number]} seeds: needs {', '.join(missing)}"
    offsets = {"method": claim.method.seed_offset, "comparator": claim.comparator.seed_offset}
    later = [f"those of the {name} are counted from {offset}" for name, offset in offsets.items() if offset]
    return f"{words} ({'; '.join(later)})" if later else words

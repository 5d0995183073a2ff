"""Which groups a claim compares: the two sides in one setting, by rank or by the number of parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tiedlora import tying
from tiedlora.analysis.claims import EQUAL_RANK, Claim, Side
from tiedlora.analysis.groups import RunGroup
from tiedlora.config import compose
from tiedlora.errors import UserError

KNOWN = (*tying.NAMES, *tying.STARTS, "LoRA_qkv")
"""Configurations whose name follows from their values."""
TOLERANCE = 0.05
"""Numbers of parameters count as equal up to this share."""


@dataclass(frozen=True)
class Pair:
    """The two sides of a claim in one setting."""

    anchor: RunGroup
    """The group of the side that has a rank of its own. The other side is matched to it."""
    method: RunGroup | None
    comparator: RunGroup | None
    problem: str = ""
    """Why a side is missing."""
    searched: tuple[RunGroup | None, RunGroup | None] = (None, None)
    """The two sides with the runs of all seeds, also those below a side's seed_offset."""
    name: str = ""
    """The anchor's configuration, if several anchors of one setting answer the claim."""

    @property
    def task(self) -> str:
        return self.anchor.task

    @property
    def task_in_words(self) -> str:
        """The task, with what tells apart several answers to one claim: the variant of the setting, or the anchor."""
        apart = ", ".join(filter(None, (self.anchor.variant, self.name)))
        return f"{self.task} ({apart})" if apart else self.task

    @property
    def model(self) -> str:
        return self.anchor.model


def pairs(claim: Claim, groups: Sequence[RunGroup]) -> list[Pair]:
    """A pair for every group of the side with a rank (of two such sides: the method), on the claim's tasks.

    Of several such groups in one setting, the plain one answers (RunGroup.is_plain); without one, all do.
    """
    anchored = claim.comparator if claim.method.at else claim.method
    anchors = [
        group
        for group in groups
        if claim.covers(group.task) and _is_of(group, anchored) and group.rank == anchored.rank
    ]
    found = []
    for anchor in anchors:
        alike = [other for other in anchors if other.setting == anchor.setting]
        plain = [other for other in alike if other.is_plain]
        if anchor in (plain or alike):
            found.append(_pair(claim, anchor, groups, anchor.configuration if len(plain or alike) > 1 else ""))
    return found


def _pair(claim: Claim, anchor: RunGroup, groups: Sequence[RunGroup], name: str) -> Pair:
    matched, own = (claim.method, claim.comparator) if claim.method.at else (claim.comparator, claim.method)
    partner, problem = _partner(matched, anchor, groups, may_be_anchor=matched.seed_offset != own.seed_offset)
    method, comparator = (partner, anchor) if claim.method.at else (anchor, partner)
    shifted = _shifted(method, claim.method), _shifted(comparator, claim.comparator)
    return Pair(anchor, *shifted, problem, (method, comparator), name)


def _shifted(group: RunGroup | None, side: Side) -> RunGroup | None:
    """The group with its seeds counted from the side's offset. Runs of lower seeds are left out."""
    if group is None or side.seed_offset == 0:
        return group
    runs = [
        replace(run, record=replace(run.record, seed=run.seed - side.seed_offset))
        for run in group.runs
        if run.seed >= side.seed_offset
    ]
    failed, diverged = (
        {seed - side.seed_offset for seed in seeds if seed >= side.seed_offset}
        for seeds in (group.failed_seeds, group.diverged_seeds)
    )
    name = f"{group.configuration} (seeds from {side.seed_offset})"
    return replace(group, configuration=name, runs=runs, failed_seeds=failed, diverged_seeds=diverged)


def _is_of(group: RunGroup, side: Side) -> bool:
    """Whether the group is of the side's configuration: a known name, or the name of a specification of one's own.

    A changed TABuv, such as one with dropout, may still be called TABuv. It is not the TABuv of a claim.
    """
    if group.label == side.configuration:
        return True
    record = group.runs[0].record
    has_own_name = record.label == "custom" or record.is_other_method
    is_its_name = has_own_name and record.config.tying.name == side.configuration
    return is_its_name and side.configuration not in KNOWN


def _partner(
    side: Side, anchor: RunGroup, groups: Sequence[RunGroup], may_be_anchor: bool
) -> tuple[RunGroup | None, str]:
    """The group of the side in the anchor's setting, or None and the reason.

    Args:
        may_be_anchor: whether the anchor may be compared with itself, on other seeds.
    """
    candidates = [group for group in groups if group.setting == anchor.setting and _is_of(group, side)]
    if side.rank is not None or side.at == EQUAL_RANK:
        rank = side.rank or anchor.rank
        of_rank = [group for group in candidates if group.rank == rank and (group is not anchor or may_be_anchor)]
        if of_rank:
            return _only_one(of_rank, anchor)
        return None, f"{side.configuration} r={rank} was not run in the same setting"
    if not candidates:
        return None, f"{side.configuration} was not run in the same setting"
    distances = [abs(math.log(group.params / anchor.params)) for group in candidates]
    nearest = candidates[distances.index(min(distances))]
    if abs(nearest.params / anchor.params - 1) <= TOLERANCE:
        return _only_one([group for group in candidates if group.params == nearest.params], anchor)
    return None, (
        f"no {side.configuration} of about {anchor.params:,} parameters was run (nearest: r={nearest.rank} with "
        f"{nearest.params:,}); {_advice(nearest, anchor.params)}"
    )


def _only_one(groups: Sequence[RunGroup], anchor: RunGroup) -> tuple[RunGroup | None, str]:
    """The plain one of several groups; without one, the one that scales its steps as the anchor; else a problem."""
    plain = [group for group in groups if group.is_plain]
    alike = [group for group in groups if group.step_size == anchor.step_size]
    # The anchor is among them if it is compared with itself, on other seeds.
    for some in (groups, [group for group in groups if group is anchor], plain, alike):
        if len(some) == 1:
            return some[0], ""
    names = ", ".join(group.name for group in groups)
    return None, f"several groups fit, and no single one is plain: {names}; report a folder with only one of them"


def _advice(group: RunGroup, params: int) -> str:
    """The rank to run for this number of parameters."""
    try:
        config = compose.load(OmegaConf.create(group.runs[0].record.config.tree))
    except (UserError, OmegaConfBaseException):
        return "run another rank"
    # The number of parameters is a straight line over the rank.
    at_one, at_two = (tying.trainable_params(config.tying, rank, config.model.architecture) for rank in (1, 2))
    rank = 1 + max(0, round((params - at_one) / max(1, at_two - at_one)))
    count = tying.trainable_params(config.tying, rank, config.model.architecture)
    if abs(count / params - 1) <= TOLERANCE:
        return f"run rank.r={rank}"
    return f"no rank comes within {100 * TOLERANCE:g} % of it (nearest: r={rank} with {count:,}); match the other side"


def unequal_effort(first: RunGroup, second: RunGroup) -> str:
    """A note if the learning rates of two groups were searched with unequal effort; empty if they were not."""
    counts = len(first.rates), len(second.rates)
    if counts[0] == counts[1]:
        return ""
    return f"unequal search: {_rates(counts[0])} of {first.name} against {_rates(counts[1])} of {second.name}"


def _rates(count: int) -> str:
    return f"{count} rate{'s' if count > 1 else ''}"


def in_words(claim: Claim) -> str:
    """The side that has a rank, such as `TABuv r=8`."""
    side = claim.comparator if claim.method.at else claim.method
    return f"{side.configuration} r={side.rank}"

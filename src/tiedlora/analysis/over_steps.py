"""The lead over the steps of training: each arm against LoRA of its size, at every validation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tiedlora.analysis.groups import Peer, RunGroup
from tiedlora.analysis.intervals import Array, both_interval, loss_contrast
from tiedlora.analysis.ranking import RankedArm
from tiedlora.records.interval import Interval
from tiedlora.records.rows import ValidationLosses


@dataclass(frozen=True)
class LeadAtStep:
    """How much lower or higher an arm's validation loss is than that of LoRA, at one step."""

    group: RunGroup
    lora: Peer
    step: int
    seeds: int
    difference: Interval
    """The arm's mean loss per token minus LoRA's, in nats, paired by row and seed. The 95 % interval is over seeds and
    validation rows, for this step alone. Its ends are NaN with one seed or one row."""


def leads(rankings: Sequence[Sequence[RankedArm]]) -> list[list[LeadAtStep]]:
    """For each arm that a ranking compares with LoRA, its leads in the order of the steps.

    An arm is left out if its runs and LoRA's share no seed, if their validation rows differ, or if they have fewer than
    two validations with a loss for every row.
    """
    found, seen = [], set()
    for arm in (arm for ranking in rankings for arm in ranking):
        # A setting has a ranking for each metric, and one training.
        if arm.lora is None or arm.group.is_control or arm.group in seen:
            continue
        seen.add(arm.group)
        try:
            own = _leads(arm.group, arm.lora)
        except ValueError:
            continue
        if len(own) > 1:
            found.append(own)
    return found


def _leads(group: RunGroup, lora: Peer) -> list[LeadAtStep]:
    """Raises ValueError: the validation rows are not the same."""
    ours = _by_seed(group)
    parts = [(weight, _by_seed(part)) for weight, part in lora.parts]
    # Each seed at each step that all of them have.
    seeds = sorted(set(ours).intersection(*(theirs for _, theirs in parts)))
    if not seeds:
        return []
    every = [own[seed] for own in (ours, *(theirs for _, theirs in parts)) for seed in seeds]
    found = []
    for step in sorted(set.intersection(*map(set, every))):
        first = [ours[seed][step] for seed in seeds]
        # The weights add up to 1, so this is the arm minus the point of LoRA's curve.
        table: Array = np.sum(
            [w * loss_contrast(first, [theirs[seed][step] for seed in seeds]) for w, theirs in parts], axis=0
        )
        value = float(table.mean())
        difference = both_interval(table) if min(table.shape) > 1 else Interval(value, math.nan, math.nan)
        found.append(LeadAtStep(group, lora, step, len(seeds), difference))
    return found


def _by_seed(group: RunGroup) -> dict[int, dict[int, ValidationLosses]]:
    """Seed -> step -> the loss of every validation row."""
    return {run.seed: run.losses_by_step() for run in group.runs}

"""The lead over the steps of training: each arm against LoRA of its size, at every validation."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tiedlora.analysis.groups import Peer, RunGroup
from tiedlora.analysis.intervals import Array, both_interval, loss_contrast
from tiedlora.analysis.ranking import RankedArm
from tiedlora.analysis.results import BASELINE
from tiedlora.analysis.runs import Measure
from tiedlora.records.interval import Interval
from tiedlora.records.rows import ValidationLosses


@dataclass(frozen=True)
class LeadAtStep:
    """How much lower or higher an arm's validation loss is than that of LoRA, at one step.

    Both numbers are paired by row and seed, and their 95 % intervals are over seeds and validation rows (taken as
    independent). The ends are NaN with one seed or one row.
    """

    group: RunGroup
    lora: Peer
    step: int
    seeds: int
    difference: Interval
    """The arm's mean loss per token minus LoRA's, in nats."""
    change: Interval
    """The difference at the last step minus this one. A lead (a difference below 0) that shrinks has a change above 0.
    """


def leads(rankings: Sequence[Sequence[RankedArm]]) -> list[list[LeadAtStep]]:
    """For each arm that a ranking compares with LoRA, its leads in the order of the steps.

    The seeds are those that both have scores of, as in the ranking. A LoRA has no lead, because it is what the others
    are compared with. An arm that learned anything else than the rows' targets has none, because its loss on them says
    nothing. Nor has one without two validations with a loss for every row, or with other validation rows than LoRA.
    """
    found, seen = [], set()
    by_seed = functools.cache(_by_seed)
    for arm in (arm for ranking in rankings for arm in ranking):
        # A setting has a ranking for each metric, and one training.
        if arm.lora is None or arm.from_lora is None or arm.group in seen:
            continue
        if arm.group.arm.trained_for or arm.group.arm.family == BASELINE:
            continue
        seen.add(arm.group)
        try:
            own = _leads(arm.group, arm.lora, functools.partial(by_seed, arm.measure))
        except ValueError:
            continue
        if len(own) > 1:
            found.append(own)
    return found


LossesOfRuns = Callable[[RunGroup], dict[int, dict[int, ValidationLosses]]]


def _leads(group: RunGroup, lora: Peer, by_seed: LossesOfRuns) -> list[LeadAtStep]:
    """Raises ValueError: the validation rows are not the same."""
    ours = by_seed(group)
    parts = [(weight, by_seed(part)) for weight, part in lora.parts]
    seeds = sorted(set(ours).intersection(*(theirs for _, theirs in parts)))
    if not seeds:
        return []
    every = [own[seed] for own in (ours, *(theirs for _, theirs in parts)) for seed in seeds]
    tables: dict[int, Array] = {}
    for step in sorted(set.intersection(*map(set, every))):
        first = [ours[seed][step] for seed in seeds]
        # The weights add up to 1, so this is the arm minus the point of LoRA's curve.
        contrasts = (weight * loss_contrast(first, [own[seed][step] for seed in seeds]) for weight, own in parts)
        tables[step] = sum(contrasts, np.zeros(()))
    return [
        LeadAtStep(group, lora, step, len(seeds), _interval(table), _interval(tables[max(tables)] - table))
        for step, table in tables.items()
    ]


def _interval(table: Array) -> Interval:
    """Of a table (seeds, rows)."""
    if min(table.shape) > 1:
        return both_interval(table)
    return Interval(float(table.mean()), math.nan, math.nan)


def _by_seed(measure: Measure, group: RunGroup) -> dict[int, dict[int, ValidationLosses]]:
    """Seed -> step -> the loss of every validation row, for the runs that have both."""
    found = {run.seed: run.losses_by_step() for run in measure.scored(group.runs)}
    return {seed: losses for seed, losses in found.items() if losses}

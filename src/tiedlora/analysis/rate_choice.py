"""The choice of a learning rate: one rule for `scripts/sweep.py select`, the staged sweeper and the report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean

from tiedlora.records.run_record import RunRecord
from tiedlora.records.selection import validation_metric, validation_scores

CRITERIA = ("score", "loss")
"""The criteria of the choice: the task's first metric on validation, or the validation loss."""


@dataclass(frozen=True)
class RateTrial:
    """One learning rate that was tried, with its runs. Every rate that was tried counts when an edge is looked for."""

    lr: float
    losses: Mapping[int, float] = field(default_factory=dict)
    """Seed -> the last validation loss of its finished run."""
    scores: Mapping[int, float] = field(default_factory=dict)
    """Seed -> the task's first metric on validation (more is better), for the runs that have it."""
    failed: frozenset[int] = frozenset()
    """The seeds whose runs failed."""

    def failed_seeds(self) -> frozenset[int]:
        """The seeds whose runs failed or ended with a loss that is not finite."""
        return self.failed | {seed for seed, loss in self.losses.items() if not math.isfinite(loss)}


def rate_trials(
    records: Mapping[float, Mapping[int, RunRecord]], failed: Mapping[float, Iterable[int]]
) -> list[RateTrial]:
    """The trials of one configuration, in ascending order, from each rate's finished runs and failed seeds."""
    metric = validation_metric(record for of_seed in records.values() for record in of_seed.values())
    return [
        RateTrial(
            lr,
            {seed: record.training.validation_loss_last for seed, record in records[lr].items()},
            validation_scores(records[lr], metric),
            frozenset(failed.get(lr, ())),
        )
        for lr in sorted(records)
    ]


@dataclass(frozen=True)
class ChosenRate:
    """The chosen rate, and what it was compared on."""

    lr: float
    by: str
    """The criterion that was used, one of CRITERIA."""
    value: float
    """The mean of the criterion over `seeds`."""
    loss: float
    """The mean validation loss over `seeds`."""
    seeds: tuple[int, ...]
    """The seeds of the last comparison, which the rate and the one before it share; all its own seeds if there was no
    comparison, or if no seed is shared."""
    usable: tuple[float, ...]
    """The rates that could be chosen, in ascending order."""
    tried: tuple[float, ...]
    """All rates, in ascending order."""
    edge: bool
    """Whether the rate is the lowest or the highest of two or more tried ones, so a better one may lie beyond."""
    paired: bool
    """Whether every comparison was made on shared seeds."""
    failed: bool = False
    """Whether every rate failed at some seed, and this one was chosen among those that failed at the fewest."""


def choose_rate(trials: Sequence[RateTrial], by: str = "score", accept_failed: bool = False) -> ChosenRate | None:
    """Choose the best learning rate of one configuration.

    - A rate is usable if it has a finished run and failed at no seed: a rate that diverges at one seed is no rate to
      use.
    - The rates leave one by one, each time the worst by the mean over the seeds that all remaining rates have. So if
      all rates have the same seeds, the best mean is chosen. If some rates were tried at more seeds than others (the
      finalists of a search), they are compared on more of them. If the rates share no seed, each is compared by its
      own seeds, and the choice is not paired.
    - `score` is used only if each usable rate has it at each shared seed. Otherwise the loss is used.
    - For equal values, the lower loss is better, then the lower rate. So the order of the trials does not matter.
    - A rate is at the edge if it is the lowest or the highest of at least two that were tried. A failed or stopped
      rate beyond the chosen one counts as tried. A single rate is not at an edge.

    Args:
        trials: the tried rates, each once.
        by: one of CRITERIA. Compare the result's `by` to see whether scores were missing.
        accept_failed: what to do if every rate failed at some seed. By default no rate is chosen, and `select` ends
            with an error. With True, as in the report, the rates that failed at the fewest seeds are usable, and the
            result says so.

    Returns:
        The chosen rate; None if no rate is usable.
    """
    tried = tuple(sorted(trial.lr for trial in trials))
    finished = {trial.lr: _finite(trial) for trial in trials}
    candidates = [trial for trial in trials if finished[trial.lr].losses]
    usable = [trial for trial in candidates if not trial.failed_seeds()]
    all_failed = bool(candidates) and not usable
    if all_failed and accept_failed:
        fewest = min(len(trial.failed_seeds()) for trial in candidates)
        usable = [trial for trial in candidates if len(trial.failed_seeds()) == fewest]
    if not usable:
        return None
    remaining = [finished[trial.lr] for trial in usable]
    if by == "score":
        by = "score" if _all_scored(remaining) else "loss"
    values = {trial.lr: trial.scores if by == "score" else trial.losses for trial in remaining}
    paired = True
    seeds = frozenset(values[remaining[0].lr])
    while len(remaining) > 1:
        seeds = frozenset.intersection(*(frozenset(values[trial.lr]) for trial in remaining))
        paired = paired and bool(seeds)
        remaining.sort(key=lambda trial: _order(trial, by, seeds or frozenset(values[trial.lr])))
        remaining.pop()
    (best,) = remaining
    seeds = seeds or frozenset(values[best.lr])
    return ChosenRate(
        lr=best.lr,
        by=by,
        value=_mean(values[best.lr], seeds),
        loss=_mean(best.losses, seeds),
        seeds=tuple(sorted(seeds)),
        usable=tuple(sorted(trial.lr for trial in usable)),
        tried=tried,
        edge=len(tried) > 1 and best.lr in (tried[0], tried[-1]),
        paired=paired,
        failed=all_failed,
    )


def _finite(trial: RateTrial) -> RateTrial:
    """The trial's finished runs: those with a finite loss, at seeds that did not fail."""
    losses = {seed: loss for seed, loss in trial.losses.items() if seed not in trial.failed_seeds()}
    scores = {seed: score for seed, score in trial.scores.items() if seed in losses and math.isfinite(score)}
    return RateTrial(trial.lr, losses, scores)


def _all_scored(trials: Sequence[RateTrial]) -> bool:
    """Whether each trial has a score at each seed that all trials share; without such seeds, at all of its own."""
    shared = frozenset.intersection(*(frozenset(trial.losses) for trial in trials))
    return all(set(shared or trial.losses) <= set(trial.scores) for trial in trials)


def _order(trial: RateTrial, by: str, seeds: frozenset[int]) -> tuple[float, float, float]:
    """A sort key that puts the best rate first."""
    loss = _mean(trial.losses, seeds)
    return (-_mean(trial.scores, seeds) if by == "score" else loss), loss, trial.lr


def _mean(values: Mapping[int, float], seeds: frozenset[int]) -> float:
    # In the order of the seeds, because rounding depends on the order of a sum.
    return mean(values[seed] for seed in sorted(seeds))

"""The choice of a learning rate: one rule for `scripts/sweep.py select`, the staged sweeper and the report."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean

from tiedlora.analysis.intervals import Array, both_interval, loss_contrast
from tiedlora.records.interval import LEVEL
from tiedlora.records.rows import ValidationLosses
from tiedlora.records.scores import Finished
from tiedlora.records.selection import validation_metric, validation_scores

CRITERIA = ("score", "loss")
"""The criteria of the choice: the metric of `validation_metric`, or the validation loss."""


@dataclass(frozen=True)
class RateTrial:
    """One learning rate that was tried, with its runs. Every rate that was tried counts when an edge is looked for."""

    lr: float
    losses: Mapping[int, float] = field(default_factory=dict)
    """Seed -> the last validation loss of its finished run."""
    scores: Mapping[int, float] = field(default_factory=dict)
    """Seed -> the value of `validation_metric`, negated for a loss (more is better), for the runs that have it."""
    failed: frozenset[int] = frozenset()
    """The seeds whose runs failed."""


def rate_trials(runs: Mapping[float, Mapping[int, Finished]], failed: Mapping[float, Iterable[int]]) -> list[RateTrial]:
    """The trials of one configuration, in ascending order, from each rate's finished runs and failed seeds."""
    metric = validation_metric(run for of_seed in runs.values() for run in of_seed.values())
    return [
        RateTrial(
            lr,
            {seed: run.record.training.validation_loss_last for seed, run in runs[lr].items()},
            validation_scores(runs[lr], metric),
            frozenset(failed.get(lr, ())),
        )
        for lr in sorted(runs)
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


def choose_rate(
    trials: Sequence[RateTrial], by: str = "score", accept_failed: bool = False, among: Container[float] | None = None
) -> ChosenRate | None:
    """Choose the best learning rate of one configuration.

    - A rate is usable if it has a finished run and failed at no seed.
    - The rates leave one by one, each time the worst by the mean over the seeds that all remaining rates have, so that
      the finalists of a search are compared on more of them. If they share no seed, each is compared by its own.
    - `score` is used only if each usable rate has it at each shared seed. Otherwise the loss is used.
    - For equal values, the lower loss is better, then the lower rate. So the order of the trials does not matter.

    Args:
        by: one of CRITERIA. Compare the result's `by` to see whether scores were missing.
        accept_failed: if every rate failed at some seed, those that failed at the fewest are usable, as in the report.
        among: the rates that may be chosen, if any of them is usable: those that a race has left. None allows all.

    Returns:
        The chosen rate; None if no rate is usable.
    """
    failures = {trial.lr: trial.failed for trial in trials}
    losses = {t.lr: {seed: loss for seed, loss in t.losses.items() if seed not in failures[t.lr]} for t in trials}
    finished = [lr for lr in losses if losses[lr]]
    fewest = min((len(failures[lr]) for lr in finished), default=0)
    usable = sorted(lr for lr in finished if len(failures[lr]) == fewest)
    if among is not None:
        usable = [lr for lr in usable if lr in among] or usable
    if not usable or (fewest > 0 and not accept_failed):
        return None
    scores = {t.lr: {seed: score for seed, score in t.scores.items() if seed in losses[t.lr]} for t in trials}
    shared = _shared(losses, usable)
    if not all(set(shared or losses[lr]) <= set(scores[lr]) for lr in usable):
        by = "loss"
    values = scores if by == "score" else losses
    remaining, paired = list(usable), True
    seeds = _shared(values, usable)

    def order(lr: float) -> tuple[float, float, float]:
        """A sort key that puts the best rate first."""
        own = seeds or values[lr]
        return _mean(values[lr], own) * (-1 if by == "score" else 1), _mean(losses[lr], own), lr

    while len(remaining) > 1:
        seeds = _shared(values, remaining)
        paired = paired and bool(seeds)
        remaining.sort(key=order)
        remaining.pop()
    (lr,) = remaining
    seeds, tried = seeds or frozenset(values[lr]), tuple(sorted(losses))
    return ChosenRate(
        lr=lr,
        by=by,
        value=_mean(values[lr], seeds),
        loss=_mean(losses[lr], seeds),
        seeds=tuple(sorted(seeds)),
        usable=tuple(usable),
        tried=tried,
        edge=len(tried) > 1 and lr in (tried[0], tried[-1]),
        paired=paired,
        failed=fewest > 0,
    )


def rate_contrast(
    ours: Mapping[int, ValidationLosses | None], theirs: Mapping[int, ValidationLosses | None]
) -> Array | None:
    """(seeds, rows): the loss of one rate minus that of another, over the seeds that both have (loss_contrast).

    Args:
        ours, theirs: seed -> the last losses of its run; None if they are gone.

    Returns:
        None with fewer than two seeds or rows.

    Raises:
        ValueError: the rows are not the same.
    """
    pairs = [(first, second) for seed in sorted(ours) if (first := ours[seed]) and (second := theirs.get(seed))]
    if len(pairs) < 2 or len(pairs[0][0].tokens) < 2:
        return None
    return loss_contrast([first for first, _ in pairs], [second for _, second in pairs])


@dataclass(frozen=True)
class RegretBound:
    """How much worse the chosen rate may be than the best one of those that it can be compared with."""

    nats: float
    """The upper end of a 95 % interval of the regret over seeds and validation rows; 0 or more."""
    rates: int
    """How many rates share two seeds or more with the chosen one."""
    seeds: int
    """The most seeds that one of them shares."""


def regret_bound(losses: Mapping[float, Mapping[int, ValidationLosses | None]], chosen: float) -> RegretBound | None:
    """The bound of the regret: of the chosen rate's true loss minus that of the best rate.

    It is the largest of the one-sided 95 % upper ends against each other rate. The best rate is one of them, so for a
    rate that is given, the regret is above its own end in at most 5 %. The chosen rate was chosen by the same losses,
    which flatters it if it is the wrong one: with six seeds the regret is then above the bound in 6 to 9 % (simulated
    for three to five rates; docs/sweeps.md).

    Args:
        losses: rate -> seed -> the last losses of its run; None if they are gone.

    Returns:
        None if no other rate shares two seeds with the chosen one. Such rates were stopped, or not among the best.

    Raises:
        ValueError: the rows are not the same.
    """
    others = {lr: own for lr, own in losses.items() if lr != chosen}
    tables = [table for own in others.values() if (table := rate_contrast(losses[chosen], own)) is not None]
    if not tables:
        return None
    highest = max(both_interval(table, 2 * (1 - LEVEL)).high for table in tables)
    return RegretBound(max(0.0, highest), len(tables), max(len(table) for table in tables))


def _shared(values: Mapping[float, Mapping[int, float]], rates: Iterable[float]) -> frozenset[int]:
    """The seeds that all of these rates have."""
    return frozenset.intersection(*(frozenset(values[lr]) for lr in rates))


def _mean(values: Mapping[int, float], seeds: Iterable[int]) -> float:
    # In the order of the seeds, because rounding depends on the order of a sum.
    return mean(values[seed] for seed in sorted(seeds))

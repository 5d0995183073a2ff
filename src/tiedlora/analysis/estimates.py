"""Estimates of the report with their intervals: a group's score, its gain over the base, and its difference to another.

Differences are paired on seeds and rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tiedlora.analysis import coverage, crossed, rules
from tiedlora.analysis.crossed import Array
from tiedlora.analysis.groups import RunGroup
from tiedlora.analysis.intervals import is_binary
from tiedlora.analysis.outliers import outlying
from tiedlora.analysis.runs import Run
from tiedlora.analysis.scorebook import Scorebook
from tiedlora.errors import UserError
from tiedlora.records.interval import LEVEL, Interval, Unit
from tiedlora.records.loss_metrics import is_loss
from tiedlora.text import number_list

OTHER_ENDS = "the answers of the two sides end at different tokens (docs/tasks.md)"


@dataclass(frozen=True)
class Measure:
    """What is compared: one metric on one split."""

    split: str
    metric: str

    @property
    def unit(self) -> Unit:
        """The unit of the metric."""
        return Unit.NATS if is_loss(self.metric) else Unit.POINTS

    @property
    def sign(self) -> float:
        """-1 for a loss, otherwise 1. The product of sign and value is better if it is higher."""
        return -1.0 if is_loss(self.metric) else 1.0

    def scored(self, group: RunGroup) -> list[Run]:
        """The group's runs that have this metric."""
        return [run for run in group.runs if self.split in run.splits and self.metric in run.splits[self.split].metrics]

    def has_base(self, run: Run) -> bool:
        """Whether the base model was scored too."""
        return self.metric in (run.splits[self.split].base or {})

    def values(self, runs: Sequence[Run]) -> Array:
        """(runs,): the recorded score of each run."""
        return np.array([run.splits[self.split].metrics[self.metric].value for run in runs])

    def base_values(self, runs: Sequence[Run]) -> Array:
        """(runs,): the base model's score that each run recorded."""
        return np.array([(run.splits[self.split].base or {})[self.metric].value for run in runs])


@dataclass
class Estimate:
    """A value with its 95 % intervals, each named by the variance that it covers. None: it cannot be computed."""

    value: float
    seeds: Interval | None = None
    """The t interval over seeds, on these examples."""
    examples: Interval | None = None
    """The interval over examples, with these seeds."""
    both: Interval | None = None
    """The interval over seeds and examples."""

    @property
    def widest(self) -> Interval:
        """The value with the interval that covers most: both, otherwise examples, seeds, or no interval (NaN)."""
        interval = self.both or self.examples or self.seeds or Interval(self.value, math.nan, math.nan)
        return dataclasses.replace(interval, value=self.value)


def score(runs: Sequence[Run], measure: Measure, book: Scorebook) -> tuple[Estimate, list[str]]:
    """The mean over the runs' seeds, and notes on intervals that cover less than 95 %.

    A single run has the interval of its record, so that report and record always agree.
    """
    values = measure.values(runs)
    estimate = Estimate(float(values.mean()))
    examples = runs[0].splits[measure.split].rows
    scoring_examples, by_bootstrap, notes = examples, False, []
    try:
        table = book.table(runs, measure.split, measure.metric)
        recorded = runs[0].splits[measure.split].metrics[measure.metric]
        estimate.examples = recorded if len(runs) == 1 else crossed.score_over_examples(table)
        # A score near 1 is as skewed as one near 0.
        scoring_examples = int(min((table != 0).any(0).sum(), (table != 1).any(0).sum()))
        by_bootstrap = len(runs) > 1 or not is_binary(table)
    except UserError as error:
        notes.append(f"no interval over examples: {error}")
    if len(runs) > 1:
        estimate.seeds = crossed.seeds_interval(values)
    if far := [runs[place].seed for place in outlying(values)]:
        notes.append(f"seed {number_list(far)} is far from the others: no t interval survives such a seed")
    if not is_loss(measure.metric):
        notes += coverage.remarks(
            estimate.value,
            seeds=len(runs),
            examples=examples,
            scoring_examples=scoring_examples,
            by_bootstrap=by_bootstrap,
        )
    return estimate, notes


def gain(group: RunGroup, measure: Measure, book: Scorebook) -> Estimate | None:
    """The paired difference to the base model, which has no seeds. A single run has the interval of its record."""
    runs = [run for run in measure.scored(group) if measure.has_base(run)]
    if not runs:
        return None
    values = measure.values(runs) - measure.base_values(runs)
    estimate = Estimate(float(values.mean()))
    if len(runs) == 1:
        estimate.examples = (runs[0].splits[measure.split].gain or {}).get(measure.metric)
        return estimate
    estimate.seeds = crossed.seeds_interval(values)
    try:
        ids, base = book.scores(runs[0], measure.split, measure.metric, base=True)
        table = book.table(runs, measure.split, measure.metric, ids)
        _add_paired_intervals(estimate, table, np.broadcast_to(base, table.shape))
    except UserError:
        # A note on the row's score already says what is wrong with the predictions.
        pass
    return estimate


def difference(ours: RunGroup, theirs: RunGroup, measure: Measure, book: Scorebook) -> tuple[Estimate | None, str]:
    """The paired difference of two groups over the seeds that both have, and notes for the reader."""
    try:
        first, second = _comparable_runs(ours, theirs, measure)
    except UserError as error:
        return None, str(error)
    values = measure.values(first) - measure.values(second)
    estimate = Estimate(float(values.mean()))
    notes = []
    if len(first) > 1:
        estimate.seeds = crossed.seeds_interval(values)
    try:
        _add_paired_intervals(estimate, *_paired_tables(first, second, measure, book))
    except UserError as error:
        notes.append(f"no interval over examples: {error}")
    commits = [{str(code.commit) for run in side for code in run.record.code_versions} for side in (first, second)]
    if commits[0] != commits[1]:
        notes.append("made by another commit")
    if other_ends(first, second, measure):
        notes.append(OTHER_ENDS)
    if (common := len(first)) < max(len(ours.runs), len(theirs.runs)):
        notes.append(f"{common} seed{'s' if common > 1 else ''} in common")
    return estimate, "; ".join(notes)


def other_ends(first: Iterable[Run], second: Iterable[Run], measure: Measure) -> bool:
    """Whether the answers of two sides ended at different tokens. A loss has no answers, so it is False for a loss."""
    ends = [{str(run.record.more_ends) for run in side} for side in (first, second)]
    return ends[0] != ends[1] and not is_loss(measure.metric)


def _comparable_runs(ours: RunGroup, theirs: RunGroup, measure: Measure) -> tuple[tuple[Run, ...], tuple[Run, ...]]:
    """The runs of both groups that have the same seeds, in the same order.

    Raises:
        UserError: there is no seed in common, or the groups were trained or scored on other rows.
    """
    pairs, split = _pairs(ours, theirs, measure), measure.split
    if not pairs:
        raise UserError("no seed in common")
    if ours.digests(split) != theirs.digests(split) or any(group.has_mixed_data(split) for group in (ours, theirs)):
        raise UserError("other data")
    if ours.training_digests != theirs.training_digests:
        raise UserError("trained on other rows")
    first, second = zip(*pairs, strict=True)
    return first, second


def _pairs(ours: RunGroup, theirs: RunGroup, measure: Measure) -> list[tuple[Run, Run]]:
    """Pairs of scored runs of both groups with the same seed."""
    by_seed = {run.seed: run for run in measure.scored(theirs)}
    return [(run, by_seed[run.seed]) for run in measure.scored(ours) if run.seed in by_seed]


def _paired_tables(
    ours: Sequence[Run], theirs: Sequence[Run], measure: Measure, book: Scorebook
) -> tuple[Array, Array]:
    """Scores of both sides on the same examples: two arrays (seeds, examples)."""
    ids, _ = book.scores(ours[0], measure.split, measure.metric)
    return (
        book.table(ours, measure.split, measure.metric, ids),
        book.table(theirs, measure.split, measure.metric, ids),
    )


def _add_paired_intervals(estimate: Estimate, ours: Array, theirs: Array) -> None:
    estimate.examples = crossed.difference_over_examples(ours, theirs)
    if len(ours) > 1 and ours.shape[1] > 1:
        estimate.both = crossed.both_interval(ours - theirs)


@dataclass(frozen=True)
class PairedScores:
    """The scores of two groups and of the base model on the same rows. More is better: losses are negated."""

    seeds: tuple[int, ...]
    method: Array
    """(seeds, rows)."""
    comparator: Array
    """(seeds, rows)."""
    base: Array | None
    """(rows,); None if the base model was not scored."""

    def of(self, seeds: Iterable[int]) -> PairedScores:
        """The scores of these seeds only, in their order. Seeds that are missing here are left out."""
        places = [self.seeds.index(seed) for seed in seeds if seed in self.seeds]
        kept = tuple(self.seeds[place] for place in places)
        return PairedScores(kept, self.method[places], self.comparator[places], self.base)


def paired_scores(method: RunGroup, comparator: RunGroup, measure: Measure, book: Scorebook) -> PairedScores:
    """The scores of the seeds that both groups have.

    Raises:
        UserError: predictions are missing or damaged, the examples differ, or there is no seed in common.
    """
    split = measure.split
    first, second = _comparable_runs(method, comparator, measure)
    ids, _ = book.scores(first[0], split, measure.metric)
    tables = _paired_tables(first, second, measure, book)
    base = next((run for run in (*first, *second) if measure.has_base(run)), None)
    base_scores = None
    if base is not None:
        base_ids, base_scores = book.scores(base, split, measure.metric, base=True)
        if base_ids != ids:
            raise UserError(f"{base.run_id}: its base model was scored on other rows")
        base_scores = measure.sign * base_scores
    return PairedScores(
        tuple(run.seed for run in first), measure.sign * tables[0], measure.sign * tables[1], base_scores
    )


def retains_at_least(ours: RunGroup, theirs: RunGroup, measure: Measure, book: Scorebook) -> float | None:
    """The largest share of the other group's gain that is supported; None if none is, or if scores are missing."""
    try:
        scores = paired_scores(ours, theirs, measure, book)
    except UserError:
        # The notes on the score and the difference already say what is missing.
        return None
    if scores.base is None or len(scores.seeds) < 2 or scores.method.shape[1] < 2:
        return None
    return rules.retained_at_least(scores.method, scores.comparator, scores.base, 1 - LEVEL)


def retained(ours: RunGroup, theirs: RunGroup, measure: Measure) -> Interval | None:
    """(ours - base) / (theirs - base) over the seeds that both have; low and high are NaN if there is no interval."""
    try:
        pairs = list(zip(*_comparable_runs(ours, theirs, measure), strict=True))
    except UserError:
        return None
    pairs = [pair for pair in pairs if all(map(measure.has_base, pair))]
    if not pairs:
        return None
    first, second = zip(*pairs, strict=True)
    base = measure.base_values(first)
    our_gains, their_gains = measure.values(first) - base, measure.values(second) - base
    if measure.sign * their_gains.mean() <= 0:
        return None
    if (ratio := crossed.ratio(our_gains, their_gains)) is not None:
        return ratio
    return Interval(float(our_gains.mean() / their_gains.mean()), math.nan, math.nan)

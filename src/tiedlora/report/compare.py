"""The report's numbers: scores, paired differences to LoRA, gains over the base model, and the retained share of LoRA's
gain."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tiedlora.errors import UserError
from tiedlora.report.groups import RunGroup
from tiedlora.report.reference import PublishedScore
from tiedlora.report.runs import Run
from tiedlora.report.scorebook import Scorebook
from tiedlora.statistics import coverage, crossed
from tiedlora.statistics.crossed import Array
from tiedlora.statistics.interval import Interval
from tiedlora.statistics.intervals import is_binary

BASELINE = "LoRA"
SPLIT_PREFERENCE = ("test", "validation")
"""The report shows the first of these splits that its runs have."""


@dataclass(frozen=True)
class Measure:
    """What is compared: one metric on one split."""

    split: str
    metric: str

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


@dataclass
class ResultRow:
    """The numbers of one group, on one split and by one metric."""

    group: RunGroup
    measure: Measure
    primary: bool
    """Whether the metric is the one that comparisons use."""
    seeds: list[int] = field(default_factory=list)
    examples: int = 0
    score: Estimate | None = None
    difference: Estimate | None = None
    """The paired difference to LoRA at the same rank."""
    gain: Estimate | None = None
    """The paired difference to the base model."""
    retained: Interval | None = None
    """gain / LoRA's gain; low and high are NaN if there is no interval."""
    notes: list[str] = field(default_factory=list)
    published: list[PublishedScore] = field(default_factory=list)
    """What others have published about the same model, task, split, metric, configuration and rank."""


def shown_splits(groups: Sequence[RunGroup]) -> dict[str, str]:
    """Task -> the split that the report shows: test if any chosen run has it, otherwise validation."""
    shown = {}
    for task in {group.task for group in groups}:
        scored = {split for group in groups if group.task == task for run in group.runs for split in run.splits}
        shown[task] = next((split for split in SPLIT_PREFERENCE if split in scored), "validation")
    return shown


def result_rows(groups: Sequence[RunGroup], book: Scorebook, split: str | None = None) -> list[ResultRow]:
    """The numbers of every group, one row for each metric of its task.

    Args:
        split: validation or test; None shows test if the chosen runs have it.
    """
    splits = {group.task: split for group in groups} if split else shown_splits(groups)
    lora = baselines(groups)
    rows = []
    for group in groups:
        shown = splits[group.task]
        metrics = next((list(run.splits[shown].metrics) for run in group.runs if shown in run.splits), [""])
        for metric in metrics:
            row = ResultRow(group, Measure(shown, metric), primary=metric == metrics[0])
            _fill(row, lora.get((group.setting, group.rank)), book)
            rows.append(row)
    return rows


def baselines(groups: Sequence[RunGroup]) -> Mapping[tuple[str, int], RunGroup]:
    """(setting, rank) -> LoRA's group; of several groups, the plain one (alpha = r)."""
    ordered = sorted((group for group in groups if group.label == BASELINE), key=_is_plain)
    return {(group.setting, group.rank): group for group in ordered}


def _is_plain(group: RunGroup) -> bool:
    rank = group.runs[0].record.identity.rank
    return rank.alpha == rank.r and rank.scaling == "standard"


def _fill(row: ResultRow, lora: RunGroup | None, book: Scorebook) -> None:
    """Compute the row's numbers."""
    group, measure = row.group, row.measure
    runs = measure.scored(group)
    row.seeds = [run.seed for run in runs]
    if missing := [run.seed for run in group.runs if run.seed not in row.seeds]:
        row.notes.append(f"not scored on {measure.split}: seed {', '.join(map(str, missing))}")
    if not runs:
        return
    if group.has_mixed_data(measure.split):
        row.notes.append("no mean: its seeds saw different data")
        return
    row.examples = runs[0].splits[measure.split].rows
    if measure.split == "validation" and len(group.rates) > 1:
        row.notes.append("validation also chose the learning rate, so the score is optimistic")
    row.score, notes = score(runs, measure, book)
    row.notes += notes
    row.gain = gain(group, measure, book)
    if lora is not None and lora is not group:
        row.difference, why = difference(group, lora, measure, book)
        if why:
            row.notes.append(f"compared with LoRA: {why}")
        row.retained = retained(group, lora, measure)
    elif lora is None:
        row.notes.append(f"no LoRA at rank {group.rank} in the same setting to compare with")


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
        scoring_examples = int((table != 0).any(0).sum())
        by_bootstrap = len(runs) > 1 or not is_binary(table)
    except UserError as error:
        notes.append(f"no interval over examples: {error}")
    if len(runs) > 1:
        estimate.seeds = crossed.seeds_interval(values)
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
    pairs = _pairs(ours, theirs, measure)
    if not pairs:
        return None, "no seed in common"
    split = measure.split
    if ours.digests(split) != theirs.digests(split) or ours.has_mixed_data(split) or theirs.has_mixed_data(split):
        return None, "other data"
    first, second = zip(*pairs, strict=True)
    values = measure.values(first) - measure.values(second)
    estimate = Estimate(float(values.mean()))
    notes = []
    if len(pairs) > 1:
        estimate.seeds = crossed.seeds_interval(values)
    try:
        _add_paired_intervals(estimate, *_paired_tables(first, second, measure, book))
    except UserError as error:
        notes.append(f"no interval over examples: {error}")
    commits = [{str(run.record.code.commit) for run in side} for side in (first, second)]
    if commits[0] != commits[1]:
        notes.append("made by another commit")
    if len(pairs) < max(len(ours.runs), len(theirs.runs)):
        notes.append(f"{len(pairs)} seed{'s' if len(pairs) > 1 else ''} in common")
    return estimate, "; ".join(notes)


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


def paired_differences(ours: RunGroup, theirs: RunGroup, measure: Measure, book: Scorebook) -> Array:
    """Differences for each seed and example: (seeds, examples).

    Raises:
        UserError: predictions are missing or damaged, or the examples differ.
    """
    first, second = zip(*_pairs(ours, theirs, measure), strict=True)
    our_table, their_table = _paired_tables(first, second, measure, book)
    return our_table - their_table


def retained(ours: RunGroup, theirs: RunGroup, measure: Measure) -> Interval | None:
    """(ours - base) / (theirs - base) over the seeds that both have; low and high are NaN if there is no interval."""
    pairs = [pair for pair in _pairs(ours, theirs, measure) if all(map(measure.has_base, pair))]
    if not pairs or ours.digests(measure.split) != theirs.digests(measure.split):
        return None
    first, second = zip(*pairs, strict=True)
    base = measure.base_values(first)
    our_gains, their_gains = measure.values(first) - base, measure.values(second) - base
    if (ratio := crossed.ratio(our_gains, their_gains)) is not None:
        return ratio
    if their_gains.mean() <= 0:
        return None
    return Interval(float(our_gains.mean() / their_gains.mean()), math.nan, math.nan)

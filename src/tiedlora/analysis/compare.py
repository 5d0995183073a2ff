"""The numbers of groups: scores, gains over the base, and differences paired on seeds and rows, each with intervals.

`result_rows` puts them together as the rows of the report: one for each group and metric.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from tiedlora.analysis import intervals, rules
from tiedlora.analysis.claims import Claim
from tiedlora.analysis.groups import RunGroup
from tiedlora.analysis.intervals import Array
from tiedlora.analysis.reference import PublishedScore
from tiedlora.analysis.runs import Run, Scorebook
from tiedlora.errors import UserError
from tiedlora.records.interval import LEVEL, Interval, Unit
from tiedlora.records.loss_metrics import is_loss
from tiedlora.text import number_list

BASELINE = "LoRA"
SPLIT_PREFERENCE = ("test", "validation")
"""The report shows the first of these splits that its runs have."""
OTHER_ENDS = "the answers of the two sides end at different tokens (docs/tasks.md)"
ENOUGH = 0.93
"""A row has a note if its interval covers less than this."""
FEW_EXAMPLES = 10
"""If fewer examples than this score above zero, or fewer below one, a bootstrap over examples is too narrow. It covers
83 to 87 % if 2 to 4 of 200 examples do."""


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
    values, scores = measure.values(runs), runs[0].splits[measure.split]
    estimate, notes, remark = Estimate(float(values.mean())), [], ""
    try:
        table = book.table(runs, measure.split, measure.metric)
        estimate.examples = scores.metrics[measure.metric] if len(runs) == 1 else intervals.score_over_examples(table)
        # A score near 1 is as skewed as one near 0.
        scoring = int(min((table != 0).any(0).sum(), (table != 1).any(0).sum()))
        if scoring < FEW_EXAMPLES and (len(runs) > 1 or not intervals.is_binary(table)):
            which = "score" if estimate.value <= 0.5 else "do not have the full score"
            remark = f"only {scoring} examples {which}, so the bootstrap covers about 85 %, not 95 %"
    except UserError as error:
        notes.append(f"no interval over examples: {error}")
    if len(runs) > 1:
        estimate.seeds = intervals.seeds_interval(values)
    if far := [runs[place].seed for place in intervals.outlying(values)]:
        notes.append(f"seed {number_list(far)} is far from the others: no t interval survives such a seed")
    if not is_loss(measure.metric):
        covered = intervals.seeds_coverage(estimate.value, scores.rows, len(runs)) if len(runs) > 1 else 1.0
        if covered < ENOUGH:
            notes.append(f"the interval over seeds covers {100 * covered:.0f} % here, not 95 %")
        notes += filter(None, [remark])
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
    estimate.seeds = intervals.seeds_interval(values)
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
    estimate, notes = Estimate(float(values.mean())), []
    if len(first) > 1:
        estimate.seeds = intervals.seeds_interval(values)
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
    """The scored runs of both groups that have the same seeds, in the same order.

    Raises:
        UserError: there is no seed in common, or the groups were trained or scored on other rows.
    """
    split, by_seed = measure.split, {run.seed: run for run in measure.scored(theirs)}
    pairs = [(run, by_seed[run.seed]) for run in measure.scored(ours) if run.seed in by_seed]
    if not pairs:
        raise UserError("no seed in common")
    if ours.digests(split) != theirs.digests(split) or any(group.has_mixed_data(split) for group in (ours, theirs)):
        raise UserError("other data")
    if ours.training_digests != theirs.training_digests:
        raise UserError("trained on other rows")
    first, second = zip(*pairs, strict=True)
    return first, second


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
    estimate.examples = intervals.difference_over_examples(ours, theirs)
    if len(ours) > 1 and ours.shape[1] > 1:
        estimate.both = intervals.both_interval(ours - theirs)


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

    @property
    def sides(self) -> tuple[Array, Array, Array | None]:
        """What a rule compares: the method, the comparator, and the zero point of their gains."""
        return self.method, self.comparator, self.base

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
    seeds = tuple(run.seed for run in first)
    return PairedScores(seeds, measure.sign * tables[0], measure.sign * tables[1], base_scores)


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
    if (ratio := intervals.ratio(our_gains, their_gains)) is not None:
        return ratio
    return Interval(float(our_gains.mean() / their_gains.mean()), math.nan, math.nan)


def _retains_at_least(ours: RunGroup, theirs: RunGroup, measure: Measure, book: Scorebook) -> float | None:
    """The largest share of the other group's gain that is supported; None if none is, or if scores are missing."""
    try:
        scores = paired_scores(ours, theirs, measure, book)
    except UserError:
        # The notes on the score and the difference already say what is missing.
        return None
    if scores.base is None or min(scores.method.shape) < 2:
        return None
    return rules.retained_at_least(scores.method, scores.comparator, scores.base, 1 - LEVEL)


@dataclass
class ResultRow:
    """The numbers of one group, on one split and by one metric."""

    group: RunGroup
    measure: Measure
    primary: bool
    """Whether this group, or another one in its setting, is shown by this metric (see result_rows). Figures and the
    overview have a panel or a column for each of these."""
    is_first: bool
    """Whether the metric is the first one of the group's task."""
    seeds: list[int] = field(default_factory=list)
    examples: int = 0
    score: Estimate | None = None
    difference: Estimate | None = None
    """The paired difference to LoRA at the same rank."""
    gain: Estimate | None = None
    """The paired difference to the base model."""
    retained: Interval | None = None
    """gain / LoRA's gain; low and high are NaN if there is no interval."""
    retains_at_least: float | None = None
    """The largest share of LoRA's gain that the rule `retains` supports at level 0.05, over their common seeds."""
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


def result_rows(
    groups: Sequence[RunGroup], book: Scorebook, split: str | None = None, claims: Sequence[Claim] = ()
) -> list[ResultRow]:
    """The numbers of every group, one row for each metric of its task.

    Figures show a group by the first metric that a claim compares on its task and that the group has. Without a claim
    on the task, this is the task's first metric.

    Args:
        split: validation or test; None shows test if the chosen runs have it.
    """
    splits = {group.task: split for group in groups} if split else shown_splits(groups)
    # (setting, rank) -> LoRA's group; of several groups, the plain one.
    plain_last = sorted((group for group in groups if group.label == BASELINE), key=lambda group: group.is_plain)
    lora = {(group.setting, group.rank): group for group in plain_last}
    metrics = [_metrics(group, splits[group.task]) for group in groups]
    # Some groups of a setting may be scored by the loss alone, so that they are shown by another metric.
    shown = {(group.setting, _shown(group.task, own, claims)) for group, own in zip(groups, metrics, strict=True)}
    # A group without scores has no panel of its own beside those that have some.
    scored = {setting for setting, metric in shown if metric}
    shown -= {(setting, "") for setting in scored}
    rows = []
    for group, own in zip(groups, metrics, strict=True):
        for metric in own:
            measure = Measure(splits[group.task], metric)
            row = ResultRow(group, measure, (group.setting, metric) in shown, is_first=metric == own[0])
            _fill(row, lora.get((group.setting, group.rank)), book)
            rows.append(row)
    return rows


def _metrics(group: RunGroup, split: str) -> list[str]:
    """The metrics of the group's first scored run, in their order; an empty name if none is scored."""
    return next((list(run.splits[split].metrics) for run in group.runs if split in run.splits), [""])


def _shown(task: str, metrics: Sequence[str], claims: Sequence[Claim]) -> str:
    """Which of a group's metrics stands for it in figures."""
    claimed = [claim.metric_on(task, metrics[0]) for claim in claims if claim.covers(task)]
    return next((metric for metric in claimed if metric in metrics), metrics[0])


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
        row.retains_at_least = _retains_at_least(group, lora, measure, book)
    elif lora is None:
        row.notes.append(f"no LoRA at rank {group.rank} in the same setting to compare with")

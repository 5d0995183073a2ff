"""The numbers of groups: scores, gains over the base, and differences paired on seeds and rows, each with intervals.

`result_rows` puts them together as the rows of the report: one for each group and metric.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from tiedlora.analysis import intervals, rules
from tiedlora.analysis.claims import Claim
from tiedlora.analysis.groups import Peer, RunGroup, curve
from tiedlora.analysis.intervals import Array, Clusters
from tiedlora.analysis.rules import Sides
from tiedlora.analysis.runs import Measure, Run, Scorebook
from tiedlora.errors import UserError
from tiedlora.records.interval import LEVEL, Interval
from tiedlora.records.loss_metrics import DRIFT, is_loss
from tiedlora.text import counted, number_list

BASELINE = "LoRA"
OTHER_ENDS = "the answers of the two sides end at different tokens (docs/tasks.md)"
FEW_EXAMPLES = 10
"""If fewer examples than this score above zero, or fewer below one, a bootstrap over examples is too narrow. It covers
83 to 87 % if 2 to 4 of 200 examples do."""
WORTH_SEEDS = 3
"""How many seeds a size of a curve needs for a worth: the first ones that the arm shares with the two fullest sizes."""


@dataclass
class Estimate:
    """A value with its 95 % intervals, each named by the variance that it covers. None: it cannot be computed."""

    value: float
    count: int
    """The number of seeds."""
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


def _over_seeds(values: Array) -> Estimate:
    """The mean of one number per seed, (seeds,), with its interval over seeds."""
    interval = intervals.seeds_interval(values) if len(values) > 1 else None
    return Estimate(float(values.mean()), len(values), interval)


def _is_of_record(runs: Sequence[Run], recorded: Interval | None, clusters: Clusters | None) -> bool:
    """Whether the interval over rows is that of the single run's record, which has to know of clusters if there are."""
    return len(runs) == 1 and (clusters is None or (recorded is not None and recorded.method == "clusters"))


def score(runs: Sequence[Run], measure: Measure, book: Scorebook) -> tuple[Estimate, list[str]]:
    """The mean over the runs' seeds, and notes on intervals that cover less than 95 %.

    A single run has the interval of its record (`_is_of_record`), so that report and record agree.
    """
    values, notes = measure.values(runs), []
    estimate = _over_seeds(values)
    if far := [runs[place].seed for place in intervals.outlying(values)]:
        notes.append(f"seed {number_list(far)} is far from the others, so the interval over seeds is wrong")
    try:
        (table,), clusters = book.tables([runs], measure)
        _add_intervals(estimate, table, None, clusters)
        recorded = runs[0].splits[measure.split].metrics[measure.metric]
        if _is_of_record(runs, recorded, clusters):
            estimate.examples = recorded
        # A score near 1 is as skewed as one near 0.
        scoring = int(min((table != 0).any(0).sum(), (table != 1).any(0).sum()))
        is_skewed = scoring < FEW_EXAMPLES and clusters is None and (len(runs) > 1 or not intervals.is_binary(table))
        if is_skewed and not is_loss(measure.metric):
            which = "score" if estimate.value <= 0.5 else "do not have the full score"
            notes.append(f"only {scoring} examples {which}, so the bootstrap covers about 85 %, not 95 %")
    except UserError as error:
        notes.append(f"no interval over examples: {error}")
    return estimate, notes


def gain(group: RunGroup, measure: Measure, book: Scorebook) -> tuple[Estimate | None, str]:
    """The paired difference to the base model, which has no seeds, and what is wrong with the predictions.

    A single run has the interval of its record.
    """
    runs = [run for run in measure.scored(group.runs) if measure.has_base(run)]
    if not runs:
        return None, ""
    estimate = _over_seeds(measure.values(runs) - measure.values(runs, base=True))
    try:
        (table,), clusters = book.tables([runs], measure)
        recorded = (runs[0].splits[measure.split].gain or {}).get(measure.metric)
        if _is_of_record(runs, recorded, clusters):
            estimate.examples = recorded
        else:
            _add_intervals(estimate, table, np.broadcast_to(book.base_scores(runs[0], measure), table.shape), clusters)
    except UserError as error:
        return estimate, str(error)
    return estimate, ""


def difference(ours: RunGroup, theirs: Peer, measure: Measure, book: Scorebook) -> tuple[Estimate | None, str]:
    """The paired difference to a group or a point of a curve, over their common seeds, and notes for the reader."""
    try:
        first, *others = runs = _comparable_runs([ours, *theirs.groups], measure)
    except UserError as error:
        return None, str(error)
    estimate = _over_seeds(measure.values(first) - _blended(theirs, map(measure.values, others)))
    notes = []
    try:
        (table, *tables), clusters = book.tables(runs, measure)
        _add_intervals(estimate, table, _blended(theirs, tables), clusters)
    except UserError as error:
        notes.append(f"no interval over examples: {error}")
    commits = [{str(code.commit) for run in side for code in run.record.code_versions} for side in runs]
    if any(own != commits[0] for own in commits):
        notes.append("made by another commit")
    if other_ends(runs, measure):
        notes.append(OTHER_ENDS)
    if (common := len(first)) < max(len(group.runs) for group in (ours, *theirs.groups)):
        notes.append(f"{counted(common, 'seed')} in common")
    return estimate, "; ".join(notes)


def other_ends(sides: Iterable[Iterable[Run]], measure: Measure) -> bool:
    """Whether the answers of some sides ended at different tokens. A loss has no answers, so it is False for a loss."""
    ends = [{str(run.record.more_ends) for run in side} for side in sides]
    return any(own != ends[0] for own in ends) and not is_loss(measure.metric)


def _comparable_runs(
    groups: Sequence[RunGroup], measure: Measure, among: Collection[int] | None = None
) -> list[tuple[Run, ...]]:
    """For each group, its scored runs of the seeds that all groups have (among some), in the same order."""
    split = measure.split
    by_seed = [{run.seed: run for run in measure.scored(group.runs)} for group in groups]
    seeds = [seed for seed in by_seed[0] if all(seed in runs for runs in by_seed) and seed in (among or by_seed[0])]
    if unscored := [group.name for group, runs in zip(groups, by_seed, strict=True) if not runs]:
        raise UserError(f"no run of {' or '.join(unscored)} has {measure.metric} on {measure.split}")
    if not seeds:
        raise UserError("no planned seed in common" if among else "no seed in common")
    compared = [tuple(runs[seed] for seed in seeds) for runs in by_seed]
    every = list(itertools.chain.from_iterable(compared))
    if len({run.splits[split].digest for run in every}) > 1:
        raise UserError("other data")
    # Shuffled targets are the same rows in another order, and so have another digest.
    for is_shuffled in (False, True):
        own = [run.record for run in every if run.record.identity.shuffles_targets == is_shuffled]
        if len({record.data["train"].digest for record in own}) > 1:
            raise UserError("trained on other rows")
    return compared


def _blended(peer: Peer, arrays: Iterable[Array]) -> Array:
    """The sum of arrays of one shape, one for each part of a peer, by the parts' weights."""
    total: Array = sum((weight * array for (weight, _), array in zip(peer.parts, arrays, strict=True)), np.zeros(()))
    return total


def _add_intervals(estimate: Estimate, ours: Array, theirs: Array | None, clusters: Clusters | None) -> None:
    if ours.shape[1] > 1:
        estimate.examples = intervals.over_examples(ours, theirs, clusters)
    if min(ours.shape) > 1:
        estimate.both = intervals.both_interval(ours if theirs is None else ours - theirs, clusters=clusters)


def paired_scores(
    method: RunGroup,
    comparator: Peer,
    measure: Measure,
    book: Scorebook,
    floor: RunGroup | None = None,
    planned: Collection[int] | None = None,
) -> Sides:
    """The scores of the seeds that all sides have. Losses are negated.

    Args:
        floor: the zero point of gains; None takes the base model, if it was scored.
        planned: the seeds of a plan. Only these are taken where one beside them cannot be compared.

    Raises:
        UserError: predictions are missing or damaged, the examples differ, or there is no seed in common.
    """
    groups = [method, *comparator.groups, *([floor] if floor is not None else [])]
    try:
        runs = _comparable_runs(groups, measure)
        (table, *others), clusters = book.tables(runs, measure)
    except UserError:
        if planned is None:
            raise
        runs = _comparable_runs(groups, measure, planned)
        (table, *others), clusters = book.tables(runs, measure)
    zero = None
    if floor is not None:
        zero = others.pop()
    elif (base := next((run for side in runs for run in side if measure.has_base(run)), None)) is not None:
        zero = book.base_scores(base, measure)
    zero = None if zero is None else measure.sign * zero
    seeds = tuple(run.seed for run in runs[0])
    return Sides(measure.sign * table, measure.sign * _blended(comparator, others), zero, clusters, seeds)


# Worth: the size of a curve that scores the same.

POINTS = 101
"""How many sizes are tried between two measured ones."""


@dataclass(frozen=True)
class Worth:
    """The number of parameters at which a curve scores the same as an arm, with its 95 % interval.

    The interval holds every size whose contrast with the arm includes 0, over seeds and rows. A value or an end is 0
    where it is below the curve's measured sizes, and infinite where it is above them.
    """

    value: float
    low: float
    high: float
    smallest: float
    """The smallest size of the curve."""
    largest: float

    def __str__(self) -> str:
        below, above = f"< {self.smallest:,.0f}", f"> {self.largest:,.0f}"
        value, low, high = (
            f"{size:,.0f}" if self.smallest <= size <= self.largest else above if size else below
            for size in (self.value, self.low, self.high)
        )
        # An arm that is clearly beyond the curve needs no interval.
        is_beyond = self.value > self.low == self.largest or self.value < self.high == self.smallest
        return value if is_beyond else f"{value} [{low}, {high}]"


def worth(group: RunGroup, sizes: Sequence[RunGroup], measure: Measure, book: Scorebook) -> Worth | None:
    """What an arm is worth in parameters of a curve, which has these sizes.

    Returns:
        None with fewer than two sizes, or with fewer than two seeds or rows in common.

    Raises:
        UserError: as `paired_scores`.
    """
    parts = []
    own, *others = ({run.seed for run in measure.scored(one.runs)} for one in (group, *sizes))
    # A size that has just begun does not take part.
    shared = sorted((own & seeds for seeds in others), key=len)
    first = set(sorted(shared[-2])[:WORTH_SEEDS]) if len(shared) > 1 else set()
    ended = [seeds | peer.diverged_seeds for peer, seeds in zip(sizes, others, strict=True)]
    ready = [peer for peer, seeds in zip(sizes, ended, strict=True) if len(first) > 1 and first <= seeds]
    for smaller, larger in itertools.pairwise(ready):
        runs = _comparable_runs([group, smaller, larger], measure)
        tables, clusters = book.tables(runs, measure)
        if min(tables[0].shape) < 2:
            return None
        ours, below, above = (measure.sign * table for table in tables)
        weights = np.linspace(0, 1, POINTS)[:, None, None]
        contrasts = ours - (1 - weights) * below - weights * above
        found = intervals.mean_squares(contrasts, clusters)
        parts.append((np.geomspace(smaller.params, larger.params, POINTS), found.mean, found.half_width()))
    return worth_of(*map(np.concatenate, zip(*parts, strict=True))) if parts else None


def worth_of(sizes: Array, means: Array, halves: Array) -> Worth:
    """The worth, from the arm's contrast with a curve at many sizes. All arrays are (sizes,), in rising order.

    Args:
        means: the arm's score minus the curve's; more is better.
        halves: half the width of each contrast's interval.
    """
    smallest, largest = float(sizes[0]), float(sizes[-1])
    level, excess = np.flatnonzero(np.abs(means) <= halves), np.abs(means) - halves
    value = 0.0 if means[0] < 0 else math.inf
    if means[0] >= 0 >= means.min():
        # The smallest size at which the curve reaches the arm's score.
        value = _crossing(sizes, means, int(np.argmax(means <= 0)))
    # Without a size that is level, the arm is clearly beyond the curve, or its interval is narrower than a step.
    low, high = min(value, largest), max(value, smallest)
    if len(level):
        # The interval holds the value, also where that is beyond the curve.
        low = min(value, _crossing(sizes, excess, int(level[0]))) if level[0] > 0 else 0.0
        high = max(value, _crossing(sizes, excess, int(level[-1]) + 1)) if level[-1] < len(sizes) - 1 else math.inf
    return Worth(value, low, high, smallest, largest)


def _crossing(sizes: Array, values: Array, after: int) -> float:
    """The size at which values cross 0 between the places `after` - 1 and `after`, linear in the logarithm."""
    if after == 0:
        return float(sizes[after])
    weight = float(values[after - 1] / (values[after - 1] - values[after]))
    return float(sizes[after - 1] ** (1 - weight) * sizes[after] ** weight)


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
    worth: Worth | None = None
    """How many parameters of LoRA score the same; only of primary rows, and not of LoRA itself."""
    notes: list[str] = field(default_factory=list)


def shown_splits(groups: Sequence[RunGroup], split: str | None) -> dict[tuple[str, str], str]:
    """(model, task) -> the split that the report shows: this one or, without it, test if any chosen run has it."""
    has_test = {(group.model, group.task) for group in groups for run in group.runs if "test" in run.splits}
    places = {(group.model, group.task) for group in groups}
    return {place: split or ("test" if place in has_test else "validation") for place in places}


def result_rows(
    groups: Sequence[RunGroup], book: Scorebook, split: str | None = None, claims: Sequence[Claim] = ()
) -> list[ResultRow]:
    """The numbers of every group, one row for each metric of its task.

    Figures show a group by the first metric that a claim compares on its task and that the group has. Without a claim
    on the task, this is the task's first metric.

    Args:
        split: validation or test; None shows test if the chosen runs have it.
    """
    splits = shown_splits(groups, split)
    # (setting, rank) -> LoRA's group; of several groups, the plain one.
    plain_last = sorted((group for group in groups if group.label == BASELINE), key=lambda group: group.is_plain)
    lora = {(group.setting, group.rank): group for group in plain_last}
    curves = {group.setting: curve(BASELINE, group.setting, groups) for group in groups}
    metrics = [_metrics(group, splits[group.model, group.task]) for group in groups]
    # Some groups of a setting may be scored by the loss alone, so that they are shown by another metric.
    shown = {(group.setting, _shown(group.task, own, claims)) for group, own in zip(groups, metrics, strict=True)}
    # A group without scores has no panel of its own beside those that have some.
    scored = {setting for setting, metric in shown if metric}
    shown -= {(setting, "") for setting in scored}
    rows = []
    for group, own in zip(groups, metrics, strict=True):
        for metric in own:
            measure = Measure(splits[group.model, group.task], metric)
            row = ResultRow(group, measure, (group.setting, metric) in shown, is_first=metric == own[0])
            _fill(row, lora.get((group.setting, group.rank)), curves[group.setting], book)
            rows.append(row)
    return rows


def _metrics(group: RunGroup, split: str) -> list[str]:
    """The metrics of the group's first scored run, in their order; an empty name if none is scored."""
    return next((list(run.splits[split].metrics) for run in group.runs if split in run.splits), [""])


def _shown(task: str, metrics: Sequence[str], claims: Sequence[Claim]) -> str:
    """Which of a group's metrics stands for it in figures."""
    claimed = [claim.metric_on(task, metrics[0]) for claim in claims if claim.covers(task)]
    return next((metric for metric in claimed if metric in metrics), metrics[0])


def _fill(row: ResultRow, lora: RunGroup | None, lora_curve: Sequence[RunGroup], book: Scorebook) -> None:
    """Compute the row's numbers."""
    group, measure = row.group, row.measure
    runs = measure.scored(group.runs)
    row.seeds = [run.seed for run in runs]
    if missing := [run.seed for run in group.runs if run.seed not in row.seeds]:
        row.notes.append(f"not scored on {measure.split}: seed {', '.join(map(str, missing))}")
    if not runs:
        return
    if group.has_mixed_data(measure.split):
        row.notes.append("no mean: its seeds saw different data")
        return
    row.examples = runs[0].splits[measure.split].rows
    with contextlib.suppress(UserError):
        read = max((book.read(run, measure.split, False) for run in runs), key=lambda read: read.named_clusters)
        if read.clusters is not None:
            row.notes.append(f"rows in {len(read.clusters.sizes)} clusters, which intervals take as the sample")
        elif few := read.named_clusters:
            row.notes.append(f"rows of only {counted(few, 'cluster')}: intervals hold for these alone")
    if measure.split == "validation" and len(group.rates) > 1:
        row.notes.append("validation also chose the learning rate, so the score is optimistic")
    row.score, notes = score(runs, measure, book)
    row.notes += notes
    row.gain, why = gain(group, measure, book)
    if row.gain is not None and row.gain.count < len(runs):
        row.notes.append(f"minus base is over {counted(row.gain.count, 'seed')}")
    # The score's note has said it if the group's own predictions are wrong.
    if why and not any(why in note for note in notes):
        row.notes.append(f"minus base has no interval over examples: {why}")
    if lora is not None and lora is not group:
        row.difference, why = difference(group, lora, measure, book)
        if why:
            row.notes.append(f"compared with LoRA: {why}")
        # A note already says what is wrong with predictions.
        with contextlib.suppress(UserError):
            sides = paired_scores(group, lora, measure, book)
            row.retained, row.retains_at_least = rules.share(sides), rules.retained_at_least(sides, 1 - LEVEL)
    is_on_curve = group in lora_curve and measure.metric != DRIFT
    for smaller in lora_curve[: lora_curve.index(group)] if is_on_curve else ():
        found, _ = difference(group, smaller, measure, book)
        if found is not None and found.count >= WORTH_SEEDS and measure.sign * found.value < -intervals.ROUNDING:
            words = f"{measure.unit.text(found.widest, '+')} against {smaller.name}"
            row.notes.append(f"scores worse than a smaller size of the curve: {words}")
    if row.primary and group not in lora_curve:
        try:
            row.worth = worth(group, lora_curve, measure, book)
        except UserError as error:
            row.notes.append(f"no worth: {error}")
    if lora is None:
        row.notes.append(f"no LoRA at rank {group.rank} in the same setting to compare with")

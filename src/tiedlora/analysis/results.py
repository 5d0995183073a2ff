"""The numbers of groups: scores, gains over the base, and what compares them with LoRA, each with intervals.

`result_rows` puts them together as the rows of the report: one for each group and metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tiedlora.analysis import intervals, rules
from tiedlora.analysis.claims import Claim
from tiedlora.analysis.comparison import Estimate, compare
from tiedlora.analysis.groups import RunGroup, curve, shown_splits
from tiedlora.analysis.intervals import Clusters
from tiedlora.analysis.runs import Measure, NotComparable, Run, Scorebook
from tiedlora.analysis.worth import WORTH_SEEDS, Worth, worth
from tiedlora.records.interval import LEVEL, Interval
from tiedlora.records.loss_metrics import DRIFT, is_loss
from tiedlora.text import counted, number_list

BASELINE = "LoRA"
FEW_EXAMPLES = 10
"""If fewer examples than this score above zero, or fewer below one, a bootstrap over examples is too narrow. It covers
83 to 87 % if 2 to 4 of 200 examples do."""


def _is_of_record(runs: Sequence[Run], recorded: Interval | None, clusters: Clusters | None) -> bool:
    """Whether the interval over rows is that of the single run's record, which has to know of clusters if there are."""
    return len(runs) == 1 and (clusters is None or (recorded is not None and recorded.method == "clusters"))


def score(runs: Sequence[Run], measure: Measure, book: Scorebook) -> tuple[Estimate, list[str]]:
    """The mean over the runs' seeds, and notes on intervals that cover less than 95 %.

    A single run has the interval of its record (`_is_of_record`), so that report and record agree.
    """
    values, notes = measure.values(runs), []
    estimate = Estimate.over_seeds(values)
    if far := [runs[place].seed for place in intervals.outlying(values)]:
        notes.append(f"seed {number_list(far)} is far from the others, so the interval over seeds is wrong")
    try:
        (table,), clusters = book.tables([runs], measure)
    except NotComparable as why:
        return estimate, [*notes, f"no interval over examples: {why}"]
    estimate = estimate.over_rows(table, None, clusters)
    recorded = runs[0].scores.metrics(measure.split)[measure.metric]
    if _is_of_record(runs, recorded, clusters):
        estimate = replace(estimate, examples=recorded)
    # A score near 1 is as skewed as one near 0.
    scoring = int(min((table != 0).any(0).sum(), (table != 1).any(0).sum()))
    is_skewed = scoring < FEW_EXAMPLES and clusters is None and (len(runs) > 1 or not intervals.is_binary(table))
    if is_skewed and not is_loss(measure.metric):
        which = "score" if estimate.value <= 0.5 else "do not have the full score"
        notes.append(f"only {scoring} examples {which}, so the bootstrap covers about 85 %, not 95 %")
    return estimate, notes


def gain(runs: Sequence[Run], measure: Measure, book: Scorebook) -> tuple[Estimate | None, str]:
    """The paired difference to the base model, which has no seeds, and what is wrong with the rows.

    A single run has the interval of its record. None if the base model was not scored beside any of the runs.
    """
    runs = [run for run in runs if measure.has_base(run)]
    if not runs:
        return None, ""
    estimate = Estimate.over_seeds(measure.values(runs) - measure.values(runs, base=True))
    try:
        (table,), clusters = book.tables([runs], measure)
        recorded = runs[0].scores.gains(measure.split).get(measure.metric)
        if _is_of_record(runs, recorded, clusters):
            return replace(estimate, examples=recorded), ""
        base = np.broadcast_to(book.base_scores(runs[0], measure), table.shape)
        return estimate.over_rows(table, base, clusters), ""
    except NotComparable as why:
        return estimate, str(why)


@dataclass(frozen=True)
class AgainstLora:
    """A group against LoRA at the same rank; without numbers if there is no such LoRA, or the group is LoRA itself."""

    difference: Estimate | None = None
    """The paired difference."""
    retained: Interval | None = None
    """gain / LoRA's gain; low and high are NaN if there is no interval."""
    retains_at_least: float | None = None
    """The largest share of LoRA's gain that the rule `retains` supports at level 0.05, over their common seeds."""


@dataclass(frozen=True)
class ResultRow:
    """The numbers of one group, on one split and by one metric."""

    group: RunGroup
    measure: Measure
    primary: bool
    """Whether this group, or another one in its setting, is shown by this metric (see result_rows). Figures and the
    overview have a panel or a column for each of these."""
    is_first: bool
    """Whether the metric is the first one of the group's task."""
    seeds: tuple[int, ...]
    """Those that were scored."""
    notes: tuple[str, ...]
    examples: int = 0
    score: Estimate | None = None
    gain: Estimate | None = None
    """The paired difference to the base model."""
    against: AgainstLora = AgainstLora()
    worth: Worth | None = None
    """How many parameters of LoRA score the same; only of primary rows, and not of LoRA itself."""


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
    # An empty name stands for a group that is not scored.
    metrics = [group.metrics(splits[group.model, group.task]) or [""] for group in groups]
    # Some groups of a setting may be scored by the loss alone, so that they are shown by another metric.
    shown = {(group.setting, _shown(group.task, own, claims)) for group, own in zip(groups, metrics, strict=True)}
    # A group without scores has no panel of its own beside those that have some.
    scored = {setting for setting, metric in shown if metric}
    shown -= {(setting, "") for setting in scored}
    rows = []
    for group, own in zip(groups, metrics, strict=True):
        for metric in own:
            measure = Measure(splits[group.model, group.task], metric)
            is_shown, is_first = (group.setting, metric) in shown, metric == own[0]
            rows.append(
                _row(
                    group,
                    measure,
                    book,
                    primary=is_shown,
                    is_first=is_first,
                    # The rank of another method has no meaning.
                    lora=None if group.is_other_method else lora.get((group.setting, group.rank)),
                    lora_curve=curves[group.setting],
                )
            )
    return rows


def _shown(task: str, metrics: Sequence[str], claims: Sequence[Claim]) -> str:
    """Which of a group's metrics stands for it in figures."""
    claimed = [claim.metric_on(task, metrics[0]) for claim in claims if claim.covers(task)]
    return next((metric for metric in claimed if metric in metrics), metrics[0])


def _row(
    group: RunGroup,
    measure: Measure,
    book: Scorebook,
    *,
    primary: bool,
    is_first: bool,
    lora: RunGroup | None,
    lora_curve: Sequence[RunGroup],
) -> ResultRow:
    """A row with its numbers.

    Args:
        lora: LoRA at the group's rank; None if it was not run.
        lora_curve: LoRA's sizes.
    """
    runs = measure.scored(group.runs)
    seeds, notes = tuple(run.seed for run in runs), []
    if missing := [run.seed for run in group.runs if run.seed not in seeds]:
        notes.append(f"not scored on {measure.split}: seed {', '.join(map(str, missing))}")
    is_mixed = group.has_mixed_data(measure.split)
    if runs and is_mixed:
        notes.append("no mean: its seeds saw different data")
    if not runs or is_mixed:
        return ResultRow(group, measure, primary, is_first, seeds, tuple(notes))
    notes += _notes_on_clusters(runs, measure, book)
    if measure.split == "validation" and len(group.rates) > 1:
        notes.append("validation also chose the learning rate, so the score is optimistic")
    own, own_notes = score(runs, measure, book)
    gained, why = gain(runs, measure, book)
    notes += own_notes
    if gained is not None and gained.count < len(runs):
        notes.append(f"minus base is over {counted(gained.count, 'seed')}")
    # The score's note has said it if the group's own rows are wrong.
    if why and not any(why in note for note in own_notes):
        notes.append(f"minus base has no interval over examples: {why}")
    against, compared_notes = _against(group, lora, measure, book)
    notes += compared_notes
    notes += _notes_on_smaller_sizes(group, lora_curve, measure, book)
    worth_of_arm = None
    if primary and group not in lora_curve:
        try:
            worth_of_arm = worth(group, lora_curve, measure, book)
        except NotComparable as reason:
            notes.append(f"no worth: {reason}")
    if lora is None:
        notes.append(f"no LoRA at rank {group.rank} in the same setting to compare with")
    return ResultRow(
        group,
        measure,
        primary,
        is_first,
        seeds,
        tuple(notes),
        examples=runs[0].scores.adapted[measure.split, measure.kind].rows,
        score=own,
        gain=gained,
        against=against,
        worth=worth_of_arm,
    )


def _notes_on_clusters(runs: Sequence[Run], measure: Measure, book: Scorebook) -> list[str]:
    """Whether the rows come in clusters. Nothing if they cannot be read, which the score's note says."""
    try:
        read = max((book.read(run, measure.split, measure.kind, False) for run in runs), key=lambda r: r.named_clusters)
    except NotComparable:
        return []
    return [read.note_on_clusters] if read.note_on_clusters else []


def _against(
    group: RunGroup, lora: RunGroup | None, measure: Measure, book: Scorebook
) -> tuple[AgainstLora, list[str]]:
    """The group against LoRA at its rank, and notes for the reader."""
    if lora is None or lora is group:
        return AgainstLora(), []
    try:
        comparison = compare(group, lora, measure, book)
    except NotComparable as why:
        return AgainstLora(), [f"compared with LoRA: {why}"]
    difference, said = comparison.difference()
    notes = [f"compared with LoRA: {'; '.join(said)}"] if said else []
    try:
        sides = comparison.sides
    except NotComparable:
        # A note says already what is wrong with rows.
        return AgainstLora(difference), notes
    return AgainstLora(difference, rules.share(sides), rules.retained_at_least(sides, 1 - LEVEL)), notes


def _notes_on_smaller_sizes(
    group: RunGroup, lora_curve: Sequence[RunGroup], measure: Measure, book: Scorebook
) -> list[str]:
    """Which smaller sizes of the curve score better than the group, if it is a size of it."""
    notes = []
    is_on_curve = group in lora_curve and measure.metric != DRIFT
    for smaller in lora_curve[: lora_curve.index(group)] if is_on_curve else ():
        try:
            found, _ = compare(group, smaller, measure, book).difference()
        except NotComparable:
            continue
        if found.count >= WORTH_SEEDS and measure.sign * found.value < -intervals.ROUNDING:
            words = f"{measure.unit.text(found.widest, '+')} against {smaller.name}"
            notes.append(f"scores worse than a smaller size of the curve: {words}")
    return notes

"""The rows of the report: a group with its score, its difference to LoRA, its gain, and its share of that of LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tiedlora.analysis import estimates
from tiedlora.analysis.claims import Claim
from tiedlora.analysis.estimates import Estimate, Measure
from tiedlora.analysis.groups import RunGroup
from tiedlora.analysis.reference import PublishedScore
from tiedlora.analysis.scorebook import Scorebook
from tiedlora.records.interval import Interval

BASELINE = "LoRA"
SPLIT_PREFERENCE = ("test", "validation")
"""The report shows the first of these splits that its runs have."""


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
    lora = baselines(groups)
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


def baselines(groups: Sequence[RunGroup]) -> Mapping[tuple[str, int], RunGroup]:
    """(setting, rank) -> LoRA's group; of several groups, the plain one."""
    ordered = sorted((group for group in groups if group.label == BASELINE), key=lambda group: group.is_plain)
    return {(group.setting, group.rank): group for group in ordered}


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
    row.score, notes = estimates.score(runs, measure, book)
    row.notes += notes
    row.gain = estimates.gain(group, measure, book)
    if lora is not None and lora is not group:
        row.difference, why = estimates.difference(group, lora, measure, book)
        if why:
            row.notes.append(f"compared with LoRA: {why}")
        row.retained = estimates.retained(group, lora, measure)
        row.retains_at_least = estimates.retains_at_least(group, lora, measure, book)
    elif lora is None:
        row.notes.append(f"no LoRA at rank {group.rank} in the same setting to compare with")

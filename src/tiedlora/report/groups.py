"""Groups of runs: which runs may be averaged, at which learning rate.

A *setting* is everything that two configurations must share to be compared: base model, task and protocol, training
(except the learning rate), and scoring. A *group* is one configuration at one rank in one setting. Its runs differ only
in seed and learning rate. The rate is chosen on validation.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from tiedlora.report.runs import LeftOut, Run, UnfinishedRun
from tiedlora.report.variants import differing_values

OPEN_IN_A_SETTING = ("tying", "rank", "seed")
"""Keys of the identity that may differ between runs of one setting."""
OPEN_IN_TRAIN = ("lr", "lr_factor")
"""Keys below `train` that may differ between runs of one setting."""


@dataclass(frozen=True)
class RateTrial:
    """One learning rate that was tried in a group."""

    lr: float
    seeds: list[int]
    score: float | None
    """The mean of the task's first metric on validation, over the seeds that all usable rates have."""
    loss: float
    """The mean of the last validation loss over the same seeds."""
    failed: bool
    """Whether a run at this rate failed. Then the rate is not chosen, except if all failed."""


@dataclass(eq=False)
class RunGroup:
    """Runs of one configuration at one rank in one setting, at the chosen learning rate."""

    setting: str
    """The key of the setting. Groups with equal keys may be compared."""
    model: str
    task: str
    configuration: str
    """The label, with the values that differ if two groups of a setting have the same label."""
    rank: int
    label: str
    """Only the name: LoRA, TABuv, ..."""
    variant: str = ""
    """The values that distinguish the setting from others of the same model and task, such as train.steps=300."""
    runs: list[Run] = field(default_factory=list)
    """The runs at the chosen rate, sorted by seed."""
    rates: list[RateTrial] = field(default_factory=list)
    marks: list[str] = field(default_factory=list)
    """Remarks that a reader must know before using the group's numbers."""

    @property
    def lr(self) -> float:
        return self.runs[0].lr

    @property
    def params(self) -> int:
        return self.runs[0].params

    @property
    def share(self) -> float:
        """Trainable parameters divided by those of LoRA at the same rank."""
        return self.runs[0].record.share_of_lora

    @property
    def name(self) -> str:
        return f"{self.configuration} r={self.rank}"

    @property
    def training_digests(self) -> set[str]:
        """The digests of the rows that the runs were trained on."""
        return {run.record.data["train"].digest for run in self.runs}

    def digests(self, split: str) -> set[str]:
        """The digests of the split's rows, over the runs that scored it."""
        return {run.splits[split].digest for run in self.runs if split in run.splits}

    def has_mixed_data(self, split: str) -> bool:
        """Whether the runs may not be averaged, because they saw different rows."""
        return len(self.training_digests) > 1 or len(self.digests(split)) > 1


def group_runs(runs: Sequence[Run], left_out: Iterable[LeftOut] = ()) -> list[RunGroup]:
    """Group the runs, choose the learning rates, and mark mixed groups. The groups are sorted for a table."""
    runs_of: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        runs_of[_key(_setting(run)), _key(_own_values(run))].append(run)
    unfinished = [folder.run for folder in left_out if folder.run is not None]
    groups = []
    for (setting, _), members in runs_of.items():
        first = members[0]
        group = RunGroup(setting, first.model, first.task, first.configuration, first.rank, first.configuration)
        _choose_rate(group, members, [other for other in unfinished if _could_belong(other, first)])
        _mark_mixtures(group)
        groups.append(group)
    firsts = [members[0] for members in runs_of.values()]
    variants = differing_values([(group.model, group.task) for group in groups], list(map(_setting, firsts)))
    own_values = differing_values(
        [(group.setting, group.configuration, group.rank) for group in groups], list(map(_own_values, firsts))
    )
    for group, variant, own in zip(groups, variants, own_values, strict=True):
        group.variant = variant
        group.configuration += f" ({own})" if own else ""
    return sorted(groups, key=lambda group: (group.model, group.task, group.variant, group.rank, group.params))


def _key(values: dict[str, Any]) -> str:
    return json.dumps(values, sort_keys=True)


def _setting(run: Run) -> dict[str, Any]:
    """The part of the identity, with the base model, that runs must share to be compared."""
    identity = run.record.identity.tree
    setting = {key: value for key, value in identity.items() if key not in OPEN_IN_A_SETTING}
    setting["train"] = {key: value for key, value in identity["train"].items() if key not in OPEN_IN_TRAIN}
    return {**setting, "base": run.record.base.digest}


def _own_values(run: Run) -> dict[str, Any]:
    """The part of the identity that distinguishes a group from the other groups of its setting."""
    identity = run.record.identity.tree
    return {"tying": identity["tying"], "rank": identity["rank"], "lr_factor": identity["train"].get("lr_factor")}


def _could_belong(unfinished: UnfinishedRun, run: Run) -> bool:
    """Whether a folder without a result may belong to the run's group, judged by the folder's name."""
    start = f"{unfinished.label}-r{unfinished.rank}-{unfinished.task}-{unfinished.model}-s"
    return (
        unfinished.label == run.record.label
        and unfinished.rank == run.rank
        and unfinished.task == run.task
        and run.run_id.startswith(start)
    )


def _choose_rate(group: RunGroup, runs: Sequence[Run], unfinished: Sequence[UnfinishedRun]) -> None:
    """Set the group's rates and its runs at the best rate, and add marks about the choice."""
    by_rate: dict[float, dict[int, Run]] = defaultdict(dict)
    for run in runs:
        by_rate[run.lr][run.seed] = run
    failed = {other.lr for other in unfinished if other.failed}
    usable = [lr for lr in by_rate if lr not in failed] or list(by_rate)
    shared = set.intersection(*(set(by_rate[lr]) for lr in usable))
    group.rates = [_trial(lr, by_rate[lr], shared, lr in failed) for lr in sorted(by_rate)]
    candidates = [trial for trial in group.rates if trial.lr in usable]
    by_score = all(trial.score is not None for trial in candidates)
    # For equal scores, take the lower validation loss, then the lower rate, so that the order of runs does not matter.
    best = min(
        candidates,
        key=lambda trial: (-trial.score if by_score and trial.score is not None else 0.0, trial.loss, trial.lr),
    )
    group.runs = [by_rate[best.lr][seed] for seed in best.seeds]
    tried = [trial.lr for trial in group.rates]
    if len(tried) > 2 and best.lr in (tried[0], tried[-1]):
        group.marks.append(f"the chosen rate {best.lr:g} is at the edge of those tried ({tried[0]:g} to {tried[-1]:g})")
    if len(usable) > 1 and not shared:
        group.marks.append("learning rates were tried with different seeds, so their choice is not paired")
    if len(tried) > 1 and not by_score:
        group.marks.append("the rate was chosen by validation loss, since not all runs have a validation score")
    for other in unfinished:
        if other.lr in (None, best.lr) or other.failed:
            rate = f" at lr {other.lr:g}" if other.lr else ""
            group.marks.append(f"seed {other.seed}{rate} {'failed' if other.failed else 'is not finished'}")


def _trial(lr: float, by_seed: Mapping[int, Run], shared: set[int], failed: bool) -> RateTrial:
    runs = [by_seed[seed] for seed in sorted(shared & set(by_seed) or by_seed)]
    scores = [score for run in runs if (score := _validation_score(run)) is not None]
    loss = mean(run.record.training.validation_loss_last for run in runs)
    return RateTrial(lr, sorted(by_seed), mean(scores) if len(scores) == len(runs) else None, loss, failed)


def _validation_score(run: Run) -> float | None:
    scores = run.splits.get("validation")
    return None if scores is None else scores.metrics[scores.first_metric].value


def _mark_mixtures(group: RunGroup) -> None:
    records = [run.record for run in group.runs]
    commits = sorted({short_commit(run) for run in group.runs})
    if len(commits) > 1:
        group.marks.append(f"mixed commits: {', '.join(commits)}")
    if any(record.code.dirty for record in records):
        group.marks.append("made by uncommitted code")
    for package in ("torch", "transformers"):
        versions = sorted({str(record.versions.get(package)) for record in records})
        if len(versions) > 1:
            group.marks.append(f"mixed versions of {package}: {', '.join(versions)}")
    if len(devices := sorted({str(record.execution) for record in records})) > 1:
        group.marks.append(f"mixed devices: {'; '.join(devices)}")
    if len(group.training_digests) > 1:
        group.marks.append("mixed data: seeds were trained on different rows")


def short_commit(run: Run) -> str:
    """The first characters of the run's commit."""
    return str(run.record.code.commit)[:8]

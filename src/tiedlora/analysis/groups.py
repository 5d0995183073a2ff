"""Groups of runs: which runs may be averaged, at which learning rate.

A *setting* is everything that two configurations must share to be compared: base model, task and protocol, training
(except the learning rate), and scoring. A *group* is one configuration at one rank in one setting. Its runs differ only
in seed and learning rate. The rate is chosen on validation (rate_choice.py), or by a sweep's selection.json.

A *curve* is one configuration at all its sizes: the fair peer of an arm with any number of trained parameters.
"""

from __future__ import annotations

import itertools
import json
import math
import zlib
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tiedlora.analysis.rate_choice import ChosenRate, RegretBound, choose_rate, rate_trials, regret_bound
from tiedlora.analysis.runs import LeftOut, Run, UnfinishedRun
from tiedlora.config.identity import leaves
from tiedlora.config.sizes import is_near
from tiedlora.config.trial_arm import TrialArm, own_values
from tiedlora.records.provenance import CHAT_TEMPLATE, TARGET_BLANK, TOKENIZER
from tiedlora.records.scores import KINDS, Finished, Kind, ScoreRecord
from tiedlora.records.selection import RateChoice, Selection

LONGEST_VALUE = 24
"""The most characters of a value in a name."""


@dataclass(eq=False)
class RunGroup:
    """Runs of one configuration at one rank in one setting, at the chosen learning rate."""

    setting: str
    """The key of the setting. Groups with equal keys may be compared."""
    model: str
    task: str
    configuration: str
    """The label, with the values that differ if two groups of a setting have the same label."""
    arm: TrialArm
    variant: str = ""
    """The values that distinguish the setting from others of the same model and task, such as train.steps=300."""
    runs: list[Run] = field(default_factory=list)
    """The runs at the chosen rate, sorted by seed."""
    rates: tuple[float, ...] = ()
    """The learning rates that were tried, in ascending order."""
    diverged_seeds: set[int] = field(default_factory=set)
    """The seeds whose loss was not finite at the chosen rate. They have ended; any other failure can be repaired."""
    has_recorded_rate: bool = False
    """Whether a sweep has recorded the choice of the rate, so that later seeds do not change it."""
    marks: list[str] = field(default_factory=list)
    """Remarks that a reader must know before using the group's numbers."""
    short_marks: list[str] = field(default_factory=list)
    """The remarks that stand beside the configuration's name wherever it is shown: one to three words each."""
    trials: list[Run | UnfinishedRun] = field(default_factory=list)
    """Every run of the search that has ended, at any rate, sorted by rate and seed."""

    def metrics(self, split: str) -> list[str]:
        """The metrics that any of its runs has on a split, in the order of files and of their metrics."""
        return list(
            dict.fromkeys(
                metric
                for kind in KINDS
                for run in self.runs
                if (record := run.scores.adapted.get((split, kind))) is not None
                for metric in record.metrics
            )
        )

    @property
    def rank(self) -> int:
        """The rank of its arm."""
        return self.arm.rank

    @property
    def label(self) -> str:
        """Only the name: LoRA, TABuv, ..."""
        return self.arm.label

    @property
    def lr(self) -> float:
        """The chosen learning rate."""
        return self.runs[0].lr

    @property
    def params(self) -> int:
        """How many numbers are trained."""
        return self.runs[0].record.trainable_params

    @property
    def name(self) -> str:
        """What tables and sentences call it: the configuration, and the rank where it does not stand there."""
        return self.configuration if self.is_other_method else f"{self.configuration} r={self.rank}"

    @property
    def own_values(self) -> str:
        """What stands behind the label in `configuration`."""
        return self.configuration.removeprefix(self.label)

    @property
    def short(self) -> str:
        """The name beside a point of a chart."""
        return self.arm.short + self.own_values

    @property
    def parts(self) -> tuple[tuple[float, RunGroup], ...]:
        """(weight, group) of what a comparison with it is made of: itself alone. A point of a curve has more."""
        return ((1.0, self),)

    @property
    def groups(self) -> list[RunGroup]:
        """The groups of `parts`."""
        return [self]

    @property
    def is_control(self) -> bool:
        """Whether it learned from shuffled targets, and so is no adapter for use."""
        return self.runs[0].record.identity.shuffles_targets

    @property
    def is_other_method(self) -> bool:
        """Whether another method was trained, which has no rank of ours."""
        return self.arm.method is not None

    @cached_property
    def regret(self) -> RegretBound | None:
        """How much worse the chosen rate may be than the best one, by validation loss. The runs' files are read once.

        None without another rate that ran at two seeds of the chosen one, if rows have changed, or if a reward was
        trained, which does not lower the loss.
        """
        runs = [trial for trial in self.trials if isinstance(trial, Run)]
        if any(run.record.identity.objective.get("name") == "reward" for run in runs):
            return None
        seeds = {lr: {run.seed for run in runs if run.lr == lr} for lr in {run.lr for run in runs}}
        shared = {seed for lr, own in seeds.items() if lr != self.lr for seed in own & seeds[self.lr]}
        # Most groups have one rate alone, and the chosen one has most runs. Their files are not read without need.
        losses = {
            lr: {run.seed: run.last_losses() for run in runs if run.lr == lr and run.seed in shared} for lr in seeds
        }
        with suppress(ValueError):
            return regret_bound(losses, self.lr)
        return None

    @property
    def task_in_words(self) -> str:
        """The task, with the variant of its setting if there are several."""
        return f"{self.task} ({self.variant})" if self.variant else self.task

    @property
    def is_plain(self) -> bool:
        """Whether alpha = r, the scaling is the standard one, and all parts have the same learning rate."""
        identity = self.runs[0].record.identity
        rank, factors = identity.rank, identity.train.lr_factor or {}
        return rank.alpha == rank.r and rank.scaling == "standard" and all(factor == 1 for factor in factors.values())

    @property
    def training_digests(self) -> set[str]:
        """The digests of the rows that the runs were trained on."""
        return {run.record.data["train"].digest for run in self.runs}

    def has_mixed_data(self, split: str) -> bool:
        """Whether the runs may not be averaged, because they saw different rows."""
        scored = {record.digest for run in self.runs for record in run.scores.of(split)}
        return len(self.training_digests) > 1 or len(scored) > 1


def group_runs(
    runs: Sequence[Run], left_out: Iterable[LeftOut] = (), selections: Iterable[Selection] = ()
) -> list[RunGroup]:
    """Group the runs, choose the learning rates, and mark mixed groups. The groups are sorted for a table.

    Args:
        selections: the choices that sweeps have recorded. They are used, even if the runs here would choose otherwise.
    """
    choices = [choice for selection in selections for choice in selection.choices]
    runs_of: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        setting, own = (json.dumps(values, sort_keys=True) for values in _setting_and_own(run))
        runs_of[setting, own].append(run)
    unfinished = [folder.run for folder in left_out if folder.run is not None]
    groups = []
    for (setting, _), members in runs_of.items():
        first = members[0]
        finished = {(run.lr, run.seed) for run in members}
        group = RunGroup(setting, first.model, first.task, first.arm.label, first.arm)
        _choose_rate(
            group,
            members,
            # A folder of an attempt that failed may have been kept, under another name, beside the run that finished.
            [other for other in unfinished if other.search == first.search and (other.lr, other.seed) not in finished],
            _recorded_choices(members, choices),
        )
        _mark_mixtures(group)
        _mark_mixed_scores(group)
        if any(own.startswith("mixed ") for own in group.marks):
            group.short_marks.append("mixed")
        _mark_arm(group)
        groups.append(group)
    values = [_setting_and_own(members[0]) for members in runs_of.values()]
    names = [(group.model, group.task) for group in groups]
    variants = differing_values(names, [setting for setting, _ in values])
    own_names = [(group.setting, group.configuration, group.rank) for group in groups]
    own_values = differing_values(own_names, [own for _, own in values])
    for group, variant, own in zip(groups, variants, own_values, strict=True):
        group.variant = variant
        group.configuration += f" ({own})" if own else ""
    return sorted(
        groups,
        key=lambda group: (group.model, group.task, group.variant, group.rank, group.params, group.configuration),
    )


def _setting_and_own(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """The part of the identity that runs must share to be compared, and that of the group alone."""
    return setting_of(run), own_values(run.record.identity.tree)


def setting_of(run: Run) -> dict[str, Any]:
    """The part of the identity, with the base model, that runs must share to be compared.

    Arms with shuffled targets, and those trained from a reward, are scored on the same rows as the others.
    """
    tree = run.record.identity.tree
    setting = {key: value for key, value in tree.items() if key not in ("tying", "rank", "objective", "seed")}
    setting["train"] = {key: value for key, value in tree["train"].items() if key not in ("lr", "lr_factor")}
    setting["task"] = {key: value for key, value in tree["task"].items() if key != "shuffle_targets"}
    return setting | {"base": run.record.base.digest}


def differing_values(names: Sequence[Hashable], trees: Sequence[Any]) -> list[str]:
    """For each tree of plain data, the values that distinguish it from others of the same name: `train.steps=300`, or
    an empty text.
    """
    numbers_of: dict[Hashable, list[int]] = defaultdict(list)
    for number, name in enumerate(names):
        numbers_of[name].append(number)
    texts: list[list[str]] = [[] for _ in names]
    for numbers in numbers_of.values():
        flat = [leaves(trees[number]) for number in numbers]
        for key in sorted({key for values in flat for key in values}):
            values = [own.get(key) for own in flat]
            if len(set(map(json.dumps, values))) > 1:
                for number, value in zip(numbers, values, strict=True):
                    texts[number].append(f"{key}={_short(value)}")
    return [", ".join(own) for own in texts]


def _short(value: Any) -> str:
    """A value of a name. A long one is cut to LONGEST_VALUE characters, and has a hash of all of it."""
    text = "null" if value is None else str(value).replace("\n", " ")
    if len(text) <= LONGEST_VALUE:
        return text
    return f"{text[: LONGEST_VALUE - 3]}... #{zlib.crc32(json.dumps(value).encode()):08x}"


def _recorded_choices(runs: Sequence[Run], choices: Iterable[RateChoice]) -> list[RateChoice]:
    """The choices that sweeps have recorded for these runs; the first one is used.

    It compared the most rates and, among such choices, the fewest seeds: it was made at the earliest look.
    """
    at_rate = {(run.run_id, run.lr) for run in runs}
    own = [choice for choice in choices if at_rate & {(run_id, choice.lr) for run_id in choice.run_ids}]
    return sorted(own, key=lambda choice: (-len(choice.lrs), choice.seeds, choice.trials, choice.lr))


def _choose_rate(
    group: RunGroup, runs: Sequence[Run], unfinished: Sequence[UnfinishedRun], choices: Sequence[RateChoice]
) -> None:
    """Set the group's rates and its runs at the chosen rate, and add marks about the choice."""
    ended = [other for other in unfinished if other.ending]
    trials: list[Run | UnfinishedRun] = [*runs, *ended]
    group.trials = sorted(trials, key=lambda trial: (trial.lr, trial.seed))
    finished: dict[float, dict[int, Finished]] = {trial.lr: {} for trial in trials}
    for run in runs:
        finished[run.lr][run.seed] = Finished(run.record, run.scores)
    failed = {lr: {other.seed for other in ended if (other.lr, other.ending) == (lr, "failed")} for lr in finished}
    best = choose_rate(rate_trials(finished, failed), accept_failed=True)
    assert best is not None, "a finished run has a finite loss"
    recorded = choices[0] if choices else None
    lr = best.lr if recorded is None else recorded.lr
    group.runs = sorted((run for run in runs if run.lr == lr), key=lambda run: run.seed)
    group.rates = tuple(sorted({*best.tried, *(recorded.lrs if recorded else ())}))
    group.diverged_seeds = {other.seed for other in ended if other.diverged and other.lr == lr}
    group.has_recorded_rate = recorded is not None
    group.marks += _marks_of_choice(group, best, recorded)
    if others := sorted({choice.lr for choice in choices if choice.lr != lr}):
        group.marks.append(f"another selection.json chose {', '.join(f'{other:g}' for other in others)}")
    if failed[lr]:
        group.short_marks.append(f"{len(failed[lr])} failed")
    for other in unfinished:
        if other.lr == lr or other.ending == "failed":
            what = "failed" if other.ending == "failed" else "is not finished"
            group.marks.append(f"seed {other.seed} at lr {other.lr:g} {what}")


def _marks_of_choice(group: RunGroup, best: ChosenRate, recorded: RateChoice | None) -> list[str]:
    """What a reader must know about the choice of the rate."""
    marks = []
    lowest, highest = group.rates[0], group.rates[-1]
    if len(group.rates) > 1 and group.lr in (lowest, highest):
        marks.append(f"the chosen rate {group.lr:g} is at the edge of those tried ({lowest:g} to {highest:g})")
        group.short_marks.append("rate at the edge")
    if recorded is not None:
        if recorded.tied:
            others = ", ".join(f"{lr:g}" for lr in recorded.tied)
            marks.append(f"the choice of the rate {recorded.lr:g} is a tie with {others}")
            group.short_marks.append("rate tied")
        if recorded.lr != best.lr:
            marks.append(f"selection.json chose the rate {recorded.lr:g}; the runs here would choose {best.lr:g}")
        return marks
    if not best.paired:
        marks.append("learning rates were tried with different seeds, so their choice is not paired")
    if best.failed and len(best.usable) > 1:
        marks.append("every rate failed at some seed")
    if len(best.tried) > 1 and best.by == "loss":
        marks.append("the rate was chosen by validation loss, since not all runs have the same validation score")
    return marks


def _mark_mixtures(group: RunGroup) -> None:
    records = [run.record for run in group.runs]
    executions = [execution for record in records for execution in record.executions]

    def mark(what: str, values: Iterable[str], separator: str = ", ") -> None:
        if len(different := sorted(set(values))) > 1:
            group.marks.append(f"mixed {what}: {separator.join(different)}")

    mark("commits", (commit for run in group.runs for commit in short_commits(run)))
    if any(code.dirty for record in records for code in record.code_versions):
        group.marks.append("made by uncommitted code")
    for package in ("torch", "transformers", "sacrebleu", "rouge-score", CHAT_TEMPLATE, TARGET_BLANK):
        versions = (str(named.get(package)) for record in records for named in record.all_versions)
        mark(f"versions of {package}", versions)
    # Earlier versions have not recorded it.
    mark("tokenizers", (named[TOKENIZER] for record in records for named in record.all_versions if TOKENIZER in named))
    if len({str(record.more_ends) for record in records}) > 1:
        group.marks.append("mixed ends of answers")
    mark("devices", (execution.device_and_threads for execution in executions), "; ")
    mark("processors", (name for execution in executions if (name := execution.processor)), "; ")
    if len(group.training_digests) > 1:
        group.marks.append("mixed data: seeds were trained on different rows")
    halved = [run.seed for run in group.runs if any(scored.batch_halvings for scored in run.scores.adapted.values())]
    if halved:
        seeds = f"seed{'s' if len(halved) > 1 else ''} {', '.join(map(str, halved))}"
        group.marks.append(f"too little memory: {seeds} scored in smaller batches than score.batch_size")


def _mark_mixed_scores(group: RunGroup) -> None:
    """Mark what differs between the scores of the seeds. They may have been added later, by other code."""
    of_file: dict[tuple[str, Kind], list[ScoreRecord]] = defaultdict(list)
    for run in group.runs:
        for (split, kind), scored in run.scores.adapted.items():
            of_file[split, kind].append(scored)
    for (split, kind), records in of_file.items():
        made = {
            "commits": {scored.code.short for scored in records},
            "settings of metrics": {json.dumps(scored.signatures, sort_keys=True) for scored in records},
            "devices": {scored.execution.device_and_threads for scored in records},
        }
        for what, values in made.items():
            if len(values) > 1:
                group.marks.append(f"mixed {what} of the {kind} on {split}: {'; '.join(sorted(values))}")
        if any(scored.code.dirty for scored in records):
            group.marks.append(f"the {kind} on {split} were scored by uncommitted code")


def _mark_arm(group: RunGroup) -> None:
    """Mark what was found of another method before its first step, and a size that is not that of the budget."""
    found: dict[str, str] = {}
    for run in group.runs:
        record = run.record
        found |= record.admission.marks() if record.admission is not None else {}
        budget = record.config.tree.get("budget")
        if isinstance(budget, int) and budget > 0 and not is_near(group.params, budget):
            off = f"{group.params / budget - 1:+.0%}"
            found[f"size {off}"] = f"{off} off the budget of {budget:,} parameters"
    group.short_marks += found
    group.marks += found.values()


def shown_splits(groups: Sequence[RunGroup], split: str | None) -> dict[tuple[str, str], str]:
    """(model, task) -> the split that the report shows: this one or, without it, test if any chosen run has it."""
    has_test = {(group.model, group.task) for group in groups for run in group.runs if run.scores.of("test")}
    places = {(group.model, group.task) for group in groups}
    return {place: split or ("test" if place in has_test else "validation") for place in places}


def short_commits(run: Run) -> list[str]:
    """The first characters of the run's commit, or its version; several if it was continued with other code."""
    return list(dict.fromkeys(code.short for code in run.record.code_versions))


# Curves.


@dataclass(frozen=True, eq=False)
class Blend:
    """A point of a curve: one measured size, or a weighted mean of the two that enclose it."""

    configuration: str
    params: int
    parts: tuple[tuple[float, RunGroup], ...]
    """(weight, group); the weights add up to 1."""

    @property
    def groups(self) -> list[RunGroup]:
        """The groups that have a part in it."""
        return [group for _, group in self.parts]

    @property
    def name(self) -> str:
        """Such as `LoRA at 41,328 parameters (between LoRA_l15 r=1 and LoRA r=1)`."""
        names = [group.name for group in self.groups]
        where = f" (between {' and '.join(names)})" if len(names) > 1 else f" ({names[0]})"
        return f"{self.configuration} at {self.params:,} parameters{where}"


Peer = RunGroup | Blend
"""What a method is compared with."""


def curve(configuration: str, setting: str, groups: Sequence[RunGroup]) -> list[RunGroup]:
    """The sizes of a configuration in one setting, in rising order of parameters. Only plain groups are on it.

    These are every rank on all layers and, below rank 1, rank 1 on evenly spaced layers (LoRA_l15 on 15 of them).
    """
    members: dict[int, RunGroup] = {}
    for group in groups:
        if group.setting == setting and group.arm.is_size_of(configuration) and group.is_plain:
            members.setdefault(group.params, group)
    return [members[params] for params in sorted(members)]


def point(configuration: str, sizes: Sequence[RunGroup], params: int) -> Blend | None:
    """The curve at a number of parameters; None outside the measured sizes.

    Between two measured sizes a and b, the score at n parameters is

        q(n) = w q_a + (1 - w) q_b,   w = (log b - log n) / (log b - log a)

    on the same seeds and rows, so a comparison with it is one contrast like any other.
    """
    for group in sizes:
        if group.params == params:
            return Blend(configuration, params, ((1.0, group),))
    for smaller, larger in itertools.pairwise(sizes):
        if smaller.params < params < larger.params:
            weight = math.log(larger.params / params) / math.log(larger.params / smaller.params)
            return Blend(configuration, params, ((weight, smaller), (1 - weight, larger)))
    return None

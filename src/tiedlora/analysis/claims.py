"""A paper's claims as comparisons, read from a YAML file; the groups that they compare."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from tiedlora import storage, tying
from tiedlora.analysis import rules
from tiedlora.analysis.groups import Blend, Peer, RunGroup, curve, point
from tiedlora.analysis.rules import Plan, Rule
from tiedlora.analysis.runs import Names, NotComparable
from tiedlora.config import compose
from tiedlora.config.explain import options
from tiedlora.config.identity import identity, leaves, neutral_values
from tiedlora.config.sizes import is_near
from tiedlora.config.trial_arm import TrialArm, trained_for
from tiedlora.errors import UserError
from tiedlora.keys import LARGEST_COUNT, from_person
from tiedlora.reading import Flag, StoredCount, StoredNumber, StoredText, StoredWhole
from tiedlora.records.loss_metrics import DRIFT, LOSS_METRICS
from tiedlora.tasks import NoSuchTask, load_task
from tiedlora.text import nearest, number_list
from tiedlora.tying import RENAMED, is_named

EQUAL_RANK, EQUAL_PARAMETERS = "equal_rank", "equal_parameters"
RULES = ("retains", "better_by", "level_within")
"""The keys of a claim that name its rule, and the functions of rules.py that make it."""
NO_SUCH = "no run here has this name, and it is no option of"
_KNOWN_KEYS = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a configuration at a rank, or at the rank or size that matches the other side."""

    __pydantic_config__ = _KNOWN_KEYS
    configuration: StoredText = ""
    rank: Annotated[StoredWhole, Field(ge=1, le=LARGEST_COUNT)] | None = None
    at: Literal["equal_rank", "equal_parameters"] | None = None
    """How the rank follows from the other side; None for a side with a rank."""
    seed_offset: Annotated[StoredWhole, Field(ge=0, le=LARGEST_COUNT)] = 0
    """This side's run of seed s + offset is paired with the other side's run of seed s. With it, a configuration is
    compared with itself (an A/A control)."""
    shuffle_targets: Flag = False
    """Whether the runs trained on shuffled targets (task.shuffle_targets), which teach only the form of an answer."""
    objective: Literal["targets", "reward"] = "targets"
    """What the runs trained for (objective=reward)."""
    frontier: StoredText = ""
    """In place of all other keys: this configuration at the other side's number of parameters, between the two of its
    sizes that enclose it (groups.point)."""

    def __post_init__(self) -> None:
        others = (self.configuration, self.rank, self.at, self.seed_offset, self.trained_for)
        if self.frontier and any(others):
            raise ValueError("frontier allows no other key: it is a configuration at the other side's size")
        if self.shuffle_targets and self.objective == "reward":
            raise ValueError("shuffle_targets and objective: reward exclude each other")
        if not self.frontier and not self.configuration:
            raise ValueError("configuration is missing; name one, such as LoRA")
        if not self.frontier and (self.rank is None) == (self.at is None):
            raise ValueError(f"needs either rank, or at ({EQUAL_RANK} or {EQUAL_PARAMETERS})")

    @property
    def label(self) -> str:
        """The configuration as groups of runs name it."""
        return f"{self.configuration} ({self.trained_for})" if self.trained_for else self.configuration

    @property
    def trained_for(self) -> str:
        """As that of TrialArm."""
        return trained_for(self.shuffle_targets, self.objective)

    def means(self, arm: TrialArm) -> bool:
        """Whether the side names this arm, at whatever rank."""
        return arm.goes_by(self.configuration, self.trained_for)

    def __str__(self) -> str:
        if self.frontier:
            return f"{self.frontier} of equal size (its curve)"
        return f"{self.label} {f'at {self.at}'.replace('_', ' ') if self.at else f'r={self.rank}'}"


def _checked(side: Side) -> Side:
    if side.rank is None and side.at != EQUAL_RANK:
        raise ValueError(f"needs a rank, or at: {EQUAL_RANK}")
    if side.seed_offset:
        raise ValueError("has the seeds of the plan; seed_offset is for method and comparator")
    return side


Arm = Annotated[Side, AfterValidator(_checked)]
"""A floor or a weakest arm."""


def _by_task(tasks: Any) -> Any:
    if isinstance(tasks, dict) or (isinstance(tasks, list) and all(isinstance(task, str) for task in tasks)):
        return tasks if isinstance(tasks, dict) else dict.fromkeys(tasks, "")
    raise ValueError("must be a list of task names, or their metrics such as {squad: f1}; [] takes every task")


@dataclass(frozen=True)
class _Entry:
    """A claim as its file has it."""

    __pydantic_config__ = _KNOWN_KEYS
    name: Annotated[StoredText, Field(min_length=1)]
    method: Side
    comparator: Side
    tasks: Annotated[dict[StoredText, StoredText], BeforeValidator(_by_task)]
    """Task -> the metric that decides, or an empty text for its first. Without tasks, each that was run counts."""
    retains: Annotated[StoredNumber, Field(ge=0.01, lt=1)] | None = None
    """The share of the comparator's gain that is kept."""
    better_by: Annotated[StoredNumber, Field(ge=0, lt=1)] | None = None
    """In the score's unit: 0.02 is two points."""
    level_within: Annotated[StoredNumber, Field(ge=0.001, lt=1)] | None = None
    """A share of the comparator's gain."""
    where: dict[StoredText, StoredText | StoredWhole | StoredNumber | Flag] = field(default_factory=dict)
    """Configuration keys and the values that runs must have, such as {train.steps: 256}. Without it, every setting of
    the tasks that was run counts."""
    floor: Arm | None = None
    """The arm whose scores are the zero point of gains; None takes that of the file, or the base model."""
    weakest: Arm | None = None
    """An arm that must not pass: if it does, the trial cannot fail, and a pass means nothing. None takes that of the
    file."""

    def __post_init__(self) -> None:
        given = [key for key in RULES if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one rule of {', '.join(RULES)}; it has {', '.join(given) or 'none'}")
        one, other = self.method, self.comparator
        if one.frontier:
            raise ValueError("method has frontier; only a comparator can be a curve")
        if one.rank is None and other.rank is None:
            raise ValueError("method and comparator are both matched to the other side; one of them needs a rank")


@dataclass(frozen=True)
class Claim(_Entry):
    """One comparison that a paper claims, with what its file plans for all of its claims."""

    plan: Plan = field(kw_only=True)

    @property
    def rule(self) -> Rule:
        """The one rule that is given."""
        rule: Rule = next(getattr(rules, key)(value) for key in RULES if (value := getattr(self, key)) is not None)
        return rule

    def shared_seeds(self, look: int) -> set[int]:
        """The seeds whose runs would be on both sides at this look, if the claim compares an arm with itself.

        Such pairs depend on each other, and a control would pass too easily.
        """
        one, other = self.method, self.comparator
        is_control = one.label == other.label and (one.rank == other.rank or one.at or other.at)
        ours, theirs = ({seed + side.seed_offset for seed in self.plan.of_look(look)} for side in (one, other))
        return ours & theirs if is_control else set()

    @property
    def anchor(self) -> Side:
        """The side that has a rank; of two such sides, the method. The other side is matched to it."""
        return self.comparator if self.method.rank is None else self.method

    def rank_of(self, side: Side) -> int | None:
        """The rank of a side; None if its number of parameters decides."""
        return self.anchor.rank if side.at == EQUAL_RANK else side.rank

    @property
    def fault(self) -> str:
        """Why no runs could ever answer the claim; empty if some could."""
        if self.floor is not None and self.rule.needs_zero:
            for key, side in (("comparator", self.comparator), ("method", self.method)):
                # Other seeds of the same arm make a gain of nothing but chance.
                if self.floor.label == side.label and self.rank_of(self.floor) == self.rank_of(side):
                    return f"the floor is the {key}, {side}, whose gain would be 0; choose another"
        curve_of, method = self.comparator.frontier, self.method
        is_part = method.rank == 1 and curve_of == "LoRA" and tying.lora_layers(method.configuration) is not None
        if curve_of and not method.trained_for and (method.configuration == curve_of or is_part):
            return f"the method, {method}, is on the curve of {curve_of} itself; choose another frontier or method"
        if shared_seeds := self.shared_seeds(0):
            return (
                f"compares {method.label} with itself, and both sides have the runs of seeds "
                f"{number_list(shared_seeds)}; take a seed_offset of {self.plan.looks[0]} on one side"
            )
        return ""

    @property
    def sides(self) -> dict[str, Side]:
        """Key of the claims' file -> the side that it names."""
        keys = ("method", "comparator", "floor", "weakest")
        return {key: side for key in keys if (side := getattr(self, key)) is not None}

    def covers(self, task: str) -> bool:
        """Whether the claim is about the task."""
        return not self.tasks or task in self.tasks

    def covers_setting(self, task: str, identity: Mapping[str, Any]) -> bool:
        """Whether the claim is about runs of the task with this identity (config.identity.identity)."""
        return self.covers(task) and _has(identity, self.where)

    def metric_on(self, task: str, first: str) -> str:
        """The metric that the claim compares on a task whose first metric is `first`."""
        return self.tasks.get(task) or first


def _has(identity: Mapping[str, Any], wanted: Mapping[str, object]) -> bool:
    """Whether the dotted keys have these values in an identity. One that it leaves out has its neutral value."""
    values = {**_neutral(), **leaves(identity)} if wanted else {}
    return all(values.get(key) == value for key, value in wanted.items())


@dataclass(frozen=True)
class _File:
    """A claims file."""

    __pydantic_config__ = _KNOWN_KEYS
    claims: Annotated[list[_Entry], Field(min_length=1)]
    paper: StoredText = ""
    looks: list[Annotated[StoredWhole, Field(ge=2)]] = field(default_factory=lambda: list(rules.LOOKS))
    seeds: list[Annotated[StoredWhole, Field(ge=0, le=LARGEST_COUNT)]] | None = None
    tests: StoredCount = 0
    floor: Arm | None = None
    weakest: Arm | None = None

    def __post_init__(self) -> None:
        names = [entry.name for entry in self.claims]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two claims have the name {twice!r:.80}; give each its own")
        self.plan()

    def plan(self) -> Plan:
        """The plan of all claims.

        Raises:
            ValueError: it is impossible.
        """
        return Plan(tuple(self.looks), None if self.seeds is None else tuple(self.seeds), self.tests)


_KEYS = [item.name for kind in (_File, _Entry, Side) for item in fields(kind)]


def read(path: Path) -> list[Claim]:
    """The claims of a YAML file. Whether what they name exists is for `check_names`.

    Raises:
        UserError: a key is missing, unknown or has an impossible value; the message names it.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file; claims are YAML files such as claims/tied_lora.yaml")
    text = storage.read_yaml(path)
    try:
        file = from_person(_File, text, _KEYS)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    shared = {"plan": file.plan(), "floor": file.floor, "weakest": file.weakest}
    # A claim's own floor or weakest arm replaces that of its file.
    claims = [Claim(**{**shared, **{k: v for k, v in vars(entry).items() if v is not None}}) for entry in file.claims]
    for claim in claims:
        if claim.fault:
            raise UserError(f"{path}: {claim.name}: {claim.fault}")
    return claims


def check_names(path: Path, claims: Iterable[Claim], names: Names) -> None:
    """Refuse a claim about what does not exist, which would be reported as not run for ever.

    Args:
        names: what the runs have. Valid are also the options of conf/, and what decides a run of the defaults.

    Raises:
        UserError: naming the claim, the key and the nearest valid name.
    """
    known = {*options("tying"), *names.configurations}
    tasks = {*options("task"), *names.metrics}
    for claim in claims:
        where = f"{path}: claim {claim.name!r:.80}"
        for key, side in claim.sides.items():
            own_key = "frontier" if side.frontier else "configuration"
            if (name := getattr(side, own_key)) in RENAMED:
                raise UserError(f"{where}: {key}.{own_key}={name}: {RENAMED[name]}")
            if not is_named(name) and name not in known:
                raise UserError(f"{where}: {key}.{own_key}={name:.80}: {NO_SUCH} tying{nearest(name, known)}")
        _check_setting(where, claim.where, names.keys)
        for task, metric in claim.tasks.items():
            if task not in tasks:
                raise UserError(f"{where}: tasks: {task:.80}: {NO_SUCH} task{nearest(task, tasks)}")
            metrics = {*_own_metrics(task), *names.metrics.get(task, ())}
            if metric and metrics and metric not in metrics:
                known_metrics = f"it has {', '.join(sorted(metrics))}{nearest(metric, metrics)}"
                raise UserError(f"{where}: tasks: {task} has no metric {metric:.80}; {known_metrics}")


def _check_setting(place: str, where: Mapping[str, object], keys: Iterable[str]) -> None:
    """Refuse a setting that no run can have. A claim has its seeds from the plan, and its rates from the search."""
    defaults = _defaults()
    deciding = {*defaults, *keys} - {"seed", "train.lr"}
    for key, value in where.items():
        if key not in deciding:
            meant = nearest(key, deciding)
            raise UserError(f"{place}: where: {key:.80}: is no key that decides a setting{meant}")
        kind = _kind(defaults.get(key))
        if kind and _kind(value) != kind:
            raise UserError(f"{place}: where: {key}={value!r:.80}: must be {kind}, as in the runs")


@functools.cache
def _defaults() -> dict[str, Any]:
    """The keys that decide what a run of the defaults is, with their values."""
    return _neutral() | leaves(identity(compose.compose_config([])))


@functools.cache
def _neutral() -> dict[str, Any]:
    """The keys that are left out of an identity at a value -> this value."""
    return leaves(neutral_values(compose.compose_config([])))


def _kind(value: object) -> str:
    """What a value is, in words; empty for a list and for null, which stand for other kinds too."""
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    return "a text" if isinstance(value, str) else ""


def _own_metrics(task: str) -> tuple[str, ...]:
    """The metrics of a task of conf/; empty for any other task, or if a program registers its kind."""
    try:
        own = load_task(compose.task_option(task)).metrics if task in options("task") else ()
        # task=rows has the metrics that its user names.
        return (*own, *LOSS_METRICS, DRIFT) if own else ()
    except NoSuchTask:
        return ()


# Which groups a claim compares.


@dataclass(frozen=True)
class Unpaired:
    """A setting in which a side of a claim is missing."""

    anchor: RunGroup
    """As Pair.anchor."""
    problem: str
    """Why a side is missing."""
    lacks_method: bool = False
    """Whether no run of the method is in this setting."""


@dataclass(frozen=True)
class Pair:
    """The sides of a claim in one setting."""

    anchor: RunGroup
    """The group of the side that has a rank of its own. The other side is matched to it."""
    method: RunGroup
    comparator: Peer
    floor: RunGroup | None
    """The zero point, if the claim names one and its rule needs one."""
    weakest: Pair | Unpaired | None = None
    """The arm that must not pass, if the claim names one, with the comparator, or its curve at the arm's own size."""
    arms: tuple[tuple[RunGroup, int], ...] = ()
    """Every group that a look needs, with the offset of its seeds, and with the runs of all seeds."""

    @property
    def sides(self) -> list[RunGroup]:
        """The groups whose scores a rule takes: both sides, and the floor if there is one."""
        return [self.method, *self.comparator.groups, *([self.floor] if self.floor is not None else [])]


def models(claim: Claim, groups: Sequence[RunGroup]) -> set[str]:
    """The models that a claim can be about: those with what it says of the model, or all if none has it."""
    wanted = {key: value for key, value in claim.where.items() if key.startswith("model.")}
    fitting = {group.model for group in groups if _has(group.runs[0].record.identity.tree, wanted)}
    return fitting or {group.model for group in groups}


def pairs(claim: Claim, groups: Sequence[RunGroup], splits: Mapping[tuple[str, str], str]) -> list[Pair | Unpaired]:
    """A pair for every setting with a group of the claim's anchor, on the claim's tasks.

    Args:
        splits: (model, task) -> the split that is compared.
    """
    # Both sides have what the claim asks of a run: two groups of one setting may differ in the rank's alpha.
    groups = [group for group in groups if claim.covers_setting(group.task, group.runs[0].record.identity.tree)]
    anchors: dict[str, list[RunGroup]] = {}
    for group in groups:
        if claim.anchor.means(group.arm) and group.rank == claim.anchor.rank:
            anchors.setdefault(group.setting, []).append(group)
    found: list[Pair | Unpaired] = []
    for alike in anchors.values():
        try:
            found.append(_pair(claim, _only_one(alike), groups, splits))
        except NotComparable as why:
            setting = alike[0].setting
            is_there = any(group.setting == setting and claim.method.means(group.arm) for group in groups)
            found.append(Unpaired(alike[0], str(why), lacks_method=not is_there))
    return found


def _pair(claim: Claim, anchor: RunGroup, groups: Sequence[RunGroup], splits: Mapping[tuple[str, str], str]) -> Pair:
    """The pair of an anchor. NotComparable: a side is missing, or several groups fit."""
    split = splits[anchor.model, anchor.task]
    matched = claim.method if claim.method.rank is None else claim.comparator
    partner: Peer
    if matched.frontier:
        partner = _on_curve(matched.frontier, claim, anchor, groups, split)
    else:
        partner = _partner(matched, anchor, groups)
    floor = None
    if claim.floor is not None and claim.rule.needs_zero:
        floor = _partner(claim.floor, anchor, groups, what="the floor: ")
    method, comparator = (partner, anchor) if claim.method.rank is None else (anchor, partner)
    assert not isinstance(method, Blend), "only a comparator is on a curve"
    if floor is not None and floor in (method, comparator):
        # Of a side at equal parameters, or one in another spelling, only the runs say which arm it is.
        raise NotComparable(f"the floor is {floor.name}, a side of the comparison itself; choose another")
    arms = [(method, claim.method.seed_offset)]
    arms += [(group, claim.comparator.seed_offset) for group in comparator.groups]
    arms += [(floor, 0)] if floor is not None else []
    weakest: Pair | Unpaired | None = None
    if claim.weakest is not None:
        try:
            arm, curve_of = _partner(claim.weakest, anchor, groups), claim.comparator.frontier
            # It says whether the trial can fail, so it has the seeds of every look too.
            arms.append((arm, 0))
            peer = _on_curve(curve_of, claim, arm, groups, split) if curve_of else comparator
            weakest = Pair(anchor, arm, peer, floor)
        except NotComparable as why:
            weakest = Unpaired(anchor, str(why))
    if not isinstance(comparator, Blend):
        comparator = _shifted(comparator, claim.comparator)
    return Pair(anchor, _shifted(method, claim.method), comparator, floor, weakest, tuple(arms))


def _on_curve(configuration: str, claim: Claim, anchor: RunGroup, groups: Sequence[RunGroup], split: str) -> Blend:
    """The curve of a configuration at the anchor's number of parameters."""
    found = sizes(claim, configuration, anchor, groups, split)
    if anchor in found:
        raise NotComparable(f"{anchor.name} is on the curve of {configuration} itself")
    if (blend := point(configuration, found, anchor.params)) is None:
        measured = ", ".join(f"{group.params:,}" for group in found) or "none"
        late = [group.name for group in curve(configuration, anchor.setting, groups) if group not in found]
        measured += f" ({', '.join(late)}: without the first look's seeds)" if late else ""
        raise NotComparable(
            f"{anchor.params:,} parameters are outside the measured sizes of {configuration}: {measured}"
        )
    return blend


def sizes(claim: Claim, configuration: str, anchor: RunGroup, groups: Sequence[RunGroup], split: str) -> list[RunGroup]:
    """The sizes of a configuration in the anchor's setting that can be compared, in rising order.

    Each has the claim's metric on this split, on the seeds of the first look. So a size that has just begun does not
    take part. A size with a failed seed does: the look waits until that run is repaired.
    """
    seeds, metric = set(claim.plan.of_look(0)), claim.tasks.get(anchor.task)

    def is_ready(group: RunGroup) -> bool:
        scored = [(run.seed, metrics) for run in group.runs if (metrics := run.scores.metrics(split))]
        failed = {trial.seed for trial in group.trials if trial.ending == "failed" and trial.lr == group.lr}
        return seeds <= {seed for seed, own in scored if not metric or metric in own} | failed

    return curve(configuration, anchor.setting, list(filter(is_ready, groups)))


def _shifted(group: RunGroup, side: Side) -> RunGroup:
    """The group with its seeds counted from the side's offset. Runs of lower seeds are left out."""
    if (offset := side.seed_offset) == 0:
        return group
    later = [run for run in group.runs if run.seed >= offset]
    runs = [replace(run, record=replace(run.record, seed=run.seed - offset)) for run in later]
    diverged = {seed - offset for seed in group.diverged_seeds if seed >= offset}
    name = f"{group.configuration} (seeds from {offset})"
    return replace(group, configuration=name, runs=runs, diverged_seeds=diverged)


def _partner(side: Side, anchor: RunGroup, groups: Sequence[RunGroup], what: str = "") -> RunGroup:
    """The group of the side in the anchor's setting. The reason why there is none begins with `what`."""
    found = [group for group in groups if group.setting == anchor.setting and side.means(group.arm)]
    name = side.label
    if side.rank is not None or side.at == EQUAL_RANK:
        rank = side.rank or anchor.rank
        name = f"{name} r={rank}"
        found = [group for group in found if group.rank == rank]
    if not found:
        raise NotComparable(f"{what}no finished run of {name} in the same setting")
    if side.at == EQUAL_PARAMETERS:
        closest = min(found, key=lambda group: abs(math.log(group.params / anchor.params)))
        if not is_near(closest.params, anchor.params):
            raise NotComparable(
                f"no {side.label} of about {anchor.params:,} parameters was run (nearest: r={closest.rank} with "
                f"{closest.params:,}); train one with budget={anchor.params}"
            )
        found = [group for group in found if group.params == closest.params]
    # The anchor is among them if it is compared with itself, on other seeds.
    return anchor if anchor in found else _only_one(found, what)


def _only_one(groups: Sequence[RunGroup], what: str = "") -> RunGroup:
    """The single group, or the plain one of several (RunGroup.is_plain)."""
    plain = [group for group in groups if group.is_plain]
    for some in (groups, plain):
        if len(some) == 1:
            return some[0]
    names = ", ".join(group.name for group in groups)
    raise NotComparable(
        f"{what}several groups fit, and no single one is plain: {names}; choose one with `where` in the claim"
    )

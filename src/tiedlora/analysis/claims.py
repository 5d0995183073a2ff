"""A paper's claims as comparisons, read from a YAML file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from pydantic import BeforeValidator, ConfigDict, Field

from tiedlora import storage
from tiedlora.analysis.looks import SEEDS, Looks, planned
from tiedlora.analysis.rules import Better, Level, Retains, Rule
from tiedlora.config.compose import task_option
from tiedlora.config.explain import nearest, options
from tiedlora.errors import UserError
from tiedlora.keys import LARGEST_COUNT
from tiedlora.records.loss_metrics import LOSS_METRICS
from tiedlora.records.reading import Number, Text, Whole, from_person
from tiedlora.tasks import load_task

EQUAL_RANK, EQUAL_PARAMETERS = "equal_rank", "equal_parameters"
NO_SUCH = "no run here has this name, and it is no option of"
_KNOWN_KEYS = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a configuration at a rank, or at the rank that matches the other side."""

    __pydantic_config__ = _KNOWN_KEYS
    configuration: Text
    rank: Annotated[Whole, Field(ge=1, le=LARGEST_COUNT)] | None = None
    at: Literal["equal_rank", "equal_parameters"] | None = None
    """How the rank follows from the other side; None for a side with a rank."""
    seed_offset: Annotated[Whole, Field(ge=0, le=LARGEST_COUNT)] = 0
    """This side's run of seed s + offset is paired with the other side's run of seed s. With it, a configuration is
    compared with itself (an A/A control)."""

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.at is None):
            raise ValueError(f"needs either rank, or at ({EQUAL_RANK} or {EQUAL_PARAMETERS})")


@dataclass(frozen=True)
class Plan:
    """At which numbers of seeds a verdict is given, and which seeds these are."""

    looks: Looks
    seeds: tuple[int, ...]
    """The seeds in declared order. A look at n seeds uses the first n."""

    def of_look(self, number: int) -> tuple[int, ...]:
        """The seeds of a look, which is counted from 0."""
        return self.seeds[: self.looks.seeds[number]]


@dataclass(frozen=True)
class Claim:
    """One comparison that a paper claims."""

    paper: str
    name: str
    method: Side
    comparator: Side
    rule: Rule
    metrics: dict[str, str]
    """Task -> the metric that decides, or an empty text for the task's first. Without tasks, every task counts."""
    plan: Plan

    def covers(self, task: str) -> bool:
        """Whether the claim is about the task."""
        return not self.metrics or task in self.metrics

    def metric_on(self, task: str, first: str) -> str:
        """The metric that the claim compares on a task whose first metric is `first`."""
        return self.metrics.get(task) or first


def _by_task(tasks: Any) -> Any:
    if isinstance(tasks, dict) or (isinstance(tasks, list) and all(isinstance(task, str) for task in tasks)):
        return tasks if isinstance(tasks, dict) else dict.fromkeys(tasks, "")
    raise ValueError("must be a list of task names, or their metrics such as {squad: f1}; [] takes every task")


@dataclass(frozen=True)
class _Entry:
    """A claim as its file has it."""

    __pydantic_config__ = _KNOWN_KEYS
    name: Annotated[Text, Field(min_length=1)]
    method: Side
    comparator: Side
    tasks: Annotated[dict[Text, Text], BeforeValidator(_by_task)]
    retains: Annotated[Number, Field(ge=0.01, lt=1)] | None = None
    """The share of the comparator's gain that is kept."""
    better_by: Annotated[Number, Field(ge=0, lt=1)] | None = None
    """In the score's unit: 0.02 is two points."""
    level_within: Annotated[Number, Field(ge=0.001, lt=1)] | None = None
    """A share of the comparator's gain."""

    def __post_init__(self) -> None:
        given = [key for key in RULES if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one rule of {', '.join(RULES)}; it has {', '.join(given) or 'none'}")
        one, other = self.method, self.comparator
        if one.at and other.at:
            raise ValueError("method and comparator both have 'at'; one of them needs a rank")
        same_size = one.rank == other.rank or one.at or other.at
        if same_size and (one.configuration, one.seed_offset) == (other.configuration, other.seed_offset):
            raise ValueError(f"compares {one.configuration} with itself; seed_offset on one side gives it other seeds")

    def rule(self) -> Rule:
        """The one rule that is given."""
        return next(make(value) for key, make in RULES.items() if (value := getattr(self, key)) is not None)


RULES: dict[str, Callable[[float], Rule]] = {"retains": Retains, "better_by": Better, "level_within": Level}


@dataclass(frozen=True)
class _File:
    """A claims file."""

    __pydantic_config__ = _KNOWN_KEYS
    claims: Annotated[list[_Entry], Field(min_length=1)]
    paper: Text = ""
    looks: list[Annotated[Whole, Field(ge=2)]] = field(default_factory=lambda: list(SEEDS))
    levels: list[Number] | None = None
    seeds: list[Annotated[Whole, Field(ge=0, le=LARGEST_COUNT)]] | None = None

    def __post_init__(self) -> None:
        names = [entry.name for entry in self.claims]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two claims have the name {twice!r:.80}; give each its own")
        self.plan()

    def plan(self) -> Plan:
        """The planned looks of every claim.

        Raises:
            ValueError: the looks, levels or seeds do not fit each other.
        """
        planned_looks = planned(self.looks, self.levels)
        last = planned_looks.seeds[-1]
        seeds = tuple(range(last) if self.seeds is None else self.seeds)
        if len(set(seeds)) < len(seeds) or len(seeds) < last:
            raise ValueError(f"seeds {list(seeds)!s:.60}: must be at least {last} different seeds, for the last look")
        return Plan(planned_looks, seeds)


_KEYS = [item.name for kind in (_File, _Entry, Side) for item in fields(kind)]


def read(path: Path) -> list[Claim]:
    """The claims of a YAML file. Whether what they name exists is for `check_names`.

    Raises:
        UserError: a key is missing, unknown or has an impossible value; the message names it.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file; claims are YAML files such as claims/tied_lora.yaml")
    # Interpolations are not resolved: a claim needs none, and must not read the environment.
    text = OmegaConf.to_container(storage.read_yaml(path))
    try:
        file = from_person(_File, text, _KEYS)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    plan = file.plan()
    return [
        Claim(file.paper, entry.name, entry.method, entry.comparator, entry.rule(), entry.tasks, plan)
        for entry in file.claims
    ]


def check_names(
    path: Path, claims: Iterable[Claim], configurations: Iterable[str], metrics: Mapping[str, Iterable[str]]
) -> None:
    """Refuse a claim about what does not exist, which would be reported as not run for ever.

    Args:
        path: the claims' file, for the message.
        configurations: the names of the runs, which are valid beside the options of conf/tying.
        metrics: task of the runs -> its recorded metrics, which are valid beside conf/task and the tasks' own metrics.

    Raises:
        UserError: naming the claim, the key and the nearest valid name.
    """
    known = {*options("tying"), *configurations}
    tasks = {*options("task"), *metrics}
    for claim in claims:
        where = f"{path}: claim {claim.name!r:.80}"
        for key, side in (("method", claim.method), ("comparator", claim.comparator)):
            name = side.configuration
            if name not in known:
                raise UserError(f"{where}: {key}.configuration={name:.80}: {NO_SUCH} tying{nearest(name, known)}")
        for task, metric in claim.metrics.items():
            if task not in tasks:
                raise UserError(f"{where}: tasks: {task:.80}: {NO_SUCH} task{nearest(task, tasks)}")
            names = {*_own_metrics(task), *metrics.get(task, ())}
            if metric and names and metric not in names:
                known_names = f"it has {', '.join(sorted(names))}{nearest(metric, names)}"
                raise UserError(f"{where}: tasks: {task} has no metric {metric:.80}; {known_names}")


def _own_metrics(task: str) -> tuple[str, ...]:
    """The metrics of a task of conf/. None for another one, or if a program registers its kind."""
    try:
        return (*load_task(task_option(task)).metrics, *LOSS_METRICS) if task in options("task") else ()
    except UserError:
        return ()


def in_words(rule: Rule) -> str:
    """What the rule asks for, such as `keeps 90 % of the gain`."""
    match rule:
        case Retains(rho):
            return f"keeps {100 * rho:g} % of the gain"
        case Better(0.0):
            return "is better"
        case Better(margin):
            return f"is better by {margin:g}"
        case Level(delta):
            return f"is level within {100 * delta:g} % of the gain"
    raise TypeError(f"{rule} is no rule of a claim")

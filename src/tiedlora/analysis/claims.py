"""A paper's claims as comparisons, read from a YAML file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from tiedlora import storage
from tiedlora.analysis import looks
from tiedlora.analysis.looks import Looks
from tiedlora.analysis.rules import Better, Level, Retains, Rule, WithinMargin
from tiedlora.errors import UserError
from tiedlora.records.reading import is_number

EQUAL_RANK, EQUAL_PARAMETERS = "equal_rank", "equal_parameters"
AT = (EQUAL_RANK, EQUAL_PARAMETERS)
LEAST_SEEDS = 5
"""The least `minimum_seeds` that the files of earlier versions could ask for."""


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a configuration at a rank, or at the rank that matches the other side."""

    configuration: str
    rank: int | None
    at: str = ""
    """One of AT if the rank follows from the other side, otherwise empty."""
    seed_offset: int = 0
    """This side's run of seed s + offset is paired with the other side's run of seed s. With it, a configuration is
    compared with itself (an A/A control)."""


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


def read(path: Path) -> list[Claim]:
    """The claims of a YAML file.

    Raises:
        UserError: a key is missing, unknown or has an impossible value; the message names it.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file; claims are YAML files such as claims/tied_lora.yaml")
    # Interpolations are not resolved: a claim needs none, and must not read the environment.
    text: Any = OmegaConf.to_container(storage.read_yaml(path))
    if not isinstance(text, dict) or not isinstance(text.get("claims"), list) or not text["claims"]:
        raise UserError(f"{path}: needs the keys paper and claims, a list of at least one")
    _check_keys(str(path), text, ("claims",), ("paper", "looks", "levels", "seeds"))
    plan = _plan(path, text)
    paper = str(text.get("paper", ""))
    return [_claim(f"{path}: claims[{number}]", paper, plan, entry) for number, entry in enumerate(text["claims"])]


def _check_keys(where: str, entry: dict[Any, Any], needed: Sequence[str], optional: Sequence[str]) -> None:
    for key in entry:
        if key not in (*needed, *optional):
            raise UserError(f"{where}: unknown key '{key}'; the keys are {', '.join((*needed, *optional))}")
    for key in needed:
        if key not in entry:
            raise UserError(f"{where}: has no key '{key}'; the keys are {', '.join((*needed, *optional))}")


def _plan(path: Path, text: dict[Any, Any]) -> Plan:
    counts, levels, seeds = (text.get(key) for key in ("looks", "levels", "seeds"))
    if counts is not None and not _are_whole(counts, 2):
        raise UserError(f"{path}: looks={counts}: must be a list of numbers of seeds, each 2 or more, such as [3, 5]")
    if levels is not None and not (isinstance(levels, list) and all(map(is_number, levels))):
        raise UserError(f"{path}: levels={levels}: must be a list of numbers, one for each look")
    try:
        planned = looks.planned(
            tuple(counts) if counts is not None else looks.SEEDS, tuple(levels) if levels is not None else None
        )
    except ValueError as error:
        raise UserError(f"{path}: looks and levels: {error}") from None
    last = planned.seeds[-1]
    if seeds is None:
        return Plan(planned, tuple(range(last)))
    if not _are_whole(seeds, 0) or len(set(seeds)) < len(seeds) or len(seeds) < last:
        raise UserError(f"{path}: seeds={seeds}: must be a list of at least {last} different seeds, for the last look")
    return Plan(planned, tuple(seeds))


def _claim(where: str, paper: str, plan: Plan, entry: Any) -> Claim:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: must have the keys name, method, comparator, tasks and a rule")
    _check_keys(where, entry, ("name", "method", "comparator", "tasks"), (*RULES, "minimum_seeds"))
    method, comparator = _side(f"{where}.method", entry["method"]), _side(f"{where}.comparator", entry["comparator"])
    if method.at and comparator.at:
        raise UserError(f"{where}: method and comparator both have 'at'; one of them needs a rank")
    if (minimum := entry.get("minimum_seeds")) is not None:
        plan = _with_minimum(where, plan, minimum)
    rule, metrics = _rule(where, entry), _metrics(where, entry["tasks"])
    return Claim(paper, str(entry["name"]), method, comparator, rule, metrics, plan)


def _side(where: str, side: Any) -> Side:
    keys = set(side) if isinstance(side, dict) else set()
    offset = side.get("seed_offset", 0) if keys else 0
    keys.discard("seed_offset")
    if _is_whole(offset, 0):
        if keys == {"configuration", "rank"} and _is_whole(side["rank"], 1):
            return Side(str(side["configuration"]), side["rank"], seed_offset=offset)
        if keys == {"configuration", "at"} and side["at"] in AT:
            return Side(str(side["configuration"]), None, side["at"], offset)
    raise UserError(
        f"{where}={side}: needs configuration, and either rank (a whole number from 1) or at (one of {', '.join(AT)}); "
        "seed_offset (a whole number from 0) is optional"
    )


def _rule(where: str, entry: dict[Any, Any]) -> Rule:
    given = [key for key in RULES if key in entry]
    if len(given) != 1:
        raise UserError(f"{where}: needs exactly one rule of {', '.join(RULES)}; it has {', '.join(given) or 'none'}")
    (key,) = given
    value, (make, low, high, unit) = entry[key], RULES[key]
    if not is_number(value) or not low <= value < high:
        raise UserError(f"{where}.{key}={value}: must be in [{low:g}, {high:g}), {unit}")
    return make(float(value))


RULES: dict[str, tuple[Callable[[float], Rule], float, float, str]] = {
    "retains": (Retains, 0.01, 1.0, "the share of the comparator's gain that is kept"),
    "better_by": (Better, 0.0, 1.0, "in the score's unit (0.02 is two points)"),
    "level_within": (Level, 0.001, 1.0, "a share of the comparator's gain"),
    "margin": (WithinMargin, 0.0, 1.0, "in the score's unit (0.02 is two points)"),
}
"""Key -> the rule, the bounds of its number, and the number's unit. `margin` is of the files of earlier versions."""


def _metrics(where: str, tasks: Any) -> dict[str, str]:
    if isinstance(tasks, list) and all(isinstance(task, str) for task in tasks):
        return dict.fromkeys(tasks, "")
    if isinstance(tasks, dict) and all(isinstance(text, str) for item in tasks.items() for text in item):
        return dict(tasks)
    raise UserError(
        f"{where}.tasks={tasks}: must be a list of task names, or their metrics such as {{squad: f1}}; [] takes every "
        "task"
    )


def _with_minimum(where: str, plan: Plan, minimum: Any) -> Plan:
    """The plan without its looks below an earlier version's `minimum_seeds`."""
    if not _is_whole(minimum, LEAST_SEEDS):
        raise UserError(f"{where}.minimum_seeds={minimum}: must be {LEAST_SEEDS} or more")
    if minimum > plan.looks.seeds[-1]:
        # The seeds of a file without the key `seeds` are counted from 0, and go on.
        declared = plan.seeds if plan.seeds != tuple(range(len(plan.seeds))) else tuple(range(minimum))
        if len(declared) < minimum:
            raise UserError(f"{where}.minimum_seeds={minimum}: is more than the {len(declared)} seeds of `seeds`")
        return Plan(looks.planned((minimum,)), declared)
    return Plan(looks.from_minimum(plan.looks, minimum), plan.seeds)


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _are_whole(values: Any, least: int) -> bool:
    return isinstance(values, list) and bool(values) and all(_is_whole(value, least) for value in values)


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
        case WithinMargin(margin):
            return f"is worse by at most {margin:g}"
    raise TypeError(f"{rule} is no rule of a claim")

"""A paper's claims as comparisons, and what the runs say of each.

Answers, for every model and task that a claim concerns:

- supported: the interval of the paired difference (over seeds and examples) lies above -margin;
- contradicted: it lies below -margin;
- undecided: it holds -margin, runs are missing, or there are fewer than the minimum of seeds;
- uninformative: the comparator itself does not beat the base model, so anything would match it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from tiedlora import storage
from tiedlora.errors import UserError
from tiedlora.report import compare
from tiedlora.report.cells import Cell
from tiedlora.report.compare import Estimate, Scorebook
from tiedlora.statistics import crossed
from tiedlora.statistics.crossed import Spread
from tiedlora.statistics.intervals import Interval

AT = ("equal_rank", "equal_parameters")
TOLERANCE = 0.25
"""Parameters count as equal up to this share: LoRA's ranks are steps (SmolLM2-135M: r = 1 has 46,080, TABuv 41,328)."""
LEAST_SEEDS = 5
"""METHOD's protocol: no verdict under 5 seeds, whatever a claim's file says."""
ASSUMED = Spread(seeds=0.01, examples=0.3, rest=0.45)
"""Of a paired difference, before anything was measured: one point between seeds; of the examples a third change sides
between two methods, and a half between two seeds of one."""


@dataclass(frozen=True)
class Claim:
    """One comparison that a paper stands for."""

    paper: str
    name: str
    configuration: str
    rank: int
    comparator: str
    at: str
    margin: float
    tasks: tuple[str, ...]
    minimum_seeds: int


@dataclass
class Answer:
    """What the runs say of a claim for one model and task."""

    claim: Claim
    model: str
    task: str
    verdict: str
    reason: str
    difference: Estimate | None = None
    retained: Interval | None = None
    seeds: int = 0
    rows: int = 0
    decide: str = ""
    """The seeds and rows that would decide it."""


def read(path: Path) -> list[Claim]:
    """The claims of a YAML file.

    Raises:
        UserError: naming the key that is missing, unknown or impossible.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file; claims are YAML files such as claims/tied_lora.yaml")
    # Not resolved: a claim needs no interpolation, and what the environment holds is none of its business.
    text: Any = OmegaConf.to_container(storage.read_yaml(path))
    if not isinstance(text, dict) or not isinstance(text.get("claims"), list) or not text["claims"]:
        raise UserError(f"{path}: needs the keys paper and claims, a list of at least one")
    return [_claim(path, str(text.get("paper", "")), number, one) for number, one in enumerate(text["claims"])]


_KEYS = ("name", "method", "comparator", "margin", "tasks", "minimum_seeds")


def _claim(path: Path, paper: str, number: int, found: Any) -> Claim:
    where = f"{path}: claims[{number}]"
    if not isinstance(found, dict) or set(found) != set(_KEYS):
        given = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise UserError(f"{where}: needs exactly the keys {', '.join(_KEYS)}; it has {given}")
    method, comparator, tasks = found["method"], found["comparator"], found["tasks"]
    if not isinstance(method, dict) or set(method) != {"configuration", "rank"} or not _whole(method["rank"], 1):
        raise UserError(f"{where}.method: needs configuration and rank, a whole number from 1")
    if not isinstance(comparator, dict) or set(comparator) != {"configuration", "at"} or comparator["at"] not in AT:
        raise UserError(f"{where}.comparator: needs configuration and at, one of {', '.join(AT)}")
    margin = found["margin"]
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not 0 <= margin < 1:
        raise UserError(f"{where}.margin={margin}: must be in [0, 1), in the score's unit (0.02 is two points)")
    if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
        raise UserError(f"{where}.tasks={tasks}: must be a list of task names; [] takes every task")
    if not _whole(found["minimum_seeds"], LEAST_SEEDS):
        raise UserError(f"{where}.minimum_seeds={found['minimum_seeds']}: must be {LEAST_SEEDS} or more")
    return Claim(
        paper,
        str(found["name"]),
        str(method["configuration"]),
        method["rank"],
        str(comparator["configuration"]),
        comparator["at"],
        float(margin),
        tuple(tasks),
        found["minimum_seeds"],
    )


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def answers(claims: Iterable[Claim], cells: Sequence[Cell], book: Scorebook, split: str | None = None) -> list[Answer]:
    """Every claim's answer for every setting in which its method was run, and for tasks where it was not."""
    shown = compare.shown_split(cells)
    found = []
    for claim in claims:
        methods = [
            cell
            for cell in cells
            if (cell.label, cell.rank) == (claim.configuration, claim.rank)
            and (not claim.tasks or cell.task in claim.tasks)
        ]
        found += [_answer(claim, method, cells, split or shown[method.task], book) for method in methods]
        tasks = claim.tasks or tuple(sorted({cell.task for cell in cells}))
        for task in sorted(set(tasks) - {method.task for method in methods}):
            reason = f"{claim.configuration} r={claim.rank} was not run on it"
            found.append(Answer(claim, "", task, "undecided", reason, decide=_in_words(claim, ASSUMED, 1000)))
    return found


def _answer(claim: Claim, method: Cell, cells: Sequence[Cell], split: str, book: Scorebook) -> Answer:
    task = f"{method.task} ({method.variant})" if method.variant else method.task
    answer = Answer(claim, method.model, task, "undecided", "")
    comparator, answer.reason = _comparator(claim, method, cells)
    rows = [run.splits[split] for run in method.runs if split in run.splits]
    answer.rows = int(rows[0]["rows"]) if rows else 0
    answer.decide = _in_words(claim, ASSUMED, answer.rows or 1000)
    if comparator is None or not rows:
        answer.reason = answer.reason or f"not scored on {split}"
        return answer
    metric = next(iter(rows[0]["metrics"]))
    answer.difference, why = compare.difference(method, comparator, split, metric, book)
    if answer.difference is None:
        answer.reason = why
        return answer
    answer.retained = compare.retained(method, comparator, split, metric)
    seeds = {run.seed for run in method.runs if split in run.splits}
    answer.seeds = len(seeds & {run.seed for run in comparator.runs if split in run.splits})
    spread = _spread(method, comparator, split, metric, book, answer.seeds)
    of = f"{comparator.name}, {split}, {metric}"
    if floor := _at_the_floor(comparator, split, metric, book):
        answer.verdict, answer.reason = "uninformative", f"at the floor: {floor} ({of})"
        answer.decide = "a task, model or training on which the comparator beats the base"
        return answer
    if answer.seeds < claim.minimum_seeds:
        answer.reason = f"{answer.seeds} of at least {claim.minimum_seeds} seeds ({of})"
        answer.decide = _in_words(claim, spread, answer.rows)
        return answer
    interval = answer.difference.both or answer.difference.seeds
    assert interval is not None
    covers = "seeds and examples" if answer.difference.both else "seeds alone, on these examples"
    answer.verdict = verdict(interval, claim.margin)
    answer.reason = f"95 % over {covers} ({of})"
    measured = abs(interval.value + claim.margin)
    answer.decide = _in_words(claim, spread, answer.rows, measured) if answer.verdict == "undecided" else ""
    return answer


def verdict(interval: Interval, margin: float) -> str:
    """supported, contradicted or undecided: where the interval of the difference lies beside -margin."""
    if interval.low > -margin:
        return "supported"
    return "contradicted" if interval.high < -margin else "undecided"


def _comparator(claim: Claim, method: Cell, cells: Sequence[Cell]) -> tuple[Cell | None, str]:
    same = [cell for cell in cells if cell.setting == method.setting and cell.label == claim.comparator]
    if claim.at == "equal_rank":
        found = [cell for cell in same if cell.rank == method.rank]
        return (
            (found[0], "") if found else (None, f"{claim.comparator} r={method.rank} was not run in the same setting")
        )
    if not same:
        return None, f"{claim.comparator} was not run in the same setting"
    nearest = min(same, key=lambda cell: abs(math.log(cell.params / method.params)))
    if abs(nearest.params / method.params - 1) > TOLERANCE:
        wanted = max(1, round(nearest.rank * method.params / nearest.params))
        return None, (
            f"no {claim.comparator} of about {method.params:,} parameters was run (nearest: r={nearest.rank} with "
            f"{nearest.params:,}); run rank.r={wanted}"
        )
    return nearest, ""


def _at_the_floor(comparator: Cell, split: str, metric: str, book: Scorebook) -> str:
    """Why the comparator does not beat the base, or nothing if it does."""
    gain = compare.gain(comparator, split, metric, book)
    if gain is None:
        return ""
    # Under 5 seeds an interval over seeds says little; that over examples is then the honest one to ask.
    interval = (gain.both if len(comparator.runs) >= LEAST_SEEDS else gain.examples) or gain.widest()
    if interval is None or interval.low > 0:
        return ""
    low, high = 100 * interval.low, 100 * interval.high
    return f"{comparator.name} gains {100 * interval.value:+.1f} [{low:+.1f}, {high:+.1f}] over the base"


def _spread(method: Cell, comparator: Cell, split: str, metric: str, book: Scorebook, seeds: int) -> Spread:
    """Measured on the runs at hand where there are two seeds; else assumed."""
    if seeds < 2:
        return ASSUMED
    try:
        return crossed.spread(compare.paired_table(method, comparator, split, metric, book))
    except UserError:
        return ASSUMED


def _in_words(claim: Claim, spread: Spread, rows: int, distance: float | None = None) -> str:
    """The seeds and rows that decide a claim: at the measured distance from the margin, or at a difference of 0."""
    where = "at the difference measured" if distance is not None else "if the true difference is 0"
    if distance is None and claim.margin == 0:
        distance, where = 0.02, "if the true difference is 2 points"
    found = crossed.enough(claim.margin if distance is None else distance, spread, rows, claim.minimum_seeds)
    known = ", assuming a usual spread" if spread is ASSUMED else ""
    if found is None:
        most = f"{crossed.MOST_SEEDS} seeds of {crossed.MOST_ROWS:,} rows"
        return f"more than {most} ({where}{known})"
    return f"{found[0]} seeds of {found[1]:,} rows ({where}, found in 4 of 5 tries{known})"


def plan(claims: Iterable[Claim], seeds: int, rows: int, spread: Spread = ASSUMED) -> list[str]:
    """What a sweep of so many seeds and test rows can decide, a line a claim: to be read before money is spent.

    Args:
        spread: of the paired difference, from earlier runs (statistics.spread) where there are any.
    """
    lines = []
    for claim in claims:
        goal = claim.margin or 0.02
        needed = crossed.enough(goal, spread, rows, claim.minimum_seeds)
        enough = needed is not None and needed[1] <= rows and needed[0] <= seeds
        says = "is enough to decide" if enough else "will probably not decide"
        wanted = "" if enough else f"; needs {_in_words(claim, spread, rows)}"
        lines.append(
            f"{seeds} seeds of {rows:,} rows {says}: {claim.name} (margin {100 * claim.margin:g} points){wanted}"
        )
    return lines

"""A paper's claims as comparisons, read from a YAML file, and the number of seeds and rows that would decide them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from tiedlora import storage
from tiedlora.errors import UserError
from tiedlora.statistics import crossed
from tiedlora.statistics.crossed import Spread

AT = ("equal_rank", "equal_parameters")
LEAST_SEEDS = 5
"""With fewer seeds there is never a verdict: a claims file may only ask for more (docs/results.md, Claims)."""
ASSUMED = Spread(seeds=0.01, examples=0.3, rest=0.45)
"""The spread of a paired difference that is assumed before anything was measured: one point between seeds; a third of
the examples differ between two methods, and a half between two seeds of one method."""
PLANNED_DIFFERENCE = 0.02
"""A claim without a margin is planned for a true difference of two points."""


@dataclass(frozen=True)
class Claim:
    """One comparison that a paper claims."""

    paper: str
    name: str
    configuration: str
    rank: int
    comparator: str
    at: str
    """equal_rank or equal_parameters."""
    margin: float
    tasks: tuple[str, ...]
    """The tasks of the claim; empty means every task."""
    minimum_seeds: int


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
    return [_claim(path, str(text.get("paper", "")), number, entry) for number, entry in enumerate(text["claims"])]


_KEYS = ("name", "method", "comparator", "margin", "tasks", "minimum_seeds")


def _claim(path: Path, paper: str, number: int, entry: Any) -> Claim:
    where = f"{path}: claims[{number}]"
    if not isinstance(entry, dict) or set(entry) != set(_KEYS):
        given = ", ".join(map(str, entry)) if isinstance(entry, dict) else type(entry).__name__
        raise UserError(f"{where}: needs exactly the keys {', '.join(_KEYS)}; it has {given}")
    method, comparator, tasks = entry["method"], entry["comparator"], entry["tasks"]
    if not isinstance(method, dict) or set(method) != {"configuration", "rank"} or not _is_whole(method["rank"], 1):
        raise UserError(f"{where}.method: needs configuration and rank, a whole number from 1")
    if not isinstance(comparator, dict) or set(comparator) != {"configuration", "at"} or comparator["at"] not in AT:
        raise UserError(f"{where}.comparator: needs configuration and at, one of {', '.join(AT)}")
    margin = entry["margin"]
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not 0 <= margin < 1:
        raise UserError(f"{where}.margin={margin}: must be in [0, 1), in the score's unit (0.02 is two points)")
    if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
        raise UserError(f"{where}.tasks={tasks}: must be a list of task names; [] takes every task")
    if not _is_whole(entry["minimum_seeds"], LEAST_SEEDS):
        raise UserError(f"{where}.minimum_seeds={entry['minimum_seeds']}: must be {LEAST_SEEDS} or more")
    return Claim(
        paper,
        str(entry["name"]),
        str(method["configuration"]),
        method["rank"],
        str(comparator["configuration"]),
        comparator["at"],
        float(margin),
        tuple(tasks),
        entry["minimum_seeds"],
    )


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def needed_in_words(claim: Claim, spread: Spread, rows: int, distance: float | None = None) -> str:
    """The seeds and rows that would decide a claim, at the measured distance from the margin or a difference of 0."""
    where = "at the difference measured" if distance is not None else "if the true difference is 0"
    if distance is None and claim.margin == 0:
        distance, where = PLANNED_DIFFERENCE, "if the true difference is 2 points"
    distance = claim.margin if distance is None else distance
    needed = crossed.needed_seeds_and_rows(distance, spread, rows, claim.minimum_seeds)
    known = ", assuming a usual spread" if spread is ASSUMED else ""
    if needed is None:
        most = f"{crossed.MOST_SEEDS} seeds of {crossed.MOST_ROWS:,} rows"
        return f"more than {most} ({where}{known})"
    return f"{needed[0]} seeds of {needed[1]:,} rows ({where}, found in 4 of 5 tries{known})"


def plan(claims: Iterable[Claim], seeds: int, rows: int, spread: Spread = ASSUMED) -> list[str]:
    """Whether a sweep with so many seeds and test rows can decide the claims, before it is run. One line per claim.

    Args:
        spread: the spread of the paired difference, from earlier runs (crossed.measured_spread) if there are any.
    """
    lines = []
    for claim in claims:
        distance = claim.margin or PLANNED_DIFFERENCE
        needed = crossed.needed_seeds_and_rows(distance, spread, rows, claim.minimum_seeds)
        is_enough = needed is not None and needed[1] <= rows and needed[0] <= seeds
        outlook = "is enough to decide" if is_enough else "will probably not decide"
        rest = "" if is_enough else f"; needs {needed_in_words(claim, spread, rows)}"
        lines.append(
            f"{seeds} seeds of {rows:,} rows {outlook}: {claim.name} (margin {100 * claim.margin:g} points){rest}"
        )
    return lines

"""The status of a sweep's cells, read from their folders: rows, counts, time left, the table, and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

from tiedlora.config.sizes import trainable_params
from tiedlora.errors import UserError
from tiedlora.records.loss_metrics import is_loss
from tiedlora.records.rows import read_metrics
from tiedlora.records.run_folder import State
from tiedlora.records.selection import SELECTION_FILE, Selection, read_selection
from tiedlora.scoring.passes import lacks_scores
from tiedlora.sweeps.cells import Sweep, SweepCell, rate_groups
from tiedlora.sweeps.control import SweepControl
from tiedlora.text import aligned, clock, visible

KEYS_WITH_COLUMN = ("model", "task", "tying", "rank", "rank.r", "train.lr", "seed")
"""Keys whose values have their own columns in the table."""
COLUMNS = ("model", "task", "configuration", "rank", "trainable", "lr", "seed")
RESULT_COLUMNS = ("state", "step", "score", "val. loss", "seconds")


@dataclass(frozen=True)
class CellStatus:
    """One cell: its state, its scores and time so far, and why it failed."""

    cell: SweepCell
    state: State
    metric: str | None = None
    """The task's first metric on validation; None if validation is not scored."""
    score: float | None = None
    """The value of the metric, a fraction of 1; for a loss, nats."""
    validation_loss: float | None = None
    """The last one so far."""
    error: str | None = None
    """Why it failed, in one line."""
    seconds: float = 0.0
    """The time so far, of training and of scoring the splits that the sweep scores."""
    step: int = 0
    """The last logged step."""
    is_needed: bool = True
    """Whether the sweep will run it, if it is not done. A search that has chosen a rate needs no other."""

    @property
    def run_id(self) -> str:
        return self.cell.run_id

    @property
    def is_open(self) -> bool:
        """Whether the sweep still has work to do on it."""
        return self.is_needed and self.state not in (State.DONE, State.FAILED, State.DROPPED)

    def to_json(self) -> dict[str, str | int | float | list[str] | None]:
        """The JSON object, with one level of keys."""
        return {
            "run_id": self.run_id,
            "overrides": list(self.cell.overrides),
            **asdict(self.cell.name),
            "trainable": trainable_params(self.cell.config) or 0,
            "state": self.state,
            **{name: getattr(self, name) for name in ("metric", "score", "validation_loss", "error", "seconds")},
        }


class Searched:
    """What a search of learning rates has decided about the cells of its sweep."""

    def __init__(self, selected: Selection, cells: Iterable[SweepCell]) -> None:
        self.selection = selected
        self.chosen = {run_id for choice in selected.choices for run_id in choice.run_ids}
        self.rungs = {step for search in selected.searches for step in search.rungs}
        without = {s.group for s in selected.searches if any(made.action == "none" for made in s.decisions)}
        self.is_over = len(selected.choices) + len(without) == len(selected.searches)
        """Whether every search has chosen a rate, or found that all diverge."""
        self.unneeded: set[str] = set()
        """The cells that the searches have decided without."""
        for group in rate_groups(cells).values():
            ids = {cell.run_id for cell in group}
            if ids & self.chosen or group[0].name.group in without:
                self.unneeded |= ids - self.chosen


def read_search(folder: Path, cells: Iterable[SweepCell]) -> Searched | None:
    """What a search has decided in the sweep of this folder; None if there is no search.

    Raises:
        UserError: selection.json is damaged.
    """
    file = folder / SELECTION_FILE
    selected = read_selection(file) if file.is_file() else None
    return Searched(selected, cells) if selected is not None and selected.searches else None


def statuses(cells: Iterable[SweepCell], control: SweepControl, searched: Searched | None = None) -> list[CellStatus]:
    """The status of every cell, in their order. A run whose result.json is damaged has failed.

    Args:
        searched: what the sweep's search has decided; None for a sweep that runs all cells.
    """
    return [status_of(cell, control, searched) for cell in cells]


def status_of(cell: SweepCell, control: SweepControl, searched: Searched | None = None) -> CellStatus:
    """As `statuses`, for one cell."""
    folder, is_chosen = cell.folder, searched is None or cell.run_id in searched.chosen
    try:
        record = folder.record()
    except UserError as damage:
        return CellStatus(cell, State.FAILED, error=visible(str(damage)))
    # Of a search, only the chosen runs are scored. The others are done without.
    is_scored = record is None or not is_chosen or not lacks_scores(cell.config.score, record)
    pause = cell.config.train.pause_after
    if searched and not folder.pruned_file.exists() and (step := folder.checkpoint_step()) in searched.rungs:
        pause = step
    state = folder.state(is_scored, pause)
    is_needed = searched is None or (cell.run_id not in searched.unneeded and state != State.PRUNED)
    if state not in (State.DONE, State.RUNNING) and control.is_dropped(cell.run_id):
        state = State.DROPPED
    if not is_needed and state in (State.MISSING, State.INTERRUPTED, State.PAUSED):
        state = State.UNNEEDED
    error = folder.error() if state == State.FAILED else None
    if record is None:
        rows = read_metrics(folder.metrics_file) if folder.metrics_file.is_file() else []
        step = max((row.step for row in rows), default=0)
        losses = [loss for row in rows if (loss := row.values.get("validation/loss")) is not None]
        # The logged time of training, which only grows.
        seconds = max((row.values.get("train/seconds", 0.0) for row in rows), default=0.0)
        return CellStatus(cell, state, None, None, losses[-1] if losses else None, error, seconds, step, is_needed)
    metric = score = None
    if "validation" in record.scores:
        validation = record.scores["validation"]
        metric, score = validation.first_metric, validation.metrics[validation.first_metric].value
    # `select` may have scored test later. The other cells of the sweep will not need that time.
    asked = [record.scores[split] for split in cell.config.score.splits if split in record.scores]
    seconds = record.training.seconds + sum(split.seconds + (split.loss_seconds or 0.0) for split in asked)
    loss, step = record.training.validation_loss_last, record.training.steps
    return CellStatus(cell, state, metric, score, loss, error, seconds, step, is_needed)


def time_left(cells: Sequence[CellStatus]) -> dict[str, float]:
    """Run id -> the seconds that an open cell still needs.

    A cell is expected to need the mean time of the done cells of its model and task, or else of all done cells. Before
    one is done, it is its own speed so far. A cell about which nothing is known is taken as the mean of the others.
    """
    times: dict[tuple[str, ...], list[float]] = {}
    for cell in cells:
        if cell.state == State.DONE:
            for key in ((cell.cell.name.model, cell.cell.name.task), ()):
                times.setdefault(key, []).append(cell.seconds)
    left = {}
    still_open = [cell for cell in cells if cell.is_open]
    for cell in still_open:
        if alike := times.get((cell.cell.name.model, cell.cell.name.task), times.get(())):
            left[cell.run_id] = max(0.0, mean(alike) - cell.seconds)
        elif cell.step and cell.seconds:
            steps_left = max(0, cell.cell.config.train.steps - cell.step)
            left[cell.run_id] = steps_left * cell.seconds / cell.step
    if left:
        typical = mean(left.values())
        left.update({cell.run_id: typical for cell in still_open if cell.run_id not in left})
    return left


def counts(cells: Iterable[CellStatus]) -> dict[str, int]:
    """How many cells are in each state."""
    states = [cell.state for cell in cells]
    return {state.value: states.count(state) for state in State}


def summary_line(sweep_id: str, cells: Sequence[CellStatus]) -> str:
    """One line: number of cells, states, time."""
    states = ", ".join(f"{count} {state}" for state, count in counts(cells).items() if count)
    text = f"{sweep_id}: {len(cells)} cells: {states}; {clock(sum(cell.seconds for cell in cells))} so far"
    left = sum(time_left(cells).values())
    return text if not left else f"{text}, about {clock(left)} left for one process"


def table(cells: Sequence[CellStatus]) -> str:
    """Every cell with its names, state, score and time."""
    return aligned(rows(cells))


def rows(cells: Sequence[CellStatus]) -> list[list[str]]:
    """As `table`, cell by cell. The first row is the head."""
    extra = _varying_keys(cells)
    lines = [[*COLUMNS, *extra, *RESULT_COLUMNS]]
    for cell in cells:
        name, values = cell.cell.name, dict(override.split("=", 1) for override in cell.cell.overrides)
        step = f"{cell.step}/{cell.cell.config.train.steps}" if cell.step else ""
        # The first metric in per cent. A loss is in nats, and has its own column.
        score = "" if cell.score is None or is_loss(cell.metric or "") else f"{100 * cell.score:.1f} %"
        loss = "" if cell.validation_loss is None else f"{cell.validation_loss:.3f}"
        lines.append(
            [name.model, name.task, name.configuration, str(name.rank)]
            + [f"{trainable_params(cell.cell.config) or 0:,}", f"{name.lr:g}", str(name.seed)]
            + [values.get(key, "") for key in extra]
            + [cell.state, step, score, loss, f"{cell.seconds:.0f}"]
        )
    return lines


def _varying_keys(cells: Iterable[CellStatus]) -> list[str]:
    """The swept keys without their own column."""
    values: dict[str, set[str]] = {}
    for cell in cells:
        for override in cell.cell.overrides:
            key, value = override.split("=", 1)
            values.setdefault(key, set()).add(value)
    return [key for key, different in values.items() if len(different) > 1 and key not in KEYS_WITH_COLUMN]


def line(cell: CellStatus) -> str:
    """A cell in one line: state, seconds so far, run, rate, and why it failed."""
    words = f"{cell.state:<12} {cell.seconds:>6.0f} s  {cell.run_id}  lr={cell.cell.name.lr:g}  {cell.error or ''}"
    return words.rstrip()


def unfinished_lines(cells: Iterable[CellStatus]) -> list[str]:
    """The line of each cell that is not done and is needed."""
    return [f"  {line(cell)}" for cell in cells if cell.state != State.DONE and cell.is_needed]


def to_json(sweep: Sweep, cells: Sequence[CellStatus], forecast: Sequence[Mapping[str, object]] | None = None) -> str:
    """The sweep with its cells as plain data, for programs.

    Args:
        forecast: the cost of each model and task, for a plan.
    """
    left = time_left(cells)
    has_estimate = left or any(cell.state == State.DONE for cell in cells)
    tree = {
        "sweep": sweep.id,
        "counts": counts(cells),
        "seconds_left": sum(left.values()) if has_estimate else None,
        **({} if forecast is None else {"forecast": list(forecast)}),
        "cells": [cell.to_json() for cell in cells],
    }
    return json.dumps(tree, indent=2, ensure_ascii=False)

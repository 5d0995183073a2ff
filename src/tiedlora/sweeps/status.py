"""The status of a sweep's cells, read from their folders: rows, counts, time left, the table, and JSON."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean

from tiedlora import storage
from tiedlora.errors import LONGEST_MESSAGE
from tiedlora.records.rows import read_metrics
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.run_record import RunRecord
from tiedlora.sweeps.cells import STATES, CellParameters, Sweep, SweepCell
from tiedlora.sweeps.control import SweepControl
from tiedlora.text import aligned, clock, visible

KEYS_WITH_COLUMN = ("model", "task", "tying", "rank", "rank.r", "train.lr", "seed")
"""Keys whose values have their own columns in the table."""
COLUMNS = ("model", "task", "configuration", "rank", "trainable", "lr", "seed")
RESULT_COLUMNS = ("state", "score", "val. loss", "seconds")


@dataclass(frozen=True)
class CellStatus:
    """One cell: its parameters, its state, its scores so far, and why it failed."""

    run_id: str
    overrides: tuple[str, ...]
    parameters: CellParameters
    state: str
    """One of cells.STATES."""
    metric: str | None
    """The task's first metric on validation; None if validation is not scored."""
    score: float | None
    """The value of the metric, a fraction of 1."""
    validation_loss: float | None
    error: str | None
    """The last line of a failed cell's traceback."""
    seconds: float
    """The time so far, of training and of scoring the splits that the sweep scores."""
    is_needed: bool = True
    """Whether the sweep will run it, if it is not done. A search that has chosen a rate needs no other."""

    def to_json(self) -> dict[str, str | int | float | list[str] | None]:
        """The JSON object, with one level of keys."""
        return {
            "run_id": self.run_id,
            "overrides": list(self.overrides),
            **asdict(self.parameters),
            "state": self.state,
            "metric": self.metric,
            "score": self.score,
            "validation_loss": self.validation_loss,
            "error": self.error,
            "seconds": self.seconds,
        }


def statuses(sweep: Sweep, unneeded: Container[str] = ()) -> list[CellStatus]:
    """The status of every cell, in the sweep's order.

    Args:
        unneeded: the ids of the cells that a search has decided without.

    Raises:
        UserError: a cell's result.json is damaged.
    """
    control = sweep.control
    return [_status(cell, control, cell.run_id not in unneeded) for cell in sweep.cells]


def _status(cell: SweepCell, control: SweepControl, is_needed: bool) -> CellStatus:
    state, record = cell.state(), cell.folder.record()
    if state not in ("done", "running") and control.is_dropped(cell.run_id):
        state = "dropped"
    if not is_needed and state in ("missing", "interrupted"):
        state = "unneeded"
    metric = score = None
    if record is not None and "validation" in record.scores:
        validation = record.scores["validation"]
        metric, score = validation.first_metric, validation.metrics[validation.first_metric].value
    return CellStatus(
        run_id=cell.run_id,
        overrides=cell.overrides,
        parameters=cell.parameters(),
        state=state,
        metric=metric,
        score=score,
        validation_loss=None if record is None else record.training.validation_loss_last,
        error=last_error(cell.folder) if state == "failed" else None,
        seconds=_seconds(cell, record),
        is_needed=is_needed,
    )


def _seconds(cell: SweepCell, record: RunRecord | None) -> float:
    if record is None:
        logged = (row.values.get("train/seconds") for row in reversed(read_metrics(cell.folder.metrics_file)))
        return next((seconds for seconds in logged if seconds is not None), 0.0)
    # `select` may have scored test later. The other cells of the sweep will not need that time.
    asked = [record.scores[split].seconds for split in cell.config.score.splits if split in record.scores]
    return record.training.seconds + sum(asked)


def last_error(folder: RunFolder) -> str:
    """The last line of a failed run's traceback."""
    lines = storage.read_bytes(folder.error_file).decode("utf-8", "replace").strip().splitlines()
    return visible(lines[-1].removeprefix("tiedlora.errors.")[:LONGEST_MESSAGE]) if lines else "no message"


def seconds_left(cells: Sequence[CellStatus]) -> float | None:
    """An estimate of the time that the unfinished cells still need, one after the other, in seconds.

    A cell is expected to need the mean time of the finished cells of its model and task. If there are none, it is the
    mean of all finished cells. None if nothing is finished.
    """
    done = [cell for cell in cells if cell.state == "done"]
    if not done:
        return None
    by_model_and_task: dict[tuple[str, str], list[float]] = {}
    for cell in done:
        by_model_and_task.setdefault((cell.parameters.model, cell.parameters.task), []).append(cell.seconds)
    all_seconds = [cell.seconds for cell in done]
    left = 0.0
    for cell in cells:
        if cell.is_needed and cell.state not in ("done", "failed", "dropped"):
            alike = by_model_and_task.get((cell.parameters.model, cell.parameters.task), all_seconds)
            left += max(0.0, mean(alike) - cell.seconds)
    return left


def counts(cells: Iterable[CellStatus]) -> dict[str, int]:
    """How many cells are in each state."""
    states = [cell.state for cell in cells]
    return {state: states.count(state) for state in STATES}


def summary_line(sweep: Sweep, cells: Sequence[CellStatus]) -> str:
    """One line: number of cells, states, time."""
    states = ", ".join(f"{count} {state}" for state, count in counts(cells).items() if count)
    line = f"{sweep.id}: {len(cells)} cells: {states}; {clock(sum(cell.seconds for cell in cells))} so far"
    left = seconds_left(cells)
    return line if not left else f"{line}, about {clock(left)} left for one process"


def table(cells: Sequence[CellStatus]) -> str:
    """Every cell with its parameters, state, score and time."""
    extra = _varying_keys(cells)
    lines = [[*COLUMNS, *extra, *RESULT_COLUMNS]]
    for cell in cells:
        named, values = cell.parameters, dict(override.split("=", 1) for override in cell.overrides)
        score = "" if cell.score is None else f"{100 * cell.score:.1f} %"
        loss = "" if cell.validation_loss is None else f"{cell.validation_loss:.3f}"
        lines.append(
            [named.model, named.task, named.configuration, str(named.rank)]
            + [f"{named.trainable:,}", f"{named.lr:g}", str(named.seed)]
            + [values.get(key, "") for key in extra]
            + [cell.state, score, loss, f"{cell.seconds:.0f}"]
        )
    return aligned(lines)


def _varying_keys(cells: Iterable[CellStatus]) -> list[str]:
    """The swept keys without their own column."""
    values: dict[str, set[str]] = {}
    for cell in cells:
        for override in cell.overrides:
            key, value = override.split("=", 1)
            values.setdefault(key, set()).add(value)
    return [key for key, different in values.items() if len(different) > 1 and key not in KEYS_WITH_COLUMN]


def unfinished_lines(cells: Iterable[CellStatus]) -> list[str]:
    """A line for each cell that is not done and is needed: state, seconds so far, run, and why it failed."""
    return [
        f"  {cell.state:<12} {cell.seconds:>6.0f} s  {cell.run_id}  {cell.error or ''}".rstrip()
        for cell in cells
        if cell.state != "done" and cell.is_needed
    ]


def to_json(sweep: Sweep, cells: Sequence[CellStatus], forecast: Sequence[Mapping[str, object]] | None = None) -> str:
    """The sweep with its cells as plain data, for programs.

    Args:
        forecast: the cost of each model and task, for a plan.
    """
    tree = {
        "sweep": sweep.id,
        "counts": counts(cells),
        "seconds_left": seconds_left(cells),
        **({} if forecast is None else {"forecast": list(forecast)}),
        "cells": [cell.to_json() for cell in cells],
    }
    return json.dumps(tree, indent=2, ensure_ascii=False)

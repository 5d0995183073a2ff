"""A sweep as another process sees it: every cell's state, loss and time left, failures, and what the sweeper decided.

It reads only files of the sweep's folder and of its cells' folders. It takes no lock and writes nothing, so it cannot
disturb the sweep.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from tiedlora.errors import UserError
from tiedlora.records.loss_metrics import is_loss
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.run_record import RunRecord, read_record
from tiedlora.records.selection import SELECTION_FILE, Selection, read_selection
from tiedlora.scoring.passes import missing_passes
from tiedlora.sweeps.cells import STATES
from tiedlora.sweeps.control import SweepControl
from tiedlora.sweeps.decided import decided, last_line, short, verdicts
from tiedlora.sweeps.lock_probe import is_locked, locked_inodes
from tiedlora.sweeps.watched_cells import Curve, WatchedCell, frozen_cells, telling_apart
from tiedlora.text import visible

FRESH_SECONDS = 60.0
"""A cell whose files changed so recently counts as running, where its lock cannot be seen: on another machine, or while
it loads its model."""


@dataclass(frozen=True)
class CellView:
    """One cell as it is now."""

    cell: WatchedCell
    state: str
    """One of cells.STATES."""
    step: int
    """The last logged step."""
    loss: float | None
    """The newest validation loss."""
    behind: float | None
    """This loss minus the lowest one at the same step among the cells that it is compared with; 0 if it is the lowest.
    None if no other cell has a loss at this step."""
    score: float | None
    """The first metric on validation, a fraction of 1; None for a loss."""
    seconds: float
    """The time so far, of training and scoring."""
    seconds_left: float | None
    """None if the cell needs no more, or if nothing says how long it takes."""
    error: str
    """The last line of a failed cell's traceback."""
    apart: str
    """The values that tell it from cells with the same names."""

    @property
    def is_scoring(self) -> bool:
        """Whether it runs and all its steps are done."""
        return self.state == "running" and self.step >= self.cell.steps


@dataclass(frozen=True)
class SweepView:
    """A sweep as it is now."""

    id: str
    cells: list[CellView]
    counts: dict[str, int]
    """State -> number of cells, for every state."""
    compares_rates: bool
    """Whether losses are compared among the rates of one configuration; otherwise among cells of a model and task."""
    seconds_left: float | None
    """All unfinished cells, as many at once as now; None if it is not known."""
    is_most: bool
    """Whether this is an upper limit, because a search may stop cells."""
    decisions: list[str]
    """What the sweeper decided and why, in its order."""
    stopped_by: str
    """The failed cell that stopped the sweep (fail_fast), or empty."""
    ended: bool
    """Whether nothing is left to do."""
    quiet_seconds: float
    """How long no file of an unfinished sweep has changed."""

    def failed(self) -> list[CellView]:
        """The cells that failed."""
        return [cell for cell in self.cells if cell.state == "failed"]


class WatchedSweep:
    """Looks at a sweep again and again. What cannot change any more is read once.

    Args:
        folder: the sweep's folder, outputs/sweeps/SWEEP.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._cells: dict[str, WatchedCell] = {}
        self._curves: dict[str, Curve] = {}
        self._records: dict[str, tuple[tuple[int, int], RunRecord | str]] = {}
        self._locked_before: set[str] = set()
        self._searches = False

    def look(self) -> SweepView:
        """The sweep as it is now.

        Raises:
            UserError: the sweep's own files are damaged. A damaged run is a failed cell.
        """
        self._cells = frozen_cells(self.folder, self._cells)
        selection, inodes, now = self._selection(), locked_inodes(), time.time()
        self._searches = bool(selection and selection.searches)
        rungs = {step for search in selection.searches for step in search.rungs} if selection else set()
        control = SweepControl(self.folder)
        records = {run_id: self._record(cell.folder) for run_id, cell in self._cells.items()}
        states, changed = {}, 0.0
        for run_id, cell in self._cells.items():
            states[run_id] = self._state(cell, records[run_id], control, inodes, rungs, now)
            if states[run_id] != "missing":
                self._curves.setdefault(run_id, Curve()).read(cell.folder.metrics_file)
                changed = max(changed, _last_change(cell.folder))
        seconds = {run_id: self._seconds(run_id, records[run_id]) for run_id in self._cells}
        expected = self._expected(states, seconds)
        lowest, compares_rates = self._lowest()
        apart = telling_apart(self._cells.values())
        views = []
        for run_id, cell in self._cells.items():
            curve, record = self._curves.get(run_id, Curve()), records[run_id]
            step = max(curve.losses, default=None)
            loss = None if step is None else curve.losses[step]
            # Before the first step, all cells are the base model.
            rivals = {} if not step else lowest[self._rivals(cell, compares_rates)].get(step, {})
            view = CellView(
                cell,
                states[run_id],
                curve.step,
                loss,
                loss - min(rivals.values()) if loss is not None and len(rivals) > 1 else None,
                _score(record),
                seconds[run_id],
                _left(cell, states[run_id], curve, seconds[run_id], expected),
                self._error(cell, states[run_id], record),
                apart[run_id],
            )
            views.append(view)
        open_cells = _open_cells(views, selection)
        counts = {state: sum(view.state == state for view in views) for state in STATES}
        decisions = decided(selection) + verdicts(self.folder)
        first_failure = control.first_failure()
        return SweepView(
            visible(self.folder.name),
            views,
            counts,
            compares_rates,
            _all_left(open_cells, counts["running"]),
            bool(selection and selection.searches),
            decisions,
            short(first_failure or ""),
            self._ended(open_cells, selection, counts["running"], first_failure),
            max(0.0, now - max(changed, _mtime(self.folder), _mtime(self.folder / SELECTION_FILE))),
        )

    def _selection(self) -> Selection | None:
        path = self.folder / SELECTION_FILE
        return read_selection(path) if path.is_file() else None

    def _record(self, folder: RunFolder) -> RunRecord | str | None:
        """The record of a finished run, what is wrong with it, or None without one."""
        try:
            status = folder.result_file.stat()
        except OSError:
            return None
        version, run_id = (status.st_ino, status.st_size), folder.path.name
        if run_id not in self._records or self._records[run_id][0] != version:
            try:
                self._records[run_id] = version, read_record(folder.result_file)
            except UserError as error:
                self._records[run_id] = version, str(error)
        return self._records[run_id][1]

    def _state(
        self,
        cell: WatchedCell,
        record: RunRecord | str | None,
        control: SweepControl,
        inodes: set[int],
        rungs: set[int],
        now: float,
    ) -> str:
        """As SweepCell.state, from what can be seen without the lock."""
        folder = cell.folder
        # A search scores only the chosen runs. The others are done without.
        if isinstance(record, RunRecord) and (self._searches or not _lacks_scores(cell, record)):
            return "done"
        if is_locked(folder.path / ".lock", inodes):
            self._locked_before.add(cell.run_id)
            return "running"
        if isinstance(record, str):
            return "failed"
        if folder.error_file.exists():
            # An earlier error stays while the run loads again.
            loads = control.has_started(cell.run_id) and not control.is_new(folder.error_file)
            return "running" if loads else "failed"
        if control.is_dropped(cell.run_id):
            return "dropped"
        if not folder.path.exists():
            return "missing"
        if folder.pruned_file.exists():
            return "pruned"
        if folder.checkpoint_step() in rungs:
            return "paused"
        # A lock that was seen here has been released, so a fresh file is that of a stopped run.
        fresh = cell.run_id not in self._locked_before and now - _last_change(folder) < FRESH_SECONDS
        return "running" if fresh else "interrupted"

    def _seconds(self, run_id: str, record: RunRecord | str | None) -> float:
        if not isinstance(record, RunRecord):
            return self._curves.get(run_id, Curve()).seconds
        asked = [record.scores[split] for split in self._cells[run_id].splits if split in record.scores]
        return record.training.seconds + sum(split.seconds + (split.loss_seconds or 0.0) for split in asked)

    def _expected(self, states: dict[str, str], seconds: dict[str, float]) -> dict[tuple[str, ...], float]:
        """(model, task) -> mean seconds of a finished cell; () -> that of all."""
        samples: dict[tuple[str, ...], list[float]] = {}
        for run_id, cell in self._cells.items():
            if states[run_id] == "done":
                for key in ((cell.model, cell.task), ()):
                    samples.setdefault(key, []).append(seconds[run_id])
        return {key: mean(values) for key, values in samples.items()}

    def _lowest(self) -> tuple[dict[str, dict[int, dict[str, float]]], bool]:
        """Group of rivals -> step -> run id -> validation loss; and whether rates are rivals."""
        rates: dict[str, set[float]] = {}
        for cell in self._cells.values():
            rates.setdefault(cell.group, set()).add(cell.lr)
        compares_rates = any(len(of_group) > 1 for of_group in rates.values())
        losses: dict[str, dict[int, dict[str, float]]] = {}
        for run_id, cell in self._cells.items():
            of_rivals = losses.setdefault(self._rivals(cell, compares_rates), {})
            for step, loss in self._curves.get(run_id, Curve()).losses.items():
                of_rivals.setdefault(step, {})[run_id] = loss
        return losses, compares_rates

    @staticmethod
    def _rivals(cell: WatchedCell, compares_rates: bool) -> str:
        return cell.group if compares_rates else f"{cell.model}\n{cell.task}"

    def _error(self, cell: WatchedCell, state: str, record: RunRecord | str | None) -> str:
        if state != "failed":
            return ""
        return short(record) if isinstance(record, str) else last_line(cell.folder.error_file)

    def _ended(
        self, open_cells: Sequence[CellView], selection: Selection | None, running: int, first_failure: str | None
    ) -> bool:
        if running or (open_cells and first_failure is None):
            return False
        if selection is None or not selection.searches:
            return True
        return len(selection.choices) + len(_without_rate(selection)) == len(selection.searches)


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _last_change(folder: RunFolder) -> float:
    return max(map(_mtime, (folder.path, folder.metrics_file, folder.checkpoints, folder.path / "predictions")))


def _score(record: RunRecord | str | None) -> float | None:
    if not isinstance(record, RunRecord) or "validation" not in record.scores:
        return None
    scores = record.scores["validation"]
    return None if is_loss(scores.first_metric) else scores.metrics[scores.first_metric].value


def _left(
    cell: WatchedCell, state: str, curve: Curve, seconds: float, expected: dict[tuple[str, ...], float]
) -> float | None:
    """The seconds that a cell still needs: by the finished cells of its model and task, or else by its own speed."""
    if state in ("done", "failed", "dropped", "pruned"):
        return None
    mean_seconds = expected.get((cell.model, cell.task), expected.get(()))
    if mean_seconds is not None:
        return max(0.0, mean_seconds - seconds)
    if curve.step and curve.seconds and curve.step < cell.steps:
        return (cell.steps - curve.step) * curve.seconds / curve.step
    return None


def _open_cells(views: Iterable[CellView], selection: Selection | None) -> list[CellView]:
    """The cells that may still run. Where a search has chosen, only the chosen rate's."""
    unfinished = [view for view in views if view.state not in ("done", "failed", "dropped", "pruned")]
    if selection is None or not selection.searches:
        return unfinished
    chosen = {run_id for choice in selection.choices for run_id in choice.run_ids}
    decided = {view.cell.group for view in views if view.cell.run_id in chosen}
    without = _without_rate(selection)
    decided |= {view.cell.group for view in views if view.cell.search in without}
    return [view for view in unfinished if view.cell.group not in decided or view.cell.run_id in chosen]


def _without_rate(selection: Selection) -> set[str]:
    """The searches that have ended without a choice, because every rate diverged."""
    return {search.group for search in selection.searches if any(made.action == "none" for made in search.decisions)}


def _all_left(open_cells: Sequence[CellView], running: int) -> float | None:
    known = [view.seconds_left for view in open_cells if view.seconds_left is not None]
    if not known:
        return None
    # A cell without an estimate is taken as the mean of the others: they have the same sweep.
    return sum(known) * len(open_cells) / len(known) / max(1, running)


def _lacks_scores(cell: WatchedCell, record: RunRecord) -> bool:
    return any(missing_passes(cell.metrics, record.scores.get(split)) for split in cell.splits)

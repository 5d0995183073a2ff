"""Carry out a sweep. Finished cells are skipped, stopped ones continue, and a cell whose worker died is tried again.

A launcher starts the cells in this process, in other processes, or on other machines. The results are read only from
the cells' folders.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from tiedlora import storage
from tiedlora.config.schema import TaskConfig
from tiedlora.errors import UserError
from tiedlora.runs.inputs import check_same_inputs
from tiedlora.sweeps import status
from tiedlora.sweeps.cell_log import EndedCellsLogger
from tiedlora.sweeps.cells import ENDED, Sweep, SweepCell
from tiedlora.sweeps.control import STARTED, SweepControl
from tiedlora.tasks import load_examples, load_task

log = logging.getLogger(__name__)

LAUNCHES = 2
"""How often a cell is started if its worker dies without leaving an error."""
SECONDS_BETWEEN_CHECKS = 1.0
"""The time between two checks of a cell that another process is working on."""

Launch = Callable[[Sequence[SweepCell], int], None]
"""Starts the cells, and returns when they have ended. The number is the first job's, counted over all launches."""


def run_sweep(sweep: Sweep, launch: Launch, fail_fast: bool = False) -> None:
    """Run the cells that are neither finished nor dropped, then print the table of all cells.

    Args:
        fail_fast: stop all cells when the first one fails. Otherwise the others continue.

    Raises:
        UserError: a cell's result.json is damaged.
        SystemExit: with code 1, after naming every cell that failed.
        KeyboardInterrupt: the sweep was asked to stop; the same command continues it.
    """
    finished: list[SweepCell] = []
    unfinished: list[SweepCell] = []
    for cell in sweep.cells:
        (finished if cell.finished() else unfinished).append(cell)
    errors = changed_inputs(finished)
    control = sweep.control
    control.start(fail_fast)
    wanted = [cell for cell in unfinished if not control.is_dropped(cell.run_id)]
    numbers = len(sweep.cells), len(finished), len(wanted)
    log.info("%s: %d cells, %d finished before, %d to run", sweep.id, *numbers)
    try:
        with EndedCellsLogger(sweep):
            launch_cells(unfinished, launch, control)
    except KeyboardInterrupt:
        print(status.summary_line(sweep, status.statuses(sweep)))
        raise
    cells = status.statuses(sweep)
    print(f"\n{status.table(cells)}\n\n{status.summary_line(sweep, cells)}")
    first_failure = control.first_failure()
    ended = {"done", "paused", "dropped"} | ({"missing", "interrupted"} if first_failure else set())
    errors.update({cell.run_id: cell.error or "" for cell in cells if cell.state not in ended})
    end_with(errors, len(cells), first_failure)


def check_test_rows(cells: Iterable[SweepCell]) -> None:
    """Read the test rows that are scored after all training: a mistake in them would cost the time of the sweep.

    Rows of the hub and rows that a task generates are left to the run that scores them.

    Raises:
        UserError: there are no rows, or one is wrong.
    """
    read: list[tuple[TaskConfig, str]] = []
    for config in (cell.config for cell in cells):
        root = config.data_root
        if "test" in config.score.splits and root is not None and (config.task, root) not in read:
            read.append((config.task, root))
            if not (task := load_task(config.task)).generator:
                load_examples(task, "test", root)


def end_with(errors: Mapping[str, str], cells: int, first_failure: str | None) -> None:
    """End a sweep of so many cells.

    Args:
        errors: run id -> why it failed.
        first_failure: the cell that has stopped the sweep (fail_fast), or None.

    Raises:
        SystemExit: with code 1, after naming every cell that failed.
    """
    if first_failure is not None:
        print(f"\nfail_fast: {first_failure} failed, so the others stopped; fix it and run this again", file=sys.stderr)
    if errors:
        print(f"\n{len(errors)} of {cells} cells failed; their tracebacks are in error.txt:", file=sys.stderr)
        for run_id, error in errors.items():
            print(f"  {run_id}: {error}", file=sys.stderr)
        raise SystemExit(1)


def launch_cells(cells: Sequence[SweepCell], launch: Launch, control: SweepControl, first_job: int = 0) -> int:
    """Launch the cells until each is done, paused, failed or dropped. A dropped one may be put back meanwhile.

    Returns:
        The number of the next job, to be the first of the next launch.
    """
    launches = _Launches(launch, control, first_job)
    launches.run(cells)
    return launches.next_job


def wait_for_others(cells: Iterable[SweepCell]) -> bool:
    """Wait until no other process works on these cells. Whether one did."""
    others = [cell for cell in cells if cell.state() == "running"]
    if others:
        _log_waiting(others[0])
    for cell in others:
        _state_when_free(cell)
    return bool(others)


def _log_waiting(cell: SweepCell) -> None:
    log.info("waiting for cells that another process is working on, such as %s", cell.run_id)


def _state_when_free(cell: SweepCell) -> str:
    """Wait until no process works on the cell, and return its state. (Another command may share the cell.)"""
    while (state := cell.state()) == "running":
        time.sleep(SECONDS_BETWEEN_CHECKS)
    return state


def changed_inputs(cells: Iterable[SweepCell]) -> dict[str, str]:
    """Finished cells whose data or base model has changed since then: run id -> what has changed.

    Raises:
        UserError: a cell's result.json is missing or damaged.
    """
    changes = {}
    for cell in cells:
        record = cell.folder.finished_record()
        try:
            check_same_inputs(cell.config, record, cell.folder)
        except UserError as error:
            changes[cell.run_id] = str(error)
    return changes


class _Launches:
    """Launches cells until each has a result or an error, has paused, or was dropped."""

    def __init__(self, launch: Launch, control: SweepControl, first_job: int) -> None:
        self.launch, self.control, self.next_job = launch, control, first_job
        self.counts: Counter[str] = Counter()
        """Run id -> how often the cell was started."""
        self._has_waited = False
        self._launcher_error = ""
        """Why a launch has started no cell at all."""

    def run(self, cells: Sequence[SweepCell]) -> None:
        """Return when every cell has ended, or one has stopped the sweep."""
        wanted = cells
        cells = [cell for cell in wanted if not self.control.stops(cell.run_id)]
        while cells:
            try:
                self.launch(cells, self.next_job)
            except UserError:
                # The launcher itself cannot go on, and says why.
                raise
            except Exception as error:
                # What a launcher returns or raises does not matter: the folders show what it has done.
                reason = f"{type(error).__name__}: {error}"
                log.warning("the launcher failed (%s); continuing with what the cells' folders hold", reason)
                self._launcher_error = reason
            self.next_job += len(cells)
            self._count(cells)
            cells = [cell for cell in wanted if self._needs_launch(cell)]

    def _count(self, cells: Sequence[SweepCell]) -> None:
        """Count the starts of a launch.

        A launcher that raises an error may leave cells waiting, as in a queue of Slurm. They have not failed. But where
        no cell was started at all, the launcher does not work, and each cell counts, so that the sweep ends.
        """
        noted = {cell.run_id: self.control.take_start(cell.run_id) for cell in cells}
        started = [run_id for run_id, what in noted.items() if what == STARTED]
        self._launcher_error = "" if started else self._launcher_error
        self.counts.update(started or [run_id for run_id, what in noted.items() if what is None])

    def _needs_launch(self, cell: SweepCell) -> bool:
        """Whether the cell may be launched once more: it has not ended, or a person asks for it."""
        if not self._has_waited and cell.state() == "running":
            _log_waiting(cell)
            self._has_waited = True
        state = _state_when_free(cell)
        if state in ("done", "paused") or self.control.stops(cell.run_id):
            return False
        if self.control.take_retry(cell.run_id):
            cell.folder.error_file.unlink(missing_ok=True)
            del self.counts[cell.run_id]
            return True
        # An earlier error stays until the run starts. If the worker died before, it says nothing about this launch.
        if state in ENDED and (state != "failed" or self.control.is_new(cell.folder.error_file)):
            return False
        if self.counts[cell.run_id] < LAUNCHES:
            log.warning("%s: stopped without a result; launching it once more", cell.run_id)
            return True
        # A launcher that has failed at once leaves no folder.
        message = f"The worker ended {LAUNCHES} times without a result or an error: killed, or out of memory?"
        if self._launcher_error:
            message = f"The launcher started no cell: {' '.join(self._launcher_error.split())}"
        storage.write_bytes(cell.folder.error_file, f"{message}\n".encode())
        self.control.failed(cell.run_id)
        return False

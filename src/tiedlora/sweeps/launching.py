"""Carry out a sweep: what its command does, and what each of its workers does.

Finished cells are skipped, stopped ones continue, and a cell whose worker died is tried again. A launcher
(launchers.py) starts workers in this process, in other processes, or on other machines. What they have done is read
only from the cells' folders.

A worker takes the next free cell and carries it out, until no cell is free. It holds the lock of its cell from the
first moment, so no second one takes it. The lock ends with its process. A worker that was killed leaves a mark
(control.py), and the cell is tried once more by another one.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tiedlora import storage
from tiedlora.config.identity import run_id
from tiedlora.config.schema import Config, TaskConfig
from tiedlora.errors import StoppedEarly, UserError, drop_output, output_is_closed
from tiedlora.records.run_folder import Busy, RunFolder
from tiedlora.runs import run
from tiedlora.runs.inputs import check_same_inputs
from tiedlora.sweeps import status
from tiedlora.sweeps.cells import ENDED, Goal, Sweep, SweepCell
from tiedlora.sweeps.control import SweepControl
from tiedlora.tasks import load_examples, load_task
from tiedlora.text import clock, visible
from tiedlora.training.signals import also_stopped_by

log = logging.getLogger(__name__)

SECONDS_BETWEEN_CHECKS = 1.0
"""The time between two checks of a cell that another process is working on."""
STARTS = 2
"""How often a cell is started if its worker dies without leaving an error."""
SECONDS_BETWEEN_COUNTS = 2.0
LARGEST_SHARE = 0.02
"""Most of the time that is spent on counting: the files of ten thousand cells take seconds on a network file system."""

Launch = Callable[[Path, Sequence[Goal]], None]
"""Starts workers on the goals of a sweep's folder, and returns when all have ended. It raises an error if one of them
has not ended by itself. A UserError ends the sweep."""


def run_sweep(sweep: Sweep, launch: Launch, fail_fast: bool = False) -> None:
    """Run the cells that are neither finished nor dropped, then print the table of all cells.

    Args:
        fail_fast: stop all cells when the first one fails. Otherwise the others continue.

    Raises:
        UserError: a cell's result.json is damaged, or the launcher cannot go on.
        SystemExit: with code 1, after naming every cell that failed.
        KeyboardInterrupt: the sweep was asked to stop; the same command continues it.
    """
    finished: list[SweepCell] = []
    unfinished: list[SweepCell] = []
    for cell in sweep.cells:
        (finished if cell.finished() else unfinished).append(cell)
    errors = changed_inputs(finished)
    sweep.freeze()
    control = sweep.control
    control.start(fail_fast)
    wanted = [cell for cell in unfinished if not control.is_dropped(cell.run_id)]
    numbers = len(sweep.cells), len(finished), len(wanted)
    log.info("%s: %d cells, %d finished before, %d to run", sweep.id, *numbers)
    try:
        with logged_progress(sweep):
            launch_cells(unfinished, launch, control)
    except KeyboardInterrupt:
        print(status.summary_line(sweep.id, status.statuses(sweep.cells, control)))
        raise
    cells = status.statuses(sweep.cells, control)
    print(f"\n{status.table(cells)}\n\n{status.summary_line(sweep.id, cells)}")
    first_failure = control.first_failure()
    ended = {"done", "paused", "dropped"} | ({"missing", "interrupted"} if first_failure else set())
    errors.update({cell.run_id: cell.error or "" for cell in cells if cell.state not in ended})
    end_with(errors, len(cells), first_failure)


@contextmanager
def logged_progress(sweep: Sweep) -> Iterator[None]:
    """Inside the context, log a line whenever a cell of the sweep ends, under any launcher."""
    leave = threading.Event()
    thread = threading.Thread(target=_log_progress, args=(sweep, leave), daemon=True)
    thread.start()
    try:
        yield
    finally:
        leave.set()
        thread.join()


def _log_progress(sweep: Sweep, leave: threading.Event) -> None:
    begun, pause = time.monotonic(), SECONDS_BETWEEN_COUNTS
    first = last = _ended(sweep)
    while not leave.wait(pause):
        started = time.monotonic()
        if (now := _ended(sweep)) != last:
            last, total = now, len(sweep.cells)
            line = f"{sweep.id}: {now['done']} of {total} done"
            line += "".join(f", {now[state]} {state}" for state in ("failed", "pruned") if now[state])
            if (done := now["done"] - first["done"]) > 0:
                left = (started - begun) / done * (total - now["done"] - now["failed"])
                line += f", about {clock(left)} left"
            log.info("%s", line)
        pause = max(SECONDS_BETWEEN_COUNTS, (time.monotonic() - started) / LARGEST_SHARE)


def _ended(sweep: Sweep) -> Counter[str]:
    """How many cells are done, have failed, or were stopped by a search. It takes no lock, which a worker may need."""
    ended: Counter[str] = Counter()
    for folder in (cell.folder for cell in sweep.cells):
        if folder.result_file.exists():
            ended["done"] += 1
        elif folder.error_file.exists():
            ended["failed"] += 1
        elif folder.pruned_file.exists():
            ended["pruned"] += 1
    return ended


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


def launch_cells(cells: Sequence[SweepCell], launch: Launch, control: SweepControl) -> None:
    """Launch workers until each cell is done, paused, failed or dropped. A dropped one may be put back meanwhile.

    If the launcher fails, and no worker has started a cell since the launch before, the launcher does not work.
    """
    reason, seen, failures = "", None, 0
    while goals := [cell.goal for cell in cells if _needs_launch(cell, control)]:
        marks = [(goal.run_id, control.starts(goal.run_id)) for goal in goals]
        failures = failures + 1 if reason and marks == seen else 0
        if failures == STARTS:
            message = f"The launcher started no cell: {' '.join(reason.split())}\n"
            for cell in cells:
                if is_open(cell, control):
                    storage.write_bytes(cell.folder.error_file, message.encode())
                    control.failed(cell.run_id)
            return
        seen, reason = marks, ""
        try:
            launch(control.folder, goals)
        except UserError:
            raise
        except Exception as error:
            # The folders show what was done.
            reason = f"{type(error).__name__}: {error}"
            log.warning("the launcher failed (%s); continuing with what the cells' folders hold", reason)


def _needs_launch(cell: SweepCell, control: SweepControl) -> bool:
    """Whether a worker is needed for the cell, after waiting for another command that works on it."""
    wait_until_free(cell)
    if control.take_retry(cell.run_id):
        cell.folder.error_file.unlink(missing_ok=True)
        control.note_end(cell.run_id)
    return is_open(cell, control)


def wait_until_free(cell: SweepCell) -> bool:
    """Wait until no process works on the cell. (Another command may share it.) Whether one did."""
    if cell.state() != "running":
        return False
    log.info("waiting for cells that another process is working on, such as %s", cell.run_id)
    while cell.state() == "running":
        time.sleep(SECONDS_BETWEEN_CHECKS)
    return True


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


def work(folder: Path, goals: Sequence[Goal]) -> None:
    """Carry out cells until none of them is free: each has ended, was dropped, or another worker is at it.

    Args:
        folder: the sweep's folder, with the frozen configurations of the cells.

    Raises:
        KeyboardInterrupt: the sweep was asked to stop; a checkpoint is written.
    """
    control, waiting, before = SweepControl(folder), list(goals), len(goals) + 1
    while len(waiting) < before:
        before = len(waiting)
        waiting = [goal for goal in waiting if not _take(folder, goal, control)]


def _take(folder: Path, goal: Goal, control: SweepControl) -> bool:
    """Carry out the cell if it is free and has not ended. False if another process works on it."""
    if control.stops(goal.run_id):
        return True
    try:
        # The folder is outputs/sweeps/SWEEP.
        with RunFolder(folder.parents[1] / goal.run_id).locked(patience=0):
            killed = control.starts(goal.run_id)
            control.note_start(goal.run_id, killed + 1)
            try:
                cell = goal.cell(folder)
                if is_open(cell, control):
                    _carry_out(cell, killed, control)
            finally:
                control.note_end(goal.run_id)
    except Busy:
        return False
    return True


def is_open(cell: SweepCell, control: SweepControl) -> bool:
    """Whether a worker may take the cell: it has not ended since this command began, and may start."""
    state = cell.state()
    has_ended = state in ENDED and (state != "failed" or control.is_new(cell.folder.error_file))
    return not has_ended and not control.stops(cell.run_id)


def _carry_out(cell: SweepCell, killed: int, control: SweepControl) -> None:
    """Carry out a cell of which so many workers were killed."""
    if killed >= STARTS:
        message = f"The worker ended {STARTS} times without a result or an error: killed, or out of memory?"
        storage.write_bytes(cell.folder.error_file, f"{message}\n".encode())
        control.failed(cell.run_id)
        return
    if killed:
        log.warning("%s: once more, because its worker was killed", cell.run_id)
    run_cell(cell.config, control)


def run_cell(config: Config, control: SweepControl) -> None:
    """Carry out one cell. A failure is written to error.txt in the cell's folder, where the sweep reads it.

    A failure is not raised, because a launcher would keep the exception, and with it the tensors of the failed cell.

    Raises:
        KeyboardInterrupt: the sweep was asked to stop; a checkpoint is written.
    """
    folder = RunFolder(Path(config.outputs) / run_id(config))
    stopped = control.stop_condition(folder.path.name)
    try:
        with also_stopped_by(stopped):
            run.main(config)
    except StoppedEarly:
        if not stopped():
            # After an Exception, a worker continues with the next cell; after a KeyboardInterrupt, it stops.
            raise KeyboardInterrupt from None
        log.info("%s: stopped with a checkpoint, because it was dropped or another cell failed", folder.path.name)
        return
    except Exception as error:
        if isinstance(error, BrokenPipeError) and output_is_closed():
            # The sweep is piped into a program such as `head`, which has ended. That is no failure of the cell.
            drop_output()
            raise KeyboardInterrupt from None
        folder.write_error()
        control.failed(folder.path.name)
        log.error("%s failed: %s", folder.path.name, visible(" ".join(f"{type(error).__name__}: {error}".split())))
    else:
        return
    # Here, and not in the block above, where the exception still holds the frames and tensors of the failed cell. It
    # imports torch, which a cell that is finished does not need.
    from tiedlora.models.device import free_memory

    free_memory()

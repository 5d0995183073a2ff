"""Carry out a sweep: what its command does, and what each of its workers does.

Finished cells are skipped, stopped ones continue, and a cell whose worker died is tried again. A worker takes the next
free cell and carries it out, until no cell is free. It holds the lock of its cell from the first moment, so no second
one takes it. The lock ends with its process. A worker that was killed leaves a mark (SweepControl), and the cell is
tried once more by another one. What workers have done is read only from the cells' folders.

All workers do the same, so a launcher (launchers.py) only starts some, in this process, in other processes, or on other
machines, and waits for them.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tiedlora import storage
from tiedlora.errors import Diverged, StoppedEarly, UserError, drop_output, output_is_closed
from tiedlora.records.run_folder import Busy, RunFolder
from tiedlora.runs import run
from tiedlora.runs.inputs import check_same_inputs
from tiedlora.scoring.wanted import check_words
from tiedlora.sweeps.cells import Goal, Sweep, SweepCell, SweepControl, frozen_cell
from tiedlora.tasks import load_examples, load_task
from tiedlora.text import clock, visible
from tiedlora.tracking.run_trackers import check_tracker
from tiedlora.training.signals import also_stopped_by

log = logging.getLogger(__name__)

SECONDS_BETWEEN_CHECKS = 1.0
"""The time between two looks at a cell that another process is working on, or at whether a cell should stop."""
STARTS = 2
"""How often a cell is started if its worker dies without leaving an error."""
MOST_FAILURES = 3
"""After so many failures in a row, a worker leaves the free cells to the others, if another one trains."""
SECONDS_BETWEEN_COUNTS = 2.0
LARGEST_SHARE = 0.02
"""The largest share of the time for counting: ten thousand cells take seconds on a network file system."""


class Unfit(Exception):
    """A worker fails at each cell while another one trains: its device, its memory or a mount may be broken."""


@dataclass
class _OfProcess:
    """What this process has gone through. One process may be several workers, one after the other, as in Ray."""

    failures: int = 0
    """The cells that have failed since the last one that has not. A diverged run is a result, and not counted."""


_process = _OfProcess()

Launch = Callable[[Path, Sequence[Goal]], None]
"""Starts workers on the goals of a sweep's folder, and returns when all have ended. It raises an error if a worker was
killed or failed. A UserError ends the sweep."""


def run_sweep(sweep: Sweep, launch: Launch, fail_fast: bool = False) -> None:
    """Run the cells that are neither finished nor dropped, then print the table of all cells.

    Args:
        fail_fast: stop all cells when the first one fails. Otherwise the others continue.

    Raises:
        UserError: a cell's result.json is damaged, or as `check_scoring`, or the launcher cannot go on.
        SystemExit: with code 1, after naming every cell that failed.
        KeyboardInterrupt: the sweep was asked to stop; the same command continues it.
    """
    # They import rich, which takes a tenth of a second, and a single run loads this module too.
    from tiedlora import screen  # noqa: PLC0415
    from tiedlora.sweeps import status  # noqa: PLC0415

    finished = {cell.run_id: cell for cell in sweep.cells if cell.finished()}
    unfinished = [cell for cell in sweep.cells if cell.run_id not in finished]
    errors, control = changed_inputs(finished.values()), sweep.control
    check_scoring(unfinished)
    wanted = sum(not control.is_dropped(cell.run_id) for cell in unfinished)
    log.info("%s: %d cells, %d finished before, %d to run", sweep.id, len(sweep.cells), len(finished), wanted)
    first_failure = None
    # A finished sweep writes nothing, so that a read-only archive can be printed.
    if unfinished:
        sweep.freeze()
        control.start(fail_fast)
        leave = threading.Event()
        progress = threading.Thread(target=_log_progress, args=(sweep, leave), daemon=True)
        progress.start()
        try:
            launch_cells(unfinished, launch, control)
        except KeyboardInterrupt:
            print(status.summary_line(sweep.id, [status.status_of(cell, control) for cell in sweep.cells]))
            raise
        finally:
            leave.set()
            progress.join()
        first_failure = control.first_failure()
    cells = [status.status_of(cell, control) for cell in sweep.cells]
    screen.show("", *status.summarised(sweep.id, cells))
    ended = {"done", "paused", "dropped"} | ({"missing", "interrupted", "pruned"} if first_failure else set())
    errors.update({cell.run_id: cell.error or "" for cell in cells if cell.state not in ended})
    end_with(errors, len(cells), first_failure)


def _log_progress(sweep: Sweep, leave: threading.Event) -> None:
    """Log a line whenever a cell of the sweep ends, under any launcher, until `leave` is set."""

    def state(folder: RunFolder) -> str:
        """How the run has ended; empty if it has not. It takes no lock, because a worker may need it."""
        files = {"done": folder.result_file, "failed": folder.error_file, "pruned": folder.pruned_file}
        return next((name for name, file in files.items() if file.exists()), "")

    begun, pause, total = time.monotonic(), SECONDS_BETWEEN_COUNTS, len(sweep.cells)
    first = last = Counter(state(cell.folder) for cell in sweep.cells)
    while not leave.wait(pause):
        started = time.monotonic()
        if (now := Counter(state(cell.folder) for cell in sweep.cells)) != last:
            last, line = now, f"{sweep.id}: {now['done']} of {total} done"
            line += "".join(f", {now[state]} {state}" for state in ("failed", "pruned") if now[state])
            if (done := now["done"] - first["done"]) > 0:
                left = (started - begun) / done * (total - now["done"] - now["failed"])
                line += f", about {clock(left)} left"
            log.info("%s", line)
        pause = max(SECONDS_BETWEEN_COUNTS, (time.monotonic() - started) / LARGEST_SHARE)


def check_scoring(cells: Iterable[SweepCell]) -> None:
    """Check what would fail later and cost the time of the sweep: words, trackers and test rows.

    Rows of the hub and rows that a task generates are left to the run that scores them.

    Raises:
        UserError: a metric, a neutral text or an option of a task is wrong; a tracker is not installed; there are no
            rows, or one is wrong.
    """
    cells = list(cells)
    for cell in cells:
        if not cell.folder.result_file.exists():
            check_words(cell.config)
            check_tracker(cell.config)
    tested = [cell.config for cell in cells if "test" in cell.config.score.splits]
    wanted = [config for config in tested if config.data_root is not None or config.task.files.train is not None]
    for config in {(repr(config.task), config.data_root): config for config in wanted}.values():
        if not (task := load_task(config.task)).generator:
            load_examples(task, "test", config.data_root)


def end_with(errors: Mapping[str, str], cells: int, first_failure: str | None) -> None:
    """End a sweep of so many cells.

    Args:
        errors: run id -> why it failed.
        first_failure: the cell that has stopped this sweep; None if no cell has.

    Raises:
        SystemExit: with code 1, after naming every cell that failed.
    """
    if first_failure is not None:
        print(f"\nfail_fast: {first_failure} failed, so the others stopped; fix it and run this again", file=sys.stderr)
    if errors:
        print(f"\n{len(errors)} of {cells} cells failed or are not done; tracebacks are in error.txt:", file=sys.stderr)
        for run_id, error in errors.items():
            print(f"  {run_id}: {error}", file=sys.stderr)
        raise SystemExit(1)


def launch_cells(cells: Sequence[SweepCell], launch: Launch, control: SweepControl) -> None:
    """Launch workers until each cell is done, paused, failed or dropped. A dropped one may be put back meanwhile.

    Raises:
        UserError: launches again and again change nothing, or the launcher says why it cannot go on.
    """
    reason, seen, failures = "", None, 0
    while True:
        # Another command on the same cells shares the work: it has some, and this one takes the others.
        busy = [cell for cell in cells if cell.state() == "running"]
        free = [cell for cell in cells if cell not in busy]
        for cell in free:
            if control.take_retry(cell.run_id):
                cell.folder.error_file.unlink(missing_ok=True)
                control.note_end(cell.run_id)
        if not (goals := [cell.goal for cell in free if is_open(cell, control)]):
            if not busy:
                return
            wait_for_one(busy)
            continue
        marks = [
            (cell.run_id, control.starts(cell.run_id), cell.state(), cell.folder.checkpoint_step()) for cell in free
        ]
        failures = failures + 1 if marks == seen else 0
        if failures == STARTS:
            # The cells' frozen configurations are those of the newest command.
            why = " ".join(reason.split()) or "its workers find no work; another command may ask for other scores"
            raise UserError(f"hydra/launcher: started no cell: {why}; the same command continues")
        if failures:
            time.sleep(SECONDS_BETWEEN_CHECKS)
        seen, reason = marks, ""
        try:
            launch(control.folder, goals)
        except UserError:
            raise
        except Exception as error:
            # The folders show what was done.
            reason = f"{type(error).__name__}: {error}"
            log.warning("the launcher failed (%s); continuing from the cells' folders", reason)


def wait_for_one(busy: Sequence[SweepCell]) -> None:
    """Wait until one of these cells is free, such as after another command has ended its work on it."""
    log.info("waiting for cells that another process is working on, such as %s", busy[0].run_id)
    while all(cell.state() == "running" for cell in busy):
        time.sleep(SECONDS_BETWEEN_CHECKS)


def is_open(cell: SweepCell, control: SweepControl) -> bool:
    """Whether a worker may take the cell: it is not done or paused, has not failed in this command, and may start."""
    state = cell.state()
    has_ended = state in ("done", "paused", "failed") and (state != "failed" or control.is_new(cell.folder.error_file))
    return not has_ended and not control.stops(cell.run_id)


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
        KeyboardInterrupt, UserError: the sweep was asked to stop (a checkpoint is written); a frozen cell is damaged.
        Unfit: this process fails at each cell, and another one trains. The free cells stay free.
    """
    control, waiting, before = SweepControl(folder), list(goals), len(goals) + 1
    while len(waiting) < before:
        before, free, waiting = len(waiting), waiting, []
        for goal in free:
            # The folder is outputs/sweeps/SWEEP.
            run_folder = RunFolder(folder.parents[1] / goal.run_id)
            try:
                if not control.stops(goal.run_id):
                    with run_folder.locked(patience=0):
                        cell = frozen_cell(folder, goal.run_id).until(goal.pause_after, goal.splits)
                        _carry_out(cell, control, goals)
            except Busy:
                waiting.append(goal)


def _carry_out(cell: SweepCell, control: SweepControl, goals: Sequence[Goal]) -> None:
    """Carry out a cell, unless it has ended. Its lock is held.

    Args:
        goals: those of the launch.

    Raises:
        KeyboardInterrupt, UserError, Unfit: as `work`.
    """
    killed = control.note_start(cell.run_id)
    try:
        if killed >= STARTS and is_open(cell, control):
            why = f"The worker ended {STARTS} times without a result or an error: killed, or out of memory?"
            storage.write_bytes(cell.folder.error_file, f"{why}\n".encode())
            control.failed(cell.run_id)
        elif is_open(cell, control):
            _check_fit(cell, goals)
            if killed:
                log.warning("%s: once more, because its worker was killed", cell.run_id)
            run_cell(cell, control)
    finally:
        control.note_end(cell.run_id)


def _check_fit(cell: SweepCell, goals: Iterable[Goal]) -> None:
    """Without this, a worker with a broken device would empty the queue, one quick failure after the other.

    If no other worker trains, the cells themselves may be wrong, and each is tried.

    Raises:
        Unfit: as `work`.
    """
    if _process.failures < MOST_FAILURES:
        return
    others = (RunFolder(cell.folder.path.parent / goal.run_id) for goal in goals)
    if any(other.metrics_file.exists() and other.state() == "running" for other in others):
        raise Unfit(
            f"this worker has failed at {_process.failures} cells in a row while another one trains, so it takes no "
            "more; look into their error.txt and at its device, memory and mounts, then start the same command again"
        )


def run_cell(cell: SweepCell, control: SweepControl) -> None:
    """Carry out one cell. A failure is written to error.txt in the cell's folder, where the sweep reads it.

    A failure is not raised, because a launcher would keep the exception, and with it the tensors of the failed cell.

    Raises:
        KeyboardInterrupt: the sweep was asked to stop; a checkpoint is written.
    """
    folder, asked, next_look = cell.folder, False, 0.0

    def stopped() -> bool:
        """Whether the cell should stop. On a network file system, a look at the files may take milliseconds."""
        nonlocal asked, next_look
        if not asked and (now := time.monotonic()) >= next_look:
            asked, next_look = control.stops(cell.run_id), now + SECONDS_BETWEEN_CHECKS
        return asked

    try:
        with also_stopped_by(stopped):
            run.main(cell.config, folder)
    except StoppedEarly:
        if not stopped():
            # After an Exception, a worker continues with the next cell; after a KeyboardInterrupt, it stops.
            raise KeyboardInterrupt from None
        log.info("%s: stopped with a checkpoint, because it was dropped or another cell failed", cell.run_id)
        return
    except Exception as error:
        if isinstance(error, BrokenPipeError) and output_is_closed():
            # The sweep is piped into a program such as `head`, which has ended. That is no failure of the cell.
            drop_output()
            raise KeyboardInterrupt from None
        why = visible(" ".join(f"{type(error).__name__}: {error}".split()))
        if not folder.write_error():
            # The sweep could not tell it from a cell that was stopped, and would start it again and again.
            raise UserError(f"{folder.error_file}: cannot be written, so the sweep ends ({why})") from None
        control.failed(cell.run_id)
        log.error("%s failed: %s", cell.run_id, why)
        _process.failures += not isinstance(error, Diverged)
    else:
        _process.failures = 0
        return
    # Here, and not in the block above, where the exception still holds the frames and tensors of the failed cell. It
    # imports torch, which a cell that is finished does not need.
    from tiedlora.models.device import free_memory  # noqa: PLC0415

    free_memory()


def logged_work(folder: Path, goals: Sequence[Goal]) -> None:
    """`work` in a process of its own, with the log lines of a run."""
    # It imports tqdm, and a single run loads this module too.
    from tiedlora.tracking.progress import show_log  # noqa: PLC0415

    show_log()
    work(folder, goals)

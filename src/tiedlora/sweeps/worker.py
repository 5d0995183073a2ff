"""What each process of a sweep does: it takes the next free cell and carries it out, until no cell is free.

A worker holds the lock of its cell from the first moment, so no second one takes it. The lock ends with its process. A
worker that was killed leaves a mark (control.py), and the cell is tried once more by another one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from tiedlora import storage
from tiedlora.config.identity import run_id
from tiedlora.config.schema import Config
from tiedlora.errors import StoppedEarly, drop_output, output_is_closed
from tiedlora.records.run_folder import Busy, RunFolder
from tiedlora.runs import run
from tiedlora.sweeps.cells import ENDED, Goal, SweepCell
from tiedlora.sweeps.control import SweepControl
from tiedlora.text import visible
from tiedlora.training.signals import also_stopped_by

log = logging.getLogger(__name__)

STARTS = 2
"""How often a cell is started if its worker dies without leaving an error."""


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

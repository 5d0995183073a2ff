"""Carry out one cell of a sweep. train.py calls this for every cell, in the process that the launcher starts."""

from __future__ import annotations

import logging
from pathlib import Path

from tiedlora.config.identity import run_id
from tiedlora.config.schema import Config
from tiedlora.errors import StoppedEarly, drop_output, output_is_closed
from tiedlora.records.run_folder import Busy, RunFolder
from tiedlora.runs import run
from tiedlora.sweeps.control import BUSY, StopFiles, SweepControl
from tiedlora.text import visible
from tiedlora.training.signals import also_stopped_by

log = logging.getLogger(__name__)


def run_cell(config: Config, sweep_folder: Path | None = None) -> None:
    """Carry out one cell. A failure is written to error.txt in the cell's folder, where the sweep reads it.

    A failure is not raised, because a launcher would keep the exception, and with it the tensors of the failed cell.

    Args:
        sweep_folder: the folder of the sweep, with the files that steer it (control.py); None for a cell on its own.

    Raises:
        KeyboardInterrupt: the sweep was asked to stop; a checkpoint is written.
    """
    folder = RunFolder(Path(config.outputs) / run_id(config))
    control = None if sweep_folder is None else SweepControl(sweep_folder)
    stopped = StopFiles(control, folder.path.name) if control else _never
    if stopped():
        return
    if control and control.is_new(folder.error_file):
        log.info("%s: has failed in another process; the next command runs it again", folder.path.name)
        return
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        if control:
            control.note_start(folder.path.name)
        with also_stopped_by(stopped):
            run.main(config)
    except StoppedEarly:
        if stopped():
            log.info("%s: stopped with a checkpoint, because it was dropped or another cell failed", folder.path.name)
            return
        # After an Exception, a launcher continues with the next cell; after a KeyboardInterrupt, it stops.
        raise KeyboardInterrupt from None
    except Busy as busy:
        log.info("%s", busy)
        if control:
            control.note_start(folder.path.name, BUSY)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and output_is_closed():
            # The sweep is piped into a program such as `head`, which has ended. That is no failure of the cell.
            drop_output()
            raise KeyboardInterrupt from None
        folder.write_error()
        if control:
            control.failed(folder.path.name)
        log.error("%s failed: %s", folder.path.name, _one_line(error))
    else:
        return
    # Here, and not in the block above, where the exception still holds the frames and tensors of the failed cell. It
    # imports torch, which a cell that is finished does not need.
    from tiedlora.models.device import free_memory

    free_memory()


def _never() -> bool:
    return False


def _one_line(error: Exception) -> str:
    return visible(" ".join(f"{type(error).__name__}: {error}".split()))

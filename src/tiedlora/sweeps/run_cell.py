"""Carry out one cell of a sweep. train.py calls this for every cell, in the process that the launcher starts."""

from __future__ import annotations

import logging
from pathlib import Path

from tiedlora.config.identity import run_id
from tiedlora.config.schema import Config
from tiedlora.errors import StoppedEarly
from tiedlora.records.run_folder import Busy, RunFolder
from tiedlora.runs import lazy, run
from tiedlora.text import visible

log = logging.getLogger(__name__)


def run_cell(config: Config) -> None:
    """Carry out one cell. A failure is written to error.txt in the cell's folder, where the sweep reads it.

    A failure is not raised, because a launcher would keep the exception, and with it the tensors of the failed cell.

    Raises:
        KeyboardInterrupt: the sweep was asked to stop; a checkpoint is written.
    """
    folder = RunFolder(Path(config.outputs) / run_id(config))
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.error_file.unlink(missing_ok=True)
        run.main(config)
    except StoppedEarly:
        # After an Exception, a launcher continues with the next cell; after a KeyboardInterrupt, it stops.
        raise KeyboardInterrupt from None
    except Busy as busy:
        log.info("%s", busy)
    except Exception as error:
        folder.write_error()
        log.error("%s failed: %s", folder.path.name, _one_line(error))
    else:
        return
    # Here, and not in the block above, where the exception still holds the frames and tensors of the failed cell.
    lazy.free_memory()


def _one_line(error: Exception) -> str:
    return visible(" ".join(f"{type(error).__name__}: {error}".split()))

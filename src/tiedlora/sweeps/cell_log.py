"""Log the progress of a sweep while it runs, in any processes."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

from tiedlora.sweeps.cells import Sweep
from tiedlora.text import clock

log = logging.getLogger(__name__)

SECONDS_BETWEEN_COUNTS = 2.0
LARGEST_SHARE = 0.02
"""Most of the time that is spent on counting: the files of ten thousand cells take seconds on a network file system."""


@dataclass(frozen=True)
class EndedCells:
    """How many cells are done, have failed, or were stopped by a search."""

    done: int
    failed: int
    pruned: int


class EndedCellsLogger:
    """Inside the context, logs a line whenever a cell ends.

    It looks at the cells' folders, so it works under every launcher.
    """

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.started = time.monotonic()
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> EndedCellsLogger:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._leave.set()
        self._thread.join()

    def _count(self) -> EndedCells:
        # This reads only the files. RunFolder.state() would take the run's lock for a moment, and a worker may need it.
        folders = [cell.folder for cell in self.sweep.cells]
        done = sum(folder.result_file.exists() for folder in folders)
        failed = sum(folder.error_file.exists() and not folder.result_file.exists() for folder in folders)
        pruned = sum(folder.pruned_file.exists() and not folder.result_file.exists() for folder in folders)
        return EndedCells(done, failed, pruned)

    def _look(self) -> None:
        first = last = self._count()
        pause = SECONDS_BETWEEN_COUNTS
        while not self._leave.wait(pause):
            begun = time.monotonic()
            if (now := self._count()) != last:
                last = now
                log.info("%s", self._line(first, now))
            pause = max(SECONDS_BETWEEN_COUNTS, (time.monotonic() - begun) / LARGEST_SHARE)

    def _line(self, first: EndedCells, now: EndedCells) -> str:
        total = len(self.sweep.cells)
        line = f"{self.sweep.id}: {now.done} of {total} done"
        line += "".join(
            f", {count} {state}" for count, state in ((now.failed, "failed"), (now.pruned, "pruned")) if count
        )
        if (done_since := now.done - first.done) > 0:
            seconds_per_cell = (time.monotonic() - self.started) / done_since
            line += f", about {clock(seconds_per_cell * (total - now.done - now.failed))} left"
        return line

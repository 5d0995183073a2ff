"""How a person steers a running sweep: plain files in the sweep's folder, which its cells look at.

    dropped/RUN_ID    the cell is not started; if it runs, it stops after its step and keeps its checkpoint
    retried/RUN_ID    the cell runs once more, when the cells that were launched with it have ended
    fail_fast         the first cell that fails stops the sweep
    first_failure     the id of this cell; no further cell starts, and running ones stop with a checkpoint
    started/RUN_ID    a launcher has started the cell; it says busy if another process was working on the run
    began             written when the latest command began: a cell that has failed since then is not run again

Every process and machine of a sweep sees the same files, so this works under every launcher.
"""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Iterable
from pathlib import Path

from tiedlora import storage
from tiedlora.errors import UserError

STARTED, BUSY = "started", "busy"
"""What a launcher's process did with a cell: carried it out, or found another process working on it."""
SECONDS_BETWEEN_LOOKS = 1.0
"""How often a training cell looks at the files. A network file system may need milliseconds for each look."""


class SweepControl:
    """The control files of one sweep.

    Args:
        folder: the sweep's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._dropped, self._retried = folder / "dropped", folder / "retried"
        self._fail_fast, self._first_failure = folder / "fail_fast", folder / "first_failure"
        self._started, self._began = folder / "started", folder / "began"
        self._began_at: int | None = None

    def start(self, fail_fast: bool) -> None:
        """Begin a sweep. Dropped cells stay dropped; earlier failures and retries count no more."""
        for path in [self._fail_fast, self._first_failure, *self._retried.glob("*"), *self._started.glob("*")]:
            path.unlink(missing_ok=True)
        storage.write_bytes(self._began, b"", flush=False)
        self._began_at = self._began.stat().st_mtime_ns
        if fail_fast:
            storage.write_bytes(self._fail_fast, b"")

    def drop(self, run_ids: Iterable[str]) -> None:
        """Take cells out of the sweep."""
        for run_id in run_ids:
            storage.write_bytes(self._dropped / run_id, b"")
            (self._retried / run_id).unlink(missing_ok=True)

    def retry(self, run_ids: Iterable[str]) -> None:
        """Put dropped cells back, and let failed ones run once more."""
        for run_id in run_ids:
            storage.write_bytes(self._retried / run_id, b"")
            (self._dropped / run_id).unlink(missing_ok=True)

    def is_dropped(self, run_id: str) -> bool:
        """Whether the cell was taken out of the sweep."""
        return (self._dropped / run_id).exists()

    def take_retry(self, run_id: str) -> bool:
        """Whether the cell should run once more. The answer is True once for each `retry`."""
        asked = (self._retried / run_id).exists()
        (self._retried / run_id).unlink(missing_ok=True)
        return asked

    def note_start(self, run_id: str, what: str = STARTED) -> None:
        """Note that a launcher's process has started the cell (STARTED), or could not because it is BUSY."""
        storage.write_bytes(self._started / run_id, what.encode(), flush=False)

    def has_started(self, run_id: str) -> bool:
        """Whether a launcher's process has started the cell in a launch that has not ended yet."""
        return (self._started / run_id).exists()

    def take_start(self, run_id: str) -> str | None:
        """What was noted since the last call: STARTED, BUSY, or None if no process has come to the cell."""
        path = self._started / run_id
        noted = path.read_text() if path.exists() else None
        path.unlink(missing_ok=True)
        return noted

    def is_new(self, error_file: Path) -> bool:
        """Whether a run has failed since this command began; in a worker, since the latest command of the sweep began.

        Both files are in one file system, so on most of them the clocks of machines do not matter.
        """
        try:
            began = self._began_at if self._began_at is not None else self._began.stat().st_mtime_ns
            return error_file.stat().st_mtime_ns > began
        except FileNotFoundError:
            return False

    def failed(self, run_id: str) -> None:
        """Note that a cell has failed. With fail_fast, this stops the sweep."""
        if self._fail_fast.exists():
            storage.write_bytes(self._first_failure, f"{run_id}\n".encode())

    def first_failure(self) -> str | None:
        """The cell that has stopped the sweep; None if no cell has."""
        return self._first_failure.read_text().strip() if self._first_failure.exists() else None

    def stops(self, run_id: str) -> bool:
        """Whether the cell should not start, or should stop."""
        return self.is_dropped(run_id) or self._first_failure.exists()


class StopFiles:
    """Asks now and then whether a cell should stop.

    Args:
        run_id: the cell.
    """

    def __init__(self, control: SweepControl, run_id: str) -> None:
        self._control, self._run_id = control, run_id
        self._next_look = 0.0
        self._asked = False

    def __call__(self) -> bool:
        """Whether the cell should stop. Once it is True, it stays True."""
        if not self._asked and (now := time.monotonic()) >= self._next_look:
            self._asked, self._next_look = self._control.stops(self._run_id), now + SECONDS_BETWEEN_LOOKS
        return self._asked


def matching(patterns: Iterable[str], run_ids: Iterable[str]) -> list[str]:
    """The cells that a person names by their ids, with * and ? as wildcards.

    Raises:
        UserError: a pattern matches no cell.
    """
    run_ids = list(run_ids)
    chosen: dict[str, None] = {}
    for pattern in patterns:
        found = fnmatch.filter(run_ids, pattern)
        if not found:
            raise UserError(
                f"{pattern}: is no cell of this sweep; `scripts/sweep.py status` lists them ('*-s1-*' works)"
            )
        chosen.update(dict.fromkeys(found))
    return list(chosen)

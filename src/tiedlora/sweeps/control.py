"""How a person steers a running sweep: plain files in the sweep's folder, which its cells look at.

    dropped/RUN_ID    the cell is not started; if it runs, it stops after its step and keeps its checkpoint
    retried/RUN_ID    the cell runs once more, when the cells that were launched with it have ended
    fail_fast         the first cell that fails stops the sweep
    first_failure     the id of this cell; no further cell starts, and running ones stop with a checkpoint
    started/RUN_ID    how often a worker has started the cell and not ended: while one is at it, and after a kill
    began             written when the latest command began: a cell that has failed since then is not run again

Every process and machine of a sweep sees the same files, so this works under every launcher.
"""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from tiedlora import storage
from tiedlora.errors import UserError

SECONDS_BETWEEN_LOOKS = 1.0
"""How often a training cell looks at the files. A network file system may need milliseconds for each look."""


class SweepControl:
    """The control files of one sweep.

    Args:
        folder: the sweep's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
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

    def note_start(self, run_id: str, number: int) -> None:
        """Note that a worker starts the cell for the so manieth time. Only who has the run's lock may."""
        storage.write_bytes(self._started / run_id, str(number).encode(), flush=False)

    def note_end(self, run_id: str) -> None:
        """Note that the worker of the cell has ended by itself."""
        (self._started / run_id).unlink(missing_ok=True)

    def starts(self, run_id: str) -> int:
        """How many workers have started the cell and not ended. Under the run's lock: how many were killed."""
        try:
            return int((self._started / run_id).read_text())
        except (FileNotFoundError, ValueError):
            return 0

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

    def stop_condition(self, run_id: str) -> Callable[[], bool]:
        """A function that looks now and then whether the cell should stop. Once it is True, it stays True."""
        asked, next_look = False, 0.0

        def stops() -> bool:
            nonlocal asked, next_look
            if not asked and (now := time.monotonic()) >= next_look:
                asked, next_look = self.stops(run_id), now + SECONDS_BETWEEN_LOOKS
            return asked

        return stops


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

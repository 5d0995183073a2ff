"""The trackers of one run: metrics.jsonl, and the tracker that `tracking.backend` names."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tiedlora.errors import Paused, UserError
from tiedlora.records.rows import MetricsRow
from tiedlora.records.run_folder import RunFolder
from tiedlora.text import visible
from tiedlora.tracking.answers_table import answers_table
from tiedlora.tracking.base import TableTracker, TextTable, TrackedRun, Tracker
from tiedlora.tracking.choose import AUTO, NONE, backend_of
from tiedlora.tracking.metrics_file import MetricsFile

log = logging.getLogger(__name__)

LONGEST_REASON = 300
"""Most characters of a tracker's error that are logged."""


class SafeTracker:
    """The tracker that `tracking.backend` names. Its first failure is one warning; then it gets nothing more.

    Raises:
        UserError: the tracker's package is not installed, and the user has named the tracker.
    """

    def __init__(self, run: TrackedRun, earlier: Sequence[MetricsRow]) -> None:
        self._tracker: Tracker | None = None
        backend = backend_of(run.config)
        if backend == NONE:
            return
        try:
            tracker: Tracker = importlib.import_module(f"tiedlora.tracking.{backend}").TRACKER()
        except UserError as error:
            if run.config.tracking.backend != AUTO:
                raise
            log.warning("%s; the run continues without it", error)
            return
        self._tracker = tracker
        self._try(lambda: tracker.start(run, earlier))

    @property
    def works(self) -> bool:
        """Whether there is a tracker, and it has not failed."""
        return self._tracker is not None

    def log(self, rows: Sequence[MetricsRow]) -> None:
        """Give it rows."""
        if (tracker := self._tracker) is not None:
            self._try(lambda: tracker.log(rows))

    def log_tables(self, tables: Callable[[], Mapping[str, TextTable]]) -> None:
        """Give it tables, if it can show some. They are made only then."""
        if isinstance(tracker := self._tracker, TableTracker):
            self._try(lambda: tracker.log_tables(tables()))

    def finish(self, summary: Mapping[str, float | int | str], exit_code: int = 0) -> None:
        """Close it."""
        if (tracker := self._tracker) is not None:
            self._try(lambda: tracker.finish(summary, exit_code))

    def _try(self, call: Callable[[], None]) -> None:
        tracker = self._tracker
        try:
            call()
        except Exception as error:
            self._tracker = None
            name, reason = getattr(tracker, "title", "the tracker"), f"{type(error).__name__}: {error}"
            log.warning(
                "%s has failed (%s); the run continues without it, and metrics.jsonl has every row",
                *(name, visible(" ".join(reason.split())[:LONGEST_REASON])),
            )
            # So that a dead connection does not stay open for the next run of this process.
            with suppress(Exception):
                getattr(tracker, "abandon", lambda: None)()


class RunTrackers:
    """metrics.jsonl, and the tracker that `tracking.backend` names."""

    def __init__(self, run: TrackedRun, metrics_file: Path, step: int | None) -> None:
        """
        Args:
            step: that of the checkpoint, or None without one. Rows of later steps are dropped, because the run will log
                them again.

        Raises:
            UserError: as SafeTracker.
        """
        self._run = run
        self._metrics = MetricsFile(metrics_file, step)
        self._tracker = SafeTracker(run, self._metrics.rows)

    def log(self, rows: Sequence[MetricsRow]) -> None:
        """Give rows to every tracker.

        Raises:
            OSError: the disk is full. The run then ends, because metrics.jsonl is its record.
        """
        self._metrics.log(rows)
        self._tracker.log(rows)

    def finish(self, summary: Mapping[str, float | int | str]) -> None:
        """Close every tracker of a finished run. Each gets a table of the run's first answers."""
        self._tracker.log_tables(lambda: run_tables(self._run, self._run.config.tracking.answers))
        self._tracker.finish(summary)

    @contextmanager
    def closed_on_error(self) -> Iterator[None]:
        """If the block ends with an error, close every tracker. A pause, as a staged sweep makes it, is no failure."""
        try:
            yield
        except BaseException as error:
            self._tracker.finish({}, exit_code=0 if isinstance(error, Paused) else 1)
            raise


def run_tables(run: TrackedRun, most: int) -> dict[str, TextTable]:
    """The tables of a finished run: its first answers, at most so many."""
    table = answers_table(RunFolder(run.folder), most) if most else None
    return {} if table is None else {"answers": table}

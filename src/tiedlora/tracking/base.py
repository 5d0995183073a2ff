"""The interface of a tracker, and the trackers of one run.

A tracker is one file here with a `TRACKER` class, and one option of conf/tracking/ that names it. The run's own
metrics.jsonl is the record, and every other tracker gets a copy of it. So no failure of another tracker may end a run.
A tracker catches its own failures and logs one warning, and the run continues without it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tiedlora.config.schema import Config
from tiedlora.records.rows import MetricsRow
from tiedlora.tracking.metrics_file import MetricsFile


@dataclass(frozen=True)
class TrackedRun:
    """The description of a run that a tracker gets before the first step."""

    run_id: str
    folder: Path
    config: Config
    trainable_params: int


class Tracker(Protocol):
    """Receives the metrics of one run."""

    def start(self, run: TrackedRun, earlier: Sequence[MetricsRow]) -> None:
        """Open the run.

        Args:
            earlier: the rows that were logged before the run was interrupted; the tracker should write them again.

        Raises:
            UserError: the tracker's package is not installed, or its settings are wrong.
        """

    def log(self, rows: Sequence[MetricsRow]) -> None:
        """Write rows of metrics, in the order of their steps."""

    def finish(self, summary: Mapping[str, float | int | str], exit_code: int = 0) -> None:
        """Close the run.

        Args:
            summary: the finished run's record as flat keys (records.summary.flat_summary); empty if the run failed.
        """


class RunTrackers:
    """metrics.jsonl, and the tracker that `tracking.backend` names."""

    def __init__(self, run: TrackedRun, metrics_file: Path, step: int) -> None:
        """
        Args:
            step: the last finished step. Rows of later steps are dropped, because the run will log them again.

        Raises:
            UserError: as Tracker.start.
        """
        metrics = MetricsFile(metrics_file, step)
        self._trackers: list[Tracker] = [metrics]
        if run.config.tracking.backend != "none":
            tracker: Tracker = importlib.import_module(f"tiedlora.tracking.{run.config.tracking.backend}").TRACKER()
            tracker.start(run, metrics.rows)
            self._trackers.append(tracker)

    def log(self, rows: Sequence[MetricsRow]) -> None:
        """Give rows to every tracker."""
        for tracker in self._trackers:
            tracker.log(rows)

    def finish(self, summary: Mapping[str, float | int | str], exit_code: int = 0) -> None:
        """Close every tracker."""
        for tracker in self._trackers:
            tracker.finish(summary, exit_code)

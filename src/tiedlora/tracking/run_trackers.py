"""The trackers of one run: metrics.jsonl, and the tracker that `tracking.backend` names."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from tiedlora.records.rows import MetricsRow
from tiedlora.tracking.base import TrackedRun, Tracker
from tiedlora.tracking.metrics_file import MetricsFile


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

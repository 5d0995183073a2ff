"""metrics.jsonl, the run's own record of its metrics. It has one JSON object per line, and rows are appended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tiedlora.records.rows import MetricsRow, read_metrics
from tiedlora.tracking.appended_file import AppendedFile
from tiedlora.tracking.base import TrackedRun


class MetricsFile(AppendedFile[MetricsRow]):
    """The tracker that every run has."""

    def __init__(self, path: Path, step: int | None = None) -> None:
        super().__init__(path, read_metrics, step)

    def start(self, run: TrackedRun, earlier: Sequence[MetricsRow]) -> None:
        """Do nothing: the file needs no opening."""

    def log(self, rows: Sequence[MetricsRow]) -> None:
        """Append the rows.

        Raises:
            OSError: the disk is full. The run then ends, because this file is its record.
        """
        self.append(rows)

    def finish(self, summary: Mapping[str, float | int | str], exit_code: int = 0) -> None:
        """Do nothing: result.json holds the summary."""

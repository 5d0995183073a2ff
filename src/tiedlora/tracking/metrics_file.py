"""metrics.jsonl, the run's own record of its metrics. It has one JSON object per line, and rows are appended."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tiedlora import storage
from tiedlora.records.rows import MetricsRow, read_metrics
from tiedlora.tracking.base import TrackedRun


class MetricsFile:
    """The tracker that every run has."""

    def __init__(self, path: Path, step: int = 0) -> None:
        """Keep only the rows up to `step`, the last finished step. The run will log the rows of later steps again."""
        self.path = path
        self.rows = [row for row in read_metrics(path) if row.step <= step] if step else []
        storage.write_json_lines(path, [row.to_json() for row in self.rows])

    def start(self, run: TrackedRun, earlier: Sequence[MetricsRow]) -> None:
        """Do nothing: the file needs no opening."""

    def log(self, rows: Sequence[MetricsRow]) -> None:
        """Append the rows.

        Raises:
            OSError: the disk is full. The run then ends, because this file is its record.
        """
        with storage.naming(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row.to_json()) + "\n" for row in rows))

    def finish(self, summary: Mapping[str, float | int | str], exit_code: int = 0) -> None:
        """Do nothing: result.json holds the summary."""

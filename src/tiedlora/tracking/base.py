"""The interface of a tracker, and the trackers of one run.

A tracker is one file here with a `TRACKER` class, and one option of conf/tracking/ that names it. The run's own
metrics.jsonl is the record, and every other tracker gets a copy of it. So no failure of another tracker may end a run.
A tracker catches its own failures and logs one warning, and the run continues without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tiedlora.config.schema import Config
from tiedlora.records.rows import MetricsRow


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

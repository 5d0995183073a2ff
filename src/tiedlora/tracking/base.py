"""The interface of a tracker, and what it gets of a run.

A tracker is one file here with a subclass of Tracker as its `TRACKER`, and one option of conf/tracking/ that names it.
The run's own metrics.jsonl is the record, and every other tracker gets a copy of it: after an interruption it gets all
rows again. So no failure of another tracker may end a run. RunTrackers catches it, logs one warning, and the run
continues without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiedlora.config.identity import config_tree
from tiedlora.config.schema import LONGEST_TAG, Config
from tiedlora.records.rows import MetricsRow


@dataclass(frozen=True)
class TrackedRun:
    """The description of a run that a tracker gets before the first step."""

    run_id: str
    folder: Path
    config: Config
    trainable_params: int

    @property
    def name(self) -> str:
        """The name for people, such as `TABuv r8 chain_sum s0`."""
        config = self.config
        return f"{config.tying.name} r{config.rank.r} {config.task.name} s{config.seed}"

    @property
    def group(self) -> str:
        """The sweep that the run belongs to, or the model and the task of a single run."""
        return self.config.tracking.group or f"{self._model}/{self.config.task.name}"

    @property
    def tags(self) -> list[str]:
        """Words to filter by."""
        config = self.config
        words = [self._model, config.task.name, config.tying.name, f"r{config.rank.r}"]
        return [*(word[:LONGEST_TAG] for word in words), *config.tracking.tags]

    def settings(self) -> dict[str, Any]:
        """The configuration as nested plain data, with the run's id and size."""
        return {**config_tree(self.config), "run_id": self.run_id, "trainable_params": self.trainable_params}

    @property
    def _model(self) -> str:
        return self.config.model.name.rsplit("/", 1)[-1]


Answers = Sequence[Mapping[str, str | float | None]]
"""A table of what the model answered, for people: in each row the same columns, with texts that a tracker must show as
text."""


class Tracker:
    """Receives the metrics of one run. An error that a method raises ends the tracker, not the run."""

    title = "the tracker"
    """The name in messages."""

    def start(self, run: TrackedRun, earlier: Sequence[MetricsRow]) -> None:
        """Open the run.

        Args:
            earlier: the rows that were logged before the run was interrupted; the tracker should write them again.

        Raises:
            UserError: the tracker's package is not installed.
        """

    def log(self, rows: Sequence[MetricsRow]) -> None:
        """Write rows of metrics, in the order of their steps."""

    def log_answers(self, answers: Answers) -> None:
        """Write the table `answers`, which has rows, after the last row of metrics and before the end."""

    def finish(self, summary: Mapping[str, float | int | str], exit_code: int = 0) -> None:
        """Close the run.

        Args:
            summary: the finished run's record as flat keys (records.summary.flat_summary); empty if the run failed or
                is paused.
            exit_code: 1 if the run failed or was stopped.
        """

    def abandon(self) -> None:
        """Close what is open after a failure, so that no dead connection is left for the next run of this process."""
        self.finish({}, exit_code=1)

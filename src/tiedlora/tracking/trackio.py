"""tracking=trackio: Trackio's local database, without an account.

A run is written again as a whole when it continues.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout, suppress
from typing import Any

from typing_extensions import override

from tiedlora.errors import UserError
from tiedlora.records.rows import MetricsRow
from tiedlora.tracking.run_trackers import Answers, TrackedRun, Tracker

try:
    import trackio
    from trackio.api import Api
except ImportError:
    raise UserError("tracking=trackio: trackio is not installed; run: pip install 'tiedlora[trackio]'") from None

MARKUP = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", **{sign: f"\\{sign}" for sign in "\\`*_[]#|~!"}})
"""Trackio shows the texts of a table as Markdown. With these, they are read as they are."""


class TrackioTracker(Tracker):
    """One Trackio run, which has the run's id as its name."""

    title = "Trackio"

    def __init__(self) -> None:
        self.run: Any = None

    def start(self, run: TrackedRun, earlier: Sequence[MetricsRow]) -> None:
        """Open the run. An earlier run with this id is replaced, because all its rows come again."""
        project = run.config.tracking.project
        # Trackio prints to standard output, which belongs to the run's result.
        with redirect_stdout(sys.stderr):
            # Without a project, there is no earlier run.
            with suppress(ValueError):
                for old in [old for old in Api().runs(project) if old.name == run.run_id]:
                    old.delete()
            settings = {"name": run.name, "tags": run.tags, **run.settings()}
            # Nothing but metrics.jsonl is logged: no figures of the machine.
            self.run = trackio.init(
                project, run.run_id, run.group, config=settings, embed=False, auto_log_gpu=False, auto_log_cpu=False
            )
        self.log(earlier)

    @override
    def log(self, rows: Sequence[MetricsRow]) -> None:
        for row in rows:
            self.run.log(dict(row.values), step=row.step)

    @override
    def log_answers(self, answers: Answers) -> None:
        data = [list(map(_shown, row.values())) for row in answers]
        self.run.log({"answers": trackio.Table(columns=list(answers[0]), data=data)})

    @override
    def finish(self, summary: Mapping[str, float | int], exit_code: int = 0) -> None:
        """Write the summary as the last row, and close the run."""
        with redirect_stdout(sys.stderr):
            if summary:
                self.run.log(dict(summary))
            self.run.finish()


def _shown(cell: object) -> object:
    """The cell of a table, in which a text is no markup."""
    return cell.translate(MARKUP) if isinstance(cell, str) else cell


TRACKER = TrackioTracker

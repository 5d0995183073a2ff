"""tracking=wandb: Weights & Biases, online with an account or offline without one.

W&B gets a copy of metrics.jsonl. Each segment of a resumed run starts with all earlier rows, so a sync of several
segments loses nothing.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from typing_extensions import override

from tiedlora.errors import UserError
from tiedlora.records.rows import MetricsRow
from tiedlora.tracking.run_trackers import Answers, TrackedRun, Tracker, is_logged_in

try:
    import wandb
except ImportError:
    raise UserError("tracking=wandb: wandb is not installed; run: pip install wandb") from None

log = logging.getLogger(__name__)

REFUSED = (wandb.errors.UsageError, wandb.errors.CommError)
"""What wandb.init raises if it does not open a run."""
DELETED = "previously created and deleted"
"""W&B's answer to the id of a run that was deleted there."""
ANSWERED = re.compile(r"returned error 4\d\d")
"""In the message, if a server was reached and does not want the run."""


class WandbTracker(Tracker):
    """One W&B run."""

    title = "W&B"

    def __init__(self) -> None:
        self.run: Any = None

    def start(self, run: TrackedRun, earlier: Sequence[MetricsRow]) -> None:
        """Open the W&B run. It is offline if this machine is not logged in, or if W&B refuses or cannot be reached."""
        # How many seconds its server may delay the start and the end. `wandb sync` can upload the rest later.
        os.environ.setdefault("WANDB_INIT_TIMEOUT", "30")
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "60")
        if "WANDB_MODE" not in os.environ and not is_logged_in():
            # This must be a variable of the environment, not an argument: only then does wandb make no network call.
            os.environ["WANDB_MODE"] = "offline"
            log.info("W&B: not logged in, so this run is kept offline; `wandb sync %s`", _offline_runs(run))
        try:
            self.run = wandb.init(**_settings(run, earlier))
        except REFUSED as error:
            self.run = _started_otherwise(run, earlier, error)
        # Tables and scatter plots read the summary: the best validation loss, and the last value of other metrics.
        self.run.define_metric("validation/loss", summary="min,last")
        self.run.define_metric("train/*", summary="last")
        self.log(earlier)

    @override
    def log(self, rows: Sequence[MetricsRow]) -> None:
        for row in rows:
            self.run.log(row.values, step=row.step)

    def log_answers(self, answers: Answers) -> None:
        """Send the table to W&B, which shows its texts as they are."""
        data = [list(row.values()) for row in answers]
        # Without a step: where a run is continued online, W&B drops what belongs to an earlier step.
        self.run.log({"answers": wandb.Table(columns=list(answers[0]), data=data, allow_mixed_types=True)})

    @override
    def finish(self, summary: Mapping[str, float | int], exit_code: int = 0) -> None:
        self.run.summary.update(dict(summary))
        self.run.finish(exit_code=exit_code)

    def abandon(self) -> None:
        """End W&B's helper process after a failure. Otherwise the next run and this process's end would use it."""
        wandb.teardown()


def _started_otherwise(run: TrackedRun, earlier: Sequence[MetricsRow], error: Exception) -> Any:
    """The W&B run, under another id if W&B has deleted this one, or offline.

    Args:
        error: why W&B has not opened it.
    """
    mode, other = os.environ.get("WANDB_MODE"), None
    _end_helper()
    if DELETED in str(error) and "WANDB_SWEEP_ID" not in os.environ:
        other = f"{run.run_id}-{secrets.token_hex(3)}"
        log.warning("W&B: the run %s was deleted there, which ends its id; it has the id %s now", run.run_id, other)
        try:
            return wandb.init(**_settings(run, earlier, other))
        except REFUSED as again:
            error = again
            _end_helper()
    is_away = isinstance(error, wandb.errors.CommError) and not (
        isinstance(error, wandb.errors.AuthenticationError) or ANSWERED.search(str(error))
    )
    said, why = "cannot be reached" if is_away else "refuses this run", " ".join(str(error).split())
    log.warning("W&B %s (%s); kept offline: `wandb sync %s`", said, why, _offline_runs(run))
    os.environ["WANDB_MODE"] = "offline"
    try:
        return wandb.init(**_settings(run, earlier, other))
    finally:
        # If no server is there, the variable stays, so that later runs do not wait for it.
        if not is_away:
            del os.environ["WANDB_MODE"]
            os.environ.update({} if mode is None else {"WANDB_MODE": mode})


def _end_helper() -> None:
    """End wandb's helper process, which still holds the id of a run that has not started."""
    with suppress(Exception):
        wandb.teardown()


def _offline_runs(run: TrackedRun) -> str:
    return f"{run.folder}/wandb/offline-run-*"


def _settings(run: TrackedRun, earlier: Sequence[MetricsRow], id: str | None = None) -> dict[str, Any]:
    """The arguments of wandb.init, as the environment is now: wandb.Settings reads WANDB_MODE when it is made.

    Args:
        id: W&B's id of the run; None is the run's own.
    """
    # An agent of `wandb sweep` chooses the id itself. A run that starts again (force=true, or its folder was deleted)
    # replaces the old one of its id: if it continued that one, W&B would drop all of its steps.
    resume = "allow" if earlier else None
    identity = {} if "WANDB_SWEEP_ID" in os.environ else {"id": id or run.run_id, "resume": resume}
    return {
        "project": run.config.tracking.project,
        "entity": run.config.tracking.entity,
        "group": run.group,
        "job_type": "train",
        "name": run.name,
        "tags": run.tags,
        "config": run.settings(),
        "dir": str(run.folder),
        "reinit": "finish_previous",
        "settings": wandb.Settings(console="off", silent=True),
        **identity,
    }


TRACKER = WandbTracker

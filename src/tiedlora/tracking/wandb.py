"""tracking=wandb: Weights & Biases, online with an account or offline without one.

W&B gets a copy of metrics.jsonl. Each segment of a resumed run starts with all earlier rows, so a sync of several
segments loses nothing.
"""

from __future__ import annotations

import logging
import os
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
        offline_runs = f"{run.folder}/wandb/offline-run-*"
        if "WANDB_MODE" not in os.environ and not is_logged_in():
            # This must be a variable of the environment, not an argument: only then does wandb make no network call.
            os.environ["WANDB_MODE"] = "offline"
            log.info("W&B: not logged in, so this run is kept offline; `wandb sync %s`", offline_runs)
        try:
            self.run = wandb.init(**_settings(run, earlier))
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError, wandb.errors.CommError) as error:
            said = "cannot be reached" if isinstance(error, wandb.errors.CommError) else "refuses to start"
            log.warning("W&B %s (%s); kept offline: `wandb sync %s`", said, " ".join(str(error).split()), offline_runs)
            # wandb's helper process still holds the id. The variable makes later runs offline too, so they do not wait.
            with suppress(Exception):
                wandb.teardown()
            os.environ["WANDB_MODE"] = "offline"
            self.run = wandb.init(**_settings(run, earlier))
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


def _settings(run: TrackedRun, earlier: Sequence[MetricsRow]) -> dict[str, Any]:
    """The arguments of wandb.init, as the environment is now: wandb.Settings reads WANDB_MODE when it is made."""
    # An agent of `wandb sweep` chooses the id itself. A run that starts again (force=true, or its folder was deleted)
    # replaces the old one of its id: if it continued that one, W&B would drop all of its steps.
    resume = "allow" if earlier else None
    identity = {} if "WANDB_SWEEP_ID" in os.environ else {"id": run.run_id, "resume": resume}
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

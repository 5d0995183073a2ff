"""tracking=wandb: Weights & Biases, online with an account or offline without one.

W&B gets a copy of metrics.jsonl. Each segment of a resumed run starts with all earlier rows, so a sync of several
segments loses nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from tiedlora.config.identity import config_tree
from tiedlora.errors import UserError
from tiedlora.records.rows import MetricsRow
from tiedlora.tracking.base import TrackedRun

try:
    import wandb
    from requests.utils import get_netrc_auth
except ImportError:
    raise UserError("tracking=wandb: wandb is not installed; run: pip install 'tiedlora[wandb]'") from None

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = {"init_timeout": 30.0, "finish_timeout": 60.0}
"""How long W&B's server may delay the start and the end of a run. WANDB_INIT_TIMEOUT and WANDB_FINISH_TIMEOUT override
these times. `wandb sync` can later upload the rest from the run's folder."""


class WandbTracker:
    """One W&B run."""

    def __init__(self) -> None:
        self.run: Any = None
        """W&B's run; None before the start, after the end, and once W&B has failed."""

    def start(self, run: TrackedRun, earlier: Sequence[MetricsRow]) -> None:
        """Open the W&B run. It is offline if this machine is not logged in, or if the server cannot be reached.

        Raises:
            UserError: W&B refuses to start.
        """
        offline_runs = f"{run.folder}/wandb/offline-run-*"
        if "WANDB_MODE" not in os.environ and not wandb.setup().settings.api_key and not _has_stored_key():
            # This must be a variable of the environment, not an argument: only then does wandb make no network call.
            os.environ["WANDB_MODE"] = "offline"
            log.info("W&B: not logged in, so this run is kept offline; `wandb sync %s`", offline_runs)
        try:
            self.run = wandb.init(**_settings(run))
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            raise UserError(f"tracking=wandb: {error}; WANDB_MODE=offline or tracking=none needs no account") from None
        except wandb.errors.CommError as error:
            reason = " ".join(str(error).split())
            log.warning("W&B cannot be reached (%s); kept offline: `wandb sync %s`", reason, offline_runs)
            # wandb's helper process still holds the id. The variable makes later runs offline too, so they do not wait.
            with suppress(Exception):
                wandb.teardown()
            os.environ["WANDB_MODE"] = "offline"
            self.run = wandb.init(**_settings(run))
        with self._survive_failure():
            # Tables and scatter plots read the summary: the best validation loss, and the last value of other metrics.
            self.run.define_metric("validation/loss", summary="min,last")
            self.run.define_metric("train/*", summary="last")
        self.log(earlier)

    def log(self, rows: Sequence[MetricsRow]) -> None:
        """Send the rows to W&B."""
        for row in rows:
            if self.run is not None:
                with self._survive_failure():
                    self.run.log(row.values, step=row.step)

    def finish(self, summary: Mapping[str, float | int | str], exit_code: int = 0) -> None:
        """Write the summary and close the W&B run."""
        if self.run is not None:
            with self._survive_failure():
                self.run.summary.update(dict(summary))
                self.run.finish(exit_code=exit_code)
            self.run = None

    @contextmanager
    def _survive_failure(self) -> Iterator[None]:
        """Turn any failure of W&B into one warning. The run then continues without W&B."""
        try:
            yield
        except Exception as error:
            self.run = None
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            log.warning("W&B has failed (%s); the run continues without it, and metrics.jsonl has every row", reason)
            # Otherwise the next run of this process, and its end, would use the same dead helper process.
            with suppress(Exception):
                wandb.teardown()


def _settings(run: TrackedRun) -> dict[str, Any]:
    """The arguments of wandb.init, as the environment is now: wandb.Settings reads WANDB_MODE when it is made."""
    config = run.config
    model, task = config.model.name.rsplit("/", 1)[-1], config.task.name
    tying, rank = config.tying.name, f"r{config.rank.r}"
    # An agent of `wandb sweep` chooses the id itself.
    identity = {} if "WANDB_SWEEP_ID" in os.environ else {"id": run.run_id, "resume": "allow"}
    timeouts: Any = {
        name: value for name, value in TIMEOUT_SECONDS.items() if f"WANDB_{name.upper()}" not in os.environ
    }
    return {
        "project": config.tracking.project,
        "entity": config.tracking.entity,
        "group": config.tracking.group or f"{model}/{task}",
        "job_type": "train",
        "name": f"{tying} {rank} {task} s{config.seed}",
        "tags": [model[:64], task, tying, rank, *config.tracking.tags],
        "config": {**config_tree(config), "run_id": run.run_id, "trainable_params": run.trainable_params},
        "dir": str(run.folder),
        "reinit": "finish_previous",
        "settings": wandb.Settings(console="off", silent=True, **timeouts),
        **identity,
    }


def _has_stored_key() -> bool:
    """Whether `wandb login` has left a key in ~/.netrc. The key itself is not read."""
    return get_netrc_auth("https://api.wandb.ai") is not None


TRACKER = WandbTracker

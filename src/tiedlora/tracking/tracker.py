"""A run's metrics: its own metrics.jsonl, W&B if asked, and what the person at the terminal sees.

metrics.jsonl is the record. W&B is a replay of it: a resumed run's segment starts with the whole curve,
so that a sync of several segments loses nothing. So nothing that happens to W&B ends a run: it is said once, and the
run goes on without it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tiedlora import storage
from tiedlora.config.schema import TrackingConfig
from tiedlora.errors import UserError

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0
WANDB_SECONDS = {"init_timeout": 30.0, "finish_timeout": 60.0}
"""How long W&B's server may keep a run from starting and from ending; WANDB_INIT_TIMEOUT and WANDB_FINISH_TIMEOUT say
otherwise. What was not uploaded is in the run's folder for `wandb sync`."""


class Progress:
    """A bar on a terminal, a plain line every few seconds in a log: done, rate and time left."""

    def __init__(self, what: str, total: int, unit: str, done: int = 0) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self.started, self.started_at, self.last_line = time.monotonic(), done, time.monotonic()
        # Of several processes that train together, the first alone has the terminal.
        on_terminal = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
        self.bar = (
            tqdm(desc=what, total=total, initial=done, unit=f" {unit}", leave=False, dynamic_ncols=True)
            if on_terminal
            else None
        )

    def advance(self, count: int, note: str = "") -> None:
        """Count `count` more as done."""
        self.done += count
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(count)
        elif time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            rate = (self.done - self.started_at) / (self.last_line - self.started)
            left = (self.total - self.done) / rate if rate else 0.0
            log.info(
                "%s: %d of %d, %.2f %s/s, %s left%s",
                *(self.what, self.done, self.total, rate, self.unit, clock(left)),
                f"  {note}" if note else "",
            )

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self.bar is not None:
            self.bar.close()


def clock(seconds: float) -> str:
    """m:ss, or h:mm:ss from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


class Tracker:
    """Where one run's rows of metrics go."""

    def __init__(self, metrics_file: Path, step: int) -> None:
        """Keep the rows up to `step`; later ones are logged again by the run that goes on from there."""
        self.metrics_file = metrics_file
        self.rows = [row for row in read_metrics(metrics_file) if row["step"] <= step] if step else []
        storage.write_json_lines(metrics_file, self.rows)
        self.wandb: Any = None

    def start_wandb(self, config: TrackingConfig, run_id: str, record: dict[str, Any], folder: Path) -> None:
        """Open the W&B run and replay what was logged before.

        Raises:
            UserError: wandb is not installed, or refuses to start.
        """
        try:
            import wandb
        except ImportError:
            raise UserError("tracking=wandb: wandb is not installed; run: pip install 'tiedlora[wandb]'") from None
        if "WANDB_MODE" not in os.environ and not wandb.setup().settings.api_key and not _has_stored_key():
            # In the environment, not as an argument: only then does wandb make no network call at all.
            os.environ["WANDB_MODE"] = "offline"
            log.info("W&B: not logged in, so this run is kept offline; `wandb sync %s/wandb/offline-run-*`", folder)
        task, model = record["config"]["task"]["name"], record["config"]["model"]["name"].rsplit("/", 1)[-1]
        tying, rank = record["config"]["tying"]["name"], f"r{record['config']['rank']['r']}"
        seed = record["config"]["seed"]
        # An agent of `wandb sweep` chooses the id itself.
        identity: dict[str, Any] = {} if "WANDB_SWEEP_ID" in os.environ else {"id": run_id, "resume": "allow"}
        bounds: dict[str, Any] = {
            name: value for name, value in WANDB_SECONDS.items() if f"WANDB_{name.upper()}" not in os.environ
        }

        def start() -> Any:
            return wandb.init(
                project=config.project,
                entity=config.entity,
                group=config.group or f"{model}/{task}",
                job_type="train",
                name=f"{tying} {rank} {task} s{seed}",
                tags=[model[:64], task, tying, rank, *config.tags],
                config={**record["config"], "run_id": run_id, "trainable_params": record["trainable_params"]},
                dir=str(folder),
                reinit="finish_previous",
                settings=wandb.Settings(console="off", silent=True, **bounds),
                **identity,
            )

        try:
            self.wandb = start()
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            raise UserError(f"tracking=wandb: {error}; WANDB_MODE=offline or tracking=none needs no account") from None
        except wandb.errors.CommError as error:
            said = " ".join(str(error).split())
            log.warning("W&B cannot be reached (%s); kept offline: `wandb sync %s/wandb/offline-run-*`", said, folder)
            # Its process still takes the id for used; and in the environment, so that no later run waits again.
            with suppress(Exception):
                wandb.teardown()
            os.environ["WANDB_MODE"] = "offline"
            self.wandb = start()
        # Tables and scatter plots read the summary: the best validation loss, and the last of the others.
        with self._unharmed():
            self.wandb.define_metric("validation/loss", summary="min,last")
            self.wandb.define_metric("train/*", summary="last")
        for row in self.rows:
            self._to_wandb(row)

    def log(self, rows: list[dict[str, Any]]) -> None:
        """Append rows such as {"step": 1, "train/loss": 2.3}."""
        with storage.naming(self.metrics_file), open(self.metrics_file, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
        for row in rows:
            self._to_wandb(row)

    def _to_wandb(self, row: dict[str, Any]) -> None:
        if self.wandb is not None:
            with self._unharmed():
                self.wandb.log({key: value for key, value in row.items() if key != "step"}, step=row["step"])

    def finish(self, summary: dict[str, Any], exit_code: int = 0) -> None:
        """Close the W&B run with flat summary keys."""
        if self.wandb is not None:
            with self._unharmed():
                self.wandb.summary.update(summary)
                self.wandb.finish(exit_code=exit_code)
            self.wandb = None

    @contextmanager
    def _unharmed(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            import wandb

            self.wandb = None
            said = " ".join(f"{type(error).__name__}: {error}".split())
            log.warning("W&B has failed (%s); the run goes on without it, and metrics.jsonl has every row", said)
            # The next run of this process, and its end, would otherwise meet the same dead helper process.
            with suppress(Exception):
                wandb.teardown()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line cut short by a kill, and what is no row, are passed over."""
    rows = []
    if path.exists():
        for line in storage.read_bytes(path).splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def _has_stored_key() -> bool:
    """Whether `wandb login` left a key in ~/.netrc; the key itself is not looked at."""
    from requests.utils import get_netrc_auth

    return get_netrc_auth("https://api.wandb.ai") is not None

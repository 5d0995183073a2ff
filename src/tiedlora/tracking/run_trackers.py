"""The trackers of one run: metrics.jsonl, and the tracker that `tracking.backend` names, with its table of answers.

With tracking=auto it is W&B where this machine is logged in, and no tracker elsewhere. To choose, no tracker is
imported and no server is asked: a key in the environment or in ~/.netrc is all that is looked for.
"""

from __future__ import annotations

import configparser
import importlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import cast

from requests.utils import get_netrc_auth

from tiedlora.config.schema import Config
from tiedlora.errors import Paused, UserError
from tiedlora.records.rows import AppendedFile, MetricsRow, PredictionRow, read_metrics, read_predictions
from tiedlora.records.run_folder import RunFolder
from tiedlora.text import visible, visible_lines
from tiedlora.tracking.base import Answers, TrackedRun, Tracker

log = logging.getLogger(__name__)

AUTO, NONE, WANDB = "auto", "none", "wandb"
WANDB_SERVER = "https://api.wandb.ai"
LONGEST_REASON = 300
"""Most characters of a tracker's error that are logged."""
LONGEST_TEXT = 2000
"""Most characters of a prompt, a reference or an answer in a table."""
TABLE_SPLITS = ("test", "validation")
"""The split whose answers are shown is the first of these that was scored."""


def backend_of(config: Config) -> str:
    """The tracker's file in this package, or `none`. What `auto` has chosen is logged once in a process."""
    if config.tracking.backend != AUTO:
        return config.tracking.backend
    logged_in = is_logged_in()
    _say(logged_in)
    return WANDB if logged_in else NONE


@cache
def _say(logged_in: bool) -> None:
    if logged_in:
        log.info("tracking: W&B, because this machine is logged in (tracking=none switches it off)")
    else:
        log.info("tracking: only metrics.jsonl, because this machine is not logged in to W&B (`wandb login`)")


def is_logged_in() -> bool:
    """Whether W&B would find a key on this machine. The key itself is not kept."""
    if os.environ.get("WANDB_MODE") == "disabled":
        return False
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    # The file of keys is the one that NETRC names, ~/.netrc or ~/_netrc, as W&B looks for it. It may be damaged.
    with suppress(ValueError):
        return get_netrc_auth(os.environ.get("WANDB_BASE_URL") or _configured_server() or WANDB_SERVER) is not None
    return False


def _configured_server() -> str | None:
    """The server that `wandb login --host` has written to W&B's settings."""
    folder = os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")
    settings = configparser.ConfigParser(interpolation=None)
    with suppress(OSError, ValueError, configparser.Error):
        settings.read(Path(folder).expanduser() / "settings")
        return settings.get("default", "base_url", fallback=None)
    return None


class RunTrackers:
    """metrics.jsonl, and the tracker that `tracking.backend` names.

    The first failure of the tracker is one warning; then it gets nothing more.
    """

    def __init__(self, run: TrackedRun, metrics_file: Path, step: int | None) -> None:
        """
        Args:
            step: that of the checkpoint, or None without one. Rows of later steps are dropped, because the run will log
                them again.

        Raises:
            UserError: the package of the tracker that tracking= names is not installed.
        """
        self._run = run
        self._metrics = AppendedFile(metrics_file, read_metrics, step)
        self._tracker: Tracker | None = None
        if (backend := backend_of(run.config)) == NONE:
            return
        try:
            self._tracker = importlib.import_module(f"tiedlora.tracking.{backend}").TRACKER()
        except UserError as error:
            if run.config.tracking.backend != AUTO:
                raise
            log.warning("%s; the run continues without it", error)
        self._try(lambda tracker: tracker.start(run, self._metrics.rows))

    def log(self, rows: Sequence[MetricsRow]) -> None:
        """Give rows to every tracker.

        Raises:
            OSError: the disk is full. The run then ends, because metrics.jsonl is its record.
        """
        self._metrics.append(rows)
        self._try(lambda tracker: tracker.log(rows))

    def finish(self, summary: Mapping[str, float | int | str]) -> None:
        """Close every tracker of a finished run. Each gets a table of the run's first answers."""
        most = self._run.config.tracking.answers
        if answers := first_answers(RunFolder(self._run.folder), most) if most else []:
            self._try(lambda tracker: tracker.log_answers(answers))
        self._try(lambda tracker: tracker.finish(summary))

    @contextmanager
    def closed_on_error(self) -> Iterator[None]:
        """If the block ends with an error, close every tracker. A pause, as a staged sweep makes it, is no failure."""
        try:
            yield
        except BaseException as error:
            exit_code = 0 if isinstance(error, Paused) else 1
            self._try(lambda tracker: tracker.finish({}, exit_code))
            raise

    def _try(self, call: Callable[[Tracker], None]) -> None:
        if (tracker := self._tracker) is None:
            return
        try:
            call(tracker)
        except Exception as error:
            self._tracker = None
            reason = visible(" ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_REASON])
            log.warning(
                "%s has failed (%s); the run continues without it, and metrics.jsonl has every row",
                *(tracker.title, reason),
            )
            with suppress(Exception):
                tracker.abandon()


def first_answers(folder: RunFolder, most: int) -> Answers:
    """Prompt, references, the base model's answer, the adapted model's, and its scores; empty without answers.

    Args:
        most: the most rows.
    """
    for split in TABLE_SPLITS:
        if rows := _answered(folder, split)[:most]:
            base = {row.id: row.output for row in _answered(folder, f"{split}.base")}
            metrics = [name for name, score in rows[0].scores.items() if not isinstance(score, list)]
            return [
                {
                    "split": split,
                    "row": short(row.id),
                    "prompt": short(row.prompt),
                    "references": short(" | ".join(row.references)),
                    **({"base": short(base.get(row.id, ""))} if base else {}),
                    "answer": short(row.output),
                    **{metric: cast(float | None, row.scores.get(metric)) for metric in metrics},
                }
                for row in rows
            ]
    return []


def _answered(folder: RunFolder, name: str) -> list[PredictionRow]:
    """The rows with an answer; none if the file is missing or damaged."""
    try:
        return [row for row in read_predictions(folder.predictions_file(name)) if row.has_answer]
    except UserError:
        return []


def short(text: str) -> str:
    """A text of a model without control characters, cut where it is too long for a table."""
    return visible_lines(text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} ...")

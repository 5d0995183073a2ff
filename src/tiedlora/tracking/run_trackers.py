"""The trackers of one run: metrics.jsonl, and the tracker that `tracking.backend` names, with its table of answers.

With tracking=auto it is W&B where this machine is logged in, and no tracker elsewhere. To choose, no tracker is
imported and no server is asked: a key in the environment or in ~/.netrc is all that is looked for.
"""

from __future__ import annotations

import configparser
import importlib
import logging
import netrc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from tiedlora.config.schema import Config
from tiedlora.errors import Paused, UserError
from tiedlora.records.rows import AppendedFile, MetricsRow, PredictionRow, read_metrics, read_predictions
from tiedlora.records.run_folder import RunFolder
from tiedlora.text import visible, visible_lines
from tiedlora.tracking.base import AnswersTable, Cell, TrackedRun, Tracker

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
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or _configured_server() or WANDB_SERVER).hostname
    files = [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]
    for file in files:
        path = Path(file).expanduser()
        with suppress(OSError, ValueError, netrc.NetrcParseError):
            if path.is_file():
                found = netrc.netrc(path).authenticators(host or "")
                return found is not None and bool(found[2])
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
        self._try(self._log_answers)
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

    def _log_answers(self, tracker: Tracker) -> None:
        most = self._run.config.tracking.answers
        if most and (table := answers_table(RunFolder(self._run.folder), most)) is not None:
            tracker.log_answers(table)

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


def answers_table(folder: RunFolder, most: int) -> AnswersTable | None:
    """Prompt, references, the base model's answer, the adapted model's, and its scores; None without answers.

    Args:
        most: the most rows.
    """
    for split in TABLE_SPLITS:
        if not (rows := _answered(folder, split)):
            continue
        base = {row.id: row.output for row in _answered(folder, f"{split}.base")}
        metrics = [name for name, score in rows[0].scores.items() if not isinstance(score, list)]
        columns = ("split", "row", "prompt", "references", *(("base",) if base else ()), "answer", *metrics)
        lines: list[tuple[Cell, ...]] = []
        for row in rows[:most]:
            asked = (short(row.id), short(row.prompt), short(" | ".join(row.references)))
            answers = (*((short(base.get(row.id, "")),) if base else ()), short(row.output))
            scores = (row.scores.get(metric) for metric in metrics)
            numbers = (None if isinstance(score, list) else score for score in scores)
            lines.append((split, *asked, *answers, *numbers))
        return AnswersTable(columns, lines)
    return None


def _answered(folder: RunFolder, name: str) -> list[PredictionRow]:
    """The rows with an answer; none if the file is missing or damaged."""
    try:
        return [row for row in read_predictions(folder.predictions_file(name)) if row.has_answer]
    except UserError:
        return []


def short(text: str) -> str:
    """A text of a model without control characters, cut where it is too long for a table."""
    return visible_lines(text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} ...")

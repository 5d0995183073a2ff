"""The trackers of one run: metrics.jsonl, and the tracker that `tracking.backend` names, with its table of answers.

A tracker is one file here with a subclass of Tracker as its `TRACKER`, and one option of conf/tracking/ that names it.
The run's own metrics.jsonl is the record, and a tracker gets a copy of it: after an interruption it gets all rows
again. So no failure of a tracker may end a run.

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
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from tiedlora.config.identity import arm_of, config_tree, without_paths
from tiedlora.config.schema import LONGEST_TAG, Config
from tiedlora.errors import Paused, UserError
from tiedlora.records.rows import AppendedFile, MetricsRow, read_metrics
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.scores import ScoreFile, read_scores
from tiedlora.text import shortened, visible

log = logging.getLogger(__name__)

AUTO, NONE, WANDB = "auto", "none", "wandb"
WANDB_SERVER = "https://api.wandb.ai"
LONGEST_REASON = 300
"""The most characters of a tracker's error that are logged."""
LONGEST_TEXT = 2000
"""The most characters of a prompt, a reference or an answer in a table."""
TABLE_SPLITS = ("test", "validation")
"""The split whose answers are shown is the first of these that was scored."""


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
        return f"{arm_of(config).label} r{config.rank.r} {config.task.name} s{config.seed}"

    @property
    def group(self) -> str:
        """The sweep that the run belongs to, or the model and the task of a single run."""
        return self.config.tracking.group or f"{self._model}/{self.config.task.name}"

    @property
    def tags(self) -> list[str]:
        """Words to filter by."""
        config = self.config
        words = [self._model, config.task.name, arm_of(config).label, f"r{config.rank.r}"]
        return [*(word[:LONGEST_TAG] for word in words), *config.tracking.tags]

    def settings(self) -> dict[str, Any]:
        """The configuration as nested plain data without paths of this machine, with the run's id and size."""
        about_run = {"run_id": self.run_id, "trainable_params": self.trainable_params}
        return config_tree(without_paths(self.config)) | about_run

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
        """

    def log(self, rows: Sequence[MetricsRow]) -> None:
        """Write rows of metrics, in the order of their steps."""

    def log_answers(self, answers: Answers) -> None:
        """Write the table `answers`, which has rows, after the last row of metrics and before the end."""

    def finish(self, summary: Mapping[str, float | int], exit_code: int = 0) -> None:
        """Close the run.

        Args:
            summary: the finished run's record as flat keys (records.summary.flat_summary); empty if the run failed or
                is paused.
            exit_code: 1 if the run failed or was stopped.
        """

    def abandon(self) -> None:
        """Close what is open after a failure, so that no dead connection is left for the next run of this process."""
        self.finish({}, exit_code=1)


def backend_of(config: Config) -> str:
    """The tracker's file in this package, or `none`."""
    return _chosen() if config.tracking.backend == AUTO else config.tracking.backend


def check_tracker(config: Config) -> None:
    """Refuse a tracker that tracking= names and that cannot be imported, before anything is loaded.

    Raises:
        UserError: its package is not installed.
    """
    if (backend := config.tracking.backend) not in (AUTO, NONE):
        importlib.import_module(f"tiedlora.tracking.{backend}")


@cache
def _chosen() -> str:
    """What `auto` chooses. It is logged once in a process."""
    if is_logged_in():
        log.info("tracking: W&B, because this machine is logged in (tracking=none switches it off)")
        return WANDB
    log.info("tracking: only metrics.jsonl, because this machine is not logged in to W&B (`wandb login`)")
    return NONE


def is_logged_in() -> bool:
    """Whether W&B would find a key on this machine. The key itself is not kept."""
    if os.environ.get("WANDB_MODE") == "disabled":
        return False
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    # The server that `wandb login --host` has written to W&B's settings.
    settings = configparser.ConfigParser({"base_url": WANDB_SERVER}, default_section="default", interpolation=None)
    # Without a home folder, expanduser raises a RuntimeError.
    with suppress(OSError, ValueError, RuntimeError, configparser.Error):
        settings.read(Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser() / "settings")
    server = os.environ.get("WANDB_BASE_URL") or settings.defaults()["base_url"]
    # The file of keys is the one that NETRC names, ~/.netrc or ~/_netrc, as W&B looks for it, and its name of a server
    # has the port. A file that is missing or damaged holds no key.
    with suppress(OSError, ValueError, RuntimeError, netrc.NetrcParseError):
        usual, windows = Path("~/.netrc").expanduser(), Path("~/_netrc").expanduser()
        path = Path(os.environ.get("NETRC") or (windows if windows.exists() and not usual.exists() else usual))
        return netrc.netrc(path.expanduser()).authenticators(urlsplit(server).netloc) is not None
    return False


class RunTrackers:
    """metrics.jsonl, and the tracker that `tracking.backend` names.

    The first failure of the tracker is one warning; then it gets nothing more.
    """

    def __init__(self, run: TrackedRun, step: int | None) -> None:
        """
        Args:
            step: that of the checkpoint, or None without one. Rows of later steps are dropped, because the run will log
                them again.

        Raises:
            UserError: the package of the tracker that tracking= names is not installed.
        """
        self._folder, self._most_answers = RunFolder(run.folder), run.config.tracking.answers
        self._metrics = AppendedFile(self._folder.metrics_file, read_metrics, step)
        self._tracker: Tracker | None = None
        if (backend := backend_of(run.config)) == NONE:
            return
        try:
            self._tracker = importlib.import_module(f"tiedlora.tracking.{backend}").TRACKER()
        except Exception as error:  # A package that is installed may fail in any way when it is imported.
            if run.config.tracking.backend != AUTO:
                raise
            log.warning("tracking: %s cannot be loaded (%s); the run continues without it", backend, _reason(error))
        self._try(lambda tracker: tracker.start(run, self._metrics.rows))

    def log(self, rows: Sequence[MetricsRow]) -> None:
        """Write rows to metrics.jsonl, and give them to the tracker.

        Raises:
            OSError: the disk is full. The run then ends, because metrics.jsonl is its record.
        """
        self._metrics.append(rows)
        self._try(lambda tracker: tracker.log(rows))

    def finish(self, summary: Mapping[str, float | int]) -> None:
        """Close the tracker of a finished run. It gets a table of the run's first answers."""

        def log_answers(tracker: Tracker) -> None:
            if answers := first_answers(self._folder, self._most_answers):
                tracker.log_answers(answers)

        self._try(log_answers)
        self._try(lambda tracker: tracker.finish(summary))

    @contextmanager
    def closed_on_error(self) -> Iterator[None]:
        """If the block ends with an error, close the tracker. A pause, as a staged sweep makes it, is no failure."""
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
            log.warning(
                "%s has failed (%s); the run continues without it, and metrics.jsonl has every row",
                tracker.title,
                _reason(error),
            )
            with suppress(Exception):
                tracker.abandon()


def _reason(error: Exception) -> str:
    """The error in one line of a log."""
    return visible(" ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_REASON])


def first_answers(folder: RunFolder, most: int) -> Answers:
    """Prompt, references, the base model's answer, the adapted model's, and its scores, of the first `most` rows."""
    for split in TABLE_SPLITS if most else ():
        if (found := _answers(folder.scores_file(split, "answers"))) is not None:
            rows, base_file = found.rows[:most], folder.base_scores_file(found.record.base)
            of_base = _answers(base_file)
            base = {row.id: row.output for row in of_base.rows} if of_base is not None else {}
            metrics = [name for name, score in rows[0].scores.items() if not isinstance(score, list)]
            return [
                {
                    "split": split,
                    "row": shortened(row.id, LONGEST_TEXT),
                    "prompt": shortened(row.prompt, LONGEST_TEXT),
                    "references": shortened(" | ".join(row.references), LONGEST_TEXT),
                    **({"base": shortened(base.get(row.id, ""), LONGEST_TEXT)} if base else {}),
                    "answer": shortened(row.output, LONGEST_TEXT),
                    **{metric: cast(float | None, row.scores.get(metric)) for metric in metrics},
                }
                for row in rows
            ]
    return []


def _answers(path: Path) -> ScoreFile | None:
    """A file of scored answers; None if it is missing or damaged."""
    try:
        return read_scores(path)
    except UserError:
        return None

"""One run's folder: the places of its files, its state, and the lock against a second process."""

from __future__ import annotations

import fcntl
import os
import shutil
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from filelock import Timeout

from tiedlora import storage
from tiedlora.errors import LONGEST_MESSAGE, UserError
from tiedlora.records.run_record import RunRecord, read_record
from tiedlora.text import visible

LOCK_PATIENCE_SECONDS = 0.5
"""How long to wait for a run's lock. A process that only reads the run's state also holds the lock for a moment."""
LOOK_SECONDS = 0.06
"""How long `state` waits for another process that only reads the state. filelock tries again after 0.05 s."""
DIVERGED = "tiedlora.errors.Diverged:"
"""How the last line of error.txt begins if a loss was not finite."""
BASE = "base"
"""The folder beside the runs with the base model's scores."""
LONGEST_TAIL = 2**16
"""Most bytes of a text file that are read for its last line."""


class State(StrEnum):
    """The state of a run. The last two are decisions of a sweep, and in no file of the run."""

    DONE = "done"
    RUNNING = "running"
    PAUSED = "paused"
    """It has a checkpoint at the step where its launch pauses it."""
    PRUNED = "pruned"
    """A search has stopped it for the reason in pruned.txt. Its checkpoint stays, until it continues."""
    INTERRUPTED = "interrupted"
    FAILED = "failed"
    MISSING = "missing"
    DROPPED = "dropped"
    """A person has taken it out of the sweep (sweeps/cells.py), and it is not done."""
    UNNEEDED = "unneeded"
    """A search has chosen the rate without it."""


@dataclass(frozen=True, order=True)
class RunName:
    """What tables call a run. Runs that differ in another value have the same name."""

    model: str
    """The last part of the base model's name."""
    task: str
    configuration: str
    """The tying's name, such as LoRA or TABuv."""
    rank: int
    lr: float
    seed: int

    @property
    def group(self) -> str:
        """What runs share that differ in rate and seed, in words."""
        return f"{self.configuration} r={self.rank} on {self.task}, {self.model}"


class Busy(UserError):
    """Another process is working on the run."""


class RunFolder:
    """One run's folder. Its files are written atomically or appended to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.result_file = path / "result.json"
        self.metrics_file = path / "metrics.jsonl"
        self.validation_losses_file = path / "validation_losses.jsonl"
        self.config_file = path / "config.yaml"
        self.error_file = path / "error.txt"
        self.pruned_file = path / "pruned.txt"
        self.adapter = path / "adapter"
        self.checkpoints = path / "checkpoint"

    @property
    def has_adapter(self) -> bool:
        """Whether the adapter is here. A study may keep its sha256 alone."""
        return self.adapter.is_dir()

    @property
    def scores(self) -> Path:
        """The folder of its scores (records/scores.py)."""
        return self.path / "scores"

    def scores_file(self, split: str, kind: str) -> Path:
        """scores/<split>.<kind>.jsonl."""
        return self.scores / f"{split}.{kind}.jsonl"

    def base_scores_file(self, name: str) -> Path:
        """The file of the base model's scores, which all runs in the same folder share."""
        return self.path.parent / BASE / f"{name}.jsonl"

    def checksums(self, *patterns: str) -> dict[str, str]:
        """Path inside the folder -> sha256, for the files that match."""
        paths = sorted(path for pattern in patterns for path in self.path.glob(pattern))
        return {path.relative_to(self.path).as_posix(): storage.sha256(path) for path in paths}

    def record(self) -> RunRecord | None:
        """The record of a finished run; None if there is no result.json.

        Raises:
            UserError: result.json exists and is not a run's record.
        """
        return read_record(self.result_file) if self.result_file.exists() else None

    def finished_record(self) -> RunRecord:
        """The record of a finished run.

        Raises:
            UserError: the run is not finished, or its result.json is not a run's record.
        """
        record = self.record()
        if record is None and not self.path.is_dir():
            raise UserError(f"{self.path}: no such folder; give a run's folder, such as outputs/TABuv-r8-...")
        if record is None and not self.config_file.exists():
            raise UserError(f"{self.path}: is not a run's folder (it has no config.yaml); give a run")
        if record is None:
            raise UserError(f"{self.path}: has no result.json, so the run is not finished; run its command again")
        return record

    def write_record(self, record: RunRecord) -> None:
        """Write result.json, completely or not at all.

        Raises:
            OSError: the disk is full, or there is no permission.
        """
        storage.write_json(self.result_file, record.to_json())

    def state(self, is_scored: bool = True, pause_after: int | None = None, patience: float = LOOK_SECONDS) -> State:
        """The state of the run, from the files and the lock, which is held for a moment.

        Args:
            is_scored: whether a finished run has all scores that are wanted. One that lacks some is not done.
            pause_after: the step at which a run counts as paused.
            patience: how many seconds to wait for another reader. It costs 0.1 s for each run that is going.
        """
        if is_scored and self.result_file.exists():
            return State.DONE
        if not self.path.exists():
            return State.MISSING
        try:
            with self.locked(patience):
                return self._state_at_rest(is_scored, pause_after)
        except Busy:
            return State.RUNNING
        except OSError:
            # A read-only archive, or another user's folder, in which a run may go on.
            if self._is_held():
                return State.RUNNING
            return State.FAILED if self.error_file.exists() else State.INTERRUPTED

    def _state_at_rest(self, is_scored: bool, pause_after: int | None) -> State:
        """The state while this process holds the lock."""
        has_result = self.result_file.exists()
        # Asked again under the lock, because another process may have finished the run in between.
        if is_scored and has_result:
            return State.DONE
        if self.error_file.exists():
            return State.FAILED
        if not has_result and pause_after is not None and self.checkpoint_step() >= pause_after:
            return State.PAUSED
        return State.PRUNED if self.pruned_file.exists() and not has_result else State.INTERRUPTED

    def _is_held(self) -> bool:
        """Whether a process holds the lock, for a user who cannot write it."""
        try:
            with open(self.path / ".lock", "rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return isinstance(error, BlockingIOError)
        return False

    def checkpoint_step(self) -> int:
        """The step of the newest checkpoint; 0 without one."""
        return max((int(path.name.removeprefix("step-")) for path in self.checkpoints.glob("step-*[0-9]")), default=0)

    def error(self) -> str:
        """Why the run failed, in one line; empty without an error."""
        return visible(last_line(self.error_file).removeprefix("tiedlora.errors.")[:LONGEST_MESSAGE])

    def diverged(self) -> bool:
        """Whether the run failed because a loss was not finite."""
        return last_line(self.error_file).startswith(DIVERGED)

    @contextmanager
    def locked(self, patience: float = LOCK_PATIENCE_SECONDS) -> Iterator[None]:
        """Hold the run's lock, so that no second process works in the folder. The lock ends with its process.

        Raises:
            Busy: another process still holds the lock after `patience` seconds.
            UserError, OSError: the file system has no locks, or the folder cannot be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            try:
                held.enter_context(storage.locked(self.path / ".lock", patience))
            except Timeout:
                raise Busy(f"{self.path}: another process is working on this run; wait for it or stop it") from None
            yield

    def clear(self) -> None:
        """Remove all files except the lock, for a run that starts again.

        The result is removed first. So a kill in between cannot leave a run that looks finished and lacks files.
        """
        self.result_file.unlink(missing_ok=True)
        for entry in self.path.iterdir():
            if entry.name != ".lock":
                _remove(entry)

    def tidy(self) -> None:
        """Remove what a killed process has left: incomplete files, and the checkpoints of a finished run."""
        for entry in [*self.path.glob(".*.tmp"), *self.path.glob("*/.*.tmp")]:
            _remove(entry)
        if self.result_file.exists():
            shutil.rmtree(self.checkpoints, ignore_errors=True)

    def write_error(self) -> bool:
        """Write the traceback of the present exception to error.txt. False if the folder cannot be written to."""
        # A second error (such as a full disk) would hide the first one.
        with suppress(OSError):
            storage.write_bytes(self.error_file, traceback.format_exc().encode("utf-8", "replace"))
            return True
        return False


def last_line(path: Path) -> str:
    """The last line of a text file; empty if there is no file, and `<name> is empty` for an empty one.

    A symbolic link gives nothing, because its target may not belong to the run. Nor does a pipe, which may never end.
    """
    try:
        if path.is_symlink() or not path.is_file():
            return ""
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - LONGEST_TAIL))
            lines = file.read(LONGEST_TAIL).decode("utf-8", "replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1] if lines else f"{path.name} is empty"


def _remove(entry: Path) -> None:
    """Remove a file, a folder, or a link (but not the link's target)."""
    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()

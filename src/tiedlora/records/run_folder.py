"""One run's folder: where its files are, its state, and the lock that keeps a second process out."""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from tiedlora import storage
from tiedlora.errors import UserError
from tiedlora.records.run_record import RunRecord, read_record

LOCK_PATIENCE_SECONDS = 0.5
"""How long to wait for a run's lock: a process that asks for a state holds it for a moment."""


class Busy(UserError):
    """Another process is working on the run."""


class RunFolder:
    """One run's folder. Everything it holds is written atomically or appended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.result_file = path / "result.json"
        self.metrics_file = path / "metrics.jsonl"
        self.config_file = path / "config.yaml"
        self.error_file = path / "error.txt"
        self.adapter = path / "adapter"
        self.checkpoints = path / "checkpoint"

    def predictions_file(self, split: str) -> Path:
        """predictions/<split>.jsonl, one row an example."""
        return self.path / "predictions" / f"{split}.jsonl"

    def checksums(self, *patterns: str) -> dict[str, str]:
        """sha256 of the files that match, by their names inside the folder."""
        paths = sorted(path for pattern in patterns for path in self.path.glob(pattern))
        return {path.relative_to(self.path).as_posix(): storage.sha256(path) for path in paths}

    def prediction_checksums(self, split: str) -> dict[str, str]:
        """Of the split's predictions, and the base model's."""
        return self.checksums(f"predictions/{split}.jsonl", f"predictions/{split}.base.jsonl")

    def record(self) -> RunRecord | None:
        """The record of a finished run; None where there is no result.json.

        Raises:
            UserError: result.json is there and is not a run's record.
        """
        return read_record(self.result_file) if self.result_file.exists() else None

    def finished_record(self) -> RunRecord:
        """The record of a finished run.

        Raises:
            UserError: the run is not finished, or its result.json is not a run's record.
        """
        record = self.record()
        if record is None:
            raise UserError(f"{self.path}: has no result.json, so the run is not finished; run its command again")
        return record

    def write_record(self, record: RunRecord) -> None:
        """Write result.json, whole or not at all. Keys that another version of the code put there stay."""
        kept = storage.read_json(self.result_file) if self.result_file.exists() else {}
        storage.write_json(self.result_file, {**kept, **record.to_json()})

    def state(self) -> str:
        """missing, done, failed, running or interrupted: derived from the files and the lock."""
        if self.result_file.exists():
            return "done"
        if not self.path.exists():
            return "missing"
        try:
            with self.locked(patience=0):
                # Asked again now that nobody can be in the middle of finishing it.
                if self.result_file.exists():
                    return "done"
                return "failed" if self.error_file.exists() else "interrupted"
        except Busy:
            return "running"

    @contextmanager
    def locked(self, patience: float = LOCK_PATIENCE_SECONDS) -> Iterator[None]:
        """Hold the run, so that no second process works in the folder. The lock dies with its owner.

        Raises:
            Busy: another process holds it, for longer than `patience` seconds.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=patience)
        except Timeout:
            raise Busy(f"{self.path}: another process is working on this run; wait for it or stop it") from None
        try:
            yield
        finally:
            lock.release()

    def clear(self) -> None:
        """Forget everything but the lock, for a run that starts over: the result first, so that a kill
        in the middle cannot leave a run that looks finished and lacks its files."""
        self.result_file.unlink(missing_ok=True)
        for entry in self.path.iterdir():
            if entry.name != ".lock":
                _remove(entry)

    def tidy(self) -> None:
        """Remove what a killed process left behind: half-written files, and a finished run's checkpoints."""
        for entry in [*self.path.glob(".*.tmp"), *self.path.glob("*/.*.tmp")]:
            _remove(entry)
        if self.result_file.exists():
            shutil.rmtree(self.checkpoints, ignore_errors=True)

    def write_error(self) -> None:
        """Leave the traceback of the exception being handled in the folder, if anything can be written there."""
        # A second error, of a full disk perhaps, would hide the first.
        with suppress(OSError):
            storage.write_bytes(self.error_file, traceback.format_exc().encode("utf-8", "replace"))


def _remove(entry: Path) -> None:
    """A file, a folder, or a link: never what the link leads to."""
    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()

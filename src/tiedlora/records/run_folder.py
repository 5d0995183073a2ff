"""A run's identity, its folder and state, and the facts that its record holds.

Identity is meaning: the hash of every resolved value that changes the result. Facts of execution
(device, microbatch, paths, tracking) are recorded and not hashed, so the same configuration is the
same folder however and wherever it was started.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tiedlora import storage, tying
from tiedlora.config.compose import PROJECT
from tiedlora.config.schema import Config
from tiedlora.errors import UserError
from tiedlora.records import run_record

IDENTITY_VERSION = 1
"""Raise it when the meaning of a configuration changes without a key changing: every run is then new."""
PATIENCE = 0.5
"""Seconds to wait for a run's lock: whoever asks for a state holds it for a moment."""
PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "datasets",
    "evaluate",
    "sacrebleu",
    "rouge-score",
    "reasoning-gym",
    "hydra-core",
    "scipy",
    "tiedlora",
)


class Busy(UserError):
    """Another process is working on the run."""


def identity(config: Any) -> dict[str, Any]:
    """The values that change the result, as nested plain data.

    A field is left out if it is a fact of execution, or at its `neutral` value (see schema.py).
    """
    kept: dict[str, Any] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        if item.metadata.get("execution") or ("neutral" in item.metadata and value == item.metadata["neutral"]):
            continue
        kept[item.name] = identity(value) if is_dataclass(value) else value
    return kept


def run_id(config: Config) -> str:
    """`TABuv-r8-chain_sum-smollm2-...-s0-1a2b3c4d5e`: readable, and decided by the identity alone."""
    meaning = json.dumps([IDENTITY_VERSION, identity(config)], sort_keys=True, separators=(",", ":"), allow_nan=False)
    digest = hashlib.sha256(meaning.encode()).hexdigest()[:10]
    model = config.model.name.rsplit("/", 1)[-1].lower()
    words = [tying.label(config.tying), f"r{config.rank.r}", config.task.name, model, f"s{config.seed}", digest]
    return "-".join(re.sub(r"[^A-Za-z0-9._]+", "_", word) for word in words)


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
        found = sorted(path for pattern in patterns for path in self.path.glob(pattern))
        return {path.relative_to(self.path).as_posix(): storage.sha256(path) for path in found}

    def prediction_checksums(self, split: str) -> dict[str, str]:
        """Of the split's predictions, and the base model's."""
        return self.checksums(f"predictions/{split}.jsonl", f"predictions/{split}.base.jsonl")

    def result(self) -> dict[str, Any] | None:
        """The record of a finished run, or None."""
        return run_record.read_result(self.result_file) if self.result_file.exists() else None

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
    def locked(self, patience: float = PATIENCE) -> Iterator[None]:
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


def code() -> dict[str, Any]:
    """The commit of this checkout and whether it has changes; nulls outside a git checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(PROJECT), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def versions() -> dict[str, str]:
    """Installed versions of the packages a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def config_record(config: Config) -> dict[str, Any]:
    """The whole resolved configuration as plain data."""
    return asdict(config)

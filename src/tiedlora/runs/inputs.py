"""The inputs of a run: the rows of train and validation, and the digests of rows and base model.

Consecutive runs of one process use the same rows, token ids and base model, so a process keeps the last of each.
"""

from __future__ import annotations

import gc
import importlib.metadata
import inspect
import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from tiedlora import storage, tasks
from tiedlora.config.identity import identity
from tiedlora.config.schema import Config
from tiedlora.config.task_rows import rows_folder
from tiedlora.errors import UserError
from tiedlora.models.identity import known_digest, tokens_digest
from tiedlora.reading import typed
from tiedlora.records.provenance import TOKEN_FILES
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.run_record import RunRecord
from tiedlora.records.scores import read_run_scores
from tiedlora.tasks import Example, Task, digest, load_examples, load_task

log = logging.getLogger(__name__)

T = TypeVar("T")
TASKS_CODE = Path(tasks.__file__).parent


class SingleSlotCache(Generic[T]):
    """Keeps the last value, and returns it again for the same key.

    There is only one value. A sweep groups its cells by model and task, so more are not needed, and two base models
    might not fit on a device.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[object, T]] = []

    def get(self, key: object, make: Callable[[], T]) -> T:
        """The value of `key`. The value of another key is dropped before the new one is made."""
        if not self._kept or self._kept[0][0] != key:
            self.clear()
            self._kept.append((key, make()))
        return self._kept[0][1]

    def clear(self) -> None:
        """Drop the value and its reference cycles, so that the memory is free before a new value is made."""
        self._kept.clear()
        gc.collect()


@dataclass(frozen=True)
class RunRows:
    """The examples of train and of validation, and the digest of each."""

    examples: dict[str, list[Example]]
    digests: dict[str, str]


_ROWS: SingleSlotCache[RunRows] = SingleSlotCache()
_TEST_DIGEST: SingleSlotCache[str] = SingleSlotCache()


def read_rows(config: Config) -> RunRows:
    """The rows for training and validation. Consecutive runs on the same rows in one process read them only once.

    Raises:
        UserError: the rows cannot be read, or a validation prompt is also a training prompt.
    """
    task = load_task(config.task)
    rows = _ROWS.get((config.task, config.data_root, _local_files(config)), lambda: _read_rows(config, task))
    path = _digests_file(config, task)
    if path is not None and not path.exists():
        # The cache may be read-only or full: then the digests are computed again next time.
        with suppress(OSError):
            storage.write_json(path, rows.digests)
    return rows


def _read_rows(config: Config, task: Task) -> RunRows:
    examples = {split: load_examples(task, split, config.data_root) for split in ("train", "validation")}
    if said := shared_rows(examples["train"], examples["validation"], "validation"):
        raise UserError(f"task={task.config.name}: {said}; remove them from one of the two splits")
    return RunRows(examples, {split: digest(rows) for split, rows in examples.items()})


def warn_of_trained_rows(task: str, train: Iterable[Example], scored: Iterable[Example]) -> None:
    """Log how many test rows are also training rows. They are scored all the same: a task's published rows are kept."""
    if said := shared_rows(train, scored, "test"):
        log.warning("task=%s: %s, so their scores count what was trained", task, said)


def shared_rows(train: Iterable[Example], scored: Iterable[Example], split: str) -> str:
    """A sentence that says how many of the scored rows have the prompt of a training row; empty if none has."""
    trained = {example.prompt for example in train}
    shared = [example.id for example in scored if example.prompt in trained]
    return f"{len(shared)} {split} rows are also training rows (such as id {shared[0]})" if shared else ""


def row_digests(config: Config) -> dict[str, str]:
    """Split -> the digest of its rows, train and validation.

    Rows that a task generates depend on its configuration, its code and its generator alone. So their digests are kept
    in the cache under these three, and a finished run is printed without generating the rows again.

    Raises:
        UserError: as read_rows.
    """
    path = _digests_file(config, load_task(config.task))
    if path is not None and path.exists():
        with suppress(UserError):
            return typed(dict[str, str], storage.read_json(path))
    return read_rows(config).digests


def _digests_file(config: Config, task: Task) -> Path | None:
    """Where the digests of generated rows are kept; None for rows that are read."""
    if not task.generator:
        return None
    # A registered task is in a file of its own.
    files = {*TASKS_CODE.glob("*.py"), Path(inspect.getfile(type(task)))}
    code = [storage.sha256(file) for file in sorted(files)]
    key = [identity(config.task), importlib.metadata.version(task.generator), code]
    return Path(config.cache) / "digests" / f"{storage.json_sha256(key)[:24]}.json"


def _local_files(config: Config) -> list[tuple[str, int, int]]:
    """Name, size and time of the task's local files, so that a changed file is read again."""
    if config.data_root is None:
        return []
    folder = rows_folder(config.task, Path(config.data_root))
    files = [file for file in sorted(folder.glob("*.jsonl")) if file.is_file()]
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def check_same_inputs(config: Config, record: RunRecord, folder: RunFolder) -> None:
    """Refuse a finished run of the same configuration if its data or its base model were others.

    Raises:
        UserError: something has changed; the message names it.
    """
    if record.run_id != folder.path.name:
        raise UserError(
            f"{folder.result_file}: is the result of another run, {record.run_id}; restore this run's own, or "
            "repeat the run with force=true"
        )
    digests = {f"{split} data": (record.data[split].digest, now) for split, now in row_digests(config).items()}
    scored = read_run_scores(folder).of("test") if "test" in config.score.splits else []
    if scored and not (task := load_task(config.task)).generator:
        key = (config.task, config.data_root, _local_files(config))
        now = _TEST_DIGEST.get(key, lambda: digest(load_examples(task, "test", config.data_root)))
        digests["test data"] = (scored[0].digest, now)
    digests["weights of the base model"] = (
        record.base.digest or "",
        known_digest(config.model, Path(config.cache)) or "",
    )
    if (recorded := record.versions.get(TOKEN_FILES)) is not None:
        token_files = tokens_digest(config.model, config.task.chat_template, Path(config.cache)) or ""
        digests["files of the tokenizer or the chat template"] = (recorded, token_files)
    for what, (recorded, now) in digests.items():
        # The commit of a model of the hub is known once it is loaded.
        if now and now != recorded:
            raise UserError(
                f"{folder.path}: finished on other {what} ({recorded}, now {now}); restore it, or repeat the run with "
                "force=true"
            )

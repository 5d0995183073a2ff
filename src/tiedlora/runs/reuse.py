"""What one run leaves in memory for the next of the same process: the base model, the rows, their tokens."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiedlora.config.schema import Config
from tiedlora.errors import UserError
from tiedlora.tasks import Example, digest, load_examples, load_task

if TYPE_CHECKING:
    from tiedlora.models.base_model import Base

Rows = tuple[dict[str, list[Example]], dict[str, str]]
"""Examples and digest of train and validation."""


class Latest:
    """The value made last, kept for whoever asks for the same key again.

    One value and no more: a sweep visits its cells grouped by model and task, and two base models
    would not fit on a device that one fills.
    """

    def __init__(self) -> None:
        self._key: Any = None
        self._value: Any = None

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        """The value of `key`; another key's value is dropped before the new one is made."""
        if self._value is None or key != self._key:
            self.forget()
            self._value, self._key = make(), key
        return self._value

    def forget(self) -> None:
        """Drop the value, cycles and all, so that its memory is free before more is asked for."""
        self._key = self._value = None
        gc.collect()


TOKENS = Latest()
"""The encoded rows; data.py makes them."""
_BASE, _ROWS = Latest(), Latest()


def base(config: Config, device: Any) -> Base:
    """The base model of a configuration. An adapter must be detached from it when it is done with.

    Raises:
        UserError: as models.load_base.
    """
    from tiedlora.models.base_model import load_base

    key = (config.model, config.train.dtype, device)
    loaded: Base = _BASE.get(key, lambda: load_base(config.model, config.train.dtype, device, Path(config.cache)))
    return loaded


def rows(config: Config) -> Rows:
    """The examples of train and validation, and their digests.

    Raises:
        UserError: the rows cannot be had, or a validation prompt is also trained on.
    """

    def make() -> Rows:
        task = load_task(config.task)
        found = {split: load_examples(task, split, config.data_root) for split in ("train", "validation")}
        _disjoint(found)
        return found, {split: digest(examples) for split, examples in found.items()}

    made: Rows = _ROWS.get((config.task, config.data_root, _files(config)), make)
    return made


def _files(config: Config) -> list[tuple[str, int, int]]:
    """Name, size and time of the task's local files: rows of a file that has changed are read again."""
    if config.data_root is None:
        return []
    folder = Path(config.data_root) / (config.task.folder or config.task.name)
    return [
        (file.name, (s := file.stat()).st_size, s.st_mtime_ns)
        for file in sorted(folder.glob("*.jsonl"))
        if file.is_file()
    ]


def _disjoint(examples: dict[str, list[Example]]) -> None:
    """No prompt that is scored may be trained on."""
    trained = {example.prompt for example in examples["train"]}
    if shared := [example.id for example in examples["validation"] if example.prompt in trained]:
        raise UserError(f"task: {len(shared)} validation rows are also training rows (such as id {shared[0]})")

"""Rows from local JSON Lines files or from the hub, each with the place where it was read."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiedlora import storage
from tiedlora.config.schema import TaskConfig
from tiedlora.errors import UserError


class RowError(ValueError):
    """A row is wrong. The code that reads the rows adds the row's place to the message."""


class NoSuchSplit(UserError):
    """The task has no such split here."""


@dataclass(frozen=True)
class DataRow:
    """One row of a data set."""

    where: str
    """The place of the row: `FILE:LINE`, or a split of the hub and a number."""
    fields: dict[str, Any]
    """The fields by name. They come from JSON, so a task checks every field that it uses (Task.fields)."""

    def __getitem__(self, name: str) -> Any:
        """The value of a field. `render` and `Task.fields` report a missing field."""
        return self.fields[name]

    def with_fields(self, **changes: Any) -> DataRow:
        """The row with other values of some fields."""
        return DataRow(self.where, {**self.fields, **changes})


def rows_folder(config: TaskConfig, data_root: Path) -> Path:
    """The task's folder below data_root."""
    return data_root / (config.folder or config.name)


def read_json_lines(path: Path) -> list[DataRow]:
    """Rows of a UTF-8 JSON Lines file; blank lines are skipped.

    The byte order mark that editors on Windows write is no part of a row. It stands at the start of a file, and inside
    one that was joined from several.

    Raises:
        UserError: a line is not UTF-8, not JSON or not an object; the message names the line.
    """
    rows = []
    for number, line in enumerate(storage.read_bytes(path).split(b"\n"), start=1):
        line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            fields = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: is not UTF-8 (byte {error.start}); save the file as UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: is not valid JSON ({error}); correct or remove the line") from None
        if not isinstance(fields, dict):
            raise UserError(f"{where}: must be a JSON object, not {type(fields).__name__}")
        rows.append(DataRow(where, fields))
    if not rows:
        raise UserError(f"{path}: holds no rows")
    return rows


@contextmanager
def hub_errors(config: TaskConfig, split: str) -> Iterator[str]:
    """Yield the hub's name of a split, and turn an error of the hub into one line that says how to get the rows.

    Raises:
        UserError: the task has no such split on the hub, or the block could not load it.
    """
    import datasets  # takes more than a second, and rows from a folder do not need it  # noqa: PLC0415

    datasets.disable_progress_bars()
    hub = config.hub
    if not hub.id or split not in hub.splits:
        raise NoSuchSplit(f"task={config.name}: the hub has no {split} split of it. {ways_to_get(config)}")
    try:
        yield hub.splits[split]
    # All errors of huggingface_hub and datasets for an unreachable hub or a missing file derive from these.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"task={config.name}: {hub.id} cannot be loaded ({reason}). {ways_to_get(config)}") from None


def ways_to_get(config: TaskConfig) -> str:
    """The end of a message about rows that are not there."""
    name = config.folder or config.name
    splits = "{train,test}" if config.validation_from_train else "{train,validation,test}"
    return (
        f"Three ways to get it: reach the hub ({config.hub.id or 'it is not there'}); or, where the hub is in reach, "
        f"`python scripts/fetch_data.py task={config.name} data_root=FOLDER`, and copy FOLDER here; or put "
        f"{name}/{splits}.jsonl with the hub's field names in your FOLDER. Then data_root=FOLDER "
        "or TIEDLORA_DATA=FOLDER"
    )

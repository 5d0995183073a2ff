"""Rows from local JSON Lines files or from the hub, each with the place it came from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiedlora import storage
from tiedlora.config.schema import TaskConfig
from tiedlora.errors import UserError

LONGEST_LINE = 2**22
"""Bytes of a row: about a million tokens, more than a model attends to."""


class RowError(ValueError):
    """What is wrong with a row; the caller adds where it is."""


@dataclass(frozen=True)
class Row:
    """One row and the place to look when it is wrong."""

    where: str
    fields: dict[str, Any]


def from_folder(config: TaskConfig, split: str, data_root: Path) -> list[Row]:
    """All rows of a split from data_root/<task>/<split>.jsonl.

    Raises:
        UserError: the file is missing (with the ways to get it), or a line is not a JSON object.
    """
    path = folder(config, data_root) / f"{split}.jsonl"
    if not path.exists():
        raise UserError(f"{path}: no such file. {_ways(config)}")
    return read_json_lines(path)


def folder(config: TaskConfig, data_root: Path) -> Path:
    """Where a task's files are below data_root."""
    return data_root / (config.folder or config.name)


def read_json_lines(path: Path) -> list[Row]:
    """Rows of a UTF-8 JSON Lines file; blank lines are passed over.

    Raises:
        UserError: naming the line that is not UTF-8, not JSON, or not an object.
    """
    rows = []
    for number, line in enumerate(storage.read_bytes(path).split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        if len(line) > LONGEST_LINE:
            raise UserError(
                f"{where}: has {len(line):,} bytes, at most {LONGEST_LINE:,} are read; is a line feed missing?"
            )
        try:
            fields = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: is not UTF-8 (byte {error.start}); save the file as UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: is not valid JSON ({error}); mend or remove the line") from None
        if not isinstance(fields, dict):
            raise UserError(f"{where}: must be a JSON object, not {type(fields).__name__}")
        rows.append(Row(where, fields))
    if not rows:
        raise UserError(f"{path}: holds no rows")
    return rows


def from_hub(config: TaskConfig, split: str) -> list[Row]:
    """All rows of a split from the hub's data set of that id.

    Raises:
        UserError: the hub cannot be reached or has no such split, with the ways to get the rows.
    """
    hub = config.hub
    with hub_errors(config, split) as name:
        import datasets

        table = datasets.load_dataset(hub.id, hub.subset, split=name, revision=hub.revision)
    return [Row(f"{hub.id}[{name}] row {i}", dict(row)) for i, row in enumerate(table)]


@contextmanager
def hub_errors(config: TaskConfig, split: str) -> Iterator[str]:
    """Give the hub's name of a split, and turn what goes wrong on the way there into one line."""
    import datasets  # costs a second, and only this path needs it

    datasets.disable_progress_bars()
    hub = config.hub
    if not hub.id or split not in hub.splits:
        raise UserError(f"task={config.name}: the hub has no {split} split of it. {_ways(config)}")
    try:
        yield hub.splits[split]
    # What huggingface_hub and datasets raise for a hub that is absent, offline or without the file derives from these.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"task={config.name}: {hub.id} cannot be loaded ({reason}). {_ways(config)}") from None


def _ways(config: TaskConfig) -> str:
    name = config.folder or config.name
    return (
        f"Three ways to get it: reach the hub ({config.hub.id or 'it is not there'}); or, where the hub is in reach, "
        f"`python scripts/fetch_data.py task={config.name} data_root=FOLDER`, and copy FOLDER here; or put "
        f"{name}/{{train,validation,test}}.jsonl with the hub's field names in your FOLDER. Then data_root=FOLDER "
        "or TIEDLORA_DATA=FOLDER"
    )

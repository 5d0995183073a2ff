"""Rows from local JSON Lines files or from the hub, each with the place it came from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiedlora.config import TaskConfig
from tiedlora.errors import UserError


class RowError(ValueError):
    """What is wrong with a row; the caller adds where it is."""


@dataclass(frozen=True)
class Row:
    """One row and the place to look when it is wrong."""

    where: str
    fields: dict[str, Any]


def read_rows(config: TaskConfig, split: str, data_root: str | None) -> list[Row]:
    """All rows of a split: from data_root if it is set, else from the hub.

    Raises:
        UserError: the source is missing (with the ways to get it), or a line is not a JSON object.
    """
    if data_root is None:
        return _from_hub(config, split)
    path = Path(data_root) / (config.folder or config.name) / f"{split}.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file. {_ways(config)}")
    return read_json_lines(path)


def read_json_lines(path: Path) -> list[Row]:
    """Rows of a UTF-8 JSON Lines file; blank lines are passed over.

    Raises:
        UserError: naming the line that is not UTF-8, not JSON, or not an object.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
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


def _from_hub(config: TaskConfig, split: str) -> list[Row]:
    hub = config.hub
    if not hub.id or split not in hub.splits:
        raise UserError(f"task={config.name}: the hub has no {split} split of it. {_ways(config)}")
    import datasets  # costs a second, and only this path needs it

    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(hub.id, hub.subset, split=hub.splits[split], revision=hub.revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"task={config.name}: {hub.id} cannot be loaded ({reason}). {_ways(config)}") from None
    return [Row(f"{hub.id}[{hub.splits[split]}] row {i}", dict(row)) for i, row in enumerate(table)]


def _ways(config: TaskConfig) -> str:
    folder = config.folder or config.name
    return (
        f"Three ways to get it: run once on a machine that reaches the hub ({config.hub.id or 'not there'}); "
        f"or put {folder}/{{train,validation,test}}.jsonl with the hub's field names in a folder and give "
        "data_root=FOLDER; or set TIEDLORA_DATA=FOLDER once for all runs"
    )

"""python scripts/fetch_data.py task=gsm8k data_root=FOLDER: download a task's rows from the hub into local files.

It writes FOLDER/<task>/<split>.jsonl for every split that the hub has, with the hub's field names. Then a machine
without internet can run `train.py task=... data_root=FOLDER`. It takes the overrides of train.py, such as
task.hub.revision=COMMIT for a fixed version of the rows. A file with other rows is never replaced.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiedlora import storage
from tiedlora.commands.parser import Parser, filled
from tiedlora.config import compose
from tiedlora.config.schema import Split
from tiedlora.config.task_rows import rows_folder
from tiedlora.errors import UserError
from tiedlora.keys import from_person
from tiedlora.tasks import load_task


@dataclass(frozen=True)
class ListedRows:
    """A file of studies/rows: the rows that the studies of a task have, in their order."""

    task: str
    field: str
    """The field of a row whose hash names it."""
    splits: dict[Split, list[str]]
    """Split -> the names of its rows (row_name)."""


def main(arguments: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("words", nargs="*", help="as for train.py")
    parser.add_argument(
        "--rows", type=filled("--rows", Path), help="only the rows of this file of studies/rows, in its order"
    )
    asked = parser.parse_intermixed_args(arguments)
    config = compose.compose_config(asked.words)
    if config.data_root is None:
        raise UserError("data_root: has no value; give the folder to write to, as in data_root=data")
    task, folder = load_task(config.task), rows_folder(config.task, Path(config.data_root))
    if not config.task.hub.id and task.reads_own_rows:
        raise UserError("task.hub.id: names no data set of the hub; give one, as in task.hub.id=ORG/NAME")
    if not config.task.hub.id:
        raise UserError(f"task={config.task.name}: makes its own rows, so there is nothing to fetch")
    listed = from_person(ListedRows, storage.read_json(asked.rows), prefix=f"{asked.rows}: ") if asked.rows else None
    if listed and listed.task != config.task.name:
        raise UserError(f"--rows {asked.rows}: has rows of task={listed.task}, not of {config.task.name}")
    splits = {split: [row.fields for row in task.hub_rows(split)] for split in task.hub_splits()}
    wanted = studied_rows(listed, splits) if listed else splits
    # Of a field that is no JSON, such as a time, the text is kept.
    rows = {
        folder / f"{split}.jsonl": [
            json.loads(json.dumps(row, default=str), parse_constant=lambda _: None) for row in found
        ]
        for split, found in wanted.items()
    }
    contents = {path: storage.json_lines_bytes(own) for path, own in rows.items()}
    # Without data_root= it is the folder of TIEDLORA_DATA, whose rows may be those of finished runs.
    if other := next((path for path in rows if path.exists() and storage.read_bytes(path) != contents[path]), None):
        raise UserError(f"{other}: is there with other rows; remove it, or give another folder with data_root=FOLDER")
    for path, content in contents.items():
        storage.write_changed(path, content)
        print(f"{path}: {len(rows[path]):,} rows")


def studied_rows(listed: ListedRows, hub: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Split -> the listed rows. They may be in other splits of the hub.

    Raises:
        UserError: a row is not on the hub, or the hub's rows have no such field.
    """
    names_of_fields = next((list(row) for rows in hub.values() for row in rows), [])
    if listed.field not in names_of_fields:
        known = ", ".join(names_of_fields)
        raise UserError(f"--rows: the hub's rows have no field {listed.field!r:.80}; they have {known}")
    found = {row_name(fields[listed.field]): fields for rows in hub.values() for fields in rows}
    for split, names in listed.splits.items():
        if missing := [name for name in names if name not in found]:
            raise UserError(f"--rows: {len(missing):,} of the {len(names):,} rows of {split} are not on the hub")
    return {split: [found[name] for name in names] for split, names in listed.splits.items()}


def row_name(field: str) -> str:
    """How studies/rows names a row: by the start of the sha256 of one of its fields."""
    return hashlib.sha256(field.encode()).hexdigest()[:12]

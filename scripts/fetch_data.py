"""python scripts/fetch_data.py task=gsm8k data_root=FOLDER: bring a task's rows from the hub into local files.

Writes FOLDER/<task>/<split>.jsonl for every split the hub has, with the hub's field names, so that a
machine without internet can run `train.py task=... data_root=FOLDER`. Any override of train.py works:
task.hub.revision=COMMIT pins the rows.
"""

import sys
from pathlib import Path

from tiedlora import errors, storage
from tiedlora.config import compose
from tiedlora.errors import UserError
from tiedlora.tasks import load_task
from tiedlora.tasks.rows import folder


def main(overrides: list[str]) -> None:
    chosen = compose.compose_config(overrides)
    if chosen.data_root is None:
        raise UserError("data_root: has no value; give the folder to write to, as in data_root=data")
    task, target = load_task(chosen.task), folder(chosen.task, Path(chosen.data_root))
    if not chosen.task.hub.id:
        raise UserError(f"task={chosen.task.name}: makes its own rows, so there is nothing to fetch")
    for split in chosen.task.hub.splits:
        rows = task.hub_rows(split)
        target.mkdir(parents=True, exist_ok=True)
        storage.write_json_lines(target / f"{split}.jsonl", [row.fields for row in rows])
        print(f"{target / f'{split}.jsonl'}: {len(rows):,} rows")


if __name__ == "__main__":
    with errors.exit_codes():
        main(sys.argv[1:])

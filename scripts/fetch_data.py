"""python scripts/fetch_data.py task=gsm8k data_root=FOLDER: download a task's rows from the hub into local files.

It writes FOLDER/<task>/<split>.jsonl for every split that the hub has, with the hub's field names. Then a machine
without internet can run `train.py task=... data_root=FOLDER`. It takes the overrides of train.py, such as
task.hub.revision=COMMIT for a fixed version of the rows.
"""

import sys
from pathlib import Path

from tiedlora import errors, storage
from tiedlora.config import compose
from tiedlora.errors import UserError
from tiedlora.tasks import load_task
from tiedlora.tasks.rows import rows_folder


def main(overrides: list[str]) -> None:
    config = compose.compose_config(overrides)
    if config.data_root is None:
        raise UserError("data_root: has no value; give the folder to write to, as in data_root=data")
    task, folder = load_task(config.task), rows_folder(config.task, Path(config.data_root))
    if not config.task.hub.id:
        raise UserError(f"task={config.task.name}: makes its own rows, so there is nothing to fetch")
    for split in config.task.hub.splits:
        rows = task.hub_rows(split)
        folder.mkdir(parents=True, exist_ok=True)
        storage.write_json_lines(folder / f"{split}.jsonl", [row.fields for row in rows])
        print(f"{folder / f'{split}.jsonl'}: {len(rows):,} rows")


if __name__ == "__main__":
    with errors.exit_codes():
        print(__doc__) if {"-h", "--help"} & set(sys.argv[1:]) else main(sys.argv[1:])

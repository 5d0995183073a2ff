"""Which rows a task has: the folder of its files, and what of them enters the identity of task=rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tiedlora import storage
from tiedlora.config.schema import SPLITS, Config, HubSource, TaskConfig
from tiedlora.errors import UserError

OWN_ROWS = "own_rows"
"""task.kind of rows of one's own."""
UNNAMED = "rows"
"""The name of a task that its words alone describe (task=rows)."""


def rows_folder(config: TaskConfig, data_root: Path) -> Path:
    """The task's folder below data_root. For task=rows, a data set of the hub has one of its own."""
    if config.folder is None and config.kind == OWN_ROWS and config.hub.id:
        return data_root / _name_of(config.hub)
    return data_root / (config.folder or config.name)


def _name_of(hub: HubSource) -> str:
    parts = [hub.id or "", hub.subset or "", hub.revision if hub.revision != HubSource().revision else ""]
    return "--".join(part.replace("/", "--") for part in parts if part)


def files_below(config: TaskConfig, data_root: str | None) -> dict[str, Path]:
    """Split -> its file in the task's folder below data_root, for the splits that have one."""
    if data_root is None:
        return {}
    folder = rows_folder(config, Path(data_root))
    return {split: path for split in SPLITS if (path := folder / f"{split}.jsonl").is_file()}


def complete_task(config: Config) -> TaskConfig:
    """The task with what decides its rows, and with the chat template that chat messages need (task=rows).

    A shell hardly gives a line feed, so `\\n` in a template or in what ends an answer is one.

    Raises:
        UserError: a file of rows cannot be read.
    """
    task = config.task
    prompt, target, *stop = (text.replace("\\n", "\n") for text in (task.prompt, task.target, *task.stop))
    has_chat_template = task.chat_template or task.messages is not None
    task = replace(task, prompt=prompt, target=target, stop=stop, chat_template=has_chat_template)
    # The command of a record is composed with them, and its files may be gone.
    return task if task.rows_from else replace(task, rows_from=_rows_from(task, config))


def _rows_from(task: TaskConfig, config: Config) -> dict[str, str]:
    given = {split: Path(file) for split in SPLITS if (file := getattr(task.files, split)) is not None}
    if not given and task.kind != OWN_ROWS:
        return {}
    # Rows that were fetched from the hub are those of the hub.
    below = {} if given or task.hub.id else files_below(task, config.data_root)
    found = {}
    for split, file in (given or below).items():
        try:
            # Each cell of a sweep asks. A run hashes the whole file again when it reads the rows.
            found[split] = storage.remembered_sha256(file, Path(config.cache))
        except UserError as error:
            key = f"task.files.{split}=" if given else "data_root: "
            raise UserError(f"{key}{error}; give a file that is here") from None
    if not found and task.hub.id:
        found["hub"] = " ".join([task.hub.id, task.hub.subset or "", task.hub.revision])
        found |= {f"hub_{split}": name for split, name in task.hub.splits.items()}
    if found and task.cluster is not None and len({*found} & {*SPLITS}) < len(SPLITS):
        # Splits that are cut from train have whole clusters.
        found["cluster"] = task.cluster
    return found

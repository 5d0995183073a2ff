"""What a task is, and how its rows become examples.

A task is one file here and one YAML in conf/task/: the file's `TASK` turns rows into examples, says how
outputs are decoded and scores them. Tasks know no model; prompts and targets are text.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import pkgutil
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from tiedlora.config import TaskConfig
from tiedlora.errors import UserError
from tiedlora.tasks.rows import Row, RowError, read_rows

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Example:
    """One row as the loop and the scorer see it."""

    id: str
    prompt: str
    target: str
    """What is trained after the prompt, without the end-of-text token."""
    references: tuple[str, ...] = ()
    """What an output is scored against; any of them may match."""


class Task:
    """The base of every task: subclass it, name the fields, write `score`."""

    fields: ClassVar[dict[str, type]] = {}
    """Fields every row must have, with their types."""
    metrics: ClassVar[tuple[str, ...]] = ()
    """Names of the scores in [0, 1] that `score` gives; the first is the one that comparisons use."""

    def __init__(self, config: TaskConfig) -> None:
        self.config = config

    def generated_rows(self, split: str) -> list[Row] | None:
        """Rows the task makes itself; None for a task that reads them."""
        return None

    def row_id(self, row: dict[str, Any], number: int) -> str:
        """A row's name in predictions: its own id, or its place in the split."""
        return str(row.get("id", number))

    def example(self, row: dict[str, Any], id: str) -> Example:
        """The prompt and target of a checked row.

        Raises:
            RowError: the row cannot be a training or scoring example.
        """
        prompt, target = render(self.config.prompt, row), render(self.config.target, row)
        if not target.strip():
            raise RowError("the target is empty")
        return Example(id, prompt, target, (target,))

    def score(self, output: str, example: Example) -> dict[str, float]:
        """Scores of one output, each in [0, 1]."""
        raise NotImplementedError


def load_task(config: TaskConfig) -> Task:
    """The task of `config.kind`.

    Raises:
        UserError: there is no such file in tasks/, or the file defines no TASK.
    """
    kinds = sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in ("rows", "metrics"))
    if config.kind not in kinds:
        raise UserError(f"task.kind={config.kind}: no such task; choose one of {', '.join(kinds)}")
    task_class = importlib.import_module(f"{__name__}.{config.kind}").TASK
    task: Task = task_class(config)
    return task


def render(template: str, row: dict[str, Any]) -> str:
    """Put the row's fields in the template's {places}; nothing else in either is interpreted.

    Raises:
        RowError: the template names a field the row lacks.
    """

    def value(match: re.Match[str]) -> str:
        if match[1] not in row:
            raise RowError(f"the template wants the field '{match[1]}', which is missing")
        return str(row[match[1]])

    return re.sub(r"\{(\w+)\}", value, template)


def load_examples(task: Task, split: str, data_root: str | None) -> list[Example]:
    """The examples of one split, checked, in their order.

    Raises:
        UserError: no source, or a bad row, naming file and line.
    """
    config = task.config
    if split == "validation" and config.validation_from_train:
        rows = _split_train(task, data_root)[1]
    elif split == "train":
        rows = _split_train(task, data_root)[0]
    else:
        rows = _rows(task, split, data_root)
    count = getattr(config.rows, split)
    if count is not None and count > len(rows):
        raise UserError(f"task.rows.{split}={count}: there are only {len(rows)}; lower it, or null takes all")
    examples = list(_examples(task, rows[:count]))
    if split == "train" and config.shuffle_targets:
        examples = _with_shuffled_targets(examples, config.split_seed)
    return examples


def digest(examples: Iterable[Example]) -> str:
    """sha256 of what the examples hold: the data's identity by content, whatever file it came from."""
    sha = hashlib.sha256()
    for example in examples:
        line = [example.id, example.prompt, example.target, *example.references]
        sha.update(json.dumps(line, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    return sha.hexdigest()


def _rows(task: Task, split: str, data_root: str | None) -> list[Row]:
    generated = task.generated_rows(split)
    return generated if generated is not None else read_rows(task.config, split, data_root)


def _split_train(task: Task, data_root: str | None) -> tuple[list[Row], list[Row]]:
    """(train, validation carved from it). The carved rows are the same whatever the run's seed."""
    rows, held_out = _rows(task, "train", data_root), task.config.validation_from_train
    if not held_out:
        return rows, []
    if held_out >= len(rows):
        raise UserError(f"task.validation_from_train={held_out}: must be less than the {len(rows)} train rows")
    order = list(range(len(rows)))
    random.Random(f"carve/{task.config.split_seed}").shuffle(order)
    carved = set(order[:held_out])
    return (
        [row for number, row in enumerate(rows) if number not in carved],
        [row for number, row in enumerate(rows) if number in carved],
    )


def _examples(task: Task, rows: list[Row]) -> Iterable[Example]:
    seen: dict[str, str] = {}
    for number, row in enumerate(rows):
        try:
            for name, kind in task.fields.items():
                if name not in row.fields:
                    raise RowError(f"the field '{name}' is missing (it has {', '.join(row.fields) or 'none'})")
                if not isinstance(row.fields[name], kind):
                    found = type(row.fields[name]).__name__
                    raise RowError(f"the field '{name}' must be {kind.__name__}, not {found}")
            id = task.row_id(row.fields, number)
            if id in seen:
                raise RowError(f"the id '{id}' was used before, at {seen[id]}")
            seen[id] = row.where
            yield task.example(row.fields, id)
        except RowError as error:
            raise UserError(f"{row.where}: {error}") from None


def _with_shuffled_targets(examples: list[Example], seed: int) -> list[Example]:
    """Every example with the next one's target, in a seeded order: no example keeps its own."""
    order = list(range(len(examples)))
    random.Random(f"shuffle-targets/{seed}").shuffle(order)
    source = dict(zip(order, order[1:] + order[:1], strict=True))
    return [
        Example(example.id, example.prompt, examples[source[i]].target, example.references)
        for i, example in enumerate(examples)
    ]

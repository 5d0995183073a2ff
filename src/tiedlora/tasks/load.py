"""The task of a configuration, and the examples of its splits."""

from __future__ import annotations

import hashlib
import importlib
import json
import pkgutil
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

from tiedlora.config.schema import SCORED_SPLITS, SPLITS, TaskConfig
from tiedlora.errors import UserError
from tiedlora.tasks.base import Example, Task, cluster_of
from tiedlora.tasks.rows import DataRow, NoSuchSplit, RowError, in_one_form, placed


class NoSuchTask(UserError):
    """No file in tasks/ has the name of task.kind, and this process has registered nothing under it."""


NO_TASKS = ("base", "load", "metrics", "rows", "task_metric")
"""The files of this package that are not tasks."""
MOST_CUT = 1000
"""Most groups of rows that are cut from train for a split, if no number is set."""

_REGISTERED: dict[str, type[Task]] = {}


def register(kind: str, task: type[Task]) -> None:
    """Make `task.kind=KIND` mean this class in this process, for a task whose file is elsewhere."""
    _REGISTERED[kind] = task


def load_task(config: TaskConfig) -> Task:
    """The task of `config.kind`.

    Raises:
        NoSuchTask: no file in tasks/ has that name, and nothing was registered under it.
    """
    if config.kind in _REGISTERED:
        return _REGISTERED[config.kind](config)
    kinds = sorted(
        module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]) if module.name not in NO_TASKS
    )
    if config.kind not in kinds:
        raise NoSuchTask(f"task.kind={config.kind}: no such task; choose one of {', '.join(kinds)}")
    task_class: type[Task] = importlib.import_module(f"{__package__}.{config.kind}").TASK
    return task_class(config)


def load_examples(task: Task, split: str, data_root: str | None) -> list[Example]:
    """The checked examples of one split, in the order of their rows.

    Raises:
        UserError: there are no rows, or one is wrong; the message names file and line.
    """
    config = task.config
    rows = _split_rows(task, split, data_root)
    if split == "train" and task.one_split_each:
        _refuse_shared(task, data_root)
    examples_in_order, count = _examples(task, rows), getattr(config.rows, split)
    if split == "train" and task.inputs_recur:
        scored = _scored_prompts(task, data_root)
        examples_in_order = (example for example in examples_in_order if example.prompt not in scored)
    examples = list(islice(examples_in_order, count))
    if count is not None and count > len(examples):
        raise UserError(f"task.rows.{split}={count}: there are only {len(examples)}; lower it, or null takes all")
    if not examples:
        raise UserError(
            f"task={config.name}: every {split} row is in another split too, or there is none; take other "
            "task.options, or fewer task.options.rows of the other splits"
        )
    if split == "train" and config.shuffle_targets:
        examples = _with_shuffled_targets(examples, config.split_seed)
    return examples


def digest(examples: Iterable[Example]) -> str:
    """The sha256 of the examples' texts. It identifies data by content, and does not depend on files."""
    sha = hashlib.sha256()
    for example in examples:
        texts = [example.id, example.prompt, example.target, *example.references, *example.choices]
        sha.update(json.dumps(texts, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    return sha.hexdigest()


def _split_rows(task: Task, split: str, data_root: str | None) -> list[DataRow]:
    """The rows of a split. Of the splits that are cut from train, in whole groups, none has rows of another.

    A run's seed does not change the choice.
    """
    cut = task.cut_from_train(data_root)
    if not cut or split not in ("train", *cut):
        return task.rows(split, data_root)
    rows = task.rows("train", data_root)
    # An id that many rows have would be one group, and the message about its size would mislead.
    _ids(task, rows)
    groups = _groups(task, rows)
    order = list(dict.fromkeys(groups))
    counts = {name: count or min(MOST_CUT, max(1, len(order) // 10)) for name, count in cut.items()}
    if sum(counts.values()) >= len(order):
        number = task.config.validation_from_train
        raise UserError(
            f"task.validation_from_train={number}: must be less than the {len(order)} train rows"
            if number
            else f"{rows[0].where}: of {len(order)} different rows, none is left for train when {' and '.join(counts)} "
            "are cut from them; add rows"
        )
    random.Random(f"carve/{task.config.split_seed}").shuffle(order)
    split_of: dict[int, str] = {}
    start = 0
    for name, count in counts.items():
        split_of |= dict.fromkeys(order[start : start + count], name)
        start += count
    return [row for row, group in zip(rows, groups, strict=True) if split_of.get(group, "train") == split]


def _groups(task: Task, rows: Sequence[DataRow]) -> list[int]:
    """The group of each row, as the number of its first row. Rows with a tie in common are in one group."""
    first: dict[str, int] = {}
    earlier = list(range(len(rows)))
    """Row -> an earlier row of its group, or itself."""

    def root(number: int) -> int:
        while earlier[number] != number:
            earlier[number] = number = earlier[earlier[number]]
        return number

    for number, row in enumerate(rows):
        with placed(row):
            for tie in task.ties(row, number):
                one, other = sorted((root(number), root(first.setdefault(tie, number))))
                earlier[other] = one
    return [root(number) for number in range(len(rows))]


def _refuse_shared(task: Task, data_root: str | None) -> None:
    """Raises UserError if two splits have a row with the same prompt; the message names both places."""
    seen: dict[str, tuple[str, str]] = {}
    for split in SPLITS:
        with suppress(NoSuchSplit):
            for row in _split_rows(task, split, data_root):
                prompt = in_one_form(_checked_example(task, row, "").prompt)
                other, place = seen.setdefault(prompt, (split, row.where))
                if other != split:
                    raise UserError(
                        f"{row.where}: has the prompt of {place}, so it is in {split} and in {other}; remove it from "
                        "one of them"
                    )


def _scored_prompts(task: Task, data_root: str | None) -> set[str]:
    """All prompts of the validation and test rows, also of a split that this run does not score."""
    prompts: set[str] = set()
    for split in SCORED_SPLITS:
        # Only a split that does not exist has no prompts. Without those of one that cannot be read, the run would train
        # on its rows.
        with suppress(NoSuchSplit):
            prompts.update(example.prompt for example in _examples(task, _split_rows(task, split, data_root)))
    return prompts


def _examples(task: Task, rows: list[DataRow]) -> Iterator[Example]:
    """One example for each group of rows, in the order of their first rows, with the references of all its rows."""
    groups: dict[str, list[tuple[str, DataRow]]] = {}
    for id, row in zip(_ids(task, rows), rows, strict=True):
        groups.setdefault(task.group_id(id), []).append((id, row))
    for group_id, group in groups.items():
        (first_id, first_row), *others = group
        example = replace(_checked_example(task, first_row, first_id), id=group_id)
        for id, row in others:
            other = _checked_example(task, row, id)
            if other.prompt != example.prompt:
                raise UserError(f"{row.where}: is grouped with {first_row.where} by its id, but its prompt differs")
            example = replace(example, references=example.references + other.references)
        yield example


def _ids(task: Task, rows: Sequence[DataRow]) -> list[str]:
    """The id of each row. Own rows are numbered if one is empty or repeats, because rows of the hub cannot be changed.

    Raises:
        UserError: an id is empty, or repeats in the rows of another task.
    """
    places: dict[str, str] = {}
    for number, row in enumerate(rows):
        id = task.row_id(row, number)
        if task.reads_own_rows and (id in places or not id.strip()):
            return [str(number) for number in range(len(rows))]
        if not id.strip():
            raise UserError(f"{row.where}: the id is empty; give each row its own, or leave the field out")
        if id in places:
            raise UserError(f"{row.where}: the id '{id}' was used before, at {places[id]}; make ids unique")
        places[id] = row.where
    return list(places)


def _checked_example(task: Task, row: DataRow, id: str) -> Example:
    """The example of one row.

    Raises:
        UserError: the row is wrong; the message names its place and what is wrong.
    """
    with placed(row):
        for name, kind in task.fields.items():
            if name not in row.fields:
                raise RowError(f"the field '{name}' is missing (it has {', '.join(row.fields) or 'none'})")
            if type(row[name]) is not kind:
                raise RowError(f"the field '{name}' must be {kind.__name__}, not {type(row[name]).__name__}")
        if (cluster := task.config.cluster) is not None and cluster not in row.fields:
            raise RowError(
                f"the field '{cluster}' of task.cluster is missing; for rows without it, set task.cluster=null"
            )
        example = replace(task.example(row, id), cluster=cluster_of(row, cluster))
        try:
            "".join([id, example.prompt, example.target, *example.references, *example.choices]).encode()
        except UnicodeEncodeError:
            raise RowError("holds half of a surrogate pair (such as \\ud800), which is not a character") from None
    return example


def _with_shuffled_targets(examples: list[Example], seed: int) -> list[Example]:
    """Give each example the target of the next one in a seeded order, so that none keeps its own."""
    if len(examples) < 2:
        raise UserError("task.shuffle_targets=true: needs two training rows or more; raise task.rows.train")
    order = list(range(len(examples)))
    random.Random(f"shuffle-targets/{seed}").shuffle(order)
    source = dict(zip(order, order[1:] + order[:1], strict=True))
    return [replace(example, target=examples[source[i]].target) for i, example in enumerate(examples)]

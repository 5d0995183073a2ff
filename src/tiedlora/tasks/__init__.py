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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from tiedlora.config.schema import TaskConfig
from tiedlora.errors import UserError
from tiedlora.tasks.rows import Row, RowError, from_folder, from_hub

SPLITS = ("train", "validation", "test")


Score = float | list[float]
"""A number in [0, 1], or one output's statistics, whose sum over outputs gives a corpus-level metric."""


@dataclass(frozen=True)
class Example:
    """One row, or several that ask the same, as the loop and the scorer see it."""

    id: str
    prompt: str
    target: str
    """What is trained after the prompt, without the end-of-text token."""
    references: tuple[str, ...] = ()
    """What an output is scored against; any of them may match."""
    choices: tuple[str, ...] = ()
    """Texts after the prompt whose likelihoods are compared; none where an answer is generated."""
    cuttable: tuple[int, int] = (0, 0)
    """[start, end) of the prompt's characters that may lose their end when the prompt is too long."""
    must_hold: str = ""
    """What a shortened prompt must still hold to be trained on: an answer that is quoted from it."""


class Task:
    """The base of every task: subclass it, name the fields, write `score`."""

    fields: ClassVar[dict[str, type]] = {}
    """Fields every row must have, with their types."""
    metrics: ClassVar[tuple[str, ...]] = ()
    """Names of the scores that `score` gives; the first is the one that comparisons use."""
    corpus_metrics: ClassVar[tuple[str, ...]] = ()
    """Those of them that `corpus_score` makes from summed statistics; the others are means."""
    shortens: ClassVar[str | None] = None
    """The field that loses its end when a prompt is too long: never the question, never the target."""

    inputs_recur: ClassVar[bool] = False
    """Whether short inputs come in several splits: training rows that ask what is scored are then left out."""

    def __init__(self, config: TaskConfig) -> None:
        self.config = config

    def generated_rows(self, split: str) -> list[Row] | None:
        """Rows the task makes itself; None for a task that reads them."""
        return None

    def hub_rows(self, split: str) -> list[Row]:
        """The split's rows from the hub, with the hub's field names.

        Raises:
            UserError: the hub cannot be reached or has no such split.
        """
        return from_hub(self.config, split)

    def row_id(self, row: dict[str, Any], number: int) -> str:
        """A row's name in predictions: its own id, or its place in the split."""
        return str(row.get("id", number))

    def group_id(self, row_id: str) -> str:
        """Rows of one group ask the same and each brings references; by default every row is its own."""
        return row_id

    def example(self, row: dict[str, Any], id: str) -> Example:
        """The prompt and target of a checked row.

        Raises:
            RowError: the row cannot be a training or scoring example.
        """
        prompt, target = render(self.config.prompt, row), render(self.config.target, row)
        if not target.strip():
            raise RowError("the target is empty")
        cuttable = (0, 0)
        if self.shortens and f"{{{self.shortens}}}" in self.config.prompt:
            start = len(render(self.config.prompt.partition(f"{{{self.shortens}}}")[0], row))
            cuttable = (start, start + len(str(row[self.shortens])))
        return Example(id, prompt, target, (target,), cuttable=cuttable)

    def score(self, output: Any, example: Example) -> dict[str, Score]:
        """Scores of one output: its text, or the log-likelihoods of example.choices."""
        raise NotImplementedError

    def corpus_score(self, metric: str, statistics: Iterable[float]) -> float:
        """A corpus-level metric in [0, 1] from statistics summed over outputs."""
        raise NotImplementedError

    def total(self, metric: str, scores: Sequence[Any]) -> float:
        """A metric over all outputs: the corpus score of their summed statistics, or their mean."""
        if metric in self.corpus_metrics:
            return self.corpus_score(metric, [sum(column) for column in zip(*scores, strict=True)])
        return float(sum(scores) / len(scores))

    def signatures(self) -> dict[str, str]:
        """Metric -> which implementation and settings gave it, where a name alone does not say."""
        return {}


_REGISTERED: dict[str, type[Task]] = {}


def register(kind: str, task: type[Task]) -> None:
    """Make `task.kind=KIND` mean this class in this process: for a task that is not a file here."""
    _REGISTERED[kind] = task


def load_task(config: TaskConfig) -> Task:
    """The task of `config.kind`.

    Raises:
        UserError: there is no such file in tasks/, or the file defines no TASK.
    """
    if config.kind in _REGISTERED:
        return _REGISTERED[config.kind](config)
    kinds = sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in ("rows", "task_metric"))
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
    found, count = _examples(task, _grouped(task, rows)), getattr(config.rows, split)
    if split == "train" and task.inputs_recur:
        scored = _held_out_prompts(task, data_root)
        found = (example for example in found if example.prompt not in scored)
    examples = list(islice(found, count))
    if count is not None and count > len(examples):
        raise UserError(f"task.rows.{split}={count}: there are only {len(examples)}; lower it, or null takes all")
    if split == "train" and config.shuffle_targets:
        examples = _with_shuffled_targets(examples, config.split_seed)
    return examples


def digest(examples: Iterable[Example]) -> str:
    """sha256 of what the examples hold: the data's identity by content, whatever file it came from."""
    sha = hashlib.sha256()
    for example in examples:
        line = [example.id, example.prompt, example.target, *example.references, *example.choices]
        sha.update(json.dumps(line, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    return sha.hexdigest()


def _rows(task: Task, split: str, data_root: str | None) -> list[Row]:
    generated = task.generated_rows(split)
    if generated is not None:
        return generated
    return task.hub_rows(split) if data_root is None else from_folder(task.config, split, Path(data_root))


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


def _grouped(task: Task, rows: list[Row]) -> list[list[tuple[str, Row]]]:
    """Rows with their ids, those of one group together, in the order of their first rows."""
    groups: dict[str, list[tuple[str, Row]]] = {}
    seen: dict[str, str] = {}
    for number, row in enumerate(rows):
        id = task.row_id(row.fields, number)
        if id in seen:
            raise UserError(f"{row.where}: the id '{id}' was used before, at {seen[id]}; make ids unique")
        seen[id] = row.where
        groups.setdefault(task.group_id(id), []).append((id, row))
    return list(groups.values())


def _held_out_prompts(task: Task, data_root: str | None) -> set[str]:
    """Every prompt of the validation and test rows, whichever of them this run scores."""
    prompts: set[str] = set()
    for split in ("validation", "test"):
        try:
            rows = _rows(task, split, data_root)
        except UserError:
            continue  # Training needs no test rows; whoever scores a split that is missing or broken is told then.
        prompts.update(example.prompt for example in _examples(task, _grouped(task, rows)))
    return prompts


def _examples(task: Task, groups: list[list[tuple[str, Row]]]) -> Iterator[Example]:
    for group in groups:
        example = None
        for id, row in group:
            try:
                found = _checked(task, row, id)
                if example is None:
                    example = replace(found, id=task.group_id(id))
                elif found.prompt != example.prompt:
                    raise RowError(f"is grouped with {group[0][1].where} by its id, but its prompt differs")
                else:
                    example = replace(example, references=example.references + found.references)
            except RowError as error:
                raise UserError(f"{row.where}: {error}") from None
        assert example is not None
        yield example


def _checked(task: Task, row: Row, id: str) -> Example:
    for name, kind in task.fields.items():
        if name not in row.fields:
            raise RowError(f"the field '{name}' is missing (it has {', '.join(row.fields) or 'none'})")
        if not isinstance(row.fields[name], kind) or (kind is int and isinstance(row.fields[name], bool)):
            raise RowError(f"the field '{name}' must be {kind.__name__}, not {type(row.fields[name]).__name__}")
    example = task.example(row.fields, id)
    try:
        "".join([id, example.prompt, example.target, *example.references, *example.choices]).encode("utf-8")
    except UnicodeEncodeError:
        raise RowError("holds half of a surrogate pair (such as \\ud800), which is no character") from None
    return example


def _with_shuffled_targets(examples: list[Example], seed: int) -> list[Example]:
    """Every example with the next one's target, in a seeded order: no example keeps its own."""
    order = list(range(len(examples)))
    random.Random(f"shuffle-targets/{seed}").shuffle(order)
    source = dict(zip(order, order[1:] + order[:1], strict=True))
    return [replace(example, target=examples[source[i]].target) for i, example in enumerate(examples)]

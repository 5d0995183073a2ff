"""The base class of every task, and the examples that a task makes from rows."""

from __future__ import annotations

import functools
import math
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tiedlora.config.schema import RowFiles, TaskConfig
from tiedlora.config.task_rows import rows_folder
from tiedlora.errors import UserError
from tiedlora.tasks.rows import (
    DataRow,
    NoSuchSplit,
    RowError,
    hub_errors,
    read_json_lines,
    table_rows,
    ways_to_get,
)
from tiedlora.text import nearest

Score = float | list[float]
"""A number in [0, 1], or the statistics of one output. A corpus-level metric comes from their sum over outputs."""
OF_OWN_ROWS: dict[str, Any] = {
    "files": RowFiles(),
    "messages": None,
    "metrics": [],
    "normalise": "strip",
    "choices": None,
}
"""The keys of task=rows, with their defaults."""
NO_TEMPLATE_OPTIONS = (
    *("add_generation_prompt", "chat_template", "continue_final_message", "conversation", "messages"),
    *("max_length", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors"),
    *("sanitize_control_tokens", "tokenize", "tokenizer_kwargs", "truncation"),
)
"""What the program gives apply_chat_template itself, and what would make its result another one than a text."""


@dataclass(frozen=True)
class Example:
    """One row (or several rows with the same prompt), as training and scoring use it."""

    id: str
    prompt: str
    target: str
    """The text that is trained after the prompt, without the end-of-text token."""
    references: tuple[str, ...] = ()
    """Correct answers. An output is compared with each, and the best score counts."""
    choices: tuple[str, ...] = ()
    """Texts after the prompt whose likelihoods are compared; empty if an answer is generated."""
    cuttable: tuple[int, int] = (0, 0)
    """[start, end) of the part of the prompt, in characters, whose end is cut off if the prompt is too long."""
    must_hold: str = ""
    """A text that a shortened prompt must still contain to be trained on, such as an answer that is quoted from it."""
    cluster: str = ""
    """What the row belongs to together with others, such as an article; empty if it stands alone."""


class Task:
    """The base of every task. A task names the fields of its rows and its metrics, and implements `score`."""

    fields: ClassVar[dict[str, type]] = {}
    """The fields that every row must have, with their types."""
    metrics: tuple[str, ...] = ()
    """The names of the scores that `score` returns. Comparisons use the first."""
    corpus_metrics: tuple[str, ...] = ()
    """The metrics that `corpus_score` computes from summed statistics. The others are means."""
    shortens: ClassVar[str | None] = None
    """The field whose end is cut off if a prompt is too long. It is never the question or the target."""
    generator: ClassVar[str] = ""
    """The package whose version decides the rows of a task that makes its own; empty for a task that reads them."""
    options: ClassVar[tuple[str, ...]] = ()
    """The keys that `task.options` may have."""
    inputs_recur: bool = False
    """Whether short inputs occur in several splits. If so, training rows with a prompt of a scored row are left out."""
    one_split_each: bool = False
    """Whether a row whose prompt is in another split too is refused."""
    reads_own_rows: ClassVar[bool] = False
    """Whether the task has the keys of OF_OWN_ROWS."""

    def __init__(self, config: TaskConfig) -> None:
        self.config = config

    def check_options(self) -> None:
        """Check the keys of the task.

        Raises:
            UserError: a key belongs to other tasks, a template is none, or all prompts would be equal.
        """
        self.check_templates()
        for name, default in OF_OWN_ROWS.items():
            if not self.reads_own_rows and getattr(self.config, name) != default:
                raise UserError(f"task.{name}: is a key of task=rows; task.kind={self.config.kind} does not read it")
        for name in self.config.template_options:
            if not self.config.chat_template:
                raise UserError(
                    f"task.template_options.{name}: changes nothing without a chat template; add "
                    "task.chat_template=true, or leave it out"
                )
            if name in NO_TEMPLATE_OPTIONS:
                raise UserError(f"task.template_options.{name}: is set by the program; leave it out")
        for name in self.config.options:
            if name not in self.options:
                known, kind = ", ".join(self.options) or "none", self.config.kind
                raise UserError(f"task.options.{name}: task.kind={kind} has no such option; its options: {known}")

    def check_templates(self) -> None:
        """Raises UserError if a template is none, or all prompts would be equal."""
        fields_of(self.config.target)
        if not fields_of(self.config.prompt):
            raise UserError(
                f"task.prompt={self.config.prompt!r:.200}: names no field of a row, so every prompt would be the same; "
                f"write one in braces, such as {{{next(iter(self.fields), 'question')}}}"
            )

    def rows(self, split: str, data_root: str | None) -> list[DataRow]:
        """The rows of a split, before some are cut from train for another.

        Raises:
            NoSuchSplit: there is no such split.
            UserError: the rows cannot be read, or the file has a line that is no row.
        """
        generated = self.generated_rows(split)
        if generated is not None:
            return generated
        if data_root is None:
            return self.hub_rows(split)
        path = rows_folder(self.config, Path(data_root)) / f"{split}.jsonl"
        if not path.exists():
            raise NoSuchSplit(f"{path}: no such file. {ways_to_get(self.config)}")
        return read_json_lines(path)

    def cut_from_train(self, _data_root: str | None) -> dict[str, int]:
        """The splits that are cut from train -> how many groups of rows each gets; 0 means a tenth of all."""
        return {"validation": self.config.validation_from_train} if self.config.validation_from_train else {}

    def ties(self, row: DataRow, number: int) -> list[str]:
        """What ties a row to others: rows with a tie in common stay in one split when train is cut.

        Raises:
            RowError: the row cannot be an example.
        """
        return [self.group_id(self.row_id(row, number))]

    def generated_rows(self, _split: str) -> list[DataRow] | None:
        """The rows that the task makes itself; None if it reads its rows."""
        return None

    def hub_splits(self) -> dict[str, str]:
        """Our name of each split that the hub has -> the hub's.

        Raises:
            UserError: the hub cannot be reached.
        """
        return self.config.hub.splits

    def hub_rows(self, split: str) -> list[DataRow]:
        """The split's rows from the hub, with the hub's field names.

        Raises:
            NoSuchSplit: the hub has no such split.
            UserError: the hub cannot be reached.
        """
        hub = self.config.hub
        with hub_errors(self.config, split) as name:
            import datasets  # hub_errors has imported it already, so this costs no time  # noqa: PLC0415

            table = datasets.load_dataset(hub.id, hub.subset, split=name, revision=hub.revision)
        rows = table_rows(table.to_iterable_dataset()) if self.reads_own_rows else table
        return [DataRow(f"{hub.id}[{name}] row {i}", dict(row)) for i, row in enumerate(rows)]

    def row_id(self, row: DataRow, number: int) -> str:
        """The row's name in files of scores: its own id, or without one its number in the split (counted from 0)."""
        own = row.fields.get("id")
        return str(number if own is None else own)

    def group_id(self, row_id: str) -> str:
        """The group of a row. Rows of one group must have the same prompt, and become one example with all references.

        By default, every row is a group.
        """
        return row_id

    def example(self, row: DataRow, id: str) -> Example:
        """The example of a row whose fields were checked.

        Raises:
            RowError: the row cannot be an example.
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
        """Metric -> the score of one output.

        Args:
            output: the text of the answer; or, if the example has choices, their log-likelihoods (a list of floats).
        """
        raise NotImplementedError

    def corpus_score(self, metric: str, statistics: Iterable[float]) -> float:
        """A corpus-level metric in [0, 1], from the sum of the statistics over outputs."""
        raise NotImplementedError

    def total(self, metric: str, scores: Sequence[Any]) -> float:
        """A metric over all outputs: the corpus score of their summed statistics, or the mean of their scores."""
        if metric in self.corpus_metrics:
            return self.corpus_score(metric, [sum(column) for column in zip(*scores, strict=True)])
        return float(sum(scores) / len(scores))

    def signatures(self) -> dict[str, str]:
        """Metric -> the implementation and settings that computed it, if its name does not say enough."""
        return {}


@functools.lru_cache(maxsize=64)
def _parts(template: str) -> list[tuple[str, str | None]]:
    """The texts of a template, each with the field that follows it; None after the last.

    The syntax is that of str.format. What is in braces is the whole name of a field, so a template can read nothing
    else: neither attributes nor items of a value.

    Raises:
        UserError: the template has another syntax.
    """
    where = f"task.prompt or task.target: the template {template!r:.200}"
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"{where} cannot be read ({error}); a brace that is text is doubled: {{{{ or }}}}") from None
    for _, name, form, conversion in parsed:
        if name is not None and (not name.strip() or form or conversion):
            raise UserError(f"{where} may hold only names of fields in braces, such as {{{name or 'question'}}}")
    return [(text, name) for text, name, *_ in parsed]


def fields_of(template: str) -> list[str]:
    """The fields that a template names, in order, each once.

    Raises:
        UserError: the template has another syntax than {field}, {{ and }}.
    """
    return list(dict.fromkeys(name for _, name in _parts(template) if name is not None))


def render(template: str, row: DataRow) -> str:
    """The template, with each {field} replaced by that field of the row, and {{ and }} by braces.

    Raises:
        RowError: the template names a field that the row lacks, or whose value is no text or number.
        UserError: the template has another syntax.
    """
    texts = []
    for text, name in _parts(template):
        texts.append(text)
        if name is not None:
            texts.append(_field_text(name, row))
    return "".join(texts)


def cluster_of(row: DataRow, name: str | None) -> str:
    """The text of the field that task.cluster names; empty if the row stands alone: the field is missing or blank.

    Args:
        name: that of the field; None if there is none.
    """
    value = None if name is None else row.fields.get(name)
    text = "" if value is None or is_nan(value) else str(value)
    return text if text.strip() else ""


def is_nan(value: object) -> bool:
    """Whether it is the missing value of pandas."""
    return isinstance(value, float) and math.isnan(value)


def _field_text(name: str, row: DataRow) -> str:
    if name not in row.fields:
        known = ", ".join(row.fields) or "none"
        raise RowError(
            f"the template needs the field {name!r}, which is missing{nearest(name, row.fields)}; it has {known:.300}"
        )
    value = row[name]
    if value is None or is_nan(value) or isinstance(value, (list, dict, bytes)):
        kind = "null" if value is None else "NaN" if is_nan(value) else type(value).__name__
        raise RowError(f"the field {name!r} is {kind}, and a template takes a text or a number")
    return str(value)

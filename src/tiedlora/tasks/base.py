"""What a task is: the class that every task derives from, and the examples that it makes of rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tiedlora.config.schema import TaskConfig
from tiedlora.tasks.rows import DataRow, RowError, rows_from_hub

Score = float | list[float]
"""A number in [0, 1], or one output's statistics, whose sum over outputs gives a corpus-level metric."""


@dataclass(frozen=True)
class Example:
    """One row, or several rows that ask the same, as training and scoring use it."""

    id: str
    prompt: str
    target: str
    """What is trained after the prompt, without the end-of-text token."""
    references: tuple[str, ...] = ()
    """Correct answers: an output is scored against the best of them."""
    choices: tuple[str, ...] = ()
    """Texts after the prompt whose likelihoods are compared; none where an answer is generated."""
    cuttable: tuple[int, int] = (0, 0)
    """[start, end) of the prompt's characters whose end may be cut off when the prompt is too long."""
    must_hold: str = ""
    """What a shortened prompt must still contain to be trained on: an answer that is quoted from it."""


class Task:
    """The base of every task. A task names the fields of its rows and its metrics, and implements `score`."""

    fields: ClassVar[dict[str, type]] = {}
    """Fields that every row must have, with their types."""
    metrics: ClassVar[tuple[str, ...]] = ()
    """Names of the scores that `score` returns; comparisons use the first."""
    corpus_metrics: ClassVar[tuple[str, ...]] = ()
    """Those metrics that `corpus_score` makes from summed statistics; the others are means."""
    shortens: ClassVar[str | None] = None
    """The field whose end is cut off when a prompt is too long: never the question, never the target."""
    inputs_recur: ClassVar[bool] = False
    """Whether short inputs occur in several splits. Training rows with the prompt of a scored row are then left out."""

    def __init__(self, config: TaskConfig) -> None:
        self.config = config

    def generated_rows(self, split: str) -> list[DataRow] | None:
        """Rows that the task makes itself; None for a task that reads them."""
        return None

    def hub_rows(self, split: str) -> list[DataRow]:
        """The split's rows from the hub, with the hub's field names.

        Raises:
            UserError: the hub cannot be reached or has no such split.
        """
        return rows_from_hub(self.config, split)

    def row_id(self, row: DataRow, number: int) -> str:
        """A row's name in predictions: its own id, or its number in the split, counted from 0."""
        return str(row.fields.get("id", number))

    def group_id(self, row_id: str) -> str:
        """The group of a row. Rows of one group have the same prompt and become one example with all their references.

        By default every row is its own group.
        """
        return row_id

    def example(self, row: DataRow, id: str) -> Example:
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
        """Scores of one output, by metric.

        Args:
            output: its text; or, where the example has choices, their log-likelihoods (a sequence of floats).
        """
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
        """Metric -> the implementation and settings that computed it, where its name does not say enough."""
        return {}


def render(template: str, row: DataRow) -> str:
    """The template with each {field} replaced by that field of the row; nothing else is interpreted.

    Raises:
        RowError: the template names a field that the row lacks.
    """

    def field_text(match: re.Match[str]) -> str:
        if match[1] not in row.fields:
            raise RowError(f"the template wants the field '{match[1]}', which is missing")
        return str(row[match[1]])

    return re.sub(r"\{(\w+)\}", field_text, template)

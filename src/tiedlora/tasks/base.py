"""The base class of every task, and the examples that a task makes from rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tiedlora.config.schema import TaskConfig
from tiedlora.errors import UserError
from tiedlora.tasks.rows import DataRow, RowError, hub_errors

Score = float | list[float]
"""A number in [0, 1], or the statistics of one output. A corpus-level metric comes from their sum over outputs."""
_FIELD = re.compile(r"\{(\w+)\}")
"""A field of the row in a template."""


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
    metrics: ClassVar[tuple[str, ...]] = ()
    """The names of the scores that `score` returns. Comparisons use the first."""
    corpus_metrics: ClassVar[tuple[str, ...]] = ()
    """The metrics that `corpus_score` computes from summed statistics. The others are means."""
    shortens: ClassVar[str | None] = None
    """The field whose end is cut off if a prompt is too long. It is never the question or the target."""
    generator: ClassVar[str] = ""
    """The package whose version decides the rows of a task that makes its own; empty for a task that reads them."""
    options: ClassVar[tuple[str, ...]] = ()
    """The keys that `task.options` may have."""
    inputs_recur: ClassVar[bool] = False
    """Whether short inputs occur in several splits. If so, training rows with a prompt of a scored row are left out."""

    def __init__(self, config: TaskConfig) -> None:
        self.config = config

    def check_options(self) -> None:
        """Raises UserError if `task.options` has a key that the task does not have, or all prompts would be equal."""
        if not _FIELD.search(self.config.prompt):
            raise UserError(
                f"task.prompt={self.config.prompt!r:.200}: names no field of a row, so every prompt would be the same; "
                f"write one in braces, such as {{{next(iter(self.fields), 'question')}}}"
            )
        for name in self.config.options:
            if name not in self.options:
                known, kind = ", ".join(self.options) or "none", self.config.kind
                raise UserError(f"task.options.{name}: task.kind={kind} has no such option; its options: {known}")

    def generated_rows(self, _split: str) -> list[DataRow] | None:
        """The rows that the task makes itself; None if it reads its rows."""
        return None

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
        return [DataRow(f"{hub.id}[{name}] row {i}", dict(row)) for i, row in enumerate(table)]

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


def render(template: str, row: DataRow) -> str:
    """The template, with each {field} replaced by that field of the row. Nothing else is interpreted.

    Raises:
        RowError: the template names a field that the row lacks.
    """

    def field_text(match: re.Match[str]) -> str:
        if match[1] not in row.fields:
            raise RowError(f"the template needs the field '{match[1]}', which is missing")
        return str(row[match[1]])

    return _FIELD.sub(field_text, template)

"""A task's scores as a metric of the `evaluate` package, without the network.

`evaluate.load` downloads a metric's script from the hub. This metric is built from a task instead, and calls the
task's `score` and `total`. To import this module takes seconds, so only scoring imports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import datasets
import evaluate

from tiedlora.errors import UserError
from tiedlora.tasks.base import Example, Score, Task

ROUNDING = 1e-9
"""How far a score may be outside [0, 1]."""


class TaskMetric(evaluate.Metric):  # type: ignore[misc]
    """`TaskMetric(task).compute(predictions=..., references=..., choices=...)`.

    Each argument has one item for each example: its output (a text, or the log-likelihoods of its choices), its
    references, and its choices (empty for a generated answer). The result holds the task's metrics over all examples,
    in [0, 1], and `per_example`, a list of each example's scores.
    """

    def __init__(self, task: Task, by_likelihood: bool = False, examples: Sequence[Example] | None = None) -> None:
        """
        Args:
            by_likelihood: whether the outputs are log-likelihoods.
            examples: the examples of `compute`, for a task whose score reads their prompts, targets or ids. Without
                them, the task's score sees references and choices alone.
        """
        self.task, self.by_likelihood, self.examples = task, by_likelihood, examples
        super().__init__(keep_in_memory=True)

    def _build_data_dir(self) -> str:
        # Otherwise evaluate would make a folder, although all data stay in memory. The home folder may be read-only,
        # and a killed run would not remove the folder.
        return ""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        output = datasets.Sequence(datasets.Value("float64")) if self.by_likelihood else text
        return evaluate.MetricInfo(
            description=f"{', '.join(self.task.metrics)} of {self.task.config.name}",
            citation="",
            inputs_description="predictions, references and choices, one item for each example",
            features=datasets.Features(
                {"predictions": output, "references": datasets.Sequence(text), "choices": datasets.Sequence(text)}
            ),
        )

    def _compute(self, predictions: Any, references: Any, choices: Any) -> dict[str, float | list[dict[str, Score]]]:
        examples = self.examples or [
            Example("", "", "", tuple(answers), tuple(texts))
            for answers, texts in zip(references, choices, strict=True)
        ]
        scores = [self.task.score(output, example) for output, example in zip(predictions, examples, strict=True)]
        # Refuse scores that a record could not hold, before anything is written.
        for example, row in zip(examples, scores, strict=True):
            for metric in self.task.metrics:
                score = row.get(metric)
                is_valid = isinstance(score, Real) and -ROUNDING <= score <= 1 + ROUNDING
                if not (is_valid or (score is not None and metric in self.task.corpus_metrics)):
                    raise UserError(
                        f"task={self.task.config.name}: the score of row {example.id} has {metric}={score!r:.40}; it "
                        "must be a number from 0 to 1"
                    )
        totals = {name: self.task.total(name, [row[name] for row in scores]) for name in self.task.metrics}
        return {**totals, "per_example": scores}

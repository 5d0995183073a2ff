"""A task's scores as a metric of the `evaluate` package, without the network.

`evaluate.load` downloads a metric's script from the hub. This metric is built from a task instead, and calls the
task's `score` and `total`. To import this module takes seconds, so only scoring imports it.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from tiedlora.tasks.base import Example, Score, Task


class TaskMetric(evaluate.Metric):  # type: ignore[misc]
    """`TaskMetric(task).compute(predictions=..., references=..., choices=...)`.

    Each argument has one item for each example: its output (a text, or the log-likelihoods of its choices), its
    references, and its choices (empty for a generated answer). The result holds the task's metrics over all examples,
    in [0, 1], and `per_example`, a list of each example's scores.
    """

    def __init__(self, task: Task, by_likelihood: bool = False) -> None:
        self.task, self.by_likelihood = task, by_likelihood
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
        scores = [
            self.task.score(output, Example("", "", "", tuple(answers), tuple(texts)))
            for output, answers, texts in zip(predictions, references, choices, strict=True)
        ]
        totals = {name: self.task.total(name, [row[name] for row in scores]) for name in self.task.metrics}
        return {**totals, "per_example": scores}

"""Any task's scores as one `evaluate` metric that works offline.

`evaluate.load` fetches a metric's script from the hub. This module needs none: it is built from a task, and
scores through the task's own `score` and `corpus_score`. Importing it costs seconds, so only scoring does.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from tiedlora.tasks import Example, Task


class TaskMetric(evaluate.Metric):  # type: ignore[misc]
    """`TaskMetric(task).compute(predictions=..., references=..., choices=...)`.

    One item an example: its output (a text, or for choices their log-likelihoods), its references,
    and its choices (empty for a generated answer). Returns the task's metrics over all examples, in
    [0, 1], and `per_example`, a list of each example's scores.
    """

    def __init__(self, task: Task, by_likelihood: bool = False) -> None:
        self.task, self.by_likelihood = task, by_likelihood
        super().__init__(keep_in_memory=True)

    def _build_data_dir(self) -> str:
        # evaluate makes a folder even where everything stays in memory: a home may be read-only, and a killed run
        # would leave it behind.
        return ""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        output = datasets.Sequence(datasets.Value("float64")) if self.by_likelihood else text
        return evaluate.MetricInfo(
            description=f"{', '.join(self.task.metrics)} of {self.task.config.name}",
            citation="",
            inputs_description="predictions, references and choices, one item an example",
            features=datasets.Features(
                {"predictions": output, "references": datasets.Sequence(text), "choices": datasets.Sequence(text)}
            ),
        )

    def _compute(self, predictions: Any, references: Any, choices: Any) -> dict[str, Any]:
        rows = [
            self.task.score(output, Example("", "", "", tuple(wanted), tuple(texts)))
            for output, wanted, texts in zip(predictions, references, choices, strict=True)
        ]
        totals = {name: self.task.total(name, [row[name] for row in rows]) for name in self.task.metrics}
        return {**totals, "per_example": rows}

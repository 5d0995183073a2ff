"""The metrics of a split, from its rows. Each has a 95 % interval over which examples were drawn."""

from __future__ import annotations

from collections.abc import Sequence

from tiedlora.records.rows import PredictionRow, Score
from tiedlora.statistics.bootstrap import bootstrap_corpus, bootstrap_mean
from tiedlora.statistics.interval import Interval
from tiedlora.statistics.intervals import is_binary, paired_proportions, wilson
from tiedlora.tasks import Task


def summarise(rows: Sequence[PredictionRow], task: Task) -> dict[str, Interval]:
    """Each metric over the rows, with Wilson's interval if every score is 0 or 1, otherwise with a bootstrap."""
    return {metric: _estimate(task, metric, [row.scores[metric] for row in rows]) for metric in task.metrics}


def gains(adapted: Sequence[PredictionRow], base: Sequence[PredictionRow], task: Task) -> dict[str, Interval]:
    """Each metric of the adapted model minus that of the base model, paired on the same examples.

    The interval is Newcombe's if every score is 0 or 1, and otherwise a bootstrap that resamples pairs.

    Raises:
        ValueError: the two sides do not have the same examples in the same order.
    """
    if [row.id for row in adapted] != [row.id for row in base]:
        raise ValueError("paired scores need the same examples in the same order")
    return {
        metric: _difference(task, metric, *([row.scores[metric] for row in rows] for rows in (adapted, base)))
        for metric in task.metrics
    }


def _estimate(task: Task, metric: str, scores: list[Score]) -> Interval:
    if metric in task.corpus_metrics:
        return bootstrap_corpus(_table(scores), lambda sums: task.corpus_score(metric, sums))
    values = _numbers(scores)
    return wilson(int(sum(values)), len(values)) if is_binary(values) else bootstrap_mean(values, (0.0, 1.0))


def _difference(task: Task, metric: str, adapted: list[Score], base: list[Score]) -> Interval:
    if metric in task.corpus_metrics:
        return bootstrap_corpus(_table(adapted), lambda sums: task.corpus_score(metric, sums), _table(base))
    first, second = _numbers(adapted), _numbers(base)
    if is_binary([*first, *second]):
        return paired_proportions(first, second)
    return bootstrap_mean([a - b for a, b in zip(first, second, strict=True)], (-1.0, 1.0))


def _numbers(scores: list[Score]) -> list[float]:
    numbers = [score for score in scores if not isinstance(score, list)]
    if len(numbers) != len(scores):
        raise ValueError("some scores of the metric are numbers and others are statistics")
    return numbers


def _table(scores: list[Score]) -> list[list[float]]:
    table = [score for score in scores if isinstance(score, list)]
    if len(table) != len(scores):
        raise ValueError("some scores of the metric are statistics and others are numbers")
    return table

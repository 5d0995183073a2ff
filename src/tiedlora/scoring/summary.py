"""Metrics of a split from its rows: each with its 95 % interval over which examples were drawn."""

from __future__ import annotations

from collections.abc import Sequence

from tiedlora.records.rows import PredictionRow, Score
from tiedlora.statistics.bootstrap import bootstrap_corpus, bootstrap_mean
from tiedlora.statistics.interval import Interval
from tiedlora.statistics.intervals import is_binary, paired_proportions, wilson
from tiedlora.tasks import Task


def summarise(rows: Sequence[PredictionRow], task: Task) -> dict[str, Interval]:
    """Each metric over the rows.

    Wilson's interval where every score is 0 or 1, else a bootstrap over examples.
    """
    return {metric: _estimate(task, metric, [row.scores[metric] for row in rows]) for metric in task.metrics}


def gains(ours: Sequence[PredictionRow], theirs: Sequence[PredictionRow], task: Task) -> dict[str, Interval]:
    """Each metric's paired difference to the base model on the same examples.

    Newcombe's interval where every score is 0 or 1, else a bootstrap that resamples pairs.

    Raises:
        ValueError: the rows are not those of the same examples in the same order.
    """
    if [row.id for row in ours] != [row.id for row in theirs]:
        raise ValueError("paired scores need the same examples in the same order")
    return {
        metric: _difference(task, metric, *([row.scores[metric] for row in rows] for rows in (ours, theirs)))
        for metric in task.metrics
    }


def _estimate(task: Task, metric: str, scores: list[Score]) -> Interval:
    if metric in task.corpus_metrics:
        return bootstrap_corpus(_table(scores), lambda sums: task.corpus_score(metric, sums))
    values = _numbers(scores)
    return wilson(int(sum(values)), len(values)) if is_binary(values) else bootstrap_mean(values, (0.0, 1.0))


def _difference(task: Task, metric: str, ours: list[Score], theirs: list[Score]) -> Interval:
    if metric in task.corpus_metrics:
        return bootstrap_corpus(_table(ours), lambda sums: task.corpus_score(metric, sums), _table(theirs))
    first, second = _numbers(ours), _numbers(theirs)
    if is_binary([*first, *second]):
        return paired_proportions(first, second)
    return bootstrap_mean([a - b for a, b in zip(first, second, strict=True)], (-1.0, 1.0))


def _numbers(scores: list[Score]) -> list[float]:
    return [score for score in scores if not isinstance(score, list)]


def _table(scores: list[Score]) -> list[list[float]]:
    return [score for score in scores if isinstance(score, list)]

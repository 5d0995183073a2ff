"""The metrics of a split, from its rows. Each has a 95 % interval over which examples were drawn."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

from tiedlora.analysis.intervals import bootstrap_corpus, bootstrap_mean, is_binary, paired_proportions, wilson
from tiedlora.records.interval import Interval
from tiedlora.records.loss_metrics import LARGEST_LOSS, LOSS_METRICS, TARGET_LOSS_BY_TOKEN, is_loss, mean_per_token
from tiedlora.records.rows import PredictionRow, Score
from tiedlora.tasks import Task


def summarise(rows: Sequence[PredictionRow], task: Task) -> dict[str, Interval]:
    """Each metric over the rows, with Wilson's interval if every score is 0 or 1, otherwise with a bootstrap."""
    return {metric: _interval(task, metric, _scores(rows, metric)) for metric in _metrics(rows, task)}


def gains(adapted: Sequence[PredictionRow], base: Sequence[PredictionRow], task: Task) -> dict[str, Interval]:
    """Each metric of the adapted model minus that of the base model, paired on the same examples.

    The interval is Newcombe's if every score is 0 or 1, and otherwise a bootstrap that resamples pairs.

    Raises:
        ValueError: the two sides do not have the same examples in the same order, or not the same metrics.
    """
    if [row.id for row in adapted] != [row.id for row in base]:
        raise ValueError("paired scores need the same examples in the same order")
    return {
        metric: _interval(task, metric, _scores(adapted, metric), _scores(base, metric))
        for metric in _metrics(adapted, task)
    }


def _metrics(rows: Sequence[PredictionRow], task: Task) -> list[str]:
    """The metrics that the rows have: the task's own, then the losses."""
    own = task.metrics if rows[0].has_answer else ()
    return [*own, *(metric for metric in LOSS_METRICS if metric in rows[0].scores)]


def _scores(rows: Sequence[PredictionRow], metric: str) -> list[Score]:
    if any(metric not in row.scores for row in rows):
        raise ValueError(f"some rows have {metric} and others do not")
    return [row.scores[metric] for row in rows]


def _interval(task: Task, metric: str, scores: list[Score], base: list[Score] | None = None) -> Interval:
    """Of the scores, or of their paired differences to those of `base`."""
    # The largest possible value, for the interval that a single row cannot give.
    largest = LARGEST_LOSS if is_loss(metric) else 1.0
    if (corpus_score := _corpus_score(task, metric)) is not None:
        others = None if base is None else _table(base)
        return bootstrap_corpus(_table(scores), corpus_score, others, largest=largest)
    first, second = _numbers(scores), _numbers(base or [])
    # A loss may be exactly 0 or 1 nats, and is no proportion.
    if is_binary([*first, *second]) and not is_loss(metric):
        return wilson(int(sum(first)), len(first)) if base is None else paired_proportions(first, second)
    if base is None:
        return bootstrap_mean(first, (0.0, largest))
    return bootstrap_mean([a - b for a, b in zip(first, second, strict=True)], (-largest, largest))


def _corpus_score(task: Task, metric: str) -> Callable[[Iterable[float]], float] | None:
    """The function from summed statistics to a corpus-level metric; None for a metric that is a mean over rows."""
    if metric == TARGET_LOSS_BY_TOKEN:
        return mean_per_token
    return functools.partial(task.corpus_score, metric) if metric in task.corpus_metrics else None


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

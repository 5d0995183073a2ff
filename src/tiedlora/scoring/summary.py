"""The metrics of a split, from its rows. Each has a 95 % interval over which examples, or clusters, were drawn."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from tiedlora.analysis.intervals import (
    Clusters,
    bootstrap_corpus,
    bootstrap_mean,
    clustered_mean,
    is_binary,
    paired_proportions,
    pseudo_values,
    wilson,
)
from tiedlora.records.interval import Interval
from tiedlora.records.loss_metrics import (
    DRIFT,
    LARGEST_LOSS,
    LOSS_METRICS,
    TARGET_LOSS_BY_TOKEN,
    is_loss,
    mean_per_token,
)
from tiedlora.records.rows import PredictionRow, Score
from tiedlora.tasks import Task


def summarise(rows: Sequence[PredictionRow], task: Task) -> dict[str, Interval]:
    """Each metric over the rows, with its interval.

    It is Wilson's if every score is 0 or 1, otherwise a bootstrap; of rows in clusters, that over clusters.
    """
    clusters = _clusters(rows)
    return {metric: _interval(task, metric, clusters, _scores(rows, metric)) for metric in _metrics(rows, task)}


def gains(adapted: Sequence[PredictionRow], base: Sequence[PredictionRow], task: Task) -> dict[str, Interval]:
    """Each metric of the adapted model minus that of the base model, paired on the same examples.

    The interval is Newcombe's if every score is 0 or 1, and otherwise a bootstrap that resamples pairs; of rows in
    clusters, that over clusters.

    Raises:
        ValueError: the two sides do not have the same examples in the same order, or not the same metrics.
    """
    if [row.id for row in adapted] != [row.id for row in base]:
        raise ValueError("paired scores need the same examples in the same order")
    clusters = _clusters(adapted)
    return {
        metric: _interval(task, metric, clusters, _scores(adapted, metric), _scores(base, metric))
        for metric in _metrics(adapted, task)
    }


def _clusters(rows: Sequence[PredictionRow]) -> Clusters | None:
    return Clusters.of([row.cluster for row in rows])


def _metrics(rows: Sequence[PredictionRow], task: Task) -> list[str]:
    """The metrics that the rows have: the task's own, then the losses."""
    own = task.metrics if rows[0].has_answer else ()
    return [*own, *(metric for metric in (*LOSS_METRICS, DRIFT) if metric in rows[0].scores)]


def _scores(rows: Sequence[PredictionRow], metric: str) -> list[Score]:
    if any(metric not in row.scores for row in rows):
        raise ValueError(f"some rows have {metric} and others do not")
    return [row.scores[metric] for row in rows]


def _interval(
    task: Task, metric: str, clusters: Clusters | None, scores: list[Score], base: list[Score] | None = None
) -> Interval:
    """Of the scores, or of their paired differences to those of `base`."""
    # The largest possible value, for the interval that a single row cannot give.
    largest, corpus_score = LARGEST_LOSS if is_loss(metric) else 1.0, _corpus_score(task, metric)
    bounds = (0.0 if base is None else -largest, largest)
    ours, others = (_of_one_kind(some, statistics=corpus_score is not None) for some in (scores, base or []))
    if corpus_score is not None and clusters is None:
        return bootstrap_corpus(ours, corpus_score, None if base is None else others, largest=largest)
    if clusters is not None:
        values, *base_values = (
            np.array(side) if corpus_score is None else pseudo_values(np.array(side), corpus_score)
            for side in ([ours] if base is None else [ours, others])
        )
        return clustered_mean(values - sum(base_values), clusters, bounds)
    # A loss may be exactly 0 or 1 nats, and is no proportion.
    if is_binary([*ours, *others]) and not is_loss(metric):
        return wilson(int(sum(ours)), len(ours)) if base is None else paired_proportions(ours, others)
    return bootstrap_mean(ours if base is None else [a - b for a, b in zip(ours, others, strict=True)], bounds)


def _corpus_score(task: Task, metric: str) -> Callable[[Iterable[float]], float] | None:
    """The function from summed statistics to a corpus-level metric; None for a metric that is a mean over rows."""
    if metric == TARGET_LOSS_BY_TOKEN:
        return mean_per_token
    return functools.partial(task.corpus_score, metric) if metric in task.corpus_metrics else None


def _of_one_kind(scores: list[Score], *, statistics: bool) -> list[Any]:
    """The scores, which must all be a corpus metric's statistics, or all be numbers."""
    if any(isinstance(score, list) is not statistics for score in scores):
        raise ValueError(f"some scores of the metric are {'no statistics' if statistics else 'no numbers'}")
    return scores

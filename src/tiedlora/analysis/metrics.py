"""The metrics of a file of scores, from its rows. Each has a 95 % interval over which rows or clusters were drawn."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from tiedlora.analysis.intervals import (
    Array,
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
from tiedlora.records.rows import PredictionRow
from tiedlora.records.scores import Kind
from tiedlora.tasks import Task


def summarise(rows: Sequence[PredictionRow], task: Task, kind: Kind) -> dict[str, Interval]:
    """Each metric of this kind with its interval.

    It is Wilson's if every score is 0 or 1, otherwise a bootstrap; for rows in clusters, a jackknife over clusters.
    """
    return _summarised(task, kind, rows)


def gains(
    adapted: Sequence[PredictionRow], base: Sequence[PredictionRow], task: Task, kind: Kind
) -> dict[str, Interval]:
    """Each metric of the adapted model minus that of the base model, paired on the same examples.

    The interval is Newcombe's if every score is 0 or 1, and otherwise a bootstrap that resamples pairs; for rows in
    clusters, a jackknife over clusters.

    Raises:
        ValueError: the two sides do not have the same examples in the same order, or not the same metrics.
    """
    if [row.id for row in adapted] != [row.id for row in base]:
        raise ValueError("paired scores need the same examples in the same order")
    return _summarised(task, kind, adapted, base)


def _summarised(task: Task, kind: Kind, *sides: Sequence[PredictionRow]) -> dict[str, Interval]:
    clusters = Clusters.of([row.cluster for row in sides[0]])
    metrics = {"answers": task.metrics, "losses": LOSS_METRICS, "drift": (DRIFT,)}[kind]
    return {metric: _interval(task, metric, clusters, sides) for metric in metrics}


def _interval(task: Task, metric: str, clusters: Clusters | None, sides: Sequence[Sequence[PredictionRow]]) -> Interval:
    # From summed statistics to the metric; None for a metric that is a mean over rows.
    corpus_score: Callable[[Iterable[float]], float] | None = None
    if metric == TARGET_LOSS_BY_TOKEN:
        corpus_score = mean_per_token
    elif metric in task.corpus_metrics:
        corpus_score = functools.partial(task.corpus_score, metric)
    tables = [_scores(rows, metric, statistics=corpus_score is not None) for rows in sides]
    # The largest possible value, for the interval that a single row cannot give.
    largest = LARGEST_LOSS if is_loss(metric) else 1.0
    limits = (0.0 if len(tables) == 1 else -largest, largest)
    if corpus_score is not None:
        if clusters is None:
            return bootstrap_corpus(tables, corpus_score, limits)
        tables = [pseudo_values(table, corpus_score) for table in tables]
    ours, *base = tables
    if clusters is not None:
        return clustered_mean(ours - sum(base), clusters, limits)
    # A loss may be exactly 0 or 1 nats, and is no proportion.
    if is_binary(tables) and not is_loss(metric):
        return paired_proportions(ours, *base) if base else wilson(int(ours.sum()), len(ours))
    return bootstrap_mean(ours - sum(base), limits)


def _scores(rows: Sequence[PredictionRow], metric: str, *, statistics: bool) -> Array:
    """The rows' scores, which must all be a corpus metric's statistics, or all be numbers."""
    if any(metric not in row.scores or isinstance(row.scores[metric], list) is not statistics for row in rows):
        raise ValueError(
            f"some rows have {'statistics' if statistics else 'a number'} as their {metric}, others do not"
        )
    return np.array([row.scores[metric] for row in rows], dtype=np.float64)

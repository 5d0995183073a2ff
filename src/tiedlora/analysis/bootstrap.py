"""The bootstrap over examples. Every bootstrap interval of a record or a report comes from here, with the same seed.

The resamples depend only on the number of examples. So all scores of the same examples share them, and a bootstrap of
means is one matrix product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tiedlora.records.interval import LEVEL, Interval

RESAMPLES = 2000
"""With so many, the ends of a 95 % interval vary by a few per cent of its width from seed to seed."""
SEED = 0
INDICES_AT_ONCE = 200_000
"""How many resampled row numbers are in memory together."""
ROWS_AT_ONCE = 256
"""How many resamples are multiplied together. Their counts are converted to float64 for the product."""
TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)

Array = NDArray[np.float64]


@functools.lru_cache(maxsize=8)
def resample_counts(examples: int, seed: int = SEED) -> NDArray[np.uint8]:
    """How often each resample contains each example: (RESAMPLES, examples). Each row sums to `examples`.

    Raises:
        ValueError: there are no examples.
    """
    _check_examples(examples)
    generator = np.random.default_rng(seed)
    counts = np.zeros((RESAMPLES, examples), dtype=np.uint8)
    at_once = max(1, INDICES_AT_ONCE // examples)
    for start in range(0, RESAMPLES, at_once):
        block = counts[start : start + at_once]
        drawn = generator.integers(0, examples, block.shape)
        np.add.at(block, (np.arange(len(block))[:, None], drawn), 1)
    return counts


def _check_examples(examples: int) -> None:
    if examples < 1:
        raise ValueError("a bootstrap needs examples")


def resampled_sums(values: Array, seed: int = SEED) -> Array:
    """The sums of the values over each resample.

    Args:
        values: (examples, columns).

    Returns:
        (RESAMPLES, columns).
    """
    counts = resample_counts(len(values), seed)
    blocks = [counts[i : i + ROWS_AT_ONCE].astype(np.float64) @ values for i in range(0, RESAMPLES, ROWS_AT_ONCE)]
    return np.concatenate(blocks)


def bootstrap_means(scores: Array, seed: int = SEED) -> tuple[Array, Array, Array]:
    """Means over the last axis, and the ends of their percentile bootstrap intervals (Efron 1979) over examples.

    Args:
        scores: (..., examples), one number per example, such as a score, a paired difference, or a mean over seeds.

    Returns:
        Three arrays of the shape of the leading axes: mean, low, high.

    Raises:
        ValueError: there are no examples.
    """
    examples = scores.shape[-1]
    _check_examples(examples)
    means = resampled_sums(scores.reshape(-1, examples).T, seed) / examples
    low, high = np.quantile(means, TAILS, axis=0)
    return scores.mean(-1), low.reshape(scores.shape[:-1]), high.reshape(scores.shape[:-1])


def bootstrap_mean(scores: ArrayLike, limits: tuple[float, float], seed: int = SEED) -> Interval:
    """The mean of one number per example, with its interval.

    Args:
        scores: (examples,).
        limits: the smallest and the largest possible score. They are the interval if there is only one example.

    Raises:
        ValueError: there are no examples.
    """
    values = np.asarray(scores, dtype=np.float64)
    if len(values) == 1:
        return Interval(float(values[0]), *limits, "bootstrap")
    mean, low, high = bootstrap_means(values, seed)
    return Interval(float(mean), float(low), float(high), "bootstrap")


def bootstrap_corpus(
    statistics: Sequence[Sequence[float]],
    score: Callable[[Array], float],
    theirs: Sequence[Sequence[float]] | None = None,
    largest: float = 1.0,
) -> Interval:
    """A corpus-level score such as BLEU, with its interval; with `theirs`, the paired difference of two such scores.

    Args:
        statistics: (examples, statistics). `score` takes their sum over examples.
        theirs: the statistics of the other side, for the same examples.
        largest: the largest possible score; the smallest is 0. They are the interval if there is only one example.

    Raises:
        ValueError: there are no examples.
    """

    _check_examples(len(statistics))
    value, resampled = _corpus_scores(statistics, score)
    lowest = 0.0
    if theirs is not None:
        their_value, their_resampled = _corpus_scores(theirs, score)
        value, resampled, lowest = value - their_value, resampled - their_resampled, -largest
    if len(statistics) == 1:
        return Interval(value, lowest, largest, "bootstrap")
    low, high = np.quantile(resampled, TAILS)
    return Interval(value, float(low), float(high), "bootstrap")


def _corpus_scores(statistics: Sequence[Sequence[float]], score: Callable[[Array], float]) -> tuple[float, Array]:
    """The score of all examples (a number), and the score of each resample, (RESAMPLES,)."""
    table = np.asarray(statistics, dtype=np.float64)
    return score(table.sum(0)), np.array([score(sums) for sums in resampled_sums(table)])

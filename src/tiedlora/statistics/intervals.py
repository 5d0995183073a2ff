"""95 % intervals. Each names the variance it covers.

- `wilson`: one run's proportion; covers which examples were drawn, not seeds.
- `paired_proportions`: the difference of two proportions on the same examples; covers the same.
- `bootstrap`: any other score, or difference of scores, over examples; covers the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

LEVEL = 0.95
RESAMPLES = 2000
"""Of a bootstrap: the ends of a 95 % interval then vary by a few per cent of its width from seed to seed."""
INDICES_AT_ONCE = 200_000
"""Resampled row numbers held in memory together."""


@dataclass(frozen=True)
class Interval:
    """An estimate and the interval around it."""

    value: float
    low: float
    high: float
    method: str = ""
    """wilson, newcombe or bootstrap."""

    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def wilson(successes: int, trials: int) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927), as scipy computes it.

    Raises:
        ValueError: no trials.
    """
    found = binomtest(successes, trials).proportion_ci(LEVEL, method="wilson")
    return Interval(successes / trials, float(found.low), float(found.high), "wilson")


def paired_proportions(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """Difference of two proportions over the same examples: Newcombe's hybrid score interval.

    Method 10 of Newcombe, "Improved confidence intervals for the difference between binomial
    proportions based on paired data", Statistics in Medicine 17 (1998). Unlike a normal interval it
    behaves where a proportion is near 0 or 1.

    Args:
        ours, theirs: 0 or 1 for each example, in the same order.

    Raises:
        ValueError: unequal lengths, or no examples.
    """
    n = len(ours)
    if n != len(theirs):
        raise ValueError("paired scores need the same examples")
    both = sum(a == 1 and b == 1 for a, b in zip(ours, theirs, strict=True))
    first = wilson(int(sum(ours)), n)
    second = wilson(int(sum(theirs)), n)
    difference = first.value - second.value
    correlation = _continuity_corrected_phi(both, int(sum(ours)) - both, int(sum(theirs)) - both, n)

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b))

    return Interval(
        difference,
        difference - reach(first.value - first.low, second.high - second.value),
        difference + reach(first.high - first.value, second.value - second.low),
        "newcombe",
    )


def bootstrap(
    count: int,
    statistic: Callable[[NDArray[np.int64]], NDArray[np.float64]],
    limits: tuple[float, float],
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap over examples (Efron 1979): the same resamples for the same count and seed.

    Args:
        count: number of examples.
        statistic: row numbers (resamples, count) -> its values (resamples,). A paired difference takes the
            same row numbers from both sides.
        limits: the statistic's smallest and largest possible value, which is all that one example tells.

    Raises:
        ValueError: no examples.
    """
    if count < 1:
        raise ValueError("a bootstrap needs examples")
    value = float(statistic(np.arange(count)[np.newaxis])[0])
    if count == 1:
        return Interval(value, *limits, "bootstrap")
    generator = np.random.default_rng(seed)
    at_once = max(1, INDICES_AT_ONCE // count)
    sizes = [min(at_once, RESAMPLES - done) for done in range(0, RESAMPLES, at_once)]
    drawn = np.concatenate([statistic(generator.integers(0, count, (size, count))) for size in sizes])
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high), "bootstrap")


def _continuity_corrected_phi(both: int, only_ours: int, only_theirs: int, n: int) -> float:
    neither = n - both - only_ours - only_theirs
    margins = (both + only_ours) * (only_theirs + neither) * (both + only_theirs) * (only_ours + neither)
    if margins == 0:
        return 0.0
    numerator = both * neither - only_ours * only_theirs
    if numerator > 0:
        numerator = max(numerator - n / 2, 0)  # type: ignore[assignment]
    return numerator / math.sqrt(margins)

"""95 % intervals of proportions. Each covers which examples were drawn for one run. It does not cover other seeds.

- `wilson`: one run's proportion;
- `paired_proportions`: the difference of two proportions on the same examples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest

from tiedlora.records.interval import LEVEL, Interval


def wilson(successes: int, trials: int) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927), as scipy computes it.

    Raises:
        ValueError: there are no trials.
    """
    ends = binomtest(successes, trials).proportion_ci(LEVEL, method="wilson")
    return Interval(successes / trials, float(ends.low), float(ends.high), "wilson")


def paired_proportions(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """The difference of two proportions over the same examples, with Newcombe's hybrid score interval.

    This is method 10 of Newcombe, "Improved confidence intervals for the difference between binomial
    proportions based on paired data", Statistics in Medicine 17 (1998). Unlike a normal interval it
    stays correct where a proportion is near 0 or 1.

    Args:
        ours, theirs: 0 or 1 for each example, in the same order.

    Raises:
        ValueError: the lengths differ, or there are no examples.
    """
    n = len(ours)
    if n != len(theirs):
        raise ValueError("paired scores need the same examples")
    both = sum(a == 1 and b == 1 for a, b in zip(ours, theirs, strict=True))
    first = wilson(int(sum(ours)), n)
    second = wilson(int(sum(theirs)), n)
    difference = first.value - second.value
    correlation = _continuity_corrected_phi(both, int(sum(ours)) - both, int(sum(theirs)) - both, n)

    return Interval(
        difference,
        difference - _half_width(first.value - first.low, second.high - second.value, correlation),
        difference + _half_width(first.high - first.value, second.value - second.low, correlation),
        "newcombe",
    )


def is_binary(scores: ArrayLike) -> bool:
    """Whether every score is 0 or 1."""
    return bool(np.isin(np.asarray(scores, dtype=np.float64), (0.0, 1.0)).all())


def _half_width(ours: float, theirs: float, correlation: float) -> float:
    """Newcombe's combination of two half widths of correlated proportions."""
    return math.sqrt(max(0.0, ours * ours - 2 * correlation * ours * theirs + theirs * theirs))


def _continuity_corrected_phi(both: int, only_ours: int, only_theirs: int, n: int) -> float:
    """The correlation of two proportions, with the continuity correction of Newcombe's method 10."""
    neither = n - both - only_ours - only_theirs
    margins = (both + only_ours) * (only_theirs + neither) * (both + only_theirs) * (only_ours + neither)
    if margins == 0:
        return 0.0
    numerator = both * neither - only_ours * only_theirs
    corrected = max(numerator - n / 2, 0.0) if numerator > 0 else float(numerator)
    return corrected / math.sqrt(margins)

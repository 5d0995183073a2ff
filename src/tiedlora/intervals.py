"""95 % intervals. Each names the variance it covers.

- `wilson`: one run's proportion; covers which examples were drawn, not seeds.
- `paired_proportions`: the difference of two proportions on the same examples; covers the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import binomtest

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate and the interval around it."""

    value: float
    low: float
    high: float

    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def wilson(successes: int, trials: int) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927), as scipy computes it.

    Raises:
        ValueError: no trials.
    """
    found = binomtest(successes, trials).proportion_ci(LEVEL, method="wilson")
    return Interval(successes / trials, float(found.low), float(found.high))


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
    )


def _continuity_corrected_phi(both: int, only_ours: int, only_theirs: int, n: int) -> float:
    neither = n - both - only_ours - only_theirs
    margins = (both + only_ours) * (only_theirs + neither) * (both + only_theirs) * (only_ours + neither)
    if margins == 0:
        return 0.0
    numerator = both * neither - only_ours * only_theirs
    if numerator > 0:
        numerator = max(numerator - n / 2, 0)  # type: ignore[assignment]
    return numerator / math.sqrt(margins)

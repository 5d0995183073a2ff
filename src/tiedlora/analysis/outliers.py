"""Seeds that are far from the others of their cell, such as a training that collapsed.

No t interval survives them: one collapse among normal seeds moves the mean, widens the interval, and skews both.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from tiedlora.analysis.crossed import Array

LEVEL = 0.01
FEWEST_SEEDS = 5
LEAST_DISTANCE = 0.01
"""A seed that is nearer to the median than this is not flagged, in the score's unit: one point."""


def outlying(values: Array, least_distance: float = LEAST_DISTANCE) -> list[int]:
    """The seeds whose score is far from the others, by the generalised extreme Studentised deviate (Rosner,
    Technometrics 25, 1983) at level 0.01, for up to (seeds - 1) / 2 outliers.

    The seed farthest from the mean is taken out, then the next, and its distance in standard deviations is compared
    with a critical value of Student's t each time. The last distance above its critical value says how many are out.

    Simulated with 6,000 cells of normal seeds each: 1.8 % of cells of 5 seeds have a flag, 2.2 % of 8, 1.7 % of 12. One
    of 5 seeds that is 10 standard deviations off is flagged in 51 %, 20 off in 97 %, and two that are 40 off in 95 %.
    Of 8 seeds, one that is 10 off is flagged in 98 %.

    Args:
        values: (seeds,), one score or loss each.
        least_distance: a seed nearer to the median than this is not flagged.

    Returns:
        The indices in rising order; none with fewer than FEWEST_SEEDS finite values. A value that is not finite is
        flagged always.
    """
    flagged = [int(index) for index in np.flatnonzero(~np.isfinite(values))]
    kept = [index for index in range(len(values)) if index not in flagged]
    if len(kept) < FEWEST_SEEDS:
        return flagged
    median = float(np.median(values[kept]))
    removed: list[int] = []
    outliers = 0
    for _ in range((len(kept) - 1) // 2):
        rest = values[kept]
        farthest = kept[int(np.argmax(np.abs(rest - rest.mean())))]
        if abs(values[farthest] - rest.mean()) > _critical_value(len(kept)) * rest.std(ddof=1):
            outliers = len(removed) + 1
        removed.append(farthest)
        kept.remove(farthest)
    far = [index for index in removed[:outliers] if abs(values[index] - median) >= least_distance]
    return sorted(flagged + far)


def _critical_value(n: int) -> float:
    """The largest distance from the mean of n normal values, in standard deviations, at LEVEL (Grubbs 1950)."""
    t = stats.t.isf(LEVEL / (2 * n), n - 2)
    return float((n - 1) / math.sqrt(n) * t / math.sqrt(n - 2 + t * t))

"""95 % intervals over seeds and examples. Every function names the variance that its interval covers.

- `over_seeds`: a t interval of one number per seed. It covers the randomness of training, on the scored examples.
- `score_over_examples`, `difference_over_examples`: these cover which examples were drawn, for the seeds that were run.
- `over_both`: seeds and examples crossed. It covers both, as a verdict needs.
- `ratio`: Fieller's interval of a quotient of paired means over seeds, for the retained gain.

`over_seeds` and `over_both` accept leading axes, so that simulations of their coverage use the same code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tiedlora.statistics.bootstrap import bootstrap_mean
from tiedlora.statistics.interval import LEVEL, Interval
from tiedlora.statistics.intervals import is_binary, paired_proportions

Array = NDArray[np.float64]
TAIL = (1 - LEVEL) / 2


def over_seeds(values: Array) -> tuple[Array, Array, Array]:
    """The mean over the last axis, and its t interval (n - 1 degrees of freedom).

    Args:
        values: (..., seeds), with at least two seeds. Paired per-seed differences give the interval of a difference.
    """
    seeds = values.shape[-1]
    mean = values.mean(-1)
    half = stats.t.ppf(1 - TAIL, seeds - 1) * values.std(-1, ddof=1) / math.sqrt(seeds)
    return mean, mean - half, mean + half


def over_both(values: Array) -> tuple[Array, Array, Array]:
    """The mean and the interval of a table of seeds x examples. Both seeds and examples are random samples.

    The model has two-way crossed random effects without replication. The variance of the grand mean is estimated by
    (MS_seeds + MS_examples - MS_rest) / (seeds * examples), with Satterthwaite's degrees of freedom (Biometrics
    Bulletin 2, 1946). By chance, this estimate can be smaller than that from MS_seeds or MS_examples only. Then the
    larger of these two is taken.

    Args:
        values: (..., seeds, examples), with at least two of each.
    """
    seeds, examples = values.shape[-2:]
    of_seed, of_example = values.mean(-1), values.mean(-2)
    mean = of_seed.mean(-1)
    ms_seeds = examples * of_seed.var(-1, ddof=1)
    ms_examples = seeds * of_example.var(-1, ddof=1)
    total = ((values - mean[..., None, None]) ** 2).sum((-2, -1))
    rest = total - (seeds - 1) * ms_seeds - (examples - 1) * ms_examples
    ms_rest = np.maximum(rest, 0.0) / ((seeds - 1) * (examples - 1))
    variance = np.maximum.reduce([ms_seeds + ms_examples - ms_rest, ms_seeds, ms_examples])
    spread = ms_seeds**2 / (seeds - 1) + ms_examples**2 / (examples - 1) + ms_rest**2 / ((seeds - 1) * (examples - 1))
    freedom = np.where(spread > 0, variance**2 / np.where(spread > 0, spread, 1.0), seeds - 1.0)
    half = stats.t.ppf(1 - TAIL, np.maximum(freedom, 1.0)) * np.sqrt(variance / (seeds * examples))
    return mean, mean - half, mean + half


def seeds_interval(values: Array) -> Interval:
    """`over_seeds` of one number per seed, (seeds,), as an Interval."""
    return _interval(over_seeds(values), "t")


def both_interval(values: Array) -> Interval:
    """`over_both` of one table, (seeds, examples), as an Interval."""
    return _interval(over_both(values), "crossed")


def _interval(ends: tuple[Array, Array, Array], method: str) -> Interval:
    value, low, high = map(float, ends)
    return Interval(value, low, high, method)


def score_over_examples(scores: Array) -> Interval:
    """The mean over seeds and examples. Its interval is a bootstrap over examples of the scores averaged over seeds.

    Args:
        scores: (seeds, examples), each in [0, 1].
    """
    return bootstrap_mean(scores.mean(0), (0.0, 1.0))


def difference_over_examples(ours: Array, theirs: Array) -> Interval:
    """The paired difference, with an interval over examples: Newcombe's for proportions of one seed, else a bootstrap.

    Args:
        ours, theirs: (seeds, examples), each in [0, 1], of the same seeds and examples in the same order.
    """
    if len(ours) == 1 and is_binary(ours) and is_binary(theirs):
        return paired_proportions(ours[0].tolist(), theirs[0].tolist())
    return bootstrap_mean((ours - theirs).mean(0), (-1.0, 1.0))


def ratio(numerators: Array, denominators: Array) -> Interval | None:
    """The quotient of two paired means over seeds, with Fieller's interval (J. R. Stat. Soc. B 16, 1954).

    Returns:
        None if there are fewer than two seeds, or no finite interval (the denominator's own interval includes zero).
    """
    seeds = len(numerators)
    if seeds < 2 or denominators.mean() == 0:
        return None
    top, bottom = numerators.mean(), denominators.mean()
    covariance = np.cov(numerators, denominators) / seeds
    t2 = stats.t.ppf(1 - TAIL, seeds - 1) ** 2
    a = bottom**2 - t2 * covariance[1, 1]
    b = top * bottom - t2 * covariance[0, 1]
    c = top**2 - t2 * covariance[0, 0]
    if a <= 0:
        return None
    root = math.sqrt(max(0.0, b * b - a * c))
    return Interval(float(top / bottom), float((b - root) / a), float((b + root) / a), "fieller")


@dataclass(frozen=True)
class Spread:
    """The standard deviations of a paired difference: between seeds, between examples, and of the remainder."""

    seeds: float
    examples: float
    rest: float

    def of_mean(self, seeds: int, rows: int) -> float:
        """The standard error of the mean over so many seeds and rows."""
        return math.sqrt(self.seeds**2 / seeds + self.examples**2 / rows + self.rest**2 / (seeds * rows))


def measured_spread(values: Array) -> Spread:
    """The spread of a table of seeds x examples, estimated from its mean squares.

    Args:
        values: (seeds, examples), with at least two of each. A variance that is estimated below zero becomes zero.
    """
    seeds, examples = values.shape
    of_seed, of_example, mean = values.mean(1), values.mean(0), values.mean()
    rest = float(((values - of_seed[:, None] - of_example + mean) ** 2).sum() / ((seeds - 1) * (examples - 1)))
    between_seeds = float(of_seed.var(ddof=1)) - rest / examples
    between_examples = float(of_example.var(ddof=1)) - rest / seeds
    return Spread(math.sqrt(max(0.0, between_seeds)), math.sqrt(max(0.0, between_examples)), math.sqrt(rest))


POWER = 0.8
MOST_SEEDS, MOST_ROWS = 50, 20_000


def needed_seeds_and_rows(distance: float, spread: Spread, rows: int, least_seeds: int) -> tuple[int, int] | None:
    """The smallest (seeds, rows) that find a difference at `distance` from the margin in 4 of 5 repetitions.

    Seeds are increased first, at the given number of rows. If MOST_SEEDS seeds are too few, the rows are doubled.

    Returns:
        None if even MOST_SEEDS seeds of MOST_ROWS rows are too few.
    """
    while rows <= MOST_ROWS:
        for seeds in range(max(2, least_seeds), MOST_SEEDS + 1):
            t_quantiles = stats.t.ppf(1 - TAIL, seeds - 1) + stats.t.ppf(POWER, seeds - 1)
            if t_quantiles * spread.of_mean(seeds, rows) <= distance:
                return seeds, rows
        rows = MOST_ROWS if rows < MOST_ROWS < 2 * rows else 2 * rows
    return None

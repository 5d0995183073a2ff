"""95 % intervals over seeds and examples. Every function names the variance that its interval covers.

- `over_seeds`: a t interval of one number per seed. It covers the randomness of training, on the scored examples.
- `score_over_examples`, `difference_over_examples`: these cover which examples were drawn, for the seeds that were run.
- `over_both`: seeds and examples crossed. It covers both, as a verdict needs.
- `ratio`: Fieller's interval of a quotient of paired means over seeds, for the retained gain.

`over_seeds` and `over_both` accept leading axes, so that simulations of their coverage use the same code.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from tiedlora.analysis.bootstrap import bootstrap_mean
from tiedlora.analysis.intervals import is_binary, paired_proportions
from tiedlora.records.interval import LEVEL, Interval

Array = NDArray[np.float64]
TAIL = (1 - LEVEL) / 2
ROUNDING = 1e-12
"""Means and standard deviations below this are rounding. Scores are fractions of 1, and losses are a few units."""
SMALLEST_LEVEL = 1e-100
"""Smaller levels count as 0. (Far below this, scipy's quantiles of Student's t are not finite.)"""


def over_seeds(values: Array) -> tuple[Array, Array, Array]:
    """The mean over the last axis, and its t interval (n - 1 degrees of freedom).

    Args:
        values: (..., seeds), with at least two seeds. Paired per-seed differences give the interval of a difference.
    """
    seeds = values.shape[-1]
    mean = values.mean(-1)
    half = stats.t.ppf(1 - TAIL, seeds - 1) * values.std(-1, ddof=1) / math.sqrt(seeds)
    return mean, mean - half, mean + half


@dataclass(frozen=True)
class MeanSquares:
    """The mean and the mean squares of tables of seeds x rows: the analysis of variance of two crossed random factors.

    The arrays have the shape of the tables' leading axes.
    """

    mean: Array
    of_seeds: Array
    of_rows: Array
    of_rest: Array
    seeds: int
    rows: int

    def half_width(self, level: float) -> Array:
        """Half the width of the two-sided interval of the mean, as `over_both` explains it."""
        t_seeds, t_rows = _t_quantile(level, self.seeds - 1), _t_quantile(level, self.rows - 1)
        both = np.hypot(
            t_seeds * np.sqrt(self.of_seeds), t_rows * np.sqrt(np.maximum(self.of_rows - self.of_rest, 0.0))
        )
        half: Array = np.maximum(both, t_rows * np.sqrt(self.of_rows)) / math.sqrt(self.seeds * self.rows)
        return half


@functools.lru_cache(maxsize=4096)
def _t_quantile(level: float, freedom: int) -> float:
    """Student's t at a two-sided level. Simulations ask for few of them very often, and scipy needs 0.2 ms for each."""
    return float(stats.t.isf(level / 2, freedom))


def mean_squares(values: Array) -> MeanSquares:
    """The mean squares of tables without replication.

    Args:
        values: (..., seeds, rows), with at least two of each, all finite.

    Raises:
        ValueError: there are fewer than two seeds or rows, or a value is not finite.
    """
    seeds, rows = values.shape[-2:]
    if seeds < 2 or rows < 2:
        raise ValueError(f"an interval over seeds and rows needs two of each; there are {seeds} seeds and {rows} rows")
    of_seed, of_row = values.mean(-1), values.mean(-2)
    mean = of_seed.mean(-1)
    if not np.isfinite(mean).all():
        raise ValueError("an interval over seeds and rows needs finite values")
    of_seeds = rows * of_seed.var(-1, ddof=1)
    of_rows = seeds * of_row.var(-1, ddof=1)
    total = np.einsum("...sr,...sr->...", values, values) - seeds * rows * mean**2
    rest = (total - (seeds - 1) * of_seeds - (rows - 1) * of_rows) / ((seeds - 1) * (rows - 1))
    # A contrast of equal scores is not exactly 0, and rounding must not look like a difference.
    mean = np.where(np.abs(mean) < ROUNDING, 0.0, mean)
    of_seeds, of_rows, rest = (np.where(square < ROUNDING**2, 0.0, square) for square in (of_seeds, of_rows, rest))
    return MeanSquares(mean, of_seeds, of_rows, rest, seeds, rows)


def over_both(values: Array, level: float = 1 - LEVEL) -> tuple[Array, Array, Array]:
    """The mean and the interval of a table of seeds x rows. Both seeds and rows are random samples.

    The model has two-way crossed random effects without replication. The variance of the mean has two parts,
    MS_seeds and MS_rows - MS_rest, each divided by seeds * rows. Each part is multiplied by the square of its own
    Student quantile:

        half^2 = (t(seeds - 1)^2 MS_seeds + t(rows - 1)^2 max(0, MS_rows - MS_rest)) / (seeds * rows)

    For independent estimates of variance, such a sum is never too small (Banerjee, Sankhya A 23, 1961): the chance
    that a squared normal stays below a bound is a concave function of the bound, so the coverage is at least the
    average of the coverages of the parts. This holds at every level. By chance all seeds may have the same mean, so
    the interval is never narrower than that over rows only, t(rows - 1)^2 MS_rows / (seeds * rows).

    Args:
        values: (..., seeds, rows), with at least two of each.
        level: the two-sided level, 0.05 for a 95 % interval.
    """
    squares = mean_squares(values)
    half = squares.half_width(level)
    return squares.mean, squares.mean - half, squares.mean + half


def p_value(values: Array) -> float:
    """The smallest two-sided level at which the interval of `over_both` excludes 0.

    A table without any variance has 0.0, or 1.0 if its mean is 0.

    Args:
        values: (seeds, rows), with at least two of each.
    """
    squares = mean_squares(values)
    distance = abs(float(squares.mean))
    if distance == 0.0:
        return 1.0

    def excess(log_level: float) -> float:
        return float(squares.half_width(math.exp(log_level))) - distance

    smallest = math.log(SMALLEST_LEVEL)
    if excess(smallest) < 0:
        return 0.0
    return math.exp(optimize.brentq(excess, smallest, 0.0, xtol=1e-10))


def seeds_interval(values: Array) -> Interval:
    """`over_seeds` of one number per seed, (seeds,), as an Interval."""
    return _interval(over_seeds(values), "t")


def both_interval(values: Array, level: float = 1 - LEVEL) -> Interval:
    """`over_both` of one table, (seeds, rows), as an Interval."""
    return _interval(over_both(values, level), "crossed")


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

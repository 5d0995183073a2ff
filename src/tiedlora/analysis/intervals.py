"""Every interval of the project, from arrays of numbers. Each function names the variance that its interval covers.

- the rows of one run: `wilson`, `paired_proportions`, `bootstrap_mean`, `bootstrap_corpus`, `paired_difference`;
- the choice of rows, for the seeds that were run: `over_examples`;
- training's randomness, on exactly these rows: `seeds_interval`;
- both, as a verdict needs: `both_interval`, from `mean_squares`, which accepts leading axes for simulations.

`mcnemar` and `level_of` are the tests of a paired difference, and `smallest_shown` says what they can find.

Where rows come in clusters, such as the questions about one article, the clusters are the random sample and not their
rows: every interval over rows takes their numbers (`clusters`), and those of one run become `clustered_mean`.

`outlying` says where an interval over seeds cannot be trusted.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

# Its parts load when they are first used: scipy.stats takes a second, and a sweep's plan needs none of it.
import scipy
from numpy.typing import ArrayLike, NDArray

from tiedlora.records.interval import LEVEL, Interval
from tiedlora.records.rows import ValidationLosses

Array = NDArray[np.float64]
TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
ROUNDING = 1e-12
"""Means and standard deviations below this are rounding. Scores are fractions of 1, and losses are a few units."""
SMALLEST_LEVEL = 1e-100
"""Smaller levels count as 0. (Far below this, scipy's quantiles of Student's t are not finite.)"""


# Proportions of one run.


def wilson(successes: int, trials: int) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927), as scipy computes it.

    Raises:
        ValueError: there are no trials.
    """
    ends = scipy.stats.binomtest(successes, trials).proportion_ci(LEVEL, method="wilson")
    return Interval(successes / trials, float(ends.low), float(ends.high), "wilson")


def paired_proportions(ours: Array, theirs: Array) -> Interval:
    """The difference of two proportions over the same examples, with Newcombe's hybrid score interval.

    This is method 10 of Newcombe, "Improved confidence intervals for the difference between binomial
    proportions based on paired data", Statistics in Medicine 17 (1998). Unlike a normal interval it
    stays correct where a proportion is near 0 or 1.

    Args:
        ours, theirs: (examples,), 0 or 1 each, of the same examples.

    Raises:
        ValueError: the lengths differ, or there are no examples.
    """
    n, our_sum, their_sum, both = len(ours), int(ours.sum()), int(theirs.sum()), int(ours @ theirs)
    first, second = wilson(our_sum, n), wilson(their_sum, n)
    # The correlation of the two proportions, with the continuity correction of method 10.
    margins = our_sum * (n - our_sum) * their_sum * (n - their_sum)
    determinant = both * (n - our_sum - their_sum + both) - (our_sum - both) * (their_sum - both)
    corrected = max(determinant - n / 2, 0.0) if determinant > 0 else float(determinant)
    correlation = corrected / math.sqrt(margins) if margins else 0.0

    def half_width(ours: float, theirs: float) -> float:
        """Newcombe's combination of two half widths of correlated proportions."""
        return math.sqrt(max(0.0, ours * ours - 2 * correlation * ours * theirs + theirs * theirs))

    difference = first.value - second.value
    low = difference - half_width(first.value - first.low, second.high - second.value)
    high = difference + half_width(first.high - first.value, second.value - second.low)
    return Interval(difference, low, high, "newcombe")


def is_binary(scores: ArrayLike) -> bool:
    """Whether every score is 0 or 1."""
    return bool(np.isin(np.asarray(scores, dtype=np.float64), (0.0, 1.0)).all())


# The bootstrap over examples. The resamples depend only on the number of examples. So all scores of the same examples
# share them, and a bootstrap of means is one matrix product.

RESAMPLES = 2000
"""With so many, the ends of a 95 % interval vary by a few per cent of its width from seed to seed."""
ROWS_AT_ONCE = 256
"""How many resamples are multiplied together. Their counts are converted to float64 for the product."""


@functools.lru_cache(maxsize=8)
def _resample_counts(examples: int) -> NDArray[np.uint8]:
    """How often each resample contains each example: (RESAMPLES, examples). Each row sums to `examples`."""
    if examples < 1:
        raise ValueError("a bootstrap needs examples")
    generator = np.random.default_rng(0)
    counts = np.zeros((RESAMPLES, examples), dtype=np.uint8)
    for row in counts:
        row[:] = np.bincount(generator.integers(0, examples, examples), minlength=examples)
    return counts


def _resampled_sums(values: Array) -> Array:
    """The sums over each resample, (RESAMPLES, columns), of values (examples, columns)."""
    counts = _resample_counts(len(values))
    blocks = [counts[i : i + ROWS_AT_ONCE].astype(np.float64) @ values for i in range(0, RESAMPLES, ROWS_AT_ONCE)]
    return np.concatenate(blocks)


def _bootstrap(value: float, resampled: Array, examples: int, limits: tuple[float, float]) -> Interval:
    """The percentile bootstrap interval (Efron 1979); of one example, the smallest and the largest possible value."""
    low, high = limits if examples == 1 else np.quantile(resampled, TAILS)
    return Interval(value, float(low), float(high), "bootstrap")


def bootstrap_mean(scores: ArrayLike, limits: tuple[float, float]) -> Interval:
    """The mean of one number per example, with its interval over examples.

    Args:
        scores: (examples,), such as scores, paired differences, or means over seeds.
        limits: the smallest and the largest possible score. They are the interval if there is only one example.

    Raises:
        ValueError: there are no examples.
    """
    values = np.asarray(scores, dtype=np.float64)
    resampled = _resampled_sums(values[:, None]) / len(values)
    return _bootstrap(float(values.mean()), resampled, len(values), limits)


def bootstrap_corpus(sides: Sequence[Array], score: Callable[[Array], float], limits: tuple[float, float]) -> Interval:
    """A corpus-level score such as BLEU, with its interval; of two sides, the paired difference of their scores.

    Args:
        sides: (examples, statistics) each, of the same examples. `score` takes their sum over examples.
        limits: as for `bootstrap_mean`.

    Raises:
        ValueError: there are no examples.
    """
    ours, *theirs = (np.array([score(sums) for sums in (side.sum(0), *_resampled_sums(side))]) for side in sides)
    values = ours - sum(theirs)
    return _bootstrap(float(values[0]), values[1:], len(sides[0]), limits)


def pseudo_values(statistics: Array, score: Callable[[Array], float]) -> Array:
    """One number per example for a metric that is not a mean. So every interval of a mean works for it too.

    These are Tukey's jackknife pseudo-values (Ann. Math. Statist. 29, 1958, p. 614), shifted so that their mean is the
    corpus score. To first order, the spread of their mean is the spread of the score when examples are resampled.

    Args:
        statistics: (examples, statistics). `score` takes their sum over examples.
    """
    total, count = statistics.sum(0), len(statistics)
    full_score = score(total)
    if count == 1:
        return np.array([full_score])
    without_one = np.array([score(total - row) for row in statistics])
    values = count * full_score - (count - 1) * without_one
    return np.asarray(values - values.mean() + full_score)


def over_examples(ours: Array, theirs: Array | None = None, clusters: Clusters | None = None) -> Interval:
    """The mean over seeds and examples, or the paired difference of two such means, with an interval over examples.

    It is Newcombe's for the difference of two proportions of one seed, and otherwise a bootstrap over examples of what
    is averaged over seeds.

    Args:
        ours, theirs: (seeds, examples), scores in [0, 1] or losses in nats, of the same seeds and examples in order.
        clusters: with them, the interval is that of `clustered_mean`.
    """
    values = (ours if theirs is None else ours - theirs).mean(0)
    if clusters is not None:
        return clustered_mean(values, clusters)
    if theirs is not None and len(ours) == 1 and is_binary(ours) and is_binary(theirs):
        return paired_proportions(ours[0], theirs[0])
    return bootstrap_mean(values, (0.0 if theirs is None else -1.0, 1.0))


# Seeds.


def seeds_interval(values: Array) -> Interval:
    """The mean over at least two seeds, (seeds,), and its t interval (n - 1 degrees of freedom).

    Paired differences, one for each seed, give the interval of a difference.
    """
    mean = float(values.mean())
    half = _t_quantile(1 - LEVEL, len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, "t")


# Rows in clusters.


FEWEST_FREEDOM = 4
"""The fewest degrees of freedom between clusters: those of 5 clusters of one size."""


@dataclass(frozen=True, eq=False)
class Clusters:
    """Which cluster each row belongs to, such as the article that a question is about."""

    codes: NDArray[np.intp]
    """(rows,): the number of each row's cluster, counted from 0."""

    @classmethod
    def of(cls, names: Sequence[str]) -> Clusters | None:
        """The clusters of rows by their names; a row with an empty name is a cluster of its own.

        Returns:
            None if no two rows share a cluster, or if there are too few clusters (FEWEST_FREEDOM): an interval over
            them would be as wide as the scale. Intervals over rows then hold for these clusters alone.
        """
        own = [("name", name) if name else ("row", str(number)) for number, name in enumerate(names)]
        places = {name: place for place, name in enumerate(dict.fromkeys(own))}
        found = cls(np.array([places[name] for name in own]))
        return None if len(places) == len(names) or found.freedom < FEWEST_FREEDOM else found

    @functools.cached_property
    def sizes(self) -> Array:
        """(clusters,): the number of rows of each cluster."""
        return np.bincount(self.codes).astype(np.float64)

    @functools.cached_property
    def freedom(self) -> float:
        """The degrees of freedom of the variance between clusters: (sum n_k^2)^2 / sum n_k^4 - 1.

        This is Satterthwaite's number (Biometrics Bulletin 2, 1946) where the clusters are all of the variance, so the
        deviation of cluster k has a variance of n_k^2. It is clusters - 1 if all have one size, and smaller otherwise.
        Where rows are most of the variance, it is smaller than needed (R^2 / sum n_k^2 - 1), and intervals are wider.
        """
        squares = self.sizes**2
        return float(squares.sum() ** 2 / np.square(squares).sum() - 1)

    def sums(self, values: Array) -> Array:
        """(..., clusters): the sums over each cluster's rows of values (..., rows)."""
        order = np.argsort(self.codes, kind="stable")
        starts = np.searchsorted(self.codes[order], np.arange(len(self.sizes)))
        summed: Array = np.add.reduceat(values[..., order], starts, axis=-1)
        return summed

    def variance(self, deviations: Array) -> Array:
        """The jackknife's variance of a mean over rows, leaving out one cluster at a time.

        It is sum((e_k / (1 - n_k / R))^2) (K - 1) / (K R^2), which does not fall short for clusters of unequal sizes.

        Args:
            deviations: (..., clusters): e_k, the sums over clusters of the rows' deviations from the mean.
        """
        rows, count = self.sizes.sum(), len(self.sizes)
        found: Array = np.square(deviations / (1 - self.sizes / rows)).sum(-1) * (count - 1) / (count * rows**2)
        return found


def clustered_mean(values: Array, clusters: Clusters, limits: tuple[float, float] = (-math.inf, math.inf)) -> Interval:
    """The mean of one number per row, with the interval over the choice of clusters (jackknife and t).

    Args:
        values: (rows,).
        limits: the smallest and the largest possible mean, which the interval does not leave.
    """
    mean, (lowest, highest) = float(values.mean()), limits
    half = _t_quantile(1 - LEVEL, clusters.freedom) * _error_of_mean(values, clusters)
    return Interval(mean, max(lowest, mean - half), min(highest, mean + half), "clusters")


def _error_of_mean(values: Array, clusters: Clusters | None) -> float:
    """The standard error of the mean of one number per row, (rows,), over the choice of rows or of clusters."""
    if clusters is None:
        return float(values.std(ddof=1)) / math.sqrt(len(values))
    return math.sqrt(float(clusters.variance(clusters.sums(values - values.mean()))))


# Seeds and rows, crossed.


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
    freedom: float
    """The degrees of freedom of the rows' part: rows - 1, or those of `Clusters`."""

    def half_width(self, level: float = 1 - LEVEL) -> Array:
        """Half the width of the two-sided interval of the mean. Both seeds and rows are random samples.

            half^2 = (t(seeds - 1)^2 MS_seeds + t(freedom)^2 max(0, MS_rows - MS_rest)) / (seeds * rows)

        For independent estimates of variance, such a sum is never too small, at any level (Banerjee, Sankhya A 23,
        1961). By chance all seeds may have the same mean, so the interval is never narrower than that over rows only.

        Args:
            level: the two-sided level, 0.05 for a 95 % interval.
        """
        t_seeds, t_rows = _t_quantile(level, self.seeds - 1), _t_quantile(level, self.freedom)
        both = np.hypot(
            t_seeds * np.sqrt(self.of_seeds), t_rows * np.sqrt(np.maximum(self.of_rows - self.of_rest, 0.0))
        )
        half: Array = np.maximum(both, t_rows * np.sqrt(self.of_rows)) / math.sqrt(self.seeds * self.rows)
        return half


@functools.lru_cache(maxsize=4096)
def _t_quantile(level: float, freedom: float) -> float:
    """Student's t at a two-sided level. Simulations ask for few of them very often, and scipy needs 0.2 ms for each."""
    return float(scipy.stats.t.isf(level / 2, freedom))


def mean_squares(values: Array, clusters: Clusters | None = None) -> MeanSquares:
    """The mean squares of tables without replication.

    With clusters, MS_rows / (seeds * rows) is the jackknife's variance over clusters of the mean over seeds, and
    MS_rest / (seeds * rows) is what the remainder (each seed's deviations, summed over clusters, from their mean) has
    in it. Each cluster with one row gives the mean squares without clusters.

    Args:
        values: (..., seeds, rows), with at least two of each, all finite.
        clusters: which rows belong together; None if all are independent.

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
    freedom: float = rows - 1
    if clusters is None:
        of_rows = seeds * of_row.var(-1, ddof=1)
        total = np.einsum("...sr,...sr->...", values, values) - seeds * rows * mean**2
        rest = (total - (seeds - 1) * of_seeds - (rows - 1) * of_rows) / ((seeds - 1) * (rows - 1))
    else:
        freedom, count = clusters.freedom, len(clusters.sizes)
        deviations = clusters.sums(values - of_seed[..., None])
        of_cluster = deviations.mean(-2)
        of_rows = seeds * rows * clusters.variance(of_cluster)
        squares = np.square(deviations - of_cluster[..., None, :]).sum((-2, -1))
        rest = squares / ((seeds - 1) * (count - 1)) * count / rows
    # A contrast of equal scores is not exactly 0, and rounding must not look like a difference.
    mean = np.where(np.abs(mean) < ROUNDING, 0.0, mean)
    of_seeds, of_rows, rest = (np.where(square < ROUNDING**2, 0.0, square) for square in (of_seeds, of_rows, rest))
    return MeanSquares(mean, of_seeds, of_rows, rest, seeds, rows, freedom)


def both_interval(values: Array, level: float = 1 - LEVEL, clusters: Clusters | None = None) -> Interval:
    """The mean of one table, (seeds, rows), and its interval over seeds and rows at a two-sided level."""
    squares = mean_squares(values, clusters)
    mean, half = float(squares.mean), float(squares.half_width(level))
    return Interval(mean, mean - half, mean + half, "crossed")


def level_above(values: Array, clusters: Clusters | None = None) -> float:
    """The smallest two-sided level at which the interval over seeds and rows is above 0; 1.0 if its mean is not.

    Args:
        values: (seeds, rows), with at least two of each. Where all rows have the same mean over seeds, the level is at
            least that of `level_of_alike`.
    """
    squares = mean_squares(values, clusters)
    if squares.mean <= 0:
        return 1.0
    least = 0.0
    if are_alike(values):
        least = level_of_alike(float(squares.mean), values.shape[-1] if clusters is None else len(clusters.sizes))

    def excess(log_level: float) -> float:
        return float(squares.half_width(math.exp(log_level)) - squares.mean)

    smallest = math.log(SMALLEST_LEVEL)
    if excess(smallest) < 0:
        return least
    return max(least, math.exp(scipy.optimize.brentq(excess, smallest, 0.0, xtol=1e-10)))


def are_alike(values: Array) -> bool:
    """Whether all rows of (seeds, rows) have the same mean over the seeds, so that rows add nothing to an interval."""
    return bool(np.ptp(values.mean(-2)) == 0)


def level_of_alike(mean: float, rows: int) -> float:
    """The two-sided level at which `rows` values that are all `mean` (above 0) show an expectation above 0.

    Otherwise a value of `mean` or more has a chance of at most 1 / (1 + mean), if values are from -1 (Markov's
    inequality), and all rows have it by chance. Contrasts of scores from 0 to 1 are from -1, or with a margin from
    slightly less, which changes the chance by the margin's square.
    """
    return min(1.0, 2 * (1 + mean) ** -rows)


# How sure a paired difference is, and what its rows can show.

POWER = 0.8
"""The chance with which a test finds the smallest difference that it is said to show."""


def mcnemar(ours: Array, theirs: Array) -> float:
    """The p-value of McNemar's exact test: a binomial test of the rows on which the two sides differ.

    Args:
        ours, theirs: (rows,), 0 or 1 each, of the same rows, which are independent.
    """
    differing = int((ours != theirs).sum())
    return float(scipy.stats.binomtest(int((ours > theirs).sum()), differing).pvalue) if differing else 1.0


def smallest_shown_by_mcnemar(ours: Array, theirs: Array) -> float | None:
    """The smallest difference of two proportions that `mcnemar` shows with POWER, if so many rows differ as here.

    Returns:
        None if the test cannot reach the level, because fewer than six rows differ.
    """
    differing = int((ours != theirs).sum())
    needed = int(scipy.stats.binom.isf((1 - LEVEL) / 2, differing, 0.5)) + 1
    if needed > differing:
        return None
    # The chance of `needed` or more of n is a beta distribution's, as a function of the chance of one.
    chance = float(scipy.stats.beta.ppf(POWER, needed, differing - needed + 1))
    return (2 * chance - 1) * differing / len(ours)


def level_of(differences: Array, clusters: Clusters | None = None) -> float:
    """The two-sided level at which the interval of the mean ends at 0: the p-value of a mean difference.

    Of one seed, the interval is t over rows or clusters; of several, that over seeds and rows.

    Args:
        differences: (seeds, rows), with at least two rows.
    """
    # No test by the signs of so many rows has a smaller one. It counts where all rows differ by the same.
    floor = 2.0 ** (1 - (differences.shape[1] if clusters is None else len(clusters.sizes)))
    if len(differences) > 1:
        return max(floor, min(level_above(differences, clusters), level_above(-differences, clusters)))
    (values,) = differences
    mean, error = abs(float(values.mean())), _error_of_mean(values, clusters)
    freedom = len(values) - 1 if clusters is None else clusters.freedom
    if mean < ROUNDING:
        return 1.0
    level = 2 * float(scipy.stats.t.sf(mean / error, freedom)) if error > ROUNDING else 0.0
    return max(floor, level)


def smallest_shown(differences: Array, clusters: Clusters | None = None) -> float:
    """The smallest mean difference that `level_of` shows at 5 % with POWER, if rows and seeds vary as here; 0 if
    they do not vary.

    It is half the width of the 95 % interval, and as much again as the estimate stays above its lower end with POWER.

    Args:
        differences: (seeds, rows), with at least two rows.
    """
    levels = (1 - LEVEL, 2 * (1 - POWER))
    if len(differences) > 1:
        squares = mean_squares(differences, clusters)
        found = float(sum(squares.half_width(level) for level in levels))
    else:
        freedom = differences.shape[1] - 1 if clusters is None else clusters.freedom
        found = sum(_t_quantile(level, freedom) for level in levels) * _error_of_mean(differences[0], clusters)
    return found if found > ROUNDING else 0.0


# The losses of rows.


def mean_loss(rows: ValidationLosses) -> float:
    """The mean loss per token over all rows, as training and its records compute it."""
    return float(np.average(rows.losses, weights=rows.tokens))


def paired_difference(first: ValidationLosses, second: ValidationLosses) -> tuple[float, float]:
    """The mean loss per token of `first` minus that of `second`, and the standard error over the choice of rows.

    The mean is a ratio of two sums over rows. So its standard error is that of the linearised ratio (Cochran, Sampling
    Techniques, chapter 6): sqrt(R / (R - 1) * sum((tokens_r * (d_r - D))^2)) / sum(tokens), for R rows with differences
    d_r and their mean D. It covers the rows only, and not the seeds of training. It is infinite for a single row.

    Raises:
        ValueError: the rows are not the same.
    """
    tokens = np.asarray(first.tokens, float)
    if len(first.losses) != len(second.losses) or not np.array_equal(tokens, np.asarray(second.tokens, float)):
        raise ValueError("the losses are not those of the same rows")
    differences = np.asarray(first.losses, float) - np.asarray(second.losses, float)
    mean = float(np.average(differences, weights=tokens))
    if len(tokens) < 2:
        return mean, math.inf
    scale = len(tokens) / (len(tokens) - 1)
    error = float(np.sqrt(scale * np.square(tokens * (differences - mean)).sum()) / tokens.sum())
    return mean, error


def loss_contrast(first: Sequence[ValidationLosses], second: Sequence[ValidationLosses]) -> Array:
    """(seeds, rows): a table of `first` minus `second`, for the intervals over seeds and rows.

    Its mean over the rows of a seed is the difference of mean losses per token, exactly. Its deviations between rows
    are those of the linearised ratio, as in `paired_difference`: D + w_r (d_sr - D), with w_r = tokens_r R /
    sum(tokens).

    Args:
        first, second: the losses of the same seeds, in the same order.

    Raises:
        ValueError: the rows are not the same.
    """
    tokens = np.asarray(first[0].tokens, float)
    if any(not np.array_equal(tokens, np.asarray(losses.tokens, float)) for losses in (*first, *second)):
        raise ValueError("the losses are not those of the same rows")
    ours, theirs = (np.array([losses.losses for losses in side], float) for side in (first, second))
    differences = ours - theirs
    mean = float(np.average(differences.mean(0), weights=tokens))
    contrast: Array = mean + tokens * len(tokens) / tokens.sum() * (differences - mean)
    return contrast


# Where an interval cannot be trusted.

OUTLIER_LEVEL = 0.01
FEWEST_SEEDS = 5
LEAST_DISTANCE = 0.01
"""A seed that is nearer to the median than this is not flagged, in the score's unit: one point."""


def outlying(values: Array) -> list[int]:
    """The seeds whose score is far from the others, such as a training that collapsed: a t interval over them is wrong.

    This is the generalised extreme Studentised deviate (Rosner, Technometrics 25, 1983) at level 0.01, for up to
    (seeds - 1) / 2 outliers. The seed farthest from the mean is taken out, then the next, and its distance in standard
    deviations is compared with a critical value of Student's t each time. The last distance above its critical value
    says how many are out.

    Simulated with 6,000 cells of normal seeds each: 1.8 % of cells of 5 seeds have a flag, 2.2 % of 8, 1.7 % of 12. One
    of 5 seeds that is 10 standard deviations off is flagged in 51 %, 20 off in 97 %, and two that are 40 off in 95 %.
    Of 8 seeds, one that is 10 off is flagged in 98 %.

    Args:
        values: (seeds,), one score or loss each.

    Returns:
        The indices in rising order; none with fewer than FEWEST_SEEDS.
    """
    kept = list(range(len(values)))
    if len(kept) < FEWEST_SEEDS:
        return []
    median = float(np.median(values))
    removed: list[int] = []
    outliers = 0
    for n in range(len(kept), len(kept) // 2 + 1, -1):
        rest = values[kept]
        farthest = kept[int(np.argmax(np.abs(rest - rest.mean())))]
        # The largest distance from the mean of n normal values, in standard deviations (Grubbs 1950).
        t = scipy.stats.t.isf(OUTLIER_LEVEL / (2 * n), n - 2)
        critical = (n - 1) / math.sqrt(n) * t / math.sqrt(n - 2 + t * t)
        removed.append(farthest)
        kept.remove(farthest)
        if abs(values[farthest] - rest.mean()) > critical * rest.std(ddof=1):
            outliers = len(removed)
    return sorted(index for index in removed[:outliers] if abs(values[index] - median) >= LEAST_DISTANCE)

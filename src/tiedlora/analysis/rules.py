"""The rules of claims and their planned looks: which contrasts decide a claim, at which numbers of seeds and levels.

m, q and f are the scores of method, comparator and zero point on the same rows; a loss comes negated. A rule has
contrasts, tables of seeds x rows that are linear in m, q and f. A claim is supported if the interval of every contrast
(`intervals.both_interval`) is above 0, and contradicted if one is below 0; every rule but `better_by` needs q - f above
0 too. All rules accept leading axes, so that the simulations of their errors (benchmarks/verdicts.py) use the same
code. docs/statistics.md has the figures, and why looks are planned.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from tiedlora.analysis import intervals
from tiedlora.analysis.intervals import Array, Clusters, MeanSquares, level_above
from tiedlora.records.interval import LEVEL, Interval

TOTAL = 0.05
"""The chance of a wrong verdict in a whole plan, at most."""
LOOKS = (3, 5, 8, 12)
MOST_SEEDS = 1000
"""The most seeds of a look: each is a run of both sides, and a prediction simulates all of them DRAWS times."""
DRAWS = 4000
"""A simulated chance of 50 % is known to within 1.6 points (95 %)."""
FUTILE = 0.02
"""A plan is futile if the chance of a decision at a later look is below this. In simulations, to stop there loses at
most 0.4 % of right verdicts, but 8 % in the setting where only 1 plan in 5 decides (docs/statistics.md)."""


@dataclass(frozen=True)
class Evidence:
    """The smallest two-sided level at which each conclusion is reached; 1.0 if the estimate has the other sign.

    At a look with level 0.0155, a claim is supported if `supported` <= 0.0155.
    """

    supported: float
    contradicted: float
    gain: float | None
    """That of the comparator's gain over the zero point; None without one."""


@dataclass(frozen=True, eq=False)
class Sides:
    """What a rule compares: scores of the same seeds and rows. More is better."""

    method: Array
    """(..., seeds, rows)."""
    comparator: Array
    """(..., seeds, rows)."""
    zero: Array | None
    """Where a gain begins: (rows,), or (..., rows) or (..., seeds, rows) that broadcasts to the others; None if there
    are no scores. Only a rule that needs no zero point accepts None."""
    clusters: Clusters | None = None
    """Which rows belong together."""
    seeds: tuple[int, ...] = ()
    """The seeds by name, for `of`."""

    @property
    def gain(self) -> Array | None:
        """What the comparator gains over the zero point."""
        return None if self.zero is None else self.comparator - self.zero

    def of(self, seeds: Iterable[int]) -> Sides:
        """Only these seeds, in their order. Those that are missing here are left out."""
        places = [self.seeds.index(seed) for seed in seeds if seed in self.seeds]
        zero = self.zero[places] if self.zero is not None and self.zero.ndim > 1 else self.zero
        kept = tuple(self.seeds[place] for place in places)
        return Sides(self.method[places], self.comparator[places], zero, self.clusters, kept)


@dataclass(frozen=True)
class Rule:
    """A decision rule: the share of the comparator's gain that the method keeps, or by how much it is better."""

    words: str
    low: float = 0.0
    """The smallest share."""
    high: float = math.inf
    """The largest share."""
    margin: float | None = None
    """In place of shares: the method is better than the comparator by more than this, in the score's unit."""

    @property
    def needs_zero(self) -> bool:
        """Whether it asks for the comparator's gain."""
        return self.margin is None

    def contrasts(self, sides: Sides) -> tuple[Array, ...]:
        """The tables that must all be above 0 for support; one below 0 contradicts the claim.

        They are m - q - margin, or m - low q - (1 - low) f and, where the high end is finite too, the same for it with
        the other sign: each is one-sided (an equivalence test, Schuirmann, J. Pharmacokinet. Biopharm. 15, 1987).
        """
        if self.margin is not None:
            return (sides.method - sides.comparator - self.margin,)
        above = _retained(self.low, sides)
        return (above,) if math.isinf(self.high) else (above, -_retained(self.high, sides))

    def zone(self, gain: float) -> tuple[float, float]:
        """The shares of the comparator's gain (above 0) that the rule asks for: low and high, which may be infinite."""
        return (self.low, self.high) if self.margin is None else (1 + self.margin / gain, math.inf)

    def sees_too_little(self, sides: Sides, level: float) -> bool:
        """Whether a contrast, or the gain that the rule needs, is the same in all rows, and these are too few."""
        tables = [*self.contrasts(sides), *([sides.gain] if self.needs_zero and sides.gain is not None else [])]
        rows = sides.method.shape[-1] if sides.clusters is None else len(sides.clusters.sizes)
        means = [abs(float(table.mean())) for table in tables if intervals.are_alike(table)]
        return any(mean > 0 and intervals.level_of_alike(mean, rows) > level for mean in means)

    def contrast(self, sides: Sides) -> Array:
        """The contrast that a report shows: the one with the smallest mean. (Only `level_within` has more than one.)"""
        return min(self.contrasts(sides), key=lambda table: float(table.mean()))

    def evidence(self, sides: Sides) -> Evidence:
        """The levels of both conclusions: the largest over what must all hold, the smallest over what may hold.

        Raises:
            ValueError: there are fewer than two seeds or rows, or a score is not finite.
        """
        contrasts, clusters = self.contrasts(sides), sides.clusters
        gain = None if sides.gain is None else level_above(sides.gain, clusters)
        needed = [gain] if self.needs_zero and gain is not None else []
        supported = max([level_above(contrast, clusters) for contrast in contrasts] + needed)
        contradicted = max([min(level_above(-contrast, clusters) for contrast in contrasts), *needed])
        return Evidence(supported, contradicted, gain)

    def decide(
        self, contrasts: Sequence[MeanSquares], gain: MeanSquares | None, level: float
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Whether `evidence` reaches the level, from the mean squares of the contrasts and of the comparator's gain.

        Returns:
            Two arrays of the shape of the leading axes: supported, contradicted.
        """
        signs = np.array([np.sign(c.mean) * (np.abs(c.mean) > c.half_width(level)) for c in contrasts])
        supported, contradicted = np.logical_and.reduce(signs > 0), np.logical_or.reduce(signs < 0)
        if self.needs_zero and gain is not None:
            gains = gain.mean > gain.half_width(level)
            supported, contradicted = supported & gains, contradicted & gains
        return supported, contradicted

    def kept(self, sides: Sides, level: float) -> Interval | None:
        """The share of the comparator's gain that the method keeps, with its interval over seeds and rows.

        0 is the zero point and 1 the comparator, in every metric and on every task, so that one figure can hold all
        claims. The ends are those of the rule's own contrasts, divided by the gain. So the interval lies inside `zone`
        exactly if the rule supports the claim at this two-sided level, and outside exactly if it contradicts it (where
        the rule also asks for the comparator's gain, that must be shown as well).

        Returns:
            None if there is no zero point, or if the comparator gains nothing on average.
        """
        if sides.zero is None or sides.gain is None or (gain := float(sides.gain.mean())) <= 0:
            return None
        low_end, high_end = self.zone(gain)
        value = float((sides.method - sides.zero).mean()) / gain
        contrasts = self.contrasts(sides)
        above = intervals.both_interval(contrasts[0], level, sides.clusters)
        low, high = low_end + above.low / gain, low_end + above.high / gain
        if len(contrasts) > 1 and high >= low_end:
            # The second contrast is the distance below the zone's high end.
            below = intervals.both_interval(contrasts[1], level, sides.clusters)
            if below.high < 0:
                low, high = high_end - below.high / gain, high_end - below.low / gain
            else:
                # The contrasts have intervals of different widths; the bar reaches into the zone if neither is below 0.
                low, high = min(low, high_end), max(high_end - below.low / gain, low_end)
        return Interval(value, low, high, "crossed")


def retains(rho: float) -> Rule:
    """The method retains at least the share `rho` of the comparator's gain."""
    return Rule(f"keeps {100 * rho:g} % of the gain", rho)


def better_by(margin: float = 0.0) -> Rule:
    """The method is better than the comparator by more than `margin`, in the score's unit."""
    return Rule(f"is better by {margin:g}" if margin else "is better", margin=margin)


def level_within(delta: float) -> Rule:
    """The method is level with the comparator within the share `delta` of its gain, on both sides."""
    return Rule(f"is level within {100 * delta:g} % of the gain", 1 - delta, 1 + delta)


def share(sides: Sides) -> Interval | None:
    """The share of the comparator's gain that the method keeps, with its 95 % interval over seeds and rows.

    At the share itself, the contrast of `retains` has the mean 0. So its interval, divided by the gain, is that of the
    share (delta method), and takes in how well the gain is known.

    Returns:
        None without a zero point or a gain of the comparator; low and high are NaN with one seed or row, or if the
        comparator's gain may be half or less of what it seems: the delta method then covers too little.
    """
    if sides.zero is None or sides.gain is None or (gain := float(sides.gain.mean())) <= 0:
        return None
    value = float((sides.method - sides.zero).mean()) / gain
    if min(sides.method.shape) < 2:
        return Interval(value, math.nan, math.nan)
    gains = np.broadcast_to(sides.gain, sides.method.shape)
    if intervals.both_interval(gains, 1 - LEVEL, sides.clusters).low < gain / 2:
        return Interval(value, math.nan, math.nan)
    return retains(value).kept(sides, 1 - LEVEL)


def retained_at_least(sides: Sides, level: float) -> float | None:
    """The largest share of the comparator's gain that the method retains, at this two-sided level.

    It is the largest rho that `retains(rho)` supports; it may be above 1. (The lower end of the interval of Fieller, J.
    R. Stat. Soc. B 16, 1954, with the crossed interval in place of t.)

    Returns:
        None if no rho of 0 or more is supported: the method does not beat the zero point, or the comparator does not;
        or if there is no zero point, or one seed or row.
    """
    gain = sides.gain
    if gain is None or sides.zero is None or min(sides.method.shape) < 2 or level_above(gain, sides.clusters) > level:
        return None

    def low(rho: float) -> float:
        return intervals.both_interval(_retained(rho, sides), level, sides.clusters).low

    if low(0.0) <= 0:
        return None
    # At the estimate the contrast's mean is 0, or a rounding error above it if scores are large and all alike.
    estimate = float((sides.method - sides.zero).mean() / gain.mean())
    if low(estimate) >= 0:
        return estimate
    return float(optimize.brentq(low, 0.0, estimate, xtol=1e-6))


def _retained(rho: float, sides: Sides) -> Array:
    assert sides.zero is not None, "the rule needs the scores of the zero point"
    return sides.method - rho * sides.comparator - (1 - rho) * sides.zero


@dataclass(frozen=True)
class Plan:
    """At which numbers of seeds a verdict is given, and which seeds these are.

    Raises:
        ValueError: the numbers are not increasing from 2 to MOST_SEEDS, or the last look has not so many different
            seeds.
    """

    looks: tuple[int, ...] = LOOKS
    """How many seeds each look has."""
    declared: tuple[int, ...] | None = None
    """The seeds in declared order; None takes 0, 1, 2, ..."""
    tests: int = 0
    """How many tests are planned in all. Holm's procedure counts at least so many, also before they have had a look."""

    def __post_init__(self) -> None:
        looks = self.looks
        if not looks or looks[0] < 2 or any(later <= earlier for earlier, later in itertools.pairwise(looks)):
            raise ValueError(f"looks at {list(looks)} seeds: must be increasing whole numbers from 2")
        if looks[-1] > MOST_SEEDS:
            raise ValueError(f"looks at {looks[-1]:,} seeds: at most {MOST_SEEDS:,} are allowed, each with two runs")
        if len(set(self.seeds)) < max(len(self.seeds), looks[-1]):
            least = f"must be at least {looks[-1]} different seeds, for the last look"
            raise ValueError(f"seeds {list(self.seeds)!s:.60}: {least}")

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds in their order. A look at n seeds uses the first n."""
        return tuple(range(self.looks[-1])) if self.declared is None else self.declared

    @property
    def levels(self) -> tuple[float, ...]:
        """The two-sided level of each look: 0.05 n_k^2 / sum(n_j^2) for its n_k seeds.

        These add up to 0.05, so at most 5 % of verdicts are wrong, however the looks depend on each other (Boole).
        """
        squares = [n * n for n in self.looks]
        return tuple(TOTAL * square / sum(squares) for square in squares)

    def of_look(self, number: int) -> tuple[int, ...]:
        """The seeds of a look, which is counted from 0."""
        return self.seeds[: self.looks[number]]


def adjusted(plan: Plan, look: int, p: float) -> float:
    """The level of the whole plan at which a level `p` decides at this look (0 is the first).

    All levels are scaled together: p decides if it is at most the look's level, and then this is at most 0.05.
    """
    return min(1.0, p * TOTAL / plan.levels[look])


def holm(p_values: Sequence[float]) -> list[bool]:
    """Which hypotheses are rejected at the family-wise level TOTAL, by Holm's method (Scand. J. Statist. 6, 1979).

    The smallest p is compared with TOTAL / n, the next with TOTAL / (n - 1), and so on until one is not rejected.
    It needs no independence.
    """
    order, n = np.argsort(p_values, kind="stable"), len(p_values)
    rejected = np.empty(n, dtype=bool)
    rejected[order] = np.logical_and.accumulate(np.array(p_values)[order] <= TOTAL / np.arange(n, 0, -1))
    return rejected.tolist()


def chance_of_decision(rule: Rule, sides: Sides, plan: Plan, look: int) -> float:
    """The predictive probability that a later look of the plan decides, given the scores up to this look.

    The later seeds are drawn from a normal distribution with the mean and spread of the seeds so far, both uncertain:
    the mean over n_later seeds then varies around today's by s^2 (1 / n_now - 1 / n_later). The rows stay the same.
    This is simulated with DRAWS draws of a fixed generator.

    Args:
        sides: of the first `plan.looks[look]` seeds, without leading axes.
        look: 0 is the first.
    """
    tables = list(rule.contrasts(sides))
    if rule.needs_zero and sides.gain is not None:
        tables.append(np.broadcast_to(sides.gain, sides.method.shape))
    now = [intervals.mean_squares(table, sides.clusters) for table in tables]
    of_seeds = np.stack([table.mean(-1) for table in tables], axis=-1)
    drawn = _predicted_seeds(of_seeds, plan.looks[-1])
    decided = np.zeros(DRAWS, dtype=bool)
    for n, level in list(zip(plan.looks, plan.levels, strict=True))[look + 1 :]:
        squares = [_expected(found, drawn[:, :n, k]) for k, found in enumerate(now)]
        gain = squares.pop() if rule.needs_zero else None
        supported, contradicted = rule.decide(squares, gain, level)
        decided |= supported | contradicted
    return float(decided.mean())


def _predicted_seeds(of_seeds: Array, seeds: int) -> Array:
    """The measured means of the seeds so far, (n, contrasts), continued to `seeds` ones: (DRAWS, seeds, contrasts)."""
    n, contrasts = of_seeds.shape
    generator = np.random.default_rng(0)
    # The spread is uncertain as a chi-square with n - 1 degrees of freedom: larger with few seeds.
    scale = np.sqrt((n - 1) / generator.chisquare(n - 1, (DRAWS, 1, 1)))
    covariance = np.atleast_2d(np.cov(of_seeds, rowvar=False))
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    mean = of_seeds.mean(0) + scale * (generator.normal(size=(DRAWS, 1, contrasts)) / math.sqrt(n)) @ root.T
    later = mean + scale * generator.normal(size=(DRAWS, seeds - n, contrasts)) @ root.T
    return np.concatenate([np.broadcast_to(of_seeds, (DRAWS, n, contrasts)), later], axis=1)


def _expected(found: MeanSquares, of_seed: Array) -> MeanSquares:
    """The mean squares that are expected for other means of seeds, (..., seeds), with the variances that were found."""
    seeds, rows, rest = of_seed.shape[-1], found.rows, found.of_rest
    # The rows' own part of MS_rows grows with the number of seeds; MS_rest does not.
    of_rows = seeds * np.maximum(0.0, found.of_rows - rest) / found.seeds + rest
    return replace(found, mean=of_seed.mean(-1), of_seeds=rows * of_seed.var(-1, ddof=1), of_rows=of_rows, seeds=seeds)

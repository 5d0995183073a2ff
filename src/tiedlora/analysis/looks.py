"""Planned looks: at which numbers of seeds a claim may be decided, and at which level, fixed before any seed is run.

Whoever adds seeds until an interval at level 0.05 excludes 0 is wrong in 11 to 19 % instead of 5 %. A plan shares the
5 % among its looks. The first look that decides stands, and later seeds change nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize

from tiedlora.analysis import crossed
from tiedlora.analysis.crossed import Array, MeanSquares, Spread
from tiedlora.analysis.rules import POWER, Rule

TOTAL = 0.05
"""The chance of a wrong verdict in a whole plan, at most."""
SEEDS = (3, 5, 8, 12)
SIMULATED = {3: 0.0020, 5: 0.0060, 8: 0.0155, 12: 0.0350}
"""Levels for looks at 3, 5, 8 and 12 seeds. Their sum is above 0.05, but the looks share seeds: at most 4.9 % of
verdicts are wrong in benchmarks/verdicts.py, but 5.6 % where seeds differ as much as their mean score. There the
default levels give 4.9 % (docs/results.md)."""
MOST_SEEDS = 1000
"""Of a look. Each seed is a whole run of both sides, and a prediction simulates all of them DRAWS times."""
DRAWS = 4000
"""A simulated chance of 50 % is known to within 1.6 points (95 %)."""
FUTILE = 0.02
"""A plan is futile if the chance of a decision at a later look is below this. It loses at most 0.4 % of right verdicts,
but 8 % where only 1 plan in 5 decides (docs/results.md)."""


@dataclass(frozen=True)
class Looks:
    """The numbers of seeds at which a claim is looked at, and the two-sided level at each.

    Raises:
        ValueError: the seeds are not increasing numbers from 2 to MOST_SEEDS, a level is not positive, the lengths
            differ, or the levels spend more than 0.05 in all. (`SIMULATED`'s levels, or some of them, are allowed.)
    """

    seeds: tuple[int, ...]
    levels: tuple[float, ...]

    def __post_init__(self) -> None:
        seeds, levels = self.seeds, self.levels
        if not seeds or seeds[0] < 2 or any(later <= earlier for earlier, later in itertools.pairwise(seeds)):
            raise ValueError(
                f"looks at {list(seeds)} seeds: must be increasing whole numbers from 2 (3 or more is better)"
            )
        if seeds[-1] > MOST_SEEDS:
            raise ValueError(
                f"looks at {seeds[-1]:,} seeds: at most {MOST_SEEDS:,} are allowed, as each is a run of both sides"
            )
        if len(levels) != len(seeds) or not all(0 < level < 1 for level in levels):
            raise ValueError(f"levels {list(levels)}: must be one number in (0, 1) for each look")
        is_simulated = all(SIMULATED.get(n) == level for n, level in zip(seeds, levels, strict=True))
        if sum(levels) > TOTAL + 1e-9 and not is_simulated:
            raise ValueError(f"levels {list(levels)}: their sum is {sum(levels):.4g}, and must be at most {TOTAL}")


def planned(seeds: Sequence[int] = SEEDS, levels: Sequence[float] | None = None) -> Looks:
    """A plan. Without levels, look k has 0.05 n_k^2 / sum(n_j^2) for its n_k seeds.

    These levels add up to 0.05, so at most 5 % of verdicts are wrong, however the looks depend on each other (Boole).

    Raises:
        ValueError: as Looks.
    """
    if levels is None:
        squares = [n * n for n in seeds]
        levels = [TOTAL * square / sum(squares) for square in squares]
    return Looks(tuple(seeds), tuple(levels))


def adjusted(looks: Looks, look: int, p: float) -> float:
    """The level of the whole plan at which a level `p` decides at this look (0 is the first).

    All levels are scaled together: p decides if it is at most the look's level, and then this is at most 0.05, also in
    a plan that spends less. For `SIMULATED`'s levels, it is exact at 0.05 and approximate elsewhere.
    """
    return min(1.0, p * TOTAL / looks.levels[look])


def from_minimum(looks: Looks, minimum: int) -> Looks:
    """The plan without looks at fewer seeds than `minimum`, as version 0.1's claim files ask by `minimum_seeds`.

    Levels by the formula are computed anew, and given ones stay. If no look is left, there is one at `minimum` seeds.
    """
    kept = [(n, level) for n, level in zip(looks.seeds, looks.levels, strict=True) if n >= minimum]
    seeds = [n for n, _ in kept] or [minimum]
    if not kept or looks == planned(looks.seeds):
        return planned(seeds)
    return planned(seeds, [level for _, level in kept])


def chance_of_decision(
    rule: Rule, method: Array, comparator: Array, base: Array | None, looks: Looks, look: int
) -> float:
    """The predictive probability that a later look of the plan decides, given the scores up to this look.

    The later seeds are drawn from a normal distribution with the mean and spread of the seeds so far, both uncertain:
    the mean over n_later seeds then varies around today's by s^2 (1 / n_now - 1 / n_later). The rows stay the same.
    This is simulated with DRAWS draws of a fixed generator.

    Args:
        method, comparator: (seeds, rows), of the first `looks.seeds[look]` seeds.
        base: (rows,) or (seeds, rows); None for a rule that needs no base.
        look: 0 is the first.

    Raises:
        ValueError: the number of seeds is not that of the look, or as the rule's contrasts.
    """
    if len(method) != looks.seeds[look]:
        raise ValueError(f"look {look + 1} has {looks.seeds[look]} seeds; the scores have {len(method)}")
    tables = list(rule.contrasts(method, comparator, base))
    if rule.needs_base and base is not None:
        tables.append(np.broadcast_to(comparator - base, method.shape))
    now = [crossed.mean_squares(table) for table in tables]
    of_seeds = np.stack([table.mean(-1) for table in tables], axis=-1)
    drawn = _predicted_seeds(of_seeds, looks.seeds[-1])
    decided = np.zeros(DRAWS, dtype=bool)
    for n, level in list(zip(looks.seeds, looks.levels, strict=True))[look + 1 :]:
        squares = [_at_seeds(drawn[:, :n, k], *_row_effects(found), found.rows) for k, found in enumerate(now)]
        gain = squares.pop() if rule.needs_base else None
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


def _row_effects(found: MeanSquares) -> tuple[float, float]:
    """The variance of the rows' effects, and that of the remainder."""
    rest = float(found.of_rest)
    return max(0.0, float(found.of_rows) - rest) / found.seeds, rest


def _at_seeds(of_seed: Array, of_rows: float, rest: float, rows: int) -> MeanSquares:
    """The mean squares that are expected for means of seeds (..., seeds) and known variances of rows and remainder."""
    seeds = of_seed.shape[-1]
    return MeanSquares(
        of_seed.mean(-1),
        rows * of_seed.var(-1, ddof=1),
        np.array(seeds * of_rows + rest),
        np.array(rest),
        seeds,
        rows,
    )


def is_futile(chance: float) -> bool:
    """Whether a chance of `chance_of_decision` is so small that more seeds are not worth their time."""
    return chance < FUTILE


def chance_at_looks(
    rule_distance: float, spread: Spread, rows: int, looks: Looks, both_sides: bool = False
) -> list[float]:
    """The chance that a claim is decided rightly by each look, if its contrast's true value is `rule_distance`.

    Simulated with DRAWS draws of a fixed generator: normal effects of seeds and rows with the given spread. A rule that
    needs the comparator's gain is decided only if that gain is clear too; this is not in the chance.

    Args:
        both_sides: for `Level`: two contrasts at this distance must both be clear, and their errors are opposite.

    Returns:
        A chance for each look: it never falls from look to look.
    """
    generator = np.random.default_rng(0)
    of_seed = math.sqrt(spread.seeds**2 + spread.rest**2 / rows) * generator.normal(size=(DRAWS, looks.seeds[-1]))
    of_seed += spread.examples / math.sqrt(rows) * generator.normal(size=(DRAWS, 1))
    decided = np.zeros(DRAWS, dtype=bool)
    chances = []
    for n, level in zip(looks.seeds, looks.levels, strict=True):
        found = _at_seeds(of_seed[:, :n], spread.examples**2, spread.rest**2, rows)
        error = -np.abs(found.mean) if both_sides else found.mean
        decided |= abs(rule_distance) + error > found.half_width(level)
        chances.append(float(decided.mean()))
    return chances


def gain_needed_at_last_look(rho: float, spread: Spread, rows: int, looks: Looks, both_sides: bool = False) -> float:
    """The true gain of the comparator at which `Retains(rho)` is decided by the last look in 4 of 5 repetitions.

    The method is taken to equal the comparator, so that the contrast's true value is (1 - rho) gain.

    Args:
        spread: that of the contrast m - rho q - (1 - rho) b.
        both_sides: for `Level(1 - rho)` in place of `Retains(rho)`.

    Returns:
        The gain in the unit of the score; infinity if rho is 1.
    """
    if rho >= 1:
        return math.inf
    high = spread.of_mean(looks.seeds[0], rows)
    if high == 0:
        return 0.0

    def missing_power(distance: float) -> float:
        return POWER - chance_at_looks(distance, spread, rows, looks, both_sides)[-1]

    while missing_power(high) > 0:
        high *= 2
    return float(optimize.bisect(missing_power, 0.0, high, xtol=high * 1e-3)) / (1 - rho)


def holm(p_values: Sequence[float], level: float = TOTAL) -> list[bool]:
    """Which hypotheses are rejected at a family-wise level, by Holm's method (Scand. J. Statist. 6, 1979).

    The smallest p is compared with level / n, the next with level / (n - 1), and so on until one is not rejected.
    It needs no independence.
    """
    rejected = [False] * len(p_values)
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    for position, index in enumerate(order):
        if p_values[index] > level / (len(p_values) - position):
            break
        rejected[index] = True
    return rejected

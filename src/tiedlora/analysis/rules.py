"""The decision rules of claims: which contrasts of a method, a comparator and the base model decide a claim, and how.

m, q and b are the scores of method, comparator and base on the same rows, and more is better: a loss comes negated.
Every rule has contrasts, tables of seeds x rows that are linear in m, q and b. A claim is supported if the interval of
every contrast (`crossed.over_both`) is above 0. It is contradicted if the interval of a contrast is below 0. Every rule
but `Better` needs the comparator's gain too, the interval of q - b above 0, for either verdict: where nothing is gained
there is nothing to retain.

All rules accept leading axes, so that simulations of their error use the same code. benchmarks/verdicts.py has these
simulations, and docs/results.md has their figures.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from tiedlora.analysis import crossed
from tiedlora.analysis.crossed import Array, MeanSquares

POWER = 0.8
"""Plans ask for the seeds, rows or gain with which a claim is decided in 4 of 5 repetitions."""


@dataclass(frozen=True)
class Evidence:
    """The smallest two-sided level at which each conclusion is reached; 1.0 if the estimate has the other sign.

    At a look with level 0.0155, a claim is supported if `supported` <= 0.0155.
    """

    supported: float
    contradicted: float
    gain: float | None
    """That of the comparator's gain over the base; None without base scores."""


class Rule(ABC):
    """A decision rule. The methods take scores of the same seeds and rows.

    Args of all methods:
        method, comparator: (..., seeds, rows).
        base: (rows,), or (..., rows) or (..., seeds, rows) that broadcasts to the others; None if there are no scores.
    """

    needs_base: ClassVar[bool] = True

    @abstractmethod
    def contrasts(self, method: Array, comparator: Array, base: Array | None) -> tuple[Array, ...]:
        """The tables that must all be above 0 for support; one below 0 contradicts the claim.

        Raises:
            ValueError: the rule needs the base scores, and there are none.
        """

    def contrast(self, method: Array, comparator: Array, base: Array | None) -> Array:
        """The contrast that a report shows: the one with the smallest mean. (Only `Level` has more than one.)"""
        return min(self.contrasts(method, comparator, base), key=lambda table: float(table.mean()))

    def evidence(self, method: Array, comparator: Array, base: Array | None) -> Evidence:
        """The levels of both conclusions: the largest over what must all hold, the smallest over what may hold.

        Raises:
            ValueError: the rule needs the base scores and there are none; there are fewer than two seeds or rows; or a
                score is not finite.
        """
        contrasts = self.contrasts(method, comparator, base)
        gain = None if base is None else _level_above(_gain(comparator, base))
        needed = [gain] if self.needs_base and gain is not None else []
        supported = max([_level_above(contrast) for contrast in contrasts] + needed)
        contradicted = max([min(_level_above(-contrast) for contrast in contrasts), *needed])
        return Evidence(supported, contradicted, gain)

    def decisions(
        self, method: Array, comparator: Array, base: Array | None, level: float
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Whether `evidence` reaches the level, for many tables at once.

        Returns:
            Two arrays of the shape of the leading axes: supported, contradicted.
        """
        squares = [crossed.mean_squares(table) for table in self.contrasts(method, comparator, base)]
        gain = crossed.mean_squares(_gain(comparator, base)) if self.needs_base and base is not None else None
        return self.decide(squares, gain, level)

    def decide(
        self, contrasts: Sequence[MeanSquares], gain: MeanSquares | None, level: float
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """`decisions` from the mean squares of the contrasts and of the comparator's gain."""
        halves = [contrast.half_width(level) for contrast in contrasts]
        supported = np.logical_and.reduce([c.mean > half for c, half in zip(contrasts, halves, strict=True)])
        contradicted = np.logical_or.reduce([c.mean < -half for c, half in zip(contrasts, halves, strict=True)])
        if self.needs_base and gain is not None:
            gains = gain.mean > gain.half_width(level)
            supported, contradicted = supported & gains, contradicted & gains
        return supported, contradicted


@dataclass(frozen=True)
class Retains(Rule):
    """The method retains at least the share `rho` of the comparator's gain: c = m - rho q - (1 - rho) b.

    Raises:
        ValueError: rho is not above 0 and at most 1.
    """

    rho: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.rho <= 1:
            raise ValueError(f"rho={self.rho}: must be above 0 and at most 1")

    def contrasts(self, method: Array, comparator: Array, base: Array | None) -> tuple[Array, ...]:
        return (_retained(self.rho, method, comparator, _given(base, self)),)


@dataclass(frozen=True)
class Better(Rule):
    """The method is better than the comparator by more than `margin`: m - q - margin.

    Raises:
        ValueError: the margin is negative.
    """

    margin: float = 0.0
    needs_base: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_margin(self.margin)

    def contrasts(self, method: Array, comparator: Array, base: Array | None) -> tuple[Array, ...]:
        return (method - comparator - self.margin,)


@dataclass(frozen=True)
class Level(Rule):
    """The method is level with the comparator within the share `delta` of its gain, on both sides.

    The contrasts are m - (1 - delta) q - delta b and (1 + delta) q - delta b - m, each one-sided (an equivalence test,
    Schuirmann, J. Pharmacokinet. Biopharm. 15, 1987).

    Raises:
        ValueError: delta is not above 0 and below 1.
    """

    delta: float

    def __post_init__(self) -> None:
        if not 0 < self.delta < 1:
            raise ValueError(f"delta={self.delta}: must be above 0 and below 1")

    def contrasts(self, method: Array, comparator: Array, base: Array | None) -> tuple[Array, ...]:
        base = _given(base, self)
        not_worse = _retained(1 - self.delta, method, comparator, base)
        not_better = -_retained(1 + self.delta, method, comparator, base)
        return not_worse, not_better


@dataclass(frozen=True)
class WithinMargin(Rule):
    """The method is at most `margin` worse than the comparator: m - q + margin. The rule of version 0.1's claim files.

    The margin is in the score's unit. So it means little where the comparator's gain is of its size: prefer `Retains`.

    Raises:
        ValueError: the margin is negative.
    """

    margin: float

    def __post_init__(self) -> None:
        _check_margin(self.margin)

    def contrasts(self, method: Array, comparator: Array, base: Array | None) -> tuple[Array, ...]:
        _given(base, self)
        return (method - comparator + self.margin,)


def retained_at_least(method: Array, comparator: Array, base: Array, level: float) -> float | None:
    """The largest share of the comparator's gain that the method retains, at this two-sided level.

    It is the largest rho that `Retains(rho)` supports; it may be above 1. (The lower end of Fieller's interval, with
    the crossed interval in place of t.)

    Args:
        method, comparator: (seeds, rows).
        base: (rows,) or (seeds, rows).

    Returns:
        None if no rho of 0 or more is supported: the method does not beat the base, or the comparator does not.
    """
    if _level_above(_gain(comparator, base)) > level:
        return None

    def low(rho: float) -> float:
        return float(crossed.over_both(_retained(rho, method, comparator, base), level)[1])

    if low(0.0) <= 0:
        return None
    # At the estimate the contrast's mean is 0, so this share is not supported.
    estimate = float((method - base).mean() / _gain(comparator, base).mean())
    if low(estimate) >= 0:
        return estimate
    return float(optimize.brentq(low, 0.0, estimate, xtol=1e-6))


def gain_needed(rho: float, standard_error: float) -> float:
    """The true gain at which `Retains(rho)` is supported in 4 of 5 repetitions, if the method equals the comparator.

    The contrast's true value is then (1 - rho) gain. It must be (z(0.975) + z(0.8)) = 2.80 standard errors, at one look
    with many seeds. So the gain is 2.80 SE / (1 - rho). (`looks.gain_needed_at_last_look` has planned looks.)

    Args:
        standard_error: that of the contrast's mean, in the unit of the score.

    Returns:
        The gain in the unit of the score; infinity if rho is 1, where no gain is enough.
    """
    if rho >= 1:
        return math.inf
    return float(stats.norm.ppf(0.975) + stats.norm.ppf(POWER)) * standard_error / (1 - rho)


def _retained(rho: float, method: Array, comparator: Array, base: Array) -> Array:
    return method - rho * comparator - (1 - rho) * base


def _gain(comparator: Array, base: Array) -> Array:
    return comparator - base


def _level_above(table: Array) -> float:
    """The smallest two-sided level at which the mean of a table is above 0; 1.0 if its mean is not."""
    p = crossed.p_value(table)
    return p if table.mean() > 0 else 1.0


def _given(base: Array | None, rule: Rule) -> Array:
    if base is None:
        raise ValueError(f"{rule} needs the base model's scores")
    return base


def _check_margin(margin: float) -> None:
    if not 0 <= margin < math.inf:
        raise ValueError(f"margin={margin}: must be 0 or more, in the score's unit")

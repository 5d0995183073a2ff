"""Worth: the size of a curve that scores the same as an arm."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tiedlora.analysis import intervals
from tiedlora.analysis.comparison import match
from tiedlora.analysis.groups import RunGroup
from tiedlora.analysis.intervals import Array
from tiedlora.analysis.runs import Measure, Scorebook

WORTH_SEEDS = 3
"""How many seeds a size of a curve needs for a worth: the first ones that the arm shares with the two fullest sizes."""
POINTS = 101
"""How many sizes are tried between two measured ones."""


@dataclass(frozen=True)
class Worth:
    """The number of parameters at which a curve scores the same as an arm, with its 95 % interval.

    The interval holds every size whose contrast with the arm includes 0, over seeds and rows. A value or an end is 0
    where it is below the curve's measured sizes, and infinite where it is above them.
    """

    value: float
    low: float
    high: float
    smallest: float
    """The smallest size of the curve."""
    largest: float

    def __str__(self) -> str:
        value, low, high = map(self._shown, (self.value, self.low, self.high))
        # An arm that is clearly beyond the curve needs no interval.
        is_beyond = self.value > self.low == self.largest or self.value < self.high == self.smallest
        return value if is_beyond else f"{value} [{low}, {high}]"

    def _shown(self, size: float) -> str:
        if self.smallest <= size <= self.largest:
            return f"{size:,.0f}"
        return f"> {self.largest:,.0f}" if size else f"< {self.smallest:,.0f}"


def worth(group: RunGroup, sizes: Sequence[RunGroup], measure: Measure, book: Scorebook) -> Worth | None:
    """What an arm is worth in parameters of a curve, which has these sizes.

    Returns:
        None with fewer than two sizes, or with fewer than two seeds or rows in common.

    Raises:
        NotComparable: as `match`, or rows are missing or damaged.
    """
    parts = []
    own, *others = ({run.seed for run in measure.scored(one.runs)} for one in (group, *sizes))
    # A size that has just begun does not take part.
    shared = sorted((own & seeds for seeds in others), key=len)
    first = set(sorted(shared[-2])[:WORTH_SEEDS]) if len(shared) > 1 else set()
    ended = [seeds | peer.diverged_seeds for peer, seeds in zip(sizes, others, strict=True)]
    ready = [peer for peer, seeds in zip(sizes, ended, strict=True) if len(first) > 1 and first <= seeds]
    for smaller, larger in itertools.pairwise(ready):
        tables, clusters = match([group, smaller, larger], measure, book).tables
        if min(tables[0].shape) < 2:
            return None
        ours, below, above = (measure.sign * table for table in tables)
        weights = np.linspace(0, 1, POINTS)[:, None, None]
        contrasts = ours - (1 - weights) * below - weights * above
        found = intervals.mean_squares(contrasts, clusters)
        parts.append((np.geomspace(smaller.params, larger.params, POINTS), found.mean, found.half_width()))
    return worth_of(*map(np.concatenate, zip(*parts, strict=True))) if parts else None


def worth_of(sizes: Array, means: Array, halves: Array) -> Worth:
    """The worth, from the arm's contrast with a curve at many sizes. All arrays are (sizes,), in rising order.

    Args:
        means: the arm's score minus the curve's; more is better.
        halves: half the width of each contrast's interval.
    """
    smallest, largest = float(sizes[0]), float(sizes[-1])
    level, excess = np.flatnonzero(np.abs(means) <= halves), np.abs(means) - halves
    value = 0.0 if means[0] < 0 else math.inf
    if means[0] >= 0 >= means.min():
        # The smallest size at which the curve reaches the arm's score.
        value = _crossing(sizes, means, int(np.argmax(means <= 0)))
    # Without a size that is level, the arm is clearly beyond the curve, or its interval is narrower than a step.
    low, high = min(value, largest), max(value, smallest)
    if len(level):
        # The interval holds the value, also where that is beyond the curve.
        low = min(value, _crossing(sizes, excess, int(level[0]))) if level[0] > 0 else 0.0
        high = max(value, _crossing(sizes, excess, int(level[-1]) + 1)) if level[-1] < len(sizes) - 1 else math.inf
    return Worth(value, low, high, smallest, largest)


def _crossing(sizes: Array, values: Array, after: int) -> float:
    """The size at which values cross 0 between the places `after` - 1 and `after`, linear in the logarithm."""
    if after == 0:
        return float(sizes[after])
    weight = float(values[after - 1] / (values[after - 1] - values[after]))
    return float(sizes[after - 1] ** (1 - weight) * sizes[after] ** weight)

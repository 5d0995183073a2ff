"""An estimate with its interval, and the unit of a metric: what the analysis returns and every table prints."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from tiedlora.reading import StoredNumber, StoredText
from tiedlora.records.loss_metrics import is_loss

MISSING = "–"
"""How a number that is not there is written."""
LEVEL = 0.95
"""The confidence level of every interval in this project."""
OF_ROWS = ("wilson", "newcombe", "bootstrap", "clusters")
"""The methods of intervals over rows, with the seeds as they are."""
MORE_DECIMALS = 2
"""How many more decimals an end may have."""


@dataclass(frozen=True)
class Interval:
    """An estimate and the two ends of its 95 % interval, in the unit of the score."""

    value: StoredNumber
    low: StoredNumber
    high: StoredNumber
    method: StoredText = ""
    """How the ends were computed: wilson, newcombe, bootstrap, clusters, t or crossed."""

    @property
    def is_of_rows(self) -> bool:
        """Whether the ends hold for exactly these seeds: they are over rows (or clusters) alone."""
        return self.method in OF_ROWS


class Unit(Enum):
    """The unit of a metric: shown value / stored value, the decimals that are shown, and its name for axes."""

    POINTS = (100, 1, "points of 100")
    NATS = (1, 3, "nats")
    PLAIN = (1, 3, "the metric's own unit")
    """Of a metric of another program whose values are not all within [-1, 1]."""

    def __init__(self, factor: int, decimals: int, words: str) -> None:
        self.factor, self.decimals, self.words = factor, decimals, words

    @classmethod
    def of(cls, metric: str) -> Unit:
        """The unit of a metric."""
        return cls.NATS if is_loss(metric) else cls.POINTS

    def number(self, value: float, sign: str = "") -> str:
        """0.4213 -> 42.1 in points, 0.421 in nats.

        Args:
            sign: `+` writes the sign of positive numbers too.
        """
        return MISSING if math.isnan(value) else f"{self.factor * value:{sign}z.{self.decimals}f}"

    def ends(self, interval: Interval, sign: str = "") -> str:
        """[40.1, 44.2]."""
        if math.isnan(interval.low):
            return MISSING
        return f"[{self.end(interval.low, sign)}, {self.end(interval.high, sign)}]"

    def end(self, value: float, sign: str = "") -> str:
        """The end of an interval, as `number`. Beside 0 it has more decimals, so that one sees on which side it is."""
        if math.isnan(value):
            return MISSING
        shown, usual = self.factor * value, self.decimals
        needed = next((n for n in range(usual, usual + MORE_DECIMALS + 1) if round(shown, n)), usual)
        return f"{shown:{sign}z.{needed}f}"

    def text(self, interval: Interval, sign: str = "", unit: str = "") -> str:
        """Such as `34.8 [29.2, 40.9]`, or 34.8 if there is no interval.

        Args:
            unit: stands after the value, such as ` %`.
        """
        value = f"{self.number(interval.value, sign)}{unit}"
        return value if math.isnan(interval.low) else f"{value} {self.ends(interval, sign)}"

"""An estimate with its interval, and the unit of a metric: what the analysis returns and every table prints."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from tiedlora.records.reading import Number, Text

LEVEL = 0.95
"""The confidence level of every interval in this project."""


@dataclass(frozen=True)
class Interval:
    """An estimate and the two ends of its 95 % interval, in the unit of the score."""

    value: Number
    low: Number
    high: Number
    method: Text = ""
    """How the ends were computed: wilson, newcombe, bootstrap, t, crossed or fieller."""


class Unit(Enum):
    """The unit of a metric: the factor from the stored value to the shown one, and the number of decimals."""

    POINTS = (100, 1)
    NATS = (1, 3)

    @property
    def factor(self) -> int:
        """Shown value / stored value."""
        return self.value[0]

    @property
    def decimals(self) -> int:
        """The digits after the point that are shown."""
        return self.value[1]

    @property
    def words(self) -> str:
        """The unit's name, for axes and captions."""
        return "points of 100" if self is Unit.POINTS else "nats"

    def text(self, interval: Interval, sign: str = "", unit: str = "") -> str:
        """Such as `34.8 [29.2, 40.9]`.

        Args:
            sign: `+` writes the sign of positive numbers too.
            unit: stands after the value, such as ` %`.
        """
        ends = (interval.value, interval.low, interval.high)
        value, low, high = (f"{self.factor * end:{sign}.{self.decimals}f}" for end in ends)
        return f"{value}{unit} [{low}, {high}]"

"""An estimate with its interval. The functions of this package return it, and tables print it."""

from __future__ import annotations

from dataclasses import dataclass

LEVEL = 0.95
"""The confidence level of every interval in this project."""


@dataclass(frozen=True)
class Interval:
    """An estimate and the two ends of its 95 % interval, in the unit of the score."""

    value: float
    low: float
    high: float
    method: str = ""
    """How the ends were computed: wilson, newcombe, bootstrap, t, crossed or fieller."""

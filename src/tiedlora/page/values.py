"""The values of a table. Each column has one type. formats.py and page.py turn the values into text.

Scores, differences and shares are fractions of 1 here. They are shown as points of 100 and as per cent. Losses are in
nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tiedlora.records.interval import Interval, Unit


@dataclass(frozen=True)
class Count:
    """A whole number that may be large: parameters, rows."""

    value: int


@dataclass(frozen=True)
class Amount:
    """A measured quantity whose unit is in the column's name."""

    value: float
    decimals: int = 2


@dataclass(frozen=True)
class Percent:
    """A share."""

    value: float
    decimals: int = 2


@dataclass(frozen=True)
class PercentInterval:
    """A share with the ends of its interval; the ends are NaN if there is no interval."""

    interval: Interval


@dataclass(frozen=True)
class LearningRate:
    """The chosen learning rate, and how many were tried."""

    value: float
    tried: int


@dataclass(frozen=True)
class ScoreValue:
    """A score, or a difference of scores (signed)."""

    value: float
    signed: bool = False
    unit: Unit = Unit.POINTS


@dataclass(frozen=True)
class ScoreInterval:
    """A score or a difference with the ends of its interval; the ends are NaN if there is no interval."""

    interval: Interval
    signed: bool = False
    unit: Unit = Unit.POINTS


@dataclass(frozen=True)
class Ends:
    """The ends of an interval whose value is in another column."""

    interval: Interval
    signed: bool = False
    unit: Unit = Unit.POINTS


@dataclass(frozen=True)
class NamedEnds:
    """The ends of an interval that may cover less than its column's name says."""

    interval: Interval
    covers: str = ""
    """What it covers instead, such as `examples`; empty if the column's name is right."""
    signed: bool = False
    unit: Unit = Unit.POINTS


@dataclass(frozen=True)
class TaskScore:
    """One group's score on one task, and its difference to LoRA."""

    score: float | None
    seeds: int
    has_notes: bool
    difference: ScoreInterval | None = None
    unit: Unit = Unit.POINTS


@dataclass(frozen=True)
class AverageScore:
    """The mean over tasks with its interval over seeds; the ends are NaN for one seed."""

    interval: Interval
    seeds: int
    unit: Unit = Unit.POINTS


Value = (
    str
    | int
    | float
    | Count
    | Amount
    | Percent
    | PercentInterval
    | LearningRate
    | ScoreValue
    | ScoreInterval
    | Ends
    | NamedEnds
    | TaskScore
    | AverageScore
    | None
)
"""The values that a table may hold. None means missing, and is never filled in."""


@dataclass(frozen=True)
class Column:
    """A column's name and the class of its values. A single value may also be a word such as `failed`, or None."""

    name: str
    kind: type = str
    csv_name: str = ""
    """The name in CSV files, if another column of the table has the same name."""
    wraps: bool = False
    """Whether the column has long texts."""


@dataclass(frozen=True)
class Table:
    """Columns and rows of values, with a caption that says how to read them."""

    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: Sequence[tuple[Value, ...]]

    @property
    def head(self) -> tuple[str, ...]:
        """The columns' names."""
        return tuple(column.name for column in self.columns)

"""What was halved because memory ran out."""

from __future__ import annotations

from dataclasses import dataclass

from tiedlora.records.reading import Count, Text


@dataclass(frozen=True)
class Halving:
    """Memory ran out, and from then on passes were at most half as large. The gradients are the same sums."""

    step: Count
    """The optimizer step, counted from 1; 0 for the validation before it."""
    during: Text
    """`training` or `validation`."""
    tokens: Count
    """Most tokens of a pass from then on, without padding. A row that has more is a pass of its own."""

"""An interval drawn in a row of the page, as a small SVG. Better is always to the right."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import median

from markupsafe import Markup

from tiedlora.records.interval import Interval

WIDTH, MIDDLE = 160, 9
"""Of the drawing, in its own unit: its width, and the height of the line."""
EDGE = 5
"""The room at both ends, so that no marker is cut."""


def better_right(interval: Interval, sign: float) -> Interval:
    """The interval on an axis on which better is to the right.

    Args:
        sign: -1 if a lower number is better.
    """
    low, high = sorted((sign * interval.low, sign * interval.high))
    return Interval(sign * interval.value, low, high)


def axis_of_differences(intervals: Iterable[Interval]) -> tuple[float, float]:
    """The ends of an axis that has 0, all values and most intervals. A very long interval goes beyond its ends.

    So one arm with few seeds does not make all other differences look like 0.
    """
    found = list(intervals)
    ends = [[end for end in (one.value, one.low, one.high) if not math.isnan(end)] for one in found]
    typical = median(max(map(abs, own)) for own in ends) if found else 1.0
    reach = max([1.3 * abs(one.value) for one in found] + [1.2 * typical]) or 1.0
    low = min([-0.15 * reach] + [1.12 * min(own) for own in ends])
    high = max([0.15 * reach] + [1.12 * max(own) for own in ends])
    return max(low, -reach), min(high, reach)


def track(
    interval: Interval,
    axis: tuple[float, float],
    *,
    tone: str,
    reference: float = 0.0,
    zone: tuple[float, float] | None = None,
    is_filled: bool = True,
    is_firm: bool = True,
) -> Markup:
    """A bar with its value, and a line to compare it with. The words beside it say the same, so it has no label.

    Args:
        axis: the values at the left and at the right end. What is beyond them ends in an arrow.
        tone: the page's variable for the colour.
        reference: where the line stands.
        zone: what is shaded.
        is_firm: False draws a dashed bar.
    """

    def at(value: float) -> str:
        share = (min(max(value, axis[0]), axis[1]) - axis[0]) / (axis[1] - axis[0])
        return f"{EDGE + share * (WIDTH - 2 * EDGE):.1f}"

    def arrow(x: str, way: int) -> str:
        return f'<path d="M{x} {MIDDLE - 4}l{5 * way} 4l{-5 * way} 4z" fill="{colour}"/>'

    colour, parts = f"var(--{tone})", []
    if zone is not None:
        left, right = at(zone[0]), at(zone[1])
        width = float(right) - float(left)
        parts.append(f'<rect x="{left}" y="0" width="{width:.1f}" height="{2 * MIDDLE}" fill="var(--zone)"/>')
    parts.append(f'<path d="M{at(reference)} 0v{2 * MIDDLE}" stroke="var(--soft)"/>')
    if not math.isnan(interval.low):
        dash = "" if is_firm else ' stroke-dasharray="4 3"'
        ends = f"M{at(interval.low)} {MIDDLE}H{at(interval.high)}"
        parts.append(f'<path d="{ends}" stroke="{colour}" stroke-width="2.5"{dash}/>')
    lowest, highest = (
        end(one for one in (interval.value, interval.low, interval.high) if not math.isnan(one)) for end in (min, max)
    )
    if lowest < axis[0]:
        parts.append(arrow(at(axis[0]), -1))
    if highest > axis[1]:
        parts.append(arrow(at(axis[1]), 1))
    if axis[0] <= interval.value <= axis[1]:
        fill = colour if is_filled else "var(--back)"
        circle = f'<circle cx="{at(interval.value)}" cy="{MIDDLE}" r="4" fill="{fill}" stroke="{colour}"'
        parts.append(f'{circle} stroke-width="1.5"/>')
    svg = f'<svg class="track" viewBox="0 0 {WIDTH} {2 * MIDDLE}" aria-hidden="true">'
    return Markup(svg + "".join(parts) + "</svg>")

"""Charts as SVG for the page: axes, lines, bands, markers and labels, without a style of their own.

Colours are classes, which page.css sets for both themes. Every text is escaped. A chart has the size of a panel that a
phone shows unreduced, so that its text stays readable there; the page places several side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from tiedlora.text import visible

Point = tuple[float, float]
WIDTH, HEIGHT = 380, 262
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 40
LETTER = 5.6
"""The usual width of a letter of the labels, to keep labels apart."""

SHAPES = {
    "o": '<circle cx="{x}" cy="{y}" r="4.4"/>',
    "D": '<path d="M{x},{y}m0,-5.6l5.6,5.6l-5.6,5.6l-5.6,-5.6z"/>',
    "d": '<path d="M{x},{y}m0,-6.2l3.8,6.2l-3.8,6.2l-3.8,-6.2z"/>',
    "s": '<path d="M{x},{y}m-4.2,-4.2h8.4v8.4h-8.4z"/>',
    "^": '<path d="M{x},{y}m0,-5.4l5.2,9.4h-10.4z"/>',
    "v": '<path d="M{x},{y}m0,5.4l5.2,-9.4h-10.4z"/>',
    "<": '<path d="M{x},{y}m-5.4,0l9.4,5.2v-10.4z"/>',
    ">": '<path d="M{x},{y}m5.4,0l-9.4,5.2v-10.4z"/>',
    "P": '<path d="M{x},{y}m-1.8,-5.2h3.6v3.4h3.4v3.6h-3.4v3.4h-3.6v-3.4h-3.4v-3.6h3.4z"/>',
    "h": '<path d="M{x},{y}m0,-5.2l4.5,2.6v5.2l-4.5,2.6l-4.5,-2.6v-5.2z"/>',
    "p": '<path d="M{x},{y}m0,-5.4l5.1,3.7l-2,6.1h-6.2l-2,-6.1z"/>',
    "H": '<path d="M{x},{y}m-5.2,0l2.6,-4.5h5.2l2.6,4.5l-2.6,4.5h-5.2z"/>',
    "X": '<path d="M{x},{y}m-5,-2.6l2.4,-2.4l2.6,2.6l2.6,-2.6l2.4,2.4l-2.6,2.6l2.6,2.6l-2.4,2.4l-2.6,-2.6'
    'l-2.6,2.6l-2.4,-2.4l2.6,-2.6z"/>',
    "*": '<path d="M{x},{y}m0,-7l1.7,4.7l5,.1l-4,3l1.4,4.8l-4.1,-2.8l-4.1,2.8l1.4,-4.8l-4,-3l5,-.1z"/>',
    "x": '<path class="stroke" d="M{x},{y}m-4,-4l8,8m0,-8l-8,8"/>',
}
"""Marker -> its shape around (x, y). The names are matplotlib's, because the same styles draw the figures' files."""
DASHES = {"-": "", "--": "6 3", ":": "1.5 3", "-.": "7 3 1.5 3"}


@dataclass(frozen=True)
class Axis:
    """One axis: its range, its ticks and its name."""

    name: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    is_log: bool = False

    def place(self, value: float) -> float:
        """Where a value is, from 0 at the low end to 1 at the high end."""
        low, high = self._of(self.low), self._of(self.high)
        return (self._of(value) - low) / (high - low)

    def _of(self, value: float) -> float:
        return math.log(value) if self.is_log else value


def number(value: float) -> str:
    """A tick's label: 0.25, 12, 3e-05 as 3e-5."""
    return f"{value:g}".replace("e-0", "e-").replace("-", "−")


def linear_axis(name: str, values: Sequence[float], include: Sequence[float] = (), count: int = 5) -> Axis:
    """An axis over the values with a margin, and with about `count` round ticks."""
    ends = [value for value in (*values, *include) if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(ends), max(ends)
    if high - low <= 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    raw = (high - low) / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size >= raw * 0.999)
    margin = 0.06 * (high - low)
    low, high = low - margin, high + margin
    ticks = [step * place for place in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return Axis(name, low, high, [(tick, number(round(tick, 12))) for tick in ticks])


def log_axis(name: str, values: Sequence[float], label: Callable[[float], str] = number, widen: float = 1.35) -> Axis:
    """A logarithmic axis over positive values, with ticks at 1, 2 and 5 (or at powers of ten, if it is wide)."""
    low, high = min(values) / widen, max(values) * widen
    if high / low < 6:
        low, high = low / 1.6, high * 1.6
    subs = (1,) if high / low > 600 else (1, 3) if high / low > 60 else (1, 2, 5)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [sub * 10.0**power for power in powers for sub in subs if low <= sub * 10.0**power <= high]
    return Axis(name, low, high, [(tick, label(tick)) for tick in ticks], is_log=True)


class Chart:
    """One panel. Values are given in the units of the axes.

    Args:
        label: what the chart shows, in words, for readers who do not see it.
    """

    def __init__(self, x: Axis, y: Axis, label: str) -> None:
        self.x, self.y, self.label = x, y, label
        self._body: list[Markup] = []
        self._taken: list[tuple[float, float, float, float]] = []
        """The boxes of markers and labels, which later labels avoid."""

    def at(self, x: float, y: float) -> Point:
        """The place of a point in the drawing."""
        across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        return LEFT + across * self.x.place(x), TOP + down * (1 - self.y.place(y))

    def line(self, points: Sequence[Point], css: str, dash: str = "-", width: float = 1.8) -> None:
        """A line through the points."""
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.at(*point) for point in points))
        self._add(
            '<polyline class="line {}" points="{}" stroke-width="{}" stroke-dasharray="{}"/>',
            *(css, places, f"{width:.1f}", DASHES[dash] or "none"),
        )

    def band(self, xs: Sequence[float], lows: Sequence[float], highs: Sequence[float], css: str) -> None:
        """The area between two lines."""
        ends = [*zip(xs, lows, strict=True), *reversed(list(zip(xs, highs, strict=True)))]
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.at(*end) for end in ends))
        self._add('<polygon class="band {}" points="{}"/>', css, places)

    def bar(self, x: float, low: float, high: float, css: str) -> None:
        """An upright interval, cut off at the ends of the axis."""
        low, high = max(low, self.y.low), min(high, self.y.high)
        (place, bottom), (_, top) = self.at(x, low), self.at(x, high)
        self._add(
            '<line class="bar {}" x1="{}" y1="{}" x2="{}" y2="{}"/>',
            *(css, f"{place:.1f}", f"{bottom:.1f}", f"{place:.1f}", f"{top:.1f}"),
        )

    def mark(self, x: float, y: float, shape: str, css: str, title: str, filled: bool = True) -> None:
        """A marker, with a text that a pointer shows."""
        across, down = self.at(x, y)
        self._taken.append((across - 5, down - 5, across + 5, down + 5))
        inner = Markup(SHAPES[shape].format(x=f"{across:.1f}", y=f"{down:.1f}"))
        state = "mark" if filled else "mark hollow"
        self._add('<g class="{} {}"><title>{}</title>{}</g>', state, css, visible(title), inner)

    def ring(self, x: float, y: float) -> None:
        """A ring around a marker that was chosen."""
        across, down = self.at(x, y)
        self._add('<circle class="ring" cx="{}" cy="{}" r="8.5"/>', f"{across:.1f}", f"{down:.1f}")

    def level(self, y: float, name: str = "") -> None:
        """A thin level line to compare with. Labels that come later keep away from it."""
        place = self.at(self.x.low, y)[1]
        self._taken.append((LEFT, place - 1, WIDTH - RIGHT, place + 1))
        self._add(
            '<line class="level" x1="{}" x2="{}" y1="{}" y2="{}"/>', LEFT, WIDTH - RIGHT, f"{place:.1f}", f"{place:.1f}"
        )
        if name:
            self._add('<text x="{}" y="{}" text-anchor="end">{}</text>', WIDTH - RIGHT, f"{place - 4:.1f}", name)

    def name(self, x: float, y: float, text: str) -> bool:
        """A label beside a point, where it covers no marker and no other label. Returns whether there was room."""
        across, down = self.at(x, y)
        text = visible(text)[:28]
        width = LETTER * len(text)
        places = (
            (across + 8, down + 4, "start", across + 8),
            (across - 8, down + 4, "end", across - 8 - width),
            (across, down - 9, "middle", across - width / 2),
            (across, down + 17, "middle", across - width / 2),
            (across + 7, down - 7, "start", across + 7),
            (across + 7, down + 14, "start", across + 7),
            (across - 7, down - 7, "end", across - 7 - width),
            (across - 7, down + 14, "end", across - 7 - width),
        )
        for left, base, anchor, start in places:
            box = (start, base - 10, start + width, base + 3)
            inside = box[0] >= LEFT and box[2] <= WIDTH - 2 and box[1] >= 0 and box[3] <= HEIGHT - BOTTOM + 2
            if inside and not any(_overlap(box, other) for other in self._taken):
                self._taken.append(box)
                self._add(
                    '<text class="name" x="{}" y="{}" text-anchor="{}">{}</text>',
                    f"{left:.1f}",
                    f"{base:.1f}",
                    anchor,
                    text,
                )
                return True
        return False

    def take(self, x: float, low: float, high: float) -> None:
        """Keep labels away from an upright interval."""
        (across, bottom), (_, top) = self.at(x, max(low, self.y.low)), self.at(x, min(high, self.y.high))
        self._taken.append((across - 1.5, top, across + 1.5, bottom))

    def svg(self) -> Markup:
        """The whole chart."""
        floor, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        parts = []
        for value, label in self.y.ticks:
            y = self.at(self.x.low, value)[1]
            parts.append(
                Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(LEFT, right, y, y)
            )
            parts.append(_text(LEFT - 6, y + 3.5, "end", label))
        last = -math.inf
        for value, label in self.x.ticks:
            x = self.at(value, self.y.low)[0]
            parts.append(
                Markup('<line class="tick" x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}"/>').format(x, x, floor, floor + 4)
            )
            # Labels that would touch are left out; their ticks stay.
            if x - LETTER * len(label) / 2 > last + 4:
                parts.append(_text(x, floor + 15, "middle", label))
                last = x + LETTER * len(label) / 2
        parts.append(Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, right, floor, floor))
        parts.append(_text((LEFT + right) / 2, HEIGHT - 6, "middle", self.x.name))
        parts.append(
            Markup('<text transform="translate(10,{:.1f}) rotate(-90)" text-anchor="middle">{}</text>').format(
                (TOP + floor) / 2, self.y.name
            )
        )
        return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
            WIDTH, HEIGHT, visible(self.label), Markup("").join([*parts, *self._body])
        )

    def _add(self, template: str, *values: object) -> None:
        self._body.append(Markup(template).format(*values))


def marker(shape: str, css: str, filled: bool = True, dash: str = "") -> Markup:
    """A marker for a legend, on a short line if it has a dash."""
    line = Markup(
        '<line class="line {}" x1="0" x2="26" y1="8" y2="8" stroke-width="1.8" stroke-dasharray="{}"/>'
    ).format(css, DASHES.get(dash) or "none")
    state = "mark" if filled else "mark hollow"
    return Markup('<svg class="key" viewBox="0 0 26 16" aria-hidden="true">{}<g class="{} {}">{}</g></svg>').format(
        line if dash else "", state, css, Markup(SHAPES[shape].format(x=13, y=8))
    )


def _text(x: float, y: float, anchor: str, text: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, visible(text))


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]

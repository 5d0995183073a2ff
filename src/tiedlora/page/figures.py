"""How figures look, and where they go: the page, as SVG in the page's colours, and files, as PNG and SVG.

A panel is one chart (charts.py). Panels have fixed sizes and margins, so they line up in a file, and the page puts as
many side by side as fit.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tiedlora.analysis.groups import RunGroup
from tiedlora.config.trial_arm import TrialArm
from tiedlora.text import visible

HERE = Path(__file__).parent
LIGHT = dict(re.findall(r"--(\w+): light-dark\((#\w+)", (HERE / "page.css").read_text(encoding="utf-8")))
NAMES = ("ink", "soft", "line", "back", *(f"k{number}" for number in range(18)))
# k0 to k6 are after Okabe and Ito's palette, without black and yellow, each of which is invisible on one background.
# The others are darker or lighter ones between them.
THEME = {name: LIGHT[name] for name in NAMES} | {"back": "#ffffff"}
"""The colours of page.css in its light theme, by the names of its variables; the dark theme has others. The background
is white in files, and nearly white on the page."""
INK, SOFT, LINE, BACK, *COLOURS = THEME.values()
CSS_NAMES = {colour: name for name, colour in THEME.items()}
# Each configuration has its own colour, and its own marker and dash, so that they differ in a grey print too.
_LOOKS = {
    "LoRA": (0, "o", "-"),
    "LoRA_qkv": (1, "h", "-"),
    "TABuv": (2, "D", "-"),
    "TABuv_b0": (7, "d", "-."),
    "TAB": (3, "s", "-"),
    "TA": (8, "^", "--"),
    "TB": (9, "v", ":"),
    "Tuv": (4, "P", "-"),
    "TAuv": (5, "<", "--"),
    "TBuv": (10, ">", ":"),
    "TBuv_b0": (11, "h", ":"),
    "RaSA": (12, "X", "-"),
    "TAuv_LoRA1": (13, "X", "-"),
    "peft/vera": (14, "X", "--"),
    "peft/unilora": (15, "X", "--"),
    "peft/vblora": (16, "X", "--"),
    "peft/tinylora": (17, "X", "--"),
}
STYLES = {name: (COLOURS[number], marker, dash) for name, (number, marker, dash) in _LOOKS.items()}
STYLES["LoRA (shuffled targets)"] = (SOFT, "p", ":")
STYLES["full"] = (INK, "*", "-")
OTHERS = [(colour, marker, dash) for marker, dash in (("*", "-."), ("p", "--"), ("H", ":")) for colour in COLOURS]
"""The styles of all other configurations."""
_chosen: dict[str, tuple[str, str, Any]] = {}
"""Family -> its style, of those that the report has beside the ones above."""
GLYPHS = dict(zip("odDs^v<>PhHXp*", "●♦◆■▲▼◀▶✚⬢⬣✖⬟★", strict=True))
"""Marker -> the letter that looks like it, for the page's legends. Each marker above needs one, and each colour its
name in THEME."""
FIRST = ("LoRA", "TABuv", "TABuv_b0", "TAuv")
"""The configurations that are drawn and named first. LoRA on some layers comes last."""
KINDS = ("against", "over-steps", "shares", "pareto", "curves", "search")
"""What a panel may belong to; a report has a figure of each kind, if there is anything to draw."""
MOST_PANELS = 12
"""The most panels of a file. More would be unreadable; the page has them all."""
SIZE = (4.0, 2.75)
"""Width and height of a panel in inches. Two make the width of a page of text, where 8 points stay readable."""
MARGINS = (0.62, 0.15, 0.5, 0.12)
"""Inches at the left, right, bottom and top of a panel's axes."""
RC: Any = {
    "font.family": "sans-serif",
    **dict.fromkeys(("font.size", "axes.labelsize"), 8.5),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 8),
    **{"axes.titlesize": 9, "axes.titlelocation": "left", "axes.titleweight": "bold"},
    "text.color": INK,
    **dict.fromkeys(("axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), SOFT),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.spines.left", "legend.frameon"), False),
    **{"axes.grid": True, "axes.grid.axis": "y", "grid.color": LINE, "axes.axisbelow": True, "ytick.major.size": 0},
    **{"lines.markersize": 5.5, "lines.linewidth": 1.4},
    # Texts stay texts, and without a date equal runs give equal bytes. No text is mathematics: names may hold a $.
    **{"svg.fonttype": "none", "svg.hashsalt": "tiedlora", "text.parse_math": False},
}


@dataclass(frozen=True)
class Panel:
    """One chart: what it is about, and the function that draws it."""

    kind: str
    """Which figure it belongs to, one of KINDS; the name of that figure's file."""
    model: str
    title: str
    draw: Callable[[Axes], None]
    groups: Sequence[RunGroup] = ()
    """The configurations that need a legend."""
    size: tuple[float, float] = SIZE
    margins: tuple[float, float, float, float] = MARGINS


@dataclass(frozen=True)
class Key:
    """One entry of a legend."""

    name: str
    colour: str
    marker: str
    dash: Any
    marks: list[str]
    """What a reader must know of one of its runs, in few words."""


def order(group: RunGroup) -> tuple[int, int]:
    """The key by which groups are sorted where there is not room for all."""
    is_part = group.arm.on_layers is not None
    return (FIRST.index(group.label) if group.label in FIRST else len(FIRST) + is_part, group.rank)


def choose_styles(groups: Iterable[RunGroup]) -> None:
    """Give each configuration of a report that has no style of its own a colour that no other one of them has, as long
    as there are enough. All figures of the report use it.
    """
    families = {group.arm.family for group in groups}
    taken = {STYLES[family][0] for family in families & STYLES.keys()}
    free = sorted(OTHERS, key=lambda look: look[0] in taken)
    others = sorted(families - STYLES.keys())
    _chosen.clear()
    _chosen.update(zip(others, itertools.cycle(free), strict=False))


def style(arm: TrialArm) -> tuple[str, str, Any]:
    """The colour, marker and dash of an arm, the same in every figure. LoRA on some layers looks as LoRA."""
    return STYLES.get(arm.family) or _chosen.get(arm.family) or OTHERS[0]


def legend(panels: Iterable[Panel]) -> list[Key]:
    """One entry for each configuration of the panels that looks different."""
    keys: dict[str, Key] = {}
    for group in sorted((group for panel in panels for group in panel.groups), key=order):
        name = group.arm.family + group.own_values
        key = keys.setdefault(name, Key(name, *style(group.arm), []))
        key.marks.extend(mark for mark in group.short_marks if mark not in key.marks)
    return list(keys.values())


def cut(text: str, most: int) -> str:
    """The text with visible control characters, cut to `most` characters."""
    text = visible(text)
    return text if len(text) <= most else f"{text[: most - 1]}…"


@contextmanager
def _look(**more: Any) -> Iterator[None]:
    """Draw with the settings of RC, without a warning of letters that matplotlib's font lacks: a PNG shows a box there,
    and an SVG has the text itself.
    """
    with mpl.rc_context(RC | more), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        yield


def write_files(panels: Sequence[Panel], out: Path) -> None:
    """Write a figure of each kind to `out`, as PNG and SVG. Remove that of an earlier report, if this one has none."""
    for kind in KINDS:
        if not (own := [panel for panel in panels if panel.kind == kind][:MOST_PANELS]):
            for suffix in ("png", "svg"):
                (out / f"{kind}.{suffix}").unlink(missing_ok=True)
            continue
        with _look():
            figure = _figure(own)
            figure.savefig(out / f"{kind}.png", dpi=200, facecolor=BACK)
            figure.savefig(out / f"{kind}.svg", transparent=True, metadata={"Date": None})


def _figure(panels: Sequence[Panel], is_file: bool = True) -> Figure:
    """The panels in one figure, two in a row where they are narrow; in a file with their titles and one legend."""
    columns = 2 if len(panels) > 1 and panels[0].size == SIZE else 1
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    heights = [max(panel.size[1] for panel in row) for row in rows]
    has_models = len({panel.model for panel in panels}) > 1
    above = (0.34 if has_models else 0.18 if panels[0].title else 0.0) if is_file else 0.0
    handles = _handles(panels) if is_file else []
    width = columns * max(panel.size[0] for panel in panels)
    # Inches of each entry of the legend, which fills one column after the other.
    entries = [0.6 + 0.07 * len(str(handle.get_label())) for handle in handles]
    splits = {count: [max(own) for own in np.array_split(entries, count) if own.size] for count in range(1, 6)}
    in_row = max((count for count, widest in splits.items() if sum(widest) <= width), default=1)
    below = 0.1 + 0.18 * math.ceil(len(handles) / in_row) if handles else 0.0
    height = sum(heights) + above * len(rows) + below
    figure = Figure(figsize=(width, height))
    # Names beside points need the size of letters, which this canvas knows.
    FigureCanvasAgg(figure)
    floor = height
    for row, own in zip(rows, heights, strict=True):
        floor -= own + above
        for column, panel in enumerate(row):
            left, right, bottom, top = panel.margins
            across, up = panel.size[0] - left - right, own - bottom - top
            x, y = column * panel.size[0] + left, floor + bottom
            ax = figure.add_axes((x / width, y / height, across / width, up / height))
            panel.draw(ax)
            if is_file:
                title = [
                    cut(line, int(13 * panel.size[0])) for line in (panel.title, panel.model if has_models else "")
                ]
                # It starts where the panel does, left of the axes.
                ax.set_title("\n".join(filter(None, title)), x=(0.1 - left) / across, pad=72 * top)
    if handles:
        figure.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, below / height), ncols=in_row)
    return figure


def _handles(panels: Sequence[Panel]) -> list[Line2D]:
    """A file's legend: the configurations, or what a filled marker says."""
    kind = panels[0].kind
    if kind == "against":
        words = {SOFT: "holds by Holm's procedure", BACK: "does not, or no claim asks"}
        return [
            Line2D([], [], color=SOFT, marker="o", markerfacecolor=inside, linestyle="none", label=label)
            for inside, label in words.items()
        ]
    found = []
    for key in legend(panels):
        line = Line2D([], [], color=key.colour, marker=key.marker, label=cut(key.name, 32))
        line.set_linestyle(key.dash if kind in ("over-steps", "curves", "search") else "none")
        found.append(line)
    return found


SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"


def inline(panel: Panel) -> Markup:
    """The panel as an SVG element of the page.

    The page's policy allows no style in an attribute, so colours and lines become attributes of their own. A colour
    becomes the page's variable, so that the figure follows the theme.
    """
    file = io.BytesIO()
    # The names that elements refer to each other by must differ between the panels of a page.
    with _look(**{"svg.hashsalt": f"{panel.kind} {panel.model} {panel.title} {panel.size}"}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        _figure([panel], is_file=False).savefig(file, format="svg", transparent=True, metadata=nothing)
    root = ElementTree.fromstring(file.getvalue())
    for element in root.iter():
        for style in element.findall(f"{SVG}style"):
            element.remove(style)
        _plain(element)
    label = visible(f"{panel.kind} {panel.title}".strip())
    root.attrib = {"class": "chart", "viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
    root.attrib |= {"stroke-linejoin": "round", "stroke-linecap": "butt"}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _plain(element: ElementTree.Element) -> None:
    """Turn an element's style into attributes, and leave out what the page does not need."""
    element.tag = element.tag.removeprefix(SVG)
    style = element.attrib.pop("style", "")
    if element.tag == "g":
        element.attrib.pop("id", None)
    if (target := element.attrib.pop(f"{XLINK}href", None)) is not None:
        element.set("href", target)
    for key in ("x", "y", "d", "transform"):
        if key in element.attrib:
            element.set(key, re.sub(r"(\.\d)\d+", r"\1", element.attrib[key]))
    for declaration in filter(None, style.split(";")):
        key, value = (part.strip() for part in declaration.split(":", 1))
        # The page has its own letters.
        if key != "font-family":
            element.set(key, f"var(--{CSS_NAMES[value]})" if value in CSS_NAMES else value)

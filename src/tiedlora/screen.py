"""What commands print for people: in colour and in the width of a terminal; plain, whole lines in a pipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from tiedlora.text import visible

WHOLE = 10_000
"""The width of a pipe: no line is cut or wrapped there."""


def console() -> Console:
    """Standard output. Rich finds out whether it is a terminal, and knows NO_COLOR and FORCE_COLOR."""
    # No text of a file is read as rich's markup.
    made = Console(highlight=False, markup=False, emoji=False)
    if not made.is_terminal:
        made.width = WHOLE
    return made


def show(*parts: RenderableType) -> None:
    """Print parts below each other, as `text` has them.

    Raises:
        BrokenPipeError: the reader has ended. (Rich would end the process with a code of its own.)
    """
    print(text(*parts), flush=True)


def text(*parts: RenderableType) -> str:
    """Parts below each other, as standard output shows them.

    A plain `str` is never wrapped, so that a path in it can be copied.
    """
    made = console()
    with made.capture() as drawn:
        for part in parts:
            made.print(part, soft_wrap=isinstance(part, str))
    return "\n".join(line.rstrip() for line in drawn.get().removesuffix("\n").split("\n"))


def table(head: Sequence[str], rows: Iterable[Sequence[str | Text]], numbers: Iterable[str] = ()) -> Table:
    """Aligned columns, two blanks apart. If there is too little room, the last column wraps, and then others are cut.

    Args:
        numbers: the columns that are aligned to the right.
    """
    drawn, right = Table(box=None, pad_edge=False), set(numbers)
    for name in head:
        is_last = name == head[-1]
        drawn.add_column(
            visible(name), justify="right" if name in right else "left", no_wrap=not is_last, overflow="fold"
        )
    for row in rows:
        drawn.add_row(*(cell if isinstance(cell, Text) else Text(visible(cell)) for cell in row))
    return drawn


class FirstThatFits:
    """The first form that fits the width, or the last one."""

    def __init__(self, *forms: RenderableType) -> None:
        self.forms = forms

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for form in self.forms[:-1]:
            if Measurement.get(console, options.update_width(WHOLE), form).maximum <= options.max_width:
                yield form
                return
        yield self.forms[-1]

"""Text for people: visible control characters, checked names, aligned columns, times."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,95}")
"""What conf/ allows as the name of a model, a task or a configuration."""


def is_name(value: object) -> bool:
    """Whether `value` may name a model, a task or a configuration, and so be a part of a path."""
    return isinstance(value, str) and NAME.fullmatch(value) is not None and ".." not in value


def visible(text: str) -> str:
    """The text with a visible sign for each control character, bidirectional mark and lone surrogate.

    So no text can change how the text around it is shown. A line feed becomes a sign too.
    """
    return "".join(_sign(c) for c in text)


def _sign(c: str) -> str:
    code = ord(c)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    # C1 controls, bidirectional marks and overrides, line separators, surrogates, the byte order mark.
    hidden = (0x80, 0x9F), (0x200E, 0x200F), (0x2028, 0x202E), (0x2066, 0x2069), (0xD800, 0xDFFF), (0xFEFF, 0xFEFF)
    return f"<U+{code:04X}>" if any(low <= code <= high for low, high in hidden) else c


def visible_lines(text: str) -> str:
    """As `visible`, for a text of several lines: line feeds stay, so the text keeps its lines."""
    return "\n".join(map(visible, text.split("\n")))


def clock(seconds: float) -> str:
    """The time as m:ss, or as h:mm:ss from one hour."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length as aligned columns, two blanks apart. The first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def number_list(numbers: Iterable[int]) -> str:
    """Whole numbers in few words: `0 to 4`, or `0, 2, 7`."""
    ordered = sorted(numbers)
    if len(ordered) > 2 and ordered[-1] - ordered[0] == len(ordered) - 1:
        return f"{ordered[0]} to {ordered[-1]}"
    return ", ".join(map(str, ordered))

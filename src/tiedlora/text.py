"""Text for people: visible control characters, checked names, aligned columns, times."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,95}")
"""What conf/ allows as the name of a model, a task or a configuration."""


def is_name(value: object) -> bool:
    """Whether `value` may name a model, a task or a configuration, and so be a part of a path."""
    return isinstance(value, str) and NAME.fullmatch(value) is not None and ".." not in value


def nearest(word: str, words: Iterable[str]) -> str:
    """` (did you mean WORD?)` with the most similar of the other `words`; empty if none is similar."""
    close = difflib.get_close_matches(word, [other for other in words if other != word], n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def visible(text: str) -> str:
    """The text with a visible sign for each control character, bidirectional mark and lone surrogate.

    So no text can change how the text around it is shown. A line feed becomes a sign too.
    """
    # A report shows megabytes of answers, in which such characters are rare, so only these are looked at one by one.
    return HIDDEN.sub(_sign, text)


HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff\ufffe\uffff]")
"""C0 and C1 controls, bidirectional marks and overrides, line separators, surrogates, the byte order mark, and the two
codes that XML does not allow."""


def _sign(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"<U+{code:04X}>"


def shortened(text: str, most: int) -> str:
    """A text of a prediction with visible control characters, and at most so many characters."""
    more = f" … ({len(text) - most:,} more characters in scores/)" if len(text) > most else ""
    return visible_lines(text[:most] + more)


def visible_lines(text: str) -> str:
    """As `visible`, for a text of several lines: line feeds stay, so the text keeps its lines."""
    return "\n".join(map(visible, text.split("\n")))


def without_folders(text: str) -> str:
    """The text with only the last name of each absolute path: what is published names no folder of a machine."""
    return FOLDERS.sub("", text)


FOLDERS = re.compile(r"(?<![\w.:/~-])~?/(?:[^\s/:;,'\"()]+/)+(?=[^\s/])")


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


def counted(count: int, noun: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{count:,} {noun}{'s' if count != 1 else ''}"


def number_list(numbers: Iterable[int]) -> str:
    """Whole numbers in few words: `0 to 4`, or `0, 2, 7`."""
    ordered = sorted(numbers)
    if len(ordered) > 2 and ordered[-1] - ordered[0] == len(ordered) - 1:
        return f"{ordered[0]} to {ordered[-1]}"
    return ", ".join(map(str, ordered))

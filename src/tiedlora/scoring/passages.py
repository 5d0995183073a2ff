"""The neutral text whose loss measures forgetting: passages of a text file.

A passage is an example whose every token after the first is a target. It imports no torch, because a finished run's
passages are checked without it.
"""

from __future__ import annotations

import bisect
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tiedlora import storage
from tiedlora.config.check import check_forgetting
from tiedlora.data.encoding import Encoder
from tiedlora.errors import UserError
from tiedlora.tasks import Example

PASSAGES = 100
"""How many passages are scored: the first ones of the text. PEFT's benchmark takes as many pages of FineWiki."""
PASSAGE_TOKENS = 768
"""The most tokens of a passage, as in PEFT's benchmark; fewer if the model's context is shorter."""
LONGEST_WINDOW = 16 * PASSAGE_TOKENS
"""A passage is looked for in at most this many characters. English has about four characters for a token."""


@dataclass(frozen=True)
class Passage(Example):
    """A text without a prompt: its first token is given, and all others are predicted."""


def as_passages(texts: Sequence[str]) -> list[Passage]:
    """The texts as examples. An id holds a hash of its text, so rows of different texts are never paired."""
    return [
        Passage(f"{number}-{hashlib.sha256(text.encode()).hexdigest()[:8]}", "", text, (text,))
        for number, text in enumerate(texts)
    ]


def check_source(source: str) -> None:
    """Refuse neutral text that is not there, before anything is loaded.

    Args:
        source: as score.forgetting.

    Raises:
        UserError: it is no text file, or not there.
    """
    check_forgetting(source)
    if not Path(source).expanduser().is_file():
        raise UserError(f"score.forgetting={source}: no such file; a relative path starts at the present folder")


def source_digest(source: str) -> str | None:
    """The sha256 of a text file; None for a file that is not there."""
    path = Path(source).expanduser()
    return storage.sha256(path) if path.is_file() else None


def read_passages(source: str, encoder: Encoder) -> list[Passage]:
    """The first PASSAGES passages of `score.forgetting`, consecutive pieces of the file.

    Raises:
        UserError: the source cannot be read, or holds no text.
    """
    limit = min(PASSAGE_TOKENS, encoder.context)
    path = Path(source).expanduser()
    try:
        text = storage.read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"score.forgetting={path}: is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    pieces = split_text(text, lambda piece: len(encoder.text(piece)) <= limit)
    # A passage of one token has nothing to predict.
    found = list(islice((piece for piece in pieces if len(encoder.text(piece)) > 1), PASSAGES))
    if not found:
        raise UserError(f"score.forgetting={source}: holds no text of two tokens")
    return as_passages(found)


def split_text(text: str, fits: Callable[[str], bool]) -> Iterator[str]:
    """Consecutive pieces of the text. Each is as long as `fits` allows, and ends at the end of a word where it can."""
    rest = text.strip()
    while rest:
        # Bisection finds the most characters that fit: nearly always, a longer text has more tokens.
        lengths = range(min(len(rest), LONGEST_WINDOW), 1, -1)
        length = len(lengths) + 1 - bisect.bisect_left(lengths, True, key=lambda length: fits(rest[:length]))
        if length < len(rest) and (words := re.match(r"(?s).*\s", rest[: length + 1])):
            length = words.end()
        yield rest[:length].strip()
        rest = rest[length:].strip()

"""Where an answer ends: at the end-of-text token or another end, at a stop string, or at the limit of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MIN_STOP_SEARCH_TOKENS = 12
"""At least so many of the last tokens are decoded to look for a stop string."""
PART_OF_A_CHARACTER = "\ufffd"
"""What a tokenizer decodes to if the bytes are no whole character."""


@dataclass
class Output:
    """The answer that was generated for one prompt."""

    text: str
    """The text before the stop string or the token that ends it."""
    tokens: int
    ended: str
    """end (end-of-text token, or another one that ends), stop (stop string) or length (max_new_tokens)."""


class AnswerEnds:
    """Finds the ends of answers.

    Args:
        stop: strings that end an answer. They count only after the answer's first character that is not blank.
        max_new_tokens: the most tokens of an answer.
        more_ends: ids of tokens that end an answer, besides the tokenizer's end-of-text token.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], max_new_tokens: int, more_ends: Sequence[int] = ()) -> None:
        self.tokenizer, self.stop, self.max_new_tokens = tokenizer, stop, max_new_tokens
        self.end_ids: list[int] = [tokenizer.eos_token_id, *more_ends]
        """The end-of-text token is the first."""
        # A stop string has at most as many tokens as bytes.
        longest = max((len(string.encode("utf-8", "surrogatepass")) for string in stop), default=0)
        self.tail_tokens = max(longest, MIN_STOP_SEARCH_TOKENS)
        self.last_characters = {string[-1] for string in stop}
        self._may_end: dict[int, bool] = {}

    def output(self, written: list[int]) -> Output | None:
        """The output, if its last token ends it; otherwise None.

        Args:
            written: the ids of an answer's tokens, at least one.
        """
        if written[-1] in self.end_ids:
            return Output(self._text(written[:-1]), len(written), "end")
        if self.stop and self._may_end_stop(written[-1]) and self._is_near_end(written):
            text = self._text(written)
            # An answer may start on a new line, so a stop string does not count among the blanks at its start.
            first = len(text) - len(text.lstrip())
            stops = [index for string in self.stop if (index := text.find(string, first)) >= 0]
            if stops:
                return Output(text[: min(stops)], len(written), "stop")
        if len(written) == self.max_new_tokens:
            return Output(self._text(written), len(written), "length")
        return None

    def first_output(self, tokens: Sequence[int]) -> Output:
        """The output of a program that may have written beyond the end of the answer.

        Raises:
            ValueError: the answer has no end, so the program stopped too early.
        """
        for count in range(1, len(tokens) + 1):
            if output := self.output(list(tokens[:count])):
                return output
        raise ValueError(f"an answer of {len(tokens)} tokens has no end")

    def _may_end_stop(self, token: int) -> bool:
        """Whether a stop string can end in this token: whether the token has the last character of one.

        Most tokens have not, so most answers are not decoded at most tokens.
        """
        if token not in self._may_end:
            text = self._text([token])
            # A blank at the start of a token may be lost if the token is decoded alone.
            self._may_end[token] = (
                " " in self.last_characters
                or PART_OF_A_CHARACTER in text
                or any(character in text for character in self.last_characters)
            )
        return self._may_end[token]

    def _is_near_end(self, written: list[int]) -> bool:
        """Whether a stop string is in the last tokens. To decode only these is faster than to decode all of them."""
        tail = self._text(written[-self.tail_tokens :])
        # Where tokens are single bytes, a tail that begins within a character spoils the whole characters after it too.
        return PART_OF_A_CHARACTER in tail or any(string in tail for string in self.stop)

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

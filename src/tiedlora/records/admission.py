"""What was measured of an arm of another method before its first step."""

from __future__ import annotations

from dataclasses import dataclass

from tiedlora.records.reading import Flag, Number

ROUNDING = 1e-3
"""The largest difference of logits, relative to the largest logit, that counts as rounding."""


@dataclass(frozen=True)
class Admission:
    """The checks of an arm on a few rows. Differences are the largest ones of any logit, relative to the largest logit
    of the base model.
    """

    start: Number
    """Between the base model and the arm before training."""
    moves: Flag
    """Whether one step of training changes a logit."""
    later_tokens: Number
    """At a position, when only tokens after it change."""
    other_rows: Number
    """In a row, when only the other rows of its batch change."""
    reload: Number
    """Between the arm and the arm that is read from its files."""

    @property
    def starts_at_base(self) -> bool:
        """Whether the arm computes as the base model before training."""
        return self.start <= ROUNDING

    @property
    def is_causal(self) -> bool:
        """Whether the logits at a position depend on that position and earlier ones only."""
        return self.later_tokens == 0

    @property
    def is_of_its_row(self) -> bool:
        """Whether the logits of a row do not depend on the other rows of its batch."""
        return self.other_rows == 0

    def marks(self) -> dict[str, str]:
        """What a reader of scores must know: a mark of a few words -> the sentence that explains it."""
        failed = {
            "off the base": (not self.starts_at_base, "starts off the base model"),
            "does not move": (not self.moves, "does not move at its first step"),
            "not causal": (not self.is_causal, "not causal: answers depend on later tokens"),
            "mixes rows": (not self.is_of_its_row, "answers depend on the other rows of a batch"),
            "not reloaded": (self.reload > ROUNDING, "computes otherwise after it is saved and loaded"),
        }
        return {mark: sentence for mark, (is_failed, sentence) in failed.items() if is_failed}

"""GSM8K: a word problem -> a rationale that ends in `#### number`.

The scores are those of lm-evaluation-harness (its gsm8k task, filters strict-match and flexible-extract). strict takes
the first number after `####`, and flexible the last number of the text. Numbers are compared as text, without commas,
dollar signs and a final point.
"""

from __future__ import annotations

import re

from typing_extensions import override

from tiedlora.tasks.base import Example, Score, Task
from tiedlora.tasks.rows import DataRow, RowError

STRICT = re.compile(r"#### (-?[0-9.,]+)")
FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


def normalise(number: str) -> str:
    """A number as text for comparison: without commas, dollar signs and a final point."""
    return re.sub(r"\.$", "", re.sub(r"[,$]", "", number.strip())).lower()


def strict_number(text: str) -> str | None:
    """The first number that follows `#### `."""
    match = STRICT.search(text)
    return match[1] if match else None


def flexible_number(text: str) -> str | None:
    """The last part of the text that looks like a number."""
    numbers = FLEXIBLE.findall(text)
    return numbers[-1] if numbers else None


class Gsm8k(Task):
    """GSM8K: a word problem becomes its steps and a number, scored by the number alone."""

    fields = {"question": str, "answer": str}
    metrics = ("exact_match_strict", "exact_match_flexible")

    @override
    def example(self, row: DataRow, id: str) -> Example:
        example = super().example(row, id)
        number = strict_number(row["answer"]) if re.search(STRICT.pattern + r"\s*$", row["answer"]) else None
        if number is None or not row["question"].strip():
            raise RowError("needs a question, and an answer that ends in '#### number'")
        return Example(id, example.prompt, example.target, (number,))

    @override
    def score(self, output: str, example: Example) -> dict[str, Score]:
        correct = normalise(example.references[0])
        numbers = (strict_number(output), flexible_number(output))
        return {
            name: float(number is not None and normalise(number) == correct)
            for name, number in zip(self.metrics, numbers, strict=True)
        }


TASK = Gsm8k

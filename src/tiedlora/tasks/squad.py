"""SQuAD v1.1: a passage and a question -> the answer, a piece of the passage.

The scores are those of the official script: exact match and token F1, after its normalisation (lower case, no
punctuation, no articles, single blanks). Each metric takes its best value over the reference answers.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from dataclasses import replace

from typing_extensions import override

from tiedlora.tasks.base import Example, Score, Task
from tiedlora.tasks.rows import DataRow, RowError

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """The answer in the normalised form that the official evaluation compares."""
    without_articles = re.sub(r"\b(?:a|an|the)\b", " ", text.lower().translate(_PUNCTUATION))
    return " ".join(without_articles.split())


def f1(output: str, reference: str) -> float:
    """The harmonic mean of precision and recall over the normalised words. Repeated words count.

    If both texts are empty after normalisation, it is 1, as in torchmetrics and in SQuAD 2.0's script. The script of
    SQuAD 1.1 gives 0.
    """
    output_words, reference_words = normalise(output).split(), normalise(reference).split()
    if not output_words and not reference_words:
        return 1.0
    shared = sum((Counter(output_words) & Counter(reference_words)).values())
    return 2 * shared / (len(output_words) + len(reference_words)) if shared else 0.0


class Squad(Task):
    """SQuAD: a question on a paragraph, scored by exact match and F1 against the best of its answers."""

    fields = {"id": str, "context": str, "question": str, "answers": dict}
    metrics = ("exact_match", "f1")
    shortens = "context"

    @override
    def example(self, row: DataRow, id: str) -> Example:
        texts, starts = row["answers"].get("text"), row["answers"].get("answer_start")
        if not _list_of(texts, str) or not _list_of(starts, int) or len(texts) != len(starts):
            raise RowError("the field 'answers' must hold the lists 'text' and 'answer_start', of equal length")
        if not texts or not all(text.strip() for text in texts):
            raise RowError("the target is empty: 'answers.text' needs at least one answer, and none empty")
        if not row["question"].strip():
            raise RowError("the field 'question' is empty")
        for text in texts:
            if text not in row["context"]:
                raise RowError(f"the answer {text!r} is not in the context")
        answer = texts[0].strip()
        example = super().example(row.with_fields(answer=answer), id)
        return replace(example, references=tuple(dict.fromkeys(texts)), must_hold=answer)

    @override
    def score(self, output: str, example: Example) -> dict[str, Score]:
        return {
            "exact_match": float(normalise(output) in map(normalise, example.references)),
            "f1": max(f1(output, reference) for reference in example.references),
        }


def _list_of(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


TASK = Squad

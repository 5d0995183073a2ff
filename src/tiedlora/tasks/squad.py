"""SQuAD v1.1: a passage and a question -> the answer, a piece of the passage.

The scores are those of the official script: exact match and token F1, after its normalisation (lower case, no
punctuation, no articles, single blanks). Each metric takes its best value over the reference answers.
"""

from __future__ import annotations

from dataclasses import replace

from typing_extensions import override

from tiedlora.tasks.base import Example, Score, Task
from tiedlora.tasks.metrics import exact_match, squad_form, token_f1
from tiedlora.tasks.rows import DataRow, RowError


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
            "exact_match": exact_match(output, example.references, squad_form),
            "f1": token_f1(output, example.references, squad_form),
        }


def _list_of(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


TASK = Squad

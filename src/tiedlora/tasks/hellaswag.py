"""HellaSwag: the start of a scene or an article -> the most likely of four endings.

Rows are read and scored as in lm-evaluation-harness (its task hellaswag, version 1.0). The log-likelihood of an ending
is the sum over its tokens. `accuracy` chooses the highest, and `accuracy_norm` the highest per character.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from typing_extensions import override

from tiedlora.config.schema import TaskConfig
from tiedlora.errors import UserError
from tiedlora.tasks.base import Example, Score, Task, render
from tiedlora.tasks.metrics import choice_accuracies
from tiedlora.tasks.rows import DataRow, RowError

ENDINGS = 4
MARK = re.compile(r"\[(?:header|title|step|substeps)\]")


def cleaned(text: str) -> str:
    """The text without what is in square brackets, such as WikiHow's `[header]`, as the harness cleans it."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


class HellaSwag(Task):
    """HellaSwag: which of four endings continues a text, chosen by the likelihoods of the endings."""

    fields = {
        "ind": int,
        "activity_label": str,
        "ctx_a": str,
        "ctx_b": str,
        "endings": list,
        "source_id": str,
        "label": str,
    }
    metrics = ("accuracy", "accuracy_norm")
    inputs_recur = True  # some contexts of the official training rows are also in the official validation rows

    def __init__(self, config: TaskConfig) -> None:
        super().__init__(config)
        if "{ending}" not in config.target:
            raise UserError(f"task.target={config.target!r}: must hold {{ending}}, which stands for each of the four")

    def row_id(self, row: DataRow, number: int) -> str:
        """The source and the index, such as `wikihow-60`, because rows of the two sources can have the same index."""
        return f"{str(row.fields.get('source_id')).split('~')[0]}-{row.fields.get('ind', number)}"

    @override
    def example(self, row: DataRow, id: str) -> Example:
        endings, label = row["endings"], row["label"]
        if len(endings) != ENDINGS or not all(isinstance(ending, str) and ending.strip() for ending in endings):
            raise RowError(f"the field 'endings' must hold {ENDINGS} texts, none empty")
        if label not in map(str, range(ENDINGS)):
            raise RowError(f"the label {label!r} is out of range: it must be one of '0' to '{ENDINGS - 1}'")
        # WikiHow rows on the hub always have marks. One without was cleaned before, and to clean it again would change
        # it: a blank that stayed where a mark was removed would be removed too.
        has_marks = any(MARK.search(text) for text in (row["ctx_a"], row["ctx_b"], *endings))
        clean = cleaned if has_marks or not row["source_id"].startswith("wikihow") else str
        # The harness capitalises ctx_b, so the prompt uses ctx_a and ctx_b, and not the field 'ctx'.
        row = row.with_fields(ctx_b=row["ctx_b"].capitalize())
        prompt = clean(render(self.config.prompt, row)).rstrip()
        choices = tuple(render(self.config.target, row.with_fields(ending=clean(ending))) for ending in endings)
        return Example(id, prompt, choices[int(label)], (label,), choices)

    def score(self, output: Sequence[float], example: Example) -> dict[str, Score]:
        """The scores of the four log-likelihoods. Of equal ones, the first is chosen."""
        # The length of an ending does not include what the template puts before it (a blank).
        start = self.config.target.index("{ending}")
        lengths = [len(choice) - start for choice in example.choices]
        accuracies = choice_accuracies(output, lengths, int(example.references[0]))
        return dict(zip(self.metrics, accuracies, strict=True))


TASK = HellaSwag

"""DialogSum: a dialogue -> its summary.

The scores are ROUGE-1, -2 and -L (F-measures of rouge-score). A test dialogue comes as several rows with one reference
each, whose ids differ after the last `_`. They are one example here, and each metric takes its maximum over the
references. Keys of task.options: `use_stemmer` turns on rouge-score's Porter stemmer.
"""

from __future__ import annotations

import re

from typing_extensions import override

from tiedlora.errors import UserError
from tiedlora.tasks.base import Example, Score, Task
from tiedlora.tasks.metrics import ROUGES, rouge, rouge_signature
from tiedlora.tasks.rows import DataRow, RowError

ONE_OF_SEVERAL = re.compile(r"(.+_\d+)_\d+")
"""test_7_2 is the second reference of test_7; dev_7 and train_7 have one reference each."""


class DialogSum(Task):
    """DialogSum: a dialogue becomes a summary, scored by ROUGE against all of its summaries."""

    fields = {"id": str, "dialogue": str, "summary": str}
    metrics = ROUGES
    shortens = "dialogue"
    options = ("use_stemmer",)

    @override
    def check_options(self) -> None:
        super().check_options()
        _ = self._use_stemmer

    @override
    def group_id(self, row_id: str) -> str:
        match = ONE_OF_SEVERAL.fullmatch(row_id)
        return match[1] if match else row_id

    @override
    def example(self, row: DataRow, id: str) -> Example:
        if not row["dialogue"].strip():
            raise RowError("the field 'dialogue' is empty")
        # A few summaries have several lines, and an answer ends at the first line feed.
        return super().example(row.with_fields(summary=" ".join(row["summary"].split())), id)

    @property
    def _use_stemmer(self) -> bool:
        stems = self.config.options.get("use_stemmer", False)
        if not isinstance(stems, bool):
            raise UserError(f"task.options.use_stemmer={stems}: choose true or false")
        return stems

    @override
    def score(self, output: str, example: Example) -> dict[str, Score]:
        return {**rouge(self.metrics, output, example.references, self._use_stemmer)}

    @override
    def signatures(self) -> dict[str, str]:
        return dict.fromkeys(self.metrics, rouge_signature(self._use_stemmer))


TASK = DialogSum

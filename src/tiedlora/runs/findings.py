"""What checks of a finished run pass on: the run with what was loaded to check it, and what each check found."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from tiedlora.config.schema import Config
from tiedlora.errors import UserError
from tiedlora.records.rows import PredictionRow, read_predictions
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.run_record import TEXTS, RunRecord
from tiedlora.tasks import Example, Task


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    check: str
    ok: bool | None
    """None if the check could not be made here."""
    explanation: str
    row_id: str | None = None
    """The id of the row that does not agree, if it is a single row."""
    by_rounding: bool = False
    """Whether outputs or losses differ from the recorded ones, but by no more than another device's rounding."""


@dataclass
class CheckedRun:
    """A run, and the data that were loaded to check it."""

    folder: RunFolder
    record: RunRecord
    config: Config
    task: Task
    examples: dict[str, list[Example]] = field(default_factory=dict)
    """Split -> its rows, if they can be read here."""

    def predictions(self, split: str, base: bool = False) -> list[PredictionRow]:
        """The rows of predictions/. Texts that a study has left out are taken from the data, by the rows' ids.

        Raises:
            UserError: the file is missing or damaged; or the texts are left out, and the rows cannot be read here.
        """
        if base:
            path = self.folder.base_predictions_file(split, self.record.scores[split].files)
        else:
            path = self.folder.predictions_file(split)
        rows = read_predictions(path)
        if self.record.keeps(TEXTS) or not any(row.has_answer for row in rows):
            return rows
        by_id = {example.id: example for example in self.examples.get(split, [])}
        if missing := [row.id for row in rows if row.id not in by_id]:
            raise UserError(f"row {missing[0]}: the study keeps no texts, and the row is not in the data here")
        return [_with_texts(row, by_id[row.id]) for row in rows]


def _with_texts(row: PredictionRow, example: Example) -> PredictionRow:
    texts = replace(row, prompt=example.prompt, references=list(example.references))
    if row.log_likelihoods is None:
        return texts
    best = max(range(len(row.log_likelihoods)), key=row.log_likelihoods.__getitem__)
    return replace(texts, choices=list(example.choices), output=example.choices[best])

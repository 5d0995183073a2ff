"""A finished run that is checked, and what a check finds.

A check compares values of result.json, by their keys, with what it finds elsewhere. So the values that nothing has
checked follow from the findings, and no list of them can be out of date.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tiedlora.config.schema import Config
from tiedlora.description import BaseModelRecord
from tiedlora.errors import UserError
from tiedlora.reading import is_number
from tiedlora.records.rows import PredictionRow, read_predictions
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.run_record import TEXTS, RunRecord
from tiedlora.tasks import Example, Task

CLOSE = 1e-9
"""A small tolerance is enough: numbers are computed in the same order from the same numbers, read from JSON."""


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    check: str
    ok: bool | None
    """None if the check could not be made here."""
    explanation: str
    by_rounding: bool = False
    """Whether outputs or losses differ from the recorded ones, but by no more than another device's rounding."""
    keys: frozenset[str] = frozenset()
    """The dotted keys of the values of result.json that were compared."""


@dataclass
class CheckedRun:
    """A run, and what was loaded to check it."""

    folder: RunFolder
    record: RunRecord
    recorded: dict[str, Any]
    """Every value of result.json by its dotted key."""
    config: Config
    task: Task
    examples: dict[str, list[Example]] = field(default_factory=dict)
    """Split -> its rows, if they can be read here."""
    base: BaseModelRecord | None = None
    """The base model that is here; None if it is not, or if only loading tells its digest."""
    elsewhere: bool = False
    """Whether this device may round otherwise than those that scored the split."""
    places: str = ""
    """Those devices, in words."""

    def predictions(self, split: str, base: bool = False) -> list[PredictionRow]:
        """The rows of predictions/. Texts that a study has left out are taken from the data, by the rows' ids.

        Raises:
            UserError: the file is missing or damaged; or the texts are left out, and the rows cannot be read here.
        """
        own, files = self.folder.predictions_file(split), self.record.scores[split].files
        rows = read_predictions(self.folder.base_predictions_file(split, files) if base else own)
        if self.record.keeps(TEXTS) or not any(row.has_answer for row in rows):
            return rows
        by_id = {example.id: example for example in self.examples.get(split, [])}
        if missing := [row.id for row in rows if row.id not in by_id]:
            raise UserError(f"row {missing[0]}: the study keeps no texts, and the row is not in the data here")
        return [_with_texts(row, by_id[row.id]) for row in rows]

    def beside_record(self, found: Mapping[str, object]) -> dict[str, tuple[object, object]]:
        """The values of result.json for `compared`.

        Args:
            found: dotted key -> what is found here. Only numbers that are no whole numbers may differ, by CLOSE.
        """
        return {key: (nearly(value, self.recorded.get(key)), self.recorded.get(key)) for key, value in found.items()}

    def unchecked(self, findings: Iterable[Finding]) -> Finding:
        """The values of result.json that no check has compared. A section without any other value stands for all."""
        checked = {key for finding in findings for key in finding.keys}
        rest = [key for key in self.recorded if key not in checked]
        names = dict.fromkeys(_outermost(key, checked) for key in rest)
        count = f"{len(rest)} of {len(self.recorded)} values of result.json are not checked"
        return Finding("result.json", None, f"{count}: {', '.join(names)}")


def _outermost(key: str, checked: Iterable[str]) -> str:
    """The largest section around the key that has no checked value, or the key itself."""
    words = key.split(".")
    sections = (".".join(words[:count]) for count in range(1, len(words)))
    return next((name for name in sections if not any(each.startswith(f"{name}.") for each in checked)), key)


def _with_texts(row: PredictionRow, example: Example) -> PredictionRow:
    texts = replace(row, prompt=example.prompt, references=list(example.references))
    if row.log_likelihoods is None:
        return texts
    best = max(range(len(row.log_likelihoods)), key=row.log_likelihoods.__getitem__)
    return replace(texts, choices=list(example.choices), output=example.choices[best])


def nearly(now: Any, then: Any, tolerance: float = CLOSE) -> Any:
    """`then` if `now` is a number with a fraction that differs by the tolerance at most; otherwise `now`."""
    are_numbers = isinstance(now, float) and is_number(then)
    return then if are_numbers and math.isclose(now, then, rel_tol=tolerance, abs_tol=tolerance) else now


def compared(check: str, values: Mapping[str, tuple[object, object]], agree: str) -> Finding:
    """Whether what is found here is what is recorded. What differs is named.

    Args:
        values: name -> (found, recorded). The name of a value of result.json is its dotted key.
        agree: the explanation if all are equal.
    """
    differing = {name: pair for name, pair in values.items() if pair[0] != pair[1]}
    wrong = [f"{name} is {found!r:.80}, recorded {recorded!r:.80}" for name, (found, recorded) in differing.items()]
    return Finding(check, not wrong, "; ".join(wrong[:5]) or agree, keys=frozenset(values))

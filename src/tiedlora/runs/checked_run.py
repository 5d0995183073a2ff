"""A finished run that is checked, and what a check finds.

A check compares values of records, by their keys, with what it finds elsewhere. So the values that nothing has checked
follow from the findings, and no list of them can be out of date. The records are result.json and the first line of each
file of scores.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tiedlora.config.schema import Config
from tiedlora.description import BaseModelRecord
from tiedlora.errors import UserError
from tiedlora.reading import is_number
from tiedlora.records.rows import PredictionRow
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.run_record import RunRecord
from tiedlora.records.scores import Kind, ScoreFile, ScoreRecord
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
    """The dotted keys of the recorded values that were compared."""


@dataclass(frozen=True)
class Scored:
    """A file of scores, of the run's adapter or of the base model."""

    split: str
    kind: Kind
    """What its name says that it holds."""
    file: ScoreFile
    base: ScoreFile | None
    """The base model's scores that the gain is over, as far as they are here. None if this file is the base model's."""
    is_base: bool

    @property
    def record(self) -> ScoreRecord:
        """The first line of its file."""
        return self.file.record

    @property
    def name(self) -> str:
        """What lines call it."""
        return f"{self.split}.{self.kind}{'.base' if self.is_base else ''}"

    @property
    def key(self) -> str:
        """What the keys of its first line begin with, among all recorded values."""
        return f"{'base' if self.is_base else 'scores'}/{self.split}.{self.kind}"


@dataclass
class CheckedRun:
    """A run, and what was loaded to check it."""

    folder: RunFolder
    record: RunRecord
    recorded: dict[str, Any]
    """Every value of result.json by its dotted key, and those of files of scores (Scored.key)."""
    config: Config
    task: Task
    examples: dict[str, list[Example]] = field(default_factory=dict)
    """Split -> its rows, if they can be read here."""
    base: BaseModelRecord | None = None
    """The base model that is here; None if it is not, or if only loading tells its digest."""
    scored: list[Scored] = field(default_factory=list)
    """The files of scores that can be read."""

    def rows(self, file: ScoreFile) -> list[PredictionRow]:
        """The rows of a file. Texts that a study has left out are taken from the data, by the rows' ids.

        Raises:
            UserError: the texts are left out, and the rows cannot be read here.
        """
        if self.record.keeps_texts or file.record.kind != "answers":
            return file.rows
        by_id = {example.id: example for example in self.examples.get(file.record.split, [])}
        if missing := [row.id for row in file.rows if row.id not in by_id]:
            raise UserError(f"row {missing[0]}: the study keeps no texts, and the row is not in the data here")
        return [_with_texts(row, by_id[row.id]) for row in file.rows]

    def beside_record(self, found: Mapping[str, object]) -> dict[str, tuple[object, object]]:
        """The recorded values for `compared`.

        Args:
            found: dotted key -> what is found here. Only numbers that are no whole numbers may differ, by CLOSE.
        """
        return {key: (nearly(value, self.recorded.get(key)), self.recorded.get(key)) for key, value in found.items()}

    def unchecked(self, findings: Iterable[Finding]) -> Iterator[Finding]:
        """The values that no check has compared. A section without any other value stands for all.

        Those of files of scores are in one finding, without the names of the files.
        """
        checked = {key for finding in findings for key in finding.keys}
        prefixes = tuple(f"{scored.key}." for scored in self.scored)
        of_scores = {key for key in self.recorded if key.startswith(prefixes)}
        for check, what, keys in (
            ("result.json", "result.json", self.recorded.keys() - of_scores),
            ("first lines", "the first lines of files of scores", of_scores),
        ):
            rest = [key for key in self.recorded if key in keys and key not in checked]
            names = (_outermost(key, checked) for key in rest)
            named = dict.fromkeys(re.sub(f"^({'|'.join(map(re.escape, prefixes))})", "", name) for name in names)
            count = f"{len(rest)} of {len(keys)} values of {what} are not checked"
            if rest:
                yield Finding(check, None, f"{count}: {', '.join(named)}")


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
        values: name -> (found, recorded). The name of a recorded value is its dotted key.
        agree: the explanation if all are equal.
    """
    differing = {name: pair for name, pair in values.items() if pair[0] != pair[1]}
    wrong = [f"{name} is {found!r:.80}, recorded {recorded!r:.80}" for name, (found, recorded) in differing.items()]
    return Finding(check, not wrong, "; ".join(wrong[:5]) or agree, keys=frozenset(values))

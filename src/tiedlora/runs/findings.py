"""What checks of a finished run pass on: the run with what was loaded to check it, and what each check found."""

from __future__ import annotations

from dataclasses import dataclass, field

from tiedlora.config.schema import Config
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.run_record import RunRecord
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


@dataclass
class CheckedRun:
    """A run, and the data that were loaded to check it."""

    folder: RunFolder
    record: RunRecord
    config: Config
    task: Task
    examples: dict[str, list[Example]] = field(default_factory=dict)
    """Split -> its rows, if they can be read here."""

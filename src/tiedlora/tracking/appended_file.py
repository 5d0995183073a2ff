"""A JSON Lines file whose rows belong to steps and are appended while a run trains."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from tiedlora import storage


class StepRow(Protocol):
    """A row of such a file."""

    @property
    def step(self) -> int:
        """The last finished step when the row was made."""

    def to_json(self) -> dict[str, Any]:
        """The JSON object of its line."""


Row = TypeVar("Row", bound=StepRow)


class AppendedFile(Generic[Row]):
    """The file of a run that starts, or that continues from a checkpoint."""

    def __init__(self, path: Path, read: Callable[[Path], list[Row]], step: int | None = None) -> None:
        """Keep only the rows up to the step of the checkpoint; without one, none. The run writes later rows again."""
        self.path = path
        self.rows = [] if step is None else [row for row in read(path) if row.step <= step]
        storage.write_json_lines(path, [row.to_json() for row in self.rows])

    def append(self, rows: Sequence[Row]) -> None:
        """Append the rows.

        Raises:
            OSError: the disk is full.
        """
        with storage.naming(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row.to_json()) + "\n" for row in rows))

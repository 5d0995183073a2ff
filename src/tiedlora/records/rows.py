"""The rows of a run's JSON Lines files: scores (scores.py), metrics.jsonl and validation_losses.jsonl."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from tiedlora import storage
from tiedlora.errors import UserError
from tiedlora.reading import Flag, StoredCount, StoredNumber, StoredText, is_number, typed

Score = StoredNumber | list[StoredNumber]
"""A number in [0, 1] (for a loss, nats per token), or the statistics of one row. A corpus-level metric comes from their
sum over rows."""


@dataclass(frozen=True)
class PredictionRow:
    """What a model did with one example, and its scores. Only a row of answers has an output."""

    id: StoredText
    prompt: StoredText
    """The prompt that the model got."""
    references: list[StoredText]
    scores: dict[StoredText, Score]
    shortened: Flag = False
    """Whether the prompt was shortened to fit."""
    output: StoredText = ""
    """The generated text, or the most likely of `choices`."""
    output_tokens: StoredCount = 0
    ended: StoredText = ""
    """How an answer ended: end (a token that ends), stop (stop string) or length; `choice` if texts were compared."""
    choices: list[StoredText] | None = None
    log_likelihoods: list[StoredNumber] | None = None
    """One for each of `choices`, in nats."""
    cut_target: Flag = False
    """Whether the loss leaves out the end of the target, because prompt and target do not fit into the context."""
    cluster: StoredText = ""
    """What the row belongs to together with others, such as an article (task.cluster); empty if it stands alone."""

    def to_json(self) -> dict[str, Any]:
        """The JSON object, with its keys in the file's order."""
        names = ["id", "prompt", "shortened", "references"]
        names += ["output", "output_tokens", "ended"] if self.ended else []
        names += ["choices", "log_likelihoods"] if self.choices is not None else []
        names += ["cut_target"] if self.cut_target else []
        names += ["cluster"] if self.cluster else []
        return {name: getattr(self, name) for name in [*names, "scores"]}


def row_line(row: PredictionRow) -> str:
    """The row as a line of a file."""
    return json.dumps(row.to_json(), ensure_ascii=False, allow_nan=False) + "\n"


def parsed_row(path: Path, number: int, line: bytes) -> PredictionRow:
    """The row of a line of a file.

    Raises:
        UserError: it is no row; the message names file and line.
    """
    try:
        row = typed(PredictionRow, storage.parse_json(line), "a row of scores")
        if row.log_likelihoods is not None and len(row.log_likelihoods) != len(row.choices or []):
            raise ValueError("'log_likelihoods' needs one number for each of 'choices'")
    except (ValueError, RecursionError, UserError) as error:
        raise UserError(f"{path}:{number}: is no row of scores ({error})") from None
    return row


@dataclass(frozen=True)
class MetricsRow:
    """The metrics that were logged at one step, such as `train/loss` or `validation/loss`, with their values."""

    step: int
    values: dict[str, float | int] = field(default_factory=dict)

    def to_json(self) -> dict[str, float | int]:
        """The line of metrics.jsonl."""
        return {"step": self.step, **self.values}


def read_metrics(path: Path, metric: str = "") -> list[MetricsRow]:
    """The rows of metrics.jsonl, without values that are not numbers; no rows if the file is missing.

    A line without a step or a number is left out. Such a line can be the last one, if the process was killed while it
    wrote the line.

    Args:
        metric: parse only lines that contain this name, which is quicker. By default all lines are parsed.

    Raises:
        UserError: the file exists and cannot be read.
    """
    rows = []
    for tree in _appended_objects(path, metric):
        step = tree.pop("step", None)
        values = {key: value for key, value in tree.items() if is_number(value)}
        if isinstance(step, int) and is_number(step) and values:
            rows.append(MetricsRow(step, values))
    return rows


@dataclass(frozen=True)
class ValidationLosses:
    """The loss of every validation row at one step of training."""

    step: StoredCount
    losses: list[StoredNumber]
    """Each row's mean cross-entropy per target token, in nats, in the order of the validation rows."""
    tokens: list[StoredCount]
    """Each row's number of target tokens."""

    def to_json(self) -> dict[str, Any]:
        """The line of validation_losses.jsonl."""
        return asdict(self)


def read_validation_losses(path: Path) -> list[ValidationLosses]:
    """The rows of validation_losses.jsonl, one for each evaluation; no rows if the file is missing.

    A line that is not a row is left out, as in `read_metrics`.

    Raises:
        UserError: the file exists and cannot be read.
    """
    rows = []
    for tree in _appended_objects(path):
        try:
            row = typed(ValidationLosses, tree)
        except UserError:
            continue
        if len(row.losses) == len(row.tokens) and sum(row.tokens) > 0:
            rows.append(row)
    return rows


def _appended_objects(path: Path, text: str = "") -> Iterator[dict[str, Any]]:
    """The JSON objects of a file whose lines are appended; none if it is missing. Other lines are left out.

    Args:
        text: parse only lines that contain this text.
    """
    for line in storage.read_bytes(path).splitlines() if path.exists() else []:
        if text.encode() not in line:
            continue
        try:
            tree = storage.parse_json(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(tree, dict):
            yield tree


Row = TypeVar("Row", MetricsRow, ValidationLosses)


class AppendedFile(Generic[Row]):
    """A file of a run whose rows belong to steps, such as metrics.jsonl. Training appends to it."""

    def __init__(self, path: Path, read: Callable[[Path], list[Row]], step: int | None = None) -> None:
        """Keep the rows up to `step`, the checkpoint's; without one, none. The run writes later rows again."""
        self.path = path
        self.rows: list[Row] = [] if step is None else [row for row in read(path) if row.step <= step]
        storage.write_json_lines(path, [row.to_json() for row in self.rows])

    def append(self, rows: Sequence[Row]) -> None:
        """Append the rows.

        Raises:
            OSError: the disk is full. The run then ends, because the file is its record.
        """
        with storage.naming(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row.to_json()) + "\n" for row in rows))
            file.flush()
            # A checkpoint that comes next must not survive a power failure without its rows.
            os.fsync(file.fileno())

"""A run's answers as a table for a tracker: the first rows of a split, bounded in number and length."""

from __future__ import annotations

from collections.abc import Iterator

from tiedlora.errors import UserError
from tiedlora.records.rows import PredictionRow, read_predictions
from tiedlora.records.run_folder import RunFolder
from tiedlora.text import visible_lines
from tiedlora.tracking.base import Cell, TextTable

LONGEST_TEXT = 2000
"""Most characters of a prompt, a reference or an answer."""
SPLITS = ("test", "validation")
"""The split that is shown is the first of these that was scored."""


def answers_table(folder: RunFolder, most: int) -> TextTable | None:
    """Prompt, references, the base model's answer, the adapted model's, and its scores; None without answers.

    Args:
        most: the most rows.
    """
    for split in SPLITS:
        try:
            rows = read_predictions(folder.predictions_file(split))
        except UserError:
            continue
        rows = [row for row in rows if row.has_answer]
        if not rows:
            continue
        base = _base_answers(folder, split)
        metrics = [name for name, score in rows[0].scores.items() if not isinstance(score, list)]
        columns = ("split", "row", "prompt", "references", *(("base",) if base else ()), "answer", *metrics)
        return TextTable(columns, [tuple(_cells(split, row, base, metrics)) for row in rows[:most]])
    return None


def _base_answers(folder: RunFolder, split: str) -> dict[str, str]:
    """Row id -> the base model's answer."""
    try:
        rows = read_predictions(folder.predictions_file(f"{split}.base"))
    except UserError:
        return {}
    return {row.id: row.output for row in rows if row.has_answer}


def _cells(split: str, row: PredictionRow, base: dict[str, str], metrics: list[str]) -> Iterator[Cell]:
    yield from (split, short(row.id), short(row.prompt), short(" | ".join(row.references)))
    if base:
        yield short(base.get(row.id, ""))
    yield short(row.output)
    for metric in metrics:
        score = row.scores.get(metric)
        yield None if score is None or isinstance(score, list) else score


def short(text: str) -> str:
    """A text of a model without control characters, cut where it is too long for a table."""
    return visible_lines(text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} ...")

"""The answers browser: what every chosen run answered to every row, packed for the page.

A sheet holds the rows of one setting on one split. Its data are base64 of gzip of JSON, in an index and in blocks of
texts. The index alone (which runs gave the same answer, and all scores) is enough to filter and count; the page unpacks
texts as it needs them. Equal answers to a row are stored once, and the answers to a row lie side by side, where gzip
finds what they share.

Answers are hostile text. They are data here and stay data on the page, whose script only ever sets `textContent`.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tiedlora.analysis.compare import BASELINE
from tiedlora.analysis.groups import RunGroup
from tiedlora.analysis.runs import Run
from tiedlora.errors import UserError
from tiedlora.records.loss_metrics import is_loss
from tiedlora.records.rows import PredictionRow
from tiedlora.text import visible, visible_lines

BLOCK = 250
"""Rows of a block of texts."""
LONGEST = 20_000
"""The most characters of one text. predictions/ has the rest."""
MOST_BYTES = 12_000_000
"""The most bytes of all answers on the page."""
BASE = "base"
METHOD = "TABuv"
"""The configuration that the page compares with LoRA when it opens."""


@dataclass(frozen=True)
class Sheet:
    """One setting's answers on one split."""

    key: str
    """Names the sheet in links. It does not change when other runs join the report."""
    title: str
    head: dict[str, Any]
    """What the page needs before it unpacks anything: runs, metrics, number of rows."""
    index: str
    texts: list[str]
    """Blocks of BLOCK rows."""

    @property
    def size(self) -> int:
        """Its bytes on the page."""
        return len(self.index) + sum(map(len, self.texts)) + 100 * len(self.texts)


@dataclass
class _Column:
    """The answers of one run."""

    name: str
    id: str
    group: RunGroup | None = None
    """None for the base model."""
    seed: int = 0
    which: list[int] = field(default_factory=list)
    """For each row, the number of its answer among the row's different answers; -1 without an answer."""
    scores: dict[str, list[float | None]] = field(default_factory=dict)


def sheets(groups: Iterable[RunGroup], splits: dict[RunGroup, str], most_bytes: int = MOST_BYTES) -> list[Sheet]:
    """A sheet for each setting whose chosen runs have predictions.

    Args:
        splits: group -> the split that the report shows.
        most_bytes: of all sheets. Each has an equal part, and a larger one leaves out the runs of the highest seeds.
    """
    of_setting: dict[tuple[str, str], list[RunGroup]] = defaultdict(list)
    for group in groups:
        if group in splits:
            of_setting[group.setting, splits[group]].append(group)
    found, most = [], most_bytes // max(1, len(of_setting))
    for (_, split), own in of_setting.items():
        seeds = sorted({run.seed for group in own for run in group.runs})
        sheet = _sheet(own, split, seeds)
        while sheet is not None and sheet.size > most and len(seeds) > 1:
            seeds = seeds[: max(1, int(len(seeds) * most / sheet.size))]
            sheet = _sheet(own, split, seeds)
        if sheet is not None:
            found.append(sheet)
    return found


def _sheet(groups: Sequence[RunGroup], split: str, seeds: Sequence[int]) -> Sheet | None:
    runs = [(group, run) for group in groups for run in group.runs if split in run.splits]
    left_out = [f"{_name(group, run)}: the page would be too large" for group, run in runs if run.seed not in seeds]
    runs = [(group, run) for group, run in runs if run.seed in seeds]
    rows = _Rows()
    base = next((run for _, run in runs if run.splits[split].base), None)
    if base is not None and (problem := rows.add(_Column(BASE, BASE), base, split, base=True)):
        left_out.append(f"base: {problem}")
    for group, run in runs:
        column = _Column(_name(group, run), run.run_id[-10:], group, run.seed)
        if problem := rows.add(column, run, split):
            left_out.append(f"{column.name}: {problem}")
    if not any(column.group for column in rows.columns):
        return None
    group = groups[0]
    setting = hashlib.sha256(f"{group.setting}{split}".encode()).hexdigest()[:6]
    key = re.sub(r"[^A-Za-z0-9_.]+", "-", f"{group.task}.{group.model}.{split}")[:60] + f".{setting}"
    return rows.sheet(key, visible(f"{group.task_in_words}, {group.model}"), split, list(map(visible, left_out)))


def _name(group: RunGroup, run: Run) -> str:
    return visible(f"{group.name} · seed {run.seed}")


class _Rows:
    """The rows of a sheet, to which the columns are added one after the other, so that one file is open at a time."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.prompts: list[str] = []
        self.references: list[list[str]] = []
        self.answers: list[list[str]] = []
        self.columns: list[_Column] = []
        self._numbers: list[dict[str, int]] = []

    def add(self, column: _Column, run: Run, split: str, base: bool = False) -> str:
        """Add a run's predictions. Returns why they cannot be shown; empty if they are."""
        try:
            rows = run.rows(split, base)
        except UserError as error:
            return str(error)
        ids = [visible(row.id) for row in rows]
        if self.ids and ids != self.ids:
            return "its predictions are of other rows"
        if not self.ids:
            self.ids = ids
            self.answers, self._numbers = [[] for _ in rows], [{} for _ in rows]
        if not any(self.prompts):
            # A record that was exported without prompts has empty ones; another run may have them.
            self.prompts = [shortened(row.prompt) for row in rows]
            self.references = [[shortened(reference) for reference in row.references] for row in rows]
        column.which = [self._number(place, row) for place, row in enumerate(rows)]
        for metric in run.splits[split].metrics:
            scores = [_score(row, metric) for row in rows]
            if any(score is not None for score in scores):
                column.scores[metric] = scores
        self.columns.append(column)
        return ""

    def _number(self, place: int, row: PredictionRow) -> int:
        if not row.has_answer:
            return -1
        text = shortened(row.output)
        # Texts that differ only beyond the part that is shown still differ.
        numbers, key = self._numbers[place], row.output
        if key not in numbers:
            numbers[key] = len(numbers)
            self.answers[place].append(text)
        return numbers[key]

    def sheet(self, key: str, title: str, split: str, left_out: list[str]) -> Sheet:
        """The packed sheet."""
        metrics = list(dict.fromkeys(name for column in self.columns for name in column.scores))
        head = {
            "key": key,
            "title": title,
            "split": split,
            "rows": len(self.ids),
            "block": BLOCK,
            "runs": [
                {"name": c.name, "id": c.id, "marks": list(map(visible, c.group.short_marks)) if c.group else []}
                for c in self.columns
            ],
            "metrics": [{"name": visible(name), "sign": -1 if is_loss(name) else 1} for name in metrics],
            "pair": _pair(self.columns),
            "leftOut": left_out,
        }
        index = {
            "ids": self.ids,
            "which": [column.which for column in self.columns],
            "scores": [[column.scores.get(name) for column in self.columns] for name in metrics],
        }
        parts: dict[str, list[Any]] = {"prompts": self.prompts, "references": self.references, "answers": self.answers}
        texts = [
            packed({name: rows[start : start + BLOCK] for name, rows in parts.items()})
            for start in range(0, len(self.ids), BLOCK)
        ]
        return Sheet(key, title, head, packed(index), texts)


def _score(row: PredictionRow, metric: str) -> float | None:
    """One row's score; None without one. The statistics of a corpus metric say nothing about one row."""
    score = row.scores.get(metric)
    return None if score is None or isinstance(score, list) else round(float(score), 4)


def _pair(columns: Sequence[_Column]) -> list[int]:
    """The two columns that are compared at first: LoRA and TABuv at one rank and seed, or else the first two runs."""
    own = [(place, column.group, column.seed) for place, column in enumerate(columns) if column.group]
    pairs = [
        (lora.rank != tied.rank, seed != other_seed, first, second)
        for first, lora, seed in own
        for second, tied, other_seed in own
        if lora.label == BASELINE and tied.label == METHOD
    ]
    if pairs:
        return list(min(pairs)[2:])
    return [0, len(columns) - 1] if len(columns) < 3 else [1, 2]


def packed(value: Any) -> str:
    """JSON, compressed and in letters that a page may hold. Equal values give equal bytes."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode("utf-8", "replace"), 6, mtime=0)).decode()


def shortened(text: str) -> str:
    """The text with visible control characters, and at most LONGEST characters."""
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]} … ({len(text) - LONGEST:,} more characters in predictions/)"
    return visible_lines(text)

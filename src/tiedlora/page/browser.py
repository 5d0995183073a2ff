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
from dataclasses import dataclass
from typing import Any, NamedTuple

from tiedlora.analysis.groups import RunGroup
from tiedlora.analysis.results import ResultRow
from tiedlora.analysis.runs import Run
from tiedlora.errors import UserError
from tiedlora.records.loss_metrics import is_loss
from tiedlora.records.rows import PredictionRow
from tiedlora.text import shortened, visible, without_folders

BLOCK = 250
"""Rows of a block of texts."""
LONGEST = 20_000
"""The most characters of one text. scores/ has the rest."""
MOST_BYTES = 12_000_000
"""The most bytes of all answers on the page."""


@dataclass(frozen=True)
class Sheet:
    """One setting's answers on one split."""

    head: dict[str, Any]
    """What the page needs before it unpacks anything. Its key names the sheet in links, and does not change when other
    runs join the report."""
    index: str
    texts: list[str]
    """Blocks of BLOCK rows."""


class First(NamedTuple):
    """What a reader sees first."""

    metrics: set[str]
    """Those that the report shows."""
    pairs: Sequence[tuple[RunGroup, RunGroup]]
    """Two arms that may be compared; the first pair that a sheet has is taken."""


class _Column(NamedTuple):
    """The answers of one run."""

    head: dict[str, Any]
    """Its name, the end of its id, and its marks."""
    group: RunGroup | None
    """None for the base model."""
    seed: int
    outputs: list[str | None]
    """One for each row; None where no answer was generated."""
    scores: dict[str, list[float | None]]


def sheets(
    rows: Iterable[ResultRow], pairs: Sequence[tuple[RunGroup, RunGroup]] = (), most_bytes: int = MOST_BYTES
) -> list[Sheet]:
    """A sheet for each setting whose chosen runs have scores of rows, those with answers first.

    Args:
        pairs: two arms that may be compared at first; the first pair that a sheet has is taken.
        most_bytes: of all sheets. Each has an equal part, and a larger one leaves out each arm's highest seeds.
    """
    of_setting: dict[tuple[str, str], dict[RunGroup, None]] = defaultdict(dict)
    primary: dict[tuple[str, str], set[str]] = defaultdict(set)
    for row in rows:
        place = row.group.setting, row.measure.split
        of_setting[place][row.group] = None
        primary[place].update([row.measure.metric] if row.primary else [])
    found = []
    for place, own in of_setting.items():
        seeds = max(len(group.runs) for group in own)
        found.append(_sheet(list(own), place[1], seeds, First(primary[place], pairs), most_bytes // len(of_setting)))
    return sorted((sheet for sheet in found if sheet is not None), key=lambda sheet: not sheet.head["answers"])


def _sheet(
    groups: Sequence[RunGroup],
    split: str,
    seeds: int,
    first: First,
    most_bytes: int,
) -> Sheet | None:
    """The sheet of so many seeds of each arm, or of as many as fit; None if no run's answers can be shown."""
    scored = {group: [run for run in group.runs if run.scores.of(split)] for group in groups}
    left_out = [
        f"{group.name} · seed {run.seed}: the page would be too large"
        for group, runs in scored.items()
        for run in runs[seeds:]
    ]
    asked, columns = _columns([(group, run) for group, runs in scored.items() for run in runs[:seeds]], split, left_out)
    if not any(column.group for column in columns):
        return None
    metrics: list[str] = []
    for column in columns:
        for name, own in column.scores.items():
            # A metric without a score of a row, such as BLEU, is not offered.
            if name not in metrics and any(score is not None for score in own):
                metrics.append(name)
    has_answers = any(output is not None for column in columns for output in column.outputs)
    # What the report shows comes first, but a loss says nothing about an answer.
    metrics.sort(key=lambda name: (has_answers and is_loss(name), name not in first.metrics))
    answers, which = [], []
    for outputs in zip(*(column.outputs for column in columns), strict=True):
        # Whole texts are compared: those that differ only beyond the part that is shown still differ.
        different = dict.fromkeys(output for output in outputs if output is not None)
        numbers = {output: number for number, output in enumerate(different)}
        answers.append([shortened(text, LONGEST) for text in different])
        which.append([-1 if output is None else numbers[output] for output in outputs])
    about, setting = groups[0], hashlib.sha256(f"{groups[0].setting}{split}".encode()).hexdigest()[:6]
    head: dict[str, Any] = {
        "key": re.sub(r"[^A-Za-z0-9_.]+", "-", f"{about.task}.{about.model}.{split}")[:60] + f".{setting}",
        "title": visible(f"{about.task_in_words}, {about.model}"),
        "split": split,
        "rows": len(asked),
        "block": BLOCK,
        "runs": [column.head for column in columns],
        "metrics": [{"name": visible(name), "sign": -1 if is_loss(name) else 1} for name in metrics],
        "answers": has_answers,
        "pair": _pair(columns, first.pairs),
        "leftOut": list(map(visible, left_out)),
    }
    index = {
        "ids": [visible(row.id) for row in asked],
        # A list for each run.
        "which": list(zip(*which, strict=True)),
        "scores": [[column.scores.get(name) for column in columns] for name in metrics],
    }
    rows: dict[str, list[Any]] = {
        "prompts": [shortened(row.prompt, LONGEST) for row in asked],
        "references": [[shortened(text, LONGEST) for text in row.references] for row in asked],
        "answers": answers,
    }
    texts = [
        packed({name: of_rows[start : start + BLOCK] for name, of_rows in rows.items()})
        for start in range(0, len(asked), BLOCK)
    ]
    sheet = Sheet(head, packed(index), texts)
    size = len(sheet.index) + sum(len(block) + 100 for block in texts)
    if size > most_bytes and seeds > 1:
        return _sheet(groups, split, max(1, int(seeds * most_bytes / size)), first, most_bytes)
    return sheet


def _columns(
    runs: Sequence[tuple[RunGroup, Run]], split: str, left_out: list[str]
) -> tuple[list[PredictionRow], list[_Column]]:
    """The rows that were asked, and what the base and each run answered. `left_out` gets what cannot be shown."""
    of_base = [run for _, run in runs if run.scores.base_metrics(split)]

    def richness(run: Run) -> tuple[bool, int]:
        # Some runs may have scored the losses alone.
        kinds = [record.kind for record in run.scores.of(split, base=True)]
        return "answers" in kinds, len(kinds)

    richest = max(of_base, key=richness, default=None)
    base: list[tuple[RunGroup | None, Run]] = [(None, richest)] if richest is not None else []
    asked: list[PredictionRow] = []
    columns: list[_Column] = []
    for group, run in [*base, *runs]:
        head: dict[str, Any] = {"name": "base", "id": "base", "marks": []}
        if group is not None:
            head = {
                "name": visible(f"{group.name} · seed {run.seed}"),
                "id": run.run_id[-10:],
                "marks": list(map(visible, group.short_marks)),
            }
        try:
            # Their rows are the same, in the same order. The first kind has the answers, if there are any.
            scored = run.scores.of(split, base=group is None)
            rows, *others = [run.rows(split, record.kind, base=group is None) for record in scored]
        except UserError as error:
            left_out.append(without_folders(f"{head['name']}: {error}"))
            continue
        if columns and [row.id for row in rows] != [row.id for row in asked]:
            left_out.append(f"{head['name']}: its answers are of other rows")
            continue
        # A record that was exported without prompts has empty ones; another run may have them.
        if not any(row.prompt for row in asked):
            asked = rows
        outputs = [row.output if row.ended else None for row in rows]
        scores = {}
        for record, own in zip(scored, (rows, *others), strict=True):
            for metric in record.metrics:
                scores[metric] = [_score(row, metric) for row in own]
        columns.append(_Column(head, group, run.seed, outputs, scores))
    return asked, columns


def _score(row: PredictionRow, metric: str) -> float | None:
    """One row's score; None without one. The statistics of a corpus metric say nothing about one row."""
    score = row.scores.get(metric)
    return None if score is None or isinstance(score, list) else round(float(score), 4)


def _pair(columns: Sequence[_Column], pairs: Sequence[tuple[RunGroup, RunGroup]]) -> list[int]:
    """The two columns that are compared at first: the arms of the first pair that is here, with one seed if they share
    one. An arm alone is compared with the base model, never with another seed of its own.
    """
    of_arm: dict[tuple[str, str], dict[int, int]] = defaultdict(dict)
    for place, column in enumerate(columns):
        if column.group is not None:
            of_arm[column.group.setting, column.group.name].setdefault(column.seed, place)
    arms = list(of_arm.values())
    named = [tuple(of_arm.get((group.setting, group.name), {}) for group in pair) for pair in pairs]
    first, second = next((pair for pair in named if all(pair) and pair[0] is not pair[1]), (arms[0], arms[-1]))
    if first is second:
        return [0 if columns[0].group is None else min(first.values()), min(first.values())]
    seed = min(first.keys() & second.keys(), default=None)
    return [min(own.values()) if seed is None else own[seed] for own in (first, second)]


def packed(value: Any) -> str:
    """JSON, compressed and in letters that a page may hold. Equal values give equal bytes."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode("utf-8", "replace"), 6, mtime=0)).decode()

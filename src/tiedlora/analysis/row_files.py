"""Scores of rows in files: of another program (JSON Lines), of lm-evaluation-harness (--log_samples), or of a run.

A line is one row: an object with an `id`, or the `doc_hash` of the harness, and with its scores. These are the numbers
that `metrics` names (the harness), those in an object `scores`, or else every number of the row.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tiedlora import storage
from tiedlora.analysis.runs import RowScores
from tiedlora.errors import UserError
from tiedlora.reading import is_number, read_typed
from tiedlora.records.scores import read_scores
from tiedlora.text import visible

SAMPLES = re.compile(r"samples_(?P<task>.+)_(?P<time>\d{4}-\d\d-\d\dT[\d.-]+)\.jsonl")
"""The files of lm-evaluation-harness. results_<time>.json beside them says which metrics are better if lower."""
NO_SCORES = ("id", "doc_id")
"""Numbers of a row that are no scores."""
ADVICE = 'a row is such as {"id": 1, "correct": 1}'
LONGEST_LIST = 8
"""Most fields that a message names."""


@dataclass(frozen=True)
class HarnessResults:
    """What is needed of results_<time>.json."""

    higher_is_better: dict[str, dict[str, bool]] = field(default_factory=dict)
    """Task -> metric -> its direction."""


@dataclass(frozen=True, eq=False)
class RowFile:
    """The scores of a file's rows. `unreadable` says why a metric has no number of each row."""

    path: Path
    task: str
    """Empty if the file does not say it."""
    rows: RowScores
    says_metrics: bool
    """Whether the rows say which of their numbers are scores; the first metric is then the one that counts."""
    lower: frozenset[str] = frozenset()
    """The metrics that are better if lower, as far as the file says it."""
    notes: tuple[str, ...] = ()
    cluster_of: Mapping[str, str] = field(default_factory=dict)
    """The id of a row -> its cluster, for the rows that name one."""


@dataclass(frozen=True)
class _Row:
    line: int
    id: str
    doc_id: str
    filter: str
    """The harness writes each row once for each filter of answers. Otherwise it is empty."""
    scores: Mapping[str, Any]
    says_metrics: bool
    cluster: str


def read_samples(folder: Path, cluster: str | None = None) -> list[RowFile]:
    """The newest samples of each task in an --output_path of lm-evaluation-harness, or in its model's folder.

    Raises:
        UserError: several models are there; or as `read_row_file`.
    """
    paths = list(folder.glob("samples_*.jsonl")) or list(folder.glob("*/samples_*.jsonl"))
    found = [(match, path) for path in paths if (match := SAMPLES.fullmatch(path.name))]
    if len(models := sorted({path.parent.name for _, path in found})) > 1:
        raise UserError(f"{folder}: has the outputs of {', '.join(models)}; give the folder of one of them")
    of_task: dict[str, list[tuple[str, Path]]] = {}
    for match, path in found:
        of_task.setdefault(match["task"], []).append((match["time"], path))
    files = []
    for task in sorted(of_task):
        (_, newest), *others = sorted(of_task[task], reverse=True)
        note = f"{newest.parent}: the newest of {len(others) + 1} outputs of {task} counts ({newest.name})"
        files.append(read_row_file(newest, cluster, notes=(note,) if others else ()))
    return files


def read_row_file(path: Path, cluster: str | None = None, notes: tuple[str, ...] = ()) -> RowFile:
    """The scores of a file's rows.

    Args:
        cluster: the field of a row, or of the harness' `doc`, that names what rows belong together.

    Raises:
        UserError: the file has no rows; a line is no row, or has an id that is there already; or it lacks the field
            `cluster`. The message names the line.
    """
    rows = list(_of_this_project(path, cluster) or _parsed(path, cluster))
    if not rows:
        raise UserError(f"{path}: has no rows; {ADVICE}")
    filters: dict[str, dict[str, _Row]] = {}
    # Some data sets have a document twice, which its place in the data tells apart.
    often = Counter((row.filter, row.id) for row in rows)
    for row in rows:
        name = f"{row.id}/{row.doc_id}" if row.doc_id and often[row.filter, row.id] > 1 else row.id
        before = filters.setdefault(row.filter, {}).setdefault(name, row)
        if before is not row:
            raise UserError(f"{path}:{row.line}: the id {_shown(name)} is there twice (also in line {before.line})")
    ids = list(next(iter(filters.values())))
    if other := next((name for name, own in filters.items() if own.keys() != set(ids)), None):
        raise UserError(f"{path}: the rows of the filter {other!r} are not those of the others; write it again")
    values: dict[str, np.ndarray[Any, Any]] = {}
    unreadable: dict[str, str] = {}
    for filter_name, own in filters.items():
        ordered = [own[name] for name in ids]
        for metric in dict.fromkeys(metric for row in ordered for metric in row.scores):
            name = f"{metric},{filter_name}" if len(filters) > 1 else metric
            if wrong := next((row for row in ordered if not _is_score(row.scores.get(metric))), None):
                what = "no number" if metric in wrong.scores else "missing"
                unreadable[name] = f"{path}:{wrong.line}: {name} is {what}, and a comparison needs one of every row"
            else:
                values[name] = np.array([row.scores[metric] for row in ordered], dtype=np.float64)
    first = list(next(iter(filters.values())).values())
    match = SAMPLES.fullmatch(path.name)
    task = match["task"] if match else ""
    return RowFile(
        path,
        task,
        RowScores.of(ids, values, unreadable, [row.cluster for row in first]),
        all(row.says_metrics for row in rows),
        _lower(path, task, match["time"], values) if match else frozenset(),
        notes,
        {name: row.cluster for name, row in zip(ids, first, strict=True) if row.cluster},
    )


def _lower(path: Path, task: str, time: str, metrics: Mapping[str, Any]) -> frozenset[str]:
    results = path.with_name(f"results_{time}.json")
    if not results.is_file():
        return frozenset()
    higher = read_typed(results, HarnessResults, "the results of lm-evaluation-harness").higher_is_better.get(task, {})
    return frozenset(metric for metric in metrics if not higher.get(metric.split(",")[0], True))


def _of_this_project(path: Path, cluster: str | None) -> list[_Row] | None:
    """The rows of a file of scores of a run; None if it is another file."""
    if b'"rows_sha256"' not in storage.first_line(path):
        return None
    if cluster is not None:
        raise UserError(f"--cluster {cluster}: {path} is of a run, which names the clusters itself; leave it out")
    rows = read_scores(path).rows
    return [_Row(line, row.id, "", "", row.scores, True, row.cluster) for line, row in enumerate(rows, start=2)]


def _parsed(path: Path, cluster: str | None) -> Iterator[_Row]:
    for number, line in enumerate(storage.read_bytes(path).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            tree = storage.parse_json(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: is no JSON ({error}); each line is one row: {ADVICE}") from None
        if not isinstance(tree, dict):
            raise UserError(f"{where}: is no JSON object; {ADVICE}")
        name = tree.get("id", tree.get("doc_hash"))
        if isinstance(name, bool) or not isinstance(name, (str, int)):
            raise UserError(f"{where}: has neither an id nor a doc_hash, which is a text or a whole number; {ADVICE}")
        says_metrics, scores = _scores(tree, cluster)
        if not scores:
            has = ", ".join(
                f"{_shown(name)}: {visible(str(value)):.40}" for name, value in list(tree.items())[:LONGEST_LIST]
            )
            raise UserError(f"{where}: has no score, a finite number, true or false ({has}); {ADVICE}")
        doc_id = str(tree.get("doc_id", "")) if "id" not in tree else ""
        own_filter = tree.get("filter") if says_metrics else None
        cluster_name = "" if cluster is None else _cluster(where, tree, cluster)
        yield _Row(number, str(name), doc_id, str(own_filter or ""), scores, says_metrics, cluster_name)


def _scores(tree: Mapping[str, Any], cluster: str | None) -> tuple[bool, dict[str, Any]]:
    """Whether the row says which of its values are scores, and these."""
    if isinstance(names := tree.get("metrics"), list):
        return True, {str(name): tree.get(str(name)) for name in names}
    if isinstance(scores := tree.get("scores"), dict):
        return True, scores
    return False, {key: value for key, value in tree.items() if _is_score(value) and key not in (*NO_SCORES, cluster)}


def _is_score(value: object) -> bool:
    return isinstance(value, bool) or is_number(value)


def _cluster(where: str, tree: Mapping[str, Any], name: str) -> str:
    fields = {**doc, **tree} if isinstance(doc := tree.get("doc"), dict) else tree
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        what = "is neither a text nor a whole number in" if name in fields else "is no field of"
        raise UserError(f"--cluster {name}: {what} {where}, which has {listed(fields)}")
    return str(value)


def listed(names: Sequence[str] | Mapping[str, Any]) -> str:
    """Some names, for a message."""
    shown = list(names)
    more = f" and {len(shown) - LONGEST_LIST} more" if len(shown) > LONGEST_LIST else ""
    return ", ".join(map(_shown, shown[:LONGEST_LIST])) + more if shown else "none"


def _shown(name: str) -> str:
    return visible(name if len(name) <= 60 else f"{name[:57]}...")

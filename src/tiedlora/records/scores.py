"""The scores of a run: one file for each thing that is scored, written once. Only `score.py --again` replaces
one, and another text of `score.forgetting`.

    RUN/scores/<split>.<kind>.jsonl    of the run's adapter
    OUTPUTS/base/<name>.jsonl          of the base model alone, shared by all runs that ask it the same

The first line says what was scored, where, and the metrics (`ScoreRecord`). Each other line is one row. A score that
does not exist is a file that does not exist. Reading needs neither torch nor Hydra.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field

from tiedlora import storage
from tiedlora.config.schema import FORGETTING, SCORED_SPLITS
from tiedlora.description import DESCRIPTION
from tiedlora.errors import UserError
from tiedlora.reading import Flag, StoredCount, StoredName, StoredNumber, StoredText, plain, typed
from tiedlora.records.interval import Interval
from tiedlora.records.loss_metrics import DRIFT, is_loss
from tiedlora.records.provenance import CodeVersion, Execution
from tiedlora.records.rows import PredictionRow, parsed_row, row_line
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.run_record import RunRecord, Sha256

Kind = Literal["answers", "losses", "drift"]
"""What is asked of a model: answers, which the task scores; the losses of the targets; how far it is from its base."""
KINDS: tuple[Kind, ...] = get_args(Kind)
StoredSplit = Annotated[StoredText, Field(pattern=f"^({'|'.join((*SCORED_SPLITS, FORGETTING))})$")]
BaseName = Annotated[StoredText, Field(pattern=r"^([A-Za-z0-9_][A-Za-z0-9._-]{0,400})?$")]
Metrics = dict[StoredName, Interval]
"""Metric -> its value with its interval: within [-1, 1], or in nats if the metric is a loss."""
ADAPTER = f"adapter/{DESCRIPTION}"
"""The file of a run whose sha256 its scores name."""
WHAT = "the scores of a run of this project"


def kind_of(metric: str) -> Kind:
    """The kind of scores that has this metric."""
    return "drift" if metric == DRIFT else "losses" if is_loss(metric) else "answers"


@dataclass(frozen=True)
class ScoreRecord:
    """The first line of a file of scores. All scores are fractions of 1, BLEU and chrF too. Only losses are in nats."""

    run_id: StoredText
    """The run whose adapter was scored; empty for the base model alone."""
    adapter: StoredText
    """The sha256 of that run's adapter.json, which has the sha256 of the tensors; empty for the base model alone."""
    split: StoredSplit
    kind: Kind
    digest: StoredText
    """sha256 of the examples' content (tasks.digest)."""
    rows: Annotated[StoredCount, Field(gt=0)]
    metrics: Annotated[Metrics, Field(min_length=1)]
    base: BaseName
    """The file's name in OUTPUTS/base that has the base model's scores of these rows, if they were scored: the name
    follows from what they depend on. Empty for a drift, which is a distance from the base model already."""
    gain: Metrics
    """Metric -> adapted minus base, paired on the rows; empty if the base model was not scored. For a loss, a negative
    gain is an improvement."""
    seconds: StoredNumber
    batch_halvings: StoredCount
    """How often score.batch_size and score.batch_tokens were halved, because memory ran out."""
    shortened: StoredCount
    """Rows whose prompt was shortened to fit."""
    output_tokens: StoredCount
    """Of all answers together."""
    cut_targets: StoredCount
    """Rows whose loss leaves out the end of the target, which does not fit into the context."""
    has_targets: Flag
    """Whether every row has a target. Otherwise the rows have no losses."""
    source: StoredText
    """Where the rows come from, if they are passages of neutral text (the value of score.forgetting); else empty."""
    source_digest: StoredText
    """The sha256 of that text file, or empty."""
    signatures: dict[StoredText, StoredText]
    """Metric -> the implementation and settings that computed it, if its name does not say enough."""
    code: CodeVersion
    versions: dict[str, str]
    """Package -> installed version."""
    execution: Execution
    """Where it was scored."""
    rows_sha256: Sha256
    """Of the lines after the first."""

    def is_of(self, trained: RunRecord) -> bool:
        """Whether they are scores of this run's adapter."""
        return self.run_id == trained.run_id and self.adapter == trained.files.get(ADAPTER, self.adapter)


@dataclass(frozen=True)
class ScoreFile:
    """A file of scores as a whole."""

    record: ScoreRecord
    rows: list[PredictionRow]


@dataclass(frozen=True)
class RunScores:
    """The records of everything that is scored of a run."""

    adapted: dict[tuple[str, Kind], ScoreRecord]
    base: dict[tuple[str, Kind], ScoreRecord]
    """Those of the base model on the same rows, as far as they are there."""

    @property
    def splits(self) -> list[str]:
        """The splits that have any score, validation first."""
        return list(dict.fromkeys(split for split, _ in self.adapted))

    def of(self, split: str, base: bool = False) -> list[ScoreRecord]:
        """What is scored of a split, answers first; with `base`, that of the base model."""
        records = self.base if base else self.adapted
        return [record for (name, _), record in records.items() if name == split]

    def metrics(self, split: str) -> Metrics:
        """Metric -> its value with its interval: those of answers first, then losses, then drift."""
        return {name: interval for record in self.of(split) for name, interval in record.metrics.items()}

    def base_metrics(self, split: str) -> Metrics:
        """As `metrics`, of the base model."""
        return {name: interval for record in self.of(split, base=True) for name, interval in record.metrics.items()}

    def gains(self, split: str) -> Metrics:
        """Metric -> adapted minus base, where the base model was scored."""
        return {name: interval for record in self.of(split) for name, interval in record.gain.items()}

    def first_metric(self, split: str) -> str | None:
        """The metric that comparisons use; None if nothing is scored of the split."""
        return next(iter(self.metrics(split)), None)


@dataclass(frozen=True)
class Finished:
    """A finished run: its training and what is scored of it."""

    record: RunRecord
    scores: RunScores


def read_finished(folder: RunFolder) -> Finished | None:
    """A finished run; None if it is not finished.

    Raises:
        UserError: result.json or a file of scores is damaged.
    """
    record = folder.record()
    return None if record is None else Finished(record, read_run_scores(folder, record))


def write_scores(
    path: Path, record: ScoreRecord, rows: Sequence[PredictionRow], *, compressed: bool = False
) -> ScoreRecord:
    """Write a file of scores, completely or not at all. Returns the record with the sha256 of its rows.

    Args:
        compressed: whether to write path.gz.

    Raises:
        OSError: the disk is full, or there is no permission.
    """
    lines = "".join(map(row_line, rows)).encode()
    record = replace(record, rows_sha256=hashlib.sha256(lines).hexdigest())
    head = json.dumps(plain(record), ensure_ascii=False, allow_nan=False) + "\n"
    write = storage.write_compressed if compressed else storage.write_bytes
    write(path, head.encode() + lines)
    return record


def read_scores(path: Path) -> ScoreFile:
    """A file of scores, or path.gz if only this is there.

    Raises:
        UserError: the file is missing or damaged; the message names it and the line.
    """
    head, _, lines = storage.read_content(path).partition(b"\n")
    record = _parsed(path, head)
    if (found := hashlib.sha256(lines).hexdigest()) != record.rows_sha256:
        raise UserError(f"{path}: its rows have the sha256 {found}, recorded {record.rows_sha256}; restore the file")
    rows = [parsed_row(path, number, line) for number, line in enumerate(lines.splitlines(), start=2)]
    if len(rows) != record.rows:
        raise UserError(f"{path}: has {len(rows)} rows, recorded {record.rows}; restore the file")
    return ScoreFile(record, rows)


def read_score_record(path: Path) -> ScoreRecord:
    """The first line of a file of scores. The rows are neither read nor checked.

    Raises:
        UserError: as `read_scores`.
    """
    return _parsed(path, storage.first_line(path))


def read_run_scores(folder: RunFolder, trained: RunRecord | None = None) -> RunScores:
    """The records of a run's scores, in the order of splits and kinds.

    Args:
        trained: the run's own record, where it is known. Then the scores must be those of its adapter.

    Raises:
        UserError: a file is damaged, or its first line is that of another split, kind, run or adapter.
    """
    adapted: dict[tuple[str, Kind], ScoreRecord] = {}
    base: dict[tuple[str, Kind], ScoreRecord] = {}
    for split in (*SCORED_SPLITS, FORGETTING):
        for kind in KINDS:
            path = folder.scores_file(split, kind)
            if not storage.is_here(path):
                continue
            adapted[split, kind] = record = read_score_record(path)
            if (record.split, record.kind) != (split, kind):
                raise UserError(f"{path}: holds {record.kind} of {record.split}; restore the file")
            if trained and not record.is_of(trained):
                raise UserError(
                    f"{path}: holds the scores of another adapter (of {record.run_id!r:.120}); restore the file, or "
                    "remove it and score the run again"
                )
            base_file = folder.base_scores_file(record.base)
            if record.base and storage.is_here(base_file):
                base[split, kind] = read_score_record(base_file)
    return RunScores(adapted, base)


def _parsed(path: Path, line: bytes) -> ScoreRecord:
    try:
        record = typed(ScoreRecord, storage.parse_json(line), WHAT)
    except (ValueError, RecursionError, UserError) as error:
        raise UserError(f"{path}:1: is not the record of scores ({error}); restore the file") from None
    if record.gain and not record.base:
        raise UserError(f"{path}:1: has a gain over a base model that it does not name; restore the file")
    for key, intervals in (("metrics", record.metrics), ("gain", record.gain)):
        for metric, interval in intervals.items():
            if kind_of(metric) != record.kind:
                raise UserError(f"{path}:1: '{key}.{metric}' is no metric of {record.kind}")
            if not is_loss(metric) and max(map(abs, (interval.value, interval.low, interval.high))) > 1 + 1e-9:
                raise UserError(f"{path}:1: '{key}.{metric}' is no value with an interval within [-1, 1]")
    return record

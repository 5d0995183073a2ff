"""Score one split with the adapted model and with the base model."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from tiedlora.adapter import Attached
from tiedlora.config.identity import identity
from tiedlora.config.schema import Config
from tiedlora.data.encoding import Encoder
from tiedlora.errors import UserError
from tiedlora.records.rows import PredictionRow, read_predictions, write_predictions
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.run_record import BaseModelRecord, SplitScores, plain
from tiedlora.scoring.predict import predict
from tiedlora.scoring.summary import gains, summarise
from tiedlora.tasks import Example, Task, digest

log = logging.getLogger(__name__)

PROTOCOL_KEYS = {
    *("kind", "version", "prompt", "chat_template", "stop", "max_new_tokens", "max_prompt_tokens", "options"),
}
"""The keys of a task that decide what a model is asked and how its answer is scored."""


@dataclass(frozen=True)
class Scorer:
    """Scores splits of one run, with the adapted model and with the base model."""

    attached: Attached
    encoder: Encoder
    task: Task
    config: Config
    base: BaseModelRecord
    """The base model under `attached`."""

    def score_split(self, split: str, examples: Sequence[Example], folder: RunFolder) -> SplitScores:
        """Score the adapted model, and the base model if score.base is true, and write predictions/.

        Raises:
            UserError: as predict.predict.
            OSError: predictions/ cannot be written.
        """
        base_rows = None
        if self.config.score.base:
            base_rows = self.cached_base_rows(split, examples)
            write_predictions(folder.predictions_file(f"{split}.base"), base_rows)
        started = time.perf_counter()
        rows = self.adapted_rows(examples, f"adapted model on {split}")
        seconds = time.perf_counter() - started
        write_predictions(folder.predictions_file(split), rows)
        return SplitScores(
            rows=len(examples),
            digest=digest(examples),
            seconds=seconds,
            shortened=sum(row.shortened for row in rows),
            output_tokens=sum(row.output_tokens for row in rows),
            metrics=summarise(rows, self.task),
            base=None if base_rows is None else summarise(base_rows, self.task),
            gain=None if base_rows is None else gains(rows, base_rows, self.task),
            signatures=self.task.signatures() or None,
            files=folder.prediction_checksums(split),
        )

    def adapted_rows(self, examples: Sequence[Example], title: str) -> list[PredictionRow]:
        """The adapted model's rows. `title` is the text of the progress bar."""
        with merged_for_scoring(self.attached, self.config) as model:
            return predict(model, self.encoder, self.task, examples, self.config, title)

    def compute_base_rows(self, examples: Sequence[Example], title: str) -> list[PredictionRow]:
        """The base model's rows, computed now. `title` is what the progress bar says."""
        self.attached.disable()
        try:
            return predict(self.attached.model, self.encoder, self.task, examples, self.config, title)
        finally:
            self.attached.enable()

    def cached_base_rows(self, split: str, examples: Sequence[Example]) -> list[PredictionRow]:
        """The base model's rows, computed once for each model, protocol and rows, and then reused by every run.

        Raises:
            UserError: as predict.predict; or the file of an earlier run has the predictions of other rows.
        """
        path = Path(self.config.outputs) / "base" / f"{self.config.task.name}-{split}-{self._base_key(examples)}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if path.exists():
                log.info("base model on %s: reusing %s", split, path)
                rows = read_predictions(path)
                if [row.id for row in rows] != [example.id for example in examples]:
                    raise UserError(
                        f"{path}: holds the predictions of other rows; remove it, and the same command makes it"
                    )
                return rows
            rows = self.compute_base_rows(examples, f"base model on {split}")
            write_predictions(path, rows)
            return rows

    def _base_key(self, examples: Sequence[Example]) -> str:
        """A hash of everything that the base model's rows depend on."""
        score, task = self.config.score, identity(self.config.task)
        key: list[Any] = [plain(self.base), self.config.train.dtype, score.batch_size, self.encoder.prompt_limit]
        key += [digest(examples), *([score.batch_tokens] if score.batch_tokens else [])]
        key.append({name: value for name, value in task.items() if name in PROTOCOL_KEYS})
        return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]


@contextmanager
def merged_for_scoring(attached: Attached, config: Config) -> Iterator[Any]:
    """Inside the block, the model is as it is scored. It is merged in float32 only: bfloat16 would round the update. A
    quantised or offloaded base cannot be merged, and is scored unmerged.
    """
    if config.train.dtype == "float32" and attached.cannot_merge() is None:
        attached.merge()
    try:
        yield attached.model
    finally:
        attached.unmerge()

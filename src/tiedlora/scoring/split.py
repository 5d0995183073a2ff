"""Score one split, or neutral text, with the adapted model and with the base model."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from tiedlora import storage
from tiedlora.adapter.arms import Arm
from tiedlora.config.identity import identity
from tiedlora.config.schema import FORGETTING, Config
from tiedlora.data.encoding import Encoder
from tiedlora.errors import UserError, is_out_of_memory
from tiedlora.models.device import free_memory
from tiedlora.records.loss_metrics import is_loss
from tiedlora.records.rows import PredictionRow, read_predictions, write_predictions
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.run_record import BaseModelRecord, SplitScores, plain
from tiedlora.scoring.passages import read_passages, source_digest
from tiedlora.scoring.passes import ALL_PASSES, Passes
from tiedlora.scoring.predict import predict, predict_losses
from tiedlora.scoring.summary import gains, summarise
from tiedlora.tasks import Example, Task, digest
from tiedlora.training.distributed import ALONE, World

log = logging.getLogger(__name__)

T = TypeVar("T")
Rows = list[PredictionRow]

PROTOCOL_KEYS = {
    *("kind", "version", "prompt", "chat_template", "stop", "max_new_tokens", "max_prompt_tokens", "options"),
}
"""The keys of a task that decide what a model is asked and how its answer is scored."""


@dataclass(frozen=True)
class Scorer:
    """Scores splits of one run, with the adapted model and with the base model."""

    attached: Arm
    encoder: Encoder
    task: Task
    config: Config
    base: BaseModelRecord
    """The base model under `attached`."""
    world: World = ALONE
    """The processes that score together. Each scores some of the batches, and gets the rows of all."""

    def score_split(
        self,
        split: str,
        examples: Sequence[Example],
        folder: RunFolder,
        passes: Passes = ALL_PASSES,
        recorded: SplitScores | None = None,
        halvings: int = 0,
    ) -> SplitScores:
        """Score the adapted model, and the base model if score.base is true, and write predictions/.

        If memory runs out, the split is scored again from its start, in halved batches: the adapted model and the base
        model in the same ones, because rounding depends on them. Little work is lost, because the longest rows come
        first.

        Args:
            passes: what to compute.
            recorded: the split's scores so far. They stay, unless `passes` gives the same metrics again, and the base
                model is scored if they have its scores.
            halvings: how often the batches are halved already, by an earlier scoring of the same split.

        Raises:
            UserError: as predict and predict_losses; a row has no target although its loss was asked for; `recorded`
                is of other rows; or memory runs out with a single row.
            OSError: predictions/ cannot be written.
        """
        passes = _possible(passes, examples)
        if recorded is not None and recorded.digest != digest(examples):
            raise UserError(
                f"{folder.path}: its {split} was scored on other rows (sha256 {recorded.digest[:12]}, now "
                f"{digest(examples)[:12]}); restore them, or score every metric of the split again"
            )
        scores, times = self.within_memory(
            lambda smaller: smaller._score_split(split, examples, folder, passes, recorded), halvings
        )
        return replace(scores, batch_halvings=times or None)

    def score_forgetting(self, source: str, folder: RunFolder) -> SplitScores:
        """The losses of neutral text, with the adapter and without it, scored as a split without answers.

        Args:
            source: as score.forgetting.

        Raises:
            UserError: the text cannot be read; or as score_split.
        """
        passages = read_passages(source, self.encoder, self.config.data_root)
        scores = self.score_split(FORGETTING, passages, folder, Passes(answers=False))
        return replace(scores, source=source, source_digest=source_digest(source))

    def within_memory(self, score: Callable[[Scorer], T], halvings: int = 0) -> tuple[T, int]:
        """What `score` returns, and how often the batches were halved until it had enough memory.

        Args:
            score: gets the scorer, with smaller batches from call to call.
            halvings: as score_split.

        Raises:
            UserError: memory runs out with a single row.
        """
        for times in itertools.count(halvings):
            smaller = replace(self, config=with_halved_batches(self.config, times))
            batch_size = smaller.config.score.batch_size
            try:
                return score(smaller), times
            except (MemoryError, RuntimeError, OSError) as error:
                if not is_out_of_memory(error):
                    raise
            free_memory()
            if batch_size == 1:
                break
            log.warning("scoring: out of memory; score.batch_size=%d is halved to %d", batch_size, batch_size // 2)
        raise UserError(
            "scoring: out of memory with score.batch_size=1; the trained adapter and its checkpoint are kept, so with "
            "more memory the same command continues with scoring"
        )

    def _score_split(
        self,
        split: str,
        examples: Sequence[Example],
        folder: RunFolder,
        passes: Passes,
        recorded: SplitScores | None,
    ) -> SplitScores:
        # The passes as values of `losses`: answers first.
        kinds = [*([False] if passes.answers else []), *([True] if passes.losses else [])]
        base_rows = None
        if self.config.score.base if recorded is None else recorded.base is not None:
            base_parts = [self.cached_base(split, examples, losses) for losses in kinds]
            base_rows = _write(folder.predictions_file(f"{split}.base"), base_parts, recorded)
        parts, seconds = [], {}
        for losses in kinds:
            started = time.perf_counter()
            title = f"adapted model's loss on {split}" if losses else f"adapted model on {split}"
            parts.append(self.rows(examples, title, losses=losses))
            seconds[losses] = time.perf_counter() - started
        rows = _write(folder.predictions_file(split), parts, recorded)
        return _with_recorded(
            SplitScores(
                rows=len(examples),
                digest=digest(examples),
                seconds=seconds.get(False, 0.0),
                loss_seconds=seconds.get(True),
                shortened=sum(row.shortened for row in rows),
                output_tokens=sum(row.output_tokens for row in rows),
                cut_targets=sum(row.cut_target for row in rows) or None,
                metrics=summarise(rows, self.task),
                base=None if base_rows is None else summarise(base_rows, self.task),
                gain=None if base_rows is None else gains(rows, base_rows, self.task),
                signatures=self.task.signatures() or None if passes.answers else None,
                files=folder.prediction_checksums(split),
            ),
            passes,
            recorded,
        )

    def rows(self, examples: Sequence[Example], title: str, *, losses: bool, base: bool = False) -> Rows:
        """The answers of the adapted model, or of the base model, computed now.

        Args:
            title: the text of the progress bar.
            losses: the losses of the targets instead, as rows without answers.
        """
        with disabled(self.attached) if base else merged_for_scoring(self.attached, self.config) as model:
            if losses:
                return predict_losses(model, self.encoder, examples, self.config, title, self.world)
            return predict(model, self.encoder, self.task, examples, self.config, title, self.world)

    def cached_base(self, split: str, examples: Sequence[Example], losses: bool) -> Rows:
        """The base model's rows, computed once for each model, protocol and rows, and then reused by every run.

        Answers and losses have files of their own.

        Raises:
            UserError: as `rows`; or the file of an earlier run has the predictions of other rows.
        """
        title = f"base model's loss on {split}" if losses else f"base model on {split}"
        path, first = self._base_file(split, examples, losses), self.world.is_first
        if first:
            path.parent.mkdir(parents=True, exist_ok=True)
        # The first process decides, and reads and writes the file.
        with storage.locked(path.with_suffix(".lock")) if first else nullcontext():
            if not self.world.any(first and path.exists()):
                rows = self.rows(examples, title, losses=losses, base=True)
                if first:
                    write_predictions(path, rows)
                return rows
            log.info("%s: reusing %s", title, path)
            rows = self.world.gather(read_predictions(path) if first else [])[0]
            if [row.id for row in rows] != [example.id for example in examples]:
                raise UserError(
                    f"{path}: holds the predictions of other rows; remove it, and the same command makes it"
                )
            return rows

    def _base_file(self, split: str, examples: Sequence[Example], losses: bool) -> Path:
        """A file whose name has a hash of everything that the base model's rows depend on."""
        score, encoder, task = self.config.score, self.encoder, self.config.task
        key: list[Any] = [plain(self.base), self.config.train.dtype, score.batch_size]
        # Neutral text depends on no task.
        of_task = split != FORGETTING
        if of_task:
            key += [encoder.prompt_limit, *encoder.versions.values()]
        if encoder.more_ends and not losses:
            key += [list(encoder.more_ends)]
        key += [digest(examples), *([score.batch_tokens] if score.batch_tokens else [])]
        # The end of a target that is cut depends on the context.
        key += [encoder.context] if losses else []
        if of_task:
            key += [{name: value for name, value in identity(task).items() if name in PROTOCOL_KEYS}]
        words = [*([task.name] if of_task else []), split, *(["loss"] if losses else [])]
        words.append(hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12])
        return Path(self.config.outputs) / "base" / f"{'-'.join(words)}.jsonl"


def with_halved_batches(config: Config, times: int) -> Config:
    """The configuration with score.batch_size and score.batch_tokens halved so many times; neither is below 1."""
    score = config.score
    tokens = None if score.batch_tokens is None else max(1, score.batch_tokens >> times)
    return replace(config, score=replace(score, batch_size=max(1, score.batch_size >> times), batch_tokens=tokens))


def _possible(passes: Passes, examples: Sequence[Example]) -> Passes:
    """The passes, without losses if a row has no target.

    Raises:
        UserError: the losses were asked for by name.
    """
    without = next((example.id for example in examples if not example.target.strip()), None)
    if without is None or not passes.losses:
        return passes
    if passes.needs_targets:
        raise UserError(f"score.metrics: row {without} has no target, so these rows have no loss; name other metrics")
    log.info("row %s has no target, so the losses of these rows are not scored", without)
    return replace(passes, losses=False)


def _write(path: Path, parts: list[Rows], recorded: SplitScores | None) -> Rows:
    """Write the rows of a predictions file: those that are there if the split is recorded, and the new scores.

    Raises:
        UserError: the present file is missing, damaged, or has other rows.
        OSError: the file cannot be written.
    """
    if recorded is not None:
        present = read_predictions(path)
        if [row.id for row in present] != [row.id for row in parts[0]]:
            raise UserError(f"{path}: has other rows than its split; score every metric of the split again")
        parts = [present, *parts]
    rows = [_merged(same) for same in zip(*parts, strict=True)]
    write_predictions(path, rows)
    return rows


def _merged(parts: Sequence[PredictionRow]) -> PredictionRow:
    """One example's row with the scores of all parts, losses last. A later part replaces an earlier one."""
    answer = next((row for row in reversed(parts) if row.has_answer), parts[-1])
    loss = next((row for row in reversed(parts) if any(map(is_loss, row.scores))), parts[-1])
    scores = {name: score for row in parts for name, score in row.scores.items()}
    in_order = dict(sorted(scores.items(), key=lambda item: is_loss(item[0])))
    return replace(answer, scores=in_order, cut_target=loss.cut_target)


def _with_recorded(new: SplitScores, passes: Passes, recorded: SplitScores | None) -> SplitScores:
    """The new scores, with the recorded numbers of what `passes` did not compute: they stay as they were written."""
    if recorded is None:
        return new

    def merged(now: Any, before: Any) -> Any:
        if now is None or before is None:
            return now
        return {
            name: before[name] if name in before and not (passes.losses if is_loss(name) else passes.answers) else value
            for name, value in now.items()
        }

    return replace(
        new,
        metrics=merged(new.metrics, recorded.metrics),
        base=merged(new.base, recorded.base),
        gain=merged(new.gain, recorded.gain),
        seconds=new.seconds if passes.answers else recorded.seconds,
        loss_seconds=new.loss_seconds if passes.losses else recorded.loss_seconds,
        signatures=new.signatures if passes.answers else recorded.signatures,
    )


@contextmanager
def merged_for_scoring(attached: Arm, config: Config) -> Iterator[Any]:
    """Inside the block, the model is as it is scored. It is merged in float32 only: bfloat16 would round the update. A
    quantised or offloaded base cannot be merged, and is scored unmerged.
    """
    try:
        # Inside the block that restores the weights: memory may run out when some of them are merged.
        if config.train.dtype == "float32" and attached.cannot_merge() is None:
            attached.merge()
        with attached.folded_once():
            yield attached.model
    finally:
        attached.unmerge()


@contextmanager
def disabled(attached: Arm) -> Iterator[Any]:
    """Inside the block, the model computes as the base model."""
    attached.disable()
    try:
        yield attached.model
    finally:
        attached.enable()

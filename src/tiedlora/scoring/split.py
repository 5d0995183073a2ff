"""Score one split with the adapted model and with the base model."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tiedlora import storage
from tiedlora.adapter import Attached
from tiedlora.adapter.arms import Arm
from tiedlora.config.identity import identity
from tiedlora.config.schema import FORGETTING, Config
from tiedlora.data.encoding import Encoder
from tiedlora.errors import UserError
from tiedlora.records.loss_metrics import is_loss
from tiedlora.records.rows import PredictionRow, read_predictions, write_predictions
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.run_record import BaseModelRecord, EngineRecord, SplitScores, plain
from tiedlora.scoring.engines import OURS, agreement, compared_places, engine
from tiedlora.scoring.passes import ALL_PASSES, Passes
from tiedlora.scoring.predict import predict, scoring_batches
from tiedlora.scoring.sharing import score_in_shares
from tiedlora.scoring.summary import gains, summarise
from tiedlora.scoring.target_losses import loss_batches, predict_losses
from tiedlora.tasks import Example, Task, digest
from tiedlora.training.distributed import World

log = logging.getLogger(__name__)

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
    world: World = field(default_factory=World)
    """The processes that score together. Each scores some of the batches, and gets the rows of all."""

    def score_split(
        self,
        split: str,
        examples: Sequence[Example],
        folder: RunFolder,
        passes: Passes = ALL_PASSES,
        recorded: SplitScores | None = None,
    ) -> SplitScores:
        """Score the adapted model, and the base model if score.base is true, and write predictions/.

        Args:
            passes: what to compute.
            recorded: the split's scores so far. They stay, unless `passes` gives the same metrics again, and the base
                model is scored if they have its scores.

        Raises:
            UserError: as predict and predict_losses; a row has no target although its loss was asked for; or `recorded`
                is of other rows.
            OSError: predictions/ cannot be written.
        """
        passes = _possible(passes, examples)
        if recorded is not None and recorded.digest != digest(examples):
            raise UserError(
                f"{folder.path}: its {split} was scored on other rows (sha256 {recorded.digest[:12]}, now "
                f"{digest(examples)[:12]}); restore them, or score every metric of the split again"
            )
        base_rows = None
        if self.config.score.base if recorded is None else recorded.base is not None:
            base_parts = [
                *([self.cached_base_rows(split, examples)] if passes.answers else []),
                *([self.cached_base_losses(split, examples)] if passes.losses else []),
            ]
            base_rows = _write(folder.predictions_file(f"{split}.base"), base_parts, recorded)
        timed = [
            *([_timed(self.adapted_rows, examples, f"adapted model on {split}")] if passes.answers else []),
            *([_timed(self.adapted_losses, examples, f"adapted model's loss on {split}")] if passes.losses else []),
        ]
        rows = _write(folder.predictions_file(split), [part for part, _ in timed], recorded)
        seconds = [seconds for _, seconds in timed]
        return _with_recorded(
            SplitScores(
                rows=len(examples),
                digest=digest(examples),
                seconds=seconds[0] if passes.answers else 0.0,
                loss_seconds=seconds[-1] if passes.losses else None,
                shortened=sum(row.shortened for row in rows),
                output_tokens=sum(row.output_tokens for row in rows),
                engine=self._agreement(examples, rows) if passes.answers else None,
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

    def _agreement(self, examples: Sequence[Example], rows: Sequence[PredictionRow]) -> EngineRecord | None:
        """How the answers of another engine compare with ours, on some rows; None if they are ours."""
        score = self.config.score
        if score.engine == OURS or rows[0].choices is not None:
            return None
        places = compared_places(len(rows))
        ourselves = replace(self, config=replace(self.config, score=replace(score, engine=OURS)))
        own = ourselves.adapted_rows([examples[place] for place in places], "comparing with our answers")
        return agreement(score.engine, [rows[place] for place in places], own)

    def adapted_rows(self, examples: Sequence[Example], title: str) -> list[PredictionRow]:
        """The adapted model's answers. `title` is the text of the progress bar."""
        with merged_for_scoring(self.attached, self.config) as model:
            return self._answers(model, examples, title, active=True)

    def adapted_losses(self, examples: Sequence[Example], title: str) -> list[PredictionRow]:
        """The adapted model's losses, as rows without answers."""
        with merged_for_scoring(self.attached, self.config) as model:
            return self._losses(model, examples, title)

    def compute_base_rows(self, examples: Sequence[Example], title: str) -> list[PredictionRow]:
        """The base model's answers, computed now. `title` is what the progress bar says."""
        with disabled(self.attached) as model:
            return self._answers(model, examples, title, active=False)

    def compute_base_losses(self, examples: Sequence[Example], title: str) -> list[PredictionRow]:
        """The base model's losses, computed now."""
        with disabled(self.attached) as model:
            return self._losses(model, examples, title)

    def _answers(self, model: Any, examples: Sequence[Example], title: str, active: bool) -> list[PredictionRow]:
        adapter = self.attached.adapter if isinstance(self.attached, Attached) else None
        answering = engine(self.config.score.engine, adapter, active)

        def rows_of(some: Sequence[Example]) -> list[PredictionRow]:
            return predict(model, self.encoder, self.task, some, self.config, title, answering)

        if self.world.size == 1:
            return rows_of(examples)
        batches = scoring_batches(self.encoder, examples, self.config)
        return score_in_shares(self.world, model, examples, batches, rows_of)

    def _losses(self, model: Any, examples: Sequence[Example], title: str) -> list[PredictionRow]:
        def rows_of(some: Sequence[Example]) -> list[PredictionRow]:
            return predict_losses(model, self.encoder, some, self.config, title)

        if self.world.size == 1:
            return rows_of(examples)
        batches = loss_batches(self.encoder, examples, self.config)
        return score_in_shares(self.world, model, examples, batches, rows_of)

    def cached_base_rows(self, split: str, examples: Sequence[Example]) -> list[PredictionRow]:
        """The base model's answers, computed once for each model, protocol and rows, and then reused by every run.

        Raises:
            UserError: as predict.predict; or the file of an earlier run has the predictions of other rows.
        """
        name = f"{self.config.task.name}-{split}-{self._base_key(examples)}"
        return self._cached(name, examples, self.compute_base_rows, f"base model on {split}")

    def cached_base_losses(self, split: str, examples: Sequence[Example]) -> list[PredictionRow]:
        """The base model's losses, in a cache of their own: answers of earlier versions stay usable."""
        # The end of a target that is cut depends on the context. Neutral text depends on no task.
        task = f"{self.config.task.name}-" if split != FORGETTING else ""
        name = f"{task}{split}-loss-{self._base_key(examples, self.encoder.context, with_task=bool(task))}"
        return self._cached(name, examples, self.compute_base_losses, f"base model's loss on {split}")

    def _cached(
        self,
        name: str,
        examples: Sequence[Example],
        compute: Callable[[Sequence[Example], str], list[PredictionRow]],
        title: str,
    ) -> list[PredictionRow]:
        path, first = Path(self.config.outputs) / "base" / f"{name}.jsonl", self.world.is_first
        if first:
            path.parent.mkdir(parents=True, exist_ok=True)
        # The first process decides, and reads and writes the file.
        with storage.locked(path.with_suffix(".lock")) if first else nullcontext():
            if not self.world.any(first and path.exists()):
                rows = compute(examples, title)
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

    def _base_key(self, examples: Sequence[Example], *more: object, with_task: bool = True) -> str:
        """A hash of everything that the base model's rows depend on."""
        score, task = self.config.score, identity(self.config.task)
        key: list[Any] = [plain(self.base), self.config.train.dtype, score.batch_size]
        key += [self.encoder.prompt_limit] if with_task else []
        key += self.encoder.versions.values() if with_task else []
        # The losses are ours under every engine, and depend on no end of answers.
        if with_task and not more:
            key += [list(self.encoder.more_ends)] if self.encoder.more_ends else []
            key += [score.engine] if score.engine != OURS else []
        key += [digest(examples), *([score.batch_tokens] if score.batch_tokens else []), *more]
        key += [{name: value for name, value in task.items() if name in PROTOCOL_KEYS}] if with_task else []
        return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]


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


def _timed(
    compute: Callable[[Sequence[Example], str], list[PredictionRow]], examples: Sequence[Example], title: str
) -> tuple[list[PredictionRow], float]:
    started = time.perf_counter()
    return compute(examples, title), time.perf_counter() - started


def _write(path: Path, parts: list[list[PredictionRow]], recorded: SplitScores | None) -> list[PredictionRow]:
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
    return replace(answer, scores=dict(sorted(scores.items(), key=_losses_last)), cut_target=loss.cut_target)


def _losses_last(item: tuple[str, Any]) -> bool:
    return is_loss(item[0])


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
        engine=new.engine if passes.answers else recorded.engine,
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

"""Score one split, or neutral text: ask the adapted model and the base model every example, and write files of scores.

Each example gives one row, with the model's answer, which the task scores, or with the loss of its target. A loss is
teacher-forced: prompt and target are the tokens that training would use. The target of a passage of neutral
text is all of it after the first token. Rounding depends on which rows share a batch, so the batches follow from the
rows and the configuration alone, and several processes divide them.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tiedlora import storage
from tiedlora.adapter.arms import Arm
from tiedlora.analysis.metrics import gains, summarise
from tiedlora.config.identity import identity, run_id
from tiedlora.config.schema import FORGETTING, Config
from tiedlora.data.batching import Batch, collate
from tiedlora.data.encoding import Encoded, Encoder
from tiedlora.description import DESCRIPTION, BaseModelRecord
from tiedlora.errors import UserError, is_out_of_memory
from tiedlora.models.device import execution_on, free_memory
from tiedlora.models.placement import input_device
from tiedlora.reading import plain
from tiedlora.records.loss_metrics import DRIFT, loss_scores
from tiedlora.records.provenance import code_version, package_versions
from tiedlora.records.rows import PredictionRow, Score
from tiedlora.records.run_folder import BASE, RunFolder
from tiedlora.records.scores import Kind, ScoreRecord, read_scores, write_scores
from tiedlora.scoring.decoding import AnswerEnds, batches_by_length, choice_log_likelihoods, decode
from tiedlora.scoring.passages import Passage, read_passages, source_digest
from tiedlora.scoring.wanted import Wanted
from tiedlora.tasks import Example, Task, digest
from tiedlora.tracking.progress import ProgressBar
from tiedlora.training.distributed import ALONE, World, equal_passes, is_sharded
from tiedlora.training.loss import row_divergences, row_losses

log = logging.getLogger(__name__)

T = TypeVar("T")
Rows = list[PredictionRow]
Tokens = tuple[int, ...]

TITLES: dict[Kind, str] = {"answers": "model on", "losses": "model's loss on", "drift": "model's drift on"}
"""The texts of progress bars."""
PROTOCOL_KEYS = {
    "kind",
    "version",
    "prompt",
    "chat_template",
    "template_options",
    "stop",
    "max_new_tokens",
    "max_prompt_tokens",
    "options",
    "messages",
    "metrics",
    "normalise",
    "choices",
}
"""The keys of a task that decide what a model is asked and how its answer is scored."""


class _Target(NamedTuple):
    """An example whose prompt and target fit into the context together."""

    example: Example
    """With its prompt shortened, if it had to be."""
    tokens: Encoded
    cut: bool
    """Whether the target lost its end."""


@dataclass(frozen=True)
class Scorer:
    """Scores splits of one run, with the adapted model and with the base model."""

    arm: Arm
    encoder: Encoder
    task: Task
    config: Config
    base: BaseModelRecord
    """The base model under `arm`."""
    world: World = ALONE
    """The processes that score together. Each scores some of the batches, and gets the rows of all."""
    run_id: str | None = None
    """The id that the files of scores name; None is that of `config`."""
    halvings: int = 0
    """How often the batches of `config` were halved, because memory ran out."""

    def score_split(
        self, split: str, examples: Sequence[Example], folder: RunFolder, wanted: Wanted, source: str = ""
    ) -> None:
        """Score the adapted model, and the base model if score.base is true, and write a file for each kind of scores.

        Args:
            folder: the run's, with its adapter.
            source: the neutral text that the examples are passages of (score.forgetting).

        Raises:
            UserError: as `rows`; a row has no target although its loss was asked for; or memory runs out with a
                single row.
            OSError: a file cannot be written.
        """
        without = next((example.id for example in examples if not example.target.strip()), None)
        if without is not None and wanted.needs_targets:
            raise UserError(
                f"score.metrics: row {without} has no target, so these rows have no loss and no drift; name other "
                "metrics, with score.drift=false"
            )
        if without is not None and "losses" in wanted.kinds:
            log.info("row %s has no target, so the losses of these rows are not scored", without)
            wanted = wanted.among(["answers"])
        for kind in wanted.kinds:
            self._score(kind, split, examples, folder, source, has_targets=without is None)

    def _score(
        self,
        kind: Kind,
        split: str,
        examples: Sequence[Example],
        folder: RunFolder,
        source: str,
        *,
        has_targets: bool,
    ) -> None:
        """Score one kind and write its file.

        If memory runs out, it is scored again from its start, in halved batches: the adapted model and the base model
        in the same ones, because rounding depends on them. Little work is lost, because the longest rows come first.
        """
        record = ScoreRecord(
            run_id=self.run_id or run_id(self.config),
            adapter=storage.sha256(folder.adapter / DESCRIPTION),
            split=split,
            kind=kind,
            digest=digest(examples),
            rows=len(examples),
            metrics={},
            base="",
            gain={},
            seconds=0.0,
            batch_halvings=0,
            shortened=0,
            output_tokens=0,
            cut_targets=0,
            has_targets=has_targets,
            source=source,
            source_digest=(source_digest(source) or "") if source else "",
            signatures=(self.task.signatures() or {}) if kind == "answers" else {},
            code=code_version(),
            versions=package_versions(),
            execution=execution_on(input_device(self.arm.model), self.world.size),
            rows_sha256="",
        )

        def scored(smaller: Scorer) -> tuple[ScoreRecord, Rows]:
            base_name, base_rows = "", None
            if kind != "drift":
                base_name = smaller._base_name(kind, split, examples)
                if self.config.score.base:
                    base_rows = smaller._base_rows(base_name, kind, split, examples, record)
            started = time.perf_counter()
            rows = smaller.rows(examples, f"adapted {TITLES[kind]} {split}", kind)
            seconds = time.perf_counter() - started
            gain = {} if base_rows is None else gains(rows, base_rows, self.task, kind)
            return smaller._summed_up(replace(record, base=base_name, seconds=seconds, gain=gain), rows), rows

        (record, rows), _ = self.within_memory(scored)
        write_scores(folder.scores_file(split, kind), record, rows)

    def _summed_up(self, record: ScoreRecord, rows: Rows) -> ScoreRecord:
        """The record with what follows from the rows."""
        return replace(
            record,
            metrics=summarise(rows, self.task, record.kind),
            batch_halvings=self.halvings,
            shortened=sum(row.shortened for row in rows),
            output_tokens=sum(row.output_tokens for row in rows),
            cut_targets=sum(row.cut_target for row in rows),
        )

    def score_forgetting(self, source: str, folder: RunFolder) -> None:
        """The losses of neutral text, with the adapter and without it, scored as a split without answers.

        Args:
            source: as score.forgetting.

        Raises:
            UserError: the text cannot be read; or as score_split.
        """
        passages = read_passages(source, self.encoder)
        self.score_split(FORGETTING, passages, folder, Wanted(("losses",)), source)

    def within_memory(self, score: Callable[[Scorer], T], halvings: int = 0) -> tuple[T, int]:
        """What `score` returns, and how often the batches were halved until it had enough memory.

        Args:
            score: gets the scorer, with smaller batches from call to call.
            halvings: how often the batches are halved at first.

        Raises:
            UserError: memory runs out with a single row.
        """
        for times in itertools.count(halvings):
            smaller = replace(self, config=with_halved_batches(self.config, times), halvings=times)
            batch_size = smaller.config.score.batch_size
            try:
                return score(smaller), times
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            free_memory()
            if batch_size == 1:
                break
            log.warning("scoring: out of memory; score.batch_size=%d is halved to %d", batch_size, batch_size // 2)
        raise UserError(
            "score.batch_size: memory runs out even at 1; the adapter and its checkpoint are kept, so with more memory "
            "the same command continues"
        )

    def rows(self, examples: Sequence[Example], title: str, kind: Kind, base: bool = False) -> Rows:
        """One row for each example, with its scores, computed now.

        Args:
            title: the text of the progress bar.
            base: of the base model instead of the adapted one.

        Raises:
            UserError: a prompt does not fit, and the task does not allow to shorten it enough; a number is not finite;
                or as `in_shares`.
        """
        with scored_model(self.arm, self.config, base) as model:
            compute = {"answers": self.answers, "losses": self.losses, "drift": self.drifts}[kind]
            return compute(model, examples, title)

    def answers(self, model: Any, examples: Sequence[Example], title: str) -> Rows:
        """As `rows`, of a model with or without an adapter."""
        # Imported here because the `evaluate` package takes seconds to import, and only scoring needs it.
        from tiedlora.tasks.task_metric import TaskMetric  # noqa: PLC0415

        asked = [self.encoder.scored(example) for example in examples]
        prompts, choices = self._tokens(asked)
        by_likelihood, task = bool(choices[0]), self.config.task
        ends = AnswerEnds(self.encoder.tokenizer, task.stop, task.max_new_tokens, self.encoder.more_ends)

        def of_batch(batch: list[int]) -> list[tuple[str, int, str, list[float] | None]]:
            """(the answer, its tokens, what ended it, the likelihoods of the row's choices) of each row."""
            batch_prompts = [prompts[number] for number in batch]
            if not by_likelihood:
                outputs = decode(model, batch_prompts, ends, progress.advance)
                return [(output.text.strip(), len(output.ids), output.ended, None) for output in outputs]
            found = choice_log_likelihoods(model, batch_prompts, [choices[number] for number in batch])
            progress.advance(len(batch))
            likeliest = [asked[number].choices[own.index(max(own))] for number, own in zip(batch, found, strict=True)]
            tokens = [sum(map(len, choices[number])) for number in batch]
            return list(zip(likeliest, tokens, ["choice"] * len(batch), found, strict=True))

        with closing(ProgressBar(title, len(examples), "rows")) as progress:
            answers = in_shares(self.world, model, self._answer_batches(prompts, choices), of_batch)
        scores = TaskMetric(self.task, by_likelihood, asked).compute(
            predictions=[log_likelihoods if by_likelihood else text for text, *_, log_likelihoods in answers],
            references=[example.references for example in asked],
            choices=[example.choices for example in asked],
        )["per_example"]
        rows = []
        for original, example, score, (output, tokens, ended, log_likelihoods) in zip(
            examples, asked, scores, answers, strict=True
        ):
            texts = list(example.choices) if by_likelihood else None
            # As a file gives them back, so that rows are equal before and after it.
            floats = {name: list(map(float, s)) if isinstance(s, list) else float(s) for name, s in score.items()}
            answered = replace(_row(original, example, floats), output=output, output_tokens=tokens, ended=ended)
            rows.append(replace(answered, choices=texts, log_likelihoods=log_likelihoods))
        return rows

    def losses(self, model: Any, examples: Sequence[Example], title: str) -> Rows:
        """As `rows`, of a model with or without an adapter."""
        targets = [self._target(example) for example in examples]
        rows, found = [], self._of_targets(model, targets, title, functools.partial(row_losses, model))
        for original, target, (total, tokens) in zip(examples, targets, found, strict=True):
            if not math.isfinite(total):
                raise UserError(
                    f"score: the loss of row {original.id} is {total}; try train.dtype=float32, or lower train.lr"
                )
            row = _row(original, target.example, loss_scores(total, tokens))
            rows.append(replace(row, cut_target=target.cut))
        return rows

    def drifts(self, model: Any, examples: Sequence[Example], title: str) -> Rows:
        """As `rows`: the mean divergence of the adapted from the base model at each row's target tokens, in nats."""
        targets = [self._target(example) for example in examples]
        as_base = functools.partial(scored_model, self.arm, self.config, base=True)
        found: list[float] = self._of_targets(
            model, targets, title, lambda batch: row_divergences(model, batch, as_base).tolist()
        )
        if not all(map(math.isfinite, found)):
            raise UserError("score.drift: a divergence is not finite; try train.dtype=float32, or lower train.lr")
        rows = []
        for original, target, value in zip(examples, targets, found, strict=True):
            # Rounding may lead below 0, where no divergence is.
            row = _row(original, target.example, {DRIFT: max(0.0, value)})
            rows.append(replace(row, cut_target=target.cut))
        return rows

    def _of_targets(
        self, model: Any, targets: Sequence[_Target], title: str, compute: Callable[[Batch], Sequence[T]]
    ) -> list[T]:
        """What `compute` gives for the rows of each batch of targets, in the order of the rows."""

        def of_batch(batch: list[int]) -> Sequence[T]:
            tokens = collate([targets[number].tokens for number in batch], self.encoder.tokenizer.eos_token_id)
            found = compute(tokens.to(input_device(model)))
            progress.advance(len(batch))
            return found

        with closing(ProgressBar(title, len(targets), "rows")) as progress:
            return in_shares(self.world, model, self._target_batches(targets), of_batch)

    def batches(self, examples: Sequence[Example], kind: Kind) -> list[list[int]]:
        """The example numbers of each batch of `rows`. In the same batches, a model gives the same rows again.

        A batch stays the same if other batches are left out. So a part of a split can be scored again in the same
        batches.
        """
        if kind != "answers":
            return self._target_batches([self._target(example) for example in examples])
        return self._answer_batches(*self._tokens([self.encoder.scored(example) for example in examples]))

    def _answer_batches(self, prompts: Sequence[Tokens], choices: Sequence[Sequence[Tokens]]) -> list[list[int]]:
        score = self.config.score
        if not choices[0]:
            lengths = [len(prompt) + self.config.task.max_new_tokens for prompt in prompts]
            return batches_by_length(lengths, score.batch_size, score.batch_tokens)
        # A row of a batch is a choice, and all choices of a prompt are in one batch.
        most = max(map(len, choices))
        lengths = [(len(prompt) + max(map(len, texts))) * most for prompt, texts in zip(prompts, choices, strict=True)]
        return batches_by_length(lengths, max(1, score.batch_size // most), score.batch_tokens)

    def _target_batches(self, targets: Sequence[_Target]) -> list[list[int]]:
        score = self.config.score
        return batches_by_length([len(target.tokens) for target in targets], score.batch_size, score.batch_tokens)

    def _tokens(self, examples: Sequence[Example]) -> tuple[list[Tokens], list[list[Tokens]]]:
        """The prompts and the choices of the examples, as token ids."""
        prompts = [self.encoder.prompt(example.prompt) for example in examples]
        return prompts, [[self.encoder.continuation(choice) for choice in example.choices] for example in examples]

    def _target(self, example: Example) -> _Target:
        """The tokens of a row. No example may be left out, so a target that does not fit loses its end."""
        if isinstance(example, Passage):
            # Without an end-of-text token, because a passage may end in the middle of a text.
            ids = self.encoder.text(example.target)
            return _Target(example, Encoded(ids[:1], ids[1:]), cut=False)
        shortened = self.encoder.scored(example)
        whole = self.encoder.example(shortened)
        kept = Encoded(whole.prompt, whole.target[: self.encoder.context - len(whole.prompt)])
        return _Target(shortened, kept, cut=len(kept) < len(whole))

    def _base_rows(self, name: str, kind: Kind, split: str, examples: Sequence[Example], adapted: ScoreRecord) -> Rows:
        """The base model's rows, computed once for each model, protocol and rows: later runs read the file.

        Raises:
            UserError: as `rows`; or the file of an earlier run is damaged or has other rows.
        """
        path, first = Path(self.config.outputs) / BASE / f"{name}.jsonl", self.world.is_first
        if first:
            path.parent.mkdir(parents=True, exist_ok=True)
        # The first process decides, and reads and writes the file.
        with storage.locked(path.with_suffix(".lock")) if first else nullcontext():
            if self.world.any(first and path.exists()):
                log.info("%s: reusing %s", split, path)
                rows = self.world.gather(read_scores(path).rows if first else [])[0]
                if [row.id for row in rows] != [example.id for example in examples]:
                    raise UserError(f"{path}: holds the scores of other rows; remove it; the same command makes it")
                # An earlier run of the same rows may have had other clusters.
                return [replace(row, cluster=example.cluster) for row, example in zip(rows, examples, strict=True)]
            started = time.perf_counter()
            rows = self.rows(examples, f"base {TITLES[kind]} {split}", kind, base=True)
            record = replace(adapted, run_id="", adapter="", base=name, seconds=time.perf_counter() - started)
            if first:
                write_scores(path, self._summed_up(record, rows), rows)
            return rows

    def _base_name(self, kind: Kind, split: str, examples: Sequence[Example]) -> str:
        """A name with a hash of what the base model's rows depend on, besides packages and threads."""
        score, encoder, task = self.config.score, self.encoder, self.config.task
        here = execution_on(input_device(self.arm.model))
        # Devices of different kinds round differently, and a gain is measured on one.
        key: list[Any] = [plain(self.base), self.config.train.dtype, score.batch_size, here.device, here.processor]
        key += [encoder.tokenizer_digest]
        # Neutral text depends on no task.
        of_task = split != FORGETTING
        if of_task:
            key += [encoder.prompt_limit, *encoder.versions.values()]
        if encoder.more_ends and kind == "answers":
            key += [list(encoder.more_ends)]
        key += [digest(examples), *([score.batch_tokens] if score.batch_tokens else [])]
        # The end of a target that is cut depends on the context.
        key += [encoder.context] if kind == "losses" else []
        if of_task:
            key += [{name: value for name, value in identity(task).items() if name in PROTOCOL_KEYS}]
        words = [*([task.name] if of_task else []), split, kind, storage.json_sha256(key)[:12]]
        return re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(words))


def in_shares(
    world: World, model: Any, batches: Sequence[list[int]], compute: Callable[[list[int]], Sequence[T]]
) -> list[T]:
    """What `compute` gives for the rows of each batch, in the order of the rows: each process some, for all to have.

    Args:
        batches: the numbers of the rows of each batch.

    Raises:
        MemoryError: memory ran out in one of several processes. All raise it, so that all can start again.
        UserError: memory ran out, and the model is sharded: then the processes cannot start again together.
    """
    own: list[tuple[int, T]] = []
    failed = False
    try:
        with equal_passes(model, world):
            for batch in world.local_rows(batches):
                own += zip(batch, compute(batch), strict=True)
    except Exception as error:
        if world.size == 1 or not is_out_of_memory(error):
            raise
        if is_sharded(model):
            raise UserError(
                "train.shard=true: out of memory in one of the processes that share the model; what is trained is kept "
                "and the same command continues, with more processes or more memory"
            ) from error
        failed = True
    if world.any(failed):
        raise MemoryError("memory ran out in one of the processes")
    rows = dict(row for share in world.gather(own) for row in share)
    return [rows[number] for number in range(len(rows))]


def _row(original: Example, asked: Example, scores: dict[str, Score]) -> PredictionRow:
    return PredictionRow(
        id=asked.id,
        prompt=asked.prompt,
        references=list(asked.references),
        scores=scores,
        shortened=asked is not original,
        cluster=asked.cluster,
    )


def with_halved_batches(config: Config, times: int) -> Config:
    """The configuration with score.batch_size and score.batch_tokens halved so many times; neither is below 1."""
    score = config.score
    tokens = None if score.batch_tokens is None else max(1, score.batch_tokens >> times)
    return replace(config, score=replace(score, batch_size=max(1, score.batch_size >> times), batch_tokens=tokens))


@contextmanager
def scored_model(arm: Arm, config: Config, base: bool = False) -> Iterator[Any]:
    """Inside the block, the model is as it is scored, or computes as the base model.

    The adapter is merged in float32 only: bfloat16 would round the update. A quantised or offloaded base cannot be
    merged, and is scored unmerged.
    """
    if base:
        arm.disable()
        try:
            yield arm.model
        finally:
            arm.enable()
        return
    try:
        # Inside the block that restores the weights: memory may run out when some of them are merged.
        if config.train.dtype == "float32" and arm.cannot_merge() is None:
            arm.merge()
        with arm.folded_once():
            yield arm.model
    finally:
        arm.unmerge()

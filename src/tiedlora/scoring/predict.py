"""Ask a model every example of a split: for its answer, which the task scores, or for the loss of its target.

Each example gives one prediction row. A loss is teacher-forced: prompt and target are the tokens that training would
use. The target of a passage of neutral text is all of it after the first token. Rounding depends on which rows share a
batch, so the batches follow from the rows and the configuration alone, and several processes divide them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from tiedlora.config.schema import Config
from tiedlora.data.batching import collate
from tiedlora.data.encoding import Encoded, Encoder
from tiedlora.errors import UserError, is_out_of_memory
from tiedlora.models.placement import input_device
from tiedlora.records.loss_metrics import loss_scores
from tiedlora.records.rows import NOT_GENERATED, PredictionRow, Score
from tiedlora.scoring.decoding import AnswerEnds, batches_by_length, decode
from tiedlora.scoring.likelihoods import choice_log_likelihoods
from tiedlora.scoring.passages import Passage
from tiedlora.tasks import Example, Task
from tiedlora.tracking.progress import ProgressBar
from tiedlora.training.distributed import ALONE, World, equal_passes, is_sharded
from tiedlora.training.loss import row_losses

T = TypeVar("T")
Tokens = tuple[int, ...]


@dataclass(frozen=True)
class _Answer:
    """The model's answer to one example, without scores. The fields are those of PredictionRow."""

    output: str
    output_tokens: int
    ended: str
    choices: list[str] | None = None
    log_likelihoods: list[float] | None = None


def predict(
    model: Any,
    encoder: Encoder,
    task: Task,
    examples: Sequence[Example],
    config: Config,
    title: str,
    world: World = ALONE,
) -> list[PredictionRow]:
    """One row for each example, with the model's answer and its scores.

    Args:
        model: the base model, with or without an adapter.
        title: the text of the progress bar.
        world: the processes that answer together, each some of the batches. Every process gets the rows of all.

    Raises:
        UserError: a prompt does not fit, and the task does not allow to shorten it enough; or as `in_shares`.
    """
    # Imported here because the `evaluate` package takes a second to import, and only scoring needs it.
    from tiedlora.tasks.task_metric import TaskMetric

    asked = [fitting(encoder, example, config) for example in examples]
    prompts, choices = _tokens(encoder, asked)
    by_likelihood = bool(choices[0])
    ends = AnswerEnds(encoder.tokenizer, config.task.stop, config.task.max_new_tokens, encoder.more_ends)
    progress = ProgressBar(title, len(examples), "rows")

    def answers_of(batch: list[int]) -> list[_Answer]:
        batch_prompts = [prompts[number] for number in batch]
        if not by_likelihood:
            outputs = decode(model, batch_prompts, ends, progress.advance)
            return [_Answer(output.text.strip(), output.tokens, output.ended) for output in outputs]
        found = choice_log_likelihoods(model, batch_prompts, [choices[number] for number in batch])
        progress.advance(len(batch))
        return [_likeliest(asked[n], choices[n], scores) for n, scores in zip(batch, found, strict=True)]

    answers = in_shares(world, model, _answer_batches(prompts, choices, config), answers_of)
    progress.close()
    scores = TaskMetric(task, by_likelihood, asked).compute(
        predictions=[answer.log_likelihoods if by_likelihood else answer.output for answer in answers],
        references=[example.references for example in asked],
        choices=[example.choices for example in asked],
    )["per_example"]
    return [
        PredictionRow(
            id=example.id,
            prompt=example.prompt,
            shortened=example is not original,
            cluster=example.cluster,
            references=list(example.references),
            scores=_as_floats(score),
            **vars(answer),
        )
        for original, example, answer, score in zip(examples, asked, answers, scores, strict=True)
    ]


def _likeliest(example: Example, choices: Sequence[Tokens], log_likelihoods: list[float]) -> _Answer:
    """The most likely of the example's choices, as its answer."""
    return _Answer(
        output=example.choices[max(range(len(log_likelihoods)), key=lambda i: log_likelihoods[i])],
        output_tokens=sum(map(len, choices)),
        ended="choice",
        choices=list(example.choices),
        log_likelihoods=log_likelihoods,
    )


def _as_floats(scores: Mapping[str, Score]) -> dict[str, Score]:
    """The scores as a predictions file gives them back, so that rows are equal before and after it."""
    return {
        name: list(map(float, score)) if isinstance(score, list) else float(score) for name, score in scores.items()
    }


def fitting(encoder: Encoder, example: Example, config: Config) -> Example:
    """The example, with its prompt shortened if needed, so that the answer fits. No example may be left out."""
    shortened = encoder.shortened(example)
    answer_tokens = max([config.task.max_new_tokens, *map(len, _tokens(encoder, [example])[1][0])])
    if shortened is not None and len(encoder.prompt(shortened.prompt)) + answer_tokens <= encoder.context:
        return shortened
    raise UserError(
        f"task={config.task.name}: row {example.id} has a prompt of {len(encoder.prompt(example.prompt))} tokens that "
        f"cannot be shortened to {encoder.context - answer_tokens} (model.context={encoder.context} less "
        f"{answer_tokens} for the "
        f"answer, task.max_prompt_tokens={config.task.max_prompt_tokens}); lower task.max_new_tokens, raise "
        "task.max_prompt_tokens, or take a model of longer context"
    )


def _tokens(encoder: Encoder, examples: Sequence[Example]) -> tuple[list[Tokens], list[list[Tokens]]]:
    """The prompts and the choices of the examples, as token ids."""
    prompts = [encoder.prompt(example.prompt) for example in examples]
    return prompts, [[encoder.continuation(choice) for choice in example.choices] for example in examples]


def answer_batches(encoder: Encoder, examples: Sequence[Example], config: Config) -> list[list[int]]:
    """The example numbers of each batch of `predict`. In the same batches, a model gives the same outputs again.

    A batch stays the same if other batches are left out. So a part of a split can be scored again in the same batches.
    """
    asked = [fitting(encoder, example, config) for example in examples]
    return _answer_batches(*_tokens(encoder, asked), config)


def _answer_batches(prompts: Sequence[Tokens], choices: Sequence[Sequence[Tokens]], config: Config) -> list[list[int]]:
    score = config.score
    if not choices[0]:
        lengths = [len(prompt) + config.task.max_new_tokens for prompt in prompts]
        return batches_by_length(lengths, score.batch_size, score.batch_tokens)
    # A row of a batch is a choice, and all choices of a prompt are in one batch.
    most = max(map(len, choices))
    lengths = [(len(prompt) + max(map(len, texts))) * most for prompt, texts in zip(prompts, choices, strict=True)]
    return batches_by_length(lengths, max(1, score.batch_size // most), score.batch_tokens)


def in_shares(
    world: World, model: Any, batches: Sequence[list[int]], compute: Callable[[list[int]], Sequence[T]]
) -> list[T]:
    """What `compute` gives for the rows of each batch, in the order of the rows: each process some, for all to have.

    Args:
        batches: the numbers of the rows of each batch.

    Raises:
        MemoryError, RuntimeError: memory ran out. All processes raise it, so that all can start again.
        UserError: memory ran out, and the model is sharded: then the processes cannot start again together.
    """
    own: list[tuple[int, T]] = []
    failed = False
    try:
        with equal_passes(model, world):
            for batch in world.local_rows(batches):
                own += zip(batch, compute(batch), strict=True)
    except (MemoryError, RuntimeError) as error:
        if world.size == 1 or not is_out_of_memory(error):
            raise
        if is_sharded(model):
            raise UserError(
                "scoring: out of memory in one of the processes that share the model (train.shard=true); the trained "
                "adapter is kept: the same command continues with scoring, with more processes or more memory"
            ) from error
        failed = True
    if world.any(failed):
        raise MemoryError("scoring: memory ran out in one of the processes")
    rows = dict(row for share in world.gather(own) for row in share)
    return [rows[number] for number in range(len(rows))]


@dataclass(frozen=True)
class _Target:
    """An example whose prompt and target fit into the context together."""

    example: Example
    """With its prompt shortened, if it had to be."""
    tokens: Encoded
    cut: bool
    """Whether the target lost its end."""


def predict_losses(
    model: Any,
    encoder: Encoder,
    examples: Sequence[Example],
    config: Config,
    title: str,
    world: World = ALONE,
) -> list[PredictionRow]:
    """One row for each example, with the loss of its target and without an answer. The arguments are as in `predict`.

    Raises:
        UserError: as `predict`; or a loss is not finite.
    """
    targets = [_target(encoder, example, config) for example in examples]
    progress = ProgressBar(title, len(examples), "rows")

    def rows_of(batch: list[int]) -> list[PredictionRow]:
        tokens = collate([targets[number].tokens for number in batch], encoder.tokenizer.eos_token_id)
        losses = row_losses(model, tokens.to(input_device(model)))
        progress.advance(len(batch))
        found = zip(batch, losses.sums.tolist(), losses.tokens.tolist(), strict=True)
        return [_loss_row(examples[number], targets[number], total, count) for number, total, count in found]

    rows = in_shares(world, model, _target_batches(targets, config), rows_of)
    progress.close()
    return rows


def loss_batches(encoder: Encoder, examples: Sequence[Example], config: Config) -> list[list[int]]:
    """The example numbers of each batch of `predict_losses`."""
    return _target_batches([_target(encoder, example, config) for example in examples], config)


def _target_batches(targets: Sequence[_Target], config: Config) -> list[list[int]]:
    return batches_by_length([len(row.tokens) for row in targets], config.score.batch_size, config.score.batch_tokens)


def _target(encoder: Encoder, example: Example, config: Config) -> _Target:
    """The tokens of a row. No example may be left out, so a target that does not fit loses its end."""
    if isinstance(example, Passage):
        return _Target(example, example.tokens(encoder), cut=False)
    shortened = fitting(encoder, example, config)
    tokens = encoder.example(shortened)
    cut = len(tokens) > encoder.context
    if cut:
        tokens = Encoded(tokens.prompt, tokens.target[: encoder.context - len(tokens.prompt)])
    return _Target(shortened, tokens, cut)


def _loss_row(original: Example, target: _Target, total: float, tokens: int) -> PredictionRow:
    if not math.isfinite(total):
        raise UserError(f"score: the loss of row {original.id} is {total}; try train.dtype=float32, or lower train.lr")
    return PredictionRow(
        id=original.id,
        prompt=target.example.prompt,
        references=list(original.references),
        output="",
        scores=loss_scores(total, tokens),
        shortened=target.example is not original,
        ended=NOT_GENERATED,
        cut_target=target.cut,
        cluster=original.cluster,
    )

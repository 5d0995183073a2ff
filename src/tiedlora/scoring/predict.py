"""Ask a model every example of a split: for its answer, which the task scores, or for the loss of its target.

Each example gives one prediction row. A loss is teacher-forced: prompt and target are the tokens that training would
use. The target of a passage of neutral text is all of it after the first token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tiedlora.config.schema import Config
from tiedlora.data.batching import collate
from tiedlora.data.encoding import Encoded, Encoder
from tiedlora.errors import UserError
from tiedlora.models.placement import input_device
from tiedlora.records.loss_metrics import loss_scores
from tiedlora.records.rows import NOT_GENERATED, PredictionRow, Score
from tiedlora.scoring.decoding import batches_by_length, generate, generation_batches
from tiedlora.scoring.likelihoods import choice_batches, choice_log_likelihoods
from tiedlora.scoring.passages import Passage
from tiedlora.tasks import Example, Task
from tiedlora.tracking.progress import ProgressBar
from tiedlora.training.loss import row_losses


@dataclass(frozen=True)
class _Answer:
    """The model's answer to one example, without scores. The fields are those of PredictionRow."""

    output: str
    output_tokens: int
    ended: str
    choices: list[str] | None = None
    log_likelihoods: list[float] | None = None


def predict(
    model: Any, encoder: Encoder, task: Task, examples: Sequence[Example], config: Config, title: str
) -> list[PredictionRow]:
    """One row for each example, with the model's answer and its scores.

    Args:
        model: the base model, with or without an adapter.
        title: the text of the progress bar.

    Raises:
        UserError: a prompt does not fit, and the task does not allow to shorten it enough.
    """
    # Imported here because the `evaluate` package takes a second to import, and only scoring needs it.
    from tiedlora.tasks.task_metric import TaskMetric

    asked = [fitting(encoder, example, config) for example in examples]
    by_likelihood = bool(asked[0].choices)
    progress = ProgressBar(title, len(examples), "rows")
    answers = (_choose if by_likelihood else _generate)(model, encoder, asked, config, progress)
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
            references=list(example.references),
            scores=_as_floats(score),
            **vars(answer),
        )
        for original, example, answer, score in zip(examples, asked, answers, scores, strict=True)
    ]


def _as_floats(scores: Mapping[str, Score]) -> dict[str, Score]:
    """The scores as a predictions file gives them back, so that rows are equal before and after it."""
    return {
        name: list(map(float, score)) if isinstance(score, list) else float(score) for name, score in scores.items()
    }


def answer_batches(encoder: Encoder, examples: Sequence[Example], config: Config) -> list[list[int]]:
    """The example numbers of each batch of `predict`. In the same batches, a model gives the same outputs again."""
    asked = [fitting(encoder, example, config) for example in examples]
    prompts = _prompts(encoder, asked)
    if asked[0].choices:
        return choice_batches(prompts, _choices(encoder, asked), config.score.batch_size, config.score.batch_tokens)
    return generation_batches(prompts, config.task.max_new_tokens, config.score.batch_size, config.score.batch_tokens)


def fitting(encoder: Encoder, example: Example, config: Config) -> Example:
    """The example, with its prompt shortened if needed, so that the answer fits. No example may be left out."""
    shortened = encoder.shortened(example)
    answer_tokens = max([config.task.max_new_tokens, *map(len, _choices(encoder, [example])[0])])
    if shortened is not None and len(encoder.prompt(shortened.prompt)) + answer_tokens <= encoder.context:
        return shortened
    raise UserError(
        f"task={config.task.name}: row {example.id} has a prompt of {len(encoder.prompt(example.prompt))} tokens that "
        f"cannot be shortened to {encoder.context - answer_tokens} (model.context={encoder.context} less "
        f"{answer_tokens} for the "
        f"answer, task.max_prompt_tokens={config.task.max_prompt_tokens}); lower task.max_new_tokens, raise "
        "task.max_prompt_tokens, or take a model of longer context"
    )


def _prompts(encoder: Encoder, examples: Sequence[Example]) -> list[tuple[int, ...]]:
    return [encoder.prompt(example.prompt) for example in examples]


def _choices(encoder: Encoder, examples: Sequence[Example]) -> list[list[tuple[int, ...]]]:
    return [[encoder.continuation(choice) for choice in example.choices] for example in examples]


def _generate(
    model: Any, encoder: Encoder, examples: Sequence[Example], config: Config, progress: ProgressBar
) -> list[_Answer]:
    outputs = generate(
        model,
        encoder.tokenizer,
        _prompts(encoder, examples),
        max_new_tokens=config.task.max_new_tokens,
        stop=config.task.stop,
        more_ends=encoder.more_ends,
        batch_size=config.score.batch_size,
        batch_tokens=config.score.batch_tokens,
        progress=progress.advance,
    )
    return [_Answer(output.text.strip(), output.tokens, output.ended) for output in outputs]


def _choose(
    model: Any, encoder: Encoder, examples: Sequence[Example], config: Config, progress: ProgressBar
) -> list[_Answer]:
    choices = _choices(encoder, examples)
    log_likelihoods = choice_log_likelihoods(
        model,
        _prompts(encoder, examples),
        choices,
        batch_size=config.score.batch_size,
        batch_tokens=config.score.batch_tokens,
        progress=progress.advance,
    )
    return [
        _Answer(
            output=example.choices[max(range(len(scores)), key=lambda i: scores[i])],
            output_tokens=sum(map(len, tokens)),
            ended="choice",
            choices=list(example.choices),
            log_likelihoods=scores,
        )
        for example, tokens, scores in zip(examples, choices, log_likelihoods, strict=True)
    ]


@dataclass(frozen=True)
class _Target:
    """An example whose prompt and target fit into the context together."""

    example: Example
    """With its prompt shortened, if it had to be."""
    tokens: Encoded
    cut: bool
    """Whether the target lost its end."""


def predict_losses(
    model: Any, encoder: Encoder, examples: Sequence[Example], config: Config, title: str
) -> list[PredictionRow]:
    """One row for each example, with the loss of its target and without an answer. The arguments are as in `predict`.

    Raises:
        UserError: as `predict`; or a loss is not finite.
    """
    targets = [_target(encoder, example, config) for example in examples]
    rows: dict[int, PredictionRow] = {}
    progress = ProgressBar(title, len(examples), "rows")
    for numbers in _target_batches(targets, config):
        batch = collate([targets[number].tokens for number in numbers], encoder.tokenizer.eos_token_id)
        losses = row_losses(model, batch.to(input_device(model)))
        for number, total, tokens in zip(numbers, losses.sums.tolist(), losses.tokens.tolist(), strict=True):
            rows[number] = _loss_row(examples[number], targets[number], total, tokens)
        progress.advance(len(numbers))
    progress.close()
    return [rows[number] for number in range(len(examples))]


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
    )

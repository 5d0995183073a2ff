"""Ask a model every example of a split, and score each answer: one prediction row an example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tiedlora.config.schema import Config
from tiedlora.data.encoding import Encoder
from tiedlora.errors import UserError
from tiedlora.progress import ProgressBar
from tiedlora.records.rows import PredictionRow
from tiedlora.scoring.decoding import generate, generation_batches
from tiedlora.scoring.likelihoods import choice_batches, choice_log_likelihoods
from tiedlora.tasks import Example, Task


@dataclass(frozen=True)
class _Answer:
    """What the model gave to one example, before it is scored; the fields are those of PredictionRow."""

    output: str
    output_tokens: int
    ended: str
    choices: list[str] | None = None
    log_likelihoods: list[float] | None = None


def predict(
    model: Any, encoder: Encoder, task: Task, examples: Sequence[Example], config: Config, what: str
) -> list[PredictionRow]:
    """The rows of predictions/, one an example.

    Args:
        what: the name of this work on the progress bar.

    Raises:
        UserError: a prompt does not fit, and the task does not let it be shortened enough.
    """
    # The `evaluate` package takes a second to import, and only scoring needs it.
    from tiedlora.tasks.task_metric import TaskMetric

    asked = [_fitting(encoder, example, config) for example in examples]
    prompts = [encoder.prompt(example.prompt) for example in asked]
    progress = ProgressBar(what, len(examples), "rows")
    by_likelihood = bool(asked[0].choices)
    answer = _choose if by_likelihood else _generate
    answers = answer(model, encoder, asked, prompts, config, progress)
    progress.close()
    scores = TaskMetric(task, by_likelihood).compute(
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
            scores=score,
            **vars(answer),
        )
        for original, example, answer, score in zip(examples, asked, answers, scores, strict=True)
    ]


def scoring_batches(encoder: Encoder, examples: Sequence[Example], config: Config) -> list[list[int]]:
    """Which examples make up each batch of `predict`. Scored in the same batches again, they get the same outputs."""
    asked = [_fitting(encoder, example, config) for example in examples]
    prompts = [encoder.prompt(example.prompt) for example in asked]
    limits = config.score.batch_size, config.score.batch_tokens
    if asked[0].choices:
        choices = [[encoder.continuation(choice) for choice in example.choices] for example in asked]
        return choice_batches(prompts, choices, *limits)
    return generation_batches(prompts, config.task.max_new_tokens, *limits)


def _fitting(encoder: Encoder, example: Example, config: Config) -> Example:
    """The example with a prompt that leaves room for an answer: no example that is scored is left out."""
    asked = encoder.shortened(example)
    after = max([config.task.max_new_tokens, *(len(encoder.continuation(choice)) for choice in example.choices)])
    if asked is not None and len(encoder.prompt(asked.prompt)) + after <= encoder.context:
        return asked
    raise UserError(
        f"task={config.task.name}: row {example.id} has a prompt of {len(encoder.prompt(example.prompt))} tokens that "
        f"cannot be shortened to {encoder.context - after} (model.context={encoder.context} less {after} for the "
        f"answer, task.max_prompt_tokens={config.task.max_prompt_tokens}); lower task.max_new_tokens, raise "
        "task.max_prompt_tokens, or take a model of longer context"
    )


def _generate(
    model: Any,
    encoder: Encoder,
    examples: Sequence[Example],
    prompts: Sequence[tuple[int, ...]],
    config: Config,
    progress: ProgressBar,
) -> list[_Answer]:
    outputs = generate(
        model,
        encoder.tokenizer,
        prompts,
        max_new_tokens=config.task.max_new_tokens,
        stop=config.task.stop,
        batch_size=config.score.batch_size,
        batch_tokens=config.score.batch_tokens,
        progress=progress.advance,
    )
    return [_Answer(output.text.strip(), output.tokens, output.ended) for output in outputs]


def _choose(
    model: Any,
    encoder: Encoder,
    examples: Sequence[Example],
    prompts: Sequence[tuple[int, ...]],
    config: Config,
    progress: ProgressBar,
) -> list[_Answer]:
    choices = [[encoder.continuation(choice) for choice in example.choices] for example in examples]
    log_likelihoods = choice_log_likelihoods(
        model,
        prompts,
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

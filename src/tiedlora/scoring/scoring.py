"""Score one split with one model: outputs, per-example rows, and metrics with intervals."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from tiedlora import storage
from tiedlora.config.schema import Config
from tiedlora.data.encoding import Encoder
from tiedlora.errors import UserError
from tiedlora.records import run_folder, run_record
from tiedlora.scoring.decoding import choice_log_likelihoods, chosen_together, generate, generated_together
from tiedlora.statistics.intervals import Interval, bootstrap, paired_proportions, wilson
from tiedlora.tasks import Example, Task, digest
from tiedlora.tracking.tracker import Progress

log = logging.getLogger(__name__)

PROTOCOL = ("kind", "version", "prompt", "chat_template", "stop", "max_new_tokens", "max_prompt_tokens", "options")
"""Keys of a task that decide what the base model is asked and how its answer is read."""


def predict(
    model: Any, encoder: Encoder, task: Task, examples: list[Example], config: Config, what: str
) -> list[dict[str, Any]]:
    """One row an example: id, prompt as it was asked, references, output, scores.

    A score is a number, or, for a corpus-level metric, the output's statistics. Of a choice among
    given texts the row keeps each one's log-likelihood, and the likeliest as its output.

    Raises:
        UserError: a prompt does not fit and the task does not let it be shortened (enough).
    """
    from tiedlora.tasks.task_metric import TaskMetric  # evaluate costs seconds

    asked = [_fitting(encoder, example, config) for example in examples]
    prompts = [encoder.prompt(example.prompt) for example in asked]
    progress = Progress(what, len(examples), "rows")
    by_likelihood = bool(asked[0].choices)
    answer = _choose if by_likelihood else _generate
    answers = answer(model, encoder, asked, prompts, config, progress.advance)
    progress.close()
    scores = TaskMetric(task, by_likelihood).compute(
        predictions=[row["log_likelihoods"] if by_likelihood else row["output"] for row in answers],
        references=[example.references for example in asked],
        choices=[example.choices for example in asked],
    )["per_example"]
    return [
        {
            "id": example.id,
            "prompt": example.prompt,
            "shortened": example is not original,
            "references": list(example.references),
            **row,
            "scores": score,
        }
        for original, example, row, score in zip(examples, asked, answers, scores, strict=True)
    ]


def scored_together(encoder: Encoder, examples: list[Example], config: Config) -> list[list[int]]:
    """Which examples make up each batch of `predict`: scored together again, they come out as they were."""
    asked = [_fitting(encoder, example, config) for example in examples]
    prompts = [encoder.prompt(example.prompt) for example in asked]
    limits = config.score.batch_size, config.score.batch_tokens
    if asked[0].choices:
        choices = [[encoder.continuation(choice) for choice in example.choices] for example in asked]
        return chosen_together(prompts, choices, *limits)
    return generated_together(prompts, config.task.max_new_tokens, *limits)


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
    examples: list[Example],
    prompts: list[tuple[int, ...]],
    config: Config,
    progress: Callable[[int], None],
) -> list[dict[str, Any]]:
    outputs = generate(
        model,
        encoder.tokenizer,
        prompts,
        max_new_tokens=config.task.max_new_tokens,
        stop=config.task.stop,
        batch_size=config.score.batch_size,
        batch_tokens=config.score.batch_tokens,
        progress=progress,
    )
    return [
        {"output": output.text.strip(), "output_tokens": output.tokens, "ended": output.ended} for output in outputs
    ]


def _choose(
    model: Any,
    encoder: Encoder,
    examples: list[Example],
    prompts: list[tuple[int, ...]],
    config: Config,
    progress: Callable[[int], None],
) -> list[dict[str, Any]]:
    choices = [[encoder.continuation(choice) for choice in example.choices] for example in examples]
    found = choice_log_likelihoods(
        model,
        prompts,
        choices,
        batch_size=config.score.batch_size,
        batch_tokens=config.score.batch_tokens,
        progress=progress,
    )
    return [
        {
            "output": example.choices[max(range(len(scores)), key=lambda i: scores[i])],
            "output_tokens": sum(map(len, tokens)),
            "ended": "choice",
            "choices": list(example.choices),
            "log_likelihoods": scores,
        }
        for example, tokens, scores in zip(examples, choices, found, strict=True)
    ]


def summarise(rows: list[dict[str, Any]], task: Task) -> dict[str, dict[str, Any]]:
    """Each metric over the rows with its 95 % interval over which examples were drawn.

    Wilson's where every score is 0 or 1, else a bootstrap over examples.
    """
    return {name: asdict(_estimate(task, name, [row["scores"][name] for row in rows])) for name in task.metrics}


def gains(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], task: Task) -> dict[str, dict[str, Any]]:
    """Each metric's paired difference to the base model on the same examples.

    Newcombe's interval where every score is 0 or 1, else a bootstrap that resamples pairs.
    """
    if [row["id"] for row in ours] != [row["id"] for row in theirs]:
        raise ValueError("paired scores need the same examples in the same order")

    def difference(name: str) -> Interval:
        first, second = ([row["scores"][name] for row in rows] for rows in (ours, theirs))
        if _binary([*first, *second]):
            return paired_proportions(first, second)
        ours_over, theirs_over = _over(task, name, first), _over(task, name, second)
        return bootstrap(len(first), lambda chosen: ours_over(chosen) - theirs_over(chosen), (-1.0, 1.0))

    return {name: asdict(difference(name)) for name in task.metrics}


def _estimate(task: Task, metric: str, scores: list[Any]) -> Interval:
    if _binary(scores):
        return wilson(int(sum(scores)), len(scores))
    return bootstrap(len(scores), _over(task, metric, scores), (0.0, 1.0))


def _binary(scores: list[Any]) -> bool:
    return all(score in (0, 1) for score in scores)


def _over(task: Task, metric: str, scores: list[Any]) -> Callable[[NDArray[np.int64]], NDArray[np.float64]]:
    """The metric over resampled examples: row numbers (resamples, examples) -> values (resamples,)."""
    table = np.asarray(scores, dtype=np.float64)
    if metric in task.corpus_metrics:
        return lambda chosen: np.array([task.corpus_score(metric, sums) for sums in table[chosen].sum(axis=1)])
    return lambda chosen: np.asarray(table[chosen].mean(axis=1))


def base_rows(
    model: Any, encoder: Encoder, task: Task, examples: list[Example], config: Config, base: dict[str, Any], split: str
) -> list[dict[str, Any]]:
    """The unadapted model's rows: computed once per model, protocol and rows, then reused by every run.

    Args:
        model: the base model, without an adapter's update.
        base: its record (name, revision, digest).
    """
    key = [base, config.train.dtype, config.score.batch_size, encoder.room, digest(examples)]
    key += [config.score.batch_tokens] if config.score.batch_tokens else []
    key.append({name: value for name, value in run_folder.identity(config.task).items() if name in PROTOCOL})
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    path = Path(config.outputs) / "base" / f"{config.task.name}-{split}-{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if path.exists():
            log.info("base model on %s: reusing %s", split, path)
            rows = run_record.read_predictions(path)
            if [row["id"] for row in rows] != [example.id for example in examples]:
                raise UserError(f"{path}: holds the predictions of other rows; remove it, and they are made again")
            return rows
        rows = predict(model, encoder, task, examples, config, f"base model on {split}")
        storage.write_json_lines(path, rows)
        return rows


@contextmanager
def adapted(attached: Any, config: Config) -> Iterator[Any]:
    """The adapted model as it is scored: merged in float32; in bfloat16, where merging rounds the update away, not."""
    if config.train.dtype == "float32":
        attached.merge()
    try:
        yield attached.model
    finally:
        attached.unmerge()


def score_split(
    attached: Any,
    encoder: Encoder,
    task: Task,
    examples: list[Example],
    config: Config,
    base: dict[str, Any],
    split: str,
    folder: run_folder.RunFolder,
) -> dict[str, Any]:
    """Score the adapted model, and the base model beside it, writing predictions/.

    Returns:
        What result.json says of the split: rows, digest, how many prompts were shortened, metrics, the
        base's metrics and the gain, and the signatures of metrics that have one. Scores are fractions
        of 1, BLEU and chrF too.
    """
    found: dict[str, Any] = {"rows": len(examples), "digest": digest(examples)}
    theirs = None
    if config.score.base:
        attached.disable()
        theirs = base_rows(attached.model, encoder, task, examples, config, base, split)
        attached.enable()
        storage.write_json_lines(folder.predictions_file(f"{split}.base"), theirs)
    started = time.perf_counter()
    with adapted(attached, config) as model:
        ours = predict(model, encoder, task, examples, config, f"adapted model on {split}")
    found["seconds"] = time.perf_counter() - started
    found["shortened"] = sum(row["shortened"] for row in ours)
    found["output_tokens"] = sum(row["output_tokens"] for row in ours)
    storage.write_json_lines(folder.predictions_file(split), ours)
    found["metrics"] = summarise(ours, task)
    if signatures := task.signatures():
        found["signatures"] = signatures
    if theirs is not None:
        found["base"], found["gain"] = summarise(theirs, task), gains(ours, theirs, task)
    return found

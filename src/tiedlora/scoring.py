"""Score one split with one model: outputs, per-example rows, and metrics with intervals."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock

from tiedlora import atomic, record
from tiedlora.config import Config
from tiedlora.data import Encoder
from tiedlora.evaluate import generate
from tiedlora.intervals import Interval, paired_proportions, wilson
from tiedlora.tasks import Example, Task, digest
from tiedlora.tracking import Progress

log = logging.getLogger(__name__)

PROTOCOL = ("kind", "version", "prompt", "chat_template", "stop", "max_new_tokens", "max_prompt_tokens", "options")
"""Keys of a task that decide what the base model is asked and how its answer is read."""


def predict(
    model: Any, encoder: Encoder, task: Task, examples: list[Example], config: Config, what: str
) -> list[dict[str, Any]]:
    """One row an example: id, prompt, references, output, scores."""
    prompts = [encoder.prompt(example.prompt) for example in examples]
    progress = Progress(what, len(examples), "rows")
    outputs = generate(
        model,
        encoder.tokenizer,
        prompts,
        max_new_tokens=config.task.max_new_tokens,
        stop=config.task.stop,
        batch_size=config.score.batch_size,
        progress=progress.advance,
    )
    progress.close()
    return [
        {
            "id": example.id,
            "prompt": example.prompt,
            "references": list(example.references),
            "output": output.text,
            "output_tokens": output.tokens,
            "ended": output.ended,
            "scores": task.score(output.text, example),
        }
        for example, output in zip(examples, outputs, strict=True)
    ]


def summarise(rows: list[dict[str, Any]], task: Task) -> dict[str, dict[str, float]]:
    """Each metric's mean over the rows with its 95 % interval over which examples were drawn."""
    found = {}
    for name in task.metrics:
        scores = [row["scores"][name] for row in rows]
        found[name] = asdict(wilson(int(sum(scores)), len(scores)))
    return found


def gains(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], task: Task) -> dict[str, dict[str, float]]:
    """Each metric's paired difference to the base model on the same examples."""
    if [row["id"] for row in ours] != [row["id"] for row in theirs]:
        raise ValueError("paired scores need the same examples in the same order")

    def difference(name: str) -> Interval:
        return paired_proportions([row["scores"][name] for row in ours], [row["scores"][name] for row in theirs])

    return {name: asdict(difference(name)) for name in task.metrics}


def base_rows(
    model: Any, encoder: Encoder, task: Task, examples: list[Example], config: Config, base: dict[str, Any], split: str
) -> list[dict[str, Any]]:
    """The unadapted model's rows: computed once per model, protocol and rows, then reused by every run.

    Args:
        model: the base model, without an adapter's update.
        base: its record (name, revision, digest).
    """
    key = [base, config.train.dtype, config.score.batch_size, digest(examples)]
    key.append({name: value for name, value in record.identity(config.task).items() if name in PROTOCOL})
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    path = Path(config.outputs) / "base" / f"{config.task.name}-{split}-{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if path.exists():
            log.info("base model on %s: reusing %s", split, path)
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        rows = predict(model, encoder, task, examples, config, f"base model on {split}")
        atomic.write_json_lines(path, rows)
        return rows


def score_split(
    attached: Any,
    encoder: Encoder,
    task: Task,
    examples: list[Example],
    config: Config,
    base: dict[str, Any],
    split: str,
    folder: record.RunFolder,
) -> dict[str, Any]:
    """Score the adapted model, and the base model beside it, writing predictions/.

    Returns:
        What result.json says of the split: rows, digest, metrics, the base's metrics and the gain.
    """
    found: dict[str, Any] = {"rows": len(examples), "digest": digest(examples)}
    theirs = None
    if config.score.base:
        attached.unhook()
        theirs = base_rows(attached.model, encoder, task, examples, config, base, split)
        attached.hook()
        atomic.write_json_lines(folder.predictions_file(f"{split}.base"), theirs)
    started = time.perf_counter()
    ours = predict(attached.model, encoder, task, examples, config, f"adapted model on {split}")
    found["seconds"] = time.perf_counter() - started
    found["output_tokens"] = sum(row["output_tokens"] for row in ours)
    atomic.write_json_lines(folder.predictions_file(split), ours)
    found["metrics"] = summarise(ours, task)
    if theirs is not None:
        found["base"], found["gain"] = summarise(theirs, task), gains(ours, theirs, task)
    return found

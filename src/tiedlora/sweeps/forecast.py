"""What a sweep will cost, before it is run: tokens, hours and peak memory for each model and task.

The speeds come from finished runs of the same model and task in the same folder of outputs, if there are any. If not,
they are the model's arithmetic (models/arithmetic.py) at a stated rate, on rows that are here: nothing is downloaded.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

from rich.console import RenderableType
from rich.text import Text

from tiedlora import screen
from tiedlora.config.compose import typed
from tiedlora.config.schema import Config
from tiedlora.errors import UserError
from tiedlora.models import arithmetic
from tiedlora.other_methods import FULL
from tiedlora.records.loss_metrics import is_loss
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.run_record import RunRecord, read_record
from tiedlora.records.scores import RunScores, read_run_scores
from tiedlora.sweeps.cells import SweepCell
from tiedlora.tasks import Example, load_examples, load_task

TFLOPS = 0.5
"""The stated rate, in 1e12 operations a second: what two CPU cores with bfloat16 instructions reach in training
(docs/performance.md: 1,039 tokens/s of a model with 0.45e9 operations a token)."""
NEWEST_RUNS = 20
"""How many finished runs are read for a model and task."""
SAMPLED_ROWS = 200
CHARACTERS_PER_TOKEN = 4.0
"""Assumed for English text."""


@dataclass(frozen=True)
class Speeds:
    """How fast the runs of one model and task are."""

    row_tokens: float
    """Mean tokens of a training row; with a reward, of a prompt and one answer."""
    training: float
    """Tokens a second of training steps. Losses are twice as fast: a forward pass is half of the arithmetic."""
    scoring: float
    """Rows a second that are answered."""
    peak_memory_bytes: int
    source: str
    """Where the speeds come from, in words."""
    has_sampling: bool = False
    """Whether `training` has the time of a reward's answers in it."""


@dataclass(frozen=True)
class TaskForecast:
    """What the cells of one model and task will cost, one after the other. The base model's own scores, which runs
    share, are not in it."""

    model: str
    task: str
    cells: int
    tokens: float
    """Of training, in all cells."""
    seconds: float
    """All cells of the plain grid."""
    seconds_left: float
    """The cells that are not finished."""
    peak_memory_bytes: int
    source: str


def forecast(sweep_cells: Iterable[SweepCell], tflops: float = TFLOPS) -> tuple[list[TaskForecast], list[str]]:
    """The forecast of each model and task, and a line for each one without a forecast.

    Args:
        sweep_cells: of one sweep, or of several.
        tflops: the rate of the arithmetic, where no run has finished.
    """
    groups: dict[tuple[str, str, str, bool], list[SweepCell]] = {}
    for cell in sweep_cells:
        config = cell.config
        place = config.model.name, config.train.dtype, config.task.name, config.tying.method == FULL
        groups.setdefault(place, []).append(cell)
    forecasts: list[TaskForecast] = []
    unknown: dict[str, None] = {}
    for cells in groups.values():
        config, name = cells[0].config, cells[0].name
        speeds = observed_speeds(config, tflops) or computed_speeds(config, tflops)
        if speeds is None:
            line = f"{name.task}: its rows are not here, so its cost is unknown; set data_root (or TIEDLORA_DATA)"
            unknown[line] = None
            continue
        splits = {"validation"}.union(*(cell.config.score.splits for cell in cells))
        rows = {split: split_rows(config, split) for split in splits}
        tokens, seconds = zip(*(cost(cell.config, speeds, rows) for cell in cells), strict=True)
        left = sum(own for cell, own in zip(cells, seconds, strict=True) if not cell.finished())
        sums, (memory, source) = (sum(tokens), sum(seconds), left), (speeds.peak_memory_bytes, speeds.source)
        task = f"{name.task} ({FULL})" if config.tying.method == FULL else name.task
        forecasts.append(TaskForecast(name.model, task, len(cells), *sums, memory, source))
    return forecasts, list(unknown)


def observed_speeds(config: Config, tflops: float = TFLOPS) -> Speeds | None:
    """The medians of the newest finished runs of the same model and task in the folder of outputs; None without one.

    Only runs on the device of the newest one count: a median of a CPU's and a GPU's speeds is the speed of neither. If
    none of them was scored, the speed of scoring is that of the arithmetic.
    """
    records: list[RunRecord] = []
    scored: list[RunScores] = []
    rows: list[int] = []
    times = {path: path.stat().st_mtime_ns for path in Path(config.outputs).glob("*/result.json")}
    for path in sorted(times, key=times.__getitem__, reverse=True):
        with suppress(UserError):
            record = _record(path, times[path])
            identity, training = record.identity, record.training
            if (identity.model.name, identity.task.name) != (config.model.name, config.task.name):
                continue
            if records and record.execution.device != records[0].execution.device:
                continue
            own = typed(record.config.tree)
            kinds = ((one.train.dtype, one.objective.name, one.tying.method == FULL) for one in (own, config))
            if len(set(kinds)) == 1 and training.tokens_per_s > 0 and training.steps * own.train.batch_size > 0:
                scored.append(read_run_scores(RunFolder(path.parent)))
                records.append(record)
                rows.append(training.steps * own.train.batch_size * answers_to_a_prompt(own))
        if len(records) == NEWEST_RUNS:
            break
    if not records:
        return None
    scores = [one for each in scored for one in each.adapted.values() if one.kind == "answers" and one.seconds > 0]
    scoring, devices = [one.rows / one.seconds for one in scores], {str(each.execution) for each in records}
    source = f"{len(records)} finished runs ({'; '.join(sorted(devices))})"
    if not scoring and (computed := computed_speeds(config, tflops)) is not None:
        scoring, source = [computed.scoring], f"{source}; scoring: {computed.source}"
    return Speeds(
        row_tokens=median(record.training.tokens / count for record, count in zip(records, rows, strict=True)),
        training=median(record.training.tokens_per_s for record in records),
        scoring=median(scoring) if scoring else math.inf,
        peak_memory_bytes=max(record.training.peak_memory_bytes for record in records),
        source=source,
        has_sampling=config.objective.name == "reward",
    )


@functools.lru_cache(maxsize=2000)
def _record(path: Path, _changed: int) -> RunRecord:
    """The record in a result.json, which each model and task of a sweep asks for, as of the time of its last change."""
    return read_record(path)


def computed_speeds(config: Config, tflops: float) -> Speeds | None:
    """The speeds that follow from the model's arithmetic at a rate, on the first training rows; None without rows."""
    sample = examples_here(config, "train")[:SAMPLED_ROWS]
    if not sample:
        return None
    a, rate, is_full = config.model.architecture, 1e12 * tflops, config.tying.method == FULL
    # The tokenizer of random models takes bytes.
    per_character = 1.0 if config.model.source == "random" else 1 / CHARACTERS_PER_TOKEN
    limit = min(config.task.max_prompt_tokens or config.model.context, config.model.context)
    prompts = [min(per_character * len(example.prompt), limit) for example in sample]
    # With the end-of-text token.
    targets = [per_character * len(example.target) + 1 for example in sample]
    prompt, target = mean(prompts), mean(targets)
    # An answer is about as long as a target. Given texts are compared one by one.
    answer = max(len(example.choices) for example in sample) * target or min(target, config.task.max_new_tokens)
    longest = round(max(map(sum, zip(prompts, targets, strict=True))))
    return Speeds(
        row_tokens=prompt + target,
        training=(prompt + target) * rate / arithmetic.training_flop(a, prompt + target, target, is_full),
        scoring=rate / arithmetic.forward_flop(a, prompt + answer, answer),
        peak_memory_bytes=arithmetic.training_bytes(config, longest) + arithmetic.PROCESS_BYTES,
        source=f"arithmetic at {tflops:g} TFLOP/s",
    )


def answers_to_a_prompt(config: Config) -> int:
    """How many rows a prompt of a step becomes: with a reward, its sampled answers."""
    return config.objective.samples if config.objective.name == "reward" else 1


def split_rows(config: Config, split: str) -> int:
    """How many rows of validation or test a run will be scored on; 0 if this is not known here.

    Rows that are generated or read from files are counted.
    """
    asked = getattr(config.task.rows, split)
    if asked is None and split == "validation":
        asked = config.task.validation_from_train or None
    return len(examples_here(config, split)) if asked is None else int(asked)


def examples_here(config: Config, split: str) -> list[Example]:
    """The rows of a split; none if they are the hub's, or cannot be read. (The sweep itself reports that error.)"""
    task = load_task(config.task)
    with suppress(UserError):
        is_here = task.generator or config.data_root or config.task.files.train
        return load_examples(task, split, config.data_root) if is_here else []
    return []


def cost(config: Config, speeds: Speeds, rows: Mapping[str, int]) -> tuple[float, float]:
    """The tokens of training of one run, and its seconds: training, validation losses, and scoring.

    Args:
        rows: split -> its rows.
    """
    train, metrics = config.train, config.score.metrics
    batch_tokens = train.batch_size * speeds.row_tokens
    answers = answers_to_a_prompt(config)
    # Answers are no part of the limit, because they are sampled after the step's prompts are chosen.
    tokens = train.steps * answers * min(batch_tokens, train.batch_tokens or batch_tokens)
    reading, answering = speeds.row_tokens / (2 * speeds.training), 1 / speeds.scoring
    is_sampled = config.objective.name == "reward" and not speeds.has_sampling
    sampled = train.steps * train.batch_size * answers if is_sampled else 0
    evaluations = 2 + ((train.steps - 1) // train.validate_every if train.validate_every else 0)
    # 0 stands for an unknown number of rows, and null takes all.
    validated = min(filter(None, (train.validation_rows, rows["validation"])), default=0)
    validating = validated * reading + train.validation_answers * answering
    # The answers, and the losses of the targets, as score.metrics says.
    scoring = answering if metrics is None or not all(map(is_loss, metrics)) else 0.0
    scoring += reading if metrics is None or any(map(is_loss, metrics)) else 0.0
    scored = sum(rows[split] for split in config.score.splits)
    training = tokens / speeds.training + sampled * answering
    return tokens, training + evaluations * validating + scored * scoring


HEADS = ("model", "task", "cells", "tokens", "hours", "left", "peak memory", "from")
NOTE = Text(
    "Hours are those of one process, without its start. Arithmetic is a rough guide, and half the rate is twice the "
    "time: the first finished run of a model and task replaces it. A staged sweep stops rates early, so it takes less."
)


def described(forecasts: Sequence[TaskForecast], unknown: Sequence[str]) -> list[RenderableType]:
    """What `forecast` has found, to be shown: a table with its sums, and then a line for each cost that is unknown."""
    if not forecasts:
        return [*unknown]
    lines = []
    shown = [(row.model, row.task, [row], f"{row.peak_memory_bytes / 1e9:.1f} GB", row.source) for row in forecasts]
    if len(forecasts) > 1:
        shown.append(("together", "", list(forecasts), "", ""))
    for model, task, rows, memory, source in shown:
        cells, tokens = sum(row.cells for row in rows), sum(row.tokens for row in rows)
        hours = sum(row.seconds for row in rows) / 3600, sum(row.seconds_left for row in rows) / 3600
        amounts = [str(cells), f"{tokens:,.0f}", *(f"{each:,.{0 if each >= 100 else 2}f}" for each in hours)]
        lines.append([model, task, *amounts, memory, source])
    return [screen.table(HEADS, lines, HEADS[2:-1]), NOTE, *unknown]

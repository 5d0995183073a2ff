"""What a sweep will cost, before it is run: tokens, hours and peak memory for each model and task.

The speeds come from finished runs of the same model and task in the same folder of outputs, if there are any. If not,
they are the model's arithmetic (models/arithmetic.py) at a stated rate, on rows that are here: nothing is downloaded.
"""

from __future__ import annotations

import math
import operator
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import tokenizers

from tiedlora.config.identity import run_id
from tiedlora.config.schema import Config
from tiedlora.errors import UserError
from tiedlora.models import arithmetic
from tiedlora.models.identity import EMBEDDED_SHA256
from tiedlora.records.loss_metrics import is_loss
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.run_record import RunRecord
from tiedlora.sweeps.cells import SweepCell, rate_groups
from tiedlora.sweeps.staged_search import LEAST_KEPT
from tiedlora.tasks import Example, load_examples, load_task
from tiedlora.text import aligned

TFLOPS = 0.5
"""The stated rate, in 1e12 operations a second: what two CPU cores with bfloat16 instructions reach in training
(README.md: 1074 tokens/s of a model with 0.45e9 operations a token)."""
NEWEST_RUNS = 20
"""How many finished runs of a model and task are read."""
SAMPLED_ROWS = 200
CHARACTERS_PER_TOKEN = 4.0
"""Assumed for English text if the model's tokenizer is not here."""
FIRST_RUNG, FINALISTS = 0.25, 3
"""The staged sweeper's defaults (conf/hydra/sweeper/staged.yaml): the share of the steps after which a rate may stop,
and the most rates that run at the second seed."""


@dataclass(frozen=True)
class Speeds:
    """How fast the runs of one model and task are."""

    row_tokens: float
    """Mean tokens of a training row."""
    training: float
    """Tokens a second of training steps. Losses are twice as fast: a forward pass is half of the arithmetic."""
    scoring: float
    """Rows a second that are answered."""
    has_base: bool
    """Whether the base model is scored already."""
    peak_memory_bytes: int
    source: str
    """Where the speeds come from, in words."""


@dataclass(frozen=True)
class Cost:
    """What one run costs."""

    tokens: float
    """Of training."""
    training_seconds: float
    """Training steps and validation losses."""
    scoring_seconds: float


@dataclass(frozen=True)
class TaskForecast:
    """What the cells of one model and task will cost, one after the other."""

    model: str
    task: str
    cells: int
    tokens: float
    """Of training, in all cells."""
    seconds: float
    """All cells of the plain grid."""
    seconds_left: float
    """The cells that are not finished."""
    staged_seconds: tuple[float, float]
    """The same grid with the staged sweeper: if all rates that may stop do so at the first rung, and if none does."""
    peak_memory_bytes: int
    source: str


def forecast(sweep_cells: Iterable[SweepCell], tflops: float = TFLOPS) -> tuple[list[TaskForecast], list[str]]:
    """The forecast of each model and task, and a line for each one without a forecast.

    Args:
        sweep_cells: of one sweep, or of several.
        tflops: the rate of the arithmetic, where no run has finished.
    """
    groups: dict[tuple[str, str, str], list[SweepCell]] = {}
    for cell in sweep_cells:
        config = cell.config
        groups.setdefault((config.model.name, config.train.dtype, config.task.name), []).append(cell)
    forecasts, unknown = [], []
    for cells in groups.values():
        config = cells[0].config
        if records := finished_runs(config):
            forecasts.append(_task_forecast(cells, observed_speeds(records)))
        elif examples := examples_here(config, "train"):
            forecasts.append(_task_forecast(cells, computed_speeds(config, examples, tflops)))
        else:
            unknown.append(
                f"{config.task.name}: its rows are not here, so its cost is unknown; set data_root, or run one cell "
                "first"
            )
    return forecasts, list(dict.fromkeys(unknown))


def finished_runs(config: Config) -> list[RunRecord]:
    """The newest finished runs of the configuration's model and task in its folder of outputs."""
    # An id is five words and a hash: configuration, rank, task, model, seed.
    _, _, task, model, *_ = run_id(config).split("-")
    folders = Path(config.outputs).glob(f"*-{task}-{model}-s*/result.json")
    newest = sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)[:NEWEST_RUNS]
    records = []
    for path in newest:
        try:
            record = RunFolder(path.parent).record()
        except UserError:
            continue
        tree = record.config.tree if record else {}
        if record and tree["model"]["name"] == config.model.name and tree["train"]["dtype"] == config.train.dtype:
            records.append(record)
    return records


def observed_speeds(records: Sequence[RunRecord]) -> Speeds:
    """The medians of finished runs of the same model and task."""
    rows = [record.training.steps * int(record.config.tree["train"]["batch_size"]) for record in records]
    scores = [scored for record in records for scored in record.scores.values() if scored.seconds > 0]
    devices = sorted({str(record.execution) for record in records})
    return Speeds(
        row_tokens=median(record.training.tokens / count for record, count in zip(records, rows, strict=True)),
        training=median(record.training.tokens_per_s for record in records),
        scoring=median(scored.rows / scored.seconds for scored in scores) if scores else math.inf,
        has_base=any(scored.base for scored in scores),
        peak_memory_bytes=max(record.training.peak_memory_bytes for record in records),
        source=f"{len(records)} finished runs ({'; '.join(devices)})",
    )


def computed_speeds(config: Config, examples: Sequence[Example], tflops: float) -> Speeds:
    """The speeds that follow from the model's arithmetic at a rate, on a sample of the task's training rows."""
    a, rate, tokenizer = config.model.architecture, 1e12 * tflops, _tokenizer(config)
    sample = random.Random(0).sample(examples, min(SAMPLED_ROWS, len(examples)))

    def tokens(text: str) -> float:
        if config.model.source == "random":
            return len(text.encode())
        if tokenizer is None:
            return len(text) / CHARACTERS_PER_TOKEN
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    limit = min(config.task.max_prompt_tokens or config.model.context, config.model.context)
    prompts = [min(tokens(example.prompt), limit) for example in sample]
    # With the end-of-text token.
    targets = [tokens(example.target) + 1 for example in sample]
    prompt, target = mean(prompts), mean(targets)
    # An answer is about as long as a target. Given texts are compared one by one.
    answer = max(len(example.choices) for example in sample) * target or min(target, config.task.max_new_tokens)
    longest = round(max(map(operator.add, prompts, targets)))
    return Speeds(
        row_tokens=prompt + target,
        training=(prompt + target) * rate / arithmetic.training_flop(a, prompt + target, target),
        scoring=rate / arithmetic.forward_flop(a, prompt + answer, answer),
        has_base=False,
        peak_memory_bytes=arithmetic.training_bytes(config, longest) + arithmetic.PROCESS_BYTES,
        source=f"arithmetic at {tflops:g} TFLOP/s",
    )


def split_rows(config: Config, split: str) -> int | None:
    """How many rows of validation or test a run will be scored on; None if this is not known here.

    Rows that are generated or read from data_root are counted.
    """
    asked = getattr(config.task.rows, split)
    if asked is not None:
        return int(asked)
    if split == "validation" and config.task.validation_from_train:
        return config.task.validation_from_train
    examples = examples_here(config, split)
    return None if examples is None else len(examples)


def examples_here(config: Config, split: str) -> list[Example] | None:
    """The rows of a split; None if they are the hub's, or cannot be read. (The sweep itself reports that error.)"""
    if config.data_root is None and not load_task(config.task).generator:
        return None
    try:
        return load_examples(load_task(config.task), split, config.data_root)
    except UserError:
        return None


def _tokenizer(config: Config) -> tokenizers.Tokenizer | None:
    """The tokenizer of a local or converted model; None if it is not here. transformers is not imported."""
    if config.model.path:
        folder = Path(config.model.path)
    elif config.model.source == "embedded":
        folder = Path(config.cache) / "models" / f"smollm2-135m-instruct-{EMBEDDED_SHA256[:12]}"
    else:
        return None
    path = folder / "tokenizer.json"
    return tokenizers.Tokenizer.from_file(str(path)) if path.is_file() else None


def cost(config: Config, speeds: Speeds, rows: Mapping[str, int]) -> Cost:
    """What one run costs. The base model's scores, which runs share, are not in it.

    Args:
        rows: split -> its rows.
    """
    train = config.train
    batch_tokens = train.batch_size * speeds.row_tokens
    tokens = train.steps * min(batch_tokens, train.batch_tokens or batch_tokens)
    evaluations = 2 + ((train.steps - 1) // train.validate_every if train.validate_every else 0)
    validated = evaluations * (train.validation_rows or rows["validation"]) * speeds.row_tokens
    validating = validated / (2 * speeds.training) + evaluations * train.validation_answers / speeds.scoring
    # The answers, and the losses of the targets, as score.metrics says.
    metrics = config.score.metrics
    answering = 1 / speeds.scoring if metrics is None or not all(map(is_loss, metrics)) else 0.0
    reading = speeds.row_tokens / (2 * speeds.training) if metrics is None or any(map(is_loss, metrics)) else 0.0
    scoring = (answering + reading) * sum(rows[split] for split in config.score.splits)
    return Cost(tokens, tokens / speeds.training + validating, scoring)


def _task_forecast(cells: Sequence[SweepCell], speeds: Speeds) -> TaskForecast:
    """The forecast of the cells of one model and task, which have the same splits."""
    config = cells[0].config
    rows = {split: split_rows(config, split) or 0 for split in {"validation", *config.score.splits}}
    base = 0.0
    if config.score.base and not speeds.has_base:
        # It is scored once for all.
        base = cost(config, speeds, rows).scoring_seconds
    tokens, seconds, left, low, high = 0.0, base, base, base, base
    for group in rate_groups(cells).values():
        # Only rate and seed differ, so all of them cost the same.
        run, rates, seeds = (
            cost(group[0].config, speeds, rows),
            {c.name.lr for c in group},
            {c.name.seed for c in group},
        )
        whole = run.training_seconds + run.scoring_seconds
        tokens += run.tokens * len(group)
        seconds += whole * len(group)
        left += whole * sum(not cell.finished() for cell in group)
        fewest, most = staged_runs(len(rates), len(seeds))
        # Only the chosen runs are scored.
        low += fewest * run.training_seconds + len(seeds) * run.scoring_seconds
        high += most * run.training_seconds + len(seeds) * run.scoring_seconds
    name, memory = cells[0].name, speeds.peak_memory_bytes
    return TaskForecast(name.model, name.task, len(cells), tokens, seconds, left, (low, high), memory, speeds.source)


def staged_runs(rates: int, seeds: int) -> tuple[float, float]:
    """The least and the most training that the staged sweeper needs for one configuration, in whole runs.

    It is assumed that no rate outside the grid is tried, and that the rate that is chosen last was a finalist.
    """
    fewest, most = min(LEAST_KEPT, rates), min(FINALISTS, rates)
    low, high = fewest + (rates - fewest) * FIRST_RUNG, float(rates)
    # The finalists run at the second seed, and the chosen rate at the others.
    return (low + fewest + seeds - 2, high + most + seeds - 2) if seeds > 1 else (low, high)


NOTE = """\
Hours are those of one process, without its start. Arithmetic is a rough guide, and half the rate is twice the time: the
first finished run of a model and task replaces it. Staged: from the case that every rate which may stop does so at the
first rung, to the case that none stops."""


def described(forecasts: Sequence[TaskForecast], unknown: Sequence[str]) -> str:
    """What `forecast` has found, as text: a table with its sums, and then a line for each cost that is unknown."""
    if not forecasts:
        return "\n".join(unknown)
    lines = [["model", "task", "cells", "tokens", "hours", "left", "hours, staged", "peak memory", "from"]]
    for row in forecasts:
        lines.append([row.model, row.task, *_amounts([row]), f"{row.peak_memory_bytes / 1e9:.1f} GB", row.source])
    if len(forecasts) > 1:
        lines.append(["together", "", *_amounts(forecasts), "", ""])
    return "\n".join([aligned(lines), NOTE, *unknown])


def _amounts(rows: Sequence[TaskForecast]) -> list[str]:
    low, high = (sum(row.staged_seconds[place] for row in rows) for place in (0, 1))
    staged = _hours(low) if low == high else f"{_hours(low)} to {_hours(high)}"
    whole, left = sum(row.seconds for row in rows), sum(row.seconds_left for row in rows)
    cells, tokens = sum(row.cells for row in rows), sum(row.tokens for row in rows)
    return [str(cells), f"{tokens:,.0f}", _hours(whole), _hours(left), staged]


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.{0 if seconds >= 360_000 else 2}f}"

"""What a sweep will cost, before it is run: tokens, hours and peak memory for each model and task.

The speeds come from finished runs of the same model and task in the same folder of outputs, if there are any. If not,
they are the model's arithmetic (models/arithmetic.py) at a stated rate, on rows that are here: nothing is downloaded.
"""

from __future__ import annotations

import math
import operator
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
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
RUNGS, FINALISTS, SEARCH_SEEDS = (0.25, 0.5), (2, 3), 2
"""The staged sweeper's defaults (conf/hydra/sweeper/staged.yaml): the shares of the steps after which a rate may stop,
the fewest and the most rates that run at the second seed, and the seeds that search."""


@dataclass(frozen=True)
class Speeds:
    """How fast the runs of one model and task are."""

    row_tokens: float
    """Mean tokens of a training row."""
    training: float
    """Tokens a second of training steps."""
    validating: float
    """Tokens a second of a validation loss."""
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
            speeds = observed_speeds(records)
        elif (examples := examples_here(config, "train")) is not None:
            speeds = computed_speeds(config, examples, tflops)
        else:
            name = config.task.name
            unknown.append(
                f"{name}: its rows are not here, so its cost is unknown; set data_root, or run one cell first"
            )
            continue
        forecasts.append(_task_forecast(cells, speeds))
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
    training = median(record.training.tokens_per_s for record in records)
    rows = [record.training.steps * int(record.config.tree["train"]["batch_size"]) for record in records]
    scores = [scored for record in records for scored in record.scores.values() if scored.seconds > 0]
    devices = sorted({str(record.execution) for record in records})
    return Speeds(
        row_tokens=median(record.training.tokens / count for record, count in zip(records, rows, strict=True)),
        training=training,
        # A validation loss is a forward pass only, half of the arithmetic.
        validating=2 * training,
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
        validating=(prompt + target) * rate / arithmetic.forward_flop(a, prompt + target, target),
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
    validating = validated / speeds.validating + evaluations * train.validation_answers / speeds.scoring
    # The answers, and the losses of the targets, as score.metrics says.
    metrics = config.score.metrics
    answering = 1 / speeds.scoring if metrics is None or not all(map(is_loss, metrics)) else 0.0
    reading = speeds.row_tokens / speeds.validating if metrics is None or any(map(is_loss, metrics)) else 0.0
    scoring = (answering + reading) * sum(rows[split] for split in config.score.splits)
    return Cost(tokens, tokens / speeds.training + validating, scoring)


def _task_forecast(cells: Sequence[SweepCell], speeds: Speeds) -> TaskForecast:
    """The forecast of the cells of one model and task, which have the same splits."""
    config = cells[0].config
    rows = {split: split_rows(config, split) or 0 for split in {"validation", *config.score.splits}}
    costs = {cell.run_id: cost(cell.config, speeds, rows) for cell in cells}
    # The base model is scored once for all.
    base = costs[cells[0].run_id].scoring_seconds if config.score.base and not speeds.has_base else 0.0
    seconds = {run_id: cost.training_seconds + cost.scoring_seconds for run_id, cost in costs.items()}
    low = high = base
    for group in rate_groups(cells).values():
        rates, seeds = (len(set(values)) for values in zip(*((c.name.lr, c.name.seed) for c in group), strict=True))
        fewest, most = staged_seconds([costs[cell.run_id] for cell in group], rates, seeds)
        low, high = low + fewest, high + most
    return TaskForecast(
        model=cells[0].name.model,
        task=cells[0].name.task,
        cells=len(cells),
        tokens=sum(cost.tokens for cost in costs.values()),
        seconds=base + sum(seconds.values()),
        seconds_left=base + sum(seconds[cell.run_id] for cell in cells if not cell.finished()),
        staged_seconds=(low, high),
        peak_memory_bytes=speeds.peak_memory_bytes,
        source=speeds.source,
    )


def staged_seconds(costs: Sequence[Cost], rates: int, seeds: int) -> tuple[float, float]:
    """The least and the most that the staged sweeper needs for one configuration's rates and seeds.

    It is assumed that no rate outside the grid is tried, and that the rate that is chosen last was a finalist.
    """
    training, scoring = mean(cost.training_seconds for cost in costs), mean(cost.scoring_seconds for cost in costs)
    low, high = staged_runs(rates, seeds)
    return low * training + seeds * scoring, high * training + seeds * scoring


def staged_runs(rates: int, seeds: int) -> tuple[float, float]:
    """The least and the most training that the staged sweeper needs, in whole runs."""
    fewest, most = (min(count, rates) for count in FINALISTS)
    later = max(0, seeds - SEARCH_SEEDS)
    second = (fewest, most) if seeds >= SEARCH_SEEDS else (0, 0)
    low = fewest + (rates - fewest) * min(RUNGS, default=1.0)
    return low + second[0] + later, rates + second[1] + later


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
        memory = f"{row.peak_memory_bytes / 1e9:.1f} GB"
        lines.append([row.model, row.task, str(row.cells), *_amounts([row]), memory, row.source])
    if len(forecasts) > 1:
        cells = sum(row.cells for row in forecasts)
        lines.append(["together", "", str(cells), *_amounts(forecasts), "", ""])
    return "\n".join([aligned(lines), NOTE, *unknown])


def _amounts(rows: Sequence[TaskForecast]) -> list[str]:
    low, high = (sum(row.staged_seconds[place] for row in rows) for place in (0, 1))
    staged = _hours(low) if low == high else f"{_hours(low)} to {_hours(high)}"
    all_cells, left = sum(row.seconds for row in rows), sum(row.seconds_left for row in rows)
    return [f"{sum(row.tokens for row in rows):,.0f}", _hours(all_cells), _hours(left), staged]


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2f}"


def to_json(forecasts: Iterable[TaskForecast]) -> list[Mapping[str, object]]:
    """The forecasts as plain data, for programs."""
    return [asdict(row) for row in forecasts]

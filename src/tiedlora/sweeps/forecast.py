"""What a sweep will cost, before it is run: tokens, hours and peak memory for each model and task.

The speeds come from finished runs of the same model and task in the same folder of outputs, if there are any. If not,
they come from one block of the model, measured on this device, and from the model's arithmetic (models/arithmetic.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median

from tiedlora.config.identity import run_id
from tiedlora.config.schema import Config
from tiedlora.errors import UserError
from tiedlora.models import arithmetic
from tiedlora.models.arithmetic import DeviceSpeed
from tiedlora.records.loss_metrics import is_loss
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.run_record import RunRecord
from tiedlora.runs import lazy
from tiedlora.sweeps.cells import SweepCell
from tiedlora.sweeps.planned_rows import CHARACTERS_PER_TOKEN, RowCounts, RowLengths, row_lengths
from tiedlora.sweeps.selection import rate_groups
from tiedlora.text import aligned

MEASURED_SECONDS = 1.5
"""The time of the measurement, all models of a sweep together."""
LOSS_SHARE = 0.3
"""The share of the products' rate that the output head reaches with its softmax, on two CPU cores. On a GPU untried."""
NEWEST_RUNS = 20
"""How many finished runs of a model and task are read."""
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
    scoring_base: float
    """The same for the base model, whose answers seldom end before max_new_tokens; infinite if it is scored already."""
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


def forecast(sweep_cells: Iterable[SweepCell]) -> tuple[list[TaskForecast], list[str]]:
    """The forecast of each model and task, and a line for each one without a forecast.

    Args:
        sweep_cells: of one sweep, or of several.
    """
    groups: dict[tuple[str, str, str], list[SweepCell]] = {}
    for cell in sweep_cells:
        config = cell.config
        groups.setdefault((config.model.name, config.train.dtype, config.task.name), []).append(cell)
    observed = {key: finished_runs(cells[0].config) for key, cells in groups.items()}
    lengths = {key: row_lengths(cells[0].config) for key, cells in groups.items() if not observed[key]}
    models = {key[:2] for key, found in lengths.items() if found is not None}
    speeds: dict[tuple[str, str], DeviceSpeed] = {}
    forecasts, unknown, counts = [], [], RowCounts()
    for key, cells in groups.items():
        config = cells[0].config
        if records := observed[key]:
            known = observed_speeds(config, records)
        elif (found := lengths[key]) is None:
            name = config.task.name
            unknown.append(
                f"{name}: its rows are not here, so its cost is unknown; set data_root, or run one cell first"
            )
            continue
        else:
            if key[:2] not in speeds:
                row = found.prompt + found.target
                speeds[key[:2]] = lazy.device_speed(config, MEASURED_SECONDS / len(models), found.prompt, row)
            known = computed_speeds(config, found, speeds[key[:2]])
        forecasts.append(_task_forecast(cells, known, counts))
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


def observed_speeds(config: Config, records: Sequence[RunRecord]) -> Speeds:
    """The medians of finished runs of the same model and task."""
    training = median(record.training.tokens_per_s for record in records)
    tokens = [record.training.tokens / (record.training.steps * _batch(record)) for record in records]
    scores = [scored for record in records for scored in record.scores.values() if scored.seconds > 0]
    scoring = median(scored.rows / scored.seconds for scored in scores) if scores else math.inf
    has_base = any(scored.base for scored in scores)
    answers = [scored.output_tokens / scored.rows for scored in scores if scored.output_tokens]
    longer = config.task.max_new_tokens / median(answers) if answers else 1.0
    devices = sorted({str(record.execution) for record in records})
    return Speeds(
        row_tokens=median(tokens),
        training=training,
        # A validation loss is a forward pass only, half of the arithmetic.
        validating=2 * training,
        scoring=scoring,
        scoring_base=math.inf if has_base else scoring / max(1.0, longer),
        peak_memory_bytes=max(record.training.peak_memory_bytes for record in records),
        source=f"{len(records)} finished runs ({'; '.join(devices)})",
    )


def _batch(record: RunRecord) -> int:
    return int(record.config.tree["train"]["batch_size"])


def computed_speeds(config: Config, rows: RowLengths, speed: DeviceSpeed) -> Speeds:
    """The speeds that follow from the measured block and the model's arithmetic. Blocks count as not compiled."""
    a, tokens = config.model.architecture, rows.prompt + rows.target
    head = arithmetic.head_flop(a, rows.target) / (LOSS_SHARE * speed.flop_per_s)
    # The head's backward pass has one more product. A validation loss is a forward pass only, half of the arithmetic.
    training = tokens * a.layers * speed.training_seconds + 2 * head
    validating = training / 2
    # An adapted model's answers are about as long as the targets.
    answer = _seconds_of_answer(config, rows, speed, min(rows.target, config.task.max_new_tokens))
    counted = "" if rows.is_exact else f", {CHARACTERS_PER_TOKEN:g} characters a token"
    untried = ", untried on a GPU" if speed.is_gpu else ""
    return Speeds(
        row_tokens=tokens,
        training=tokens / training,
        validating=tokens / validating,
        scoring=1 / answer,
        scoring_base=1 / _seconds_of_answer(config, rows, speed, config.task.max_new_tokens),
        peak_memory_bytes=arithmetic.training_bytes(config, rows.longest)
        + (0 if speed.is_gpu else arithmetic.PROCESS_BYTES),
        source=f"a measured block and arithmetic ({speed.device}{counted}{untried})",
    )


def _seconds_of_answer(config: Config, rows: RowLengths, speed: DeviceSpeed, new_tokens: float) -> float:
    """The time to score one row: the prompt, and then an answer of so many tokens, or each of the choices."""
    a = config.model.architecture
    head, forward = arithmetic.head_flop(a, 1) / (LOSS_SHARE * speed.flop_per_s), a.layers * speed.training_seconds / 2
    prompt = rows.prompt * forward + head
    if rows.choices:
        return prompt + rows.choices * rows.target * (forward + head)
    return prompt + new_tokens * (a.layers * speed.answering_seconds + head)


def cost(config: Config, speeds: Speeds, counts: RowCounts) -> Cost:
    """What one run costs. The base model's scores, which runs share, are not in it."""
    train = config.train
    batch_tokens = train.batch_size * speeds.row_tokens
    tokens = train.steps * min(batch_tokens, train.batch_tokens or batch_tokens)
    evaluations = 2 + ((train.steps - 1) // train.validate_every if train.validate_every else 0)
    validation_rows = train.validation_rows or counts.rows(config, "validation")
    validated = evaluations * validation_rows * speeds.row_tokens
    validating = validated / speeds.validating + evaluations * train.validation_answers / speeds.scoring
    scoring = _seconds_of_scoring(config, speeds, speeds.scoring, counts)
    return Cost(tokens, tokens / speeds.training + validating, scoring)


def _seconds_of_scoring(config: Config, speeds: Speeds, answers_per_s: float, counts: RowCounts) -> float:
    """The time to score every split: the answers, and the losses of the targets, as score.metrics says."""
    metrics = config.score.metrics
    seconds_per_row = 0.0
    if metrics is None or not all(map(is_loss, metrics)):
        seconds_per_row += 1 / answers_per_s
    if metrics is None or any(map(is_loss, metrics)):
        seconds_per_row += speeds.row_tokens / speeds.validating
    return seconds_per_row * sum(counts.rows(config, split) for split in config.score.splits)


def _task_forecast(cells: Sequence[SweepCell], speeds: Speeds, counts: RowCounts) -> TaskForecast:
    config, named = cells[0].config, cells[0].parameters()
    costs = {cell.run_id: cost(cell.config, speeds, counts) for cell in cells}
    base = 0.0
    if config.score.base and not math.isinf(speeds.scoring_base):
        base = _seconds_of_scoring(config, speeds, speeds.scoring_base, counts)
    seconds = {run_id: cost.training_seconds + cost.scoring_seconds for run_id, cost in costs.items()}
    low = high = base
    for group in rate_groups(cells).values():
        fewest, most = staged_seconds([costs[cell.run_id] for cell in group], *_rates_and_seeds(group))
        low, high = low + fewest, high + most
    return TaskForecast(
        model=named.model,
        task=named.task,
        cells=len(cells),
        tokens=sum(cost.tokens for cost in costs.values()),
        seconds=base + sum(seconds.values()),
        seconds_left=base + sum(seconds[cell.run_id] for cell in cells if not cell.finished()),
        staged_seconds=(low, high),
        peak_memory_bytes=speeds.peak_memory_bytes,
        source=speeds.source,
    )


def _rates_and_seeds(group: Iterable[SweepCell]) -> tuple[int, int]:
    group = list(group)
    return len({cell.config.train.lr for cell in group}), len({cell.config.seed for cell in group})


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
Hours are those of one process, without its start. The first finished runs of a model and task make them more exact.
Staged: from the case that every rate which may stop does so at the first rung, to the case that none stops."""


def table(forecasts: Sequence[TaskForecast]) -> str:
    """The forecasts as a table with their sums, and what the reader must know."""
    lines = [["model", "task", "cells", "tokens", "hours", "left", "hours, staged", "peak memory", "from"]]
    for row in forecasts:
        lines.append([row.model, row.task, str(row.cells), *_amounts([row]), _gigabytes(row), row.source])
    if len(forecasts) > 1:
        cells = sum(row.cells for row in forecasts)
        lines.append(["together", "", str(cells), *_amounts(forecasts), "", ""])
    return f"{aligned(lines)}\n{NOTE}"


def described(forecasts: Sequence[TaskForecast], unknown: Sequence[str]) -> str:
    """What `forecast` has found, as text: the table, and then a line for each cost that is unknown."""
    return "\n".join([*([table(forecasts)] if forecasts else []), *unknown])


def _amounts(rows: Sequence[TaskForecast]) -> list[str]:
    low, high = (sum(row.staged_seconds[place] for row in rows) for place in (0, 1))
    staged = _hours(low) if low == high else f"{_hours(low)} to {_hours(high)}"
    all_cells, left = sum(row.seconds for row in rows), sum(row.seconds_left for row in rows)
    return [f"{sum(row.tokens for row in rows):,.0f}", _hours(all_cells), _hours(left), staged]


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2f}"


def _gigabytes(row: TaskForecast) -> str:
    return f"{row.peak_memory_bytes / 1e9:.1f} GB"


def to_json(forecasts: Iterable[TaskForecast]) -> list[Mapping[str, object]]:
    """The forecasts as plain data, for programs."""
    return [asdict(row) for row in forecasts]

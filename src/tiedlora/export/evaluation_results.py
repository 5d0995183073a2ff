"""A run's scores as the hub reads them: `model-index` in a model card, and .eval_results/ for a hub's benchmark."""

from __future__ import annotations

import re
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.repocard_data import eval_results_to_model_index

from tiedlora.config.schema import FORGETTING, Config
from tiedlora.records.interval import Interval
from tiedlora.records.loss_metrics import is_loss
from tiedlora.records.run_record import RunRecord, SplitScores

COMMIT = re.compile(r"[0-9a-f]{40}")


def model_index(record: RunRecord, config: Config, name: str) -> list[dict[str, Any]]:
    """The value of `model-index`: every metric of every split with its interval; empty if nothing is scored.

    Args:
        name: the model's name on its card.
    """
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=config.task.hub.id or config.task.name,
            dataset_name=config.task.name,
            dataset_config=config.task.hub.subset,
            dataset_split=_rows_of(split, config),
            dataset_revision=_commit(config),
            metric_type=metric,
            metric_name=f"{metric} ({interval_words(scores, metric, interval)})",
            metric_value=interval.value,
            metric_args={"low": interval.low, "high": interval.high, "level": 0.95, "rows": scores.rows},
        )
        for split, scores in record.scores.items()
        if split != FORGETTING
        for metric, interval in scores.metrics.items()
    ]
    index: list[dict[str, Any]] = eval_results_to_model_index(name, results) if results else []
    return index


def benchmark_file(record: RunRecord, config: Config) -> tuple[str, str] | None:
    """The path and the text of .eval_results/TASK.yaml, for a leaderboard of the hub.

    None unless the scored rows are the whole test split of a data set on the hub, and the metric is no loss. A study's
    record does not say whether its rows came from the hub.
    """
    scores = record.scores.get("test")
    if config.task.hub.id is None or scores is None or is_loss(scores.first_metric):
        return None
    is_whole = config.task.hub.splits.get("test") == "test" and config.task.rows.test is None
    if not is_whole or config.data_root is not None or record.left_out:
        return None
    interval = scores.metrics[scores.first_metric]
    words = interval_words(scores, scores.first_metric, interval)
    entry = EvalResultEntry(
        dataset_id=config.task.hub.id,
        task_id=config.task.hub.subset or "default",
        dataset_revision=_commit(config),
        value=interval.value,
        notes=f"{scores.first_metric} of one seed, {words}; greedy decoding by tiedlora",
    )
    text: str = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
    return f".eval_results/{re.sub(r'[^A-Za-z0-9._-]', '_', config.task.name)}.yaml", text


def interval_words(scores: SplitScores, metric: str, interval: Interval) -> str:
    """Such as `95 % interval 0.295 to 0.413 over 250 rows`."""
    unit = " nats per token" if is_loss(metric) else ""
    return f"95 % interval {interval.low:.3f} to {interval.high:.3f}{unit} over {scores.rows} rows"


def _rows_of(split: str, config: Config) -> str:
    """Our split as the hub names it, such as validation[2000:]; in words where the harness cuts it out of train."""
    hub = config.task.hub
    if hub.id is None:
        return split
    return hub.splits.get(split, f"{split}, cut out of {hub.splits.get('train', 'train')}")


def _commit(config: Config) -> str | None:
    """The revision of the data set, if it is a commit: a branch moves."""
    revision = config.task.hub.revision
    return revision if COMMIT.fullmatch(revision) else None

"""Runs in the shared evaluation schema Every Eval Ever (arXiv 2606.14516, schema 0.3.0): a file a run, with its rows.

A run becomes data/TASK/tiedlora/RUN/UUID.json, with every score, its interval and how it was made, and beside it
UUID_samples.jsonl, with one line for each row and metric. `every_eval_ever validate data/*/*/*/*` checks them.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tiedlora import storage
from tiedlora.analysis.runs import Run
from tiedlora.config.schema import FORGETTING
from tiedlora.errors import UserError
from tiedlora.records.interval import Interval
from tiedlora.records.loss_metrics import is_loss
from tiedlora.records.rows import PredictionRow
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.run_record import SplitScores

SCHEMA_VERSION = "0.3.0"
DEVELOPER = "tiedlora"
"""The developer of an adapted model in the schema: this harness has trained it."""
GLOBAL_METRICS = {
    "accuracy": "accuracy",
    "f1": "f1",
    "exact_match": "exact-match",
    "exact_match_strict": "exact-match",
    "bleu": "bleu",
    "chrf": "chrf",
    "rouge1": "rouge-1",
    "rouge2": "rouge-2",
    "rougeL": "rouge-l",
}
"""Our metrics that other programs have too -> the name in the schema's registry. Others get one of this project."""


def export(runs: Sequence[Run], folder: Path) -> int:
    """Write every scored run. A run that is written again has the same files.

    Returns:
        How many runs were written.

    Raises:
        UserError: the predictions of a run are damaged.
        OSError: the disk is full, or there is no permission.
    """
    scored = [run for run in runs if _splits(run)]
    for run in scored:
        _write(run, folder)
    return len(scored)


def _splits(run: Run) -> dict[str, SplitScores]:
    """The scored splits of the task. The losses of neutral text belong to no benchmark."""
    return {split: scores for split, scores in run.splits.items() if split != FORGETTING}


def _write(run: Run, folder: Path) -> None:
    # The schema asks for a random UUID. One from the run's id makes a second export replace the first.
    name = uuid.UUID(bytes=hashlib.sha256(run.run_id.encode()).digest()[:16], version=4)
    place = f"data/{run.task}/{DEVELOPER}/{run.run_id}"
    rows = "".join(json.dumps(row) + "\n" for row in _rows(run)).encode()
    tree = _log(run)
    if rows:
        samples = f"{place}/{name}_samples.jsonl"
        tree["detailed_evaluation_results"] = {
            "format": "jsonl",
            "file_path": samples,
            "hash_algorithm": "sha256",
            "checksum": hashlib.sha256(rows).hexdigest(),
            "total_rows": rows.count(b"\n"),
        }
        storage.write_bytes(folder / samples, rows)
    storage.write_json(folder / place / f"{name}.json", tree)


def _log(run: Run) -> dict[str, Any]:
    record = run.record
    ended = str(int(RunFolder(run.path).result_file.stat().st_mtime))
    return {
        "schema_version": SCHEMA_VERSION,
        "evaluation_id": _evaluation_id(run),
        "evaluation_timestamp": ended,
        "retrieved_timestamp": ended,
        "source_metadata": {
            "source_name": "tiedlora",
            "source_type": "evaluation_run",
            "source_organization_name": "unknown",
            "evaluator_relationship": "first_party",
            "additional_details": {"code": str(record.code), "seed": str(run.seed), "device": str(record.execution)},
        },
        "eval_library": {
            "name": "tiedlora",
            "version": _own_version(),
            "additional_details": {name: str(number) for name, number in record.versions.items()},
        },
        "model_info": {
            "name": f"{run.configuration} r={run.rank} on {record.base.name}, seed {run.seed}",
            "id": _model_id(run),
            "developer": DEVELOPER,
            "inference_engine": {
                "name": "transformers",
                "version": str(record.versions.get("transformers", "unknown")),
            },
            "additional_details": {
                "deployment_type": "self_deployed",
                "model_availability": "open_weights",
                "base_model": record.base.name,
                "base_model_digest": str(record.base.digest),
                "trainable_parameters": str(run.params),
                "learning_rate": f"{run.lr:g}",
            },
        },
        "evaluation_results": [
            _result(run, split, scores, metric, interval)
            for split, scores in _splits(run).items()
            for metric, interval in scores.metrics.items()
        ],
    }


def _evaluation_id(run: Run) -> str:
    return f"{run.task}/{_model_id(run)}"


def _model_id(run: Run) -> str:
    return f"{DEVELOPER}/{run.run_id}"


def _result_id(split: str, metric: str) -> str:
    return f"{split}.{metric}"


def _own_version() -> str:
    try:
        return version("tiedlora")
    except PackageNotFoundError:
        return "unknown"


def _result(run: Run, split: str, scores: SplitScores, metric: str, interval: Interval) -> dict[str, Any]:
    return {
        "evaluation_result_id": _result_id(split, metric),
        "evaluation_name": f"{run.task}.{split}",
        "source_data": _source(run, split, scores),
        "metric_config": _metric(scores, metric),
        "score_details": {
            "score": interval.value,
            "uncertainty": {
                "confidence_interval": {
                    "lower": interval.low,
                    "upper": interval.high,
                    "confidence_level": 0.95,
                    "method": "over rows: Wilson's interval if every row scores 0 or 1, otherwise a bootstrap",
                },
                "num_samples": scores.rows,
            },
            "details": _against_base(scores, metric),
        },
        "generation_config": {"generation_args": _generation(run), "additional_details": {"decoding": "greedy"}},
    }


def _source(run: Run, split: str, scores: SplitScores) -> dict[str, Any]:
    hub = _mapping(_mapping(run.record.config.tree.get("task")).get("hub"))
    details = {"rows_sha256": scores.digest}
    if isinstance(hub.get("id"), str):
        return {
            "dataset_name": run.task,
            "source_type": "hf_dataset",
            "hf_repo": hub["id"],
            "hf_split": str(_mapping(hub.get("splits")).get(split, split)),
            "samples_number": scores.rows,
            "additional_details": details,
        }
    details["origin"] = "rows that the task generates; its options are part of the run's configuration"
    return {"dataset_name": run.task, "source_type": "other", "additional_details": details}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _metric(scores: SplitScores, metric: str) -> dict[str, Any]:
    signature = (scores.signatures or {}).get(metric)
    known = GLOBAL_METRICS.get(metric)
    common: dict[str, Any] = {
        "metric_id": known or f"{DEVELOPER}.{metric}",
        "metric_name": metric,
        "score_type": "continuous",
        "min_score": 0.0,
        **({"additional_details": {"implementation": signature}} if signature else {}),
    }
    if is_loss(metric):
        return {
            **common,
            "metric_kind": "cross_entropy",
            "metric_unit": "nats per token",
            "lower_is_better": True,
            "max_score": "Infinity",
        }
    return {
        **common,
        "metric_kind": known or metric,
        "metric_unit": "proportion",
        "lower_is_better": False,
        "max_score": 1.0,
    }


def _against_base(scores: SplitScores, metric: str) -> dict[str, str]:
    """The base model's score and the gain over it, as texts: the schema has no place for a comparison."""
    details = {}
    for name, others in (("base", scores.base), ("gain_over_base", scores.gain)):
        if others is not None:
            other = others[metric]
            details[name] = f"{other.value:.6g} [{other.low:.6g}, {other.high:.6g}]"
    return details


def _generation(run: Run) -> dict[str, Any]:
    task = _mapping(run.record.config.tree.get("task"))
    arguments: dict[str, Any] = {"temperature": 0.0}
    if isinstance(task.get("max_new_tokens"), int):
        arguments["max_tokens"] = task["max_new_tokens"]
    if isinstance(task.get("prompt"), str):
        arguments["prompt_template"] = task["prompt"]
    return arguments


def _rows(run: Run) -> Iterator[dict[str, Any]]:
    for split, scores in _splits(run).items():
        try:
            rows = run.rows(split)
        except UserError:
            # A study may keep the scores without the rows; then there is no file of rows.
            if run.record.left_out:
                continue
            raise
        for metric in scores.metrics:
            # A corpus metric has no score of a single row.
            scored = [(row, row.scores[metric]) for row in rows if metric in row.scores]
            yield from (_row(run, split, metric, row, score) for row, score in scored if not isinstance(score, list))


def _row(run: Run, split: str, metric: str, row: PredictionRow, score: float) -> dict[str, Any]:
    text = {"raw": row.prompt, "reference": list(row.references)}
    same = json.dumps(text, sort_keys=True, separators=(",", ":")).encode()
    output = row.output if row.has_answer else ""
    return {
        "schema_version": SCHEMA_VERSION,
        "evaluation_id": _evaluation_id(run),
        "model_id": _model_id(run),
        "evaluation_name": f"{run.task}.{split}",
        "evaluation_result_id": _result_id(split, metric),
        "sample_id": row.id,
        "sample_hash": hashlib.sha256(same).hexdigest(),
        "interaction_type": "single_turn",
        "input": {**text, **({"choices": row.choices} if row.choices is not None else {})},
        "output": {"raw": [output]},
        "answer_attribution": [
            {
                "turn_idx": 0,
                "source": "output.raw",
                "extracted_value": output,
                "extraction_method": f"tiedlora {metric}",
                "is_terminal": True,
            }
        ],
        # A loss has no right and wrong.
        "evaluation": {"score": float(score), "is_correct": not is_loss(metric) and score == 1.0},
        "metadata": {"ended": row.ended, "shortened": str(row.shortened).lower()},
    }

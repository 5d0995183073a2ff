"""What a finished run left, read and checked: result.json and predictions/. Whoever wrote them, wrong is one line.

Needs no torch, no Hydra: the report, the sweeps and the scripts read runs through here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tiedlora import storage
from tiedlora.errors import UserError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,95}")
"""What conf/ allows as the name of a model, task or configuration; anything else in a record is not ours."""
SPLITS = ("train", "validation", "test")
MOST = 2**63
"""Numbers of a record stay below it; arithmetic and tables need no more care."""


def is_name(value: Any) -> bool:
    """Whether `value` may name a model, a task or a configuration, and so be a part of a path."""
    return isinstance(value, str) and NAME.fullmatch(value) is not None and ".." not in value


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number of a record."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < MOST


def read_result(path: Path) -> dict[str, Any]:
    """The record of a finished run.

    Raises:
        UserError: naming the file, and the key that is missing or wrong.
    """
    record = storage.read_json(path)
    try:
        check(record)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return record


def check(record: dict[str, Any]) -> None:
    """Refuse a record that its readers could not read to its end.

    Raises:
        UserError: naming the key.
    """
    for key, kind in _SCHEMA.items():
        value: Any = record
        for name in key.split("."):
            if not isinstance(value, dict) or name not in value:
                raise UserError(f"has no '{key}', so it is not a run's record of this project")
            value = value[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not _FLAG):
            raise UserError(f"'{key}' is {value!r:.60}, which is no run's")
        if kind is not _FLAG and isinstance(value, (int, float)) and not is_number(value):
            raise UserError(f"'{key}' is not a finite number below 2**63")
    if record.get("status") != "done":
        raise UserError(f"its status is {record.get('status')!r:.60}, not 'done'")
    for key in ("identity.task.name", "identity.model.name", "base.name", "config.tying.name", "config.task.name"):
        value = record
        for name in key.split("."):
            value = value[name]
        if not is_name(value):
            raise UserError(f"'{key}' is {value!r:.60}, which is no name of this project")
    if not RUN_ID.fullmatch(record["run_id"]):
        raise UserError(f"'run_id' is {record['run_id']!r:.60}, which is no name of this project")
    for part in "ABuv":
        if not isinstance(record["identity"]["tying"].get(part, {}), dict):
            raise UserError(f"'identity.tying.{part}' is not an object")
    for split, data in record["data"].items():
        if split not in SPLITS or not isinstance(data, dict) or not isinstance(data.get("digest"), str):
            raise UserError(f"'data.{split:.40}' is not a split's digest")
    for split, found in record["scores"].items():
        _check_scores(f"scores.{split:.40}", split, found)


def _check_scores(where: str, split: str, found: Any) -> None:
    if split not in SPLITS[1:]:
        raise UserError(f"'{where}' is no split that is scored")
    if not isinstance(found, dict) or not isinstance(found.get("metrics"), dict) or not found["metrics"]:
        raise UserError(f"'{where}' holds no metrics")
    if not _counts(found.get("rows"), 1) or not isinstance(found.get("digest"), str):
        raise UserError(f"'{where}' lacks rows or digest")
    for key in ("seconds", "output_tokens", "shortened"):
        if not is_number(found.get(key, 0)):
            raise UserError(f"'{where}.{key}' is not a number")
    for kind in ("metrics", "base", "gain"):
        intervals = found.get(kind, found["metrics"])
        if not isinstance(intervals, dict) or set(intervals) != set(found["metrics"]):
            raise UserError(f"'{where}.{kind}' has other metrics than '{where}.metrics'")
        for name, interval in intervals.items():
            if not is_name(name) or not _is_interval(interval):
                raise UserError(f"'{where}.{kind}.{name:.40}' is not a value with an interval, all within [-1, 1]")
    if ("base" in found) != ("gain" in found):
        raise UserError(f"'{where}' has one of base and gain alone")


def _is_interval(found: Any) -> bool:
    """A score or a difference of two, which are fractions of 1, with its ends."""
    if not isinstance(found, dict):
        return False
    values: list[Any] = [found.get(key) for key in ("value", "low", "high")]
    return all(is_number(value) and abs(value) <= 1 + 1e-9 for value in values)


def _counts(value: Any, least: int) -> bool:
    return isinstance(value, int) and is_number(value) and value >= least


RUN_ID = re.compile(r"\w[A-Za-z0-9._-]{0,400}", re.ASCII)
_NUMBER = (int, float)
_FLAG = (bool, type(None))
_SCHEMA: dict[str, Any] = {
    "run_id": str,
    "seed": int,
    "identity.model.name": str,
    "identity.task.name": str,
    "identity.rank.r": int,
    "identity.train.lr": _NUMBER,
    "identity.tying": dict,
    "identity.score": dict,
    "config.tying.name": str,
    "config.task.name": str,
    "config.rank.r": int,
    "base.name": str,
    "base.revision": str,
    "base.digest": str,
    "code.commit": (str, type(None)),
    "code.dirty": _FLAG,
    "versions": dict,
    "device": str,
    "data.train.rows": int,
    "data.train.digest": str,
    "data.validation.digest": str,
    "trainable_params": int,
    "share_of_lora": _NUMBER,
    "adapter_bytes": int,
    "training.steps": int,
    "training.tokens_per_s": _NUMBER,
    "training.seconds": _NUMBER,
    "training.peak_memory_bytes": int,
    "training.validation_loss_first": _NUMBER,
    "training.validation_loss_last": _NUMBER,
    "scores": dict,
}


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """The rows of a predictions file, one an example.

    Raises:
        UserError: the file is missing or empty, or a row is damaged; the message names file and line.
    """
    rows = []
    for number, line in enumerate(storage.read_bytes(path).splitlines(), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not _is_prediction(row):
            raise UserError(
                f"{path}:{number}: is not a prediction (an object with id, prompt, references, output, scores)"
            )
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: holds no predictions")
    return rows


def _is_prediction(row: Any) -> bool:
    """Whether a row can be shown and scored again: texts are texts, and numbers are finite."""
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("id", "prompt", "output")):
        return False
    references, scores = row.get("references"), row.get("scores")
    if not isinstance(references, list) or not all(isinstance(text, str) for text in references):
        return False
    if not isinstance(scores, dict) or not all(is_number(s) or _numbers(s) for s in scores.values()):
        return False
    if not isinstance(row.get("choices", []), list) or not all(isinstance(c, str) for c in row.get("choices", [])):
        return False
    return is_number(row.get("output_tokens", 0)) and (
        "log_likelihoods" not in row
        or (_numbers(row["log_likelihoods"]) and len(row["log_likelihoods"]) == len(row.get("choices", [])) > 0)
    )


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_number, value))

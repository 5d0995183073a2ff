"""Finished runs as the report sees them: read from their folders, checked, and never fatal when they are not whole.

Needs no torch, no Hydra and no W&B: result.json, metrics.jsonl, predictions/ and config.yaml are all there is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiedlora import storage
from tiedlora.errors import UserError
from tiedlora.records import run_record

FOLDER_NAME = re.compile(r"(?P<label>\w+?)-r(?P<rank>\d+)-(?P<task>.+)-(?P<model>[^-]+)-s(?P<seed>\d+)-[0-9a-f]{10}")
PART_OF_A_RUN = ("config.yaml", "metrics.jsonl", "checkpoint", "error.txt", ".lock", "adapter", "predictions")
NOT_RUNS = ("base", "sweeps")
"""Folders below outputs/ that hold base-model scores and sweeps' frozen cells."""

Scores = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class LeftOut:
    """A folder that is not in the report, and why. `about` is what its name says, if it is a run's."""

    path: Path
    reason: str
    about: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A finished run."""

    path: Path
    record: dict[str, Any]
    """result.json as it is."""
    configuration: str
    """LoRA, TABuv, ...: the name that the specification has by its meaning, or `custom (<its own name>)`."""

    @property
    def run_id(self) -> str:
        return str(self.record["run_id"])

    @property
    def model(self) -> str:
        """The base model's name without its organisation."""
        return str(self.record["base"]["name"]).rsplit("/", 1)[-1]

    @property
    def task(self) -> str:
        return str(self.record["identity"]["task"]["name"])

    @property
    def rank(self) -> int:
        return int(self.record["identity"]["rank"]["r"])

    @property
    def lr(self) -> float:
        return float(self.record["identity"]["train"]["lr"])

    @property
    def seed(self) -> int:
        return int(self.record["seed"])

    @property
    def params(self) -> int:
        return int(self.record["trainable_params"])

    @property
    def splits(self) -> dict[str, Any]:
        """What the record says of each scored split."""
        found: dict[str, Any] = self.record["scores"]
        return found

    def rows(self, split: str, base: bool = False) -> list[dict[str, Any]]:
        """The rows of predictions/, one an example.

        Raises:
            UserError: the file is missing or a row is damaged; the message names file and line.
        """
        return run_record.read_predictions(self.path / "predictions" / f"{split}{'.base' if base else ''}.jsonl")

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one key of metrics.jsonl; lines that a kill cut short are passed over."""
        steps, values = [], []
        try:
            lines = storage.read_bytes(self.path / "metrics.jsonl").splitlines()
        except UserError:
            return [], []
        for line in lines:
            if f'"{key}"'.encode() not in line:
                continue
            try:
                row = json.loads(line)
                step, value = row["step"], row[key]
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
            if isinstance(step, int) and run_record.is_number(step) and run_record.is_number(value):
                steps.append(step)
                values.append(float(value))
        return steps, values


def read_runs(roots: Iterable[Path]) -> tuple[list[Run], list[LeftOut]]:
    """Every finished run below the roots (each a folder of runs, or one run's own), and what was left out.

    Raises:
        UserError: a root is not a folder.
    """
    runs: dict[str, Run] = {}
    left_out: list[LeftOut] = []
    for folder in _folders(roots):
        found = read_run(folder)
        if isinstance(found, LeftOut):
            left_out.append(found)
        elif found.run_id in runs:
            left_out.append(LeftOut(folder, f"the same run as {runs[found.run_id].path}", {}))
        else:
            runs[found.run_id] = found
    return list(runs.values()), left_out


def _folders(roots: Iterable[Path]) -> Iterator[Path]:
    for root in roots:
        if not root.is_dir():
            raise UserError(f"{root}: is not a folder; give the folder that holds the runs, usually outputs/")
        if (root / "result.json").is_file():
            yield root
            continue
        for folder in sorted(root.iterdir()):
            if folder.is_dir() and not folder.name.startswith(".") and folder.name not in NOT_RUNS:
                yield folder


def read_run(folder: Path) -> Run | LeftOut:
    """One folder's run, or the reason why it is none."""
    about = _about(folder.name)
    if not (folder / "result.json").is_file():
        if not any((folder / name).exists() for name in PART_OF_A_RUN):
            return LeftOut(folder, "not a run: it holds none of a run's files", {})
        error = _last_line(folder / "error.txt")
        lr = _planned_lr(folder / "config.yaml")
        reason = f"failed: {error}" if error else "not finished: it has no result.json (running, or interrupted)"
        # A folder of another name tells no configuration, so it is of no cell.
        return LeftOut(folder, reason, {**about, "lr": lr, "failed": bool(error)} if about else {})
    try:
        record = run_record.read_result(folder / "result.json")
    except UserError as error:
        reason = str(error).removeprefix(f"{folder / 'result.json'}: ")
        return LeftOut(folder, f"result.json: {reason}", about)
    label = str(record["run_id"]).split("-", 1)[0]
    name = str(record["config"]["tying"]["name"])
    return Run(folder, record, f"custom ({name})" if label == "custom" else label)


def _about(name: str) -> dict[str, Any]:
    match = FOLDER_NAME.fullmatch(name)
    return {} if match is None else {**match.groupdict(), "rank": int(match["rank"]), "seed": int(match["seed"])}


def _last_line(path: Path) -> str:
    """What a failed run ended with; of a link nothing, since what it leads to is not the run's to show."""
    try:
        lines = [] if path.is_symlink() else storage.read_bytes(path).decode("utf-8", "replace").strip().splitlines()
    except UserError:
        return ""
    return lines[-1][:200] if lines else "error.txt is empty"


def _planned_lr(path: Path) -> float | None:
    """The learning rate that an unfinished run was started with: its configuration is the only place."""
    try:
        return float(storage.read_yaml(path).train.lr)
    except Exception:  # whatever is wrong with a file that a kill may have cut, the rate is just not known
        return None


def example_scores(rows: list[dict[str, Any]]) -> tuple[tuple[str, ...], Scores]:
    """Ids, and each metric's per-example scores; a metric that some row lacks is left out."""
    names = set(rows[0]["scores"]) if rows else set()
    for row in rows:
        names &= set(row["scores"])
    return tuple(row["id"] for row in rows), {
        name: np.array([float(row["scores"][name]) for row in rows]) for name in sorted(names)
    }

"""The cells of a sweep as its folder names them, and each cell's metrics while it runs. It writes and locks nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiedlora import storage
from tiedlora.errors import UserError
from tiedlora.records.reading import Count, Number, Text, Whole, typed
from tiedlora.records.rows import MetricsRow
from tiedlora.records.run_folder import RunFolder
from tiedlora.text import visible

OTHER_SECTIONS = ("tracking", "outputs", "cache", "data_root", "force")
"""Facts of execution that do not tell cells apart."""
LONGEST_NAME = 96
"""Most characters of a name; conf/ allows no more."""
LARGEST_CHUNK = 8 * 2**20
"""Most new bytes of metrics.jsonl that one look reads. A row has some hundred bytes."""
LONGEST_ROW = 2**16
"""A longer line is no row of ours."""


@dataclass(frozen=True)
class _Named:
    name: Text


@dataclass(frozen=True)
class _Rank:
    r: Whole


@dataclass(frozen=True)
class _Train:
    steps: Count
    lr: Number


@dataclass(frozen=True)
class _Score:
    splits: list[Text]
    metrics: list[Text] | None = None


@dataclass(frozen=True)
class _FrozenConfig:
    """The values of a cell's frozen configuration that a table of cells shows."""

    model: _Named
    task: _Named
    tying: _Named
    rank: _Rank
    train: _Train
    score: _Score
    seed: Whole


@dataclass(frozen=True)
class WatchedCell:
    """A cell of a sweep: its names, and its run's folder."""

    run_id: str
    folder: RunFolder
    model: str
    """The last part of the model's name."""
    task: str
    configuration: str
    rank: int
    lr: float
    seed: int
    steps: int
    splits: tuple[str, ...]
    """The splits that the sweep scores."""
    metrics: tuple[str, ...] | None
    """What it scores; None takes everything."""
    group: str
    """Equal for cells that differ only in rate and seed."""
    values: dict[str, str]
    """Every value of the configuration by its dotted key, to tell cells with equal names apart."""

    @property
    def search(self) -> str:
        """The name of the search that it belongs to, as selection.json has it."""
        return f"{self.configuration} r={self.rank} on {self.task}, {self.model}"

    @property
    def names(self) -> tuple[str, str, str, int, float, int]:
        """What tables call it, in their order."""
        return self.model, self.task, self.configuration, self.rank, self.lr, self.seed


def frozen_cells(sweep_folder: Path, known: dict[str, WatchedCell]) -> dict[str, WatchedCell]:
    """Run id -> cell, for every frozen configuration of the sweep, in the order of their names.

    The runs are looked for beside sweeps/, wherever this machine sees that folder.

    Args:
        known: cells that were read before. A frozen cell does not change.

    Raises:
        UserError: a file is damaged.
    """
    outputs = sweep_folder.parent.parent
    cells = [
        known.get(path.stem) or _read_cell(path, outputs / path.stem)
        for path in (sweep_folder / "cells").glob("*.json")
    ]
    return {cell.run_id: cell for cell in sorted(cells, key=lambda cell: (*cell.names, cell.run_id))}


def _read_cell(path: Path, folder: Path) -> WatchedCell:
    tree = storage.read_json(path)
    try:
        config = typed(_FrozenConfig, tree, what="a sweep's cell")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    values = {key: value for key, value in _leaves(tree) if key.split(".")[0] not in OTHER_SECTIONS}
    apart = ("seed", "train.lr", "train.pause_after")
    return WatchedCell(
        run_id=path.stem,
        folder=RunFolder(folder),
        model=visible(config.model.name.rsplit("/", 1)[-1])[:LONGEST_NAME],
        task=visible(config.task.name)[:LONGEST_NAME],
        configuration=visible(config.tying.name)[:LONGEST_NAME],
        rank=config.rank.r,
        lr=config.train.lr,
        seed=config.seed,
        steps=config.train.steps,
        splits=tuple(config.score.splits),
        metrics=None if config.score.metrics is None else tuple(config.score.metrics),
        group=json.dumps({key: value for key, value in values.items() if key not in apart}, sort_keys=True),
        values=values,
    )


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, json.dumps(value)


def telling_apart(cells: Iterable[WatchedCell]) -> dict[str, str]:
    """Run id -> the values that tell a cell from others with the same names; empty for a cell whose names suffice."""
    alike: dict[tuple[object, ...], list[WatchedCell]] = {}
    for cell in cells:
        alike.setdefault(cell.names, []).append(cell)
    words = {}
    for same in alike.values():
        keys = [key for key in same[0].values if len({cell.values.get(key) for cell in same}) > 1]
        for cell in same:
            words[cell.run_id] = " ".join(f"{key}={cell.values.get(key, '')}" for key in keys)
    return words


@dataclass
class Curve:
    """What metrics.jsonl has shown so far. Each look reads only what was appended since the last one."""

    losses: dict[int, float] = field(default_factory=dict)
    """Step -> validation loss."""
    step: int = 0
    """The last logged step."""
    seconds: float = 0.0
    """Seconds of training up to this step."""
    train_loss: float | None = None
    _file: tuple[int, int] = (0, 0)
    """Inode of the file, and the place up to which it was read."""

    def read(self, path: Path) -> None:
        """Read the rows that were added. A run that continues replaces its file, which is then read from its start."""
        try:
            # A pipe or a device could make the look wait for ever.
            status = path.stat()
            if not path.is_file():
                return
            if status.st_ino != self._file[0] or status.st_size < self._file[1]:
                self.losses, self.step, self.seconds, self.train_loss = {}, 0, 0.0, None
                self._file = (status.st_ino, 0)
            if status.st_size == self._file[1]:
                return
            with path.open("rb") as file:
                file.seek(self._file[1])
                text = file.read(LARGEST_CHUNK)
        except OSError:
            return
        # The last line may still be being written. A line that fills the whole chunk is skipped.
        end = text.rfind(b"\n") + 1 or (len(text) if len(text) == LARGEST_CHUNK else 0)
        self._file = (status.st_ino, self._file[1] + end)
        for line in text[:end].splitlines():
            self._add(line)

    def _add(self, line: bytes) -> None:
        try:
            tree = json.loads(line) if len(line) <= LONGEST_ROW else None
        except (ValueError, RecursionError):
            return
        row = MetricsRow.from_json(tree) if isinstance(tree, dict) else None
        if row is None:
            return
        self.step = max(self.step, row.step)
        if "validation/loss" in row.values:
            self.losses[row.step] = row.values["validation/loss"]
        self.train_loss = row.values.get("train/loss", self.train_loss)
        self.seconds = row.values.get("train/seconds", self.seconds)

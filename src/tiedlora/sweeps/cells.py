"""The cells of a sweep, and their frozen configurations.

A cell is a run like any other (config.identity names its folder), so sweeps share runs with each other and with
`python train.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tiedlora import storage
from tiedlora.config.identity import config_tree, run_id
from tiedlora.config.schema import Config
from tiedlora.config.sizes import trainable_params
from tiedlora.records.run_folder import RunFolder
from tiedlora.scoring.passes import lacks_scores
from tiedlora.sweeps.control import SweepControl

STATES = ("done", "running", "paused", "pruned", "interrupted", "failed", "dropped", "missing", "unneeded")
"""Paused: at the cell's train.pause_after. Pruned: stopped by a search; a plain sweep continues it. Dropped: taken out
of the sweep by a person (control.py), and not done. Unneeded: a search has chosen the rate without it."""
ENDED = ("done", "paused", "failed")
"""The states in which a launch has nothing more to do."""


@dataclass(frozen=True)
class CellParameters:
    """The names of a cell in tables."""

    model: str
    """The last part of the model's name."""
    task: str
    configuration: str
    """The tying's name, such as LoRA or TABuv."""
    rank: int
    lr: float
    seed: int
    trainable: int
    """Trainable parameters."""


@dataclass(frozen=True, eq=False)
class SweepCell:
    """One cell of a sweep: a configuration to run."""

    overrides: tuple[str, ...]
    """The cell as the command line writes it. Two ways to write the same configuration give one cell."""
    config: Config
    launch_words: tuple[str, ...] = ()
    """Facts of execution that only this launch sets, as overrides."""

    def until(self, step: int | None, splits: Sequence[str]) -> SweepCell:
        """The same run for a launch that pauses it after a step, or (None) finishes it and scores these splits."""
        train = replace(self.config.train, pause_after=step)
        score = replace(self.config.score, splits=list(splits))
        words = (f"train.pause_after={'null' if step is None else step}", f"score.splits=[{','.join(splits)}]")
        return replace(self, config=replace(self.config, train=train, score=score), launch_words=words)

    @cached_property
    def run_id(self) -> str:
        """The id of the cell's run."""
        return run_id(self.config)

    @property
    def folder(self) -> RunFolder:
        """The folder of the cell's run."""
        return RunFolder(Path(self.config.outputs) / self.run_id)

    def finished(self) -> bool:
        """Whether the run is done, and has every score that the sweep asks for."""
        record = self.folder.record()
        return record is not None and not lacks_scores(self.config.score, record)

    def state(self) -> str:
        """One of STATES, except dropped and unneeded, which only the sweep knows."""
        state, pause = self.folder.state(), self.config.train.pause_after
        if state == "done":
            return "done" if self.finished() else self.folder.scoring_state()
        if state in ("interrupted", "pruned") and pause is not None and self.folder.checkpoint_step() >= pause:
            return "paused"
        return state

    def parameters(self) -> CellParameters:
        """The names of the cell in tables."""
        config = self.config
        assert config.train.lr is not None
        return CellParameters(
            model=config.model.name.rsplit("/", 1)[-1],
            task=config.task.name,
            configuration=config.tying.name,
            rank=config.rank.r,
            lr=config.train.lr,
            seed=config.seed,
            trainable=trainable_params(config) or 0,
        )


@dataclass(frozen=True)
class Sweep:
    """The cells of one command, each once."""

    name: str
    cells: list[SweepCell]

    @cached_property
    def id(self) -> str:
        """Such as `paper-1a2b3c4d`. The same cells are the same sweep, in any order."""
        run_ids = "\n".join(sorted(cell.run_id for cell in self.cells))
        return f"{self.name}-{hashlib.sha256(run_ids.encode()).hexdigest()[:8]}"

    @property
    def path(self) -> Path:
        """The folder of the sweep's frozen cells and its selection."""
        return Path(self.cells[0].config.outputs) / "sweeps" / self.id

    def run_ids(self) -> list[str]:
        """The ids of the cells, and of frozen cells that a search has added."""
        added = {path.stem for path in (self.path / "cells").glob("*.json")}
        return list(dict.fromkeys([*(cell.run_id for cell in self.cells), *sorted(added)]))

    @cached_property
    def searches_rates(self) -> bool:
        """Whether a configuration has several learning rates, so that its runs are candidates until one is chosen."""
        rates: dict[tuple[object, ...], set[float | None]] = {}
        for cell in self.cells:
            config = cell.config
            named = (config.model.name, config.task.name, config.tying.name, config.rank.r)
            rates.setdefault(named, set()).add(config.train.lr)
        return any(len(tried) > 1 for tried in rates.values())

    @property
    def control(self) -> SweepControl:
        """The files that steer the sweep while it runs."""
        return SweepControl(self.path)

    def freeze(self) -> FrozenCells:
        """Write every cell's resolved configuration. A cell is run from this file, so a later edit of conf/ does not
        change it.
        """
        frozen, searches = FrozenCells(self.path / "cells"), self.searches_rates
        for cell in self.cells:
            write_frozen(frozen.path / f"{cell.run_id}.json", frozen_tree(cell.config, self.id, searches))
        return frozen


def write_frozen(path: Path, tree: dict[str, Any]) -> None:
    """Write a cell's configuration. A file with the same content stays.

    So the next start of a large sweep writes nothing, and a job that reads its file meanwhile is not disturbed.
    """
    data = storage.json_bytes(tree)
    if not path.is_file() or storage.read_bytes(path) != data:
        storage.write_bytes(path, data, flush=False)


def frozen_tree(config: Config, sweep_id: str, searches_rates: bool) -> dict[str, Any]:
    """The configuration that a cell is run from: in the sweep's group, and without a table of a candidate's answers."""
    tree = config_tree(config)
    tree["tracking"]["group"] = tree["tracking"]["group"] or sweep_id
    if searches_rates:
        tree["tracking"]["answers"] = 0
    return tree


@dataclass(frozen=True)
class FrozenCells:
    """Replaces Hydra's config loader. A launcher asks it for a cell's configuration, at any time and on any machine.

    Attributes:
        path: the folder of the frozen configurations, one RUN_ID.json for each cell.
    """

    path: Path

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """The frozen configuration that `cell=RUN_ID` names, with Hydra's own section for this launch.

        Further overrides are facts of execution that only this launch sets (SweepCell.launch_words).

        Raises:
            UserError: the file is missing or damaged.
        """
        cell_id = sweep_overrides[0].removeprefix("cell=")
        frozen = OmegaConf.create({**storage.read_json(self.path / f"{cell_id}.json"), "hydra": master_config.hydra})
        # Hydra 1.4 locks its section, and launchers write the job's number into it.
        OmegaConf.set_readonly(frozen.hydra, False)
        frozen.merge_with_dotlist(list(sweep_overrides[1:]))
        frozen.hydra.overrides.task = list(sweep_overrides)
        # The cell finds the files that steer the sweep in Hydra's output directory, which is this folder for it.
        OmegaConf.update(frozen, "hydra.sweep.dir", str(self.path.parent), force_add=True)
        return frozen

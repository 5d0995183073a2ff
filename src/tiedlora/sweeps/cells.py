"""The cells of a sweep, and their frozen configurations.

A cell is a run like any other (config.identity names its folder), so sweeps share runs with each other and with
`python train.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from tiedlora import storage
from tiedlora.config.check import check
from tiedlora.config.identity import config_tree, identity, run_id, without_gone_keys
from tiedlora.config.schema import Config
from tiedlora.errors import UserError
from tiedlora.records.reading import typed
from tiedlora.records.run_folder import RunFolder, RunName, State
from tiedlora.records.run_record import arm_suffix
from tiedlora.records.selection import SELECTION_FILE
from tiedlora.scoring.passes import lacks_scores
from tiedlora.sweeps.control import SweepControl

ENDED = (State.DONE, State.PAUSED, State.FAILED)
"""The states in which a launch has nothing more to do."""


@dataclass(frozen=True)
class Goal:
    """A cell, and how far a launch takes it: what a worker is told. The rest is in the cell's frozen configuration."""

    run_id: str
    pause_after: int | None
    """The step after which it pauses; None trains to the end."""
    splits: tuple[str, ...]
    """The splits to score."""

    def cell(self, folder: Path) -> SweepCell:
        """The cell as it was frozen in the sweep's folder.

        Raises:
            UserError: the file is missing or damaged.
        """
        return frozen_cell(folder, self.run_id).until(self.pause_after, self.splits)


@dataclass(frozen=True, eq=False)
class SweepCell:
    """One cell of a sweep: a configuration to run."""

    overrides: tuple[str, ...]
    """The cell as the command line writes it. Two ways to write the same configuration give one cell."""
    config: Config

    def until(self, step: int | None, splits: Sequence[str]) -> SweepCell:
        """The same run for a launch that pauses it after a step, or (None) finishes it and scores these splits."""
        train = replace(self.config.train, pause_after=step)
        score = replace(self.config.score, splits=list(splits))
        return replace(self, config=replace(self.config, train=train, score=score))

    @property
    def goal(self) -> Goal:
        """How far a launch takes the cell."""
        return Goal(self.run_id, self.config.train.pause_after, tuple(self.config.score.splits))

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

    def state(self) -> State:
        """The state of the run, as far as this cell takes it."""
        record = self.folder.record()
        is_scored = record is None or not lacks_scores(self.config.score, record)
        return self.folder.state(is_scored, self.config.train.pause_after)

    @cached_property
    def rate_group(self) -> str:
        """Equal for cells that differ only in learning rate and seed, as far as the result goes."""
        tree = identity(self.config)
        del tree["seed"], tree["train"]["lr"]
        return json.dumps(tree, sort_keys=True)

    @cached_property
    def name(self) -> RunName:
        """What tables call the run."""
        config = self.config
        assert config.train.lr is not None
        model = config.model.name.rsplit("/", 1)[-1]
        name = config.tying.name + arm_suffix(config.task.shuffle_targets, config.objective.name)
        return RunName(model, config.task.name, name, config.rank.r, config.train.lr, config.seed)


def frozen_cell(folder: Path, run_id: str) -> SweepCell:
    """A cell of the sweep in this folder, from its frozen configuration.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = folder / "cells" / f"{run_id}.json"
    tree = storage.read_json(path)
    try:
        config = typed(Config, without_gone_keys(tree), what="a sweep's cell")
        check(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    # Its run is beside sweeps/, wherever this machine sees that folder.
    return SweepCell((), replace(config, outputs=str(folder.parents[1])))


def rate_groups(cells: Iterable[SweepCell]) -> dict[str, list[SweepCell]]:
    """The cells by their rate_group."""
    groups: dict[str, list[SweepCell]] = {}
    for cell in cells:
        groups.setdefault(cell.rate_group, []).append(cell)
    return groups


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

    @property
    def selection_file(self) -> Path:
        """Where the chosen rates and the decisions of a search are."""
        return self.path / SELECTION_FILE

    def run_ids(self) -> list[str]:
        """The ids of the cells, and of frozen cells that a search has added."""
        added = {path.stem for path in (self.path / "cells").glob("*.json")}
        return list(dict.fromkeys([*(cell.run_id for cell in self.cells), *sorted(added)]))

    @property
    def control(self) -> SweepControl:
        """The files that steer the sweep while it runs."""
        return SweepControl(self.path)

    def freeze(self, cells: Iterable[SweepCell] | None = None) -> None:
        """Write the resolved configuration of every cell, or of these.

        A worker runs a cell from this file, so a later edit of conf/ does not change it. The cell is in the sweep's
        group of its tracker. A file with the same content stays: the next start of a large sweep writes nothing, and
        does not disturb a worker that reads its file meanwhile.
        """
        for cell in self.cells if cells is None else cells:
            tree = config_tree(cell.config)
            tree["tracking"]["group"] = tree["tracking"]["group"] or self.id
            path, data = self.path / "cells" / f"{cell.run_id}.json", storage.json_bytes(tree)
            if not path.is_file() or storage.read_bytes(path) != data:
                storage.write_bytes(path, data, flush=False)

"""The cells of a sweep, their frozen configurations, and how a person steers them while they run.

A cell is a run like any other (config.identity names its folder), so sweeps share runs with each other and with
`python train.py`.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from tiedlora import storage
from tiedlora.config.check import check
from tiedlora.config.identity import arm_of, config_tree, identity, identity_digest, run_id, without_gone_keys
from tiedlora.config.schema import Config
from tiedlora.config.trial_arm import TrialArm
from tiedlora.errors import UserError
from tiedlora.reading import typed
from tiedlora.records.run_folder import RunFolder, RunName, State
from tiedlora.scoring.wanted import lacks_scores

PLAN_FILE, VERDICTS_FILE = "plan.json", "verdicts.json"
"""In the folder of a deciding sweep: the first is written before its first run, the second after its last."""


@dataclass(frozen=True)
class Goal:
    """A cell, and how far a launch takes it: what a worker is told. The rest is in the cell's frozen configuration."""

    run_id: str
    pause_after: int | None
    """The step after which it pauses; None trains to the end."""
    splits: tuple[str, ...]
    """The splits to score."""


@dataclass(frozen=True, eq=False)
class SweepCell:
    """One cell of a sweep: a configuration to run."""

    overrides: tuple[str, ...]
    """The cell as the command line writes it. Two ways to write the same configuration give one cell."""
    config: Config
    frozen_id: str | None = None
    """The id that the cell has in the sweep's folder. Its first word is that of conf/tying/ when the sweep began."""

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
        return self.frozen_id or run_id(self.config)

    @property
    def folder(self) -> RunFolder:
        """The folder of the cell's run."""
        return RunFolder(Path(self.config.outputs) / self.run_id)

    @property
    def pauses_at(self) -> int | None:
        """The step at which the run pauses. None if it does not: after its last step it goes on to its scores."""
        train = self.config.train
        return train.pause_after if (train.pause_after or train.steps) < train.steps else None

    def finished(self) -> bool:
        """Whether the run is done, and has every score that the sweep asks for."""
        return self.folder.record() is not None and not lacks_scores(self.config.score, self.folder)

    def state(self) -> State:
        """The state of the run, as far as this cell takes it."""
        is_scored = not self.folder.result_file.exists() or self.finished()
        return self.folder.state(is_scored, self.pauses_at)

    @cached_property
    def name(self) -> RunName:
        """What tables call the run."""
        config, arm = self.config, self.arm
        assert config.train.lr is not None
        model = config.model.name.rsplit("/", 1)[-1]
        return RunName(model, config.task.name, arm.label, arm.rank, config.train.lr, config.seed)

    @cached_property
    def arm(self) -> TrialArm:
        """What the cell's run trains."""
        return arm_of(self.config)


def frozen_cell(folder: Path, run_id: str) -> SweepCell:
    """A cell of the sweep in this folder, from its frozen configuration.

    Raises:
        UserError: the file is missing, damaged or that of another run.
    """
    path = folder / "cells" / f"{run_id}.json"
    tree = storage.read_json(path)
    try:
        config = typed(Config, without_gone_keys(tree), what="a sweep's cell")
        check(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    # The last word is of the configuration alone. The first one changes with conf/tying/, and the sweep does not.
    if (digest := identity_digest(identity(config))) != run_id.rpartition("-")[2]:
        raise UserError(
            f"{path}: is the configuration of another run, ...-{digest}; start the sweep again, which writes it anew"
        )
    # Its run is beside sweeps/, wherever this machine sees that folder.
    return SweepCell((), replace(config, outputs=str(folder.parents[1])), run_id)


def rate_groups(cells: Iterable[SweepCell]) -> dict[str, list[SweepCell]]:
    """The cells in groups that differ only in learning rate and seed, as far as the result goes, by name.

    Two groups can have the same name, if they differ in another key. Then the second has the name `... (2)`, whatever
    the order of the cells.
    """
    groups: dict[str, list[SweepCell]] = {}
    for cell in cells:
        tree = identity(cell.config)
        del tree["seed"], tree["train"]["lr"]
        groups.setdefault(json.dumps(tree, sort_keys=True), []).append(cell)
    names: dict[str, str] = {}
    alike: Counter[str] = Counter()
    for key in sorted(groups):
        name = groups[key][0].name.group
        alike[name] += 1
        names[key] = f"{name} ({alike[name]})" if alike[name] > 1 else name
    return {names[key]: own for key, own in groups.items()}


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
        """The folder of the sweep's frozen cells, of its selection, and of the files that steer it."""
        return Path(self.cells[0].config.outputs) / "sweeps" / self.id

    @property
    def control(self) -> SweepControl:
        """The files by which other commands steer the sweep."""
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
            path = self.path / "cells" / f"{cell.run_id}.json"
            storage.write_changed(path, storage.json_bytes(tree), flush=False)

    def matching(self, patterns: Iterable[str]) -> list[str]:
        """The cells that a person names by their ids, with * and ? as wildcards. A search may have added some of them.

        Raises:
            UserError: a pattern matches no cell.
        """
        added = sorted(path.stem for path in (self.path / "cells").glob("*.json"))
        run_ids = dict.fromkeys([*(cell.run_id for cell in self.cells), *added])
        chosen: dict[str, None] = {}
        for pattern in patterns:
            if not (found := fnmatch.filter(run_ids, pattern)):
                raise UserError(
                    f"{pattern}: is no cell of this sweep; `scripts/sweep.py status` lists them ('*-s1-*' works)"
                )
            chosen.update(dict.fromkeys(found))
        return list(chosen)


class SweepControl:
    """How a person steers a running sweep: plain files in the sweep's folder, which its cells look at.

        dropped/RUN_ID    the cell is not started; if it runs, it stops after its step and keeps its checkpoint
        retried/RUN_ID    the cell runs once more, when the cells that were launched with it have ended
        first_failure     the first cell that has failed, with fail_fast; no further one starts, and running ones stop
        started/RUN_ID    how many workers have started the cell and not ended: the one at work, and those killed before
        began             written when the latest command began: a cell that has failed since then is not run again. It
                          holds fail_fast, if the first cell that fails stops the sweep
        ended             written when the latest command ended by itself: a search may need a cell that has failed

    Every process and machine of a sweep sees the same files, so this works under every launcher.

    Args:
        folder: the sweep's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._began, self._ended, self._first_failure = folder / "began", folder / "ended", folder / "first_failure"
        self._began_at: int | None = None

    def start(self, fail_fast: bool) -> None:
        """Begin a sweep. Dropped cells stay dropped; earlier failures and retries count no more."""
        for path in [self._ended, self._first_failure, *self.folder.glob("retried/*"), *self.folder.glob("started/*")]:
            path.unlink(missing_ok=True)
        storage.write_bytes(self._began, b"fail_fast" if fail_fast else b"", flush=False)
        self._began_at = self._began.stat().st_mtime_ns

    def end(self) -> None:
        """Note that the command has ended by itself, and starts no further cell."""
        storage.write_bytes(self._ended, b"", flush=False)

    def has_ended(self) -> bool:
        """Whether the latest command has ended by itself."""
        return self._ended.exists()

    def began(self) -> float:
        """When the latest command of the sweep began, in seconds; 0 before the first."""
        return self._began.stat().st_mtime if self._began.exists() else 0.0

    def drop(self, run_ids: Iterable[str]) -> None:
        """Take cells out of the sweep."""
        for name in run_ids:
            storage.write_bytes(self.folder / "dropped" / name, b"")
            (self.folder / "retried" / name).unlink(missing_ok=True)

    def retry(self, run_ids: Iterable[str]) -> None:
        """Put dropped cells back, and let failed ones run once more."""
        for name in run_ids:
            storage.write_bytes(self.folder / "retried" / name, b"")
            (self.folder / "dropped" / name).unlink(missing_ok=True)

    def is_dropped(self, run_id: str) -> bool:
        """Whether `sweep.py drop` has taken the cell out of the sweep."""
        return (self.folder / "dropped" / run_id).exists()

    def retried(self) -> list[str]:
        """The cells that should run once more."""
        return sorted(path.name for path in self.folder.glob("retried/*"))

    def take_retry(self, run_id: str) -> bool:
        """Whether the cell should run once more. The answer is True once for each `retry`."""
        asked = (self.folder / "retried" / run_id).exists()
        (self.folder / "retried" / run_id).unlink(missing_ok=True)
        return asked

    def note_start(self, run_id: str) -> int:
        """Note that a worker, which has the run's lock, starts the cell. Returns how many were killed before it."""
        killed = self.starts(run_id)
        storage.write_bytes(self.folder / "started" / run_id, str(killed + 1).encode(), flush=False)
        return killed

    def note_end(self, run_id: str) -> None:
        """Note that the worker of the cell has ended by itself."""
        (self.folder / "started" / run_id).unlink(missing_ok=True)

    def starts(self, run_id: str) -> int:
        """How many workers have started the cell and not ended. Under the run's lock: how many were killed."""
        try:
            return int((self.folder / "started" / run_id).read_text())
        except (FileNotFoundError, ValueError):
            return 0

    def is_new(self, error_file: Path) -> bool:
        """Whether a run has failed since this command began; in a worker, since the latest command of the sweep began.

        Both files are on one file system, which mostly has one clock, so the machines' clocks do not matter.
        """
        try:
            began = self._began_at if self._began_at is not None else self._began.stat().st_mtime_ns
            return error_file.stat().st_mtime_ns > began
        except FileNotFoundError:
            return False

    def failed(self, run_id: str) -> None:
        """Note that a cell has failed. With fail_fast, this stops the sweep."""
        if not self._first_failure.exists() and self._began.is_file() and self._began.read_text() == "fail_fast":
            storage.write_bytes(self._first_failure, f"{run_id}\n".encode())

    def first_failure(self) -> str | None:
        """The cell that has stopped the sweep; None if no cell has."""
        try:
            return self._first_failure.read_text().strip()
        except FileNotFoundError:
            return None

    def stops(self, run_id: str) -> bool:
        """Whether the cell should not start, or should stop."""
        return self.is_dropped(run_id) or self._first_failure.exists()

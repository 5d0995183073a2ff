"""A sweep: its cells, what has become of each, and how one of them is run.

A cell is a run like any other (record.py names its folder), so sweeps share runs with each other and with
`python train.py`. Everything a table says is read from the runs' folders: nothing has to be kept in step.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tiedlora import storage, tying
from tiedlora.config.schema import Config
from tiedlora.errors import UserError
from tiedlora.records.rows import read_metrics
from tiedlora.records.run_folder import Busy, RunFolder, config_record, run_id
from tiedlora.runs import run
from tiedlora.text import clock, visible

log = logging.getLogger(__name__)

STATES = ("done", "running", "interrupted", "failed", "missing")
SHOWN = ("model", "task", "tying", "rank", "rank.r", "train.lr", "seed")
"""Keys that have a column of their own in the table."""
SECONDS_BETWEEN_LOOKS = 2.0


@dataclass(frozen=True, eq=False)
class Cell:
    """One configuration of a sweep."""

    overrides: tuple[str, ...]
    """How the command line says it; two ways to say the same are one cell."""
    config: Config

    @cached_property
    def run_id(self) -> str:
        """The identity of its run."""
        return run_id(self.config)

    @property
    def folder(self) -> RunFolder:
        """Its run's folder."""
        return RunFolder(Path(self.config.outputs) / self.run_id)

    def finished(self) -> bool:
        """Whether the run is done and scored on every split that the sweep asks for."""
        result = self.folder.result()
        return result is not None and set(self.config.score.splits) <= set(result["scores"])

    def state(self) -> str:
        """One of STATES."""
        state = self.folder.state()
        return "interrupted" if state == "done" and not self.finished() else state

    def parameters(self) -> dict[str, Any]:
        """What a table calls it."""
        config = self.config
        return {
            "model": config.model.name.rsplit("/", 1)[-1],
            "task": config.task.name,
            "configuration": config.tying.name,
            "rank": config.rank.r,
            "lr": config.train.lr,
            "seed": config.seed,
            "trainable": tying.trainable_params(config.tying, config.rank.r, config.model.architecture),
        }


@dataclass(frozen=True)
class Sweep:
    """The cells of one command, each once."""

    name: str
    cells: list[Cell]

    @cached_property
    def id(self) -> str:
        """`paper-1a2b3c4d`: the same cells are the same sweep, in whatever order they were written."""
        meaning = "\n".join(sorted(cell.run_id for cell in self.cells))
        return f"{self.name}-{hashlib.sha256(meaning.encode()).hexdigest()[:8]}"

    @property
    def path(self) -> Path:
        """Where its frozen cells are, and its selection."""
        return Path(self.cells[0].config.outputs) / "sweeps" / self.id

    def freeze(self) -> FrozenCells:
        """Write every cell's resolved configuration: it is run from there, whatever happens to conf/."""
        for cell in self.cells:
            record = config_record(cell.config)
            record["tracking"]["group"] = record["tracking"]["group"] or self.id
            storage.write_json(self.path / "cells" / f"{cell.run_id}.json", record)
        return FrozenCells(self.path / "cells")


@dataclass(frozen=True)
class FrozenCells:
    """Hydra's launchers ask this for a cell's configuration, at whatever time and on whatever machine."""

    path: Path

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """The frozen configuration that `cell=RUN_ID` names, with Hydra's own part of the launch."""
        name = sweep_overrides[0].removeprefix("cell=")
        frozen = OmegaConf.create({**storage.read_json(self.path / f"{name}.json"), "hydra": master_config.hydra})
        frozen.hydra.overrides.task = list(sweep_overrides)
        return frozen


def run_cell(config: Config) -> None:
    """Carry out one cell. A failure stays in its folder and with it: the sweep reads it there.

    Nothing is raised for it, because an exception that a launcher keeps would keep the failed cell's
    tensors too.

    Raises:
        KeyboardInterrupt: somebody asked the sweep to stop; a checkpoint is written.
    """
    from tiedlora.errors import StoppedEarly

    folder = RunFolder(Path(config.outputs) / run_id(config))
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.error_file.unlink(missing_ok=True)
        run.main(config)
    except StoppedEarly:
        # Launchers go on after an Exception, so it must not be one.
        raise KeyboardInterrupt from None
    except Busy as busy:
        log.info("%s", busy)
    except Exception as error:
        folder.write_error()
        log.error("%s failed: %s", folder.path.name, _one_line(error))
        _free_device_memory()


def _free_device_memory() -> None:
    """What a failed cell left cached on a GPU, out of memory perhaps, is the next one's."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _one_line(error: BaseException) -> str:
    return visible(" ".join(f"{type(error).__name__}: {error}".split()))


def failure(folder: RunFolder) -> str:
    """The last line of a failed run's traceback."""
    lines = storage.read_bytes(folder.error_file).decode("utf-8", "replace").strip().splitlines()
    return visible(lines[-1].removeprefix("tiedlora.errors.")[:LONGEST_MESSAGE]) if lines else "no message"


def rows(sweep: Sweep) -> list[dict[str, Any]]:
    """One row a cell: parameters, state, score, seconds so far, and why it failed."""
    return [_row(cell) for cell in sweep.cells]


def _row(cell: Cell) -> dict[str, Any]:
    state, result = cell.state(), cell.folder.result()
    row = {"run_id": cell.run_id, "overrides": list(cell.overrides), **cell.parameters(), "state": state}
    row.update(metric=None, score=None, validation_loss=None, error=None)
    if result is not None:
        # Test, if select scored it later, is not what another cell of the sweep will take.
        scored = [result["scores"][split]["seconds"] for split in cell.config.score.splits if split in result["scores"]]
        row["seconds"] = result["training"]["seconds"] + sum(scored)
        row["validation_loss"] = result["training"]["validation_loss_last"]
        for metric, found in result["scores"].get("validation", {}).get("metrics", {}).items():
            row["metric"], row["score"] = metric, found["value"]
            break
    else:
        logged = [r["train/seconds"] for r in read_metrics(cell.folder.metrics_file) if "train/seconds" in r]
        row["seconds"] = logged[-1] if logged else 0.0
    if state == "failed":
        row["error"] = failure(cell.folder)
    return row


def seconds_left(found: list[dict[str, Any]]) -> float | None:
    """What the unfinished cells still need, one after the other, going by the finished ones.

    A cell is taken to need what finished ones of its model and task needed, or, where there are none,
    the finished ones altogether. None if nothing is finished.
    """

    def mean(some: list[dict[str, Any]]) -> float | None:
        return sum(row["seconds"] for row in some) / len(some) if some else None

    done = [row for row in found if row["state"] == "done"]
    overall = mean(done)
    if overall is None:
        return None
    left = 0.0
    for row in found:
        if row["state"] not in ("done", "failed"):
            alike = mean([other for other in done if all(other[key] == row[key] for key in ("model", "task"))])
            left += max(0.0, (alike or overall) - row["seconds"])
    return left


def counts(found: Iterable[dict[str, Any]]) -> dict[str, int]:
    """How many cells are in each state."""
    states = [row["state"] for row in found]
    return {state: states.count(state) for state in STATES}


def summary(sweep: Sweep, found: list[dict[str, Any]]) -> str:
    """One line: cells, states, time."""
    states = ", ".join(f"{count} {state}" for state, count in counts(found).items() if count)
    line = f"{sweep.id}: {len(found)} cells: {states}; {clock(sum(row['seconds'] for row in found))} so far"
    left = seconds_left(found)
    return line if not left else f"{line}, about {clock(left)} left for one process"


def table(found: list[dict[str, Any]]) -> str:
    """Every cell with its parameters, state, score and time."""
    extra = _varying(found)
    columns = [
        "model",
        "task",
        "configuration",
        "rank",
        "trainable",
        "lr",
        "seed",
        *extra,
        "state",
        "score",
        "val. loss",
        "seconds",
    ]
    lines = [columns]
    for row in found:
        said = dict(override.split("=", 1) for override in row["overrides"])
        score = "" if row["score"] is None else f"{100 * row['score']:.1f} %"
        loss = "" if row["validation_loss"] is None else f"{row['validation_loss']:.3f}"
        lines.append(
            [str(row[key]) for key in ("model", "task", "configuration", "rank")]
            + [f"{row['trainable']:,}", f"{row['lr']:g}", str(row["seed"])]
            + [said.get(key, "") for key in extra]
            + [row["state"], score, loss, f"{row['seconds']:.0f}"]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _varying(found: list[dict[str, Any]]) -> list[str]:
    """Swept keys without a column of their own."""
    values: dict[str, set[str]] = {}
    for row in found:
        for override in row["overrides"]:
            key, value = override.split("=", 1)
            values.setdefault(key, set()).add(value)
    return [key for key, seen in values.items() if len(seen) > 1 and key not in SHOWN]


@dataclass
class Watch:
    """A line whenever a cell ends, whoever runs it: it looks at the folders, so every launcher has it."""

    sweep: Sweep
    started: float = field(default_factory=time.monotonic)
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Watch:
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _ended(self) -> tuple[int, int]:
        # The files alone: asking for a state takes a run's lock for a moment, and a worker may want it just then.
        folders = [cell.folder for cell in self.sweep.cells]
        done = sum(folder.result_file.exists() for folder in folders)
        return done, sum(folder.error_file.exists() and not folder.result_file.exists() for folder in folders)

    def _look(self) -> None:
        first = seen = self._ended()
        while not self._stop.wait(SECONDS_BETWEEN_LOOKS):
            if (now := self._ended()) == seen:
                continue
            (done, failed), total, seen = now, len(self.sweep.cells), now
            line = f"{self.sweep.id}: {done} of {total} done" + (f", {failed} failed" if failed else "")
            if (here := done - first[0]) > 0:
                rate = (time.monotonic() - self.started) / here
                line += f", about {clock(rate * (total - done - failed))} left"
            log.info("%s", line)


def to_json(sweep: Sweep, found: list[dict[str, Any]]) -> str:
    """The same for programs."""
    value = {"sweep": sweep.id, "counts": counts(found), "seconds_left": seconds_left(found), "cells": found}
    return json.dumps(value, indent=2, ensure_ascii=False)


def changed_since(cells: Iterable[Cell]) -> dict[str, str]:
    """Finished cells that were trained on other data or another base model than are here now, with what changed."""
    found = {}
    for cell in cells:
        result = cell.folder.result()
        assert result is not None
        try:
            run.check_same_inputs(cell.config, result, cell.folder)
        except UserError as error:
            found[cell.run_id] = str(error)
    return found

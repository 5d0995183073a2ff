"""Free the checkpoints of cells that a search has stopped. They are kept in case a full grid should continue them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from tiedlora.records.run_folder import Busy, RunFolder
from tiedlora.sweeps.cells import Sweep


@dataclass(frozen=True)
class Freed:
    """What cleaning has freed, or would free."""

    run_ids: tuple[str, ...]
    bytes: int


def free_pruned(sweep: Sweep, dry_run: bool = False) -> Freed:
    """Remove the checkpoints of the sweep's pruned cells, also of those with a rate outside the grid.

    Everything else of a cell stays, so a staged sweep keeps its decisions. A full grid trains these cells from the
    start. A cell on which a process works is left alone.

    Args:
        dry_run: only say what it would free.
    """
    outputs = Path(sweep.cells[0].config.outputs)
    run_ids, size = [], 0
    for run_id in sweep.run_ids():
        freed = _free(RunFolder(outputs / run_id), dry_run)
        if freed:
            run_ids.append(run_id)
            size += freed
    return Freed(tuple(run_ids), size)


def _free(folder: RunFolder, dry_run: bool) -> int:
    """The bytes of a pruned cell's checkpoints, which are removed."""
    if not folder.pruned_file.exists():
        return 0
    try:
        with folder.locked(patience=0):
            # Read under the lock: a run that starts removes the mark.
            if not folder.pruned_file.exists() or folder.result_file.exists():
                return 0
            size = sum(file.stat().st_size for file in folder.checkpoints.rglob("*") if file.is_file())
            if not dry_run:
                shutil.rmtree(folder.checkpoints, ignore_errors=True)
            return size
    except Busy:
        return 0

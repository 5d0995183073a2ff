"""`scripts/sweep.py watch`: the status of a sweep again and again, in any terminal on the same folder.

It is a live table on a terminal, and otherwise a line for each change. It writes nothing into the sweep's folder, and
holds the lock of a run only for a moment.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tiedlora.errors import UserError
from tiedlora.records.run_folder import State
from tiedlora.sweeps import status
from tiedlora.sweeps.cells import SweepCell, frozen_cell
from tiedlora.sweeps.control import SweepControl
from tiedlora.sweeps.selection import decision_lines
from tiedlora.sweeps.status import CellStatus
from tiedlora.text import visible

SECONDS_BETWEEN_LOOKS = 1.0
LARGEST_SHARE = 0.05
"""Most of the time that is spent on looking: ten thousand cells on a network file system take seconds."""
LISTED = 6
"""Most failures and decisions above the table, and most sweeps that an error message names."""
STYLES = {
    State.RUNNING: "bold cyan",
    State.FAILED: "bold red",
    State.INTERRUPTED: "magenta",
    State.PAUSED: "blue",
    State.DONE: "green",
    State.PRUNED: "yellow",
    State.MISSING: "dim",
    State.DROPPED: "dim",
    State.UNNEEDED: "dim",
}
"""The states in the order of the table's lines, because a terminal may show only the first -> how a line is drawn."""


def find_sweep(outputs: Path, name: str | None = None) -> Path:
    """The folder of a sweep.

    Args:
        outputs: the folder of the runs.
        name: the sweep's id, its name (as `paper` of paper-1a2b3c4d), or its folder. If several have the name, the one
            whose command was started last is taken. None matches all.

    Raises:
        UserError: there is no such sweep.
    """
    if name is not None and (Path(name) / "cells").is_dir():
        return Path(name).absolute()
    sweeps = [path.parent for path in (outputs / "sweeps").glob("*/cells") if path.is_dir()]
    # Every command writes a file into the folder when it starts (control.py).
    sweeps.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for path in sweeps:
        if name in (None, path.name, path.name.rpartition("-")[0]):
            return path
    if not sweeps:
        raise UserError(f"{outputs}: has no sweeps/; start one with train.py --multirun, or name its outputs=FOLDER")
    newest = ", ".join(path.name for path in sweeps[:LISTED])
    raise UserError(f"{name}: no such sweep in {outputs}; choose one of {newest}")


@dataclass(frozen=True)
class SweepView:
    """A sweep as it is now."""

    id: str
    cells: list[CellStatus]
    decisions: list[str]
    """What the sweeper decided and why, in its order."""
    stopped_by: str | None
    """The failed cell that stopped the sweep (fail_fast)."""
    ended: bool
    """Whether nothing is left to do."""

    def summary(self) -> str:
        """The counts and times in one line."""
        line = status.summary_line(self.id, self.cells) + (", ended" if self.ended else "")
        return line if self.stopped_by is None else f"{line}; stopped, because {self.stopped_by} failed (fail_fast)"


class Watch:
    """Looks at a sweep again and again. What cannot change any more is read once.

    Args:
        folder: the sweep's folder, outputs/sweeps/SWEEP.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.control = folder, SweepControl(folder)
        self._cells: dict[str, SweepCell] = {}
        self._done: dict[str, CellStatus] = {}

    def look(self) -> SweepView:
        """The sweep as it is now.

        Raises:
            UserError: the sweep's own files are damaged. A damaged run is a failed cell.
        """
        for path in (self.folder / "cells").glob("*.json"):
            if path.stem not in self._cells:
                self._cells[path.stem] = frozen_cell(self.folder, path.stem)
        in_order = sorted(self._cells.values(), key=lambda cell: (cell.name, cell.run_id))
        searched = status.read_search(self.folder, in_order)
        cells = [self._done.get(cell.run_id) or status.status_of(cell, self.control, searched) for cell in in_order]
        is_decided = searched is None or searched.is_over
        if is_decided:
            # Before, the search may still choose a run that is done without scores.
            self._done.update({cell.run_id: cell for cell in cells if cell.state == State.DONE})
        stopped_by = self.control.first_failure()
        is_idle = not any(cell.state == State.RUNNING for cell in cells)
        has_work = any(cell.is_open for cell in cells) and stopped_by is None
        return SweepView(
            id=visible(self.folder.name),
            cells=cells,
            decisions=[] if searched is None else decision_lines(searched.selection),
            stopped_by=None if stopped_by is None else visible(stopped_by),
            ended=is_idle and not has_work and is_decided,
        )


def watch(folder: Path) -> bool:
    """Show the sweep until it has ended, or until Ctrl-C: as a live table on a terminal, otherwise as lines.

    Returns:
        Whether no cell has failed.

    Raises:
        UserError: the sweep's own files are damaged.
    """
    # No text of a file is read as rich's markup.
    console, sweep = Console(highlight=False, markup=False, emoji=False), Watch(folder)
    if console.is_terminal and not console.is_dumb_terminal:
        # The alternate screen: what the terminal showed before comes back at the end, with the last table below it.
        with suppress(KeyboardInterrupt), Live(console=console, screen=True, auto_refresh=False) as live:
            for now in _looks(sweep):
                live.update(frame(now), refresh=True)
        console.print(frame(sweep.look()))
    else:
        before = None
        with suppress(KeyboardInterrupt):
            for now in _looks(sweep):
                for line in news(before, now):
                    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
                before = now
    return not any(cell.state == State.FAILED for cell in sweep.look().cells)


def _looks(sweep: Watch) -> Iterator[SweepView]:
    """The sweep as it is, again and again until it has ended."""
    while True:
        begun = time.monotonic()
        view = sweep.look()
        yield view
        if view.ended:
            return
        # It includes the time to show the view.
        spent = time.monotonic() - begun
        time.sleep(max(SECONDS_BETWEEN_LOOKS, spent / LARGEST_SHARE))


def frame(view: SweepView) -> Group:
    """The screen: a terminal that is too small for it shows its beginning."""
    lines = [Text(view.summary(), style="bold"), *([] if view.ended else [Text("Ctrl-C leaves", style="dim")])]
    failed = [status.line(cell) for cell in view.cells if cell.state == State.FAILED]
    for title, listed in (("Failed", failed[:LISTED]), ("Decided", view.decisions[-LISTED:])):
        if listed:
            lines += [
                Text(),
                Text(title, style="bold"),
                *(Text(line, no_wrap=True, overflow="ellipsis") for line in listed),
            ]
    cells = sorted(view.cells, key=lambda cell: list(STYLES).index(cell.state))
    head, *rows = status.rows(cells)
    # The columns of the sweep's own axes; the others would only repeat one value.
    shown = [i for i, column in enumerate(head) if column in status.RESULT_COLUMNS or len({row[i] for row in rows}) > 1]
    table = Table(*(head[i] for i in shown), box=None, pad_edge=False)
    for cell, row in zip(cells, rows, strict=True):
        table.add_row(*(row[i] for i in shown), style=STYLES[cell.state])
    return Group(*lines, Text(), table)


def news(before: SweepView | None, now: SweepView) -> Iterator[str]:
    """What has changed between two looks, as lines for a log. Without an earlier look, the state of all."""
    earlier = {} if before is None else {cell.run_id: cell.state for cell in before.cells}
    yield from map(status.line, (cell for cell in now.cells if cell.state != earlier.get(cell.run_id, State.MISSING)))
    known = set(before.decisions if before else ())
    yield from (f"decided: {line}" for line in now.decisions if line not in known)
    if before is None or status.counts(before.cells) != status.counts(now.cells) or before.ended != now.ended:
        yield now.summary()
